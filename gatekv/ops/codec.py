"""Vectors in 2 to 8 bits a number: a fixed rotation, the nearest of a few levels, one scale.

A vector x of a KV head is turned, y = H (s · x), with signs s of the head's own and one orthogonal matrix H, so that
its numbers look like draws of a Gaussian whatever x looked like. Each is divided by the vector's root mean square and
becomes the nearest of 2^b Lloyd-Max levels of a unit Gaussian; the scale that is kept is the one with the least squared
error for these levels. Products of two turned vectors are those of the vectors themselves, so attention reads levels,
never x: its queries are turned once, and its output is turned back once.

A record of a vector of D numbers at b bits, in this order:
    codes   the planes of `planes(b)`, each ceil(D · bits / 8) bytes, the first number in the lowest bits
    scale   one number of the vector's own dtype

The rotation follows QuaRot (2404.00456) and TurboQuant (2504.19874); levels, scale and planes are ours.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch

from gatekv.ops.naive import accumulation_dtype

Tensor = torch.Tensor
WIDTHS = (2, 3, 4, 5, 8)
SEED = 20260401  # of the signs, and of the matrix where no Hadamard matrix has the size
ROUNDS = 400  # of Lloyd's algorithm; at 8 bits the error is half a percent above that of 3000


def constant(make: Callable[..., Any]) -> Any:
    """`functools.cache` for tensors: whoever asks first, in inference mode say, others may train with them."""

    @functools.cache
    def made(*args: Any) -> Any:
        with torch.inference_mode(False):
            return make(*args)

    return made


def planes(bits: int) -> tuple[int, ...]:
    """Bits of each plane of codes, so that no code crosses a byte: 3 and 5 bits are a size of 2 or 4 and a sign."""
    return (bits,) if bits in (2, 4, 8) else (bits - 1, 1)


def record_bytes(bits: int, head_dim: int, itemsize: int) -> int:
    """Length of the record of one vector of head_dim numbers of itemsize bytes."""
    return sum(-(-head_dim * plane // 8) for plane in planes(bits)) + itemsize


@constant
def levels(bits: int) -> Tensor:
    """[2^bits] float64, ascending: the levels with the least mean squared error for a unit Gaussian (Lloyd, 1982)."""
    n = 2**bits
    at = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    found = math.sqrt(6) * torch.erfinv(2 * at - 1)  # where the density's cube root is shared out evenly
    density = lambda x: torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)  # noqa: E731
    for _ in range(ROUNDS):
        middle = (found[1:] + found[:-1]) / 2
        edges = torch.cat([middle.new_tensor([-math.inf]), middle, middle.new_tensor([math.inf])])
        mass = torch.special.ndtr(edges).diff()
        found = -density(edges).diff() / mass
    return (found - found.flip(0)) / 2


@constant
def _matrix(head_dim: int) -> Tensor:
    """[head_dim, head_dim] float64, orthogonal: a Hadamard matrix of the power of two in head_dim, by a random one."""
    odd, found = head_dim, torch.ones(1, 1, dtype=torch.float64)
    while odd % 2 == 0:
        found, odd = torch.kron(found.new_tensor([[1, 1], [1, -1]]) / math.sqrt(2), found), odd // 2
    generator = torch.Generator().manual_seed(SEED + odd)
    drawn = torch.randn(odd, odd, dtype=torch.float64, generator=generator)
    return found if odd == 1 else torch.kron(found, torch.linalg.qr(drawn).Q.contiguous())


@constant
def _signs(heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(SEED)
    return (1 - 2 * torch.randint(2, (heads, head_dim), generator=generator)).to(device, dtype)


@constant
def _matrix_on(head_dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return _matrix(head_dim).to(device, dtype)


def turn(x: Tensor, heads: Tensor, kv_heads: int) -> Tensor:
    """Each vector of x [..., head_dim] as its head's rotation turns it; float32 or wider.

    heads: int64, shaped as x's vectors or broadcastable to them, each one's KV head, of kv_heads.
    """
    x = x.to(accumulation_dtype(x))
    return (x * _signs(kv_heads, x.shape[-1], x.dtype, x.device)[heads]) @ _matrix_on(x.shape[-1], x.dtype, x.device).T


def turn_back(y: Tensor, heads: Tensor, kv_heads: int) -> Tensor:
    """The vectors whose `turn` is y; shapes as there."""
    return (y @ _matrix_on(y.shape[-1], y.dtype, y.device)) * _signs(kv_heads, y.shape[-1], y.dtype, y.device)[heads]


@constant
def _table(bits: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """(levels [2^bits], the borders between them [2^bits - 1])."""
    found = levels(bits)
    return found.to(device, dtype), ((found[1:] + found[:-1]) / 2).to(device, dtype)


def encode(y: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """See `gatekv.ops.naive.encode`."""
    y = y.to(accumulation_dtype(y))
    table, borders = _table(bits, y.dtype, y.device)
    size = y.square().mean(-1, keepdim=True).sqrt()
    codes = torch.bucketize(y / torch.where(size == 0, 1, size), borders)
    found = table[codes]
    scale = ((found * y).sum(-1, keepdim=True) / found.square().sum(-1, keepdim=True)).to(dtype)
    parts, codes = [], codes.to(torch.uint8)
    if len(planes(bits)) > 1:  # a sign, and a size counted from the middle
        half = 2 ** (bits - 1)
        sign = (codes >= half).to(torch.uint8)
        parts, codes = [_pack(sign, 1)], torch.where(sign.bool(), codes - half, half - 1 - codes)
    parts = [_pack(codes, planes(bits)[0]), *parts]
    return torch.cat([*parts, scale.contiguous().view(torch.uint8)], -1)


def decode(records: Tensor, bits: int, head_dim: int, dtype: torch.dtype) -> Tensor:
    """See `gatekv.ops.naive.decode`."""
    wide, codes = torch.promote_types(dtype, torch.float32), records.shape[-1] - dtype.itemsize
    return spelled(records[..., :codes], bits, head_dim, wide) * scales(records[..., codes:], dtype)[..., None]


def scales(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """[..., bytes], the ends of records -> [...], float32 or wider."""
    # A copy even of what counts as contiguous: of no vector or one, a slice keeps strides that no wider dtype divides.
    number = numbers.clone(memory_format=torch.contiguous_format).view(dtype)
    return number[..., 0].to(torch.promote_types(dtype, torch.float32))


def spelled(codes: Tensor, bits: int, head_dim: int, dtype: torch.dtype) -> Tensor:
    """[..., bytes], records without their scales -> their levels [..., head_dim]."""
    if len(planes(bits)) == 1:
        said = codes.int()
    else:
        length = -(-head_dim * planes(bits)[0] // 8)
        sides = _sides(bits, codes.device).read(codes[..., length:].int())
        said = codes[..., :length].int().bitwise_or_(sides[..., :length])
    found = _spelling(bits, dtype, codes.device).read(said)
    return found if found.shape[-1] == head_dim else found[..., :head_dim]


ELEMENTS = {4: torch.float32, 8: torch.float64, 16: torch.complex128}  # what the processor copies in one go


class _Table:
    """Rows that are looked up.

    Attributes:
        rows: [entries, k]. elements: [entries], each a row in one piece, which takes a third to a fifth of the time of
        copying k numbers; None where no dtype is as wide as a row, or it may not be on the device.
    """

    def __init__(self, rows: Tensor) -> None:
        self.rows, size = rows, rows.shape[1] * rows.itemsize
        self.elements = rows.flatten().view(ELEMENTS[size]) if rows.device.type == "cpu" and size in ELEMENTS else None

    def read(self, index: Tensor) -> Tensor:
        """Rows side by side: index [..., n] int32 -> [..., n · k]."""
        shape = *index.shape[:-1], index.shape[-1] * self.rows.shape[1]
        if self.elements is None:
            return torch.nn.functional.embedding(index, self.rows).view(shape)
        return self.elements.index_select(0, index.flatten()).view(self.rows.dtype).view(shape)


@constant
def _spelling(bits: int, dtype: torch.dtype, device: torch.device) -> _Table:
    """[256, numbers of a byte]: what each byte of codes says; with a second plane, [256 · 2^numbers, numbers]: what a
    byte of the first says, whose numbers' signs stand above it."""
    width = planes(bits)[0]
    each, at = 8 // width, torch.arange(256 if bits == width else 256 << 8 // width)[:, None]
    number = torch.arange(each)
    code = (at >> number * width) & 2**width - 1
    if bits > width:
        code = torch.where((at >> 8 + number) & 1 > 0, 2**width + code, 2**width - 1 - code)
    return _Table(levels(bits)[code].to(device, dtype))


@constant
def _sides(bits: int, device: torch.device) -> _Table:
    """[256, bytes of the first plane to one of the second] int32: the signs of each, above eight bits of zeros."""
    each = 8 // planes(bits)[0]
    signs = torch.arange(256)[:, None] >> torch.arange(0, 8, each)
    return _Table(((signs & 2**each - 1) << 8).to(device, torch.int32))


def _pack(codes: Tensor, bits: int) -> Tensor:
    """[..., D] uint8 below 2^bits -> [..., ceil(D · bits / 8)] uint8."""
    each = 8 // bits
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % each)).unflatten(-1, (-1, each))
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device)
    return (codes << shifts).sum(-1, dtype=torch.uint8)
