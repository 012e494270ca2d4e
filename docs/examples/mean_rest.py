"""A remainder of your own: each head's evicted tokens become one token, their mean, which counts as often as they."""

from dataclasses import dataclass

import torch

from gatekv.cache.segments.pages import Pages, Tokens
from gatekv.cache.segments.remainder import Remainder
from gatekv.cache.segments.segment import Shape
from gatekv.ops.naive import accumulation_dtype, group_queries
from gatekv.policies import register_policy
from gatekv.policies.parts import RemainderPolicy

Tensor = torch.Tensor


class Mean(Remainder):
    """Sums over what one layer evicted: keys, values [batch, kv_heads, head_dim], count [batch, kv_heads], or None."""

    saved = ("keys", "values", "count")
    later = True  # what leaves while decoding is taken in, too

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.count: Tensor | None = None

    def takes(self, features: Tensor | None) -> bool:
        return True

    def fold(self, store: Pages, evicted: Tokens, features: Tensor | None = None) -> None:
        wide = accumulation_dtype(evicted.keys)
        sums = [t.masked_fill(~evicted.held[..., None], 0).sum(1, dtype=wide) for t in evicted[:2]]
        keys, values, count = (t.unflatten(0, (-1, store.kv_heads)) for t in (*sums, evicted.held.sum(1).to(wide)))
        if self.count is not None:  # new tensors, as copies of the cache may share the old ones
            keys, values, count = self.keys + keys, self.values + values, self.count + count
        self.keys, self.values, self.count = keys, values, count

    def answers(
        self, q: Tensor, scale: float, window: object = None, mask: object = None, delay: int = 0
    ) -> list[tuple[Tensor, Tensor]]:
        if self.count is None:
            return []
        each = self.count.clamp_min(1)[..., None]
        grouped = group_queries(q, self.count.shape[1]).to(each.dtype)  # [batch, kv_heads, group, queries, head_dim]
        logits = torch.einsum("bkgnd,bkd->bkgn", grouped, self.keys / each) * scale
        lse = logits + self.count.log()[:, :, None, None]  # of nothing: -inf, and the merge leaves it out
        output = (self.values / each)[:, :, None, None].expand_as(grouped)
        return [(output.flatten(1, 2), lse.flatten(1, 2))]

    def forecast_bytes(self, shape: Shape, waiting: int) -> int:
        numbers = 2 * shape.head_dim + 1
        return shape.rows * numbers * torch.promote_types(shape.dtype, torch.float32).itemsize


@dataclass
class MeanRest(RemainderPolicy):
    """A crude one: keys are averaged as RoPE has turned them."""

    def segment(self) -> Mean:
        return Mean()


register_policy("mean_rest", MeanRest)
