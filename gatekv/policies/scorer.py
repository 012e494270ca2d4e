"""What a scorer is, and what it may look at when it decides."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from gatekv.cache.segments.pages import Pages
    from gatekv.cache.segments.sinks import CachePositionSinks

NOTHING = 1e-6  # attention that counts as none
ALL = 2**31 - 1  # of a prompt's queries
OLD_NAMES = {"streams": "evicts_in_decode", "watches": "needs_attention", "sure": "always_keep"}  # until 0.3


@dataclass
class View:
    """One layer's tokens at the moment of decision. All tensors are on the model's device.

    Attributes:
        keys, values: [batch, kv_heads, tokens, head_dim], post-RoPE.
        queries: [batch, heads, last, head_dim], the last `last` tokens' queries, post-RoPE.
        valid: [batch, tokens] bool, False at pads (pads are on the left).
        scaling: factor on the attention logits. layer_idx: of the layer.
        gate_logits: () -> [batch, kv_heads, tokens], computed on demand; raises if the model carries no gate.
        kinds: [batch, tokens] integers, see `gatekv.policies.fastgen.token_kinds`, or None: nobody said.
        learned_sinks: [heads] logits that take their share of every query's attention (gpt-oss), or None.
    """

    keys: torch.Tensor
    values: torch.Tensor
    queries: torch.Tensor
    valid: torch.Tensor
    scaling: float
    layer_idx: int
    gate_logits: Callable[[], torch.Tensor]
    kinds: torch.Tensor | None = None
    learned_sinks: torch.Tensor | None = None


class Scorer(ABC):
    """Which tokens matter? Subclasses are dataclasses; what they leave alone here is what their paper leaves alone.

    Attributes:
        sinks, window: first and last real tokens that are protected, inside the budget; None: as the adapter says.
        queries: how many of the prompt's last queries `score` looks at.
        skip_layers: layers left whole; the others pay for them.
        evicts_in_decode: can go on after the prompt, within a buffer of the size that the prompt's decision left. Then
            each held token has a score, which `observe` renews, and the lowest goes at every step.
        decode: "evict" if the paper does go on, "keep" if tokens after the prompt all stay.
        needs_attention: `observe` needs the attention that each step's query pays.
        cache_positions: while decoding, sinks are looked at as if positions counted places in the cache.
        partners: what its paper puts beside it ("rule", "layers", "remainder"), unless a policy names another.
        absolute: without a budget, what scores above 0 is kept. gate: scores are of an adapter's gate, which reads
        tokens as they come. evicts: False: everything is kept, whatever the budget. kinds: it goes by `View.kinds`.
        utility: what scores say where they buy bits (`gatekv.policies.rate`): "attention", a share or a sum of shares;
        its "log"; None: neither.
    """

    sinks: int | None = 0
    window: int | None = 0
    queries: int = 0
    skip_layers: tuple[int, ...] = ()
    evicts_in_decode: bool = False
    decode: str = "keep"
    needs_attention: bool = False
    cache_positions: bool = False
    partners: dict[str, type] = {}
    absolute: bool = False
    gate: bool = False
    evicts: bool = True
    kinds: bool = False
    utility: str | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for old in OLD_NAMES.keys() & vars(cls).keys():
            warnings.warn(f"{cls.__name__}.{old} is called {OLD_NAMES[old]} now.", FutureWarning, stacklevel=2)
            setattr(cls, OLD_NAMES[old], vars(cls)[old])

    @abstractmethod
    def score(self, view: View) -> torch.Tensor:
        """[batch, kv_heads, tokens] float, higher keeps."""

    def log_utility(self, scores: torch.Tensor) -> torch.Tensor:
        """The logarithm of the attention that tokens are worth, from their scores; of the same shape."""
        return scores.float() if self.utility == "log" else (scores.float() + NOTHING).log()

    def recent(self, counts: torch.Tensor, window: int) -> torch.Tensor:
        """How many of the last tokens stay whatever their score, of counts [...] that may stay; at least a window."""
        return counts.new_full(counts.shape, window)

    def always_keep(self, view: View, protected: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """[batch, 1 or kv_heads, tokens] bool: what of counts [batch] is taken whatever its score, `protected` too."""
        return protected

    def enter(self, keys: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """[batch, kv_heads, n]: scores with which tokens after the prompt begin, for scorers that stream.

        keys: [batch, kv_heads, n, head_dim]; index: [batch, n], a token's number among its row's real ones.
        """
        return keys.new_zeros(keys.shape[:3], dtype=torch.float32)

    def observe(self, scores: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
        """Scores after a step from those before it and the attention tokens received, all [batch, kv_heads, held]."""
        return scores

    def segment(self, pages: "Pages") -> "CachePositionSinks | None":
        """Where sinks stand apart in one layer behind the prompt, beside its pages; None: they do not."""
        return None
