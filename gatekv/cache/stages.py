"""What a layer is doing: reading a prompt, decoding behind it, or reading a turn. One is in charge at a time.

Recurrent form of the law (gatekv.attention): tokens enter the window; when they are old enough they leave it, to pages
if they are flagged, to the remainder if not. That waits for FOLD tokens; meanwhile the mask hides the dead.
"""

from functools import partial
from typing import TYPE_CHECKING, cast

import torch

from gatekv.attention import AttentionCall, live_mask
from gatekv.cache import alignment
from gatekv.cache.gate_stream import FOLD
from gatekv.cache.segments.sinks import CachePositionSinks, Rotary
from gatekv.ops import segments
from gatekv.ops.order import along, order_of
from gatekv.support import LATER

if TYPE_CHECKING:
    from gatekv.cache.eviction import FixedBuffer
    from gatekv.cache.layer import KVLayer

Tensor = torch.Tensor
Mask = Tensor | None
PIECE = 512  # tokens of a long call that attend together, so that what they evict is gone for the next piece


def _cut(start: int, end: int, x: Tensor) -> Tensor:
    return x[:, start:end]


class Stage:
    """Takes in new tokens and answers their queries.

    Attributes:
        decided: the prompt has ended. whole: queries see all of the window, whatever its flags. observes: what the
        next decision will look at is kept. slack: tokens for which a new buffer of the window leaves room.
    """

    decided = True
    whole = False
    observes = False
    slack = FOLD

    def attend(self, layer: "KVLayer", call: AttentionCall, q: Tensor, k: Tensor, v: Tensor, mask: Mask,
               scale: float) -> Tensor:  # fmt: skip
        """[batch, heads, n, head_dim] of q; k, v: [batch, kv_heads, n, head_dim]; mask: [batch, 1, n, seen + n] bool or
        None. It may hand the layer over to the next stage.

        Raises:
            ValueError: before anything has changed.
        """
        b, _, n, _ = q.shape
        fed, remainder = alignment.look(layer, mask, b, n), layer.store.remainder
        order = order_of(fed.valid) if fed.ragged else None
        new = fed
        if order is not None:
            q, k, v, mask = (along(x, order, 2) for x in (q, k, v, cast(Tensor, mask)))
            call, new = call.columns(lambda x: along(x, order, 1)), fed._replace(valid=along(fed.valid, order, 1))
        remainder.use(call.less, layer.window.values)
        keep, scores = layer.evictor.on_tokens(layer, call, k, new)
        alignment.remember(layer, fed)
        valid, before = new.valid, layer.fed().sum(-1, keepdim=True) if fed.ragged else None
        features, outs = remainder.features(k) if layer.evictor.evicts else None, []
        for a, c in [(0, n)] if fed.ragged else self.pieces(n):
            parts = (keep[..., a:c], valid[:, a:c], None if scores is None else scores[..., a:c])
            psi = None if features is None else features[:, :, a:c]
            layer.window.append(k[:, :, a:c], v[:, :, a:c], *parts, psi, slack=self.slack)
            if fed.ragged:
                layer.window.pads_first()
            layer.seen += c - a
            layer.real = layer.real + (c - a if mask is None else valid[:, a:c].sum(-1, keepdim=True))
            outs.append(
                self.answer(layer, q[:, :, a:c], None if mask is None else mask[:, :, a:c, : layer.seen], scale)
            )
            self.after_piece(layer)
        if self.observes:
            layer.evidence.observe(layer.config, call, q, scale, valid, before)
        self.finish(layer)
        out = outs[0] if len(outs) == 1 else torch.cat(outs, 2)
        return out if order is None else torch.empty_like(out).scatter_(2, order[:, None, :, None].expand_as(out), out)

    def pieces(self, n: int) -> list[tuple[int, int]]:
        """(first, behind the last) of the tokens that attend together."""
        return [(a, min(n, a + PIECE)) for a in range(0, n, PIECE)]

    def after_piece(self, layer: "KVLayer") -> None:
        """A piece has been answered."""
        layer.fold(FOLD)

    def finish(self, layer: "KVLayer") -> None:
        """The call has been answered: hand over, if this stage is at its end."""

    def answer(self, layer: "KVLayer", q: Tensor, mask: Mask, scale: float) -> Tensor:
        """The window's last tokens' queries q [batch, heads, n, head_dim], with all that the layer holds.

        mask: [batch, 1, n, seen] bool or None.
        """
        n, window, store = q.shape[2], layer.window, layer.store
        k, v = window.keys, window.values
        if self.whole and mask is None and n == len(window) and not len(store):
            gqa, attend = q.shape[1] != k.shape[1], torch.nn.functional.scaled_dot_product_attention
            return attend(q, k, v, is_causal=n > 1, scale=scale, enable_gqa=gqa)
        near = None if mask is None else alignment.columns(layer, mask, n)
        waiting = None if self.whole else window
        rest = store.remainder.answers(q, scale, waiting, near, layer.config.eviction_delay)
        visible = self.visible(layer, n, near)
        parts = [part.attend(q, scale) for part in store.segments()]
        if parts or rest:
            return segments.merge([*parts, window.attend(q, scale, visible), *rest])[0].to(q.dtype)
        groups = q.shape[1] // k.shape[1]
        k, v = (t.repeat_interleave(groups, 1) for t in (k, v))
        if visible is not None and visible.shape[1] > 1:
            visible = visible.repeat_interleave(groups, 1)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale)

    def visible(self, layer: "KVLayer", n: int, near: Mask) -> Mask:
        """[batch, 1 or kv_heads, n, window] bool: what the last n tokens may see of the window; None: everything.

        near: [batch, 1, n, window] bool or None, what the mask says.
        """
        window, config = layer.window, layer.config
        judged = config.needs.gate and not self.whole
        if n > 1 or judged:
            slots = torch.arange(len(window), device=layer.real.device)
            if near is None and n > 1:
                near = (slots[-n:, None] >= slots)[None, None]
            if judged:
                live = live_mask(slots[-n:], slots, window.flags, config.eviction_delay)
                near = live if near is None else near & live
        return near

    def held(self, layer: "KVLayer") -> Tensor:
        """[batch, kv_heads, seen] bool: what the next query can still see."""
        window = layer.window
        held = torch.zeros(*window.flags.shape[:2], layer.seen, dtype=torch.bool, device=window.flags.device)
        for pages in layer.store.stores():
            pages.scatter(held, True, layer.real)
        slots = torch.arange(layer.folded, layer.seen, device=held.device)
        live = live_mask(slots.new_tensor([layer.seen]), slots, window.flags, layer.config.eviction_delay)[:, :, 0]
        live, valid = live | torch.tensor(self.whole), window.valid[:, None]
        held[..., layer.folded :] = torch.where(valid, live, held[..., layer.folded :])
        return alignment.as_fed(layer, held)


