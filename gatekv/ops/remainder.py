"""Fast path of `naive.remainder_segment`: linear attention over keys in the order in which they leave.

Queries go in chunks; what left before a chunk is a running [R, D + 1] sum, what leaves inside it a small triangle.
Memory is O(T·(R + D) + CHUNK²) a head, whatever the times; a chunk takes as long as the row in which most tokens leave.
"""

from collections.abc import Iterator
from typing import Any

import torch

from gatekv.ops.naive import accumulation_dtype, group_queries, normalised

Tensor = torch.Tensor
CHUNK = 128


def left_of(flags: Tensor, window: int, start: int = 0) -> Tensor:
    """When each key leaves under the law of `gatekv.attention`: the first query index that finds it in the remainder.

    flags: [B, K, T] bool or 0/1, kept or not, of the whole sequence; window: keys with i - j < max(window, 1) stay;
    start: the prompt's length where flags act only after it. Returns [B, K, T] int64; T = never.
    """
    n = flags.shape[-1]
    leaves = (torch.arange(n, device=flags.device) + max(window, 1)).clamp(start, n)
    return torch.where(flags.bool(), n, leaves)


class _Schedule:
    """Which keys leave during which chunk of queries, row by row.

    left: [rows, T], T = never. Chunk 0 has no queries: it is everything that left before the first of them.
    """

    def __init__(self, left: Tensor, queries: int, heads: int) -> None:
        n = left.shape[1]
        first = n - queries
        self.left, self.order = left.sort(-1)
        edges = [0, *range(first, n, CHUNK), n]
        edge = torch.tensor(edges, device=left.device).expand(len(left), -1).contiguous()
        self.starts = torch.searchsorted(self.left, edge)
        self.widths = self.starts.diff().amax(0).tolist()
        self.parts = [slice(max(a - first, 0) * heads, (c - first) * heads) for a, c in zip(edges, edges[1:])]
        self.steps = torch.arange(first, n, device=left.device).repeat_interleave(heads)

    def pieces(self, chunk: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(index [rows, m], held [rows, m, 1], hidden [rows, queries, m]) of the keys that leave in a chunk, in pieces
        of m <= CHUNK; rows with fewer keys than others hold none at the end."""
        at, end = self.starts[:, chunk : chunk + 1], self.starts[:, chunk + 1 : chunk + 2]
        for a in range(0, self.widths[chunk], CHUNK):
            place = at + torch.arange(a, min(a + CHUNK, self.widths[chunk]), device=at.device)
            held = place < end
            place = place.clamp_max(self.order.shape[1] - 1)
            hidden = self.left.gather(1, place)[:, None] > self.steps[self.parts[chunk], None]
            yield self.order.gather(1, place), held[..., None], hidden


def _pick(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


class _Sums(torch.autograd.Function):
    """Σ_j (φ_i·ψ_j) [v_j, 1] over the keys that have left by query i.

    phi [rows, Q·G, R], the G heads of a group side by side; psi [rows, T, R]; v [rows, T, D]; left [rows, T].
    Returns [rows, Q·G, D + 1].
    """

    @staticmethod
    def forward(ctx: Any, phi: Tensor, psi: Tensor, v: Tensor, left: Tensor, heads: int) -> Tensor:
        schedule = _Schedule(left, phi.shape[1] // heads, heads)
        sums = phi.new_empty(*phi.shape[:2], v.shape[-1] + 1)
        base = phi.new_zeros(len(phi), phi.shape[-1], v.shape[-1] + 1)
        bases = []
        for chunk, part in enumerate(schedule.parts):
            bases.append(base)
            x = phi[:, part]
            y = x @ base
            for index, held, hidden in schedule.pieces(chunk):
                p, u = _pick(psi, index) * held, torch.nn.functional.pad(_pick(v, index), (0, 1), value=1.0)
                y += (x @ p.mT).masked_fill_(hidden, 0) @ u
                base = base + p.mT @ u
            sums[:, part] = y
        ctx.save_for_backward(phi, psi, v, torch.stack(bases))
        ctx.schedule = schedule
        return sums

    @staticmethod
    def backward(ctx: Any, dsums: Tensor) -> tuple[Tensor | None, ...]:
        phi, psi, v, bases = ctx.saved_tensors
        schedule = ctx.schedule
        dphi, dpsi, dv = torch.empty_like(phi), torch.zeros_like(psi), torch.zeros_like(v)
        later = torch.zeros_like(bases[0])  # Σ φ_iᵀ dsums_i over the chunks behind: what a key that left gets from them
        for chunk, part in reversed(list(enumerate(schedule.parts))):
            x, dy = phi[:, part], dsums[:, part]
            dx = dy @ bases[chunk].mT
            for index, held, hidden in schedule.pieces(chunk):
                p, u = _pick(psi, index) * held, torch.nn.functional.pad(_pick(v, index), (0, 1), value=1.0)
                t = (dy @ u.mT).masked_fill_(hidden, 0)
                dx += t @ p
                dp = (u @ later.mT + t.mT @ x) * held
                dpsi.scatter_add_(1, index[..., None].expand_as(dp), dp)
                if ctx.needs_input_grad[2]:
                    w = (x @ p.mT).masked_fill_(hidden, 0)
                    du = (p @ later + w.mT @ dy)[..., :-1]
                    dv.scatter_add_(1, index[..., None].expand_as(du), du)
            dphi[:, part] = dx
            later = later + x.mT @ dy
        return dphi, dpsi, dv, None, None


def remainder_segment(
    phi: Tensor, psi: Tensor, v: Tensor, left: Tensor, *, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See `gatekv.ops.naive.remainder_segment`. Of the mask only the last query's row is read: which keys are pads."""
    sums = _found_sums(phi, psi, v, left, mask)
    return normalised(sums[..., :-1], sums[..., -1])


def remainder_reach(
    q: Tensor, k: Tensor, psi: Tensor, left: Tensor, *, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See `gatekv.ops.naive.remainder_reach`; the mask as in `remainder_segment`."""
    reach = _found_sums(q, k, psi, left, mask)[..., :-1]
    one = psi.new_ones(*psi.shape[:3], 1)
    mass = _found_sums(one[:, :, -q.shape[2] :], one, psi, left, mask)[..., :-1]
    return reach, mass.repeat_interleave(q.shape[1] // k.shape[1], 1)


def _found_sums(x: Tensor, y: Tensor, v: Tensor, left: Tensor, mask: Tensor | None) -> Tensor:
    """Σ_j (x_i·y_j) [v_j, 1] over what query i finds.

    x: [B, H, Q, R]; y: [B, K, T, R]; v: [B, K, T, D]. Returns [B, H, Q, D + 1].
    """
    (b, h, m, r), (_, kv, n, _) = x.shape, y.shape
    acc, g = torch.promote_types(accumulation_dtype(v), torch.promote_types(x.dtype, y.dtype)), h // kv
    left = torch.maximum(left, torch.arange(1, n + 1, device=left.device)).clamp_max(n)
    if mask is not None:
        left = left.masked_fill(~mask[:, :, -1], n)
    rows = group_queries(x.to(acc), kv).transpose(2, 3).reshape(b * kv, m * g, r)
    sums = _Sums.apply(rows, y.to(acc).flatten(0, 1), v.to(acc).flatten(0, 1), left.flatten(0, 1), g)
    return sums.view(b, kv, m, g, -1).transpose(2, 3).reshape(b, h, m, -1)
