"""Thresholds for any budget: quantiles of a gate's logits, measured once after training, stored in the adapter."""

import math
from dataclasses import dataclass

import torch


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

    def thresholds(self, sinks: int, window: int):
        """(ratio, tokens seen [...], prompt length or None) -> logit thresholds [...] of tokens that leave the window.

        A row that has seen T tokens may hold ratio·T, sinks and window inside. Flags are final, so the share that keeps
        this at every T is 0 until (sinks + window)/ratio tokens are seen and `ratio` from then on. Where the prompt's
        length N is known, its tokens share alike: (ratio·N - s - w)/(N - s - w).
        """
        levels = torch.tensor(self.levels)

        def at(ratio: float, seen: torch.Tensor, prompt: int | None = None) -> torch.Tensor:
            if ratio >= 1:
                return torch.full(seen.shape, -torch.inf, device=seen.device)
            protected = sinks + window
            level = torch.where(seen * ratio >= protected, ratio, 0.0)
            if prompt is not None:
                level = level.masked_fill(seen <= prompt, (ratio * prompt - protected) / max(1, prompt - protected))
            row, grid = torch.tensor(self.row(ratio), device=seen.device), levels.to(seen.device)
            level = level.clamp(0, 1)
            right = torch.searchsorted(grid, level.contiguous()).clamp(1, len(grid) - 1)
            share = (level - grid[right - 1]) / (grid[right] - grid[right - 1])
            value = row[right - 1] + share * (row[right] - row[right - 1])
            return torch.where(level > 0, value, torch.inf)

        return at