class Prefill(Stage):
    """A prompt whose flags act inside it (sparse)."""

    decided = False
    observes = True
    slack = 0

    def attend(self, layer: "KVLayer", call: AttentionCall, q: Tensor, k: Tensor, v: Tensor, mask: Mask,
               scale: float) -> Tensor:  # fmt: skip
        end, start, n = layer.config.prompt_tokens, layer.seen, q.shape[2]
        if not layer.config.waits or end is None or not start < end < start + n:
            return super().attend(layer, call, q, k, v, mask, scale)
        outs = []
        for a, c in ((0, end - start), (end - start, n)):  # what follows the prompt sees it compressed
            seen_by = None if mask is None else mask[:, :, a:c, : start + c]
            part = call.columns(partial(_cut, a, c)), q[:, :, a:c], k[:, :, a:c], v[:, :, a:c], seen_by, scale
            outs.append(super().attend(layer, *part) if a == 0 else layer.stage.attend(layer, *part))
        return torch.cat(outs, 2)

    def after_piece(self, layer: "KVLayer") -> None:
        if not layer.config.full_prompt_gate:
            layer.fold(FOLD)

    def finish(self, layer: "KVLayer") -> None:
        end = layer.config.prompt_tokens
        if (end is None or layer.seen >= end) and not layer.config.defer:
            layer.evictor.on_prompt_end(layer)


class DensePrefill(Prefill):
    """A prompt that attends to all of itself, and is decided at its end."""

    whole = True

    def pieces(self, n: int) -> list[tuple[int, int]]:
        return [(0, n)]

    def after_piece(self, layer: "KVLayer") -> None:
        """It waits whole."""


class Decode(Stage):
    """Behind the prompt: what an evictor flags goes, as it leaves the window."""


class Turn(Stage):
    """Behind the prompt, tokens wait whole until `KVCache.compress` ends the turn."""

    whole = True
    observes = True

    def after_piece(self, layer: "KVLayer") -> None:
        """It waits whole."""


class Streaming(Decode):
    """Behind the prompt, token by token, however many come: what each one evicts is gone for the next."""

    def attend(self, layer: "KVLayer", call: AttentionCall, q: Tensor, k: Tensor, v: Tensor, mask: Mask,
               scale: float) -> Tensor:  # fmt: skip
        if layer.recording:
            name = type(layer.config.policy.scorer).__name__
            raise ValueError(
                f"assisted decoding takes tokens back, and {name} cannot bring back what they evicted: "
                "use KVCache(…, decode='keep') with it."
            )
        b, _, n, _ = q.shape
        fed, store = alignment.look(layer, mask, b, n), layer.store
        valid = fed.valid
        scorer, sinks = layer.config.policy.scorer, cast("CachePositionSinks | None", store.sinks)
        store.remainder.use(call.less, layer.window.values)
        index = layer.real + valid.long().cumsum(-1) - 1
        entering = scorer.enter(k, index)
        if sinks is None:  # a prompt shorter than the sinks leaves the rest of them to come
            entering = entering.masked_fill((index < layer.config.sinks)[:, None], torch.inf)
        layer.open, outs = True, []
        alignment.remember(layer, fed)
        for i in range(n):
            new = slice(i, i + 1)
            flags = valid[:, None, new].expand(*k.shape[:2], 1)
            store.pages.append(k[:, :, new], v[:, :, new], flags, index[:, new], entering[..., new])
            layer.seen, layer.folded, layer.real = layer.seen + 1, layer.folded + 1, layer.real + valid[:, new]
            if sinks is not None:
                sinks.step(cast(Rotary, tuple(t[:, new] for t in cast(Rotary, call.rotary))), valid[:, new])
            kept = segments.merge([part.attend(q[:, :, new], scale) for part in store.segments()])
            outs.append(segments.merge([kept, *store.remainder.answers(q[:, :, new], scale)])[0].to(q.dtype))
            if scorer.watches:  # attention among the kept alone: a policy decides the same with a remainder or without
                store.watch(scorer.observe, q[:, :, new], kept[1], scale, valid[:, new])
            cast("FixedBuffer", layer.evictor).on_fold(layer)
        if sinks is not None:
            sinks.now = LATER
        return torch.cat(outs, 2)
