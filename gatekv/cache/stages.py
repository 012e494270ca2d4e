"""What a layer is doing: reading a prompt, decoding behind it, or reading a turn. One is in charge at a time.

Recurrent form of the law (gatekv.attention): tokens enter the window; when they are old enough they leave it, to pages
if they are flagged, to the remainder if not. That waits for FOLD tokens; meanwhile the mask hides the dead.
"""

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, cast

import torch

from gatekv.attention import AttentionCall, live_mask
from gatekv.cache import alignment
from gatekv.cache.gate_stream import FOLD
from gatekv.cache.segments.window import New
from gatekv.ops import learned_sinks, segments
from gatekv.ops.joint import joint_attention, log_sum_exp
from gatekv.ops.learned_sinks import with_sinks
from gatekv.ops.naive import WHOLE
from gatekv.ops.order import along, order_of
from gatekv.ops.paged_attention import FEW_QUERIES
from gatekv.ops.scale import cap_of
from gatekv.ops.segments import in_blocks

if TYPE_CHECKING:
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
            call, new = call.columns(lambda x: along(x, order, 1)), replace(fed, valid=along(fed.valid, order, 1))
        remainder.use(call.less, layer.window)
        keep, scores = layer.evictor.on_tokens(layer, call, k, new)
        alignment.remember(layer, fed)
        valid, before = new.valid, layer.fed().sum(-1, keepdim=True) if fed.ragged else None
        features, outs, pieces = remainder.features(k) if layer.evictor.evicts else None, [], self.pieces(n)
        tokens = New(k, v, keep, valid, scores, features)
        for a, c in pieces:
            part = tokens.cut(a, c)
            # Where later layers hold a copy, a buffer is never grown in place.
            layer.window.append(*part, slack=0 if layer.readers else self.slack)
            if fed.ragged:
                layer.window.pads_first()
            layer.seen += c - a
            layer.real = layer.real + (c - a if mask is None else part.valid.sum(-1, keepdim=True))
            asked, seen_by = q, mask
            if len(pieces) > 1:
                asked, seen_by = q[:, :, a:c], None if mask is None else mask[:, :, a:c, : layer.seen]
            outs.append(q[..., :0] if call.silent else self.answer(layer, asked, seen_by, scale, call.sinks))
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
        layer.fold(layer.evictor.together)

    def finish(self, layer: "KVLayer") -> None:
        """The call has been answered: hand over, if this stage is at its end."""

    def answer(self, layer: "KVLayer", q: Tensor, mask: Mask, scale: float, sinks: Tensor | None = None) -> Tensor:
        """The window's last tokens' queries q [batch, heads, n, head_dim], with all that the layer holds.

        mask: [batch, 1, n, seen] bool or None; sinks: [heads], learned ones, or None.
        """
        n, window, store = q.shape[2], layer.window, layer.store
        if self.whole and mask is None and n == len(window) and not len(store) and cap_of(scale) is None:
            if sinks is not None:
                return learned_sinks.attend(q, window.keys, window.values, sinks, scale, None, causal=True)
            gqa, attend = q.shape[1] != window.kv_heads, torch.nn.functional.scaled_dot_product_attention
            return attend(q, window.keys, window.values, is_causal=n > 1, scale=scale, enable_gqa=gqa)
        near = None if mask is None else alignment.columns(layer, mask, n)
        waiting = None if self.whole else window
        rest = store.remainder.answers(q, scale, waiting, near, layer.config.eviction_delay)
        visible = self.visible(layer, n, near)
        groups = q.shape[1] // window.kv_heads
        if n * groups <= FEW_QUERIES and (memories := store.rectangles(q)) is not None:
            memories = [*memories, window.rectangle(visible)]
            out, scores, _ = joint_attention(q, memories, scale, blind=mask is not None)
            if rest or sinks is not None:
                out = with_sinks(segments.merge([(out, log_sum_exp(scores, q)), *rest]), sinks)[0]
            return out.to(q.dtype)
        parts = [part.attend(q, scale) for part in store.segments()]
        if parts or rest:
            return with_sinks(segments.merge([*parts, window.attend(q, scale, visible), *rest]), sinks)[0].to(q.dtype)
        if cap_of(scale) is not None:
            return with_sinks(in_blocks(q, window.keys, window.values, visible, scale), sinks)[0].to(q.dtype)
        if sinks is not None:
            return learned_sinks.attend(q, window.keys, window.values, sinks, scale, visible, causal=False)
        # Head by head of a group, so that no key or value is copied for its queries.
        attend, own = torch.nn.functional.scaled_dot_product_attention, (window.keys, window.values)
        heads = q.unflatten(1, (-1, groups)).unbind(2)
        return torch.stack([attend(x, *own, attn_mask=visible, scale=scale) for x in heads], 2).flatten(1, 2)

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

    def bits(self, layer: "KVLayer") -> Tensor:
        """[batch, kv_heads, seen, 2] uint8: of each token's key and value, 16 where it is as it came, 0 where the next
        query cannot see it."""
        window = layer.window
        bits = torch.zeros(*window.flags.shape[:2], layer.seen, 2, dtype=torch.uint8, device=window.flags.device)
        for segment in layer.store.segments():
            segment.mark(bits, layer.real)
        near, valid = bits[:, :, layer.folded :], window.valid[:, None, :, None]
        bits[:, :, layer.folded :] = torch.where(valid, WHOLE * self.held_in_window(layer)[..., None], near)
        return alignment.as_fed(layer, bits)

    def held(self, layer: "KVLayer") -> Tensor:
        """[batch, kv_heads, seen] bool: what the next query can still see."""
        return self.bits(layer)[..., 0] > 0

    def held_in_window(self, layer: "KVLayer") -> Tensor:
        """[batch, kv_heads, window] bool: what the next query can still see of it."""
        window = layer.window
        slots = torch.arange(len(window), device=window.flags.device)
        live = live_mask(slots.new_tensor([len(window)]), slots, window.flags, layer.config.eviction_delay)[:, :, 0]
        return (live | torch.tensor(self.whole)) & window.valid[:, None]


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
            super().after_piece(layer)

    def finish(self, layer: "KVLayer") -> None:
        end = layer.config.prompt_tokens
        if (end is None or layer.seen >= end) and not (layer.config.defer or layer.replays):
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


class DecodeSingly(Decode):
    """Behind the prompt, token by token, however many come: what each one evicts is gone for the next."""

    slack = 0

    def pieces(self, n: int) -> list[tuple[int, int]]:
        return [(i, i + 1) for i in range(n)]


class Turn(Stage):
    """Behind the prompt, tokens wait whole until `KVCache.compress` ends the turn."""

    whole = True
    observes = True

    def after_piece(self, layer: "KVLayer") -> None:
        """It waits whole."""
