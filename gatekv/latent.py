"""Multi-head latent attention (MLA; DeepSeek-V2, arXiv 2405.04434): all heads share one latent vector a token.

transformers caches that vector, [rank], and a shared rotated key, [rope_dim], and expands both to keys and values of
each head. The expansion is linear: so queries can be turned instead (§2.1.2 and appendix B, "absorbed"), and attention
runs over latents, as with one KV head: key = latent and rotated key together, value = latent. Nothing is expanded but
new tokens, and one flag a token stands for all heads.
"""

from collections.abc import Callable
from typing import Any, Protocol, cast

import torch

from gatekv.ops.naive import accumulation_dtype

Tensor = torch.Tensor


class LatentAttention(Protocol):
    """What gatekv needs of such a module."""

    kv_lora_rank: int
    qk_rope_head_dim: int

    def expand_kv(self, kv_nope: Tensor, k_rot: Tensor) -> tuple[Tensor, Tensor]:
        """[batch, 1, tokens, rank], [batch, 1, tokens, rope_dim] -> keys, values [batch, heads, tokens, …]."""


def is_latent(module: Any) -> bool:
    """Whether a module caches latents."""
    return callable(getattr(module, "expand_kv", None)) and isinstance(getattr(module, "kv_lora_rank", None), int)


class Latent:
    """The expansion of one module, found by expanding unit vectors; quantised and LoRA layers answer as they do."""

    def __init__(self, module: LatentAttention, like: Tensor, plain: Callable[[], Tensor]) -> None:
        """like: gives dtype and device. plain: () -> [batch, heads, n, value_dim], the model's own attention among the
        new tokens."""
        self.plain, rank, rope = plain, module.kv_lora_rank, module.qk_rope_head_dim
        unit = torch.eye(rank + rope, dtype=like.dtype, device=like.device)[None, None]
        keys, values = module.expand_kv(unit[..., :rank].contiguous(), unit[..., rank:].contiguous())
        acc = accumulation_dtype(like)
        self.keys, self.values = keys[0].to(acc), values[0, :, :rank].to(acc)

    def absorbed(self, q: Tensor) -> Tensor:
        """[batch, heads, n, rank + rope_dim], what latents are asked, of queries q [batch, heads, n, key_dim]."""
        return (q.to(self.keys.dtype) @ self.keys.mT).to(q.dtype)

    def expanded(self, out: Tensor) -> Tensor:
        """[batch, heads, n, value_dim] of out [batch, heads, n, rank], what latents answer."""
        return (out.to(self.values.dtype) @ self.values).to(out.dtype)


def latent_of(module: Any, like: Tensor, plain: Callable[[], Tensor]) -> Latent | None:
    """The expansion, where a module caches latents; arguments as for `Latent`."""
    return Latent(cast(LatentAttention, module), like, plain) if is_latent(module) else None
