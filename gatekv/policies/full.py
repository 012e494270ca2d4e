"""Control: everything is kept, through the same path as every other policy."""

from dataclasses import dataclass

import torch

from gatekv.policies.view import View


@dataclass
class Full:
    """Keeps every token whatever the budget; the row that every ratio is taken against."""

    sinks: int = 0
    window: int = 0
    queries: int = 0
    skip_layers = ()

    def score(self, view: View) -> torch.Tensor:
        return torch.zeros(view.keys.shape[:3], device=view.keys.device)
