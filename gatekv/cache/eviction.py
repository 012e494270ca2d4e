"""Evictors: what one layer does about its tokens as they come. One is in charge at a time, see `evictor_of`.

of a prompt or turn           behind it
OneShot (ranking)             FixedBuffer, or KeepAll
Threshold (gate_eviction)     itself, or KeepAll
GateOneShot (ranking)         Cut, Decay (gate_eviction), or KeepAll
"""

from typing import TYPE_CHECKING, NamedTuple, cast

import torch

from gatekv.attention import AttentionCall
from gatekv.cache import stages, streaming
from gatekv.cache.alignment import Seen
from gatekv.cache.buffer import Buffer
from gatekv.cache.config import CacheConfig
from gatekv.cache.decision import Selection
from gatekv.cache.gate_stream import FOLD
from gatekv.cache.segments.prompt_end import PromptEnd
from gatekv.cache.segments.segment import Shape
from gatekv.cache.segments.window import New
from gatekv.modules import GatedAttention
from gatekv.parts import Part

if TYPE_CHECKING:
    from gatekv.cache.layer import KVLayer
    from gatekv.cache.segments.pages import Pages

Tensor = torch.Tensor


class Flags(NamedTuple):
    """keep [batch, kv_heads, n] bool: what new tokens will be once they leave the window; scores [batch, kv_heads, n]
    that are kept beside them, or None."""

    keep: Tensor
    scores: Tensor | None


class Evictor(Part):
    """Everything stays.

    Attributes:
        evicts: tokens that come now can be evicted as they leave the window. together: so many leave it at a time, for
        speed; until then the mask hides the dead. page_scores, window_scores: pages, the window hold a score of each
        token.
    """

    evicts = False
    together = FOLD
    page_scores = False
    window_scores = False

    def __init__(self, config: CacheConfig) -> None:
        self.config = config

    def on_tokens(self, layer: "KVLayer", call: AttentionCall, k: Tensor, new: Seen) -> Flags:
        """Flags of new tokens with keys k [batch, kv_heads, n, head_dim], whose pads stand on the left.

        Raises:
            ValueError: before anything has changed.
        """
        layer.open = True
        return Flags(new.flags(k.shape[1]), None)

    def on_prompt_end(self, layer: "KVLayer") -> None:
        """The prompt or turn is whole: decide, or wait for the layers that follow."""
        raise NotImplementedError

    def take(self, layer: "KVLayer", tokens: int) -> None:
        """The first tokens leave the window, for the store or for good."""
        layer.store.take(layer.window, tokens, layer.real)

    def successor(self, selection: Selection | None = None) -> "Evictor":
        """Who goes on behind the prompt or turn, by what was selected there; None: an empty one, to be loaded."""
        return self

    def begin(self, layer: "KVLayer") -> None:
        """It takes over: the prompt has been decided, and what stays is stored."""

    def stage(self) -> "stages.Stage":
        """What the layer does while this evictor is in charge behind the prompt."""
        return stages.Decode()

    def rewindable(self) -> int | None:
        """How many of the last tokens it can take back; None: any number."""
        return None

    def rewind(self, remove: int) -> None:
        """Take back the last tokens."""

    def record(self) -> None:
        """Keep what `rewind` needs, from here on."""

    def recorded(self) -> None:
        """What was kept for `rewind` is not needed any more."""

    def split(self, new: int, narrow: int) -> tuple[int, int]:
        """Of `new` tokens behind the prompt, (how many are in the window, how much the pages have grown by others);
        narrow: tokens a head that stand apart in another width."""
        return new % self.together, new // self.together * self.together

    def forecast_bytes(self, shape: Shape, wrapper: GatedAttention) -> int:
        """Bytes that it holds itself in one layer, which `wrapper` gates."""
        return 0

    def hand_over(self, layer: "KVLayer", successor: "Evictor", bits: Tensor | None = None) -> None:
        """Go on behind the prompt or turn with `successor`, which may be this one; bits: as for `PromptEnd`."""
        config, layer.evictor = self.config, successor
        layer.base = layer.seen
        if config.turns:
            layer.stage = stages.Turn()
            layer.leave(len(layer.window))
        else:
            layer.stage = successor.stage()
            layer.fold(rollback=0 if config.waits else None)  # nothing takes back a decided prompt
        if config.policy.width is not None:
            layer.store.absorb(_prompt_end(layer, bits))
        successor.begin(layer)
        if not successor.evicts:
            layer.window.psi = None
        layer.evidence.forget()


