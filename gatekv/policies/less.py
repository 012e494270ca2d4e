"""LESS (arXiv 2402.09398): what is evicted is folded into a low-rank state that every later token still queries."""

from dataclasses import dataclass


@dataclass
class Less:
    """The remainder of any policy; needs an adapter with low-rank maps. See `gatekv.less`."""
