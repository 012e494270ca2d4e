"""Evicted tokens in a low-rank state (LESS, arXiv 2402.09398), which every later token queries."""

from typing import TYPE_CHECKING, cast

import torch

from gatekv.cache.segments.pages import Pages, Tokens
from gatekv.cache.segments.remainder import Remainder
from gatekv.cache.segments.segment import Shape
from gatekv.less.maps import LessMaps, Waiting
from gatekv.less.state import State
from gatekv.ops.remainder import left_of
from gatekv.support import LATER

if TYPE_CHECKING:
    from gatekv.cache.segments.window import RecentWindow

Tensor = torch.Tensor


class LowRank(Remainder):
    """The state of one layer, and the maps in force.

    Attributes:
        state: sums over what was evicted, or None before the first call. maps: `LessMaps`, of the model.
    """

    saved = ("state",)
    borrowed = ("maps",)
    later = True

    def __init__(self) -> None:
        self.state: State | None = None
        self.maps: LessMaps = LATER

    def use(self, maps: LessMaps | None, window: "RecentWindow | None" = None) -> None:
        if maps is None:
            raise ValueError("the adapter was disabled or unloaded while this cache was in use; enable it again.")
        self.maps = maps
        if self.state is None and window is not None:
            self.state = maps.state(window.values)

    def features(self, keys: Tensor) -> Tensor:
        return self.maps.psi(keys)

    def takes(self, features: Tensor | None) -> bool:
        return features is not None

    def fold(self, store: Pages, evicted: Tokens, features: Tensor | None = None) -> None:
        state = cast(State, self.state)
        keys, values, held = (t.unflatten(0, (len(state.z), -1)) for t in (evicted.keys, evicted.values, evicted.held))
        state.fold(self.maps.psi(keys) if features is None else features, keys, values, held)

    def answers(self, q: Tensor, scale: float, window: "RecentWindow | None" = None, mask: Tensor | None = None,
                delay: int = 0) -> list[tuple[Tensor, Tensor]]:  # fmt: skip
        waiting = None
        if window is not None and window.psi is not None:
            waiting = Waiting(window.psi, window.keys, window.values, left_of(window.flags, delay), mask)
        return self.maps.answer(q, scale, self.state, waiting)

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        if tensors:
            self.state = State(tensors["state.h"], tensors["state.z"].shape[-1])
        super().load_state_dict(tensors)

    def forecast_bytes(self, shape: Shape, waiting: int) -> int:
        spec, acc = self.maps.spec, torch.promote_types(shape.dtype, torch.float32).itemsize
        return shape.rows * acc * (spec.state_numbers(shape.head_dim) + waiting * spec.less_rank)