def _prompt_end(layer: "KVLayer", bits: Tensor | None) -> PromptEnd:
    q, window = cast(Tensor, layer.evidence.queries), layer.window
    asks = torch.arange(q.shape[2], 0, -1, device=q.device) <= layer.real
    live = window.flags & window.valid[:, None]
    return PromptEnd(q, asks, window.keys, live, layer.real, layer.evidence.scaling, layer.evidence.sinks, bits)


class KeepAll(Evictor):
    """Behind a decided prompt, everything stays; a gate's memory of the prompt is given back."""

    together = 4 * FOLD  # nobody is dead


class BufferEvictor(Evictor):
    """Behind the prompt a head holds so many tokens and no more: with every new one, one leaves.

    Attributes:
        buffer: how many. full: every head holds as many, all of them in the pages. fades: worth hangs on age.
    """

    saved: tuple[str, ...] = ("buffer", "full")
    window_scores = page_scores = True
    fades = False
    buffer: Buffer
    full: bool

    def worth(self, scores: Tensor, ages: Tensor) -> Tensor:
        """By what tokens are ranked, from their scores and ages [...]."""
        return scores

    def trim(self, layer: "KVLayer") -> None:
        """New tokens were appended to the pages: the least worthy leave."""

        def worth(pages: "Pages") -> Tensor:
            return self.worth(cast(Tensor, pages.scores), pages.ages(layer.real))

        store, remainder = layer.store, layer.store.remainder
        full = self.buffer.trim(store, worth, layer.real)
        # Tokens that merge look for the closest of those that stay, and narrow ones have no place to take.
        self.full = full and store.narrow is None and not (remainder.counts and remainder.later)

    def replace(self, layer: "KVLayer", new: New, position: Tensor, sure: bool, scores: Tensor | None = None) -> None:
        """As `trim`, where `full`, for one new token a head; arguments as for `Buffer.replace`.

        scores: [rows, most], of the pages' tokens, where they have been renewed.
        """
        pages, remainder, buffer = layer.store.pages, layer.store.remainder, self.buffer
        held = pages.unrolled(cast(Tensor, pages.scores)) if scores is None else scores
        mine = cast(Tensor, new.scores).reshape(-1, 1)
        if self.fades or buffer.most > 1:
            real, young = (pages.by_head(t) for t in (layer.real, buffer.recent[:, None]))
            ages = real - pages.unrolled(pages.positions)
            if self.fades:
                held = self.worth(held, ages)
                mine = self.worth(mine, real - pages.by_head(position))
            if buffer.most > 1:
                held = held.masked_fill(ages <= young, torch.inf)
        if pages.table.each is None:
            held = held.masked_fill(~pages.held_places(), torch.inf)
        if scores is not None:
            pages.scores = pages.rolled(scores)
        evicted = buffer.replace(pages, held, mine, new, position, sure, wanted=remainder.later)
        if evicted is not None:
            remainder.fold(pages, evicted)

    def forecast_bytes(self, shape: Shape, wrapper: GatedAttention) -> int:
        return super().forecast_bytes(shape, wrapper) + self.buffer.forecast_bytes(shape)


class FixedBuffer(BufferEvictor):
    """Behind the prompt each token has a score, and with every new one the lowest leaves a buffer of the size that the
    prompt left (H2O, TOVA, StreamingLLM, L2, D2O, Elastic-Cache)."""

    def __init__(self, config: CacheConfig, selection: Selection | None) -> None:
        super().__init__(config)
        self.buffer, self.full = Buffer.of(config, selection, guarded=True), False

    def begin(self, layer: "KVLayer") -> None:
        sinks = self.config.policy.scorer.segment(layer.store.pages)
        if sinks is not None and layer.evidence.rotary is not None:  # None where a saved cache is loaded
            sinks.absorb(layer.store.pages, self.buffer.room[:, 0], layer.real[:, 0], layer.evidence.rotary)
        layer.store.sinks = sinks

    def stage(self) -> "stages.Stage":
        return streaming.Streaming()

    def take(self, layer: "KVLayer", tokens: int) -> None:
        super().take(layer, tokens)
        self.trim(layer)

    def split(self, new: int, narrow: int) -> tuple[int, int]:
        return 0, min(new, narrow + 1)  # narrow tokens that leave make no room in the pages
