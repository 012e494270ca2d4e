"""Thresholds for any budget: quantiles of a gate's logits, measured once after training, stored in the adapter."""

import bisect
import math
from dataclasses import dataclass
from typing import Protocol

import torch

from gatekv.config import MOST

CURE = "Calibrate again (gatekv.training.calibrate), or load the adapter as it was saved."


class Thresholds(Protocol):
    """What `Calibration.thresholds` returns."""

    def __call__(self, ratio: float, seen: torch.Tensor, prompt: int | None = None) -> torch.Tensor: ...


@dataclass
class Calibration:
    """Quantiles of the logits of tokens beyond sinks and window, all layers and heads pooled.

    Attributes:
        ratios: [R] descending; the text was read with eviction on at these ratios (1.0: nothing evicted).
        levels: [L] ascending shares of tokens kept, from 0 to 1.
        table: [R][L] logit thresholds: `table[r][l]` keeps the share `levels[l]`.
    """

    ratios: list[float]
    levels: list[float]
    table: list[list[float]]

    def __post_init__(self) -> None:
        numbers = [self.ratios, self.levels, *(self.table if isinstance(self.table, list) else [None])]
        for row in numbers:
            if not isinstance(row, list) or not all(type(v) in (int, float) and abs(v) <= MOST for v in row):
                raise ValueError(f"a calibration's ratios, levels and table are lists of finite numbers. {CURE}")
        falls = all(a > b > 0 for a, b in zip(self.ratios, self.ratios[1:]))
        rises = all(a < b for a, b in zip(self.levels, self.levels[1:]))
        if not (self.ratios and falls and 0 < self.ratios[0] <= 1):
            raise ValueError(f"a calibration's ratios fall from 1 and stay above 0, these are {self.ratios}. {CURE}")
        if not (len(self.levels) > 1 and rises and self.levels[0] >= 0 and self.levels[-1] <= 1):
            raise ValueError(f"a calibration's levels rise from 0 to 1, these are {self.levels}. {CURE}")
        if [len(row) for row in self.table] != [len(self.levels)] * len(self.ratios):
            raise ValueError(f"a calibration's table has one row a ratio and one column a level. {CURE}")

    def row(self, ratio: float) -> list[float]:
        """The table's row for a ratio, interpolated between measured ones in log(ratio)."""
        if ratio >= self.ratios[0]:
            return self.table[0]
        for i in range(len(self.ratios) - 1):
            high, low = self.ratios[i], self.ratios[i + 1]
            if ratio >= low:
                share = math.log(high / ratio) / math.log(high / low)
                return [a + share * (b - a) for a, b in zip(self.table[i], self.table[i + 1])]
        return self.table[-1]

    def at_level(self, ratio: float, level: float) -> float:
        """The logit threshold that keeps the share `level` of unprotected tokens while the cache holds `ratio`."""
        row = self.row(ratio)
        right = min(max(bisect.bisect_left(self.levels, level), 1), len(row) - 1)
        low, high = self.levels[right - 1], self.levels[right]
        return row[right - 1] + (level - low) / (high - low) * (row[right] - row[right - 1])

    def thresholds(self, sinks: int, window: int) -> Thresholds:
        """(ratio, tokens seen [...], prompt length or None) -> logit thresholds [...] of tokens that leave the window.

        A row that has seen T tokens may hold ratio·T, sinks and window inside. Flags are final, so the share that keeps
        this at every T is 0 until (sinks + window)/ratio tokens are seen and `ratio` from then on. Where the prompt's
        length N is known, its tokens share alike: (ratio·N - s - w)/(N - s - w).
        """
        protected = sinks + window

        def at(ratio: float, seen: torch.Tensor, prompt: int | None = None) -> torch.Tensor:
            if ratio >= 1:
                return torch.full(seen.shape, -torch.inf, device=seen.device)
            later = torch.full(seen.shape, self.at_level(ratio, ratio), device=seen.device)
            out = later.masked_fill(seen * ratio < protected, torch.inf)
            if prompt is not None:
                level = (ratio * prompt - protected) / max(1, prompt - protected)
                inside = self.at_level(ratio, level) if level > 0 else torch.inf
                out = out.masked_fill(seen <= prompt, inside)
            return out

        return at
