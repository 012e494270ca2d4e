"""Old tokens in few bits (QAQ): a store of pages for every pair of widths that a key and a value have."""

from collections.abc import Iterator
from typing import Protocol

import torch

from gatekv.cache.segments.pages import Pages
from gatekv.cache.segments.prompt_end import PromptEnd
from gatekv.cache.segments.segment import Read, Shape
from gatekv.cache.segments.width import Narrow
from gatekv.ops.learned_sinks import with_sinks
from gatekv.ops.naive import group_queries
from gatekv.ops.paged_attention import paged_mass
from gatekv.ops.quantise import dequantise, quantise, spread
from gatekv.parts import below

Tensor = torch.Tensor
PAGE = 8  # tokens in a page of narrow tokens: the fewer, the less a page that is not full costs
TOKEN_BYTES = 4 + 20 / PAGE  # beside the records: a token's position, its share of its page's place in the tables
PAIRS = 6  # of widths (key, value) that a head's tokens typically have; each ends in a page that is half empty


class AllotsBits(Protocol):
    """What is asked of the width (`gatekv.policies.qaq.Bits`)."""

    window: int

    def apart(self, head_dim: int) -> int:
        """See there."""
        ...

    def sensitivity(self, attention: Tensor, held: Tensor, key_range: Tensor, value_range: Tensor, value_size: Tensor,
                    query_size: Tensor) -> Tensor:  # fmt: skip
        """See there."""
        ...

    def allot(self, sensitivity: Tensor, held: Tensor) -> Tensor:
        """See there."""
        ...


class Quantised(Narrow):
    """Tokens of one layer whose keys and values are records of `gatekv.ops.quantise`.

    All tokens of a store have records of one length, so pages hold them as they hold numbers: a token's bits are those
    of its store, and its bytes leave with it. Attention decodes one store at a time.

    Attributes:
        pages: (key bits, value bits) -> keys, values [P, PAGE, bytes] uint8. dims, dtype: of what is decoded.
        outliers: of each vector. kv_heads, backend: of every store.
    """

    def __init__(self, width: AllotsBits, pages: Pages) -> None:
        """An empty one beside `pages`, whose old tokens it will take."""
        self.width = width
        self.pages: dict[tuple[int, int], Pages] = {}
        self.dims, self.dtype = (pages.keys.shape[-1], pages.values.shape[-1]), pages.values.dtype
        self.outliers = [width.apart(d) for d in self.dims]
        self.kv_heads, self.backend = pages.kv_heads, pages.backend

    def absorb(self, pages: Pages, end: PromptEnd) -> None:
        """Take the old tokens of `pages`, in as many bits as they matter at this end; bits are shared out among them
        alone."""
        old = pages.split(end.old(pages, self.width.window))
        if not len(old):
            return
        key_bits, value_bits = self._bits(old, end, self._attention(old, pages, end))
        held = old.occupied()
        for pair in torch.stack([key_bits[held], value_bits[held]], -1).unique(dim=0).tolist():
            rows, number, counts, sources = old.picked((key_bits == pair[0]) & (value_bits == pair[1]))
            records = [quantise(x, b, apart) for x, b, apart in zip(sources, pair, self.outliers)]
            if tuple(pair) not in self.pages:
                store = self.pages[tuple(pair)] = old.blank(PAGE)
                store.keys, store.values = (r.new_zeros(0, PAGE, r.shape[-1]) for r in records)
            self.pages[tuple(pair)].add(rows, number, counts, [*records, *sources[2:]])

    def _attention(self, old: Pages, pages: Pages, end: PromptEnd) -> Tensor:
        """[P, block_size]: the most that any of the last queries attends to each old token, of all it attends to."""
        q = end.queries
        seen = [part.attend(q, end.scaling) for part in (old, self) if len(part)]
        lse = torch.stack([answer[1] for answer in (*seen, end.near(pages, self.width.window))]).logsumexp(0)
        lse = with_sinks((lse[..., None], lse), end.sinks)[1]
        lse = lse.masked_fill(~end.asks[:, None], torch.inf)
        return paged_mass(q, old.keys, old.table, lse, end.scaling, most=True)

    def _bits(self, old: Pages, end: PromptEnd, attention: Tensor) -> tuple[Tensor, Tensor]:
        """Bits of each old token's key and value, both [P, block_size] int64; anything where there is no token."""
        batch, kv_heads = end.keys.shape[:2]
        key_range, value_range = (
            high - low for low, high, _ in (spread(x, apart) for x, apart in zip((old.keys, old.values), self.outliers))
        )
        size = old.unrolled(old.values.to(value_range.dtype).square().mean(-1)).sum(-1) / old.lengths.clamp_min(1)
        asked = group_queries(end.queries, kv_heads).to(size.dtype).norm(dim=-1)
        asked = asked.masked_fill(~end.asks[:, None, None], 0).amax((2, 3)).flatten() * end.scaling
        a, keys, values = (old.unrolled(x) for x in (attention, key_range, value_range))
        held = old.unrolled(torch.ones_like(attention, dtype=torch.bool))
        sensitivity = self.width.sensitivity(a, held, keys, values, size.sqrt()[:, None], asked[:, None])
        per_row = lambda t: t.unflatten(1, (batch, -1)).movedim(1, 0).flatten(1)  # noqa: E731  [2, rows, n] -> [batch, ...]
        bits = self.width.allot(per_row(sensitivity), per_row(held.expand(2, -1, -1)))
        bits = bits.view(batch, 2, kv_heads, -1).movedim(1, 0).flatten(1, 2)
        return old.rolled(bits[0]), old.rolled(bits[1])

    def mark(self, bits: Tensor, real: Tensor) -> None:
        for pair, store in self.pages.items():
            for part, width in zip(bits.unbind(-1), pair):
                store.scatter(part, width, real)

    def stores(self) -> list[Pages]:
        return list(self.pages.values())

    def reads(self, q: Tensor) -> Iterator[Read]:
        for bits, store in self.pages.items():
            keys, values = (
                dequantise(t, b, apart, d, self.dtype)
                for t, b, apart, d in zip((store.keys, store.values), bits, self.outliers, self.dims)
            )
            yield q, keys, values, store.table

    def index_select(self, index: Tensor) -> None:
        for store in self.pages.values():
            store.index_select(index)

    def state_dict(self) -> dict[str, Tensor]:
        pairs = {f"{key}.{value}": store for (key, value), store in self.pages.items()}
        return {f"{pair}.{name}": t for pair, store in pairs.items() for name, t in store.state_dict().items()}

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        for pair in sorted({tuple(name.split(".")[:2]) for name in tensors}):
            mine = below(tensors, ".".join(pair))
            like = mine["keys"].new_empty(len(mine["lengths"]) // self.kv_heads, self.kv_heads, 0, self.dims[0])
            store = self.pages[int(pair[0]), int(pair[1])] = Pages(
                like, PAGE, backend=self.backend, value_dim=self.dims[1]
            )
            store.load_state_dict(mine)

    @classmethod
    def forecast_bytes(cls, shape: Shape, tokens: float, token_bytes: float = 0.0) -> int:
        """token_bytes: of a token of one head on average, its place in the tables included."""
        return round(shape.rows * (tokens + PAIRS * PAGE / 2) * token_bytes) if tokens else 0
