"""How products of queries and keys become logits: a factor, and in some models a cap (Gemma 2, arXiv 2408.00118)."""

import torch


class Scale(float):
    """The factor, with which all code computes as with any number; every product goes through `capped` too.

    Attributes:
        cap: logits are cap · tanh(product · factor / cap); None: they are product · factor.
    """

    cap: float | None

    def __new__(cls, factor: float, cap: float | None = None) -> "Scale":
        made = super().__new__(cls, factor)
        made.cap = cap
        return made

    def __getnewargs__(self) -> tuple[float, float | None]:  # type: ignore[override]  # what copying and pickling need
        return float(self), self.cap


def cap_of(scale: float) -> float | None:
    """Of a `Scale`; None of any other number."""
    return getattr(scale, "cap", None)


def capped(s: torch.Tensor, scale: float) -> torch.Tensor:
    """Logits from products that have the factor already, of any shape."""
    cap = cap_of(scale)
    return s if cap is None else (s / cap).tanh() * cap
