"""LESS (arXiv 2402.09398): what is evicted is folded into a low-rank state that every later token still queries."""

from dataclasses import dataclass

from gatekv.cache.segments.lowrank import LowRank
from gatekv.policies.parts import RemainderPolicy


@dataclass
class Less(RemainderPolicy):
    """The remainder of any policy; needs an adapter with low-rank maps. See `gatekv.less`."""

    maps = True

    def segment(self) -> LowRank:
        """What takes evicted tokens in, in one layer."""
        return LowRank()
