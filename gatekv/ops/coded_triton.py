"""Attention over codes in Triton: one launch for all widths, a program for each piece of a row of a stream."""

import torch
import triton
import triton.language as tl

from gatekv.ops import coded_attention, paged_attention
from gatekv.ops.codec import WIDTHS, constant, levels, planes, record_bytes
from gatekv.ops.coded_attention import Codes
from gatekv.ops.naive import group_queries
from gatekv.ops.scale import cap_of

Tensor = torch.Tensor
PIECE = 256  # tokens that one program reads
SCALES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}


@triton.jit
def _levels(At, Levels, live, d, width, signed, DIM: tl.constexpr):
    """[tokens, D]: what the codes from At [tokens] on say, in one plane of `width` bits, or with a plane of signs."""
    inside = live[:, None] & (d < DIM)[None, :]
    byte = tl.load(At[:, None] + (d * width // 8)[None, :], mask=inside, other=0).to(tl.int32)
    code = (byte >> (d * width % 8)[None, :]) & ((1 << width) - 1)
    if signed > 0:
        signs = (DIM * width + 7) // 8
        byte = tl.load(At[:, None] + signs + (d // 8)[None, :], mask=inside, other=0).to(tl.int32)
        half = 1 << width
        code = tl.where(((byte >> (d % 8)[None, :]) & 1) > 0, half + code, half - 1 - code)
    return tl.load(Levels + code, mask=inside, other=0.0)


@triton.jit
def _scale(At, live, KIND: tl.constexpr):
    """[tokens] float32: the number that stands at At [tokens]: 0: bfloat16, 1: float16, 2: float32."""
    number = tl.load(At, mask=live, other=0).to(tl.int32) | tl.load(At + 1, mask=live, other=0).to(tl.int32) << 8
    if KIND == 0:
        return (number << 16).to(tl.float32, bitcast=True)
    if KIND == 1:
        return number.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    number |= tl.load(At + 2, mask=live, other=0).to(tl.int32) << 16
    number |= tl.load(At + 3, mask=live, other=0).to(tl.int32) << 24
    return number.to(tl.float32, bitcast=True)


@triton.jit
def _piece(Q, Records, Levels, Pieces, Facts, Out, Lse, scale, cap, queries,
           M: tl.constexpr, D: tl.constexpr, V_D: tl.constexpr, KEY_DIM: tl.constexpr, HEAD_DIM: tl.constexpr,
           TILE: tl.constexpr, KIND: tl.constexpr, SIZE: tl.constexpr, CAPPED: tl.constexpr):  # fmt: skip
    """A piece of one row of one stream: softmax-weighted values and log-sum-exp over its tokens.

    Tiles: queries [M, D], levels of keys [TILE, D], of values [TILE, V_D].
    """
    piece = tl.program_id(0).to(tl.int64)
    row, stream = tl.load(Pieces + piece * 4), tl.load(Pieces + piece * 4 + 1)
    begin, count = tl.load(Pieces + piece * 4 + 2), tl.load(Pieces + piece * 4 + 3)
    Facts += stream * 8
    length, value_at = tl.load(Facts), tl.load(Facts + 4)
    key_width, key_signed, key_levels = tl.load(Facts + 1), tl.load(Facts + 2), tl.load(Facts + 3)
    value_width, value_signed, value_levels = tl.load(Facts + 5), tl.load(Facts + 6), tl.load(Facts + 7)
    m, d, e, t = tl.arange(0, M), tl.arange(0, D), tl.arange(0, V_D), tl.arange(0, TILE)
    real_q, real_e = m < queries, e < HEAD_DIM
    q = tl.load(
        Q + (row * queries + m[:, None]) * KEY_DIM + d, mask=real_q[:, None] & (d < KEY_DIM)[None, :], other=0.0
    )
    q = q.to(tl.float32) * scale
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, V_D], tl.float32)
    for first in range(0, count, TILE):
        live = first + t < count
        at = Records + begin + (first + t) * length
        k = _levels(at, Levels + key_levels, live, d, key_width, key_signed, KEY_DIM)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * _scale(at + value_at - SIZE, live, KIND)[None, :]
        if CAPPED:
            s = cap * (2 * tl.sigmoid(2 * s / cap) - 1)  # tanh
        s = tl.where(live[None, :], s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        p = tl.exp(s - new_top[:, None])
        shrink = tl.exp(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        p = p * _scale(at + length - SIZE, live, KIND)[None, :]
        v = _levels(at + value_at, Levels + value_levels, live, e, value_width, value_signed, HEAD_DIM)
        acc = acc * shrink[:, None] + tl.dot(p, v, input_precision="ieee")
        top = new_top
    seen = total > 0
    total = tl.where(seen, total, 1.0)
    to = piece * queries + m
    tl.store(Out + to[:, None] * HEAD_DIM + e, acc / total[:, None], mask=real_q[:, None] & real_e[None, :])
    tl.store(Lse + to, tl.where(seen, top + tl.log(total), float("-inf")), mask=real_q)


def coded_segment(
    q: Tensor, streams: list[Codes], kv_heads: int, dims: tuple[int, int], dtype: torch.dtype, scale: float
) -> tuple[Tensor, Tensor]:
    """See `gatekv.ops.naive.coded_segment`. float64 and many queries go to the torch path."""
    b, h, n, d = q.shape
    x = group_queries(q, kv_heads).reshape(b * kv_heads, -1, d).contiguous()
    (rows, queries, _), held = x.shape, [s for s in streams if len(s.records)]
    if queries > paged_attention.FEW_QUERIES or torch.float64 in (q.dtype, dtype) or not held:
        return coded_attention.coded_segment(q, streams, kv_heads, dims, dtype, scale)
    facts = _facts(tuple(s[2:] for s in held), dims, dtype.itemsize, q.device)
    pieces = _pieces(held, facts)
    out = torch.empty(len(pieces), queries, dims[1], dtype=torch.float32, device=q.device)
    lse = torch.empty(len(pieces), queries, dtype=torch.float32, device=q.device)
    _piece[(len(pieces),)](
        x, torch.cat([s.records.flatten() for s in held]), _all_levels(q.device), pieces, facts, out, lse,
        float(scale), cap_of(scale) or 1.0, queries,
        M=max(16, triton.next_power_of_2(queries)), D=max(16, triton.next_power_of_2(d)),
        V_D=max(16, triton.next_power_of_2(dims[1])), KEY_DIM=d, HEAD_DIM=dims[1],
        TILE=32, KIND=SCALES[dtype], SIZE=dtype.itemsize, CAPPED=cap_of(scale) is not None, num_stages=2,
    )  # fmt: skip
    owners = pieces[:, 0]
    top = lse.new_full((rows, queries), torch.finfo(lse.dtype).min)
    top = top.scatter_reduce(0, owners[:, None].expand(-1, queries), lse, "amax")
    share = torch.exp(lse - top[owners])
    total = lse.new_zeros(rows, queries).index_add_(0, owners, share)
    summed = out.new_zeros(rows, queries, dims[1]).index_add_(0, owners, out * share[..., None])
    empty = total == 0
    whole = (top + total.log()).masked_fill(empty, -torch.inf)
    return (summed / total.masked_fill(empty, 1)[..., None]).reshape(b, h, n, -1), whole.reshape(b, h, n)


def _pieces(streams: list[Codes], facts: Tensor) -> Tensor:
    """[pieces, 4] int64: the row, the stream, where its records begin among the bytes of all streams, how many tokens.

    As many as there may be, which takes no waiting for the device; those too many have no token.
    """
    counts = torch.stack([s.counts for s in streams]).long()  # [streams, rows]
    most = sum(len(s.records) // PIECE + counts.shape[1] for s in streams)
    lengths = facts[:, :1].long()
    bytes_of = counts.sum(1, keepdim=True) * lengths
    begins = ((counts.cumsum(1) - counts) * lengths + bytes_of.cumsum(0) - bytes_of).flatten()
    ends = ((counts + (PIECE - 1)) // PIECE).flatten().cumsum(0)
    number = torch.arange(most, device=counts.device)
    run = torch.searchsorted(ends, number, right=True).clamp_max_(counts.numel() - 1)
    tokens, rows = counts.flatten(), counts.shape[1]
    before = (number - ends[run] + (tokens[run] + (PIECE - 1)) // PIECE) * PIECE
    mine = (tokens[run] - before).clamp_(0, PIECE)
    return torch.stack([run % rows, run // rows, begins[run] + before * lengths.flatten()[run // rows], mine], 1)


@constant
def _facts(pairs: tuple[tuple[int, int], ...], dims: tuple[int, int], itemsize: int, device: torch.device) -> Tensor:
    """[streams, 8] int32: bytes of a token; bits of a key's first plane, whether it has signs, the first of its levels;
    where its value begins; the same three of the value."""
    found = []
    for pair in pairs:
        key, value = ([planes(bits)[0], len(planes(bits)) - 1, _FIRST[bits]] for bits in pair)
        sizes = [record_bytes(bits, dim, itemsize) for bits, dim in zip(pair, dims)]
        found.append([sum(sizes), *key, sizes[0], *value])
    return torch.tensor(found, dtype=torch.int32, device=device)


_FIRST = {bits: sum(2**b for b in WIDTHS if b < bits) for bits in WIDTHS}  # of its levels among those of all widths


@constant
def _all_levels(device: torch.device) -> Tensor:
    return torch.cat([levels(bits) for bits in WIDTHS]).to(device, torch.float32)
