"""The attention function and mask function registered with transformers, and the law they keep.

The law (one rule for training and inference): for query i and key j <= i in one KV head, j is live iff i - j <
max(window, 1), or flag[j] = keep (sinks are flagged). Training applies it as a weight, the cache by really evicting.
"""

import sys
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from gatekv.gates.relaxations import RELAXATIONS
from gatekv.ops.gated_attention import gated_attention, received_attention

NAMES = {"sdpa": "gatekv", "eager": "gatekv_eager"}


@runtime_checkable
class Memory(Protocol):
    """A cache layer that answers attention itself (gatekv.cache.layer.KVLayer)."""

    def attend(self, call: "AttentionCall", q, k, v, mask, scaling: float) -> torch.Tensor: ...


@dataclass
class AttentionCall:
    """What the wrapper around self_attn hands to the attention function, beside q, k, v.

    Attributes:
        hidden: [batch, tokens, hidden_size], the layer's input. layer_idx: of the layer.
        memory: the gatekv cache layer, or None for the parallel form.
        gate: the active gate module or None; spec: its GateSpec; form: key of RELAXATIONS for the parallel form,
        applied to logits - threshold; "listen" = plain attention, the gate only judges.
        record: called with the parallel form's (logits [batch, kv_heads, tokens], valid [batch, tokens]).
    """

    hidden: torch.Tensor
    layer_idx: int
    memory: Memory | None = None
    gate: torch.nn.Module | None = None
    spec: object = None
    form: str = "hard"
    threshold: torch.Tensor | float = 0.0
    record: object = None

    def listen(self, q, k, mask, scaling: float) -> None:
        """Leave the plain output alone; record what the gate says and what attention each token really receives."""
        valid = valid_tokens(mask, q.shape[0], q.shape[2], q.device)
        with torch.enable_grad():
            logits, _ = self.gate(self.hidden.detach(), k.detach(), valid)
        self.record(logits, valid, received_attention(q, k, window=self.spec.window, scale=scaling, mask=mask))

    def parallel(self, q, k, v, mask, scaling: float) -> torch.Tensor:
        """One pass over whole sequences with the gates as weights: the form that is trained."""
        valid = valid_tokens(mask, q.shape[0], q.shape[2], q.device)
        logits, _ = self.gate(self.hidden, k, valid)
        self.record(logits, valid)
        weight = RELAXATIONS[self.form](logits - self.threshold)
        weight = weight.masked_fill(sink_tokens(valid, self.spec.sinks)[:, None], 1.0)
        return gated_attention(q, k, v, weight, window=self.spec.window, scale=scaling, mask=mask)


def valid_tokens(mask: torch.Tensor | None, batch: int, new: int, device) -> torch.Tensor:
    """[batch, new] bool: which of the new tokens are real, read off the last query's row of the mask."""
    if mask is None:
        return torch.ones(batch, new, dtype=torch.bool, device=device)
    return mask[:, 0, -1, -new:].expand(batch, new)


def sink_tokens(valid: torch.Tensor, sinks: int, seen_real: torch.Tensor | int = 0) -> torch.Tensor:
    """[batch, tokens] bool: the first `sinks` real tokens of each row; seen_real [batch, 1] came before."""
    return valid & (valid.long().cumsum(-1) + seen_real <= sinks)


def live_mask(q_slots: torch.Tensor, k_slots: torch.Tensor, flags: torch.Tensor, window: int) -> torch.Tensor:
    """The law as a mask: [batch, kv_heads, queries, keys]; flags [batch, kv_heads, keys]; causality is not its part."""
    return (q_slots[:, None] - k_slots < max(window, 1)) | flags[:, :, None]


def _as_bool(mask: torch.Tensor | None) -> torch.Tensor | None:
    """Eager masks are additive; the law needs to know only what is visible."""
    return mask if mask is None or mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def _forward(base: str):
    def attention(module, q, k, v, mask, *, scaling: float, gatekv: AttentionCall | None = None, **kwargs):
        if gatekv is None or gatekv.form == "listen":
            if gatekv is not None:
                gatekv.listen(q, k, _as_bool(mask), scaling)
            plain = ALL_ATTENTION_FUNCTIONS.get(base) or sys.modules[type(module).__module__].eager_attention_forward
            return plain(module, q, k, v, mask, scaling=scaling, **kwargs)
        mask = _as_bool(mask)
        if gatekv.memory is not None:
            out = gatekv.memory.attend(gatekv, q, k, v, mask, scaling)
        else:
            out = gatekv.parallel(q, k, v, mask, scaling)
        return out.transpose(1, 2).contiguous(), None

    return attention


def register() -> None:
    """Make the implementations known to transformers: the mask function too, else padding is silently lost."""
    for base, name in NAMES.items():
        AttentionInterface.register(name, _forward(base))
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
