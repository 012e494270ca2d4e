"""Bits are the budget: what a token is worth buys it 0, 2, 3, 4, 5, 8 or all bits of its key, and of its value."""

import math
from dataclasses import dataclass

import torch

from gatekv.cache.segments.coded import Coded, token_bytes
from gatekv.cache.segments.pages import Pages
from gatekv.cache.segments.segment import Shape
from gatekv.policies.bits import LEAST, Dims, allot
from gatekv.policies.parts import Width
from gatekv.policies.scorer import Scorer, View

Tensor = torch.Tensor
HEAD_BYTES = 64  # of a head, whatever it holds: counts of its streams, the last block of its tables


@dataclass
class Allotting(Width):
    """A width under a budget of bytes: it says itself which tokens stay, and in how many bits.

    The sinks and the last `window` tokens stay whole; the others that the scorer protects are coded, never evicted.

    Attributes:
        window: last tokens that stay whole. sinks: first ones, where the scorer protects fewer. fewest: bits of a key
        and a value that stay.
    """

    window: int = 8
    sinks: int = 4
    allots = True
    fewest = LEAST, LEAST

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"window counts the last tokens that stay whole, at least 1; got {self.window}.")
        if self.sinks < 0:
            raise ValueError(f"sinks counts first tokens that stay whole, at least 0; got {self.sinks}.")

    def least(self, protected: Tensor, head_dim: int, itemsize: int) -> Tensor:
        """See `Width.least`."""
        coded = (protected - self.window).clamp_min(0)
        return protected.clamp_max(self.window) + (coded * self.share(head_dim, itemsize)).ceil().long()

    def segment(self, pages: Pages) -> Coded:
        """See `Width.segment`."""
        return Coded(pages)

    def share(self, head_dim: int, itemsize: int) -> float:
        """See `Width.share`; of a token of the fewest bits."""
        return token_bytes(self.fewest, (head_dim, head_dim), itemsize) / (2 * head_dim * itemsize)

    def fit(self, ratio: float, length: int, head_dim: int, itemsize: int, evicts: bool) -> tuple["Allotting", float]:
        """See `Width.fit`: its budget is of bytes already."""
        return self, ratio

    def forecast_bytes(self, shape: Shape, tokens: float) -> int:
        """See `Width.forecast_bytes`; tokens: as many whole ones as would cost what is spent."""
        return Coded.forecast_bytes(shape, tokens, shape.token_bytes)

    def weights(self, scorer: Scorer, view: View, scores: Tensor) -> tuple[Tensor, Tensor]:
        """(what each token is worth, as a logarithm or a rank; log w), both [batch, kv_heads, tokens].

        scores: the scorer's of these tokens. w: how much more an error of a key costs than one of its value.
        """
        raise NotImplementedError

    def allot(self, log_u: Tensor, log_w: Tensor, least: Tensor, whole: Tensor, room: Tensor, dims: Dims,
              itemsize: int) -> Tensor:  # fmt: skip
        """Bits of key and value, [units, tokens, 2] uint8: arguments as for `gatekv.policies.bits.allot`."""
        raise NotImplementedError


@dataclass
class Rate(Allotting):
    """Every token of every head gets the bits that its utility buys under one budget of bytes; 0 bits: it is evicted.

    The utility is a score's log-attention, its error model that of attention: losing value j moves the output by a_j,
    so squares of it by a_j²; an error of key j moves its logit by a variance of D · scaling² |q|² |k_j|² / head_dim,
    and the output by a_j² times that. So log u = 2 log a, and w_j is that variance for D = 1. Who shares one budget
    is the rule's question: a head (uniform), a layer (ada), the model (global). `gatekv.policies.bits` solves it.

    Args:
        window: of `Allotting`; so many last queries say how large queries are.
        slope: log u of one unit of log-attention.
        key_weight: factor on w_j.
        evicted: squared error of a token that is gone, in squares of its value. By the model above it is 1; what
        measures best is more, since a gone token cannot be found either (docs/lab-notes/bits.md).
    """

    slope: float = 2.0
    key_weight: float = 1.0
    evicted: float = 4.0
    utility = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("slope", "key_weight", "evicted"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is a factor above 0; got {getattr(self, name)}.")

    def key_errors(self, queries: Tensor, asks: Tensor | None, keys: Tensor, scaling: float) -> Tensor:
        """log w [batch, kv_heads, tokens]: the variance of a key's logit where its code loses all of it.

        queries: [batch, heads, n, head_dim], of which asks [batch, n] bool are real (None: all); keys: [batch,
        kv_heads, tokens, head_dim]. Of a group's heads the one with the largest queries counts.
        """
        size = lambda x: x.float().square().sum(-1).clamp_min(1e-12)  # noqa: E731
        real = torch.ones_like(size(queries)) if asks is None else asks[:, None].expand(-1, queries.shape[1], -1)
        asked = (size(queries) * real).sum(-1) / real.sum(-1).clamp_min(1)
        asked = asked.unflatten(1, (keys.shape[1], -1)).amax(-1)[..., None]
        return (self.key_weight * scaling**2 / keys.shape[-1] * asked * size(keys)).log()

    def weights(self, scorer: Scorer, view: View, scores: Tensor) -> tuple[Tensor, Tensor]:
        """See `Allotting.weights`."""
        q, asks = view.queries[:, :, -self.window :], view.valid[:, -self.window :]
        asks = asks[:, asks.shape[1] - q.shape[2] :]
        return self.slope * scorer.log_utility(scores), self.key_errors(q, asks, view.keys, view.scaling)

    def allot(self, log_u: Tensor, log_w: Tensor, least: Tensor, whole: Tensor, room: Tensor, dims: Dims,
              itemsize: int) -> Tensor:  # fmt: skip
        """See `gatekv.policies.bits.allot`."""
        return allot(log_u, log_w, least, whole, room, self.evicted, dims, itemsize)
