"""Memory that answers: what a layer holds answers a query with (output, log-sum-exp), and answers merge."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from gatekv.ops import backends, segments
from gatekv.ops.naive import WHOLE
from gatekv.ops.page_table import PageTable
from gatekv.ops.paged_attention import CHUNK
from gatekv.ops.rectangle import Rectangle
from gatekv.parts import Part

if TYPE_CHECKING:
    from gatekv.cache.segments.pages import Pages

Tensor = torch.Tensor
UNEVEN = 128  # pages, of rows of unequal length, up to which reading more than is held costs less than its calls
Shown = tuple[Tensor, Tensor, Tensor]  # keys, values [rows, most, head_dim], where there is one [rows, most] bool
Read = tuple[Tensor, Tensor, Tensor, PageTable]  # queries, keys, values, table: what paged attention takes


def value_dims(key_dim: int, value_dim: int | None, latent: int) -> tuple[int, int]:
    """Numbers that are held of a key and a value: a value may be narrower, or a part of the key."""
    return key_dim, 0 if latent else key_dim if value_dim is None else value_dim


@dataclass(frozen=True)
class Shape:
    """Sizes of one layer's memory, for what it will hold (`Segment.forecast_bytes`).

    Attributes:
        batch: sequences. kv_heads, head_dim: of the layer. dtype: of keys and values. block_size: tokens in a page.
        even: heads hold the same number of tokens; else half a page each is assumed to be empty.
        value_dim: numbers of a head's value; None: as many as of its key.
        beside: bytes that stand beside each token of a page: position, score, count.
    """

    batch: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    block_size: int = 16
    even: bool = True
    beside: int = 4
    value_dim: int | None = None

    @property
    def rows(self) -> int:
        """Sequences times KV heads."""
        return self.batch * self.kv_heads

    @property
    def dims(self) -> tuple[int, int]:
        """Numbers of a head's key and value."""
        return value_dims(self.head_dim, self.value_dim, 0)

    @property
    def key_bytes(self) -> int:
        """Of one whole key."""
        return self.head_dim * self.dtype.itemsize

    @property
    def token_bytes(self) -> int:
        """Of one whole key and value."""
        return sum(self.dims) * self.dtype.itemsize

    def pages(self, tokens: float) -> float:
        """Pages of a head that holds so many tokens."""
        size = self.block_size
        return math.ceil(tokens / size) if self.even else tokens / size + 0.5 * (1 - 1 / size)


class Segment(Part):
    """A memory of one layer. All that the rest of the cache asks of it are these words, and a `Part`'s: `fork`,
    `index_select`, `state_dict`, `load_state_dict`."""

    def __len__(self) -> int:
        """Tokens held, over all rows; 0: it has nothing to answer."""
        raise NotImplementedError

    def attend(self, q: Tensor, scale: float, visible: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What it answers to queries q [batch, heads, queries, head_dim]: output, shaped as q, and log-sum-exp [batch,
        heads, queries], (0, -inf) where a query sees nothing.

        visible: [batch, 1 or kv_heads, queries, tokens] bool, what each query may see, for memories that hold tokens
        in order; None: all of it.
        """
        raise NotImplementedError

    @classmethod
    def forecast_bytes(cls, shape: Shape, tokens: float) -> int:
        """Bytes that one layer's will hold with so many tokens a head."""
        raise NotImplementedError


class Paged(Segment):
    """A memory whose tokens lie in pages: it says which, and what paged attention is to read of them."""

    def stores(self) -> list["Pages"]:
        """The pages that its tokens lie in."""
        raise NotImplementedError

    def reads(self, q: Tensor) -> Iterable[Read]:
        """What paged attention takes of each of `stores` in turn, where q [batch, heads, queries, head_dim] ask."""
        raise NotImplementedError

    def mark(self, bits: Tensor, real: Tensor) -> None:
        """Set bits [batch, kv_heads, slots, 2], of keys and values, at what it holds; a slot is a token, the last one
        each row's newest. real: [batch, 1], tokens of each row."""
        for store in self.stores():
            store.scatter(bits, WHOLE, real)

    def shown(self, probe: Tensor) -> list[Shown]:
        """What it holds, for looking at, one for each of `stores`; probe: [batch, kv_heads, 1, head_dim], zeros."""
        return [(s.unrolled(s.keys), s.unrolled(s.answers), s.held_places()) for s in self.stores()]

    def rectangles(self, q: Tensor) -> list[Rectangle] | None:
        """The same for `gatekv.ops.joint`, where its pages are few and lie in rows of equal length; else None."""
        for store in self.stores():
            table = store.table
            most = CHUNK if table.even is not None else UNEVEN
            if store.backend != "torch" or len(table.pages) > most or table.longest * table.rows > most:
                return None
        found = []
        for store, (asked, keys, values, table) in zip(self.stores(), self.reads(q)):
            k, v = store.unrolled(keys), store.unrolled(values)
            hidden = None if table.each is not None else ~store.held_places()[:, None]
            found.append(Rectangle(k, v, hidden, None if asked is q else asked))
        return found

    def __len__(self) -> int:
        return sum(store.tokens for store in self.stores())

    def attend(self, q: Tensor, scale: float, visible: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return segments.merge(
            [backends.load(store.backend)(*read, scale) for store, read in zip(self.stores(), self.reads(q))]
        )
