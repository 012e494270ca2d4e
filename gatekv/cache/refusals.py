"""What a cache refuses before anything in it changes, and how it notices what would make it answer wrongly."""

from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import LinearAttentionCacheLayerMixin
from transformers.utils import logging

from gatekv.attention import valid_tokens
from gatekv.cache.decision import admit_rows

if TYPE_CHECKING:
    from gatekv.attention import AttentionCall
    from gatekv.cache.config import CacheConfig
    from gatekv.cache.layer import KVLayer

logger = logging.get_logger(__name__)
NO_ROTARY = (
    "positions='cache' turns queries by RoPE, and this model's attention gets no `position_embeddings`, turns by them "
    "in a way that gatekv does not know, or weighs channels behind that, so that more than distances counts: use "
    "positions='original'."
)


def check_owner(layer: "KVLayer") -> None:
    """ValueError when nothing will ask `layer` to answer for the tokens that it is given."""
    if not layer.expected:
        raise ValueError(
            "this KVCache belongs to another model, or gatekv.detach was called since: the model at hand would answer "
            "without it, and forget its context. Make the cache for the model that runs: gatekv.KVCache(model, …)."
        )


def check_whole(layer: "KVLayer", new: int = 0) -> None:
    """ValueError when an earlier call ended in the middle, so that some layers have its tokens and others have not.

    new: tokens of the call at hand, which layers with a sliding window before `layer` have taken in already.
    """
    if layer is not (layers := layer.siblings.layers)[0]:
        return
    uneven = any(other.open or other.before or other.calls != layer.calls for other in layers)
    for place, other in layer.siblings.others:
        if other.is_sliding:  # else it holds what cross-attention looks at: images, not the text
            uneven |= other.get_seq_length() != layer.seen + (new if place < layer.layer_idx else 0)
    if uneven:
        raise ValueError(
            "an earlier call with this cache was interrupted (by an error, or Ctrl-C), and some of its layers hold "
            "tokens that others do not: call cache.reset() and feed the text anew, or go on from a "
            "cache.snapshot() that was taken before."
        )
    if layer.siblings.steps.uneven(layer.calls, layer.layer_idx if new else -1):
        raise ValueError(
            "some states of this cache (linear attention, Mamba, convolutions) are ahead of others: an earlier call "
            "was interrupted, so call cache.reset() and feed the text anew. If that is said of a new cache, this model "
            "renews its states in a way that gatekv does not follow, and is not supported."
        )


def check_latent(config: "CacheConfig") -> None:
    """ValueError where a policy takes keys and values apart, which a cache of latents holds as one."""
    policy = config.policy
    part = policy.width or policy.remainder
    if part is not None:
        raise ValueError(
            f"this model caches latents (MLA), whose values are a part of their keys, and {type(part).__name__} treats "
            "them apart: leave it out of the policy."
        )
    if policy.scorer.cache_positions:
        raise ValueError(
            "positions='cache' turns queries by RoPE, and in latents (MLA) only a part of a key is rotated: use "
            "positions='original'."
        )
    if config.backend not in (None, "torch"):
        raise ValueError(
            f"backend={config.backend!r} reads keys and values, and this model caches latents: use 'torch'."
        )


def check_crop(layers: "list[Any]", tokens_to_remove: int) -> None:
    """ValueError when a state has taken in what `Cache.crop` is to take back, or keeps no past."""
    for layer in layers:
        if not isinstance(layer, LinearAttentionCacheLayerMixin):
            continue
        if tokens_to_remove and not layer.is_croppable:
            raise ValueError(
                f"cannot take back {-tokens_to_remove} tokens: this model's layers with a state (linear attention, "
                "Mamba) have taken them in for good. Keep a cache.snapshot() from before they were fed; assisted "
                "decoding does not work with such models."
            )
        if tokens_to_remove and not layer.record_past and any(layer.has_previous_state.values()):
            raise ValueError(
                f"cannot take back {-tokens_to_remove} tokens: convolutions keep the last few only. Call "
                "cache.activate_past_recording() before they are fed, or keep a cache.snapshot()."
            )


