"""Paged attention in Triton: split-K over a row's pages, all query heads of a group in one program."""

import torch
import triton
import triton.language as tl

from gatekv.ops import paged_attention
from gatekv.ops.naive import group_queries
from gatekv.ops.page_table import PageTable
from gatekv.ops.scale import cap_of

SPLIT_TOKENS = 1024  # tokens that one program reads


@triton.jit
def _split(Q, K, V, Pages, Starts, Fill, Out, Lse, scale, cap, stride_key, stride_value, queries, splits, per_split,
           M: tl.constexpr, D: tl.constexpr, V_D: tl.constexpr, KEY_DIM: tl.constexpr, HEAD_DIM: tl.constexpr,
           BLOCK: tl.constexpr, GROUP: tl.constexpr, CAPPED: tl.constexpr):  # fmt: skip
    """One row, one range of its pages: softmax-weighted values and log-sum-exp over that range.

    Tiles: queries [M, D], keys [GROUP * BLOCK, D], values [GROUP * BLOCK, V_D] = GROUP pages of BLOCK tokens.
    """
    row, split = tl.program_id(0), tl.program_id(1)
    first, last = tl.load(Starts + row), tl.load(Starts + row + 1)
    begin = first + split * per_split
    end = tl.minimum(begin + per_split, last)
    m, d, e = tl.arange(0, M), tl.arange(0, D), tl.arange(0, V_D)
    real_q, real_d, real_e = m < queries, d < KEY_DIM, e < HEAD_DIM
    q = tl.load(Q + (row * queries + m[:, None]) * KEY_DIM + d, mask=real_q[:, None] & real_d[None, :], other=0.0)
    q = (q.to(tl.float32) * scale).to(K.dtype.element_ty)
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, V_D], tl.float32)
    tokens = tl.arange(0, GROUP * BLOCK)
    for entry in range(begin, end, GROUP):
        place = entry + tokens // BLOCK
        inside = place < end
        page = tl.load(Pages + place, mask=inside, other=0).to(tl.int64)
        used = tl.load(Fill + place, mask=inside, other=0)
        live = tokens % BLOCK < used
        key_at = page * stride_key + (tokens % BLOCK) * KEY_DIM
        value_at = page * stride_value + (tokens % BLOCK) * HEAD_DIM
        k = tl.load(K + key_at[:, None] + d, mask=live[:, None] & real_d[None, :], other=0.0)
        v = tl.load(V + value_at[:, None] + e, mask=live[:, None] & real_e[None, :], other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        if CAPPED:
            s = cap * (2 * tl.sigmoid(2 * s / cap) - 1)  # tanh
        s = tl.where(live[None, :], s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        p = tl.exp(s - new_top[:, None])
        shrink = tl.exp(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        top = new_top
    seen = total > 0
    total = tl.where(seen, total, 1.0)
    to = (row * splits + split) * queries + m
    tl.store(Out + to[:, None] * HEAD_DIM + e, acc / total[:, None], mask=real_q[:, None] & real_e[None, :])
    tl.store(Lse + to, tl.where(seen, top + tl.log(total), float("-inf")), mask=real_q)


def paged_segment(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, table: PageTable, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `gatekv.ops.naive.paged_segment`. float64 and many queries go to the torch path."""
    b, h, n, d = q.shape
    x = group_queries(q, table.rows // b).reshape(table.rows, -1, d).contiguous()
    queries, block, width = x.shape[1], keys.shape[1], values.shape[2]
    if queries > paged_attention.FEW_QUERIES or q.dtype == torch.float64 or not len(table.pages):
        return paged_attention.paged_segment(q, keys, values, table, scale)
    per_split = max(1, SPLIT_TOKENS // block)
    splits = triton.cdiv(table.longest, per_split)
    out = torch.empty(table.rows, splits, queries, width, dtype=torch.float32, device=q.device)
    lse = torch.empty(table.rows, splits, queries, dtype=torch.float32, device=q.device)
    _split[(table.rows, splits)](
        x, keys, values, table.pages, table.starts, table.fill, out, lse, float(scale), cap_of(scale) or 1.0,
        keys.stride(0), values.stride(0),
        queries, splits, per_split, M=max(16, triton.next_power_of_2(queries)), D=max(16, triton.next_power_of_2(d)),
        V_D=max(16, triton.next_power_of_2(width)), KEY_DIM=d, HEAD_DIM=width,
        BLOCK=block, GROUP=max(1, 64 // block), CAPPED=cap_of(scale) is not None,
    )  # fmt: skip
    whole = lse.logsumexp(1)
    share = torch.exp(lse - whole.masked_fill(whole == -torch.inf, 0)[:, None])
    return (out * share[..., None]).sum(1).reshape(b, h, n, width), whole.reshape(b, h, n)
