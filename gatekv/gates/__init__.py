"""Gates: small modules that give every token one logit per KV head; > 0 (at threshold .5) keeps it.

forward(what it reads [batch, tokens, width], valid [batch, tokens] or None, state or None) -> (logits, new state);
`reads` says what: "hidden", the layer's input, or "keys", `key_mlp.key_features`.
"""

from gatekv.config import GateSpec
from gatekv.gates.attention import AttentionGate
from gatekv.gates.gate import Gate
from gatekv.gates.key_mlp import KeyMLPGate
from gatekv.gates.linear import LinearGate
from gatekv.gates.mlp import MLPGate
from gatekv.gates.prompt import PromptGate

Form = type[AttentionGate | KeyMLPGate | LinearGate | MLPGate | PromptGate]
FORMS: dict[str, Form] = {"linear": LinearGate, "mlp": MLPGate, "key_mlp": KeyMLPGate, "attention": AttentionGate}


def build_gate(spec: GateSpec, hidden_size: int, num_kv_heads: int, head_dim: int) -> Gate:
    """The gate that `spec.gate` and `spec.context` name, in float32."""
    form: Form = PromptGate if spec.context == "prompt" else FORMS[spec.gate]
    width = 2 * num_kv_heads * head_dim if form.reads == "keys" else hidden_size
    return form(spec, width, num_kv_heads)
