"""Gated attention in Triton, forward and backward: evicted keys are not read, their gates still get a gradient.

Forward and the queries' gradient visit the live keys, gathered by a list, and all keys that a window reaches. The
kernel of the keys' gradients owns a tile of that list, live or evicted, and sums over the queries of its group: no
atomics, so equal inputs give equal bits. For evicted keys behind the windows it computes the gate's slope and nothing
else; where the gates do not learn it leaves such queries out.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from gatekv.ops.scale import cap_of

# e^{s - lse} of an evicted key is unbounded; beyond e^60 only its direction matters and float32 would overflow.
MAX_EXPONENT = tl.constexpr(60.0)
# Of queries, keys, values or gradients that a program holds at once, each. At most 64 tokens: larger tiles, and 64 in
# float32, whose products are unrolled, spill registers (as compiled for compute capability 8.0 and 9.0).
TILE_BYTES = 16384


@triton.jit
def _load(X, row, at, n, D: tl.constexpr, WIDTH: tl.constexpr):
    """Tile [len(at), WIDTH] of X [rows, n, D], 0 beyond its edges."""
    d = tl.arange(0, WIDTH)
    inside = (at < n)[:, None] & (d < D)[None, :]
    return tl.load(X + row * n * D + (at[:, None] * D + d[None, :]), mask=inside, other=0.0)


@triton.jit
def _store(X, row, at, n, value, D: tl.constexpr, WIDTH: tl.constexpr):
    """The counterpart of `_load`."""
    d = tl.arange(0, WIDTH)
    inside = (at < n)[:, None] & (d < D)[None, :]
    tl.store(X + row * n * D + (at[:, None] * D + d[None, :]), value.to(X.dtype.element_ty), mask=inside)


@triton.jit
def _scores(q, k, gate, Mask, i, j, queries, keys, mask_q, mask_k, window, scale, cap,
            MASKED: tl.constexpr, DECAY: tl.constexpr, CAPPED: tl.constexpr):  # fmt: skip
    """(logits, log weight, distance, slope of the logits' cap), each [len(i), len(j)]; the logits of keys that may not
    be attended to are -inf.

    gate [len(j)] counts from a distance of `window` on; Mask points at the row of query i[0].
    """
    distance = (i + keys - queries)[:, None] - j[None, :]
    allowed = (distance >= 0) & (j < keys)[None, :]
    if MASKED:
        at = tl.arange(0, i.shape[0])[:, None] * mask_q + j[None, :] * mask_k
        allowed &= tl.load(Mask + at, mask=(i < queries)[:, None] & (j < keys)[None, :], other=0) != 0
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    slope = 1.0
    if CAPPED:
        bent = 2 * tl.sigmoid(2 * s / cap) - 1  # tanh
        s, slope = bent * cap, 1 - bent * bent
    log_gate = tl.where(gate > 0, tl.log(tl.where(gate > 0, gate, 1.0)), float("-inf"))[None, :]
    bias = log_gate * tl.maximum(distance, 1) if DECAY else log_gate
    return tl.where(allowed, s, float("-inf")), tl.where(distance >= window, bias, 0.0), distance, slope


@triton.jit
def _reach(Rank, kv_row, block, queries, keys, window, BLOCK: tl.constexpr):
    """(how many live keys no window of a block of queries reaches, the first key that one does, tiles to visit)."""
    first = block * BLOCK + keys - queries
    near = tl.maximum(first - window + 1, 0)
    far = tl.load(Rank + kv_row * (keys + 1) + near)
    return far, near, tl.cdiv(far, BLOCK) + tl.cdiv(tl.minimum(first + BLOCK, keys) - near, BLOCK)


@triton.jit
def _visited(Order, kv_row, at, far, near, keys, BLOCK: tl.constexpr):
    """The keys of the at-th tile to visit: of the first `far` in the list, then all from `near` on; `keys` is none."""
    x = at * BLOCK + tl.arange(0, BLOCK)
    listed = tl.load(Order + kv_row * keys + x, mask=x < far, other=keys)
    gone = tl.cdiv(far, BLOCK)
    return tl.where(at < gone, listed, near + x - gone * BLOCK)


@triton.jit
def _forward(Q, K, V, Gate, Order, Rank, Mask, Sinks, Out, Lse, heads, group, queries, keys, mask_b, mask_q, mask_k,
             window, scale, cap, D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
             MASKED: tl.constexpr, DECAY: tl.constexpr, CAPPED: tl.constexpr, SINKS: tl.constexpr):  # fmt: skip
    """One block of queries of one head: output and log-sum-exp, the head's sink in both; +inf where a query sees
    nothing, so e^{s - lse} = 0."""
    block, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    kv_row, mask = row // group, Mask + row // heads * mask_b + tl.cast(block, tl.int64) * BLOCK * mask_q
    i = block * BLOCK + tl.arange(0, BLOCK)
    q = _load(Q, row, i, queries, D, WIDTH)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    if SINKS:  # a key whose value is 0
        top = tl.zeros([BLOCK], tl.float32) + tl.load(Sinks + row % heads)
        total += 1.0
    acc = tl.zeros([BLOCK, WIDTH], tl.float32)
    far, near, tiles = _reach(Rank, kv_row, block, queries, keys, window, BLOCK)
    for at in range(0, tiles):
        j = _visited(Order, kv_row, at, far, near, keys, BLOCK)
        k, v = _load(K, kv_row, j, keys, D, WIDTH), _load(V, kv_row, j, keys, D, WIDTH)
        gate = tl.load(Gate + kv_row * keys + j, mask=j < keys, other=0.0)
        s, bias, _, _ = _scores(q, k, gate, mask, i, j, queries, keys, mask_q, mask_k, window, scale, cap, MASKED,
                                DECAY, CAPPED)  # fmt: skip
        s += bias
        new_top = tl.maximum(top, tl.max(s, 1))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp(s - base[:, None])
        shrink = tl.exp(top - base)
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        top = new_top
    seen = total > 0
    total = tl.where(seen, total, 1.0)
    _store(Out, row, i, queries, acc / total[:, None], D, WIDTH)
    tl.store(Lse + row * queries + i, tl.where(seen, top + tl.log(total), float("inf")), mask=i < queries)


@triton.jit
def _grad_queries(Q, K, V, Gate, Order, Rank, Mask, Out, Lse, DOut, Delta, DQ, heads, group, queries, keys,
                  mask_b, mask_q, mask_k, window, scale, cap, D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
                  MASKED: tl.constexpr, DECAY: tl.constexpr, CAPPED: tl.constexpr,
                  QUERIES: tl.constexpr):  # fmt: skip
    """One block of queries of one head: delta = dout · out, and the queries' gradient unless nobody wants it."""
    block, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    kv_row, mask = row // group, Mask + row // heads * mask_b + tl.cast(block, tl.int64) * BLOCK * mask_q
    i = block * BLOCK + tl.arange(0, BLOCK)
    do = _load(DOut, row, i, queries, D, WIDTH)
    delta = tl.sum(do.to(tl.float32) * _load(Out, row, i, queries, D, WIDTH).to(tl.float32), 1)
    tl.store(Delta + row * queries + i, delta, mask=i < queries)
    if QUERIES:
        q = _load(Q, row, i, queries, D, WIDTH)
        lse = tl.load(Lse + row * queries + i, mask=i < queries, other=float("inf"))
        dq = tl.zeros([BLOCK, WIDTH], tl.float32)
        far, near, tiles = _reach(Rank, kv_row, block, queries, keys, window, BLOCK)
        for at in range(0, tiles):
            j = _visited(Order, kv_row, at, far, near, keys, BLOCK)
            k, v = _load(K, kv_row, j, keys, D, WIDTH), _load(V, kv_row, j, keys, D, WIDTH)
            gate = tl.load(Gate + kv_row * keys + j, mask=j < keys, other=0.0)
            s, bias, _, slope = _scores(q, k, gate, mask, i, j, queries, keys, mask_q, mask_k, window, scale, cap,
                                        MASKED, DECAY, CAPPED)  # fmt: skip
            ds = tl.exp(s + bias - lse[:, None]) * (tl.dot(do, tl.trans(v), input_precision="ieee") - delta[:, None])
            ds *= slope
            dq += tl.dot(ds.to(k.dtype), k, input_precision="ieee")
        _store(DQ, row, i, queries, dq * scale, D, WIDTH)


@triton.jit
def _grad_keys(Q, K, V, Gate, Order, Mask, Lse, DOut, Delta, DK, DV, DGate, kv_heads, group, queries, keys,
               mask_b, mask_q, mask_k, window, scale, cap, D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
               MASKED: tl.constexpr, DECAY: tl.constexpr, CAPPED: tl.constexpr, STEP: tl.constexpr,
               KEYS: tl.constexpr, GATES: tl.constexpr):  # fmt: skip
    """One tile of listed keys of one KV head: gradients of keys and values (KEYS) and of gates (GATES), over its group.

    The queries come in tiles of STEP.
    """
    block, kv_row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    x = block * BLOCK + tl.arange(0, BLOCK)
    j = tl.load(Order + kv_row * keys + x, mask=x < keys, other=keys)
    k, v = _load(K, kv_row, j, keys, D, WIDTH), _load(V, kv_row, j, keys, D, WIDTH)
    gate = tl.load(Gate + kv_row * keys + j, mask=j < keys, other=0.0)
    dk = tl.zeros([BLOCK, WIDTH], tl.float32)
    dv = tl.zeros([BLOCK, WIDTH], tl.float32)
    dgate = tl.zeros([BLOCK], tl.float32)
    past, last = keys - queries, tl.cdiv(queries, STEP)
    first = tl.maximum(tl.min(j, 0) - past, 0) // STEP
    # Queries from here on have all of these keys behind their windows: evicted ones weigh nothing for them.
    behind = tl.cdiv(tl.maximum(tl.max(tl.where(j < keys, j, 0), 0) + window - past, 0), STEP)
    weighs = tl.where(tl.max(gate, 0) > 0, last, tl.minimum(behind, last))
    for head in range(0, group):
        row = kv_row * group + head
        for at in range(first, last if GATES else weighs):
            i = at * STEP + tl.arange(0, STEP)
            mask = Mask + kv_row // kv_heads * mask_b + tl.cast(at, tl.int64) * STEP * mask_q
            q, do = _load(Q, row, i, queries, D, WIDTH), _load(DOut, row, i, queries, D, WIDTH)
            lse = tl.load(Lse + row * queries + i, mask=i < queries, other=float("inf"))[:, None]
            delta = tl.load(Delta + row * queries + i, mask=i < queries, other=0.0)[:, None]
            s, bias, distance, bend = _scores(q, k, gate, mask, i, j, queries, keys, mask_q, mask_k, window, scale, cap,
                                              MASKED, DECAY, CAPPED)  # fmt: skip
            pull = tl.dot(do, tl.trans(v), input_precision="ieee") - delta
            if GATES:
                slope = tl.exp(tl.minimum(s - lse, MAX_EXPONENT)) * pull
                if DECAY:  # d g^n / dg = n g^(n - 1); the logarithm of 0 is large and finite, for 0^0 = 1
                    log_gate = tl.log(tl.maximum(gate, 1e-37))[None, :] * tl.where(gate > 0, 1.0, 1e30)[None, :]
                    slope *= distance * tl.exp(log_gate * tl.maximum(distance - 1, 0))
                dgate += tl.sum(tl.where(distance >= window, slope, 0.0), 0)
            if KEYS:
                if at < weighs:
                    p = tl.exp(s + bias - lse)
                    dv += tl.dot(tl.trans(p.to(do.dtype)), do, input_precision="ieee")
                    dk += tl.dot(tl.trans((p * pull * bend).to(q.dtype)), q, input_precision="ieee")
    if KEYS:
        _store(DK, kv_row, j, keys, dk * scale, D, WIDTH)
        _store(DV, kv_row, j, keys, dv, D, WIDTH)
    if GATES:
        tl.store(DGate + kv_row * keys + j, dgate, mask=j < keys)


def _listed(gate: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of gate [B, K, T]: key indices [B, K, T], those of gates above 0 first, each part in order; and ranks
    [B, K, T + 1], how many live keys stand before each."""
    live = (gate > 0).to(torch.int8)
    order = live.argsort(dim=-1, descending=True, stable=True)
    return order.int(), torch.nn.functional.pad(live.cumsum(-1), (1, 0)).int()


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
        (b, h, m, d), (kv, n) = q.shape, k.shape[1:3]
        width = max(16, triton.next_power_of_2(d))
        block = max(16, min(128, TILE_BYTES // width) // q.element_size())
        strides = (0, 0, 0) if mask is None else (mask.stride(0), mask.stride(2), mask.stride(3))
        order, rank = _listed(gate)
        cap = cap_of(scale)
        ctx.sizes = (h // kv, m, n, *strides, window, float(scale), 1.0 if cap is None else cap)
        ctx.shape = dict(D=d, WIDTH=width, BLOCK=block, MASKED=mask is not None, DECAY=decay, CAPPED=cap is not None,
                         num_warps=4 if width <= 64 else 8, num_stages=2)  # fmt: skip
        out, lse = torch.empty_like(q), torch.empty(b, h, m, dtype=torch.float32, device=q.device)
        with torch.cuda.device_of(q):
            _forward[(triton.cdiv(m, block), b * h)](
                q, k, v, gate, order, rank, gate if mask is None else mask, gate if sinks is None else sinks, out, lse,
                h, *ctx.sizes, **ctx.shape, SINKS=sinks is not None,
            )  # fmt: skip
        ctx.save_for_backward(q, k, v, gate, out, lse, order, rank, *(() if mask is None else (mask,)))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, gate, out, lse, order, rank, *rest = ctx.saved_tensors
        (b, h, m, _), (kv, n) = q.shape, k.shape[1:3]
        mask, dout, delta = rest[0] if rest else gate, dout.contiguous(), torch.empty_like(lse)
        dq, dk, dv, dgate = (torch.empty_like(t) for t in (q, k, v, gate))
        needs_q, needs_k, needs_v, needs_gate = ctx.needs_input_grad[:4]
        block = ctx.shape["BLOCK"]
        with torch.cuda.device_of(q):
            _grad_queries[(triton.cdiv(m, block), b * h)](
                q, k, v, gate, order, rank, mask, out, lse, dout, delta, dq, h, *ctx.sizes, **ctx.shape, QUERIES=needs_q
            )
            _grad_keys[(triton.cdiv(n, block), b * kv)](
                q, k, v, gate, order, mask, lse, dout, delta, dk, dv, dgate, kv, *ctx.sizes, **ctx.shape,
                STEP=max(16, block // 2), KEYS=needs_k or needs_v, GATES=needs_gate,
            )  # fmt: skip
        wanted = (g if needed else None for g, needed in zip((dq, dk, dv, dgate), ctx.needs_input_grad))
        return *wanted, *[None] * 5


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
    """See `gatekv.ops.naive.gated_attention`; accumulates in float32, so float64 belongs on the blocked path.

    The mask must be causal, as the model's is: it may hide keys (pads, other documents), not show later ones.
    """
    (b, _, m, _), n = q.shape, k.shape[2]
    dtype = torch.promote_types(q.dtype, torch.promote_types(k.dtype, v.dtype))
    x, y, z = (t.to(dtype).contiguous() for t in (q, k, v))
    seen = None if mask is None else mask.expand(b, 1, m, n).view(torch.uint8)
    window = min(max(window, 1), n)
    own = None if sinks is None else sinks.detach().float().contiguous()
    if v.shape[-1] < q.shape[-1]:  # the kernels have one width for keys and values
        z = torch.nn.functional.pad(z, (0, q.shape[-1] - v.shape[-1]))
    out = _GatedAttention.apply(x, y, z, gate.float().contiguous(), seen, window, scale, decay, own)
    return out[..., : v.shape[-1]].to(q.dtype)
