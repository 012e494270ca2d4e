"""D2O's layers (arXiv 2406.13035, §3.2): where attention is sharp little room is needed, where it is spread much."""

from dataclasses import dataclass

import torch

from gatekv.policies.layers import Layers


@dataclass
class Variance(Layers):
    """Rooms in proportion to exp(-F / mean F), with F the variance over tokens of the attention that they receive.

    F is over shares of a head's sum, times the number of tokens, and the mean over heads; dividing by the mean over
    layers makes it a number without a scale (the raw variance grows with the prompt, and a softmax of it would give
    one layer everything). No layer gets more than the prompt, or less than `floor` of an even share or what is
    protected; the others share the rest. Every layer must have seen the prompt first.

    Args:
        floor: share of an even room that each layer is sure of (ours: without it a layer can be left with nothing).
    """

    floor: float = 0.2
    scope = "model"

    def __post_init__(self) -> None:
        if not 0 <= self.floor <= 1:
            raise ValueError(f"floor is the share of an even room that a layer is sure of, 0 to 1; got {self.floor}.")

    def weights(self, scores: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        """[layers, batch] from attention received [layers, batch, kv_heads, tokens] and valid [batch, tokens].

        Raises:
            ValueError: when scores are negative, so that they are no attention.
        """
        real = valid[:, None]
        if bool(((scores < 0) & real).any()):
            raise ValueError(
                "layers='variance' reads attention that tokens receive, and these scores are none: use it with d2o, "
                "h2o, tova or snapkv, or take even."
            )
        shares = scores.double().masked_fill(~real, 0)
        count = valid.sum(-1)[:, None, None]
        shares = shares * count / shares.sum(-1, keepdim=True).clamp_min(1e-12)
        spread = ((shares - 1).square() * real).sum(-1).div(count[..., 0]).mean(-1)
        return (-spread / spread.mean(0).clamp_min(1e-12)).exp()

    def rooms(self, weights: list[float], ratio: float, length: int, protected: int) -> list[int]:
        """Tokens per head of each layer: in proportion to the weights within bounds, on average ratio · length, rounded
        down."""
        even = ratio * length
        low, high = min(max(float(protected), self.floor * even), even), float(length)
        rooms, left, open_ = [0.0] * len(weights), even * len(weights), set(range(len(weights)))
        while open_:  # settle whoever is past the bound that is broken most, and share the rest anew
            share = {i: left * weights[i] / sum(weights[j] for j in open_) for i in open_}
            over, under = {i for i in open_ if share[i] > high}, {i for i in open_ if share[i] < low}
            if sum(share[i] - high for i in over) < sum(low - share[i] for i in under):
                settled = dict.fromkeys(under, low)
            else:
                settled = dict.fromkeys(over, high) or share
            for i, room in settled.items():
                rooms[i] = room
            left, open_ = left - sum(settled.values()), open_ - set(settled)
        return [int(room + 1e-6) for room in rooms]
