"""The end of a prompt or turn where bytes are shared out: how many bits each token's key and value get."""

from collections.abc import Callable
from typing import NamedTuple, cast

import torch

from gatekv.attention import sink_tokens
from gatekv.cache.config import CacheConfig
from gatekv.policies import View
from gatekv.policies.rate import HEAD_BYTES, Allotting

Tensor = torch.Tensor


class Undecided(NamedTuple):
    """What one layer brings to a decision.

    Attributes:
        place: its number among those that evict. view: what scorers see. scores: [batch, kv_heads, n], higher keeps.
        logits: of the gate alone, where later tokens will be measured by them; else None.
        before: [batch, 1], real tokens that came earlier than these n.
    """

    place: int
    view: Callable[[], View]
    scores: Tensor
    logits: Tensor | None
    before: Tensor


def allocated(config: CacheConfig, layers: list[Undecided], scores: Tensor, protected: Tensor, valid: Tensor,
              counts: Tensor) -> Tensor:  # fmt: skip
    """[layers, batch, kv_heads, n, 2] uint8: bits of each token's key and value, 0 where it goes.

    scores, protected: [layers, batch, kv_heads, n]; valid: [batch, n]; counts: [layers, batch], the room of a head, in
    whole tokens. All on one device.

    Raises:
        ValueError: layers of different shapes that share one budget.
    """
    policy, home, shape = config.policy, valid.device, scores.shape
    width, views = cast(Allotting, policy.width), [layer.view() for layer in layers]
    shapes = {(v.keys.shape[-1], v.values.shape[-1], v.keys.element_size()) for v in views}
    if len(shapes) > 1:
        raise ValueError(
            "rate shares out bytes among layers of one shape, and this model's have several: use ada or uniform."
        )
    key_dim, value_dim, itemsize = shapes.pop()
    found = [width.weights(policy.scorer, view, layer.scores) for view, layer in zip(views, layers)]
    log_u, log_w = (torch.stack([pair[i].to(home) for pair in found]) for i in range(2))
    log_u = log_u.masked_fill(~valid[:, None], -torch.inf)
    recent = torch.arange(shape[-1], 0, -1, device=home) <= width.window
    whole = torch.stack([sink_tokens(valid, config.sinks, layer.before.to(home)) | recent for layer in layers])
    whole = (whole | (counts >= valid.sum(-1))[..., None])[:, :, None].expand(shape)  # a full budget holds all of it
    least = protected if policy.scorer.evicts else torch.ones_like(protected)
    room = (counts * (key_dim + value_dim) * itemsize - HEAD_BYTES)[..., None, None].expand(*shape[:3], 1)
    # Who shares: a head's tokens, a layer's, or a row's of all layers.
    units = (0, 1, 2) if policy.rule.even else (0, 1) if policy.rule.scope == "layer" else (1,)
    others = [dim for dim in range(3) if dim not in units]
    order = [*units, *others]

    def shared(t: Tensor) -> Tensor:
        """[layers, batch, kv_heads, ...] -> [units, ...]."""
        return t.permute(*order, *range(3, t.ndim)).flatten(0, len(units) - 1).flatten(1)

    sizes = [shape[dim] for dim in order]
    bits = width.allot(
        shared(log_u), shared(log_w), shared(least), shared(whole), shared(room).sum(-1), (key_dim, value_dim), itemsize
    ).view(*sizes, shape[-1], 2)
    back = sorted(range(3), key=lambda dim: order[dim])
    return bits.permute(*back, 3, 4)
