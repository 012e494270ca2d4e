"""A width of your own: old keys and values as 8-bit integers, with one scale a vector."""

from dataclasses import dataclass, replace

import torch

from gatekv.cache.segments.pages import Pages
from gatekv.cache.segments.prompt_end import PromptEnd
from gatekv.cache.segments.segment import Read, Shape
from gatekv.cache.segments.width import Narrow
from gatekv.policies import register_policy
from gatekv.policies.parts import Width

STEPS = 127


def encode(x: torch.Tensor) -> torch.Tensor:
    """Vectors [..., D] -> records [..., D + itemsize] of bytes: codes, then the scale in the vector's own dtype."""
    scale = x.abs().amax(-1, keepdim=True) / STEPS
    codes = (x / torch.where(scale == 0, 1, scale)).round().clamp(-STEPS, STEPS).to(torch.int8)
    return torch.cat([codes.view(torch.uint8), scale.view(torch.uint8)], -1)


def decode(records: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The way back, to vectors of dtype."""
    codes, scale = records.split([records.shape[-1] - dtype.itemsize, dtype.itemsize], -1)
    scale = scale.clone(memory_format=torch.contiguous_format).view(dtype)  # bytes of a slice do not lie as numbers do
    return codes.view(torch.int8).to(dtype) * scale


class Int8Pages(Narrow):
    """Old tokens of one layer, in pages that hold records as other pages hold numbers."""

    saved = ("pages",)

    def __init__(self, window: int, pages: Pages) -> None:
        self.window, self.dtype = window, pages.values.dtype
        self.pages = pages.blank()  # holds no token yet: encoding it gives it the shape of records
        self.pages.keys, self.pages.values = (
            encode(self.pages.keys),
            encode(self.pages.values),
        )

    def absorb(self, pages: Pages, end: PromptEnd) -> None:
        old = pages.split(end.old(pages, self.window))
        old.keys, old.values = encode(old.keys), encode(old.values)
        self.pages.absorb(old)

    def stores(self) -> list[Pages]:
        return [self.pages]

    def reads(self, q: torch.Tensor) -> list[Read]:
        keys, values = decode(self.pages.keys, self.dtype), decode(self.pages.values, self.dtype)
        return [(q, keys, values, self.pages.table)]


@dataclass
class Int8(Width):
    """Args: window: the last tokens of a prompt, which stay whole; so do all that follow it."""

    window: int = 32

    def segment(self, pages: Pages) -> Int8Pages:
        return Int8Pages(self.window, pages)

    def forecast_bytes(self, shape: Shape, tokens: float) -> int:
        record = replace(shape, head_dim=shape.head_dim + shape.dtype.itemsize, dtype=torch.uint8)
        return Pages.forecast_bytes(record, tokens)

    def share(self, head_dim: int, itemsize: int) -> float:
        return (head_dim + itemsize) / (head_dim * itemsize)


register_policy("int8", Int8)
