"""Two processes: a signal to one stops both with a checkpoint, a wrong number in one stops both, a dead one no hang.

`make test` does each under one backend, the three under three.
"""

import signal
import subprocess
import time
from pathlib import Path

import pytest
from backends import LAUNCHED, chosen_of, end, start

from gatekv.training import rotation

WORKER = str(Path(__file__).with_name("stopper.py"))


def run(folder: Path, backend: str, factor: float = 1.0) -> list[subprocess.Popen]:
    return start([WORKER, backend, str(folder), str(factor)], backend)


def under_way(folder: Path) -> None:
    """Wait until both are in the middle of training."""
    limit = time.monotonic() + 240
    while not all((folder / f"pid-{rank}").exists() for rank in (0, 1)):
        assert time.monotonic() < limit, "the two never got to step 2"
        time.sleep(0.05)


SIGNALS = [("ddp", 0, signal.SIGTERM), ("ddp", 1, signal.SIGTERM),
           ("zero3", 0, signal.SIGINT), ("fsdp2", 1, signal.SIGINT)]  # fmt: skip
DEAD = [("ddp", 0), ("ddp", 1), ("zero2", 0), ("zero3", 1), ("fsdp2", 0)]


@pytest.mark.parametrize("backend,rank,number", chosen_of(SIGNALS, {("ddp", 1, signal.SIGTERM)}))
def test_a_signal_to_one_stops_both_with_a_checkpoint(tmp_path, backend, rank, number):
    processes = run(tmp_path, backend)
    under_way(tmp_path)
    processes[rank].send_signal(number)
    texts = end(processes)
    assert [p.returncode for p in processes] == [75, 75], texts
    step = rotation.steps(tmp_path)[-1]
    assert all(f"stopped after step {step} of 1000" in text for text in texts)
    assert len(rotation.read(tmp_path / f"checkpoint-{step}")[1]["records"]) == step


@pytest.mark.parametrize("backend", chosen_of([(backend,) for backend in LAUNCHED], {("zero3",)}))
def test_a_loss_that_is_no_number_in_one_stops_both_and_names_its_rows(tmp_path, backend):
    processes = run(tmp_path, backend, float("nan"))
    texts = end(processes)
    assert [p.returncode for p in processes] == [1, 1], texts
    for text in texts:
        assert "the loss is nan at step 3; worst: rows 7…7" in text and "checkpoint-3 is untouched" in text, text
    assert rotation.steps(tmp_path) == [3]


@pytest.mark.parametrize("backend,rank", chosen_of(DEAD, {("fsdp2", 0)}))
def test_a_dead_process_ends_the_other_with_a_message(tmp_path, backend, rank):
    processes = run(tmp_path, backend)
    under_way(tmp_path)
    processes[rank].kill()
    start_of_end = time.monotonic()
    text = end(processes)[1 - rank]
    assert processes[1 - rank].returncode == 1, text
    assert time.monotonic() - start_of_end < 60
    assert "another process of this run is gone" in text and "--resume" in text, text


@pytest.mark.exhaustive
def test_both_hear_that_there_is_nothing_to_resume(tmp_path):
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / "state.json").write_text("{}")
    processes = run(tmp_path, "ddp")
    texts = end(processes)
    assert [p.returncode for p in processes] == [1, 1], texts
    assert all("none of the 1 checkpoints" in text and "start anew" in text for text in texts), texts
