"""Paged storage: every (sequence, kv head) row holds its own number of tokens, in pages of one pool."""

from typing import NamedTuple, cast

import torch

from gatekv.cache.segments.pool import Pool
from gatekv.cache.segments.segment import Read, Shape
from gatekv.ops.paged_attention import paged_mass

Tensor = torch.Tensor
PAGE_BYTES = 5 * 4  # beside a page's slots: owner and ordinal, and the table's page, owner and fill
ROW_BYTES = 12  # length, and where the table's row begins


class Tokens(NamedTuple):
    """Tokens of each row of storage (sequence · kv_heads + head), side by side; rows may hold fewer than n.

    keys, values: [rows, n, head_dim]. positions: [rows, n], numbers among the row's real tokens. held: [rows, n] bool,
    where there is a token. counts: [rows, n] int32, how many tokens each one stands for, or None: itself.
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
        like = self.keys.new_empty(len(self.lengths) // self.kv_heads, self.kv_heads, 0, self.keys.shape[-1])
        block_size = self.block_size if block_size is None else block_size
        held, value_dim = (self.scores is not None, self.counts is not None), self.values.shape[-1]
        return Pages(like, block_size, *held, self.backend, value_dim, self.latent)

    @property
    def answers(self) -> Tensor:
        """[P, block_size, value_dim]: the values, which of latents are a part of the keys."""
        return self.keys[..., : self.latent] if self.latent else self.values

    def stores(self) -> list["Pages"]:
        return [self]

    def reads(self, q: Tensor) -> list[Read]:
        return [(q, self.keys, self.answers, self.table)]

    def received(self, q: Tensor, lse: Tensor, scale: float) -> Tensor:
        """[P, block_size]: the attention that q [batch, heads, n, head_dim] pay each token, mean over a group; lse:
        [batch, heads, n], over everything that they saw."""
        return paged_mass(q, self.keys, self.table, lse, scale)

    def append(
        self, keys: Tensor, values: Tensor, keep: Tensor, start: Tensor | int, scores: Tensor | None = None
    ) -> None:
        """Add the flagged tokens of a dense piece.

        keys, values: [batch, kv_heads, n, head_dim]; keep: [batch, kv_heads, n] bool; start: number of the first
        token in its row, [batch, 1] or one for all; scores: [batch, kv_heads, n], needed if the store holds scores.
        """
        keep = keep.flatten(0, 1)
        counts = keep.sum(-1)
        sizes = self.sizes(self.lengths + counts)
        if sizes.tokens == self.tokens:
            return
        rows, slots = torch.nonzero_static(keep, size=sizes.tokens - self.tokens).unbind(1)
        first = start.flatten()[rows // self.kv_heads] if isinstance(start, Tensor) else start
        sources = [keys.flatten(0, 1)[rows, slots], values.flatten(0, 1)[rows, slots], (slots + first).int()]
        if self.scores is not None:
            sources.append(cast(Tensor, scores).flatten(0, 1)[rows, slots].float())
        if self.counts is not None:
            sources.append(torch.ones_like(sources[2]))
        self.add(rows, (keep.cumsum(-1) - 1)[rows, slots], counts, sources, sizes)

    def absorb(self, other: "Pages") -> None:
        """Add all tokens of another store over the same rows, with keys as wide and scores or none alike."""
        self.add(*other.picked(other.occupied()))

    def unrolled(self, slots: Tensor, fill: float = 0.0) -> Tensor:
        """[P, block_size, ...] -> [rows, most, ...]: by place in the row, `fill` where a row is shorter."""
        table = self.table
        if table.even is not None and table.each is not None:
            return slots.index_select(0, table.pages).view(table.rows, -1, *slots.shape[2:])[:, : table.each]
        out = slots[table.block_table].flatten(1, 2)
        held = self.held_places()
        return out.masked_fill(~held.view(*held.shape, *[1] * (out.ndim - 2)), fill)

    def rolled(self, places: Tensor) -> Tensor:
        """The way back: [rows, most] -> [P, block_size]; anything in slots that hold no token."""
        table = self.table
        if table.each is not None and table.even is not None:
            room = table.even * self.block_size - table.each
            out = places.new_zeros(self.positions.shape)
            filled = torch.nn.functional.pad(places, (0, room)).view(-1, self.block_size)
            return out.index_copy_(0, table.pages.long(), filled)
        ordinals = self.ordinals.index_select(0, table.pages)
        out = places.new_zeros(self.positions.shape)
        out[table.pages] = places.unflatten(1, (-1, self.block_size))[table.owners, ordinals]
        return out

    def held_places(self) -> Tensor:
        """[rows, most] bool: where a row has a token."""
        most = self.table.block_table.shape[1] * self.block_size
        return torch.arange(most, device=self.lengths.device) < self.lengths[:, None]

    def narrow(self, channels: Tensor) -> None:
        """Drop key channels: channels [rows, kept] are those that stay."""
        index = channels[self.owners.clamp_min(0).long()][:, None].expand(-1, self.block_size, -1)
        self.keys = self.keys.gather(-1, index)

    def places(self) -> tuple[Tensor, Tensor]:
        """(index of each token in the flattened pool [rows, most], where there is one [rows, most] bool)."""
        first = self.table.block_table.long() * self.block_size
        index = first[..., None] + torch.arange(self.block_size, device=first.device)
        return index.flatten(1), self.held_places()

    def write(self, column: Tensor, sources: list[Tensor], stays: Tensor | None, wanted: bool) -> list[Tensor]:
        """Put another token into each row's place `column` [rows]; where `stays` [rows], not None, is False, it leaves.

        sources: of the new tokens, [rows, ...] for each of the pool's parts, in their order. Returns the same of the
        tokens that leave, those that stood there or the new ones, where they are wanted.
        """
        self.own()
        at, left = self.at(column), []
        for pool, source in zip(self._pool(), sources):
            flat = pool.flatten(0, 1)
            old = flat.index_select(0, at) if wanted or stays is not None else source
            keep = None if stays is None else stays.view(-1, *[1] * (source.ndim - 1))
            flat.index_copy_(0, at, source if keep is None else torch.where(keep, source, old))
            if wanted:
                left.append(old if keep is None else torch.where(keep, old, source))
        return left

    def by_head(self, x: Tensor) -> Tensor:
        """[rows, 1] of a number a sequence, x [batch, 1]."""
        return x.expand(-1, self.kv_heads).reshape(-1, 1)

    def at(self, column: Tensor) -> Tensor:
        """[rows] int64: index in the flattened pool of each row's place `column` [rows]."""
        page = self.table.block_table.gather(1, (column // self.block_size)[:, None])[:, 0]
        return page * self.block_size + column % self.block_size

    def rewrite(self, places: Tensor, keys: Tensor, values: Tensor, counts: Tensor) -> None:
        """Put other keys, values [n, width] and counts [n] at places [n] of the flattened pool."""
        self.own()
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

    def gathered(self, source: Tensor, real: Tensor) -> Tensor:
        """[P, block_size, ...]: what source [batch, kv_heads, n, ...], which ends with each row's newest token, says of
        what is held. Anything where a slot holds none of these. real: see `ages`."""
        slots = (source.shape[2] - self.ages(real)).clamp(0, source.shape[2] - 1)
        return source.flatten(0, 1)[self._held()[0].expand_as(slots), slots]

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
        narrower = 0 if key_bytes is None else shape.key_bytes - key_bytes
        token = shape.token_bytes - narrower + shape.beside
        return round(shape.rows * (pages * (shape.block_size * token + PAGE_BYTES) + ROW_BYTES))
