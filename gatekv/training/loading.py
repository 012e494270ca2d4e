"""Micro-batches in order, read and tokenised ahead of time by DataLoader's workers.

A row is a pure function of its index, so what workers do ahead changes nothing: a run that is resumed asks for the rows
that come next, whatever was read ahead of its end.
"""

import multiprocessing
import signal
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch.utils.data import DataLoader, Dataset

from gatekv.training.packing import RowSource
from gatekv.training.rows import Batch


class _MicroBatches(Dataset):
    def __init__(self, data: RowSource, firsts: Sequence[int], rows: int, aligned: bool) -> None:
        self.data, self.firsts, self.rows, self.aligned = data, firsts, rows, aligned

    def __len__(self) -> int:
        return len(self.firsts)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return self.data.batch(self.firsts[i], self.rows, align=self.aligned)


def workers_for(asked: int, device: torch.device) -> int:
    """How many there are. asked: -1: two where an accelerator computes meanwhile, none where they would take the CPU
    from training itself. Where processes cannot be forked, none: not every source can be sent to another process."""
    if "fork" not in multiprocessing.get_all_start_methods():
        return 0
    return asked if asked >= 0 else 0 if device.type == "cpu" else 2


def _deaf(worker: int) -> None:
    """A signal comes to all processes of a terminal or a job; the loop needs its rows until it has saved."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def micro_batches(
    data: RowSource, firsts: Iterable[int], rows: int, aligned: bool, workers: int, device: torch.device
) -> Iterator[Batch]:
    """The batches that begin with rows `firsts`, in that order, on the CPU.

    rows: of each. aligned: see `RowSource.batch`. workers: processes that read ahead; 0: rows are read when asked for.
    """
    return iter(
        DataLoader(
            _MicroBatches(data, list(firsts), rows, aligned),
            batch_size=None,
            num_workers=workers,
            multiprocessing_context="fork" if workers else None,
            worker_init_fn=_deaf,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # its own: nothing is taken from the generator that dropout draws from
        )
    )
