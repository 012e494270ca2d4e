"""Evictors that go by a trained gate's logits, token by token."""

from typing import TYPE_CHECKING, cast

import torch

from gatekv.attention import AttentionCall, sink_tokens
from gatekv.cache import stages
from gatekv.cache.alignment import Seen
from gatekv.cache.buffer import Buffer
from gatekv.cache.config import CacheConfig
from gatekv.cache.decision import Selection, admit_rows, protected_tokens, rooms
from gatekv.cache.eviction import BufferEvictor, Evictor, Flags, KeepAll
from gatekv.cache.gate_stream import GateStream
from gatekv.cache.segments.segment import Shape
from gatekv.modules import GatedAttention
from gatekv.policies.amount import share_of
from gatekv.policies.budgets import faded

if TYPE_CHECKING:
    from gatekv.cache.layer import KVLayer

Tensor = torch.Tensor


class GateEvictor(Evictor):
    """Flags are a gate's logits above a threshold.

    Attributes:
        stream: what the gate has read. loose: calibrated thresholds are those of `loose` times the budget. postpones:
        a gate with a long window reads FOLD tokens at a time.
    """

    saved: tuple[str, ...] = ("stream",)
    evicts = True
    loose = 1.0
    postpones = False

    def __init__(self, config: CacheConfig, stream: GateStream | None = None) -> None:
        super().__init__(config)
        self.stream = GateStream() if stream is None else stream

    def thresholds(self, layer: "KVLayer", valid: Tensor, real: Tensor, start: int) -> Tensor:
        """Logit thresholds of tokens that came after `start` slots, `real` [batch, 1] of them real tokens;
        broadcastable to [batch, kv_heads, n]."""
        return torch.tensor(-torch.inf, device=valid.device)

    def calibrated(self, layer: "KVLayer", valid: Tensor, real: Tensor, start: int) -> Tensor:
        """Thresholds [batch, 1, n] that keep the budget as tokens leave the window; arguments as for `thresholds`."""
        config, budget = self.config, self.config.policy.budget
        # A token is judged when it leaves the window: by then its row has seen `window` more tokens. This depends
        # on the token alone, never on how the prompt was cut into calls.
        index = real + valid.long().cumsum(-1)
        seen = index + config.window
        if not config.knows_end:
            return config.thresholds(cast(float, budget), seen)[:, None]
        pads = start - real + (~valid).sum(-1, keepdim=True)
        end = layer.base if layer.decided else config.prompt_tokens or start + valid.shape[1]
        known = config.prompt_tokens is not None or isinstance(budget, int)
        out = []
        for row, length in enumerate((end - pads)[:, 0].tolist()):
            share = min(1.0, self.loose * share_of(budget, length))
            limits = config.thresholds(share, seen[row], length if known else None)
            too_short = rooms(config, length)[1] is not None
            out.append(limits.masked_fill((index[row] <= length) & too_short, -torch.inf))
        return torch.stack(out)[:, None]

    def on_tokens(self, layer: "KVLayer", call: AttentionCall, k: Tensor, new: Seen) -> Flags:
        config, window, valid = self.config, layer.window, new.valid
        if call.gate is None:
            raise ValueError("the adapter was disabled or unloaded while this cache was in use; enable it again.")
        if config.full_prompt_gate and layer.seen:
            raise ValueError(
                "this gate reads the whole prompt before it judges any of it: feed the prompt in one call, without "
                "prefill_chunk_size, or train a gate with context='causal'."
            )
        layer.open, scored = True, window.scores is not None
        waits = self.postpones and layer.decided and not new.ragged
        if waits and self.stream.postpone(call.hidden, config.eviction_delay):
            flags = new.flags(k.shape[1])  # what it will say is written over them
            return Flags(flags, flags.float() if scored else None)
        self.stream.gate = call.gate
        logits, valid, old = self.stream.read(call.hidden, valid, window, new.ragged)
        real = layer.real - valid[:, :old].sum(-1, keepdim=True)
        sinks = sink_tokens(valid, config.sinks, real)[:, None]
        limits = self.thresholds(layer, valid, real, layer.seen - old)
        flags, scores = (logits > limits) & valid[:, None] | sinks, self.scored(logits, sinks)
        if old:
            window.rewrite(flags[..., :old], scores[..., :old])
        return Flags(flags[..., old:], scores[..., old:] if scored else None)

    def scored(self, logits: Tensor, sinks: Tensor) -> Tensor:
        """What is kept of logits [batch, kv_heads, n] beside the tokens; sinks: [batch, 1, n] bool."""
        return logits

    def rewindable(self) -> int | None:
        return self.stream.rewindable()

    def rewind(self, remove: int) -> None:
        self.stream.rewind(remove)

    def forecast_bytes(self, shape: Shape, wrapper: GatedAttention) -> int:
        return self.stream.forecast_bytes(shape, wrapper.gate())

    def record(self) -> None:
        self.stream.recording = True

    def recorded(self) -> None:
        self.stream.history = []


