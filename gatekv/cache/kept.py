"""What has left the tail and is still held: pages, and tokens that stand apart because they answer other queries."""

import copy
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch

from gatekv.cache.buffer import Buffer
from gatekv.cache.merge import Merge
from gatekv.cache.pages import Pages, Read
from gatekv.cache.prompt_end import PromptEnd
from gatekv.cache.quantised import Quantised
from gatekv.cache.slots import Slots
from gatekv.cache.thin import Thin
from gatekv.less.maps import LessMaps
from gatekv.less.state import State
from gatekv.ops import backends
from gatekv.ops.paged_attention import paged_mass
from gatekv.policies.merging import Tokens
from gatekv.policies.qaq import Bits
from gatekv.policies.think import Channels
from gatekv.support import LATER, shallow

Tensor = torch.Tensor
STORAGE: dict[type, Any] = {Channels: Thin, Bits: Quantised}  # of old tokens, by the policy's width


class Kept:
    """Kept tokens of one layer.

    Attributes:
        pages: most of them. thin: old ones of less width, fewer channels or fewer bits, or None. slots: sinks whose
        positions count places in the cache, or None. buffer: what a head may hold, for policies that evict at every
        step, or None.
        state: what of the evicted is not forgotten (LESS), or None; maps: `LessMaps` in force, with it.
        merge: what takes the evicted into the kept, or None.
        backend: name of the paged attention that runs.
    """

    def __init__(
        self, like: Tensor, block_size: int, with_scores: bool, backend: str | None, merge: Merge | None = None
    ) -> None:
        """`like` [batch, kv_heads, tokens, head_dim] gives shapes, dtype and device."""
        self.batch, self.kv_heads = like.shape[:2]
        self.pages = Pages(like, block_size, with_scores, with_counts=merge is not None)
        self.thin: Thin | Quantised | None = None
        self.slots: Slots | None = None
        self.buffer: Buffer | None = None
        self.state: State | None = None
        self.maps: LessMaps = LATER  # where there is a state
        self.merge = merge
        self.backend = backends.choose(backend, block_size, like.device, like.dtype)
        self.paged_segment = backends.load(self.backend)

    __copy__ = shallow

    def __getstate__(self) -> dict:
        """Without the maps, which are the model's; every call brings them."""
        return vars(self) | {"maps": LATER}

    def apart(self) -> list[Thin | Quantised | Slots]:
        """The parts beside the pages, where there are any."""
        return [part for part in (self.thin, self.slots) if part is not None]

    def empty(self) -> bool:
        """Nothing was ever kept."""
        return not len(self.pages) and not self.apart()

    def stores(self) -> list[Pages]:
        """The pages of every part."""
        return [self.pages, *(store for part in self.apart() for store in part.stores())]

    def reads(self, q: Tensor) -> Iterator[Read]:
        """What paged attention takes of each store in turn, where q [B, H, Q, D] are asked."""
        yield q, self.pages.keys, self.pages.values, self.pages.table
        for part in self.apart():
            yield from part.reads(q)

    def segments(self, q: Tensor, scaling: float) -> list[tuple[Tensor, Tensor]]:
        """(output, log-sum-exp) of each store; see `gatekv.ops.naive.paged_segment`."""
        return [self.paged_segment(*read, scaling) for read in self.reads(q)]

    # -- eviction

    def evict(self, store: Pages, gone: Tensor) -> None:
        """Drop the tokens flagged in gone [P, block_size] from one of the stores; the remainder takes them."""
        merges = self.merge is not None and self.merge.rule.later
        left = Tokens(*store.taken(gone)) if (merges or self.state is not None) and bool(gone.any()) else None
        store.evict(gone)
        if left is not None:
            self.fold(store, left)

    def fold(self, store: Pages, left: Tokens, psi: Tensor | None = None) -> None:
        """What becomes of tokens that have left `store`, or the tail before they came there: forgotten, summed up, or
        merged into what it holds. psi: [batch, kv_heads, n, rank] for a state, where they are known."""
        if self.state is not None:
            keys, values, held = (t.unflatten(0, (self.batch, -1)) for t in (left.keys, left.values, left.held))
            self.state.fold(self.maps.psi(keys) if psi is None else psi, keys, values, held)
        if self.merge is not None:
            self.merge.fold(store, left)

    def filter(self, keep: Tensor, base: int) -> None:
        """Hold of the pages' tokens at slots >= base those that keep [batch, kv_heads, slots - base] flags."""
        self.pages.scores = None
        self.evict(self.pages, self.pages.unwanted(keep, base))
        self.pages.shrink()

    def watch(self, observe: Callable[[Tensor, Tensor], Tensor], q: Tensor, lse: Tensor, scaling: float) -> None:
        """Renew the scores of what is held by the attention it just received: observe = `Scorer.observe`.

        q: [B, H, 1, D]; lse: [B, H, 1], over everything that the query saw.
        """
        for store, (part, keys, _, table) in zip(self.stores(), self.reads(q)):
            paid = store.unrolled(paged_mass(part, keys, table, lse, scaling).float())
            old = store.unrolled(cast(Tensor, store.scores))
            new = observe(*(t.view(self.batch, self.kv_heads, -1) for t in (old, paid))).flatten(0, 1)
            store.scores = store.rolled(torch.where(old.isinf(), old, new))

    def trim(self, worth: Callable[[Pages], Tensor], seen: int) -> None:
        """Drop the least worthy tokens of each head until it holds no more than its buffer has room for.

        worth: (pages) -> [P, block_size]; seen: slots so far. Nothing happens without a buffer.
        """
        if self.buffer is not None:
            gone = self.buffer.excess(self.stores(), [worth(store) for store in self.stores()], seen)
            for store, part in zip(self.stores(), gone):
                self.evict(store, part)

    def narrow(self, width: Channels | Bits, end: PromptEnd) -> None:
        """Store the old tokens, all but the last `width.window`, as the width says."""
        if self.thin is None:
            self.thin = STORAGE[type(width)].of(self.pages, width, end)
        else:
            cast(Any, self.thin).absorb(self.pages, width, end)  # the storage of this very width

    # -- whole rows

    def select(self, index: Tensor) -> None:
        """Keep, reorder or repeat sequences: index [new_batch]."""
        rows = (index[:, None] * self.kv_heads + torch.arange(self.kv_heads, device=index.device)).flatten()
        self.batch = len(index)
        self.pages.select(rows)
        for part in self.apart():
            part.select(rows, index)
        for side in (self.buffer, self.state):
            if side is not None:
                side.select(index)
        if self.merge is not None:
            self.merge.select(rows)

    def twin(self) -> "Kept":
        """An independent copy that shares storage until either side changes."""
        twin = copy.copy(self)
        for name in ("pages", "thin", "slots", "buffer", "state", "merge"):
            if (part := vars(self)[name]) is not None:
                setattr(twin, name, part.twin())
        return twin

    def tensors(self) -> list[Tensor]:
        """Every tensor held."""
        side = (self.buffer, self.state, self.merge)
        parts = [self.pages, *self.apart(), *(part for part in side if part is not None)]
        return [t for part in parts for t in part.tensors()]
