"""Old tokens in few bits (QAQ): a store of pages for every pair of widths that a key and a value have."""

import copy
from collections.abc import Iterator

import torch

from gatekv.cache.pages import Pages, Read
from gatekv.cache.prompt_end import PromptEnd
from gatekv.ops import segments
from gatekv.ops.naive import group_queries
from gatekv.ops.paged_attention import paged_mass, paged_segment
from gatekv.ops.quantise import dequantise, quantise, spread
from gatekv.policies.qaq import PAGE, Bits

Tensor = torch.Tensor


class Quantised:
    """Tokens of one layer whose keys and values are records of `gatekv.ops.quantise`.

    All tokens of a store have records of one length, so pages hold them as they hold numbers: a token's bits are those
    of its store, and its bytes leave with it. Attention decodes one store at a time.

    Attributes:
        pages: (key bits, value bits) -> keys, values [P, PAGE, bytes] uint8. head_dim, dtype: of what is decoded.
        outliers: of each vector.
    """

    def __init__(self, width: Bits, like: Tensor) -> None:
        """An empty one; like [..., head_dim] has the model's dtype."""
        self.pages: dict[tuple[int, int], Pages] = {}
        self.head_dim, self.dtype = like.shape[-1], like.dtype
        self.outliers = width.apart(self.head_dim)

    @classmethod
    def of(cls, pages: Pages, width: Bits, end: PromptEnd) -> "Quantised":
        """The old tokens of `pages`, in as many bits as they matter at this end; `pages` keeps the others."""
        new = cls(width, end.keys)
        new.absorb(pages, width, end)
        return new

    def absorb(self, pages: Pages, width: Bits, end: PromptEnd) -> None:
        """Take the old tokens of `pages` too; bits are shared out among them alone."""
        last = end.seen - width.window
        old = pages.split(pages.positions < last)
        if not len(old):
            return
        key_bits, value_bits = self._bits(old, width, end, self._attention(old, pages, end, last))
        held = old.occupied()
        for pair in torch.stack([key_bits[held], value_bits[held]], -1).unique(dim=0).tolist():
            rows, number, counts, sources = old.picked((key_bits == pair[0]) & (value_bits == pair[1]))
            records = [quantise(x, b, self.outliers) for x, b in zip(sources, pair)]
            if tuple(pair) not in self.pages:
                like = old.keys.new_empty(len(counts), 1, 0, self.head_dim)
                store = Pages(like, PAGE, old.scores is not None, old.counts is not None)
                self.pages[tuple(pair)] = store
                store.keys, store.values = (r.new_zeros(0, PAGE, r.shape[-1]) for r in records)
            self.pages[tuple(pair)].add(rows, number, counts, [*records, *sources[2:]])

    def _attention(self, old: Pages, pages: Pages, end: PromptEnd, last: int) -> Tensor:
        """[P, block_size]: the most that any of the last queries attends to each old token, of all it attends to."""
        q = end.queries
        seen = [paged_segment(*read, end.scaling) for read in [(q, old.keys, old.values, old.table), *self.reads(q)]]
        lse = segments.merge([*seen, end.near(pages, last)])[1]
        lse = lse.masked_fill(~end.asks[:, None], torch.inf)
        return paged_mass(q, old.keys, old.table, lse, end.scaling, most=True)

    def _bits(self, old: Pages, width: Bits, end: PromptEnd, attention: Tensor) -> tuple[Tensor, Tensor]:
        """Bits of each old token's key and value, both [P, block_size] int64; anything where there is no token."""
        batch, kv_heads = end.keys.shape[:2]
        key_range, value_range = (
            high - low for low, high, _ in (spread(x, self.outliers) for x in (old.keys, old.values))
        )
        size = old.unrolled(old.values.to(value_range.dtype).square().mean(-1)).sum(-1) / old.lengths.clamp_min(1)
        asked = group_queries(end.queries, kv_heads).to(size.dtype).norm(dim=-1)
        asked = asked.masked_fill(~end.asks[:, None, None], 0).amax((2, 3)).flatten() * end.scaling
        a, keys, values = (old.unrolled(x) for x in (attention, key_range, value_range))
        held = old.unrolled(torch.ones_like(attention, dtype=torch.bool))
        sensitivity = width.sensitivity(a, held, keys, values, size.sqrt()[:, None], asked[:, None])
        per_row = lambda t: t.unflatten(1, (batch, -1)).movedim(1, 0).flatten(1)  # noqa: E731  [2, rows, n] -> [batch, ...]
        bits = width.allot(per_row(sensitivity), per_row(held.expand(2, -1, -1)))
        bits = bits.view(batch, 2, kv_heads, -1).movedim(1, 0).flatten(1, 2)
        return old.rolled(bits[0]), old.rolled(bits[1])

    def stores(self) -> list[Pages]:
        """The pages of every pair of widths."""
        return list(self.pages.values())

    def reads(self, q: Tensor) -> Iterator[Read]:
        """See `Kept.reads`."""
        for bits, store in self.pages.items():
            keys, values = (
                dequantise(t, b, self.outliers, self.head_dim, self.dtype)
                for t, b in zip((store.keys, store.values), bits)
            )
            yield q, keys, values, store.table

    def select(self, rows: Tensor, index: Tensor) -> None:
        """Keep, reorder or repeat sequences: index [new_batch], rows [new_batch · kv_heads]."""
        for store in self.pages.values():
            store.select(rows)

    def twin(self) -> "Quantised":
        """A second owner of the same pools."""
        twin = copy.copy(self)
        twin.pages = {bits: store.twin() for bits, store in self.pages.items()}
        return twin

    def tensors(self) -> list[Tensor]:
        """Every tensor held."""
        return [t for store in self.pages.values() for t in store.tensors()]
