"""Feature maps of the centroid form: evicted keys are softly sorted into R groups, and a query asks each group's mean.

    ψ_r(k) = softmax_r(a(k)) · e^{b(k)},  (a, b) = GELU(k W1) W2 / √D · 4
    φ_r(q) = e^{t q·k̄_r scale + c},  k̄_r = Σ ψ_r(k) k / Σ ψ_r(k)

Ours. In LESS (arXiv 2402.09398) φ is a perceptron of the query that has to guess e^{q·k} of keys it never sees; here it
is read off the state, which holds the keys' sums beside the values': R·(2 D + 1) numbers, so rank 4 costs what rank 8
does there. All sums add up token by token, in any order, as theirs do; t, c are numbers of each query head. Fresh maps
answer as merged tokens do, where LESS's begin at the policy alone.
"""

import torch
from torch import nn

from gatekv.less.features import FeatureMap
from gatekv.less.state import State
from gatekv.ops.naive import group_queries

Tensor = torch.Tensor
SHARP = 4.0  # with 1/√D, a first assignment that is neither even nor hard
FAR = 10.0  # most that one token may outweigh another, in nats


class CentroidPsi(FeatureMap):
    """ψ, one for each KV head: which groups a key belongs to, and how much it weighs. Arguments as `Psi`'s."""

    of = "KV heads"

    def __init__(self, heads: int, head_dim: int, rank: int = 4, hidden: int = 512, dropout: float = 0.0) -> None:
        super().__init__(heads, head_dim, rank, hidden, dropout, outputs=rank + 1)

    def _features(self, k: Tensor) -> Tensor:
        x = self._products(k) * (SHARP * self.head_dim**-0.5)
        return x[..., :-1].softmax(-1) * x[..., -1:].clamp(-FAR, FAR).exp()


class CentroidPhi(nn.Module):
    """φ, one for each query head: what it makes of a centroid's answer."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.sharpness = nn.Parameter(torch.ones(heads, 1, 1))
        self.bias = nn.Parameter(torch.zeros(heads, 1, 1))

    def forward(self, reach: Tensor, mass: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
        """reach, mass: [batch, heads, queries, rank], Σ ψ q·k and Σ ψ; see `gatekv.ops.naive.remainder_reach`.

        Returns (features >= 0 [batch, heads, queries, rank], what to add to the log-sum-exp of an answer made with them
        [batch, heads, queries]): they are divided by their largest, so that none overflows.
        """
        tiny = torch.finfo(mass.dtype).tiny
        said = reach / mass.clamp_min(tiny) * scaling
        logits = said * self.sharpness.to(said.dtype) + self.bias.to(said.dtype)
        logits = torch.where(mass > tiny, logits, torch.finfo(mass.dtype).min / 2)  # a group of no key has no say
        shift = logits.detach().amax(-1, keepdim=True)
        return (logits - shift).exp(), shift[..., 0]

    def ask(self, q: Tensor, state: State, scaling: float) -> tuple[Tensor, Tensor]:
        """The answer of a state's groups as of tokens that weigh their mass: that of `forward` and `State.segment`.

        Means are never made, nor held beside the sums: queries are divided by the mass instead, which is small.
        q: [batch, heads, queries, head_dim]. Returns (output, shaped as q, log-sum-exp [batch, heads, queries]),
        (0, -inf) while nothing is folded.
        """
        assert state.m is not None
        (b, h, n, d), kv, acc = q.shape, state.z.shape[1], state.z.dtype
        info = torch.finfo(acc)
        x = group_queries(q.to(acc) * (self.sharpness.to(acc) * scaling), kv)  # [b, kv, group, n, d]
        each = state.z.clamp_min(info.tiny).reciprocal()[:, :, None, None]
        logits = x @ state.m[:, :, None].transpose(-1, -2) * each + self.bias.to(acc).view(kv, -1, 1, 1)
        logits = logits + state.z.log()[:, :, None, None]
        lse = logits.logsumexp(-1, keepdim=True)
        out = ((logits - lse.clamp_min(info.min)).exp() * each) @ state.h[:, :, None]
        return out.view(b, h, n, d), lse.view(b, h, n)
