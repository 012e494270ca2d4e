"""Sinks whose positions count places in the cache, not in the text (StreamingLLM, arXiv 2309.17453, §3.2)."""

from typing import cast

import torch

from gatekv.cache.segments.pages import Pages
from gatekv.cache.segments.segment import Paged, Read, Shape
from gatekv.rotary import Angles, asked_from
from gatekv.support import LATER

Tensor = torch.Tensor


class CachePositionSinks(Paged):
    """The sinks of one layer, apart from the window.

    Tokens of the window are neighbours in the text too, so their distance to the query is that of their slots already.
    Sinks stand right before the window: to them the query must look as if it stood in the cache's last slot. So the
    query is turned back to that position, and no key is ever rewritten.

    Attributes:
        pages: the sinks. last: (cos, sin) [batch, 1, rotary_dim] of position `room`, the query's slot in a full cache,
        or of the newest token before one stands there. wait: [batch] tokens until one does. now: (cos, sin) of the
        current query.
    """

    saved = ("pages", "last", "wait")

    def __init__(self, pages: Pages) -> None:
        """An empty one beside `pages`, whose sinks it will take."""
        self.pages = pages.blank()
        self.last: Angles = LATER
        self.wait: Tensor = LATER
        self.now: Angles = LATER

    def absorb(self, pages: Pages, room: Tensor, real: Tensor, rotary: Angles) -> None:
        """Take the tokens of infinite score out of `pages`.

        room: [batch] tokens a head may hold; real: [batch] tokens of the prompt, which ends at rotary's last column;
        rotary: (cos, sin) [batch or 1, slots, rotary_dim].
        """
        self.pages = pages.split(cast(Tensor, pages.scores).isinf())
        columns = rotary[0].shape[1]
        column = columns - real + room  # behind the last one where a row is kept whole: a later token stands there
        index = column.clamp_max(columns - 1)[:, None, None].expand(-1, -1, rotary[0].shape[2])
        cos, sin = (t.expand(len(room), -1, -1).gather(1, index) for t in rotary)
        self.last, self.wait = (cos, sin), (column - columns + 1).clamp_min(0)

    def step(self, rotary: Angles, valid: Tensor) -> None:
        """A token asks now: rotary (cos, sin) [batch or 1, 1, rotary_dim], valid [batch, 1] bool."""
        self.now = rotary
        waits = (self.wait[:, None] > 0) & valid
        waits = waits[..., None]
        self.last = torch.where(waits, rotary[0], self.last[0]), torch.where(waits, rotary[1], self.last[1])
        self.wait = (self.wait - valid[:, 0].long()).clamp_min(0)

    def stores(self) -> list[Pages]:
        return [self.pages]

    def reads(self, q: Tensor) -> list[Read]:
        """q: [batch, heads, 1, head_dim], turned as if asked from the cache's last slot."""
        acc = torch.promote_types(q.dtype, torch.float32)
        turned = asked_from(q.to(acc), self.now, self.last).to(q.dtype)
        return [(turned, self.pages.keys, self.pages.answers, self.pages.table)]

    def index_select(self, index: Tensor) -> None:
        super().index_select(index)

    @classmethod
    def forecast_bytes(cls, shape: Shape, tokens: float) -> int:
        return Pages.forecast_bytes(shape, tokens)
