"""How much attention each key receives, in blocks of queries: never a square of the prompt's length."""

import torch

from gatekv.ops.naive import accumulation_dtype, causal_mask, group_queries

ELEMENTS = 2**24  # of a block of probabilities


def attention_mass(q, k, *, scale: float, valid: torch.Tensor) -> torch.Tensor:
    """See `gatekv.ops.naive.attention_mass`."""
    acc, (b, h, n, _) = accumulation_dtype(q), q.shape
    qg, ka = group_queries(q, k.shape[1]).to(acc), k.to(acc)
    mass = torch.zeros(k.shape[:3], dtype=acc, device=k.device)
    step = max(1, ELEMENTS // (b * h * n))
    for a in range(0, n, step):
        end = min(n, a + step)
        s = torch.einsum("bkgqd,bktd->bkgqt", qg[:, :, :, a:end], ka[:, :, :end]).mul_(scale)
        seen = causal_mask(end - a, end, q.device) & valid[:, None, None, None, :end]
        p = s.masked_fill_(~seen, -torch.inf).softmax(-1)
        asks = valid[:, None, None, a:end, None]  # a pad's query sees nothing: its softmax is not a number
        mass[:, :, :end] += p.masked_fill_(~asks, 0).sum(-2).mean(2)
    return mass
