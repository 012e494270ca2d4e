"""Rows that workers read ahead are the rows that would have been read."""

import multiprocessing
import os
import signal

import pytest
import torch
from test_training import ToyData

from gatekv.training.loading import micro_batches, workers_for

CPU = torch.device("cpu")
FORKS = pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="processes cannot be forked")


@FORKS
@pytest.mark.parametrize("aligned", [False, True])
def test_workers_change_nothing(aligned):
    firsts = [0, 6, 12, 2, 10**6]
    state = torch.get_rng_state()
    here, ahead = (list(micro_batches(ToyData(), firsts, 2, aligned, n, CPU)) for n in (0, 2))
    assert torch.equal(torch.get_rng_state(), state), "dropout's numbers stay those of the row"
    assert len(here) == len(ahead) == 5
    for a, b in zip(here, ahead):
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


class Broken(ToyData):
    def batch(self, first, rows, align=False):
        if first == 4:
            raise ConnectionError("the stream broke off in row 4")
        return super().batch(first, rows, align)


@FORKS
@pytest.mark.parametrize("workers", [0, 2])
def test_what_goes_wrong_in_a_worker_is_said_as_if_here(workers):
    batches = micro_batches(Broken(), [0, 2, 4, 6], 2, False, workers, CPU)
    assert next(batches) and next(batches)
    with pytest.raises(ConnectionError, match="broke off in row 4"):
        next(batches)


class Asked(ToyData):
    def batch(self, first, rows, align=False):
        os.kill(os.getpid(), signal.SIGINT)  # Ctrl-C reaches every process of a terminal
        os.kill(os.getpid(), signal.SIGTERM)
        return super().batch(first, rows, align)


@FORKS
def test_workers_do_not_hear_signals():
    assert len(list(micro_batches(Asked(), [0, 2, 4], 2, False, 1, CPU))) == 3


def test_how_many_there_are(monkeypatch):
    accelerator = torch.device("cuda")
    if "fork" in multiprocessing.get_all_start_methods():
        assert [workers_for(-1, CPU), workers_for(-1, accelerator), workers_for(3, CPU)] == [0, 2, 3]
    monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: ["spawn"])
    assert workers_for(3, accelerator) == 0
