"""What a width and a remainder are asked, and what a policy says it needs."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Self

if TYPE_CHECKING:
    from torch import Tensor

    from gatekv.cache.segments.pages import Pages
    from gatekv.cache.segments.remainder import Remainder
    from gatekv.cache.segments.segment import Shape
    from gatekv.cache.segments.width import Narrow


class Width:
    """How old tokens are stored. Subclasses are dataclasses.

    Attributes:
        window: the last queries that a prompt's end looks at, and the last tokens that stay whole.
        sinks: the first tokens that stay whole. allots: it says itself which tokens stay, under a budget of bytes
        (`gatekv.policies.rate`). utility: for that it wants scores that are attention, or a gate's.
    """

    window: int = 32
    sinks: int = 0
    allots = utility = False

    def least(self, protected: "Tensor", head_dim: int, itemsize: int) -> "Tensor":
        """In whole tokens, what the last `protected` [...], which stay, cost at least; numbers of itemsize bytes."""
        return protected

    def segment(self, pages: "Pages") -> "Narrow":
        """Where old tokens go in one layer, beside its pages."""
        raise NotImplementedError

    def forecast_bytes(self, shape: "Shape", tokens: float) -> int:
        """Bytes of one layer's old tokens, so many a head."""
        raise NotImplementedError

    def share(self, head_dim: int, itemsize: int) -> float:
        """Bytes of an old token's key and value, of those of a whole one with numbers of itemsize bytes."""
        raise NotImplementedError

    def fit(self, ratio: float, length: int, head_dim: int, itemsize: int, evicts: bool) -> tuple[Self, float]:
        """(width, share of the tokens to keep) for `ratio` of the bytes of a prompt of `length` tokens.

        evicts: whether tokens may go; their share is 1 where all fit. A width that can itself give way overrides this.

        Raises:
            ValueError: there is no such share ("unreachable").
        """
        cost = self.share(head_dim, itemsize)
        kept = (ratio - self.window / length * (1 - cost)) / cost
        if kept <= 0:
            raise ValueError(f"budget {ratio} is unreachable: {self.window} of {length} tokens keep their full width.")
        if kept < 1 and not evicts:
            raise ValueError(f"budget {ratio} is unreachable: all tokens cost more, and this policy evicts none.")
        return self, min(kept, 1.0)


class RemainderPolicy:
    """What becomes of evicted tokens. Subclasses are dataclasses.

    Attributes:
        maps: it needs an adapter's low-rank maps.
    """

    maps = False

    def segment(self) -> "Remainder":
        """What takes evicted tokens in, in one layer."""
        raise NotImplementedError


@dataclass(frozen=True)
class Needs:
    """What a policy needs of whoever runs it; nobody asks which classes it is made of.

    Attributes:
        queries: of the prompt's last, how many a decision at its end looks at. gate: an adapter's gate, which reads
        tokens as they come. maps: an adapter's low-rank maps. rotary: positions as RoPE's (cos, sin). attention: what
        each step's query pays to what is held. kinds: what each token of the prompt is. scope: who must have seen the
        prompt before anything is decided.
    """

    queries: int
    gate: bool
    maps: bool
    rotary: bool
    attention: bool
    kinds: bool
    scope: Literal["token", "layer", "model"]
