"""Paged storage: every (sequence, kv head) row holds its own number of tokens, in pages of one pool."""

from typing import NamedTuple, cast

import torch

from gatekv.cache.segments.pool import Pool
from gatekv.cache.segments.segment import Read, Shape

Tensor = torch.Tensor
PAGE_BYTES = 5 * 4  # beside a page's slots: owner and ordinal, and the table's page, owner and fill
ROW_BYTES = 12  # length, and where the table's row begins


class Tokens(NamedTuple):
    """Tokens of each row of storage (sequence · kv_heads + head), side by side; rows may hold fewer than n.

    keys, values: [rows, n, head_dim]. positions: [rows, n] slots as fed. held: [rows, n] bool, where there is a token.
    counts: [rows, n] int32, how many tokens each one stands for, or None: itself.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    held: Tensor
    counts: Tensor | None = None


class Pages(Pool):
    """The pool's tokens as attention, eviction and the widths read and write them."""

    def blank(self, block_size: int | None = None) -> "Pages":
        """An empty store over the same rows, which holds for each token what this one does."""
        like = self.keys.new_empty(len(self.lengths) // self.kv_heads, self.kv_heads, 0, self.values.shape[-1])
        block_size = self.block_size if block_size is None else block_size
        return Pages(like, block_size, self.scores is not None, self.counts is not None, self.backend)

    def stores(self) -> list["Pages"]:
        return [self]

    def reads(self, q: Tensor) -> list[Read]:
        return [(q, self.keys, self.values, self.table)]

    def append(
        self, keys: Tensor, values: Tensor, keep: Tensor, start: Tensor | int, scores: Tensor | None = None
    ) -> None:
        """Add the flagged tokens of a dense piece.

        keys, values: [batch, kv_heads, n, head_dim]; keep: [batch, kv_heads, n] bool; start: number of the first
        token in its row, [batch, 1] or one for all; scores: [batch, kv_heads, n], needed if the store holds scores.
        """
        keep = keep.flatten(0, 1)
        rows, slots = keep.nonzero(as_tuple=True)
        if not len(rows):
            return
        first = start.flatten()[rows // self.kv_heads] if isinstance(start, Tensor) else start
        sources = [keys.flatten(0, 1)[rows, slots], values.flatten(0, 1)[rows, slots], (slots + first).int()]
        if self.scores is not None:
            sources.append(cast(Tensor, scores).flatten(0, 1)[rows, slots].float())
        if self.counts is not None:
            sources.append(torch.ones_like(sources[2]))
        self.add(rows, (keep.cumsum(-1) - 1)[rows, slots], keep.sum(-1), sources)

    def absorb(self, other: "Pages") -> None:
        """Add all tokens of another store over the same rows, with keys as wide and scores or none alike."""
        self.add(*other.picked(other.occupied()))

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

    def taken(self, gone: Tensor) -> Tokens:
        """The flagged tokens [P, block_size], row by row, with their counts where the store has them."""
        rows, number, lengths, (keys, values, positions, *rest) = self.picked(gone)
        held = torch.arange(int(lengths.max()), device=rows.device) < lengths[:, None]
        found: list[Tensor] = []
        for source in (keys, values, positions, *([] if self.counts is None else rest[-1:])):
            out = source.new_zeros(*held.shape, *source.shape[1:])
            out[rows, number] = source
            found.append(out)
        return Tokens(found[0], found[1], found[2], held, None if self.counts is None else found[3])

    def split(self, gone: Tensor) -> "Pages":
        """The flagged tokens [P, block_size], which leave this store, as a store of their own."""
        out = self.fork()
        out.evict(~gone)
        out.shrink()
        self.evict(gone)
        self.shrink()
        return out

    def ages(self, real: Tensor) -> Tensor:
        """[P, block_size] int64: how many of its row's tokens have come since, 1 for the newest; real: [batch, 1],
        tokens of each row. Anything where a slot holds none."""
        rows, _ = self._held()
        return real.flatten()[rows // self.kv_heads] - self.positions

    def unwanted(self, keep: Tensor, real: Tensor) -> Tensor:
        """[P, block_size] bool: the tokens among a row's last n that keep [batch, kv_heads, n] does not flag; real: see
        `ages`."""
        slots = keep.shape[-1] - self.ages(real)
        rows, _ = self._held()
        kept = keep.flatten(0, 1)[rows.expand_as(slots), slots.clamp_min(0)] if keep.shape[-1] else slots < 0
        return (slots >= 0) & ~kept & self.occupied()

    def scatter(self, into: Tensor, source: Tensor | bool | float, real: Tensor) -> None:
        """Write `source` ([P, block_size, ...] or a scalar) into [batch, kv_heads, slots, ...], which ends with each
        row's newest token, at the slots of what is held; no held one is earlier. real: see `ages`."""
        occupied = self.occupied()
        rows, _ = self._held()
        source = source[occupied] if isinstance(source, Tensor) else source
        place = (into.shape[2] - self.ages(real))[occupied]
        into.flatten(0, 1)[rows.expand_as(occupied)[occupied], place] = source

    @classmethod
    def forecast_bytes(cls, shape: Shape, tokens: float, key_bytes: int | None = None) -> int:
        """key_bytes: of a token's key, where that is not a whole one."""
        if not tokens:
            return 8 * shape.rows
        pages = shape.pages(tokens)
        token = (shape.head_bytes if key_bytes is None else key_bytes) + shape.head_bytes + shape.beside
        return round(shape.rows * (pages * (shape.block_size * token + PAGE_BYTES) + ROW_BYTES))
