"""How much room each layer has: evenly, or the same for all but those a method leaves whole.

Every allocation answers `counts(ratio, length, protected, layer, layers)`: tokens per head that layer number `layer` of
`layers` may keep of a row of `length` real tokens, where the mean over layers is to be ratio · length and `protected`
tokens (sinks + window) are kept in any case.
"""

import math
from dataclasses import dataclass
from typing import Protocol

from gatekv.policies.budgets import BudgetError


class Rooms(Protocol):
    """What `layer_count` asks: how many tokens a head of one layer may keep."""

    def count(self, ratio: float, length: int, protected: int, layer: int, layers: int) -> int:
        """See the module."""
        ...


@dataclass
class Even:
    """Every layer keeps the same number."""

    scope = "layer"

    def count(self, ratio: float, length: int, protected: int, layer: int, layers: int) -> int:
        return math.floor(ratio * length + 1e-6)


def whole_layers(skip: tuple[int, ...], ratio: float, layers: int) -> tuple[list[int], float]:
    """(layers left whole, negative numbers counted from the end; the ratio that the others can have, who pay for them).

    Raises:
        BudgetError: when nothing would be left for the others ("unreachable").
    """
    skipped = sorted({i % layers for i in skip if -layers <= i < layers})
    others = layers - len(skipped)
    rest = ratio if not skipped else (ratio * layers - len(skipped)) / others if others else 0.0
    if rest <= 0 and ratio < 1:
        raise BudgetError(
            f"budget {ratio:.4g} is unreachable: {len(skipped)} of {layers} layers are left whole; skip fewer layers."
        )
    return skipped, rest


def layer_count(allocation: Rooms, skip: tuple[int, ...], ratio: float, length: int, protected: int, layer: int,
                layers: int) -> int:  # fmt: skip
    """Tokens per head of one layer, when the layers in `skip` stay whole; errors as for `whole_layers`."""
    skipped, rest = whole_layers(skip, ratio, layers)
    if layer in skipped:
        return length
    return allocation.count(rest, length, protected, layer - sum(i < layer for i in skipped), layers - len(skipped))
