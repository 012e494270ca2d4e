"""L2 / Knorm (arXiv 2406.11430): tokens with small key norms draw attention, so keep those."""

from dataclasses import dataclass

import torch

from gatekv.policies.view import View


@dataclass
class L2Norm:
    """Decides once, at the end of the prompt: score = -||k||_2, in float32 because in bf16 most scores tie.

    The paper protects nothing. Its skipped layers are whole and paid for by the others.

    Args:
        skip_layers: layers left whole (paper: 0 and 1).
    """

    skip_layers: tuple[int, ...] = ()
    sinks: int = 0
    window: int = 0
    queries: int = 0

    def score(self, view: View) -> torch.Tensor:
        return -view.keys.float().norm(dim=-1)
