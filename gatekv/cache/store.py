"""What has left the window and is still held: pages, old tokens of less width, sinks that stand apart; and a remainder
of what was evicted."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, cast

import torch

from gatekv.cache.segments.pages import Pages, Tokens
from gatekv.cache.segments.prompt_end import PromptEnd
from gatekv.cache.segments.segment import Paged, Read
from gatekv.cache.segments.window import RecentWindow
from gatekv.ops import backends
from gatekv.ops.paged_attention import paged_mass
from gatekv.ops.rectangle import Rectangle
from gatekv.parts import Part

if TYPE_CHECKING:
    from gatekv.cache.config import CacheConfig
    from gatekv.cache.segments.remainder import Remainder

Tensor = torch.Tensor


class CompressedStore(Part):
    """Kept tokens of one layer.

    Attributes:
        pages: most of them. narrow: old ones of less width, or None. sinks: those that stand apart because they answer
        other queries, or None. remainder: what becomes of the evicted.
    """

    saved = ("pages", "narrow", "sinks", "remainder")

    def __init__(self, like: Tensor, config: "CacheConfig", with_scores: bool, value_dim: int | None = None,
                 latent: int = 0) -> None:  # fmt: skip
        """`like` [batch, kv_heads, tokens, head_dim] gives shapes, dtype and device; the rest: as for the window."""
        policy = config.policy
        backend = "torch" if latent else backends.choose(config.backend, config.block_size, like.device, like.dtype)
        self.remainder: Remainder = policy.remainder_segment()
        self.pages = Pages(like, config.block_size, with_scores, self.remainder.counts, backend, value_dim, latent)
        self.narrow = None if policy.width is None else policy.width.segment(self.pages)
        self.sinks: Paged | None = None

    def segments(self) -> list[Paged]:
        """The memories that hold something."""
        return [part for part in (self.pages, self.narrow, self.sinks) if part is not None and len(part)]

    def __len__(self) -> int:
        """Tokens held, over all rows."""
        return sum(map(len, self.segments()))

    def rectangles(self, q: Tensor) -> list[Rectangle] | None:
        """What one softmax can read of them, to queries q [batch, heads, n, head_dim]; None: they answer one by one."""
        found = []
        for part in self.segments():
            if (mine := part.rectangles(q)) is None:
                return None
            found += mine
        return found

    def stores(self) -> list[Pages]:
        """The pages of every memory."""
        return [store for part in self.segments() for store in part.stores()]

    def reads(self, q: Tensor) -> Iterator[Read]:
        """What paged attention takes of each of `stores`, where q [batch, heads, queries, head_dim] ask."""
        for part in self.segments():
            yield from part.reads(q)

    # -- eviction

    def evict(self, store: Pages, gone: Tensor) -> None:
        """Drop the tokens flagged in gone [P, block_size] from one of the stores; the remainder takes them."""
        evicted = store.taken(gone) if self.remainder.later and bool(gone.any()) else None
        store.evict(gone)
        if evicted is not None:
            self.remainder.fold(store, evicted)

    def take(self, window: RecentWindow, leave: int, real: Tensor) -> None:
        """Move the first `leave` tokens out of the window: the flagged ones here, the others to the remainder.

        real: [batch, 1], real tokens seen, the window's among them.
        """
        keys, values, flags = (t[:, :, :leave] for t in (*window.stored, window.flags))
        scores = None if self.pages.scores is None else cast(Tensor, window.scores)[..., :leave]
        start = real - len(window)  # number of its first column among the row's real tokens, were it one
        self.pages.append(keys, values, flags, start, scores)
        features = None if window.psi is None else window.psi[:, :, :leave]
        if self.remainder.takes(features):
            places = (start + torch.arange(leave, device=flags.device)).int()[:, None].expand(flags.shape)
            gone = ~flags & window.valid[:, None, :leave]
            evicted = Tokens(*(t.flatten(0, 1) for t in (keys, values, places, gone)))
            self.remainder.fold(self.pages, evicted, features)
        window.drop(front=leave)

    def filter(self, keep: Tensor, real: Tensor) -> None:
        """Hold of the pages' tokens among the last n slots those that keep [batch, kv_heads, n] flags.

        real: [batch, 1], real tokens seen.
        """
        self.pages.scores = None
        self.evict(self.pages, self.pages.unwanted(keep, real))
        self.pages.shrink()

    def watch(self, observe: Callable[[Tensor, Tensor], Tensor], q: Tensor, lse: Tensor, scale: float,
              asks: Tensor) -> None:  # fmt: skip
        """Renew the scores of what is held by the attention it just received: observe = `Scorer.observe`.

        q: [batch, heads, 1, head_dim]; lse: [batch, heads, 1], over everything that the query saw; asks: [batch, 1]
        bool, False at pads, whose attention is none.
        """
        kv_heads = self.pages.kv_heads
        asks = asks.repeat_interleave(kv_heads, 0)
        for store, (part, keys, _, table) in zip(self.stores(), self.reads(q)):
            paid = store.unrolled(paged_mass(part, keys, table, lse, scale).float())
            old = store.unrolled(cast(Tensor, store.scores))
            new = observe(*(t.view(len(q), kv_heads, -1) for t in (old, paid))).flatten(0, 1)
            store.scores = store.rolled(torch.where(old.isinf() | ~asks, old, new))

    def absorb(self, end: PromptEnd) -> None:
        """A prompt or turn has ended: old tokens get their width."""
        if self.narrow is not None:
            self.narrow.absorb(self.pages, end)
