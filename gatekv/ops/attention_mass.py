"""How much attention each key receives, in blocks of queries: never a square of the prompt's length."""

from collections.abc import Iterator

import torch

from gatekv.ops.learned_sinks import softmax
from gatekv.ops.naive import accumulation_dtype, causal_mask, group_queries
from gatekv.ops.scale import capped

ELEMENTS = 2**24  # of a block of probabilities


def _paid(
    q: torch.Tensor,
    k: torch.Tensor,
    scale: float,
    valid: torch.Tensor,
    asks: torch.Tensor,
    sinks: torch.Tensor | None,
) -> Iterator[tuple[int, int, torch.Tensor]]:
    """(first query's slot, the slot behind the last one, probabilities [B, K, G, block, that slot]) block by block."""
    acc, (b, h, n, _), total = accumulation_dtype(q), q.shape, k.shape[2]
    qg, ka = group_queries(q, k.shape[1]).to(acc), k.to(acc)
    step = max(1, ELEMENTS // (b * h * total))
    for a in range(0, n, step):
        c = min(n, a + step)
        start, end = total - n + a, total - n + c
        s = torch.einsum("bkgqd,bktd->bkgqt", qg[:, :, :, a:c], ka[:, :, :end])
        s = capped(s.mul_(scale), scale)
        seen = causal_mask(c - a, end, q.device) & valid[:, None, None, None, :end]
        p = softmax(s.masked_fill_(~seen, -torch.inf), sinks)
        # A pad's query sees nothing: its softmax is not a number.
        yield start, end, p.masked_fill_(~asks[:, None, None, a:c, None], 0)


def attention_mass(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    scale: float,
    valid: torch.Tensor,
    asks: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `gatekv.ops.naive.attention_mass`."""
    mass = torch.zeros(k.shape[:3], dtype=accumulation_dtype(q), device=k.device)
    for _, end, p in _paid(q, k, scale, valid, valid[:, -q.shape[2] :] if asks is None else asks, sinks):
        mass[:, :, :end] += p.sum(-2).mean(2)
    return mass


def local_mass(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    scale: float,
    valid: torch.Tensor,
    near: torch.Tensor,
    beside: torch.Tensor,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `gatekv.ops.naive.local_mass`."""
    mass = torch.zeros(k.shape[:2], dtype=accumulation_dtype(q), device=k.device)
    at = torch.arange(k.shape[2], device=k.device)
    for start, end, p in _paid(q, k, scale, valid, valid, sinks):
        close = (at[start:end, None] - at[:end] < near[:, None, None])[:, None] & ~beside[:, :, None, :end]
        mass += p.masked_fill_(~close[:, :, None], 0).sum((-1, -2)).mean(2)
    return mass
