"""A gate that reads keys: RMSNorm(key before RoPE) ⊕ RMSNorm(key after RoPE) -> MLP per KV head (WG-KV)."""

import torch
from torch import nn

from gatekv.config import GateSpec
from gatekv.gates.gate import Gate, State
from gatekv.rotary import Angles, unrotate


def key_features(keys: torch.Tensor, rotary: Angles | None) -> torch.Tensor:
    """What the gate reads: [batch, tokens, kv_heads · 2 · head_dim], each head's key before and after RoPE.

    Raises:
        ValueError: when the model hands no rotary embeddings to its attention.
    """
    if rotary is None:
        raise ValueError(
            "gate='key_mlp' reads keys before RoPE, and this model's attention gets no `position_embeddings`: use "
            "gate='mlp'."
        )
    both = torch.cat([unrotate(keys, rotary), keys], -1)
    return both.transpose(1, 2).flatten(2)


class KeyMLPGate(Gate):
    """One small MLP for each KV head, from the head's own key to its logit; streams without memory."""

    reads = "keys"

    def __init__(self, spec: GateSpec, width: int, num_kv_heads: int) -> None:
        super().__init__()
        self.heads = num_kv_heads
        self.head_dim = width // (2 * num_kv_heads)
        self.norm = nn.Parameter(torch.ones(num_kv_heads, 2, self.head_dim))
        self.up = nn.Parameter(torch.empty(num_kv_heads, 2 * self.head_dim, spec.hidden))
        self.up_bias = nn.Parameter(torch.zeros(num_kv_heads, spec.hidden))
        self.out_weight = nn.Parameter(torch.zeros(num_kv_heads, spec.hidden))
        self.out_bias = nn.Parameter(torch.full((num_kv_heads,), spec.initial_logit))
        bound = (2 * self.head_dim) ** -0.5
        nn.init.uniform_(self.up, -bound, bound)

    def judge(self, hidden: torch.Tensor, valid: torch.Tensor | None, state: State) -> tuple[torch.Tensor, State]:
        """hidden: `key_features` [batch, tokens, width] -> (logits [batch, kv_heads, tokens], no state)."""
        x = hidden.unflatten(2, (self.heads, 2, self.head_dim))
        x = nn.functional.rms_norm(x, (self.head_dim,), eps=1e-6) * self.norm
        x = torch.einsum("btkd,kdh->btkh", x.flatten(3), self.up) + self.up_bias
        logits = (nn.functional.gelu(x) * self.out_weight).sum(-1) + self.out_bias
        return logits.transpose(1, 2), None