def check_positions(layer: "KVLayer", new: int) -> None:
    """ValueError when the model begins to rotate keys otherwise, so that it could not use those that are cached."""
    limit = layer.config.rotates_until
    if limit is not None and 0 < layer.seen <= limit < layer.seen + new:
        raise ValueError(
            f"this model (longrope) rotates keys otherwise beyond {limit} positions, and {layer.seen} are cached from "
            "before: transformers would read the text again, which an evicting cache cannot. Keep the prompt and what "
            f"follows within {limit} tokens, or feed a prompt that is longer, in one call."
        )


def _check_readers(layer: "KVLayer", new: int) -> None:
    """ValueError where eviction inside a call hangs on queries, which differ in the layers that read this one."""
    config, end, start = layer.config, layer.config.prompt_tokens, layer.seen
    if config.waits and not layer.decided and end is not None and start < end < start + new:
        raise ValueError(
            f"this call runs past the prompt's end (prompt_tokens={end}), and later layers of this model read the same "
            "keys before and behind it: feed the prompt in a call of its own."
        )
    if new > 1 and config.needs.attention and layer.decided and not layer.stage.whole and not config.keep_later:
        raise ValueError(
            "later layers of this model read these keys, and this policy evicts by attention from token to token: feed "
            "what follows the prompt token by token, or use KVCache(…, decode='keep')."
        )


def check_call(layer: "KVLayer", call: "AttentionCall", new: int, mask: torch.Tensor | None) -> None:
    """Refuse a call of `new` tokens that this cache cannot take; mask: [batch, 1, new, seen + new] bool, or None.

    Raises:
        ValueError: a prompt whose end cannot be seen or is passed. BudgetError: a strict cache, and a prompt whose
            budget is below what the policy protects.
    """
    config, prompt = layer.config, not layer.decided
    if prompt and config.turns_queries and not ((turning := call.turning()) and turning.relative):
        raise ValueError(NO_ROTARY)
    if prompt and config.kinds is not None and len(config.kinds) != len(layer.real):
        raise ValueError(
            f"kinds has {len(config.kinds)} rows, the prompt {len(layer.real)}: give one row a sequence (beam)."
        )
    if layer.readers:
        _check_readers(layer, new)
    if not config.waits:
        return
    end = config.prompt_tokens
    if layer.recording and prompt and end is None:
        raise ValueError(
            "assisted decoding feeds its first draft together with the prompt, and this policy decides where the "
            "prompt ends: pass KVCache(…, prompt_tokens=N), the prompt's length, or use a threshold gate."
        )
    crosses = prompt and end is not None and layer.seen < end < layer.seen + new
    if crosses and config.needs.scope == "model":
        raise ValueError(
            f"this call runs past the prompt's end (prompt_tokens={end}), and heads that compete over all layers, "
            "or layers that share by their variance, are decided between calls: feed the prompt in a call of its "
            "own (assisted decoding never does: use uniform, ada or a threshold gate, and even layers, there)."
        )
    if prompt and end is not None and new == 1 < layer.first_call and layer.seen + new < end:
        raise ValueError(
            f"prompt_tokens={end}, and a single token comes after {layer.seen}: the prompt was shorter, and nothing is "
            "compressed yet. Pass its length as fed, pads included (a prompt in pieces has no piece of one token but "
            "its last)."
        )
    second = not prompt and layer.seen == layer.first_call and end is None
    if second and 1 < new != layer.first_call and not (config.turns or layer.recording):
        logger.warning_once(
            "gatekv: a second call of several tokens is taken for a question, which stays whole. If the prompt came in "
            "chunks (prefill_chunk_size), its first one alone was compressed: pass KVCache(…, prompt_tokens=N)."
        )
    if prompt and config.strict and not config.defer and layer is layer.siblings.layers[0]:
        ends = layer.seen + new if end is None else end
        if layer.seen + new >= ends:
            valid = valid_tokens(mask, len(layer.real), new, layer.real.device)[:, : ends - layer.seen]
            admit_rows(config, valid.sum(-1) + layer.real[:, 0], torch.zeros_like(layer.real[:, 0]))
    if new > 1 and new == layer.first_call == layer.seen and end is None and not config.turns:
        raise ValueError(
            f"two calls of {new} tokens look like a prompt prefilled in chunks, and this policy decides at the "
            "prompt's end, which a cache cannot see: pass KVCache(…, prompt_tokens=N), or use a threshold gate."
        )
