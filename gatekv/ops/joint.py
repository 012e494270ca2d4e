"""One softmax over several rectangular memories: a decoding step in as few operations as there are memories."""

import torch

from gatekv.ops.naive import accumulation_dtype
from gatekv.ops.rectangle import Rectangle
from gatekv.ops.scale import capped

Tensor = torch.Tensor


def joint_attention(
    q: Tensor, memories: list[Rectangle], scale: float, blind: bool = False
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """See `gatekv.ops.naive.joint_attention`."""
    (b, h, n, _), rows, acc = q.shape, len(memories[0].keys), accumulation_dtype(q)
    group = b * h // rows
    asked, scores = (q.to(acc) * scale).reshape(rows, group * n, -1), []
    for keys, _, hidden, own in memories:
        x = asked if own is None else (own.to(acc) * scale).reshape(rows, group * n, -1)
        s = capped(torch.bmm(x, keys.to(acc).transpose(1, 2)), scale)
        if hidden is not None:
            s.masked_fill_(hidden if hidden.shape[1] == 1 else hidden.repeat(1, group, 1), -torch.inf)
        scores.append(s)
    s = scores[0] if len(scores) == 1 else torch.cat(scores, -1)
    p = s.softmax(-1)
    p = p.nan_to_num(0.0) if blind else p
    parts = list(p.split([s.shape[-1] for s in scores], -1))
    out = torch.bmm(parts[0], memories[0].values.to(acc))
    for part, memory in zip(parts[1:], memories[1:]):
        out = torch.baddbmm(out, part, memory.values.to(acc))
    return out.view(b, h, n, -1), s, parts


def log_sum_exp(scores: Tensor, q: Tensor) -> Tensor:
    """[batch, heads, queries] of what `joint_attention` returned as scores for queries q [batch, heads, queries, D]."""
    return scores.logsumexp(-1).view(q.shape[:3])
