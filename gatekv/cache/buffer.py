"""A buffer of fixed size per head, for policies that go on evicting while decoding."""

from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import torch

from gatekv.cache.segments.pages import Pages, Tokens
from gatekv.cache.segments.segment import Shape
from gatekv.cache.segments.window import New
from gatekv.cache.store import CompressedStore
from gatekv.parts import Part
from gatekv.support import LATER

if TYPE_CHECKING:
    from gatekv.cache.config import CacheConfig
    from gatekv.cache.decision import Selection


class Buffer(Part):
    """How much the heads may hold from the prompt's end on.

    Attributes:
        room: [batch, kv_heads] tokens. recent: [batch] last tokens that stay whatever their score; least, most: of any
        row.
    """

    saved = ("room", "recent", "least", "most")

    def __init__(self, room: torch.Tensor, recent: torch.Tensor, least: int = 0, most: int = 0) -> None:
        self.room, self.recent, self.least, self.most = room, recent, least, most

    @classmethod
    def of(cls, config: "CacheConfig", selection: "Selection | None", guarded: bool) -> "Buffer":
        """Of the size that the selection leaves, less what waits in the window; an empty one, to be loaded, without.

        guarded: the selection's last tokens stay last ones' right.
        """
        if selection is None:
            return cls(LATER, LATER)
        room = selection.keep.sum(-1).clamp_min(config.sinks + config.window)  # a short prompt fills it later
        recent = selection.recent if guarded else 0 * selection.recent
        least, most = torch.stack(recent.aminmax()).tolist()
        return cls(room - max(config.eviction_delay - 1, 0), recent, least, most)

    def trim(self, store: CompressedStore, worth: Callable[[Pages], torch.Tensor], real: torch.Tensor) -> bool:
        """Drop the least worthy tokens of each head until it holds no more than there is room for.

        worth: (pages) -> [P, block_size]; ties: the earlier place goes. real: [batch, 1], real tokens so far.
        Returns whether every head holds what it may, and has a token in the first store.
        """
        stores = store.stores()
        excess = sum(pages.lengths for pages in stores) - self.room.flatten()
        some, full = torch.stack([(excess > 0).any(), ((excess >= 0) & (store.pages.lengths > excess)).all()]).tolist()
        if some:
            for pages, gone in zip(stores, self._least(stores, [worth(pages) for pages in stores], real, excess)):
                store.evict(pages, gone)
        return full

    def _least(
        self, stores: list[Pages], worths: list[torch.Tensor], real: torch.Tensor, excess: torch.Tensor
    ) -> list[torch.Tensor]:
        """[P, block_size] bool of each store: the excess [rows] least worthy tokens over all of them."""
        young = self.recent.repeat_interleave(self.room.shape[1])
        parts = []
        for store, worth in zip(stores, worths):
            rows = store.owners.clamp_min(0).long()[:, None]
            kept = store.ages(real) <= young[rows]
            parts.append(store.unrolled(worth.masked_fill(kept, torch.inf), fill=torch.inf))
        order = torch.cat(parts, -1).argsort(dim=-1, stable=True)
        rank = torch.empty_like(order).scatter_(
            -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
        )
        gone = (rank < excess[:, None]).split([part.shape[-1] for part in parts], -1)
        return [store.rolled(part) for store, part in zip(stores, gone)]

    def replace(
        self,
        pages: Pages,
        worth: torch.Tensor,
        mine: torch.Tensor,
        new: New,
        position: torch.Tensor,
        sure: bool,
        wanted: bool,
    ) -> Tokens | None:
        """As `trim`, where every head holds what it may and one token comes: it takes the place of the one that leaves.

        No page changes hands and no table is built, so nothing is read back from the device.

        worth: [rows, most], of the pages' tokens (`Pages.unrolled`), and mine: [rows, 1], of the new one; ties: the
        earlier place goes. new: that token, its flags True in heads that have one; sure: all have. position:
        [batch, 1]. Returns those that leave, [rows, 1], where they are wanted.
        """
        rows, most = worth.shape
        takes = new.flags.reshape(rows, 1)
        if self.least:  # it is the most recent
            mine = torch.full_like(mine, torch.inf)
        elif self.most:
            mine = mine.masked_fill(pages.by_head(self.recent[:, None]) > 0, torch.inf)
        lowest = torch.cat([worth, mine if sure else mine.masked_fill(~takes, -torch.inf)], -1).argmin(-1)
        stays = None
        if not (sure and self.least):
            stays, lowest = lowest < most, lowest.clamp_max(most - 1)
        place, score = pages.by_head(position)[:, 0].int(), cast(torch.Tensor, new.scores).reshape(rows)
        sources = [new.keys.flatten(0, 2), new.values.flatten(0, 2), place, score]
        if pages.counts is not None:
            sources.append(torch.ones_like(place))
        left = pages.write(lowest, sources, stays, wanted)
        return Tokens(left[0][:, None], left[1][:, None], left[2][:, None], takes) if wanted else None

    @staticmethod
    def forecast_bytes(shape: Shape) -> int:
        """Bytes of one layer's."""
        return 8 * (shape.rows + shape.batch)
