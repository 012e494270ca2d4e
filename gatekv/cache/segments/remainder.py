"""What becomes of evicted tokens: they are forgotten, unless a subclass takes them in."""

from typing import TYPE_CHECKING

import torch

from gatekv.cache.segments.segment import Shape
from gatekv.parts import Part

if TYPE_CHECKING:
    from gatekv.cache.segments.pages import Pages, Tokens
    from gatekv.cache.segments.window import RecentWindow
    from gatekv.less.maps import LessMaps

Tensor = torch.Tensor


class Remainder(Part):
    """Evicted tokens are forgotten. Subclasses sum them up beside the pages (`LowRank`), or merge them into what the
    pages hold (`Merge`).

    Attributes:
        later: takes what leaves the pages while decoding, too. counts: pages count what each token stands for.
    """

    later = False
    counts = False

    def use(self, maps: "LessMaps | None", window: "RecentWindow | None" = None) -> None:
        """Every call brings the adapter's low-rank maps; window: of the layer.

        Raises:
            ValueError: they are not there any more.
        """

    def features(self, keys: Tensor) -> Tensor | None:
        """[batch, kv_heads, n, rank] that the window holds for tokens which may be evicted from it, of their keys
        [batch, kv_heads, n, head_dim]."""
        return None

    def takes(self, features: Tensor | None) -> bool:
        """Whether it has a use for what leaves the window, whose features are these."""
        return False

    def fold(self, store: "Pages", evicted: "Tokens", features: Tensor | None = None) -> None:
        """Take tokens that have left `store`, or the window before they came there; their features, where known."""

    def answers(self, q: Tensor, scale: float, window: "RecentWindow | None" = None, mask: Tensor | None = None,
                delay: int = 0) -> list[tuple[Tensor, Tensor]]:  # fmt: skip
        """[(output, log-sum-exp)] beside those of the store, to queries q [batch, heads, queries, head_dim].

        window: whose unflagged tokens are answered for too, once they are `delay` tokens old; None: all of them are
        seen still. mask: [batch, 1, queries, window's tokens] bool, or None.
        """
        return []

    def forecast_bytes(self, shape: Shape, waiting: int) -> int:
        """Bytes that one layer's will hold, beside `waiting` tokens in the window that can be evicted."""
        return 0
