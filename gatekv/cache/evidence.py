"""What a layer remembers of a prompt or turn until it is decided: queries, and what scorers look at besides."""

from typing import TYPE_CHECKING, cast

import torch

from gatekv.ops.order import along, order_of
from gatekv.parts import Part
from gatekv.support import LATER

if TYPE_CHECKING:
    from gatekv.attention import AttentionCall
    from gatekv.cache.config import CacheConfig

Tensor = torch.Tensor
Pair = tuple[Tensor, Tensor]


class Evidence(Part):
    """One layer's.

    Attributes:
        queries: [batch, heads, last, head_dim], the last ones' queries. hidden: [batch, tokens, width], what a gate
        reads, of an undecided cache alone. rotary: (cos, sin) [batch or 1, tokens, rotary_dim], as
        `AttentionCall.turning` reads them, or None. scaling: of the attention logits. sinks: [heads], the model's
        learned ones, or None. known: of an undecided prompt, scores that some policy asked for already.
    """

    saved = ("queries",)
    borrowed = ("sinks",)

    def __init__(self) -> None:
        self.queries: Tensor | None = None
        self.hidden: Tensor | None = None
        self.rotary: Pair | None = None
        self.scaling: float = LATER
        self.sinks: Tensor | None = None
        self.known: dict | None = None

    def tensors(self) -> list[Tensor]:
        return [t for t in super().tensors() if t is not self.sinks]

    def observe(self, config: "CacheConfig", call: "AttentionCall", q: Tensor, scaling: float, valid: Tensor,
                before: Tensor | None = None) -> None:  # fmt: skip
        """Keep what will be looked at of new tokens with queries q [batch, heads, n, head_dim], valid [batch, n].

        before: [batch, 1], real tokens of the prompt or turn that came earlier, where the new pads belong before them.
        """
        self.known = {} if config.defer else None
        self.scaling, self.sinks = scaling, call.sinks

        def behind(old: Tensor | None, new: Tensor, dim: int) -> Tensor:
            if before is not None:
                held = 0 if old is None else old.shape[dim]
                real = torch.cat([torch.arange(held, 0, -1, device=q.device) <= before, valid], 1)
                return along(new if old is None else torch.cat([old, new], dim), order_of(real), dim)
            return new if old is None else torch.cat([old, new], dim)

        if last := config.queries:
            self.queries = behind(self.queries, q, 2)[:, :, -last:]
        turning = call.turning(strict=not config.defer) if config.turns_queries or config.defer else None
        if turning is not None and turning.relative:
            new: Pair = turning
            old = (None, None) if self.rotary is None else tuple(t.expand(len(new[0]), -1, -1) for t in self.rotary)
            if self.rotary is not None:
                new = cast(Pair, tuple(t.expand(len(cast(Tensor, old[0])), -1, -1) for t in new))
            self.rotary = cast(Pair, tuple(behind(a, b, 1) for a, b in zip(old, new)))
        if config.defer:
            self.hidden = behind(self.hidden, call.hidden, 1)

    def forget(self) -> None:
        """It has been decided."""
        self.queries = self.hidden = self.rotary = None

    def crop(self, remove: int) -> None:
        """Take back the last tokens."""
        if self.queries is not None:
            self.queries = self.queries[:, :, : max(self.queries.shape[2] - remove, 0)]

    def index_select(self, index: Tensor) -> None:
        self.known = None if self.known is None else {}
        rotary, self.rotary, sinks, self.sinks = self.rotary, None, self.sinks, None
        super().index_select(index)
        self.sinks = sinks
        if rotary is not None and len(rotary[0]) > 1:
            rotary = cast(Pair, tuple(t.index_select(0, index) for t in rotary))
        self.rotary = rotary
