"""What people read off a cache layer, as of transformers' own: `layer.keys`, `layer.values`."""

import warnings
from typing import TYPE_CHECKING, Any, cast

import torch

if TYPE_CHECKING:
    from gatekv.cache.layer import KVLayer

Tensor = torch.Tensor
OLD_NAMES = {"tail": "window", "kept": "store", "plan": "config"}  # until 0.3


class Readable:
    """Beside what a layer does: views of what it holds, made when they are asked for."""

    @property
    def keys(self) -> Tensor | None:
        """[batch, kv_heads, most, head_dim]: the keys held, most: of any head; None before the first call.

        A copy, for looking at: heads that hold fewer have zeros in front, keys of fewer channels have zeros behind, and
        the order of a head's tokens means nothing.
        """
        return self._held("keys")

    @keys.setter
    def keys(self, value: Any) -> None:
        """transformers' own layers begin with None."""

    @property
    def values(self) -> Tensor | None:
        """The same of the values."""
        return self._held("values")

    @values.setter
    def values(self, value: Any) -> None:
        """As `keys`."""

    def _held(self, name: str) -> Tensor | None:
        layer = cast("KVLayer", self)
        if not layer.is_initialized:
            return None
        window, store = layer.window, layer.store
        parts = [(getattr(window, name), layer.stage.held_in_window(layer))]
        heads, width = window.flags.shape[:2], getattr(window, name).shape[-1]
        for segment in store.segments():
            probe = window.keys.new_zeros(*heads, 1, window.keys.shape[-1])
            for keys, values, there in segment.shown(probe):
                rows = keys if name == "keys" else values
                rows = torch.nn.functional.pad(rows, (0, width - rows.shape[-1]))
                parts.append((rows.to(window.dtype).unflatten(0, heads), there.unflatten(0, heads)))
        every, held = torch.cat([part for part, _ in parts], 2), torch.cat([there for _, there in parts], -1)
        order = held.to(torch.uint8).argsort(dim=-1, stable=True)[..., held.shape[-1] - int(held.sum(-1).max()) :]
        out = every.gather(2, order[..., None].expand(*order.shape, width))
        return out.masked_fill(~held.gather(-1, order)[..., None], 0)

    def __getattr__(self, name: str) -> Any:
        if name not in OLD_NAMES:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        warnings.warn(f"a cache layer's {name} is called {OLD_NAMES[name]} now.", FutureWarning, stacklevel=2)
        return getattr(self, OLD_NAMES[name])
