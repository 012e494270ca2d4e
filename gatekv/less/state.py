"""The low-rank state of one layer (LESS, arXiv 2402.09398, §3): what was evicted, in R·(D + 1) numbers a KV head.

With sums of keys too, for the centroid form, R·(2 D + 1).
"""

import torch

from gatekv.ops.naive import accumulation_dtype, group_queries, normalised
from gatekv.parts import Part

Tensor = torch.Tensor


class State(Part):
    """Sums over the evicted tokens: a memory that answers queries with (output, lse).

    Attributes:
        h: [batch, kv_heads, rank, head_dim], Σ ψ(k)ᵀ v. z: [batch, kv_heads, rank], Σ ψ(k). At least float32.
        m: as h, Σ ψ(k)ᵀ k, or None.
    """

    saved = ("h", "z", "m")

    def __init__(self, like: Tensor, rank: int, keys: bool = False) -> None:
        """An empty state; `like` [batch, kv_heads, tokens, head_dim], values, gives shapes, dtype and device; keys: sum
        up keys too.

        Raises:
            ValueError: when rank is below 1.
        """
        if rank < 1:
            raise ValueError(f"rank must be at least 1 (the paper: 8), that of Phi and Psi; got {rank}.")
        b, kv, _, d = like.shape
        self.h = torch.zeros(b, kv, rank, d, dtype=accumulation_dtype(like), device=like.device)
        self.z = self.h.new_zeros(b, kv, rank)
        self.m: Tensor | None = torch.zeros_like(self.h) if keys else None

    def fold(self, psi: Tensor, k: Tensor, v: Tensor, gone: Tensor) -> None:
        """Add the flagged tokens; nothing ever comes back, and the order in which tokens are folded means nothing.

        psi: [batch, kv_heads, n, rank]; k, v: [batch, kv_heads, n, head_dim], finite everywhere; gone: bool [batch,
        kv_heads, n].

        Raises:
            ValueError: when psi's heads or rank are not the state's.
        """
        self._check("psi", psi, "as Psi returns it for the model's keys")
        if psi.shape[1] != self.h.shape[1]:
            raise ValueError(
                f"psi has {psi.shape[1]} heads, the state {self.h.shape[1]} KV heads: use Psi of this layer."
            )
        psi = psi.to(self.h.dtype).masked_fill(~gone[..., None], 0)
        self.h = self.h + psi.transpose(-1, -2) @ v.to(self.h.dtype)
        self.z = self.z + psi.sum(2)
        if self.m is not None:
            self.m = self.m + psi.transpose(-1, -2) @ k.to(self.h.dtype)

    def reach(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """(Σ ψ(k) q·k, Σ ψ(k)), both [batch, heads, queries, rank], for q [batch, heads, queries, head_dim]."""
        assert self.m is not None, "reach is of the centroid form, whose state sums keys too"
        kv, (b, h, n, _) = self.h.shape[1], q.shape
        said = group_queries(q.to(self.h.dtype), kv).flatten(2, 3) @ self.m.transpose(-1, -2)
        mass = self.z[:, :, None].expand(-1, -1, h // kv * n, -1)
        return said.reshape(b, h, n, -1), mass.reshape(b, h, n, -1)

    def segment(self, phi: Tensor) -> tuple[Tensor, Tensor]:
        """What the evicted tokens answer: phi [batch, heads, queries, rank] -> (out [batch, heads, queries, head_dim],
        lse [batch, heads, queries]), (0, -inf) while nothing is folded; all queries see all of the state.

        Raises:
            ValueError: when phi's heads are no multiple of the KV heads, or its rank is not the state's.
        """
        self._check("phi", phi, "as Phi returns it for the model's queries")
        (b, h, n, _), kv = phi.shape, self.h.shape[1]
        if h % kv:
            raise ValueError(f"phi has {h} heads, no multiple of the state's {kv} KV heads: use Phi of this layer.")
        x = group_queries(phi.to(self.h.dtype), kv).flatten(2, 3)
        out, lse = normalised(x @ self.h, (x @ self.z[..., None])[..., 0])
        return out.view(b, h, n, -1), lse.view(b, h, n)

    def _check(self, name: str, features: Tensor, cure: str) -> None:
        batch, _, rank, _ = self.h.shape
        if (features.shape[0], features.shape[3]) != (batch, rank):
            raise ValueError(
                f"{name} is for {features.shape[0]} sequences at rank {features.shape[3]}, the state for {batch} at "
                f"rank {rank}: give it {cure}."
            )
