"""L2 / Knorm (arXiv 2406.11430): tokens with small key norms draw attention, so keep those."""

from dataclasses import dataclass

import torch

from gatekv.policies.scorer import Scorer, View


@dataclass
class L2Norm(Scorer):
    """score = -||k||_2, in float32 because in bf16 most scores tie. Needs keys alone.

    Decides once, at the end of the prompt; with decode="evict" it goes on at every step (the paper's language
    modelling runs). The paper protects no token. Of little use where the model normalises its keys (QK-norm: Qwen3,
    Gemma3): there the norms say next to nothing.

    Args:
        skip_layers: layers left whole (paper: 0 and 1).
    """

    skip_layers: tuple[int, ...] = (0, 1)
    sinks: int = 0
    window: int = 0
    evicts_in_decode = True

    def score(self, view: View) -> torch.Tensor:
        return self.enter(view.keys, None)

    def enter(self, keys: torch.Tensor, index: torch.Tensor | None) -> torch.Tensor:
        return -keys.float().norm(dim=-1)
