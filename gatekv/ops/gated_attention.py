"""Fast path of `naive.gated_attention`: blocks of queries, only keys up to the block's end, backward by recomputation.

Memory is O(T·block) instead of O(T²); the causal triangle above the blocks is never computed. Scores are float32;
products with probabilities are in bfloat16 where the model is, as in any flash kernel.
"""

import importlib
from collections.abc import Iterator
from typing import Any

import torch

from gatekv.ops import backends
from gatekv.ops.naive import accumulation_dtype, causal_mask, group_queries
from gatekv.ops.scale import cap_of, capped

BLOCK = 128
# In the backward pass an evicted key keeps e^-60 of its weight: nothing beside the others, but enough to divide by
# where the gradient asks what the key would have said; one softmax is faster than exponentials beside it.
LEAST_LOG_GATE = -60.0


def heads_at_once(device: torch.device, heads: int) -> int:
    """How many KV heads make one batched product: a CPU is slow at large ones, and its cache holds one head's block."""
    return 1 if device.type == "cpu" else heads


def _tiles(
    q: torch.Tensor,
    k: torch.Tensor,
    log_gate: torch.Tensor,
    mask: torch.Tensor | None,
    window: int,
    decay: bool,
    scale: float,
    sinks: torch.Tensor | None = None,
) -> Iterator[tuple[slice, slice, int, int, torch.Tensor, torch.Tensor | None]]:
    """Every block of probabilities: (heads, queries, first, end, p [N, G, Q, end], slope), slices of the N = B·K heads
    and of the queries, where `first` is the first query's place among the keys and `end` follows the last key of the
    block; slope, as p: of the cap, by which logits move with products, or None.

    q: [N, G, Q, D], scaled; k: [N, T, D]; log_gate: [N, T]; mask: [B or 1, 1, Q, T] or None; sinks: [N, G] or None.
    """
    (rows, _, m, _), t = q.shape, k.shape[1]
    step = heads_at_once(q.device, rows)
    for head in range(0, rows, step):
        heads = slice(head, head + step)
        for a in range(0, m, BLOCK):
            queries = slice(a, min(a + BLOCK, m))
            first, end = t - m + a, t - m + queries.stop
            seen = None
            if mask is not None:
                row = torch.arange(head, head + step, device=q.device) // (rows // len(mask))
                seen = mask[row, 0, queries, :end]
            own = None if sinks is None else sinks[heads]
            block = q[heads, :, queries], k[heads, :end], log_gate[heads, :end], seen, first, window, decay, scale, own
            p, slope = _probabilities(*block)
            yield heads, queries, first, end, p, slope


