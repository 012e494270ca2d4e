"""Layers that are not ours: a sliding window bounds them, a state of fixed size stands for all tokens (linear
attention, Mamba, convolutions), or they hold the images of cross-attention. They are copied, counted and saved, and
never evicted."""

import copy
from typing import Any, Self

import torch
from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin

from gatekv.cache.segments.segment import Segment, Shape

Tensor = torch.Tensor
KINDS = ("conv_states", "recurrent_states")


class Foreign(Segment):
    """A cache layer of transformers' own, seen as a segment; it answers through the model, not through us.

    Attributes:
        layer: transformers' `DynamicSlidingWindowLayer`, `LinearAttentionLayer`, both in one, `DynamicLayer` of images,
        empty where none was read, or a layer of nothing.
    """

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    @property
    def attends(self) -> bool:
        """Whether it holds keys and values."""
        return isinstance(self.layer, CacheLayerMixin)

    @property
    def remembers(self) -> bool:
        """Whether it holds states."""
        return isinstance(self.layer, LinearAttentionCacheLayerMixin)

    def states(self) -> dict[str, Tensor]:
        """Name, as "conv_states.0" -> state [batch, ...]."""
        if not self.remembers:
            return {}
        held = {f"{kind}.{i}": t for kind in KINDS for i, t in getattr(self.layer, kind).items()}
        return {name: t for name, t in held.items() if t is not None}

    def tensors(self) -> list[Tensor]:
        own = [self.layer.keys, self.layer.values] if self.attends and self.layer.is_initialized else []
        return own + list(self.states().values())

    def fork(self) -> Self:
        """An independent copy. transformers never writes keys or values in place, and always states."""
        twin = copy.copy(self.layer)
        if self.remembers:
            for name, value in vars(self.layer).items():
                if isinstance(value, dict):
                    copied = {i: t.clone() if isinstance(t, Tensor) else t for i, t in value.items()}
                    setattr(twin, name, copied)
        return type(self)(twin)

    def give(self, other: Any) -> None:
        """Put copies of the states into another layer that keeps such."""
        mine = vars(self.fork().layer)
        vars(other).update({name: value for name, value in mine.items() if isinstance(value, dict)})

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last -tokens_to_remove tokens; a state that recorded no past stays (`refusals.check_crop`)."""
        if not self.remembers or self.layer.record_past:
            self.layer.crop(tokens_to_remove)

    def index_select(self, index: Tensor) -> None:
        self.layer.reorder_cache(index)

    def state_dict(self) -> dict[str, Tensor]:
        found = dict(self.states())
        if self.attends and self.layer.is_initialized:
            found |= {"keys": self.layer.keys, "values": self.layer.values}
            if self.layer.is_sliding:
                found |= {"seen": torch.tensor(self.layer.cumulative_length)}
        return found

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        if self.attends and (tensors or self.layer.is_sliding):
            self.layer.lazy_initialization(tensors["keys"], tensors["values"])
            self.layer.keys, self.layer.values = tensors["keys"], tensors["values"]
            if self.layer.is_sliding:
                self.layer.cumulative_length = int(tensors["seen"])
        for name, state in tensors.items():
            kind, _, number = name.partition(".")
            if kind in KINDS and self.remembers:
                self.layer.lazy_initialization(**{kind: state}, state_idx=int(number))
                getattr(self.layer, kind)[int(number)].copy_(state)
                self.layer.has_previous_state[int(number)] = True

    @classmethod
    def forecast_bytes(cls, shape: Shape, tokens: float) -> int:
        return round(shape.rows * shape.token_bytes * tokens)
