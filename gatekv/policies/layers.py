"""How much room each layer has: evenly, or the same for all but those a method leaves whole.

Every allocation answers `counts(ratio, length, protected, layer, layers)`: tokens per head that layer number `layer` of
`layers` may keep of a row of `length` real tokens, where the mean over layers is to be ratio · length and `protected`
tokens (sinks + window) are kept in any case.
"""

import math
from dataclasses import dataclass

import torch

from gatekv.policies.budgets import BudgetError


class Layers:
    """How layers share the model's room; see the module.

    Attributes:
        scope: who must have seen the prompt before the rooms are known: a "layer", or the whole "model". Then `weights`
        and `rooms` say what becomes of the even count.
        even: nothing is given to a layer that another has not.
    """

    scope = "layer"
    even = False

    def count(self, ratio: float, length: int, protected: int, layer: int, layers: int) -> int:
        """Tokens a head of one layer, or an even share of them where the text decides."""
        return math.floor(ratio * length + 1e-6)

    def weights(self, scores: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        """[layers, batch] from scores [layers, batch, kv_heads, tokens] and valid [batch, tokens], for `rooms`."""
        raise NotImplementedError

    def rooms(self, weights: list[float], ratio: float, length: int, protected: int) -> list[int]:
        """Tokens a head of each layer, from a row's weights; ratio · length of them on average."""
        raise NotImplementedError


@dataclass
class Even(Layers):
    """Every layer keeps the same number."""

    even = True


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


def layer_count(allocation: Layers, skip: tuple[int, ...], ratio: float, length: int, protected: int, layer: int,
                layers: int) -> int:  # fmt: skip
    """Tokens per head of one layer, when the layers in `skip` stay whole; errors as for `whole_layers`."""
    skipped, rest = whole_layers(skip, ratio, layers)
    if layer in skipped:
        return length
    return allocation.count(rest, length, protected, layer - sum(i < layer for i in skipped), layers - len(skipped))
