"""Sinks whose positions count places in the cache, not in the text (StreamingLLM, arXiv 2309.17453, §3.2)."""

import copy
from typing import cast

import torch

from gatekv.cache.pages import Pages, Read
from gatekv.gates.key_mlp import unrotate
from gatekv.support import LATER

Tensor = torch.Tensor
Rotary = tuple[Tensor, Tensor]


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """x·cos + rotate_half(x)·sin over the first rotary_dim channels; shapes as in `unrotate`, its inverse."""
    cos, sin = (t[:, None].to(x.dtype) for t in rotary)
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    a, b = turned.chunk(2, -1)
    return torch.cat([turned * cos + torch.cat([-b, a], -1) * sin, rest], -1)


class Slots:
    """The sinks of one layer, apart from the window.

    Tokens of the window are neighbours in the text too, so their distance to the query is that of their slots already.
    Sinks stand right before the window: to them the query must look as if it stood in the cache's last slot. So the
    query is turned back to that position, and no key is ever rewritten.

    Attributes:
        pages: the sinks. last: (cos, sin) [batch, 1, rotary_dim] of position `room`, the query's slot in a full cache,
        or of the newest token before one stands there. wait: [batch] tokens until one does. now: (cos, sin) of the
        current query.
    """

    def __init__(self, pages: Pages, last: Rotary, wait: Tensor) -> None:
        self.pages, self.last, self.wait = pages, last, wait
        self.now: Rotary = LATER

    @classmethod
    def of(cls, pages: Pages, room: Tensor, real: Tensor, rotary: Rotary) -> "Slots":
        """Take the tokens of infinite score out of `pages`.

        room: [batch] tokens a head may hold; real: [batch] tokens of the prompt, which ends at rotary's last column;
        rotary: (cos, sin) [batch or 1, slots, rotary_dim].
        """
        sinks = pages.split(cast(Tensor, pages.scores).isinf())
        columns = rotary[0].shape[1]
        column = columns - real + room  # behind the last one where a row is kept whole: a later token stands there
        index = column.clamp_max(columns - 1)[:, None, None].expand(-1, -1, rotary[0].shape[2])
        cos, sin = (t.expand(len(room), -1, -1).gather(1, index) for t in rotary)
        return cls(sinks, (cos, sin), (column - columns + 1).clamp_min(0))

    def step(self, rotary: Rotary) -> None:
        """(cos, sin) [batch or 1, 1, rotary_dim] of the token that asks now."""
        self.now = rotary
        waits = (self.wait > 0)[:, None, None]
        self.last = torch.where(waits, rotary[0], self.last[0]), torch.where(waits, rotary[1], self.last[1])
        self.wait = (self.wait - 1).clamp_min(0)

    def stores(self) -> list[Pages]:
        """The sinks' pages."""
        return [self.pages]

    def reads(self, q: Tensor) -> list[Read]:
        """See `Kept.reads`; q: [batch, heads, 1, head_dim], turned as if asked from the cache's last slot."""
        acc = torch.promote_types(q.dtype, torch.float32)
        turned = rotate(unrotate(q.to(acc), self.now), self.last).to(q.dtype)
        return [(turned, self.pages.keys, self.pages.values, self.pages.table)]

    def select(self, rows: Tensor, index: Tensor) -> None:
        """Keep, reorder or repeat sequences: index [new_batch], rows [new_batch · kv_heads]."""
        self.pages.select(rows)
        self.last = self.last[0].index_select(0, index), self.last[1].index_select(0, index)
        self.wait = self.wait.index_select(0, index)

    def twin(self) -> "Slots":
        """A second owner of the same pool."""
        twin = copy.copy(self)
        twin.pages = self.pages.twin()
        return twin

    def tensors(self) -> list[Tensor]:
        """Every tensor held."""
        return [*self.pages.tensors(), *self.last, self.wait]
