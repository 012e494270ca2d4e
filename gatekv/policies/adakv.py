"""Ada-KV (arXiv 2407.11550): the heads of a layer compete for the layer's budget, with a floor for each."""

from dataclasses import dataclass

import torch

from gatekv.config import check_choice
from gatekv.policies.budgets import Rule, ranked, top


@dataclass
class Ada(Rule):
    """B_h = round((1 - alpha) c_h + alpha b); c_h: how many of the layer's top (kv_heads · b) unprotected tokens lie in
    head h; b: unprotected tokens per head (§3, alg. 1).

    The paper's code has int(alpha b), which loses a token of a full budget; rounding once does not.

    Args:
        alpha: the floor's share (paper: .2).
        floor: "soft": as above; "hard": each head's best int(alpha · count) tokens are safe and the others compete
            (kvpress's reading), protected ones among them.
    """

    alpha: float = 0.2
    floor: str = "soft"

    def __post_init__(self) -> None:
        check_choice("floor", self.floor, ("soft", "hard"))
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha is the share of its budget that a head is sure of, 0 to 1; got {self.alpha}.")

    def keep(
        self, scores: torch.Tensor, protected: torch.Tensor, valid: torch.Tensor, counts: torch.Tensor
    ) -> torch.Tensor:
        layers, batch, heads, tokens = scores.shape
        guarded = protected & valid[:, None]
        if self.floor == "hard":
            order = ranked(scores, guarded, valid)
            sure = (counts * self.alpha).long().clamp_min(int(self.alpha > 0))
            order = order.masked_fill(top(order, sure[:, :, None, None]), torch.inf)
            return top(order.flatten(-2), (counts * heads)[..., None]).view(scores.shape)
        free = counts - guarded.sum(-1).amax(-1)  # b, per layer and row
        rivals = scores.float().masked_fill(guarded | ~valid[:, None], -torch.inf)
        joint = top(rivals.flatten(-2), (free * heads)[..., None]).view(scores.shape).sum(-1)
        head_counts = torch.round((1 - self.alpha) * joint + (self.alpha * free)[..., None]).long()
        return top(rivals, head_counts[..., None]) | guarded
