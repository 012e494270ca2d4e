"""The learned policy: a trained gate's logits, straight (threshold) or ranked under any budget rule."""

from dataclasses import dataclass

import torch

from gatekv.policies.view import View


@dataclass
class Gate:
    """Scores are the adapter's gate logits (Attention-Gate, arXiv 2410.12876). sinks and window: None = as trained."""

    sinks: int | None = None
    window: int | None = None
    queries: int = 0
    skip_layers = ()

    def score(self, view: View) -> torch.Tensor:
        return view.gate_logits()
