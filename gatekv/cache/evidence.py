"""What a layer remembers of a prompt or turn until it is decided: queries, and what scorers look at besides."""

from typing import TYPE_CHECKING, cast

import torch

from gatekv.cache.segments.sinks import Rotary
from gatekv.parts import Part
from gatekv.support import LATER

if TYPE_CHECKING:
    from gatekv.attention import AttentionCall
    from gatekv.cache.config import CacheConfig

Tensor = torch.Tensor


class Evidence(Part):
    """One layer's.

    Attributes:
        queries: [batch, heads, last, head_dim], the last ones' queries. hidden: [batch, tokens, width], what a gate
        reads, of an undecided cache alone. rotary: (cos, sin) [batch or 1, tokens, rotary_dim], or None. scaling: of
        the attention logits. known: of an undecided prompt, scores that some policy asked for already.
    """

    saved = ("queries",)

    def __init__(self) -> None:
        self.queries: Tensor | None = None
        self.hidden: Tensor | None = None
        self.rotary: Rotary | None = None
        self.scaling: float = LATER
        self.known: dict | None = None

    def observe(self, config: "CacheConfig", call: "AttentionCall", q: Tensor, scaling: float) -> None:
        """Keep what will be looked at of new tokens with queries q [batch, heads, n, head_dim]."""
        turned = config.needs.rotary and not (config.keep_later or config.turns)
        self.known = {} if config.defer else None
        self.scaling = scaling
        if last := config.queries:
            self.queries = torch.cat([*([] if self.queries is None else [self.queries]), q], 2)[:, :, -last:]
        if turned and call.rotary is None:
            raise ValueError(
                "positions='slot' turns queries by RoPE, and this model's attention gets no `position_embeddings`: use "
                "positions='original'."
            )
        if turned or config.defer:
            old, new = self.rotary, call.rotary
            if old is not None and new is not None:
                new = torch.cat([old[0], new[0]], 1), torch.cat([old[1], new[1]], 1)
            self.rotary = new
        if config.defer:
            self.hidden = torch.cat([*([] if self.hidden is None else [self.hidden]), call.hidden], 1)

    def forget(self) -> None:
        """It has been decided."""
        self.queries = self.hidden = self.rotary = None

    def crop(self, remove: int) -> None:
        """Take back the last tokens."""
        if self.queries is not None:
            self.queries = self.queries[:, :, : max(self.queries.shape[2] - remove, 0)]

    def index_select(self, index: Tensor) -> None:
        self.known = None if self.known is None else {}
        rotary, self.rotary = self.rotary, None
        super().index_select(index)
        if rotary is not None and len(rotary[0]) > 1:
            rotary = cast(Rotary, tuple(t.index_select(0, index) for t in rotary))
        self.rotary = rotary
