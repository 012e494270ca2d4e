"""A scorer of your own: what is attended to counts by how much it says (after VATP, arXiv 2406.12335)."""

from dataclasses import dataclass

import torch

from gatekv.policies import Scorer, View, register_policy
from gatekv.policies.snapkv import window_attention


@dataclass
class ValueAware(Scorer):
    """score = attention from the prompt's last queries · sum of the value's absolute numbers.

    Args:
        window: the last queries, whose tokens are protected. sinks: first tokens that are. Both numbers are ours.
    """

    window: int = 32
    sinks: int = 4

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"window counts the queries that are looked at, at least 1; got {self.window}.")
        self.queries = self.window  # so many are remembered until the prompt ends

    def score(self, view: View) -> torch.Tensor:
        asked = min(self.window, view.keys.shape[2])
        attention = window_attention(view, asked).sum(-2).mean(2)  # over queries, then over the heads of a group
        return attention * view.values.float().abs().sum(-1)


register_policy("value_aware", ValueAware)
