"""When to stop because the numbers are no good, or a process is gone, and what to say then."""

import math
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import median

import torch
from accelerate.utils import gather_object

WINDOW, FEWEST = 50, 20  # losses the median is taken over, and below how many there is no judgement
FLOOR = 1.0  # a median below this counts as this: next to nothing, twenty times more is still next to nothing


@dataclass
class Fingerprint:
    """One micro-batch: its first row and number of rows, the hash of its input_ids, its loss, a scalar or a number."""

    first: int
    rows: int
    sha256: str
    loss: torch.Tensor | float

    def __str__(self) -> str:
        return f"rows {self.first}…{self.first + self.rows - 1} (input_ids sha256 {self.sha256}), loss {self.loss:.6g}"


class LossGuard:
    """Judges each step's loss, the mean over all processes, so that all of them come to the same verdict.

    Explosion: after 20 steps, a loss above ratio · max(1, median of the last 50).

    Args:
        ratio: 0 lets a finite loss be as large as it likes. losses: of the steps before, when a run is resumed.
    """

    def __init__(self, ratio: float, losses: list[float]) -> None:
        self.ratio, self.losses = ratio, deque(losses, WINDOW)

    def verdict(self, loss: float, norm: float | None) -> str:
        """What is wrong with a step, or "". norm: of its gradient, where that is known."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if norm is not None and not math.isfinite(norm):
            return f"the gradient's norm is {norm}, the loss {loss:.6g}"
        if self.ratio and len(self.losses) >= FEWEST:
            usual = median(self.losses)
            if loss > self.ratio * max(usual, FLOOR):
                return (
                    f"the loss exploded to {loss:.6g}, the median of the last {len(self.losses)} steps is {usual:.6g}"
                )
        self.losses.append(loss)
        return ""


def failure(verdict: str, step: int, batches: list[Fingerprint], last: str) -> FloatingPointError:
    """The error that stops a run, naming the worst micro-batch of all processes; every process must call this.

    batches: this process's micro-batches of the step. last: name of the newest checkpoint, or "".
    """
    read = [replace(b, loss=float(b.loss)) for b in batches]
    worst = max(gather_object(read), key=lambda b: math.inf if math.isnan(b.loss) else b.loss)
    exploded = "; if that is how it should be, go on with --resume --max_loss_ratio 0" if "exploded" in verdict else ""
    kept = f"{last} is untouched" if last else "no checkpoint was saved yet"
    return FloatingPointError(
        f"{verdict} at step {step}; worst: {worst}: lower learning_rate or sparsity_weight, or use dtype=float32"
        f"{exploded}. {kept}."
    )


@contextmanager
def peers_named() -> Iterator[None]:
    """Inside, what the communication library raises when another process is gone becomes a ConnectionError."""
    try:
        yield
    except RuntimeError as error:
        # NCCL's errors have a type of their own; of gloo's torch makes plain ones, known by their place in its sources.
        if not isinstance(error, torch.distributed.DistError) and "gloo/transport" not in str(error):
            raise
        raise ConnectionError(
            "another process of this run is gone, or did not answer in time; look for its error first. Checkpoints are "
            f"whole: the same command with --resume goes on. ({str(error).splitlines()[0]})"
        ) from error
