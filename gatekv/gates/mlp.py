"""Token-wise gate: RMSNorm -> Linear -> GELU -> Linear, one logit per KV head."""

import torch
from torch import nn

from gatekv.config import GateSpec
from gatekv.gates.gate import Gate, State


class MLPGate(Gate):
    """Reads a layer's input hidden states token by token; needs no memory of its own while streaming."""

    def __init__(self, spec: GateSpec, width: int, num_kv_heads: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.up = nn.Linear(width, spec.hidden)
        self.out = nn.Linear(spec.hidden, num_kv_heads)
        nn.init.zeros_(self.out.weight)
        nn.init.constant_(self.out.bias, spec.initial_logit)

    def judge(self, hidden: torch.Tensor, valid: torch.Tensor | None, state: State) -> tuple[torch.Tensor, State]:
        """hidden [batch, tokens, width] -> (logits [batch, kv_heads, tokens], no state)."""
        x = nn.functional.gelu(self.up(self.norm(hidden)))
        return self.out(x).transpose(1, 2), None
