"""The gate of Attention-Gate (arXiv 2410.12876) as the paper has it: MHA' over the whole prompt, later tokens included.

Flags of a prompt can depend on all of it only once it is whole: such a gate judges in one call, refuses a prompt in
chunks, and keeps everything that follows. It is trained at split points, so that no flag sees what the loss predicts.
"""

import torch
from torch import nn

from gatekv.config import GateSpec
from gatekv.gates.gate import Gate, State


class PromptGate(Gate):
    """Multi-head attention among all tokens of a prompt -> Linear -> one logit per KV head."""

    def __init__(self, spec: GateSpec, width: int, num_kv_heads: int) -> None:
        super().__init__()
        self.heads, self.head_dim = spec.heads, spec.head_dim
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * spec.heads * spec.head_dim)
        self.out = nn.Linear(spec.heads * spec.head_dim, num_kv_heads)
        nn.init.zeros_(self.out.weight)
        nn.init.constant_(self.out.bias, spec.initial_logit)

    def judge(self, hidden: torch.Tensor, valid: torch.Tensor | None, state: State) -> tuple[torch.Tensor, State]:
        """hidden [batch, tokens, width], valid [batch, tokens] bool -> (logits [batch, kv_heads, tokens], no state)."""
        x = self.norm(hidden)
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        mask = None if valid is None else valid[:, None, None]
        out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(out.transpose(1, 2).flatten(2)).transpose(1, 2), None
