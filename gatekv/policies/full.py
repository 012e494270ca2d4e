"""Control: everything is kept, through the same path as every other policy."""

from dataclasses import dataclass

import torch

from gatekv.policies.scorer import Scorer, View


@dataclass
class Full(Scorer):
    """Keeps every token whatever the budget; the row that every ratio is taken against."""

    queries: int = 0
    evicts = False
    utility = "log"

    def score(self, view: View) -> torch.Tensor:
        return torch.zeros(view.keys.shape[:3], device=view.keys.device)
