"""Paged storage: every (sequence, kv head) row holds its own number of tokens, in pages of one pool."""

import copy
from typing import cast

import torch

from gatekv.ops.page_table import PageTable

Tensor = torch.Tensor
Read = tuple[Tensor, Tensor, Tensor, PageTable]  # queries, keys, values, table: what paged attention takes
FREE = -1
POOL = ("keys", "values", "positions", "scores", "counts")


class Pages:
    """Kept tokens of one layer. Rows are sequence · kv_heads + head; the order of tokens in a row means nothing.

    All work is on whole tensors: no loop over rows, and the host learns counts once per change. A row's pages are full
    but for its last one, so a token's place in its row says page and slot.

    Attributes:
        keys, values: [P, block_size, head_dim], the pool (keys may be narrower, see `narrow`, and both may be records
            of bytes, see `gatekv.cache.quantised`); unused slots are finite, never read.
        positions: [P, block_size] int32, slot in the sequence as fed (pads counted).
        scores: [P, block_size] float32 while a later trim needs them, else None. counts: [P, block_size] int32, how
            many tokens each one stands for, where evicted ones merge into kept ones, else None.
        owners: [P] int32, row of each page, FREE where it has none. ordinals: [P] int32, its number within the row.
        lengths: [rows] int64, tokens of each row.
    """

    def __init__(self, like: Tensor, block_size: int, with_scores: bool = False, with_counts: bool = False) -> None:
        """An empty store; `like` [batch, kv_heads, tokens, head_dim] gives shapes, dtype and device."""
        b, kv, _, d = like.shape
        self.block_size = block_size
        self.keys, self.values = (like.new_zeros(0, block_size, d) for _ in range(2))
        self.positions = torch.zeros(0, block_size, dtype=torch.int32, device=like.device)
        self.scores = torch.zeros(0, block_size, device=like.device) if with_scores else None
        self.counts = self.positions.clone() if with_counts else None
        self.owners = torch.zeros(0, dtype=torch.int32, device=like.device)
        self.ordinals = self.owners.clone()
        self.lengths = torch.zeros(b * kv, dtype=torch.long, device=like.device)
        self.tokens = 0
        self.shared = False
        self._index()

    def __len__(self) -> int:
        return self.tokens

    @property
    def free(self) -> int:
        """Pages of the pool that no row uses."""
        return len(self.owners) - len(self.table.pages)

    def tensors(self) -> list[Tensor]:
        """Every tensor held: pool, positions, tables and what was derived from them."""
        own = (*self._pool(), self.owners, self.ordinals, self.lengths, *self.table.tensors())
        return [t for t in own if t is not None]

    def _pool(self) -> list[Tensor]:
        return [t for name in POOL if (t := vars(self)[name]) is not None]

    def _set_pool(self, pool: list[Tensor]) -> None:
        held = [name for name in POOL if vars(self)[name] is not None]
        vars(self).update(zip(held, pool))

    # -- growing

    def append(self, keys: Tensor, values: Tensor, keep: Tensor, start: int, scores: Tensor | None = None) -> None:
        """Add the flagged tokens of a dense piece.

        keys, values: [batch, kv_heads, n, head_dim]; keep: [batch, kv_heads, n] bool; start: slot of the first token;
        scores: [batch, kv_heads, n], needed if the store holds scores.
        """
        keep = keep.flatten(0, 1)
        rows, slots = keep.nonzero(as_tuple=True)
        if not len(rows):
            return
        sources = [keys.flatten(0, 1)[rows, slots], values.flatten(0, 1)[rows, slots], (slots + start).int()]
        if self.scores is not None:
            sources.append(cast(Tensor, scores).flatten(0, 1)[rows, slots].float())
        if self.counts is not None:
            sources.append(torch.ones_like(sources[2]))
        self.add(rows, (keep.cumsum(-1) - 1)[rows, slots], keep.sum(-1), sources)

    def absorb(self, other: "Pages") -> None:
        """Add all tokens of another store over the same rows, with keys as wide and scores or none alike."""
        self.add(*other.picked(other.occupied()))

    def add(self, rows: Tensor, order: Tensor, counts: Tensor, sources: list[Tensor]) -> None:
        """Write new tokens, number `order` among the counts [rows] new ones of row `rows`, into the pool."""
        place = order + self.lengths[rows]
        self._own()
        self.lengths = self.lengths + counts
        self.tokens += len(rows)
        self._allocate()
        entry = self.table.starts.long()[rows] + place // self.block_size
        at = self.table.pages.long()[entry] * self.block_size + place % self.block_size
        for pool, source in zip(self._pool(), sources):
            pool.flatten(0, 1)[at] = source

    def _allocate(self) -> None:
        """Give rows whose length has grown the pages they lack: free ones first, then a larger pool."""
        held = self.table.starts.long().diff()
        need = self._pages_for(self.lengths) - held
        total = int(need.sum())
        if total > self.free:
            self._grow(max(total - self.free, len(self.owners) // 100))
        rows = torch.repeat_interleave(need, output_size=total)
        within = torch.arange(total, device=rows.device) - (need.cumsum(0) - need)[rows]
        pages = (self.owners == FREE).nonzero()[:total, 0]
        self.owners[pages], self.ordinals[pages] = rows.int(), (held[rows] + within).int()
        self._index()

    def _pages_for(self, lengths: Tensor) -> Tensor:
        return (lengths + self.block_size - 1) // self.block_size

    def _grow(self, extra: int) -> None:
        # Zeros, not garbage: an unused slot has weight 0, and 0 · NaN would not be 0.
        self._set_pool([torch.cat([t, t.new_zeros(extra, *t.shape[1:])]) for t in self._pool()])
        self.owners = torch.cat([self.owners, self.owners.new_full((extra,), FREE)])
        self.ordinals = torch.cat([self.ordinals, self.ordinals.new_zeros(extra)])

    def _index(self) -> None:
        """The table that attention reads, after pages changed hands or rows their lengths."""
        pages = (self.owners != FREE).nonzero()[:, 0]
        owners, ordinals = self.owners[pages].long(), self.ordinals[pages].long()
        order = (owners * (len(self.owners) + 1) + ordinals).argsort()
        pages, owners, ordinals = pages[order], owners[order], ordinals[order]
        fill = (self.lengths[owners] - ordinals * self.block_size).clamp(max=self.block_size)
        each, rest = divmod(len(pages), len(self.lengths))
        row = torch.arange(len(self.lengths), device=owners.device)
        even = bool(each and not rest and (owners.view(-1, each) == row[:, None]).all())
        self.table = PageTable(pages.int(), owners.int(), fill.int(), len(self.lengths), each if even else None)

    # -- shrinking

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
        self._own()
        source, hole = (
            m.flatten().nonzero()[:, 0] for m in (occupied & ~gone & (place >= left[rows]), gone & (place < left[rows]))
        )
        # Per row there are as many survivors behind the new end as holes before it.
        source, hole = (i[rows.flatten()[i].argsort(stable=True)] for i in (source, hole))
        for pool in self._pool():
            flat = pool.flatten(0, 1)
            flat[hole] = flat[source]
        self.lengths = left
        self.tokens = int(left.sum())
        self.owners[self.ordinals >= self._pages_for(left)[rows[:, 0]]] = FREE
        self._index()

    def unrolled(self, slots: Tensor, fill: float = 0.0) -> Tensor:
        """[P, block_size] -> [rows, longest]: by place in the row, `fill` where a row is shorter."""
        occupied = self.occupied()
        rows, place = (t.expand_as(occupied)[occupied] for t in self._held())
        longest = int(self.lengths.max()) if len(self.lengths) else 0
        out = slots.new_full((len(self.lengths), longest), fill)
        out[rows, place] = slots[occupied]
        return out

    def rolled(self, places: Tensor) -> Tensor:
        """The way back: [rows, longest] -> [P, block_size], zeros in slots that hold no token."""
        occupied = self.occupied()
        rows, place = (t.expand_as(occupied)[occupied] for t in self._held())
        out = places.new_zeros(occupied.shape)
        out[occupied] = places[rows, place]
        return out

    def narrow(self, channels: Tensor) -> None:
        """Drop key channels: channels [rows, kept] are those that stay."""
        index = channels[self.owners.clamp_min(0).long()][:, None].expand(-1, self.block_size, -1)
        self.keys = self.keys.gather(-1, index)

    def places(self) -> tuple[Tensor, Tensor]:
        """(index of each token in the flattened pool [rows, longest], where there is one [rows, longest] bool)."""
        index = self.unrolled(
            torch.arange(self.positions.numel(), device=self.positions.device).view_as(self.positions)
        )
        return index, torch.arange(index.shape[1], device=index.device) < self.lengths[:, None]

    def rewrite(self, places: Tensor, keys: Tensor, values: Tensor, counts: Tensor) -> None:
        """Put other keys, values [n, width] and counts [n] at places [n] of the flattened pool."""
        self._own()
        for pool, source in ((self.keys, keys), (self.values, values), (cast(Tensor, self.counts), counts)):
            pool.flatten(0, 1)[places] = source

    def picked(self, wanted: Tensor) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """The flagged tokens [P, block_size] as `add` takes them: (row, number among its row's, counts, pool)."""
        wanted = wanted & self.occupied()
        rows = self._held()[0].expand_as(wanted)[wanted]
        counts = torch.bincount(rows, minlength=len(self.lengths))
        order = rows.argsort(stable=True)
        number = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows[order]]
        return rows, torch.empty_like(number).scatter_(0, order, number), counts, [t[wanted] for t in self._pool()]

    def taken(self, gone: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """The flagged tokens, row by row: keys, values [rows, most, width], positions, held and, where the store has
        them, counts [rows, most]."""
        rows, number, lengths, (keys, values, positions, *rest) = self.picked(gone)
        held = torch.arange(int(lengths.max()), device=rows.device) < lengths[:, None]
        found: list[Tensor] = []
        for source in (keys, values, positions, *([] if self.counts is None else rest[-1:])):
            out = source.new_zeros(*held.shape, *source.shape[1:])
            out[rows, number] = source
            found.append(out)
        return found[0], found[1], found[2], held, None if self.counts is None else found[3]

    def split(self, gone: Tensor) -> "Pages":
        """The flagged tokens [P, block_size], which leave this store, as a store of their own."""
        out = self.twin()
        out.evict(~gone)
        out.shrink()
        self.evict(gone)
        self.shrink()
        return out

    def unwanted(self, keep: Tensor, base: int = 0) -> Tensor:
        """[P, block_size] bool: tokens at slots >= base that keep [batch, kv_heads, slots - base] does not flag."""
        slots = self.positions.long() - base
        rows, _ = self._held()
        kept = keep.flatten(0, 1)[rows.expand_as(slots), slots.clamp_min(0)] if keep.shape[-1] else slots < 0
        return (slots >= 0) & ~kept & self.occupied()

    def shrink(self) -> None:
        """Give free pages back to the allocator; afterwards pages stand in the order of the table."""
        if self.free:
            self._take(self.table.pages.long(), self.table.owners, self.table.rows)

    def _take(self, pages: Tensor, owners: Tensor, rows: int) -> None:
        """A pool of exactly these pages, owned by these rows (ascending)."""
        self._set_pool([t.index_select(0, pages) for t in self._pool()])
        self.ordinals, self.owners = self.ordinals[pages], owners.clone()
        self._index()
        self.shared = False

    # -- whole rows

    def select(self, rows: Tensor) -> None:
        """Become the store of rows [new_rows] of the old one: reordered, repeated or fewer."""
        counts = self.table.starts.long().diff()[rows]
        owners = torch.repeat_interleave(counts)
        within = torch.arange(len(owners), device=owners.device) - (counts.cumsum(0) - counts)[owners]
        pages = self.table.pages.long()[self.table.starts.long()[rows][owners] + within]
        self.lengths = self.lengths[rows]
        self.tokens = int(self.lengths.sum())
        self._take(pages, owners.int(), len(rows))

    def scatter(self, into: Tensor, source: Tensor | bool | float, first: int = 0) -> None:
        """Write `source` ([P, block_size, ...] or a scalar) into the held ones of the slots from `first` on, which
        into [batch, kv_heads, slots, ...] stands for; no held one is earlier."""
        occupied = self.occupied()
        rows, _ = self._held()
        source = source[occupied] if isinstance(source, Tensor) else source
        into.flatten(0, 1)[rows.expand_as(occupied)[occupied], self.positions.long()[occupied] - first] = source

    def restore(self, saved: dict[str, Tensor | None]) -> None:
        """Take saved tensors, by attribute name.

        Raises:
            ValueError: when their shapes do not belong together.
        """
        there = cast("dict[str, Tensor]", saved)  # but for scores and counts, which are not looked at here
        pool, block, _ = there["keys"].shape
        wanted = {"values": (pool, block, there["values"].shape[-1]), "positions": (pool, block), "owners": (pool,),
                  "ordinals": (pool,), "lengths": self.lengths.shape}  # fmt: skip
        for name, shape in wanted.items():
            if there[name].shape != shape:
                raise ValueError(f"pages.{name} has shape {tuple(there[name].shape)}, not {tuple(shape)}.")
        vars(self).update(saved)
        self.tokens = int(self.lengths.sum())
        self._index()

    def twin(self) -> "Pages":
        """A second owner of the same pool; whichever changes first takes a copy of its own."""
        self.shared = True
        return copy.copy(self)

    def _own(self) -> None:
        if self.shared:
            self._set_pool([t.clone() for t in self._pool()])
            self.owners, self.ordinals = self.owners.clone(), self.ordinals.clone()
            self.shared = False
