"""Learned attention sinks (gpt-oss, arXiv 2508.10925): each query head has one more logit s, whose value is nothing.

softmax over [scores, s] is the softmax over the scores alone times σ(lse - s): the sink is a memory that answers
(0, s), and merges with the others as every memory does. None stands for a model without them.
"""

import torch

from gatekv.ops.naive import accumulation_dtype

Tensor = torch.Tensor
CHANNELS = 8  # that `causal_or_masked` appends: kernels want a multiple


def share_of_keys(lse: Tensor, sinks: Tensor) -> Tensor:
    """What the sinks [heads] leave to the keys, as lse, the keys' log-sum-exp [batch, heads, queries]."""
    return torch.sigmoid(lse - sinks.to(lse)[:, None])


def with_sinks(answer: tuple[Tensor, Tensor], sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """See `gatekv.ops.naive.with_sinks`."""
    if sinks is None:
        return answer
    out, lse = answer
    return out * share_of_keys(lse, sinks)[..., None], torch.logaddexp(lse, sinks.to(lse)[:, None].expand_as(lse))


def softmax(s: Tensor, sinks: Tensor | None) -> Tensor:
    """Of scores [batch, kv_heads, group, queries, keys] beside the sinks, which take their share."""
    p = s.softmax(-1)
    if sinks is not None:
        p.mul_(torch.sigmoid(s.logsumexp(-1, keepdim=True) - sinks.to(s).view(s.shape[1], -1, 1, 1)))
    return p


def attend(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, scale: float, visible: Tensor | None, causal: bool
) -> Tensor:
    """scaled_dot_product_attention beside the sinks, by its own kernels: no scores are held.

    The sinks are one more key in front, which answers the query's own new channel by s, and whose value is 0.

    q: [batch, heads, n, head_dim]; k, v: [batch, kv_heads, tokens, head_dim], values may be narrower; visible: [batch,
    1 or kv_heads, n, tokens] bool or None; causal: n = tokens, and each query sees the keys up to its own.
    Returns [batch, heads, n, value_dim].
    """
    (b, h, n, d), kv, acc = q.shape, k.shape[1], accumulation_dtype(q)
    own = (sinks.to(acc) / scale).to(q.dtype)
    rest = (sinks.to(acc) / scale - own.to(acc)).to(q.dtype)  # in bfloat16 one channel alone would be rough
    more = torch.stack([own, rest], -1)[None, :, None].expand(b, h, n, 2)
    x = torch.cat([q, more, q.new_zeros(b, h, n, CHANNELS - 2)], -1)
    sink = k.new_zeros(b, kv, 1, d + CHANNELS)
    sink[..., d : d + 2] = 1
    keys = torch.cat([sink, torch.nn.functional.pad(k, (0, CHANNELS))], 2)
    width = d + CHANNELS - v.shape[-1]
    values = torch.nn.functional.pad(v, (0, width, 1, 0))
    if causal:  # a first query, dropped below, lets the others see the sink and the keys up to their own
        x, mask = torch.nn.functional.pad(x, (0, 0, 1, 0)), None
    else:
        mask = None if visible is None else torch.nn.functional.pad(visible, (1, 0), value=True)
        mask = mask if mask is None or mask.shape[1] == 1 else mask.repeat_interleave(h // kv, 1)
    out = torch.nn.functional.scaled_dot_product_attention(
        x, keys, values, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=h != kv
    )
    return out[:, :, -n:, : v.shape[-1]]
