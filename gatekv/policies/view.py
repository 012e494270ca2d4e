"""What a scorer may look at when it decides."""

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass
class View:
    """One layer's tokens at the moment of decision. All tensors are on the model's device.

    Attributes:
        keys, values: [batch, kv_heads, tokens, head_dim], post-RoPE.
        queries: [batch, heads, last, head_dim], the last `last` tokens' queries, post-RoPE.
        valid: [batch, tokens] bool, False at pads (pads are on the left).
        scaling: factor on the attention logits. layer_idx: of the layer.
        gate_logits: () -> [batch, kv_heads, tokens], computed on demand; raises if the model carries no gate.
    """

    keys: torch.Tensor
    values: torch.Tensor
    queries: torch.Tensor
    valid: torch.Tensor
    scaling: float
    layer_idx: int
    gate_logits: Callable[[], torch.Tensor]
