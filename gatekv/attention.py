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
        answered: set by the attention function; a model that never calls it would go on without a word.
    """

    hidden: torch.Tensor
    layer_idx: int
    memory: Memory | None = None
    gate: torch.nn.Module | None = None
    spec: object = None
    form: str = "hard"
    threshold: torch.Tensor | float = 0.0
    record: object = None
    answered: bool = False

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


# Arguments with which models change what attention computes. Neither form of the law has them, so a layer that passes
# one (not None, not False) is refused; arguments that change nothing (output_attentions, position_ids, …) are ignored.
UNKNOWN_TO_THE_LAW = {
    "softcap": "caps its attention scores",
    "s_aux": "has learned attention sinks",
    "sinks": "has learned attention sinks",
    "position_bias": "adds a bias to its attention scores",
    "indices": "chooses the keys that each query reads",
    "block_indices": "chooses the keys that each query reads",
    "sliding_window": "has a sliding window that its cache layer does not know of",
    "cu_seq_lens_q": "packs several sequences into one row",
    "cache": "runs under continuous batching",
}


def refuse(module: torch.nn.Module, reason: str) -> None:
    """Raise the ValueError of an attention layer that gatekv would answer wrongly."""
    model_type = getattr(getattr(module, "config", None), "model_type", "unknown model type")
    raise ValueError(
        f"{type(module).__name__} ({model_type}) {reason}: gatekv's attention would give other numbers than the "
        "model's own, so it does not support this model."
    )


def check_call(module: torch.nn.Module, k: torch.Tensor, v: torch.Tensor, arguments: dict) -> None:
    """Refuse what the law does not compute; k, v: [batch, kv_heads, tokens, head_dim].

    Raises:
        ValueError: with the model, the reason and, where there is one, the cure.
    """
    for name, reason in UNKNOWN_TO_THE_LAW.items():
        value = arguments.get(name)
        if value is not None and value is not False:
            refuse(module, f"{reason} (`{name}`)")
    if not (getattr(module, "is_causal", True) and arguments.get("is_causal") in (None, True)):
        refuse(module, "is not causal")
    if k.shape != v.shape:
        refuse(module, f"has keys of shape {tuple(k.shape[1:])} and values of shape {tuple(v.shape[1:])} a sequence")
    heads = getattr(getattr(module, "config", None), "num_key_value_heads", None) or k.shape[1]
    if k.shape[1] != heads:
        refuse(module, f"has {k.shape[1]} KV heads in a layer where its config says {heads}")
    if arguments.get("dropout"):
        raise ValueError(
            f"{type(module).__name__} drops attention weights while training (dropout={arguments['dropout']}): gates "
            "learn what a frozen model needs, without noise. Load it with attention_dropout=0.0."
        )


def _as_bool(module: torch.nn.Module, mask: torch.Tensor | None) -> torch.Tensor | None:
    """Eager masks are additive; the law needs to know only what is visible, so they must say nothing else."""
    if mask is None or mask.dtype == torch.bool:
        return mask
    visible = mask > torch.finfo(mask.dtype).min / 2
    if mask.masked_fill(~visible, 0).any():
        refuse(module, "adds a bias to its attention scores (in the mask)")
    return visible


def _forward(base: str):
    # `attention_mask` bears transformers' name: some models pass it by keyword.
    def attention(module, q, k, v, attention_mask, *, scaling: float, gatekv: AttentionCall | None = None, **kwargs):
        mask = attention_mask
        if gatekv is not None:
            if gatekv.answered:
                refuse(module, "calls attention more than once a layer")
            gatekv.answered = True
            check_call(module, k, v, kwargs)
        if gatekv is None or gatekv.form == "listen":
            if gatekv is not None:
                gatekv.listen(q, k, _as_bool(module, mask), scaling)
            plain = ALL_ATTENTION_FUNCTIONS.get(base) or sys.modules[type(module).__module__].eager_attention_forward
            return plain(module, q, k, v, mask, scaling=scaling, **kwargs)
        mask = _as_bool(module, mask)
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
