"""Feature maps of LESS (arXiv 2402.09398, §3): φ(q)·ψ(k) stands for e^{q·k/√D} of an evicted key.

    φ(q) = |GELU(GELU(q W1) W2)|
    g(k) = |s1| ∘ GELU(GELU(k W1) W2),  ψ(k) = |g(k) + s2 ∘ (g(k) W3)|

No biases; dropout on the first product, in training. s1 = s2 = 1e-4 at first, so that training begins at the sparse
policy alone. Queries and keys come after RoPE, without the attention's scale. Where we leave the paper: it gives every
attention head both maps; here φ belongs to a query head, ψ (and the state) to a KV head that G query heads share, as
its multi-query variant does for all heads.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.functional import dropout, gelu

from gatekv.ops.naive import accumulation_dtype
from gatekv.precision import without_autocast

Tensor = torch.Tensor
TOKENS = 2048  # mapped at once: the hidden layer is wider than a head, and a prompt may be long
SMALL = 1e-4  # s1 and s2 at first


def _xavier(heads: int, rows: int, columns: int) -> nn.Parameter:
    """[heads, rows, columns], Xavier-uniform over each head's own matrix: torch would count the heads in the fan."""
    bound = (6 / (rows + columns)) ** 0.5
    return nn.Parameter(torch.empty(heads, rows, columns).uniform_(-bound, bound))


class FeatureMap(nn.Module):
    """What the maps share: one two-layer perceptron for each head, evaluated in at least float32."""

    of = "heads"
    _features: Callable[[Tensor], Tensor]  # of each kind: [batch, heads, tokens, head_dim] -> [..., rank]

    def __init__(
        self, heads: int, head_dim: int, rank: int, hidden: int, dropout: float, outputs: int | None = None
    ) -> None:
        super().__init__()
        for name, value in (("heads", heads), ("head_dim", head_dim), ("rank", rank), ("hidden", hidden)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1 (the paper: rank=8, hidden=512); got {value}.")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is a share of the hidden units, at least 0 and below 1; got {dropout}.")
        self.heads, self.head_dim, self.rank, self.dropout = heads, head_dim, rank, dropout
        self.w1 = _xavier(heads, head_dim, hidden)
        self.w2 = _xavier(heads, hidden, outputs or rank)

    def forward(self, x: Tensor) -> Tensor:
        """x: [batch, heads, tokens, head_dim] -> features >= 0 [batch, heads, tokens, rank], at least float32.

        Raises:
            ValueError: when x has other heads, or another width, than the map was made for.
        """
        if (x.shape[1], x.shape[3]) != (self.heads, self.head_dim):
            raise ValueError(
                f"x has {x.shape[1]} heads of width {x.shape[3]}, this map {self.heads} {self.of} of width "
                f"{self.head_dim}: give Phi the model's queries, Psi its keys, not repeated for the query heads."
            )
        with without_autocast(x.device):
            return torch.cat([self._features(part) for part in x.split(TOKENS, 2)], 2)

    def _products(self, x: Tensor) -> Tensor:
        """GELU(x W1) W2 [batch, heads, tokens, outputs]."""
        acc = torch.promote_types(accumulation_dtype(x), self.w1.dtype)
        first = dropout(x.to(acc) @ self.w1.to(acc), self.dropout, self.training)
        return gelu(first) @ self.w2.to(acc)


class Phi(FeatureMap):
    """φ, one for each query head.

    Args:
        heads: query heads. head_dim: of a query. rank: R, features of each head.
        hidden: width between the two products. dropout: share of the first product that is dropped in training.

    Raises:
        ValueError: a size below 1, dropout outside [0, 1).
    """

    of = "query heads"

    def __init__(self, heads: int, head_dim: int, rank: int = 8, hidden: int = 512, dropout: float = 0.3) -> None:
        super().__init__(heads, head_dim, rank, hidden, dropout)

    def _features(self, q: Tensor) -> Tensor:
        return gelu(self._products(q)).abs()


class Psi(FeatureMap):
    """ψ, one for each KV head. Arguments and errors as `Phi`'s, `heads` being KV heads."""

    of = "KV heads"

    def __init__(self, heads: int, head_dim: int, rank: int = 8, hidden: int = 512, dropout: float = 0.3) -> None:
        super().__init__(heads, head_dim, rank, hidden, dropout)
        self.w3 = _xavier(heads, rank, rank)
        self.s1 = nn.Parameter(torch.full((heads, rank), SMALL))
        self.s2 = nn.Parameter(torch.full((heads, rank), SMALL))

    def _features(self, k: Tensor) -> Tensor:
        x = gelu(self._products(k))
        s1, w3, s2 = (w.to(x.dtype) for w in (self.s1[:, None], self.w3, self.s2[:, None]))
        g = s1.abs() * x
        return (g + s2 * (g @ w3)).abs()
