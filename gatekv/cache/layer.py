"""One layer's cache: a window of recent tokens, a store of kept ones, and who decides between them."""

from typing import Any, cast

import torch
from transformers.cache_utils import CacheLayerMixin

from gatekv.attention import AttentionCall, Memory
from gatekv.cache import refusals, rollback
from gatekv.cache.config import CacheConfig
from gatekv.cache.eviction import Evictor
from gatekv.cache.evidence import Evidence
from gatekv.cache.gate_stream import ROLLBACK
from gatekv.cache.ranking import evictor_of
from gatekv.cache.readable import Readable
from gatekv.cache.segments.window import RecentWindow
from gatekv.cache.sharing import Before, Reader
from gatekv.cache.siblings import Siblings
from gatekv.cache.stages import DensePrefill, Prefill, Stage
from gatekv.cache.store import CompressedStore
from gatekv.parts import Part
from gatekv.precision import attended
from gatekv.support import LATER

Tensor = torch.Tensor


class KVLayer(Readable, Part, Memory, CacheLayerMixin):
    """Cache layer of one full-attention layer; `attend` is called by the attention function.

    Attributes:
        window, store: what is held. stage: what the layer does with tokens that come; evictor: which of them go.
        evidence: what the next decision will look at. siblings: the cache's layers.
        seen: slots; folded: those that have left the window; base: where the current prompt or turn begins.
        real: [batch, 1], real tokens seen. unmet: [batch] bool, rows whose budget could not be kept; None: undecided.
        history: [batch, seen] bool, the real ones, where pads do not all stand on the left; padded: there are pads.
        first_call: tokens of the first call, 0 before it. calls, open, expected: see `gatekv.cache.refusals`.
        readers: later layers that read this one's keys and values; before, replays: see `gatekv.cache.sharing`.
        latent: numbers of a key that are its value too (`gatekv.cache.latents`), or 0.
    """

    saved: tuple[str, ...] = ("seen", "folded", "base", "first_call", "padded", "real", "unmet", "history")
    saved += ("window", "store", "evictor", "evidence")
    borrowed, is_croppable = ("siblings",), True
    readers, latent, replays = 0, 0, False

    def __init__(self, config: CacheConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx, self.siblings = config, layer_idx, cast(Siblings, LATER)
        self.reset()

    def reset(self) -> None:
        """Forget everything; the cache is as new."""
        self.window, self.store, self.real = LATER, LATER, LATER  # `lazy_initialization` makes them
        self.unmet: Tensor | None = None
        self.history: Tensor | None = None
        self.stage: Stage = DensePrefill() if self.config.dense_prefill else Prefill()
        self.evictor: Evictor = evictor_of(self.config)
        self.evidence = Evidence()
        self.seen = self.folded = self.base = self.first_call = self.calls = 0
        self.is_initialized = self.recording = self.open = self.expected = self.padded = False
        self.before: Before | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None) -> None:
        dims = None if value_states is None or self.latent else value_states.shape[-1], self.latent
        self.window = RecentWindow(key_states, self.evictor.window_scores, *dims)
        self.store = CompressedStore(key_states, self.config, self.evictor.page_scores, *dims)
        self.real = torch.zeros(len(key_states), 1, dtype=torch.long, device=key_states.device)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Hands the new tokens through; `attend` stores them, because only there flags and mask are known."""
        refusals.check_owner(self)
        self.expected = False
        if not self.is_initialized:
            keys = attended(key_states)
            self.lazy_initialization(keys if self.config.dtype is None else keys.to(self.config.dtype), value_states)
        return key_states, value_states

    def get_seq_length(self) -> int:
        """Tokens seen, never tokens stored: positions follow from it."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def expect(self, new: int) -> None:
        refusals.check_whole(self, new)
        refusals.check_positions(self, new)
        self.expected = True

    def reader(self) -> Memory:
        return Reader(self)

    @property
    def dense(self) -> bool:  # type: ignore[override]
        return self.seen == 0 and self.stage.whole and self.config.prompt_tokens is None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Re-order, repeat or reduce the batch."""
        if self.is_initialized:
            index, rows = beam_idx.to(self.real.device), torch.arange(len(self.real), device=self.real.device)
            if not torch.equal(index, rows):
                self.index_select(index)

    def activate_past_recording(self) -> None:
        """Keep the last ROLLBACK tokens whole until `crop` says which of them stay."""
        self.recording = True
        self.evictor.record()

    crop = rollback.crop

    @torch.compiler.disable
    def attend(
        self, call: AttentionCall, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float
    ) -> Tensor:
        """Take in new tokens, answer their queries, evict; shapes and errors as for `Stage.attend`."""
        refusals.check_call(self, call, q.shape[2], mask)
        if self.readers:
            self.before = Before(self.fork(), call, k, v, mask, self.readers)
        held = self.window.dtype  # autocast may be on in one call, off in the next
        out = self.stage.attend(self, call, q.to(held), k.to(held), v.to(held), mask, scaling)
        self.calls, self.open, self.first_call = self.calls + 1, False, self.first_call or q.shape[2]
        return out.to(q.dtype)

    @property
    def decided(self) -> bool:
        """Whether the prompt has ended."""
        return self.stage.decided

    def fed(self) -> Tensor:
        """[batch, slots since base] bool: which of the current prompt's or turn's are real; pads on the left."""
        if self.folded == self.base:
            return self.window.valid
        return torch.arange(self.base, self.seen, device=self.real.device) >= self.seen - self.real

    def fold(self, at_least: int = 1, rollback: int | None = None) -> None:
        """Let tokens that are old enough leave the window, if so many are.

        rollback: leave that many tokens more; None = what recording asks for.
        """
        stays = rollback if rollback is not None else ROLLBACK if self.recording else 0
        leave = len(self.window) - max(self.config.eviction_delay - 1, 0) - stays
        if leave >= max(at_least, 1):
            self.leave(leave)

    def leave(self, tokens: int) -> None:
        """The first tokens leave the window, for the store or for good."""
        self.evictor.take(self, tokens)
        self.folded += tokens
