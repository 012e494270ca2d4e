"""H2O (arXiv 2306.14048): heavy hitters, the tokens that all queries so far have attended to most, and recent ones."""

from dataclasses import dataclass

import torch

from gatekv.ops.attention_mass import attention_mass
from gatekv.policies.scorer import ALL, Scorer, View


@dataclass
class H2O(Scorer):
    """score = attention received, summed over all queries so far, mean over the query heads of a group (§4, alg. 1).

    Decides at the end of the prompt and at every step; what is gone never comes back, and later sums are over the
    softmax of what is left. The column sums of the prompt are made in blocks, never as a square.

    Args:
        recent_share: of the buffer, for the most recent tokens (paper's code: heavy and recent of equal size).
    """

    recent_share: float = 0.5
    sinks: int = 0
    queries = ALL
    evicts_in_decode = True
    decode = "evict"
    needs_attention = True
    utility = "attention"

    def __post_init__(self) -> None:
        if not 0 <= self.recent_share < 1:
            raise ValueError(f"recent_share is a share of the buffer, at least 0 and below 1; got {self.recent_share}.")

    def score(self, view: View) -> torch.Tensor:
        return attention_mass(view.queries, view.keys, scale=view.scaling, valid=view.valid, sinks=view.learned_sinks)

    def recent(self, counts: torch.Tensor, window: int) -> torch.Tensor:
        return (counts * self.recent_share).long().clamp_min(window)

    def observe(self, scores: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
        return scores + attention
