"""How long a run still takes, from the steps it has made."""

import time
from typing import cast

# A step on the oracle alone runs the model once; one with a student three times and backward. Until one was timed:
STUDENT = 3.0  # times as long


class Remaining:
    """Seconds left of a run whose first steps are shorter than the others.

    Args:
        steps: of the whole run. warm: how many of them, the first, train on the oracle alone. done: made before this
            process began.
    """

    def __init__(self, steps: int, warm: int, done: int = 0):
        self.steps, self.warm, self.done = steps, warm, done
        self._times: dict[bool, list[float]] = {True: [], False: []}
        self._last = time.monotonic()

    def step(self) -> None:
        """A step has ended. The first of a process is not counted: it also makes what later ones find."""
        now = time.monotonic()
        self._times[self.done < self.warm].append(now - self._last)
        self._last, self.done = now, self.done + 1

    def seconds(self) -> float | None:
        """What the remaining steps take; None before a step was timed."""
        mean = {kind: sum(t[1:]) / len(t[1:]) if len(t) > 1 else None for kind, t in self._times.items()}
        warm, student = mean[True], mean[False]
        if warm is None and student is None:
            return None
        student = STUDENT * cast(float, warm) if student is None else student
        warm = student / STUDENT if warm is None else warm
        left = max(0, self.warm - self.done)
        return left * warm + (self.steps - self.done - left) * student

    def __str__(self) -> str:
        seconds = self.seconds()
        return "?" if seconds is None else f"{int(seconds) // 60}:{int(seconds) % 60:02}"
