"""The gate of Attention-Gate (arXiv 2410.12876): a reduced multi-head attention, then a linear gating function.

The paper's MHA' reads the whole prompt (gatekv.gates.prompt); a causal one with a memory over all tokens would cost a
sixth of the cache it saves. Ours looks back on the last `context_window` tokens, a ring of constant size. Its size and
its relative-position bias are our choice: the paper gives neither.
"""

import torch
from torch import nn

from gatekv.config import GateSpec
from gatekv.gates.gate import Gate, State
from gatekv.ops.order import along, order_of


class AttentionGate(Gate):
    """Causal multi-head attention over the last `context_window` tokens -> Linear -> one logit per KV head."""

    def __init__(self, spec: GateSpec, width: int, num_kv_heads: int) -> None:
        super().__init__()
        self.heads, self.head_dim, self.context = spec.heads, spec.head_dim, spec.context_window
        inner = spec.heads * spec.head_dim
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * inner)
        self.distance = nn.Parameter(torch.zeros(spec.heads, spec.context_window))
        self.out = nn.Linear(inner, num_kv_heads)
        nn.init.zeros_(self.out.weight)
        nn.init.constant_(self.out.bias, spec.initial_logit)

    def judge(self, hidden: torch.Tensor, valid: torch.Tensor | None, state: State) -> tuple[torch.Tensor, State]:
        """Logits of new tokens, given the ring of the ones before them.

        Args:
            hidden: [batch, tokens, width].
            valid: [batch, tokens] bool, False at pads, which stand before the others where there is a state; None = all
                real.
            state: what the previous call returned, or None at the start of a sequence.

        Returns:
            logits [batch, kv_heads, tokens], and the new state: (k', v' [batch, ring, heads, head_dim],
            valid [batch, ring]) of the last `context_window - 1` tokens.
        """
        x = self.norm(hidden)
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, self.head_dim).unbind(2)
        valid = hidden.new_ones(b, n, dtype=torch.bool) if valid is None else valid
        past = self.context - 1
        begun = state is not None
        if state is None:  # an empty ring is a ring of invalid tokens, so every call has the same shape of work
            empty = k.new_zeros(b, past, self.heads, self.head_dim)
            state = (empty, empty, valid.new_zeros(b, past))
        k, v, valid = (torch.cat([old, new], 1) for old, new in zip(state, (k, v, valid)))
        if begun:  # pads between the ring and new tokens are no distance
            order = order_of(valid)
            k, v, valid = (along(t, order, 1) for t in (k, v, valid))
        out = self._banded(q, k, v, valid)
        last = slice(k.shape[1] - past, None)  # cloned: a view would keep the whole prompt alive
        ring = k[:, last].clone(), v[:, last].clone(), valid[:, last].clone()
        return self.out(out.flatten(2)).transpose(1, 2), ring

    def _banded(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        """Query t reads ring slots t .. t + context - 1. Blocks of `context` queries: O(tokens · 2·context) memory."""
        b, n, h, d = q.shape
        c = self.context
        blocks = -(-n // c)
        q = nn.functional.pad(q, (0, 0, 0, 0, 0, blocks * c - n)).view(b, blocks, c, h, d)
        pad = blocks * c + c - k.shape[1]
        k, v = (nn.functional.pad(t, (0, 0, 0, 0, 0, pad)) for t in (k, v))
        valid = nn.functional.pad(valid, (0, pad))
        k, v, valid = (t.unfold(1, 2 * c, c) for t in (k, v, valid))  # [b, blocks, h, d, 2c] and [b, blocks, 2c]
        s = torch.einsum("bnqhd,bnhdt->bnhqt", q, k) * d**-0.5
        distance = c - 1 + torch.arange(c, device=q.device)[:, None] - torch.arange(2 * c, device=q.device)
        inside = (distance >= 0) & (distance < c)
        s = s + self.distance[:, distance.clamp(0, c - 1)]
        s = s.masked_fill(~(inside & valid[:, :, None, None]), torch.finfo(s.dtype).min)
        return torch.einsum("bnhqt,bnhdt->bnqhd", s.softmax(-1), v).reshape(b, blocks * c, h, d)[:, :n]
