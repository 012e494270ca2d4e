"""Which keys a call's queries see, as one kind of mask, whatever attention implementation transformers made it for.

sdpa and eager get theirs whole. flash-attention gets the pads alone, and finds causality and the borders of packed rows
by itself; flex_attention gets a function of places. Where gatekv's attention answers in their stead, it has to see what
they would have seen.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.attention.flex_attention import BlockMask, create_mask
from torch.utils.weak import WeakIdKeyDictionary
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    find_packed_sequence_indices,
    flash_attention_mask,
)

from gatekv.ops.naive import causal_mask

if TYPE_CHECKING:
    from gatekv.support import SelfAttention

# What transformers handed over -> (how it was read, the mask made of it), for as long as it lives: all layers of a
# forward are given the same object, and a cache that is given the same mask in all layers looks at it once.
_MADE = WeakIdKeyDictionary()


def told_of_pads_alone(implementation: str | None) -> bool:
    """Whether an attention implementation finds causality and the borders of packed rows itself, as flash-attention."""
    return ALL_MASK_ATTENTION_FUNCTIONS.get(implementation) is flash_attention_mask


def whole_mask(
    module: "SelfAttention", mask: Any, q: torch.Tensor, keys: int | None, positions: object
) -> torch.Tensor | None:
    """[batch, 1, queries, tokens] bool, or the 4D mask that a layer was given; None: causal from the first key on, and
    no pads, or, for a memory, none among the new tokens either.

    mask: as another implementation than sdpa or eager is given it. q: [batch, heads, queries, head_dim]. keys: how many
    there are, of which the queries are the last; None: a memory holds those that came before, and the mask knows how
    many. positions: the call's `position_ids` [batch or 1, queries], or None.

    Raises:
        ValueError: a mask of another kind, or one that does not fit queries and keys.
    """
    batch, queries = q.shape[0], q.shape[2]
    if isinstance(mask, torch.Tensor) and mask.ndim == 4:
        return mask
    if mask is None:
        looks = told_of_pads_alone(_name(module))
        return None if keys is None or queries == 1 else _unmasked(q, keys, positions if looks else None)
    if isinstance(mask, BlockMask):
        fits = mask.shape[1] == 1 and mask.shape[2] == queries
        tokens = mask.seq_lengths[1]
    elif isinstance(mask, torch.Tensor) and mask.ndim == 2 and not mask.is_floating_point():
        tokens = mask.shape[1]
        fits = len(mask) == batch and tokens >= queries
    else:
        kind = f"{mask.ndim}D {mask.dtype}" if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise ValueError(
            f"attention implementation {_name(module)!r} hands {type(module).__name__} a mask that gatekv cannot read "
            f"({kind}): call model.set_attn_implementation('sdpa')."
        )
    if not fits or keys not in (None, tokens):
        raise ValueError(
            f"attention implementation {_name(module)!r} hands {type(module).__name__} a mask of shape "
            f"{tuple(mask.shape)} for {queries} queries, and {tokens if keys is None else keys} keys: gatekv takes one "
            "mask for all heads, of a cache that grows. Call model.set_attn_implementation('sdpa')."
        )
    if isinstance(mask, BlockMask):
        return _kept(mask, batch, lambda: _of_blocks(mask).expand(batch, -1, -1, -1))
    return _kept(mask, queries, lambda: causal_mask(queries, tokens, mask.device) & mask[:, None, None].bool())


def _kept(source: Any, how: object, make: Callable[[], torch.Tensor | None]) -> torch.Tensor | None:
    """What was made of an object that is as it was then. No mask refers to what it was made of, which then goes."""
    counted = isinstance(source, torch.Tensor) and not source.is_inference()  # how often it was written in place
    key, held = (how, source._version if counted else None), _MADE.get(source)
    if held is None or held[0] != key:
        held = _MADE[source] = key, make()
    return held[1]


def _of_blocks(mask: BlockMask) -> torch.Tensor:
    batch, heads = mask.shape[:2]
    return create_mask(mask.mask_mod, batch, heads, *mask.seq_lengths, device=str(mask.kv_num_blocks.device))


def _unmasked(q: torch.Tensor, keys: int, positions: object) -> torch.Tensor | None:
    """Without a mask flash-attention's queries are the last of the keys; whole rows are packed where positions jump."""
    batch, queries = q.shape[0], q.shape[2]
    if keys != queries:
        return causal_mask(queries, keys, q.device).expand(batch, 1, -1, -1)
    if not isinstance(positions, torch.Tensor) or positions.ndim != 2 or positions.shape[1] != queries:
        return None

    def packed() -> torch.Tensor | None:
        document = find_packed_sequence_indices(positions.to(q.device).expand(batch, -1))
        if document is None:
            return None
        return causal_mask(queries, keys, q.device) & (document[:, None, :, None] == document[:, None, None])

    return _kept(positions, batch, packed)


def _name(module: "SelfAttention") -> str:
    return str(module.config._attn_implementation_internal)
