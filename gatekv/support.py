"""Which models gatekv can serve: what changes attention in a way neither form of the law knows is refused, with why."""

from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Arguments with which models change what attention computes. Neither form of the law has them, so a layer that passes
# one (not None, not False) is refused; arguments that change nothing (output_attentions, position_ids, …) are ignored.
UNKNOWN_TO_THE_LAW = {
    "sinks": "has learned attention sinks that are not called `s_aux`",
    "position_bias": "adds a bias to its attention scores",
    "indices": "chooses the keys that each query reads",
    "block_indices": "chooses the keys that each query reads",
    "sliding_window": "has a sliding window that its cache layer does not know of",
    "cu_seq_lens_q": "packs several sequences into one row",
    "cache": "runs under continuous batching",
}

NO_INTERFACE = (
    "{} computes attention by itself, not through transformers' attention interface, so gatekv cannot take part in it: "
    "this model is not supported."
)

T = TypeVar("T")
LATER: Any = None  # what an attribute holds that is set before it is first read

if TYPE_CHECKING:

    class SelfAttention(torch.nn.Module):
        """What gatekv reads of a transformers model's attention module."""

        layer_idx: int
        head_dim: int
        o_proj: torch.nn.Linear
        config: PretrainedConfig


def shallow(x: T) -> T:
    """What copy.copy makes of an object of plain attributes; as `__copy__`, where pickle takes less of it."""
    made = object.__new__(type(x))
    vars(made).update(vars(x))
    return made


def refuse(module: torch.nn.Module, reason: str) -> None:
    """Raise the ValueError of an attention layer that gatekv would answer wrongly."""
    model_type = getattr(getattr(module, "config", None), "model_type", "unknown model type")
    raise ValueError(
        f"{type(module).__name__} ({model_type}) {reason}: gatekv's attention would give other numbers than the "
        "model's own, so it does not support this model."
    )


class Geometry(NamedTuple):
    """Sizes of one attention layer.

    Attributes:
        heads: query heads. kv_heads: of keys and values. key_dim, value_dim: numbers of a head's key and value.
        latent: values are the first numbers of keys, and only these are stored (gatekv.latent).
    """

    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    latent: bool = False

    @property
    def stored(self) -> tuple[int, int]:
        """Numbers that a cache holds of a head's key and value."""
        return self.key_dim, 0 if self.latent else self.value_dim

    def __str__(self) -> str:
        values = "" if self.key_dim == self.value_dim else f" (keys) and {self.value_dim} (values)"
        return f"{self.kv_heads} KV heads of {self.key_dim}{values} numbers"


def check_call(
    module: torch.nn.Module, k: torch.Tensor, v: torch.Tensor, arguments: dict, geometry: Geometry | None = None
) -> None:
    """Refuse what the law does not compute; k, v: [batch, kv_heads, tokens, head_dim]; geometry: what was expected.

    Raises:
        ValueError: with the model, the reason and, where there is one, the cure.
    """
    for name, reason in UNKNOWN_TO_THE_LAW.items():
        value = arguments.get(name)
        if value is not None and value is not False:
            refuse(module, f"{reason} (`{name}`)")
    if not (getattr(module, "is_causal", True) and arguments.get("is_causal") in (None, True)):
        refuse(module, "is not causal")
    if k.shape[:3] != v.shape[:3]:
        refuse(module, f"has keys of shape {tuple(k.shape[1:])} and values of shape {tuple(v.shape[1:])} a sequence")
    if geometry is not None and not geometry.latent and (k.shape[1], k.shape[3], v.shape[3]) != geometry[1:4]:
        found = Geometry(geometry.heads, k.shape[1], k.shape[3], v.shape[3])
        refuse(module, f"hands its attention {found}, where its own attributes say {geometry}")
    if arguments.get("dropout"):
        raise ValueError(
            f"{type(module).__name__} drops attention weights while training (dropout={arguments['dropout']}): gates "
            "learn what a frozen model needs, without noise. Load it with attention_dropout=0.0."
        )


def visible_keys(module: torch.nn.Module, mask: torch.Tensor | None) -> torch.Tensor | None:
    """Eager masks are additive; the law needs to know only what is visible, so they must say nothing else."""
    if mask is None or mask.dtype == torch.bool:
        return mask
    visible = mask > torch.finfo(mask.dtype).min / 2
    if mask.masked_fill(~visible, 0).any():
        refuse(module, "adds a bias to its attention scores (in the mask)")
    return visible


def rotates_until(config: "PretrainedConfig") -> int | None:
    """Positions behind which a model rotates all its keys otherwise (longrope), as its text config says, or None."""
    rope = getattr(config, "rope_parameters", None) or {}
    for part in (rope, *(p for p in rope.values() if isinstance(p, dict))):
        if part.get("rope_type") == "longrope":
            return part.get("original_max_position_embeddings") or config.original_max_position_embeddings
    return None
