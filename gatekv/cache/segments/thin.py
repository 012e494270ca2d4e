"""Old keys with fewer channels (ThinK): pages whose keys are narrower than their values."""

from typing import Protocol

import torch

from gatekv.cache.segments.pages import Pages
from gatekv.cache.segments.prompt_end import PromptEnd
from gatekv.cache.segments.segment import Read, Shape
from gatekv.cache.segments.width import Narrow
from gatekv.ops.naive import group_queries

Tensor = torch.Tensor


class KeepsChannels(Protocol):
    """What is asked of the width (`gatekv.policies.think.Channels`)."""

    window: int

    def kept(self, queries: Tensor, energy: Tensor, valid: Tensor) -> Tensor:
        """See there."""
        ...


class Thin(Narrow):
    """Tokens of one layer whose keys have lost channels.

    Attributes:
        pages: keys [P, block_size, kept], values [P, block_size, head_dim].
        channels: [batch, kv_heads, kept] int64, which of head_dim the keys still have; None: no prompt has ended yet.
    """

    saved = ("pages", "channels")

    def __init__(self, width: KeepsChannels, pages: Pages) -> None:
        """An empty one beside `pages`, whose old tokens it will take."""
        self.width, self.pages = width, pages.blank()
        self.channels: Tensor | None = None

    def absorb(self, pages: Pages, end: PromptEnd) -> None:
        """Take the old tokens of `pages`, narrowed to the channels that mattered at the first prompt's end."""
        first = self.channels is None
        if self.channels is None:
            self.channels = self.width.kept(end.queries, end.energy(pages), end.asks)
        old = pages.split(end.old(pages, self.width.window))
        old.narrow(self.channels.flatten(0, 1))
        if first:
            self.pages = old
        else:
            self.pages.absorb(old)

    def stores(self) -> list[Pages]:
        return [self.pages]

    def reads(self, q: Tensor) -> list[Read]:
        """Of each query the channels that these keys can answer."""
        if self.channels is None:
            return [(q, self.pages.keys, self.pages.values, self.pages.table)]
        b, h, n, _ = q.shape
        grouped = group_queries(q, self.channels.shape[1])
        index = self.channels[:, :, None, None].expand(-1, -1, grouped.shape[2], n, -1)
        part = grouped.gather(-1, index).reshape(b, h, n, -1)
        return [(part, self.pages.keys, self.pages.values, self.pages.table)]

    @classmethod
    def forecast_bytes(cls, shape: Shape, tokens: float, kept: int = 0) -> int:
        """kept: channels of a key."""
        return Pages.forecast_bytes(shape, tokens, kept * shape.dtype.itemsize) + shape.rows * kept * 8
