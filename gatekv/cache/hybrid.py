"""A layer that keeps keys and values and a state beside them (Falcon-H1, Zaya), and whether states kept step."""

from typing import Any

import torch
from transformers import Cache
from transformers.cache_utils import LinearAttentionCacheLayerMixin, LinearAttentionLayer

from gatekv.cache import refusals
from gatekv.cache.config import CacheConfig
from gatekv.cache.layer import KVLayer
from gatekv.cache.segments.foreign import Foreign

Tensor = torch.Tensor


class HybridKVLayer(KVLayer, LinearAttentionCacheLayerMixin):  # type: ignore[misc]  # two ways to begin, one of them ours
    """Its keys and values are evicted as everywhere; the state is transformers' own.

    Attributes:
        state: the `LinearAttentionLayer`, as a foreign segment.
    """

    saved = (*KVLayer.saved, "state")
    is_compileable = False

    def __init__(self, config: CacheConfig, layer_idx: int, number_of_states: int) -> None:
        self.number_of_states = number_of_states
        super().__init__(config, layer_idx)

    def reset(self) -> None:
        super().reset()
        self.state = Foreign(LinearAttentionLayer(self.number_of_states))

    def update_conv_state(self, *args: Any, **kwargs: Any) -> Tensor:
        """As transformers' own."""
        return self.state.layer.update_conv_state(*args, **kwargs)

    def update_recurrent_state(self, *args: Any, **kwargs: Any) -> Tensor:
        """As transformers' own."""
        return self.state.layer.update_recurrent_state(*args, **kwargs)

    @property
    def conv_states(self) -> dict[int, Tensor | None]:  # type: ignore[override]
        return self.state.layer.conv_states

    @property
    def recurrent_states(self) -> dict[int, Tensor | None]:  # type: ignore[override]
        return self.state.layer.recurrent_states

    @property
    def has_previous_state(self) -> dict[int, bool]:  # type: ignore[override]
        return self.state.layer.has_previous_state

    @property
    def record_past(self) -> bool:  # type: ignore[override]
        return self.state.layer.record_past

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        return self.state.layer.is_croppable

    def activate_past_recording(self) -> None:
        super().activate_past_recording()
        self.state.layer.activate_past_recording()

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        self.state.crop(tokens_to_remove)


class Steps:
    """In which forward each state of a cache was last in use: in the last one, or that was interrupted.

    How often they are renewed says nothing: kernels write some of them in place.
    """

    def __init__(self) -> None:
        self._last: dict[int, int] = {}  # layer -> number of the forward
        self._broken = False

    def use(self, layer_idx: int, first: KVLayer) -> None:
        """A state of a layer is read or renewed; first: the first layer that evicts, which counts the forwards."""
        self._last[layer_idx] = first.calls + (layer_idx <= first.layer_idx)

    def begin(self, first: KVLayer) -> None:
        """A forward begins: the one before must have come as far as `first`, if it has used a state."""
        self._broken |= any(n > first.calls for p, n in self._last.items() if p <= first.layer_idx)

    def fork(self) -> "Steps":
        """For a copy of the cache."""
        twin = Steps()
        twin._last, twin._broken = dict(self._last), self._broken
        return twin

    def uneven(self, calls: int, layer_idx: int) -> bool:
        """Whether some are behind or ahead, where `calls` forwards are done and layer_idx is at its next; a state of
        that layer itself is used before its attention, or after."""
        if not hasattr(Cache, "get_conv_state"):  # older transformers, whose models take states without asking
            return False
        at = {p: n for p, n in self._last.items() if p != layer_idx}
        return self._broken or any(n != calls + (p < layer_idx) for p, n in at.items())


class States(Cache):
    """The part of a cache that has to do with layers which keep a state: each use is noted, and none is taken back."""

    _steps: Steps

    def evicting(self) -> list[KVLayer]:
        """The layers that gatekv holds, by depth."""
        return [layer for layer in self.layers if isinstance(layer, KVLayer)]

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """As transformers' own, who asks when a forward begins."""
        self._steps.begin(self.evicting()[0])
        return super().get_mask_sizes(query_length, layer_idx)

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        """As transformers' own; so are the next three."""
        self._steps.use(layer_idx, self.evicting()[0])
        return super().get_conv_state(layer_idx, state_idx)

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        self._steps.use(layer_idx, self.evicting()[0])
        return super().get_recurrent_state(layer_idx, state_idx)

    def update_conv_state(self, conv_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> torch.Tensor:
        self._steps.use(layer_idx, self.evicting()[0])
        return super().update_conv_state(conv_states, layer_idx, *args, **kwargs)

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        self._steps.use(layer_idx, self.evicting()[0])
        return super().update_recurrent_state(recurrent_states, layer_idx, *args, **kwargs)

    @property
    def is_linear(self) -> list[bool]:
        """Which layers have a state and no keys and values."""
        return [not Foreign(layer).attends and Foreign(layer).remembers for layer in self.layers]

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last -tokens_to_remove tokens, as if they had never been seen.

        Raises:
            ValueError: they have displaced others, or run into a state; nothing has changed then.
        """
        refusals.check_crop(self.layers, tokens_to_remove)
        for layer in self.layers:
            (layer if isinstance(layer, KVLayer) else Foreign(layer)).crop(tokens_to_remove)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each sequence `repeats` times, one after the other."""
        self._select(torch.arange(self._rows()).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the sequences at indices [new_batch], or where a mask [batch] says True."""
        self._select(torch.arange(self._rows(), device=indices.device)[indices])

    def _select(self, index: torch.Tensor) -> None:
        for layer in self.layers:
            if not isinstance(layer, KVLayer):
                Foreign(layer).index_select(index)
            elif layer.is_initialized:
                layer.index_select(index.to(layer.real.device))

    def _rows(self) -> int:
        return next((len(layer.real) for layer in self.evicting() if layer.is_initialized), 0)
