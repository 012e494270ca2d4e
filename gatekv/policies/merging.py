"""What is evicted goes into the kept tokens it is closest to: a kept token becomes the mean of all that it stands for.

A merge rule says which kept token is the closest (`closeness`) and who is let in (`admits`); the arithmetic, with a
count of tokens to each kept one, is `gatekv.cache.segments.merge`'s. Keys are merged as they are stored, turned by
RoPE; a kept token keeps its position and its score.
"""

from dataclasses import dataclass

import torch

from gatekv.cache.segments.merge import Merge
from gatekv.cache.segments.pages import Tokens
from gatekv.ops.naive import accumulation_dtype
from gatekv.policies.parts import RemainderPolicy

Tensor = torch.Tensor


@dataclass
class MergeSimilar(RemainderPolicy):
    """D2O (arXiv 2406.13035, §3.3): into the kept key of the highest cosine, if that reaches a threshold.

    A head's threshold is the mean, over what it evicts together, of these highest cosines; then, eviction by eviction,
    beta · that mean + (1 - beta) · the old threshold. What stays below is forgotten.

    Args:
        beta: how fast the threshold follows.
    """

    beta: float = 0.5
    later = True  # what leaves while decoding merges too

    def __post_init__(self) -> None:
        if not 0 <= self.beta <= 1:
            raise ValueError(f"beta is the weight of the newest similarity, 0 to 1; got {self.beta}.")

    def segment(self) -> Merge:
        """What takes evicted tokens in, in one layer."""
        return Merge(self)

    def closeness(self, left: Tokens, kept: Tokens) -> Tensor:
        """[rows, n left, m kept], higher is closer."""
        a, b = (torch.nn.functional.normalize(t.keys.to(accumulation_dtype(t.keys)), dim=-1) for t in (left, kept))
        return a @ b.transpose(1, 2)

    def admits(self, best: Tensor, held: Tensor, threshold: Tensor | None) -> tuple[Tensor, Tensor]:
        """(who merges [rows, n], new threshold [rows], not a number before a row's first eviction)."""
        some, count = held.any(-1), held.sum(-1)
        mean = best.masked_fill(~held, 0).sum(-1) / count.clamp_min(1)
        old = torch.full_like(mean, torch.nan) if threshold is None else threshold
        new = torch.where(old.isnan(), mean, self.beta * mean + (1 - self.beta) * old)
        new = torch.where(some, new, old)
        return held & (best >= new[:, None]), new


@dataclass
class MergeNear(RemainderPolicy):
    """Elastic-Cache (arXiv 2407.18121, §3.2): into the kept token of the nearest position, the earlier of two.

    Args:
        spare: a head's first kept tokens take nothing in: they are its sinks (the authors' code: 4).
    """

    spare: int = 4
    later = False  # what leaves while decoding is forgotten

    def __post_init__(self) -> None:
        if self.spare < 0:
            raise ValueError(f"spare counts the first kept tokens that take nothing in, at least 0; got {self.spare}.")

    def segment(self) -> Merge:
        """What takes evicted tokens in, in one layer."""
        return Merge(self)

    def closeness(self, left: Tokens, kept: Tokens) -> Tensor:
        """[rows, n left, m kept], higher is closer."""
        away = kept.positions[:, None] - left.positions[:, :, None]
        order = kept.positions.masked_fill(~kept.held, torch.iinfo(kept.positions.dtype).max).argsort(-1).argsort(-1)
        close = -(2 * away.abs() + (away > 0)).double()
        return close.masked_fill((order < self.spare)[:, None], -torch.inf)

    def admits(self, best: Tensor, held: Tensor, threshold: Tensor | None) -> tuple[Tensor, None]:
        """(who merges [rows, n]: all, no threshold)."""
        return held, None
