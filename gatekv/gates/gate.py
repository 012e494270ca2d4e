"""What all gates share: logits are judged in at least float32, whatever the dtype of the module or of autocast.

A logit is compared with a threshold once and for good; in bfloat16 many tokens share one logit.
"""

import torch
from torch import nn

from gatekv.precision import without_autocast

Tensor = torch.Tensor
State = tuple[Tensor, ...] | None


class _Judge(nn.Module):
    """Holds a gate, so that `functional_call` reaches its parameters without running its hooks a second time."""

    def __init__(self, gate: "Gate") -> None:
        super().__init__()
        self.gate = gate

    def forward(self, hidden: Tensor, valid: Tensor | None, state: State) -> tuple[Tensor, State]:
        return self.gate.judge(hidden, valid, state)


class Gate(nn.Module):
    """Base of the gates: each says in `judge` what its logits are, and is called like this one.

    Attributes:
        reads: "hidden", the layer's input, or "keys", `gatekv.gates.key_mlp.key_features`.
    """

    reads = "hidden"

    def judge(self, hidden: Tensor, valid: Tensor | None, state: State) -> tuple[Tensor, State]:
        """As `forward`; hidden, the state and the gate's parameters have one dtype, at least float32."""
        raise NotImplementedError

    def forward(self, hidden: Tensor, valid: Tensor | None = None, state: State = None) -> tuple[Tensor, State]:
        """Logits of new tokens.

        Args:
            hidden: [batch, tokens, width], what the gate reads.
            valid: [batch, tokens] bool, False at pads; None = all real.
            state: what the previous call returned, or None at the start of a sequence.

        Returns:
            logits [batch, kv_heads, tokens] in float32, or float64 if the gate has that, and the new state.
        """
        own = dict(self.named_parameters())
        acc = torch.float32
        for p in own.values():
            acc = torch.promote_types(acc, p.dtype)
        if state is not None:  # a gate may have changed its dtype since
            state = tuple(t.to(acc) if t.is_floating_point() else t for t in state)
        with without_autocast(hidden.device):
            hidden = hidden.to(acc)
            if all(p.dtype == acc for p in own.values()):
                return self.judge(hidden, valid, state)
            wide = {f"gate.{name}": p.to(acc) for name, p in own.items()}
            return torch.func.functional_call(_Judge(self), wide, (hidden, valid, state))
