"""The layers of one cache, as each of them sees the others."""

import weakref
from typing import TYPE_CHECKING, Any

from gatekv.cache.alignment import Masks

if TYPE_CHECKING:
    from gatekv.cache.hybrid import Steps
    from gatekv.cache.layer import KVLayer


class Siblings:
    """Weak references: a layer that held the others, and they it, would outlive the cache's last reference.

    Attributes:
        masks: what the mask of the forward at hand says, looked at once for all layers. steps: whether the states of
        other layers kept step.
    """

    def __init__(self, layers: "list[KVLayer]", others: list[tuple[int, Any]], steps: "Steps") -> None:
        """layers: those that evict, by depth; others: (place in the model, layer) of transformers' own."""
        self.steps = steps
        self._layers = [weakref.ref(layer) for layer in layers]
        self.masks = Masks()
        self._others = [(place, weakref.ref(layer)) for place, layer in others]

    @property
    def layers(self) -> "list[KVLayer]":
        """Those that evict, by depth."""
        return [layer for ref in self._layers if (layer := ref()) is not None]

    @property
    def others(self) -> list[tuple[int, Any]]:
        """(place in the model, layer) of transformers' own."""
        return [(place, ref()) for place, ref in self._others]
