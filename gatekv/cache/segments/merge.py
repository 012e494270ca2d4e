"""Evicted tokens merge into kept ones: the arithmetic, and a threshold where the rule has one."""

from typing import Any, Protocol, cast

import torch

from gatekv.cache.segments.pages import Pages, Tokens
from gatekv.cache.segments.remainder import Remainder
from gatekv.ops.naive import accumulation_dtype

Tensor = torch.Tensor
ELEMENTS = 2**24  # of a block of closeness


class Rule(Protocol):
    """Who goes where; see `gatekv.policies.merging`."""

    later: bool

    def closeness(self, left: Tokens, kept: Tokens) -> Tensor:
        """[rows, n left, m kept], higher is closer."""
        ...

    def admits(self, best: Tensor, held: Tensor, threshold: Tensor | None) -> tuple[Tensor, Any]:
        """(who merges [rows, n], the new threshold [rows] or None)."""
        ...


class Merge(Remainder):
    """The remainder of policies that rewrite what is kept (see `gatekv.policies.merging`).

    A kept token that stands for c tokens and takes in others, each of which stands for c_m, becomes their mean, key
    (c k + Σ c_m k_m) / (c + Σ c_m), values alike, and stands for c + Σ c_m. So over a head the counts sum up to the
    tokens that were kept or merged, and counts · keys to the sum of these tokens' keys, but for rounding to the cache's
    dtype.

    Attributes:
        rule: who goes where. threshold: [batch · kv_heads] of the rule, or None.
    """

    saved = ("threshold",)
    counts = True

    def __init__(self, rule: Rule) -> None:
        self.rule, self.kv_heads = rule, 1
        self.threshold: Tensor | None = None

    @property
    def later(self) -> bool:  # type: ignore[override]
        return self.rule.later

    def takes(self, features: Tensor | None) -> bool:
        return True

    def fold(self, store: Pages, evicted: Tokens, features: Tensor | None = None) -> None:
        """Merge tokens that have left into those that `store` still holds; a row that holds none forgets them."""
        self.kv_heads = store.kv_heads
        places, held = store.places()
        if not places.shape[1] or not bool(evicted.held.any()):
            return
        keys, values, positions = (t.flatten(0, 1)[places] for t in (store.keys, store.values, store.positions))
        kept = Tokens(keys, values, positions, held)
        best, target = self._closest(evicted, kept)
        taken, self.threshold = self.rule.admits(best, evicted.held & ~best.isinf(), self.threshold)
        brought = taken.int() if evicted.counts is None else evicted.counts * taken
        counts = cast(Tensor, store.counts).flatten()[places]
        new = counts.scatter_add(1, target, brought)
        changed = held & (new > counts)
        acc, size = accumulation_dtype(store.keys), new.to(accumulation_dtype(store.keys))[..., None]
        means: list[Tensor] = []
        for mine, theirs in ((kept.keys, evicted.keys), (kept.values, evicted.values)):
            whole = mine.to(acc) * counts[..., None]
            index = target[..., None].expand_as(theirs)
            means.append(
                (whole.scatter_add(1, index, theirs.to(acc) * brought[..., None]) / size).to(mine.dtype)[changed]
            )
        store.rewrite(places[changed], means[0], means[1], new[changed])

    def _closest(self, evicted: Tokens, kept: Tokens) -> tuple[Tensor, Tensor]:
        """(closeness, place) [rows, n] of each left token's closest kept one; -inf where a row keeps none."""
        found, (rows, n), m = [], evicted.held.shape, kept.held.shape[1]
        step = max(1, ELEMENTS // (rows * m))
        for a in range(0, n, step):
            close = self.rule.closeness(Tokens(*(t[:, a : a + step] for t in evicted[:4])), kept)
            found.append(close.masked_fill(~kept.held[:, None], -torch.inf).max(-1))
        return torch.cat([f.values for f in found], 1), torch.cat([f.indices for f in found], 1)

    def index_select(self, index: Tensor) -> None:
        if self.threshold is not None:
            self.threshold = self.threshold.unflatten(0, (-1, self.kv_heads)).index_select(0, index).flatten()
