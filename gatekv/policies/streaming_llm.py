"""StreamingLLM (arXiv 2309.17453): attention sinks and a sliding window."""

import warnings
from dataclasses import dataclass

import torch

from gatekv.cache.segments.pages import Pages
from gatekv.cache.segments.sinks import CachePositionSinks
from gatekv.config import check_choice
from gatekv.policies.controls import real_index
from gatekv.policies.scorer import Scorer, View


@dataclass
class StreamingLLM(Scorer):
    """Keeps the first `sinks` tokens and the most recent ones, at the prompt's end and at every step.

    Args:
        sinks: attention sinks (paper: 4).
        positions: "original": as most comparisons have it; "cache": the paper's, where positions count places in the
            cache, so that a text may be longer than any the model was trained on.
    """

    sinks: int = 4
    window: int = 1
    positions: str = "original"
    evicts_in_decode = True
    decode = "evict"

    def __post_init__(self) -> None:
        if self.positions == "slot":
            warnings.warn("positions='slot' is called 'cache' now.", FutureWarning, stacklevel=3)
            self.positions = "cache"
        check_choice("positions", self.positions, ("original", "cache"))
        self.cache_positions = self.positions == "cache"

    def score(self, view: View) -> torch.Tensor:
        return real_index(view.valid)[:, None].float().expand(view.keys.shape[:3])

    def enter(self, keys: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return index[:, None].float().expand(keys.shape[:3])

    def segment(self, pages: Pages) -> CachePositionSinks | None:
        return CachePositionSinks(pages) if self.cache_positions else None
