"""The maps of one layer, and the answer of everything it evicted: what is folded, and what waits to be."""

from typing import NamedTuple, cast

import torch
from torch import nn

from gatekv.config import LessSpec
from gatekv.less.centroids import CentroidPhi, CentroidPsi
from gatekv.less.features import Phi, Psi
from gatekv.less.state import State
from gatekv.ops import naive, remainder

Tensor = torch.Tensor


class Waiting(NamedTuple):
    """Tokens that leave, or have left, but are in no state: the last queries are among them.

    Attributes:
        psi: [batch, kv_heads, tokens, rank]. keys, values: [batch, kv_heads, tokens, head_dim].
        left: [batch, kv_heads, tokens], when each leaves, and mask: see `gatekv.ops.naive.remainder_segment`.
    """

    psi: Tensor
    keys: Tensor
    values: Tensor
    left: Tensor
    mask: Tensor | None


class LessMaps(nn.Module):
    """φ and ψ of one layer, as `spec` (`gatekv.config.LessSpec`) says: LESS's kernel, or centroids."""

    def __init__(self, spec: LessSpec, heads: int, kv_heads: int, head_dim: int) -> None:
        super().__init__()
        sizes = (head_dim, spec.less_rank, spec.less_hidden, spec.less_dropout)
        self.spec, self.centroids = spec, spec.less_form == "centroids"
        self.phi = CentroidPhi(heads) if self.centroids else Phi(heads, *sizes)
        self.psi = CentroidPsi(kv_heads, *sizes) if self.centroids else Psi(kv_heads, *sizes)

    def state(self, like: Tensor) -> State:
        """An empty state for a cache like `like` [batch, kv_heads, tokens, head_dim]."""
        return State(like, self.spec.less_rank, keys=self.centroids)

    def answer(
        self, q: Tensor, scaling: float, state: State | None, waiting: Waiting | None = None
    ) -> list[tuple[Tensor, Tensor]]:
        """[(output [batch, heads, queries, head_dim], log-sum-exp [batch, heads, queries])] of the state's tokens and
        of those that wait, for queries q [batch, heads, queries, head_dim]; no part where there is neither.

        Where φ depends on the keys, it depends on both parts, so that it never matters when a token is folded.
        """
        ops = naive if q.shape[2] == 1 else remainder  # a lone query is no chunk
        if self.centroids and waiting is None:
            return [cast(CentroidPhi, self.phi).ask(q, cast(State, state), scaling)]
        if self.centroids:
            said = [] if state is None else [state.reach(q)]
            if waiting is not None:
                said.append(ops.remainder_reach(q, waiting.keys, waiting.psi, waiting.left, mask=waiting.mask))
            reach, mass = (sum(part) for part in zip(*said))
            phi, shift = self.phi(reach, mass, scaling)
        else:
            phi, shift = self.phi(q), 0
        parts = [] if state is None else [state.segment(phi)]
        if waiting is not None:
            parts.append(ops.remainder_segment(phi, waiting.psi, waiting.values, waiting.left, mask=waiting.mask))
        return [(out, lse + shift) for out, lse in parts]
