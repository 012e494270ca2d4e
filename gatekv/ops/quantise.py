"""Vectors as records of bytes: codes of a few bits, scale and zero point, and the outliers as they were.

A record of a vector of D numbers at 2, 4 or 8 bits, in this order:
    codes     ceil(D · bits / 8) bytes, the first code in the lowest bits
    scale, zero point, then the outliers: numbers of the vector's own dtype
    channels  of the outliers, one byte each, ascending
A number is zero + scale · code, or its outlier. WHOLE bits are the vector's own bytes and nothing else.
"""

import torch

from gatekv.ops.naive import WHOLE, accumulation_dtype

Tensor = torch.Tensor


def record_bytes(bits: int, outliers: int, head_dim: int, itemsize: int) -> int:
    """Length of the record of one vector of head_dim numbers of itemsize bytes."""
    if bits == WHOLE:
        return head_dim * itemsize
    return -(-head_dim * bits // 8) + (2 + outliers) * itemsize + outliers


def spread(x: Tensor, outliers: int) -> tuple[Tensor, Tensor, Tensor]:
    """(lowest, highest number of each vector that is no outlier [...], channels of its outliers [..., outliers]).

    x: [..., D]. Outliers are the numbers farthest from the vector's mean.
    """
    x = x.to(accumulation_dtype(x))
    channels = (x - x.mean(-1, keepdim=True)).abs().topk(outliers, dim=-1).indices.sort(-1).values
    low = x.scatter(-1, channels, torch.inf).amin(-1)
    return low, x.scatter(-1, channels, -torch.inf).amax(-1), channels


def quantise(x: Tensor, bits: int, outliers: int) -> Tensor:
    """See `gatekv.ops.naive.quantise`."""
    if bits == WHOLE:
        return x.contiguous().view(torch.uint8)
    low, high, channels = spread(x, outliers)
    steps = 2**bits - 1
    scale, zero = ((high - low) / steps).to(x.dtype)[..., None], low.to(x.dtype)[..., None]
    # Codes are counted from scale and zero as they are stored, so that their rounding costs nothing but range.
    wide = accumulation_dtype(x)
    codes = ((x.to(wide) - zero) / torch.where(scale == 0, 1, scale).to(wide)).round().clamp(0, steps).to(torch.uint8)
    numbers = torch.cat([scale, zero, x.gather(-1, channels)], -1)
    return torch.cat([_pack(codes, bits), numbers.view(torch.uint8), channels.to(torch.uint8)], -1)


def dequantise(records: Tensor, bits: int, outliers: int, head_dim: int, dtype: torch.dtype) -> Tensor:
    """See `gatekv.ops.naive.dequantise`."""
    if bits == WHOLE:
        return records.view(dtype)
    code_bytes = -(-head_dim * bits // 8)
    codes, numbers, channels = records.split([code_bytes, records.shape[-1] - code_bytes - outliers, outliers], dim=-1)
    # A copy even of what counts as contiguous: of no vector or one, a slice keeps strides that no wider dtype divides.
    numbers = numbers.clone(memory_format=torch.contiguous_format).view(dtype)
    scale, zero = (n.to(torch.promote_types(dtype, torch.float32)) for n in (numbers[..., :1], numbers[..., 1:2]))
    x = torch.addcmul(zero, _unpack(codes, bits)[..., :head_dim].to(scale.dtype), scale).to(dtype)
    return x.scatter_(-1, channels.long(), numbers[..., 2:])


def _pack(codes: Tensor, bits: int) -> Tensor:
    """[..., D] uint8 below 2^bits -> [..., ceil(D · bits / 8)] uint8."""
    each = 8 // bits
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % each)).unflatten(-1, (-1, each))
    return (codes << _shifts(bits, codes.device)).sum(-1, dtype=torch.uint8)


def _unpack(packed: Tensor, bits: int) -> Tensor:
    """The way back, zeros behind the last code."""
    return ((packed[..., None] >> _shifts(bits, packed.device)) & 2**bits - 1).flatten(-2)


def _shifts(bits: int, device: torch.device) -> Tensor:
    return torch.arange(0, 8, bits, dtype=torch.uint8, device=device)