def _probabilities(
    q: torch.Tensor,
    k: torch.Tensor,
    log_gate: torch.Tensor,
    mask: torch.Tensor | None,
    first: int,
    window: int,
    decay: bool,
    scale: float,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(probabilities [N, G, Q, T] of one block of queries, beside sinks [N, G]; all 0 for a query that looks nowhere;
    slope of the cap, alike, or None)."""
    (n, g, m, d), t = q.shape, k.shape[1]
    s, slope = torch.bmm(q.reshape(n, g * m, d), k.transpose(1, 2)).view(n, g, m, t), None
    if (cap := cap_of(scale)) is not None:
        s = capped(s, scale)
        slope = 1 - (s / cap).square()
    distance, local, far = _band(first, t, window, decay, q.device)
    bias = (log_gate[:, None] * distance if distance is not None else log_gate[:, None])[:, None]
    s[..., :far] += bias[..., :far]
    s[..., far:] += bias[..., far:].masked_fill(local, 0)
    if mask is None:
        s[..., first:].masked_fill_(~causal_mask(m, m, q.device), -torch.inf)
    else:
        s.masked_fill_(~mask[:, None], -torch.inf)
    p = s.softmax(-1)
    if sinks is not None:
        p.mul_(torch.sigmoid(s.logsumexp(-1, keepdim=True) - sinks[..., None, None]))
    return p if mask is None else p.nan_to_num_(nan=0.0), slope


def _band(
    first: int, end: int, window: int, decay: bool, device: torch.device
) -> tuple[torch.Tensor | None, torch.Tensor, int]:
    """(i - j [Q, T] where weights decay with it, else None; local [Q, T - far]; far) for the queries first … end - 1:
    none of them has a local key before `far`."""
    far = max(0, first - max(window, 1) + 1)
    i, j = torch.arange(first, end, device=device)[:, None], torch.arange(end, device=device)
    return i - j if decay else None, i - j[far:] < max(window, 1), far


def _operands(
    q: torch.Tensor, k: torch.Tensor, gate: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(scaled queries [N, G, Q, D], keys [N, T, D], log gate [N, T]) in the accumulation dtype."""
    acc = accumulation_dtype(q)
    log_gate = gate.detach().to(acc).log()
    return group_queries(q.to(acc) * scale, k.shape[1]).flatten(0, 1), k.to(acc).flatten(0, 1), log_gate.flatten(0, 1)


def _sinks_by_row(sinks: torch.Tensor | None, q: torch.Tensor) -> torch.Tensor | None:
    """Sinks [H] for each of the rows and groups of q [N, G, Q, D]."""
    if sinks is None:
        return None
    rows, group = q.shape[:2]
    return sinks.to(q.dtype).view(-1, group).repeat(rows * group // len(sinks), 1)


def _product_dtype(q: torch.Tensor) -> torch.dtype:
    return q.dtype if q.dtype == torch.bfloat16 else accumulation_dtype(q)


class _GatedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        gate: torch.Tensor,
        mask: torch.Tensor | None,
        window: int,
        scale: float,
        decay: bool,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        qs, ks, log_gate = _operands(q, k, gate, scale)
        out, vs = q.new_empty(*qs.shape[:-1], v.shape[-1]), v.flatten(0, 1).to(_product_dtype(q))
        own = _sinks_by_row(sinks, qs)
        for heads, queries, _, end, p, _ in _tiles(qs, ks, log_gate, mask, window, decay, scale, own):
            answer = torch.bmm(p.flatten(1, 2).to(vs.dtype), vs[heads, :end])
            out[heads, :, queries] = answer.unflatten(1, p.shape[1:3])
        out = out.view(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, gate, out, mask, sinks)
        ctx.window, ctx.scale, ctx.decay = window, scale, decay
        return out

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, gate, out, mask, sinks = ctx.saved_tensors
        window, decay = ctx.window, ctx.decay
        qs, ks, log_gate = _operands(q, k, gate, ctx.scale)
        log_gate.clamp_min_(LEAST_LOG_GATE)
        acc, low = ks.dtype, _product_dtype(q)
        delta = (dout.to(acc) * out).sum(-1, keepdim=True)
        # dP - delta in one product: what is rounded then is the difference, not the two large numbers it lies between.
        coarse = delta.to(low)
        do = torch.cat([dout.to(low), -coarse, (coarse - delta).to(low)], -1)
        do = group_queries(do, k.shape[1]).flatten(0, 1)
        vs = torch.nn.functional.pad(v.flatten(0, 1).to(low), (0, 2), value=1)
        ql, kl = qs.to(low), ks.to(low)
        dq, dk, dlog = torch.empty_like(ql), torch.zeros_like(ks), torch.zeros_like(log_gate)
        dv, own = ks.new_zeros(*ks.shape[:2], v.shape[-1]), _sinks_by_row(sinks, qs)
        for heads, queries, first, end, p, bend in _tiles(qs, ks, log_gate, mask, window, decay, ctx.scale, own):
            p, db = p.to(low), do[heads, :, queries].flatten(1, 2)
            ds = torch.bmm(db, vs[heads, :end].transpose(1, 2)).view_as(p).mul_(p)
            if ctx.needs_input_grad[3]:
                distance, local, far = _band(first, end, window, decay, q.device)
                slope = ds * distance if distance is not None else ds
                dlog[heads, :far] += slope[..., :far].sum((1, 2), dtype=acc)
                dlog[heads, far:end] += slope[..., far:].masked_fill(local, 0).sum((1, 2), dtype=acc)
            if any(ctx.needs_input_grad[:3]):
                ds = ds if bend is None else ds * bend
                shape, p, ds = p.shape[1:3], p.flatten(1, 2), ds.flatten(1, 2)
                dq[heads, :, queries] = torch.bmm(ds, kl[heads, :end]).unflatten(1, shape)
                dk[heads, :end] += torch.bmm(ds.transpose(1, 2), ql[heads, :, queries].flatten(1, 2))
                dv[heads, :end] += torch.bmm(p.transpose(1, 2), db[..., :-2])
        dgate = (dlog * (-log_gate).exp()).view(gate.shape).to(gate.dtype)
        grads = [(dq * ctx.scale).view(q.shape), dk.view(k.shape).to(k.dtype), dv.view(v.shape).to(v.dtype), dgate]
        return *(g if needed else None for g, needed in zip(grads, ctx.needs_input_grad)), *[None] * 5


def gated_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gate: torch.Tensor,
    *,
    window: int,
    scale: float,
    mask: torch.Tensor | None = None,
    decay: bool = False,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `gatekv.ops.naive.gated_attention`; on a GPU with Triton `gated_triton` answers. Sinks get no gradient."""
    if backends.triton_serves(q.device, q.dtype):
        kernels = importlib.import_module("gatekv.ops.gated_triton")
        return kernels.gated_attention(q, k, v, gate, window=window, scale=scale, mask=mask, decay=decay, sinks=sinks)
    return _GatedAttention.apply(q, k, v, gate, mask, window, scale, decay, sinks)


@torch.no_grad()
def received_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    window: int,
    scale: float,
    mask: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `gatekv.ops.naive.received_attention`."""
    qs, ks, log_gate = _operands(q.float(), k.float(), torch.ones(k.shape[:3], device=k.device), scale)
    best = torch.zeros_like(log_gate)
    own = _sinks_by_row(sinks, qs)
    for heads, queries, first, end, p, _ in _tiles(qs, ks, log_gate, mask, window, False, scale, own):
        _, local, far = _band(first, end, window, False, q.device)
        p[..., far:].masked_fill_(local, 0)
        if mask is not None:  # a pad sees real keys but not itself: its query is no query
            asks = mask.expand(len(q), 1, *mask.shape[2:]).diagonal(dim1=-2, dim2=-1)[:, 0, queries]
            row = torch.arange(len(best), device=q.device)[heads] // k.shape[1]
            p.masked_fill_(~asks[row][:, None, :, None], 0)
        best[heads, :end] = torch.maximum(best[heads, :end], p.amax((1, 2)))
    return best.view(k.shape[:3])
