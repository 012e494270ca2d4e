"""Evicted tokens merge into kept ones: the arithmetic, and a threshold where the rule has one."""

import copy
from typing import cast

import torch

from gatekv.cache.pages import Pages
from gatekv.ops.naive import accumulation_dtype
from gatekv.policies.merging import MergeNear, MergeSimilar, Tokens

Tensor = torch.Tensor
ELEMENTS = 2**24  # of a block of closeness


class Merge:
    """The remainder of policies that rewrite what is kept (see `gatekv.policies.merging`).

    A kept token that stands for c tokens and takes in others, each of which stands for c_m, becomes their mean, key
    (c k + Σ c_m k_m) / (c + Σ c_m), values alike, and stands for c + Σ c_m. So over a head the counts sum up to the
    tokens that were kept or merged, and counts · keys to the sum of these tokens' keys, but for rounding to the cache's
    dtype.

    Attributes:
        rule: who goes where. threshold: [rows] of the rule, or None. No tensor is ever written in place.
    """

    def __init__(self, rule: MergeNear | MergeSimilar) -> None:
        self.rule = rule
        self.threshold: Tensor | None = None

    def fold(self, store: Pages, left: Tokens) -> None:
        """Merge tokens that have left into those that `store` still holds; a row that holds none forgets them."""
        places, held = store.places()
        if not places.shape[1] or not bool(left.held.any()):
            return
        keys, values, positions = (t.flatten(0, 1)[places] for t in (store.keys, store.values, store.positions))
        kept = Tokens(keys, values, positions, held)
        best, target = self._closest(left, kept)
        taken, self.threshold = self.rule.admits(best, left.held & ~best.isinf(), self.threshold)
        brought = taken.int() if left.counts is None else left.counts * taken
        counts = cast(Tensor, store.counts).flatten()[places]
        new = counts.scatter_add(1, target, brought)
        changed = held & (new > counts)
        acc, size = accumulation_dtype(store.keys), new.to(accumulation_dtype(store.keys))[..., None]
        means: list[Tensor] = []
        for mine, theirs in ((kept.keys, left.keys), (kept.values, left.values)):
            whole = mine.to(acc) * counts[..., None]
            index = target[..., None].expand_as(theirs)
            means.append(
                (whole.scatter_add(1, index, theirs.to(acc) * brought[..., None]) / size).to(mine.dtype)[changed]
            )
        store.rewrite(places[changed], means[0], means[1], new[changed])

    def _closest(self, left: Tokens, kept: Tokens) -> tuple[Tensor, Tensor]:
        """(closeness, place) [rows, n] of each left token's closest kept one; -inf where a row keeps none."""
        found, (rows, n), m = [], left.held.shape, kept.held.shape[1]
        step = max(1, ELEMENTS // (rows * m))
        for a in range(0, n, step):
            close = self.rule.closeness(Tokens(*(t[:, a : a + step] for t in left[:4])), kept)
            found.append(close.masked_fill(~kept.held[:, None], -torch.inf).max(-1))
        return torch.cat([f.values for f in found], 1), torch.cat([f.indices for f in found], 1)

    def select(self, rows: Tensor) -> None:
        """Keep, reorder or repeat sequences: rows [new_rows]."""
        self.threshold = None if self.threshold is None else self.threshold.index_select(0, rows)

    def twin(self) -> "Merge":
        """A second owner; whichever folds first has a threshold of its own from then on."""
        return copy.copy(self)

    def tensors(self) -> list[Tensor]:
        """Every tensor held, but for the counts, which the pages hold."""
        return [] if self.threshold is None else [self.threshold]
