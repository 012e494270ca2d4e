"""A buffer of fixed size per head, for policies that go on evicting while decoding."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from gatekv.cache.segments.pages import Pages
from gatekv.cache.segments.segment import Shape
from gatekv.cache.store import CompressedStore
from gatekv.parts import Part
from gatekv.support import LATER

if TYPE_CHECKING:
    from gatekv.cache.config import CacheConfig
    from gatekv.cache.decision import Selection


class Buffer(Part):
    """How much the heads may hold from the prompt's end on.

    Attributes:
        room: [batch, kv_heads] tokens. recent: [batch] last tokens that stay whatever their score.
    """

    saved = ("room", "recent")

    def __init__(self, room: torch.Tensor, recent: torch.Tensor) -> None:
        self.room, self.recent = room, recent

    @classmethod
    def of(cls, config: "CacheConfig", selection: "Selection | None", guarded: bool) -> "Buffer":
        """Of the size that the selection leaves, less what waits in the window; an empty one, to be loaded, without.

        guarded: the selection's last tokens stay last ones' right.
        """
        if selection is None:
            return cls(LATER, LATER)
        room = selection.keep.sum(-1).clamp_min(config.sinks + config.window)  # a short prompt fills it later
        recent = selection.recent if guarded else 0 * selection.recent
        return cls(room - max(config.eviction_delay - 1, 0), recent)

    def trim(self, store: CompressedStore, worth: Callable[[Pages], torch.Tensor], real: torch.Tensor) -> None:
        """Drop the least worthy tokens of each head until it holds no more than there is room for.

        worth: (pages) -> [P, block_size]; real: [batch, 1], real tokens so far.
        """
        stores = store.stores()
        for pages, gone in zip(stores, self.excess(stores, [worth(pages) for pages in stores], real)):
            store.evict(pages, gone)

    def excess(self, stores: list[Pages], worths: list[torch.Tensor], real: torch.Tensor) -> list[torch.Tensor]:
        """[P, block_size] bool of each store: the tokens of lowest worth that must go until every head fits.

        stores: share the head's room. worths: [P, block_size] of each; ties: the earlier goes. real: [batch, 1].
        Returns [] where all fit.
        """
        excess = sum(store.lengths for store in stores) - self.room.flatten()
        if not bool((excess > 0).any()):
            return []
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

    @staticmethod
    def forecast_bytes(shape: Shape) -> int:
        """Bytes of one layer's."""
        return 8 * (shape.rows + shape.batch)
