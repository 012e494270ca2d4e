"""Layers that read another layer's keys and values (Gemma 3n, Gemma 4 E2B and E4B).

Such a layer asks after the one whose keys they are has answered, and evicted. It must see what that one saw: so a copy
of the layer from before the call, which shares its tensors, takes the same tokens in again and answers with the later
layer's queries. Flags hang on keys and gates alone there, so they are the same.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch

from gatekv.attention import AttentionCall, Memory

if TYPE_CHECKING:
    from gatekv.cache.layer import KVLayer

Tensor = torch.Tensor


class Before(NamedTuple):
    """What a layer was before a call, and the call, with its mask [batch, 1, n, seen + n] or None.

    Attributes:
        left: how many readers have not asked yet.
    """

    layer: "KVLayer"
    call: AttentionCall
    keys: Tensor
    values: Tensor
    mask: Tensor | None
    left: int


class Reader(Memory):
    """What a later layer asks in place of the one that holds its keys and values."""

    def __init__(self, layer: "KVLayer") -> None:
        self.layer = layer

    @property
    def dense(self) -> bool:  # type: ignore[override]
        held = self.layer.before
        return held is not None and held.layer.dense

    def attend(
        self, call: AttentionCall, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float
    ) -> Tensor:
        """[batch, heads, n, head_dim] of q; k, v, the model's own, are those that the layer was given."""
        held = self.layer.before
        assert held is not None  # the model asks in order
        self.layer.before = held._replace(left=held.left - 1) if held.left > 1 else None
        twin = held.layer.fork() if held.left > 1 else held.layer
        twin.replays = True
        dtype = twin.window.dtype
        keys, values, asks = held.keys.to(dtype), held.values.to(dtype), q.shape[2]
        # In a prompt such layers may be asked for its last tokens alone.
        x = torch.nn.functional.pad(q.to(dtype), (0, 0, keys.shape[2] - asks, 0))
        asked = replace(held.call, sinks=call.sinks)  # the queries are the later layer's, and so are its sinks
        return twin.stage.attend(twin, asked, x, keys, values, held.mask, scaling)[:, :, -asks:].to(q.dtype)
