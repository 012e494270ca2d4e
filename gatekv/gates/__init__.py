"""Gates: small modules that give every token one logit per KV head; > 0 (at threshold .5) keeps it."""

from torch import nn

from gatekv.config import GateSpec
from gatekv.gates.attention import AttentionGate
from gatekv.gates.mlp import MLPGate

FORMS = {"mlp": MLPGate, "attention": AttentionGate}


def build_gate(spec: GateSpec, hidden_size: int, num_kv_heads: int) -> nn.Module:
    """The gate that `spec.gate` names, in float32."""
    return FORMS[spec.gate](spec, hidden_size, num_kv_heads)
