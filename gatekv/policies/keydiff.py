"""KeyDiff (arXiv 2504.15364): keys that differ from the average key are worth keeping."""

from dataclasses import dataclass

import torch

from gatekv.policies.scorer import Scorer, View


@dataclass
class KeyDiff(Scorer):
    """score = -cos(k, anchor), the anchor being the mean of the normalised keys of a head (§3). Needs keys alone.

    Decides once, at the end of the prompt (the paper also goes block by block). Protects nothing.
    """

    sinks: int = 0
    window: int = 0

    def score(self, view: View) -> torch.Tensor:
        keys, real = torch.nn.functional.normalize(view.keys.float(), dim=-1), view.valid[:, None, :, None]
        anchor = (keys * real).sum(2, keepdim=True) / real.sum(2, keepdim=True).clamp_min(1)
        return -torch.nn.functional.cosine_similarity(view.keys.float(), anchor, dim=-1)
