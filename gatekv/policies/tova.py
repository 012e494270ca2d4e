"""TOVA (arXiv 2401.06104): keep what the last query attends to, one set of tokens for all heads of a layer."""

from dataclasses import dataclass

import torch

from gatekv.policies.scorer import Scorer, View
from gatekv.policies.snapkv import window_attention


@dataclass
class TOVA(Scorer):
    """score = the last query's attention, mean over all heads (§4). Decides at the end of the prompt and at every step.

    Nothing is protected but the newest token, which has had no query of its own yet.
    """

    sinks: int = 0
    window: int = 1
    queries = 1
    evicts_in_decode = True
    decode = "evict"
    needs_attention = True
    utility = "attention"

    def score(self, view: View) -> torch.Tensor:
        return window_attention(view, 1)[..., 0, :].mean((1, 2))[:, None].expand(view.keys.shape[:3])

    def observe(self, scores: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
        return attention.mean(1, keepdim=True).expand_as(attention)
