"""Old keys with fewer channels (ThinK): pages whose keys are narrower than their values."""

import copy

import torch

from gatekv.cache.pages import Pages, Read
from gatekv.cache.prompt_end import PromptEnd
from gatekv.ops.naive import group_queries
from gatekv.policies.think import Channels

Tensor = torch.Tensor


class Thin:
    """Tokens of one layer whose keys have lost channels.

    Attributes:
        pages: keys [P, block_size, kept], values [P, block_size, head_dim].
        channels: [batch, kv_heads, kept] int64, which of head_dim the keys still have.
    """

    def __init__(self, pages: Pages, channels: Tensor) -> None:
        self.pages, self.channels = pages, channels

    @classmethod
    def of(cls, pages: Pages, width: Channels, end: PromptEnd) -> "Thin":
        """The old tokens of `pages`, narrowed to the channels that matter at this end; `pages` keeps the others."""
        channels = width.kept(end.queries, end.energy(pages), end.asks)
        old = pages.split(pages.positions < end.seen - width.window)
        old.narrow(channels.flatten(0, 1))
        return cls(old, channels)

    def absorb(self, pages: Pages, width: Channels, end: PromptEnd) -> None:
        """Take the old tokens of `pages` too, through the same channels."""
        old = pages.split(pages.positions < end.seen - width.window)
        old.narrow(self.channels.flatten(0, 1))
        self.pages.absorb(old)

    def stores(self) -> list[Pages]:
        """The pages."""
        return [self.pages]

    def reads(self, q: Tensor) -> list[Read]:
        """See `Kept.reads`: of each query [B, H, Q, D] the channels that these keys can answer."""
        b, h, n, _ = q.shape
        grouped = group_queries(q, self.channels.shape[1])
        index = self.channels[:, :, None, None].expand(-1, -1, grouped.shape[2], n, -1)
        part = grouped.gather(-1, index).reshape(b, h, n, -1)
        return [(part, self.pages.keys, self.pages.values, self.pages.table)]

    def select(self, rows: Tensor, index: Tensor) -> None:
        """Keep, reorder or repeat sequences: index [new_batch], rows [new_batch · kv_heads]."""
        self.pages.select(rows)
        self.channels = self.channels.index_select(0, index)

    def twin(self) -> "Thin":
        """A second owner of the same pool."""
        twin = copy.copy(self)
        twin.pages = self.pages.twin()
        return twin

    def tensors(self) -> list[Tensor]:
        """Every tensor held."""
        return [*self.pages.tensors(), self.channels]
