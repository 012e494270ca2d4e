"""Old keys with fewer channels (ThinK): pages whose keys are narrower than their values."""

import copy

import torch

from gatekv.cache.pages import Pages
from gatekv.ops.naive import group_queries

Tensor = torch.Tensor


class Thin:
    """Tokens of one layer whose keys have lost channels.

    Attributes:
        pages: keys [P, block_size, kept], values [P, block_size, head_dim].
        channels: [batch, kv_heads, kept] int64, which of head_dim the keys still have.
    """

    def __init__(self, pages: Pages, channels: Tensor):
        self.pages, self.channels = pages, channels

    @classmethod
    def of(cls, pages: Pages, channels: Tensor, last: int) -> "Thin":
        """The tokens at slots < last, narrowed; `pages` keeps the others."""
        old = pages.twin()
        old.evict(old.positions >= last)
        old.shrink()
        pages.evict(pages.positions < last)
        pages.shrink()
        old.narrow(channels.flatten(0, 1))
        return cls(old, channels)

    def absorb(self, pages: Pages, last: int) -> None:
        """Take the tokens at slots < last too, through the same channels."""
        self.pages.absorb(Thin.of(pages, self.channels, last).pages)

    def queries(self, q: Tensor) -> Tensor:
        """[B, H, Q, D] -> [B, H, Q, kept]: what of each query these keys can answer."""
        b, h, n, _ = q.shape
        grouped = group_queries(q, self.channels.shape[1])
        index = self.channels[:, :, None, None].expand(-1, -1, grouped.shape[2], n, -1)
        return grouped.gather(-1, index).reshape(b, h, n, -1)

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
