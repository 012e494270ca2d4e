"""Layers that are not ours: a sliding window bounds them, so they are copied, counted and saved, and never evicted."""

import copy
from typing import Any, Self

import torch

from gatekv.cache.segments.segment import Segment, Shape

Tensor = torch.Tensor


class Foreign(Segment):
    """A cache layer of transformers' own, seen as a segment; it answers through the model, not through us.

    Attributes:
        layer: transformers' `DynamicSlidingWindowLayer`.
    """

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    def tensors(self) -> list[Tensor]:
        return [self.layer.keys, self.layer.values]

    def fork(self) -> Self:
        """An independent copy; transformers never writes keys or values in place."""
        return type(self)(copy.copy(self.layer))

    def index_select(self, index: Tensor) -> None:
        self.layer.reorder_cache(index)

    def state_dict(self) -> dict[str, Tensor]:
        seen = torch.tensor(self.layer.cumulative_length)
        return {"keys": self.layer.keys, "values": self.layer.values, "seen": seen}

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        self.layer.lazy_initialization(tensors["keys"], tensors["values"])
        self.layer.keys, self.layer.values = tensors["keys"], tensors["values"]
        self.layer.cumulative_length = int(tensors["seen"])

    @classmethod
    def forecast_bytes(cls, shape: Shape, tokens: float) -> int:
        return round(shape.rows * 2 * shape.head_bytes * tokens)
