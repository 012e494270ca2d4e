"""The learned policy: a trained gate's logits, straight (threshold) or ranked under any budget rule."""

from dataclasses import dataclass

import torch

from gatekv.policies.scorer import NOTHING, Scorer, View
from gatekv.policies.snapkv import window_attention

OBSERVED = 32  # last queries whose attention is looked at


@dataclass
class Gate(Scorer):
    """Scores are the adapter's gate logits (Attention-Gate, arXiv 2410.12876).

    Where a prompt is ranked at its end, what its last queries attend to is known too, and a gate that reads one token
    at a time cannot know it: score = log sigmoid(logit) + observed · log a, with a the most attention that the last 32
    queries give to the token or its neighbours (SnapKV's evidence, as a prior). Gates under a threshold or decay judge
    by their logits alone.

    Args:
        observed: weight of the evidence; 0: the gate alone. docs/lab-notes/gate-limits.md has what it buys.
        sinks, window: None = as trained.
    """

    observed: float = 0.15
    sinks: int | None = None
    window: int | None = None
    gate = True
    utility = "log"
    evicts_in_decode = True
    decode = "evict"

    def __post_init__(self) -> None:
        if self.observed < 0:
            raise ValueError(f"observed is a weight, at least 0; got {self.observed}.")
        self.queries = OBSERVED if self.observed else 0

    def score(self, view: View) -> torch.Tensor:
        logits = view.gate_logits()
        if not self.observed:
            return logits
        attention = window_attention(view, min(OBSERVED, view.queries.shape[2])).amax((2, 3))
        near = torch.nn.functional.max_pool1d(attention, 7, stride=1, padding=3)
        return torch.nn.functional.logsigmoid(logits.float()) + self.observed * (near + NOTHING).log()


@dataclass
class GateAlone(Gate):
    """The gate's logits and nothing else: for measuring gates, and papers that know no evidence."""

    observed: float = 0.0
