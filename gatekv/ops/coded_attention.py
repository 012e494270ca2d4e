"""Attention over codes in plain torch: all keys of one width become levels at once, and all values of one width.

For a few queries no vector is ever whole: its scale multiplies its score, or its probability, one number instead of
head_dim. Rows are not cut apart either. Every query meets every token of a few rows in one product, and what belongs to
another row is hidden afterwards: a product of ten queries takes little longer than one of three.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from gatekv.ops import paged_attention
from gatekv.ops.codec import decode, record_bytes, scales, spelled
from gatekv.ops.naive import accumulation_dtype, group_queries
from gatekv.ops.page_table import PageTable
from gatekv.ops.scale import capped

Tensor = torch.Tensor
SCORES = 2**16  # that take about as long as the fixed cost of another round, measured


class Codes(NamedTuple):
    """Tokens of every row at one pair of widths.

    Attributes:
        records: [n, bytes] uint8, row after row, a key's record (`gatekv.ops.codec`) and then its value's.
        counts: [rows] int32, tokens of each row. key_bits, value_bits: of a number.
    """

    records: Tensor
    counts: Tensor
    key_bits: int
    value_bits: int


def coded_segment(
    q: Tensor, streams: Sequence[Codes], kv_heads: int, dims: tuple[int, int], dtype: torch.dtype, scale: float
) -> tuple[Tensor, Tensor]:
    """See `gatekv.ops.naive.coded_segment`."""
    b, h, n, d = q.shape
    x = (group_queries(q, kv_heads).to(accumulation_dtype(q)) * scale).reshape(b * kv_heads, -1, d)
    streams = sorted((s for s in streams if len(s.records)), key=lambda s: s[2:])
    if not streams:
        return x.new_zeros(b, h, n, dims[1]), x.new_full((b, h, n), -torch.inf)
    if x.shape[1] > paged_attention.FEW_QUERIES:
        keys, values, table = decoded(streams, dims, dtype)
        return paged_attention.paged_segment(q, keys[:, None], values[:, None], table, scale)
    out, lse = _few_queries(x, streams, dims, dtype, scale)
    return out.view(b, h, n, -1), lse.view(b, h, n)


def decoded(streams: Sequence[Codes], dims: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, PageTable]:
    """Turned keys and values [n, head_dim] of all streams, one behind the other, and a table of them as pages of one.

    dims, dtype: as in `coded_segment`.
    """
    keys, values = [], []
    for records, _, key_bits, value_bits in streams:
        size = record_bytes(key_bits, dims[0], dtype.itemsize)
        keys.append(decode(records[:, :size], key_bits, dims[0], dtype))
        values.append(decode(records[:, size:], value_bits, dims[1], dtype))
    counts = torch.stack([s.counts for s in streams])
    owners = torch.repeat_interleave(counts.flatten().long(), output_size=sum(map(len, keys))) % counts.shape[1]
    owners, order = owners.int().sort(stable=True)
    table = PageTable(order.int(), owners, torch.ones_like(owners), counts.shape[1])
    return torch.cat(keys), torch.cat(values), table


def _few_queries(
    x: Tensor, streams: Sequence[Codes], dims: tuple[int, int], dtype: torch.dtype, scale: float
) -> tuple[Tensor, Tensor]:
    """Some rows at a time. x: [rows, queries, D], scaled. Returns out [rows, queries, D'], lse [rows, queries]."""
    # Rounds cost the same each, scores of other rows fewer with every round: the root is where the sum is smallest.
    rounds = round(math.sqrt(len(x) * x.shape[1] * sum(len(s.records) for s in streams) / SCORES))
    if rounds <= 1:
        return _rows_together(x, streams, dims, dtype, scale)
    step, answers = -(-len(x) // rounds), []
    ends = [[0, *s.counts.cumsum(0).tolist()] for s in streams]
    for a in range(0, len(x), step):
        b, mine = min(a + step, len(x)), []
        for s, end in zip(streams, ends):
            if end[a] < end[b]:
                mine.append(s._replace(records=s.records[end[a] : end[b]], counts=s.counts[a:b]))
        answers.append(_rows_together(x[a:b], mine, dims, dtype, scale))
    return torch.cat([out for out, _ in answers]), torch.cat([lse for _, lse in answers])


def _rows_together(
    x: Tensor, streams: Sequence[Codes], dims: tuple[int, int], dtype: torch.dtype, scale: float
) -> tuple[Tensor, Tensor]:
    """Every query with every token, those of other rows hidden afterwards; shapes as in `_few_queries`."""
    rows, queries, _ = x.shape
    if not streams:
        return x.new_zeros(rows, queries, dims[1]), x.new_full((rows, queries), -torch.inf)
    size, parts = dtype.itemsize, []  # of each stream: codes of keys, their scales, codes of values, their scales
    for stream in streams:
        key, value = (record_bytes(bits, dim, size) - size for bits, dim in zip(stream[2:], dims))
        parts.append(stream.records.split_with_sizes([key, size, value, size], 1))
    key_scale, value_scale = (scales(torch.cat([p[i] for p in parts]), dtype).to(x.dtype) for i in (1, 3))
    counts = torch.cat([stream.counts for stream in streams]).long()
    owners = torch.repeat_interleave(counts, output_size=len(key_scale)) % rows
    hidden = owners != torch.arange(rows, device=x.device)[:, None, None]
    asked, said = x.view(rows * queries, -1), []
    for bits in sorted({stream.key_bits for stream in streams}):
        codes = torch.cat([p[0] for p, stream in zip(parts, streams) if stream.key_bits == bits])
        said.append(asked @ spelled(codes, bits, dims[0], x.dtype).T)
    s = capped(torch.cat(said, 1).mul_(key_scale).view(rows, queries, -1), scale)
    nothing = torch.finfo(s.dtype).min  # not -inf: no row is without a number
    s = torch.where(hidden, nothing, s)
    p, top = s.softmax(-1), s.amax(-1)
    lse = (top - p.amax(-1).log()).masked_fill(top == nothing, -torch.inf)
    # Hidden again: what is no number in one row is none of another's.
    p = torch.where(hidden, 0, p * value_scale).view(rows * queries, -1)
    weights = p.split_with_sizes([len(stream.records) for stream in streams], 1)
    out = x.new_zeros(rows * queries, dims[1])
    for bits in sorted({stream.value_bits for stream in streams}):
        mine = [i for i, stream in enumerate(streams) if stream.value_bits == bits]
        codes, paid = torch.cat([parts[i][2] for i in mine]), torch.cat([weights[i] for i in mine], 1)
        out = out.addmm(paid, spelled(codes, bits, dims[1], x.dtype))
    return out.view(rows, queries, -1), lse
