"""Layers that are not ours: a sliding window bounds them, or they hold the images of cross-attention. They are copied,
counted and saved, and never evicted."""

import copy
from typing import Any, Self

import torch

from gatekv.cache.segments.segment import Segment, Shape

Tensor = torch.Tensor


class Foreign(Segment):
    """A cache layer of transformers' own, seen as a segment; it answers through the model, not through us.

    Attributes:
        layer: transformers' `DynamicSlidingWindowLayer`, or `DynamicLayer`, empty where no image was read.
    """

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    def tensors(self) -> list[Tensor]:
        return [self.layer.keys, self.layer.values] if self.layer.is_initialized else []

    def fork(self) -> Self:
        """An independent copy; transformers never writes keys or values in place."""
        return type(self)(copy.copy(self.layer))

    def index_select(self, index: Tensor) -> None:
        self.layer.reorder_cache(index)

    def state_dict(self) -> dict[str, Tensor]:
        if not self.layer.is_initialized:
            return {}
        held = {"keys": self.layer.keys, "values": self.layer.values}
        return held | ({"seen": torch.tensor(self.layer.cumulative_length)} if self.layer.is_sliding else {})

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        if not (tensors or self.layer.is_sliding):
            return
        self.layer.lazy_initialization(tensors["keys"], tensors["values"])
        self.layer.keys, self.layer.values = tensors["keys"], tensors["values"]
        if self.layer.is_sliding:
            self.layer.cumulative_length = int(tensors["seen"])

    @classmethod
    def forecast_bytes(cls, shape: Shape, tokens: float) -> int:
        return round(shape.rows * 2 * shape.head_bytes * tokens)
