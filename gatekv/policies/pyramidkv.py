"""PyramidKV (arXiv 2406.02069): lower layers get more room than upper ones, falling linearly."""

import math
from dataclasses import dataclass

from gatekv.config import check_choice
from gatekv.policies.layers import Layers


@dataclass
class Pyramid(Layers):
    """b_l = max - l (max - min) / (L - 1) beside the protected tokens; min = b / beta, max = 2b - min; where max would
    not fit in the prompt, max = the prompt and min = 2b - max (§4.2). Recomputed for every prompt.

    Rounding up half a token a layer at most, as in the paper's code.

    Args:
        beta: steepness (paper's code: 20).
        variant: "paper": the window is kept beside b_l; "kvpress": inside it, unrounded until the end, and even
            layers where the smallest would not hold the window.
    """

    beta: int = 20
    variant: str = "paper"

    def __post_init__(self) -> None:
        check_choice("variant", self.variant, ("paper", "kvpress"))
        if self.beta < 1:
            raise ValueError(f"beta is a divisor, at least 1; got {self.beta}.")

    def count(self, ratio: float, length: int, protected: int, layer: int, layers: int) -> int:
        even = math.floor(ratio * length + 1e-6)
        steps = max(layers - 1, 1)
        if self.variant == "kvpress":
            room, share = length - protected, length * ratio
            low = share / self.beta
            high = min(2 * share - low, room)
            low = 2 * share - high if high == room else low
            fits = length >= high >= low >= protected
            return round(high - layer * (high - low) / steps) if fits else max(1, round(share))
        room, share = length - protected, even - protected
        if share <= 0 or length < 2 * share:
            return even
        low = share // self.beta
        high = 2 * share - low
        if high >= room:
            high, low = room, 2 * share - room
        return protected + high - layer * (high - low) // steps
