"""The control of `rate`: kept tokens all have the same few bits, and the best are kept while there is room."""

from dataclasses import dataclass

import torch

from gatekv.cache.segments.coded import token_bytes
from gatekv.ops.codec import WIDTHS
from gatekv.ops.naive import WHOLE
from gatekv.policies.bits import EIGHTHS, Dims, eighths
from gatekv.policies.rate import Allotting
from gatekv.policies.scorer import Scorer, View

Tensor = torch.Tensor


@dataclass
class Equal(Allotting):
    """Keys of all kept tokens have `keys` bits a number, values `values`; with any scorer, whose scores only rank.

    KIVI (2402.02750) and its kind store every token so, in codes of their own; `equal` alone is that under ours.
    """

    keys: int = 4
    values: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("keys", "values"):
            if getattr(self, name) not in WIDTHS:
                raise ValueError(f"{name} is a number of bits, one of {WIDTHS}; got {getattr(self, name)}.")
        self.fewest = self.keys, self.values

    def weights(self, scorer: Scorer, view: View, scores: Tensor) -> tuple[Tensor, Tensor]:
        """See `Allotting.weights`: scores as they are, and no w."""
        return scores.float(), torch.zeros_like(scores, dtype=torch.float32)

    def allot(self, log_u: Tensor, log_w: Tensor, least: Tensor, whole: Tensor, room: Tensor, dims: Dims,
              itemsize: int) -> Tensor:  # fmt: skip
        """See `Allotting.allot`."""
        real = log_u > -torch.inf
        price = eighths([token_bytes(pair, dims, itemsize) for pair in (self.fewest, (WHOLE, WHOLE))], log_u.device)
        cost = price[whole.long()] * real
        worth = log_u.masked_fill((least | whole) & real, torch.inf)
        ranked, order = worth.sort(dim=-1, descending=True, stable=True)
        fits = (cost.gather(-1, order).cumsum(-1) <= EIGHTHS * room[:, None]) | (ranked == torch.inf)
        stays = torch.zeros_like(fits).scatter(-1, order, fits) & real
        bits = torch.where(whole[..., None], WHOLE, torch.tensor(self.fewest, device=log_u.device))
        return torch.where(stays[..., None], bits, 0).to(torch.uint8)
