"""The learned policy: a trained gate's logits, straight (threshold) or ranked under any budget rule."""

from dataclasses import dataclass

import torch

from gatekv.policies.scorer import Scorer, View


@dataclass
class Gate(Scorer):
    """Scores are the adapter's gate logits (Attention-Gate, arXiv 2410.12876). sinks and window: None = as trained."""

    sinks: int | None = None
    window: int | None = None
    streams = True
    decode = "evict"

    def score(self, view: View) -> torch.Tensor:
        return view.gate_logits()
