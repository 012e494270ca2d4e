"""The pool of pages of one layer: who owns which page, how it grows, how holes are filled."""

from typing import NamedTuple, Self

import torch

from gatekv.cache.segments.segment import Paged, value_dims
from gatekv.ops.page_table import PageTable
from gatekv.parts import frozen

Tensor = torch.Tensor
FREE = -1
POOL = ("keys", "values", "positions", "scores", "counts")


class Sizes(NamedTuple):
    """Of a store, as whole numbers: tokens of all rows, of the row with the least and with the most; pages likewise."""

    tokens: int
    least: int
    most: int
    pages: int
    fewest: int
    longest: int


class Pool(Paged):
    """Kept tokens of one layer. Rows are sequence · kv_heads + head; the order of tokens in a row means nothing.

    All work is on whole tensors: no loop over rows, and the host learns counts once per change. A row's pages are full
    but for its last one, so a token's place in its row says page and slot.

    Attributes:
        keys, values: [P, block_size, head_dim], the pool (keys may be narrower, see `narrow`, and both may be records
            of bytes, see `gatekv.cache.quantised`); unused slots are finite, never read.
        positions: [P, block_size] int32, number among its row's real tokens.
        scores: [P, block_size] float32 while a later trim needs them, else None. counts: [P, block_size] int32, how
            many tokens each one stands for, where evicted ones merge into kept ones, else None.
        owners: [P] int32, row of each page, FREE where it has none. ordinals: [P] int32, its number within the row.
        lengths: [rows] int64, tokens of each row. kv_heads: rows of a sequence.
        backend: name of the paged attention that reads them. packed: the pages that have an owner are the first ones.
    """

    saved = (*POOL, "owners", "ordinals", "lengths")

    def __init__(
        self,
        like: Tensor,
        block_size: int,
        with_scores: bool = False,
        with_counts: bool = False,
        backend: str = "torch",
        value_dim: int | None = None,
        latent: int = 0,
    ) -> None:
        """An empty store; `like` [batch, kv_heads, tokens, head_dim] gives shapes, dtype and device; value_dim, latent:
        as for the window."""
        b, kv, _, d = like.shape
        self.block_size, self.kv_heads, self.backend, self.latent = block_size, kv, backend, latent
        self.keys, self.values = (like.new_zeros(0, block_size, width) for width in value_dims(d, value_dim, latent))
        self.positions = torch.zeros(0, block_size, dtype=torch.int32, device=like.device)
        self.scores = torch.zeros(0, block_size, device=like.device) if with_scores else None
        self.counts = self.positions.clone() if with_counts else None
        self.owners = torch.zeros(0, dtype=torch.int32, device=like.device)
        self.ordinals = self.owners.clone()
        self.lengths = torch.zeros(b * kv, dtype=torch.long, device=like.device)
        self.tokens = 0
        self.shared, self.packed = False, True
        self._index(Sizes(0, 0, 0, 0, 0, 0))

    def __len__(self) -> int:
        return self.tokens

    @property
    def free(self) -> int:
        """Pages of the pool that no row uses."""
        return len(self.owners) - len(self.table.pages)

    def _pool(self) -> list[Tensor]:
        return [t for name in POOL if (t := vars(self)[name]) is not None]

    def _set_pool(self, pool: list[Tensor]) -> None:
        held = [name for name in POOL if vars(self)[name] is not None]
        vars(self).update(zip(held, pool))

    def add(
        self, rows: Tensor, order: Tensor, counts: Tensor, sources: list[Tensor], sizes: "Sizes | None" = None
    ) -> None:
        """Write new tokens, number `order` among the counts [rows] new ones of row `rows`, into the pool.

        sizes: with them in it, where they are known.
        """
        place = order + self.lengths[rows]
        sizes = self.sizes(self.lengths + counts) if sizes is None else sizes
        self.own()
        self.lengths = self.lengths + counts
        self._allocate(sizes)
        entry = self.table.starts.long()[rows] + place // self.block_size
        at = self.table.pages.long()[entry] * self.block_size + place % self.block_size
        for pool, source in zip(self._pool(), sources):
            pool.flatten(0, 1)[at] = source

    def sizes(self, lengths: Tensor) -> "Sizes":
        """What the host has to know of rows that hold lengths [rows] tokens, in one look at the device."""
        pages = self._pages_for(lengths)
        return Sizes(*torch.stack([lengths.sum(), *lengths.aminmax(), pages.sum(), *pages.aminmax()]).tolist())

    def _allocate(self, sizes: "Sizes") -> None:
        """Give rows whose length has grown the pages they lack: free ones first, then a larger pool."""
        held, used = self.table.starts.long().diff(), len(self.table.pages)
        need, total = self._pages_for(self.lengths) - held, sizes.pages - used
        if total > self.free:
            self._grow(max(total - self.free, len(self.owners) // 100))
        ends, number = need.cumsum(0), torch.arange(total, device=need.device)
        rows = torch.searchsorted(ends, number, right=True)
        within = number - (ends - need)[rows]
        if self.packed:
            pages = torch.arange(used, used + total, device=rows.device)
        else:
            pages = (self.owners == FREE).nonzero()[:total, 0]
        self.owners[pages], self.ordinals[pages] = rows.int(), (held[rows] + within).int()
        self._index(sizes)

    def _pages_for(self, lengths: Tensor) -> Tensor:
        return (lengths + self.block_size - 1) // self.block_size

    def _grow(self, extra: int) -> None:
        # Zeros, not garbage: an unused slot has weight 0, and 0 · NaN would not be 0.
        self._set_pool([torch.cat([t, t.new_zeros(extra, *t.shape[1:])]) for t in self._pool()])
        self.owners = torch.cat([self.owners, self.owners.new_full((extra,), FREE)])
        self.ordinals = torch.cat([self.ordinals, self.ordinals.new_zeros(extra)])

    def _index(self, sizes: "Sizes") -> None:
        """The table that attention reads, after pages changed hands or rows their lengths."""
        self.tokens = sizes.tokens
        if self.packed:
            pages = torch.arange(sizes.pages, device=self.owners.device)
        else:
            pages = (self.owners != FREE).nonzero()[:, 0]
        owners, ordinals = self.owners[pages].long(), self.ordinals[pages].long()
        order = (owners * (len(self.owners) + 1) + ordinals).argsort()
        pages, owners, ordinals = pages[order], owners[order], ordinals[order]
        fill = (self.lengths[owners] - ordinals * self.block_size).clamp(max=self.block_size)
        tables = pages.int(), owners.int(), fill.int(), len(self.lengths)
        even = sizes.longest if sizes.fewest == sizes.longest > 0 else None
        each = sizes.most if sizes.least == sizes.most else None
        self.table = PageTable(*tables, even, each, sizes.longest)

    def _held(self) -> tuple[Tensor, Tensor]:
        """(row of each page [P, 1] int64, place of each slot in its row [P, block_size]); a free page has row 0."""
        slots = torch.arange(self.block_size, device=self.owners.device)
        return self.owners.clamp_min(0).long()[:, None], self.ordinals.long()[:, None] * self.block_size + slots

    def occupied(self) -> Tensor:
        """[P, block_size] bool: slots that hold a token."""
        rows, place = self._held()
        return (place < self.lengths[rows]) & (self.owners != FREE)[:, None]

    def evict(self, gone: Tensor) -> None:
        """Drop the tokens flagged in gone [P, block_size]; the last ones of a row fill the holes.

        Pages that fall empty stay in the pool for reuse; `shrink` gives them back.
        """
        occupied = self.occupied()
        gone = gone & occupied
        rows, place = self._held()
        rows = rows.expand_as(gone)
        lost = torch.zeros_like(self.lengths).index_add(0, rows[gone], torch.ones_like(rows[gone]))
        left = self.lengths - lost
        self.own()
        source, hole = (
            m.flatten().nonzero()[:, 0] for m in (occupied & ~gone & (place >= left[rows]), gone & (place < left[rows]))
        )
        # Per row there are as many survivors behind the new end as holes before it.
        source, hole = (i[rows.flatten()[i].argsort(stable=True)] for i in (source, hole))
        for pool in self._pool():
            flat = pool.flatten(0, 1)
            flat[hole] = flat[source]
        self.lengths = left
        self.packed = False
        self.owners[self.ordinals >= self._pages_for(left)[rows[:, 0]]] = FREE
        self._index(self.sizes(left))

    def shrink(self) -> None:
        """Give free pages back to the allocator; afterwards pages stand in the order of the table."""
        if self.free:
            self._take(self.table.pages.long(), self.table.owners)

    def _take(self, pages: Tensor, owners: Tensor) -> None:
        """A pool of exactly these pages, owned by these rows (ascending)."""
        self._set_pool([t.index_select(0, pages) for t in self._pool()])
        self.ordinals, self.owners, self.packed = self.ordinals[pages], owners.clone(), True
        self._index(self.sizes(self.lengths))
        self.shared = False

    def index_select(self, index: Tensor) -> None:
        """Keep, reorder or repeat sequences: index [new_batch]."""
        rows = (index[:, None] * self.kv_heads + torch.arange(self.kv_heads, device=index.device)).flatten()
        counts = self.table.starts.long().diff()[rows]
        owners = torch.repeat_interleave(counts)
        within = torch.arange(len(owners), device=owners.device) - (counts.cumsum(0) - counts)[owners]
        pages = self.table.pages.long()[self.table.starts.long()[rows][owners] + within]
        self.lengths = self.lengths[rows]
        self._take(pages, owners.int())

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        pool, block, _ = tensors["keys"].shape
        wanted = {"values": (pool, block, tensors["values"].shape[-1]), "positions": (pool, block), "owners": (pool,),
                  "ordinals": (pool,), "lengths": self.lengths.shape}  # fmt: skip
        for name, shape in wanted.items():
            if tensors[name].shape != shape:
                raise ValueError(f"pages.{name} has shape {tuple(tensors[name].shape)}, not {tuple(shape)}.")
        super().load_state_dict(tensors)
        self.packed = False
        self._index(self.sizes(self.lengths))

    def fork(self) -> Self:
        """A second owner of the same pool; whichever changes first takes a copy of its own."""
        self.shared = True
        return super().fork()

    def own(self) -> None:
        """Before it is written: a copy of its own, if another owner shares the pool."""
        if self.shared or frozen(self.keys):
            self._set_pool([t.clone() for t in self._pool()])
            self.owners, self.ordinals = self.owners.clone(), self.ordinals.clone()
            self.shared = False
