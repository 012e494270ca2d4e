"""Behind the prompt, token by token: each one that comes pushes another out of a buffer of fixed size."""

from typing import TYPE_CHECKING, cast

import torch

from gatekv.attention import AttentionCall
from gatekv.cache import alignment
from gatekv.cache.segments.sinks import CachePositionSinks
from gatekv.cache.segments.window import New
from gatekv.cache.stages import Decode, Mask
from gatekv.ops import segments
from gatekv.ops.joint import joint_attention, log_sum_exp
from gatekv.ops.learned_sinks import share_of_keys, with_sinks
from gatekv.ops.rectangle import Rectangle
from gatekv.rotary import Rotary
from gatekv.support import LATER

if TYPE_CHECKING:
    from gatekv.cache.eviction import FixedBuffer
    from gatekv.cache.layer import KVLayer

Tensor = torch.Tensor


class Streaming(Decode):
    """However many come, they are taken one by one: what each one evicts is gone for the next."""

    def attend(self, layer: "KVLayer", call: AttentionCall, q: Tensor, k: Tensor, v: Tensor, mask: Mask,
               scale: float) -> Tensor:  # fmt: skip
        if layer.recording:
            name = type(layer.config.policy.scorer).__name__
            raise ValueError(
                f"assisted decoding takes tokens back, and {name} cannot bring back what they evicted: "
                "use KVCache(…, decode='keep') with it."
            )
        b, _, n, _ = q.shape
        fed, store, evictor = alignment.look(layer, mask, b, n), layer.store, cast("FixedBuffer", layer.evictor)
        sinks, scorer = cast("CachePositionSinks | None", store.sinks), layer.config.policy.scorer
        store.remainder.use(call.less, layer.window)
        index = layer.real if n == 1 and mask is None else layer.real + fed.valid.cumsum(-1) - 1
        entering = scorer.enter(k, index)
        if sinks is None and layer.config.sinks:  # a prompt shorter than the sinks leaves the rest of them to come
            entering = entering.masked_fill((index < layer.config.sinks)[:, None], torch.inf)
        layer.open, outs, flags = True, [], fed.flags(k.shape[1])
        alignment.remember(layer, fed)
        turning = LATER if sinks is None else cast(Rotary, call.turning())
        tokens = New(k, v, flags, fed.valid, entering)
        for i in range(n):
            new, asked = tokens.cut(i, i + 1), q if n == 1 else q[:, :, i : i + 1]
            layer.seen, layer.folded, layer.real = layer.seen + 1, layer.folded + 1, layer.real + new.valid
            if sinks is not None:
                sinks.step(turning.token(i), new.valid)
            step = _replaced if evictor.full else _appended
            outs.append(step(layer, evictor, asked, new, scale, mask is None, call.sinks))
        if sinks is not None:
            sinks.now = LATER
        return outs[0] if n == 1 else torch.cat(outs, 2)


# One token: answer its query among what is kept and itself, renew scores, evict. Attention counts among the kept alone:
# a policy decides the same with a remainder or without.


def _appended(layer: "KVLayer", evictor: "FixedBuffer", q: Tensor, new: New, scale: float, sure: bool,
              learned: Tensor | None) -> Tensor:  # fmt: skip
    """Where heads have room yet, or several memories share it.

    q: [batch, heads, 1, head_dim]; sure: no pad is new; learned: [heads], sinks that the model learned, or None.
    """
    store, scorer = layer.store, layer.config.policy.scorer
    store.pages.append(new.keys, new.values, new.flags, layer.real - 1, new.scores)
    kept = segments.merge([part.attend(q, scale) for part in store.segments()])
    out = with_sinks(segments.merge([kept, *store.remainder.answers(q, scale)]), learned)[0]
    if layer.config.needs.attention:
        store.watch(scorer.observe, q, with_sinks(kept, learned)[1], scale, new.valid)
    evictor.trim(layer)
    return out.to(q.dtype)


def _replaced(layer: "KVLayer", evictor: "FixedBuffer", q: Tensor, new: New, scale: float, sure: bool,
              learned: Tensor | None) -> Tensor:  # fmt: skip
    """The same where every head holds what it may."""
    store, pages, (b, kv) = layer.store, layer.store.pages, new.keys.shape[:2]
    answers = new.keys[..., : layer.latent] if layer.latent else new.values
    memories, rest, scores = store.rectangles(q), store.remainder.answers(q, scale), None
    if memories is None:
        own = segments.dense_segment(q, new.keys, answers, None, scale)
        out, lse = kept = segments.merge([*(part.attend(q, scale) for part in store.segments()), own])
    else:
        mine = Rectangle(new.keys.flatten(0, 1), answers.flatten(0, 1))
        out, said, paid = joint_attention(q, [*memories, mine], scale)
        kept = out, log_sum_exp(said, q) if rest or learned is not None else said
    if layer.config.needs.attention:
        if memories is None:
            whole = with_sinks((out, lse), learned)[1]
            paid_own = (own[1] - whole).exp().view(b * kv, -1).mean(1, True)
            attention = torch.cat([pages.unrolled(pages.received(q, whole, scale)), paid_own], -1)
        else:
            paid_all = torch.cat([paid[0], paid[-1]], -1)
            if learned is not None:
                paid_all = paid_all * share_of_keys(kept[1], learned).reshape(b * kv, -1, 1)
            attention = paid_all.mean(1)
        old = torch.cat([pages.unrolled(cast(Tensor, pages.scores)).view(b, kv, -1), cast(Tensor, new.scores)], -1)
        seen = layer.config.policy.scorer.observe(old, attention.view(old.shape).float())
        if layer.config.sinks:
            seen = torch.where(old.isinf(), old, seen)
        if not sure:
            seen = torch.where(new.valid[:, None], seen, old)
        scores, new = seen[..., :-1].flatten(0, 1), new._replace(scores=seen[..., -1:])
    evictor.replace(layer, new, layer.real - 1, sure, scores)
    if rest or learned is not None:
        out = with_sinks(segments.merge([kept, *rest]), learned)[0]
    return out.to(q.dtype)
