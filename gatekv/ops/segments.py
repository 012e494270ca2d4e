"""Few operations per decoding step: rectangular memories, and the merge of two answers."""

import torch

from gatekv.ops.naive import accumulation_dtype
from gatekv.ops.scale import capped

Tensor = torch.Tensor
SCORES = 2**24  # that are held at once


def dense_segment(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """See `gatekv.ops.naive.dense_segment`."""
    (b, h, n, d), (_, kv, t, _) = q.shape, k.shape
    acc = accumulation_dtype(q)
    x = (q.to(acc) * scale).reshape(b * kv, h // kv * n, d)
    hidden = None if mask is None else ~mask.expand(b, kv, n, t).reshape(b * kv, 1, n, t)
    out, lse = rows_segment(x, k.flatten(0, 1).to(acc), v.flatten(0, 1).to(acc), hidden, scale)
    return out.view(b, h, n, -1), lse.view(b, h, n)


def in_blocks(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """`dense_segment` for many queries: never all of their scores at once."""
    step = max(1, SCORES // max(q.shape[0] * q.shape[1] * k.shape[2], 1))
    parts = [
        dense_segment(q[:, :, a : a + step], k, v, None if mask is None else mask[:, :, a : a + step], scale)
        for a in range(0, q.shape[2], step)
    ]
    return torch.cat([out for out, _ in parts], 2), torch.cat([lse for _, lse in parts], 2)


def rows_segment(x: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """One batched product per row: x [rows, queries, D], scaled; k, v [rows, T, D] in x's dtype.

    scale: of which the cap is still to come. hidden: bool [rows, 1, Q or 1, T] where queries are G·Q, or None = all is
    seen. Returns out [rows, queries, D] and lse [rows, queries]; a query that sees nothing gets (0, -inf).
    """
    s = capped(torch.bmm(x, k.transpose(1, 2)), scale)
    if hidden is None:
        top = s.amax(-1, keepdim=True)
    else:
        grouped = s.view(len(s), -1, hidden.shape[2] if hidden.shape[2] > 1 else s.shape[1], s.shape[2])
        s = grouped.masked_fill_(hidden, -torch.inf).view_as(s)
        top = s.amax(-1, keepdim=True).clamp_min_(torch.finfo(s.dtype).min)
    p = s.sub_(top).exp_()
    total = p.sum(-1, keepdim=True)
    lse = total.log().add_(top)
    if hidden is not None:
        total = total.masked_fill(total == 0, 1)
    return torch.bmm(p, v).div_(total), lse[..., 0]


def merge(segments: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """See `gatekv.ops.naive.merge`."""
    out, lse = segments[0]
    for other, other_lse in segments[1:]:
        share = torch.nan_to_num(other_lse - lse).sigmoid_()[..., None]  # -inf against -inf: nothing against nothing
        out, lse = torch.lerp(out, other, share), torch.logaddexp(lse, other_lse)
    return out, lse