class Threshold(GateEvictor):
    """Each token is judged alone, as it leaves the window; there is nothing to decide at the prompt's end."""

    postpones = True

    def thresholds(self, layer: "KVLayer", valid: Tensor, real: Tensor, start: int) -> Tensor:
        if self.config.policy.budget is None:
            return torch.tensor(self.config.threshold, device=valid.device)
        return self.calibrated(layer, valid, real, start)

    def on_prompt_end(self, layer: "KVLayer") -> None:
        config, valid = self.config, layer.fed()
        before = layer.real - valid.sum(-1, keepdim=True)
        if config.policy.budget is not None:
            layer.unmet = admit_rows(config, valid.sum(-1), before[:, 0])[1]
        if config.keep_later and (config.dense_prefill or config.full_prompt_gate):
            # What follows is not judged, nor shields them.
            guarded = protected_tokens(config, valid, before, config.window)
            guarded = guarded[..., layer.folded - layer.base :] & layer.window.valid[:, None]
            layer.window.flags = layer.window.flags | guarded
        self.hand_over(layer, self.successor())

    def successor(self, selection: Selection | None = None) -> Evictor:
        return KeepAll(self.config) if self.config.keep_later else self


class Cut(GateEvictor):
    """Behind a prompt that was ranked: what a gate gives less than the best that was refused there goes.

    Attributes:
        cut: [batch, 1 or kv_heads, 1], that logit.
    """

    saved = ("stream", "cut")
    postpones = True

    def __init__(self, config: CacheConfig, stream: GateStream, selection: Selection | None) -> None:
        super().__init__(config, stream)
        self.cut = None if selection is None else selection.cut

    def thresholds(self, layer: "KVLayer", valid: Tensor, real: Tensor, start: int) -> Tensor:
        return cast(Tensor, self.cut)

    def forecast_bytes(self, shape: Shape, wrapper: GatedAttention) -> int:
        return super().forecast_bytes(shape, wrapper) + 4 * shape.rows


class Decay(GateEvictor, BufferEvictor):
    """TRIM-KV: behind the prompt each token fades at the rate its gate gave it, and the faintest leave a buffer."""

    saved = ("stream", "buffer", "full")
    postpones = fades = True
    together = 1

    def __init__(self, config: CacheConfig, stream: GateStream, selection: Selection | None) -> None:
        super().__init__(config, stream)
        self.buffer, self.full = Buffer.of(config, selection, guarded=False), False

    def scored(self, logits: Tensor, sinks: Tensor) -> Tensor:
        return logits.masked_fill(sinks, torch.inf)

    def worth(self, scores: Tensor, ages: Tensor) -> Tensor:
        return faded(scores, ages)

    def stage(self) -> "stages.Stage":
        return stages.DecodeSingly()

    def split(self, new: int, narrow: int) -> tuple[int, int]:
        return 0, min(new, 1)  # what comes is stored before the lowest leaves, and its page stays

    def take(self, layer: "KVLayer", tokens: int) -> None:
        if not self.full:
            super().take(layer, tokens)
            return self.trim(layer)
        for _ in range(tokens):
            window = layer.window
            self.replace(layer, window.first(), layer.real - len(window), sure=False)
            window.drop(front=1)

    def forecast_bytes(self, shape: Shape, wrapper: GatedAttention) -> int:
        return super().forecast_bytes(shape, wrapper) + self.buffer.forecast_bytes(shape)
