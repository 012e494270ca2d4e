"""The smallest gate: RMSNorm -> Linear, one logit per KV head (DMS, arXiv 2506.05345; KVzap-Linear)."""

import torch
from torch import nn

from gatekv.config import GateSpec
from gatekv.gates.gate import Gate, State


class LinearGate(Gate):
    """Reads a layer's input hidden states token by token; its logit is `logit_scale` · linear + bias."""

    def __init__(self, spec: GateSpec, width: int, num_kv_heads: int) -> None:
        super().__init__()
        self.scale = spec.logit_scale
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.out = nn.Linear(width, num_kv_heads)
        nn.init.zeros_(self.out.weight)
        nn.init.constant_(self.out.bias, spec.initial_logit / spec.logit_scale)

    def judge(self, hidden: torch.Tensor, valid: torch.Tensor | None, state: State) -> tuple[torch.Tensor, State]:
        """hidden [batch, tokens, width] -> (logits [batch, kv_heads, tokens], no state)."""
        return self.out(self.norm(hidden)).transpose(1, 2) * self.scale, None
