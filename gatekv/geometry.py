"""Where a model attends and with what sizes, told from the modules themselves: no list of model types stands behind it.

An attention module has a place in the cache (`layer_idx`), is causal, and calls transformers' attention interface. What
its layer keeps beside keys and values, transformers says itself (`DynamicCache`).
"""

import functools
import inspect
import sys
import types
from collections import Counter
from typing import TYPE_CHECKING, Any, cast

from torch import nn
from transformers import Cache, DynamicCache, PreTrainedModel, cache_utils
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)

from gatekv.latent import is_latent
from gatekv.support import NO_INTERFACE, Geometry, refuse

if TYPE_CHECKING:
    from gatekv.support import SelfAttention

GATED = (DynamicLayer, LinearAttentionAndFullAttentionLayer)  # every key and value of the text: these layers grow
FOREIGN = (DynamicSlidingWindowLayer, LinearAttentionLayer, LinearAttentionAndSlidingWindowAttentionLayer)  # bounded
CROSS = "cross_attention_states"  # what an attention to images is given
# No attention in that layer, or another layer's keys and values; older transformers has no such layer.
NONE = (nothing,) if (nothing := getattr(cache_utils, "DummyLayer", None)) else ()


def _first(module: nn.Module, *names: str) -> Any:
    found = (getattr(module, name, None) for name in names)
    return next((value for value in found if isinstance(value, int) and not isinstance(value, bool)), None)


def geometry_of(module: Any) -> Geometry:
    """Sizes of an attention module, from its attributes, its projections, and last its config.

    Families name them differently, and a config may have one number where layers differ (Gemma 4): so what belongs to
    the module itself comes first.

    Raises:
        ValueError: they cannot be told.
    """
    config = module.config
    if is_latent(module):
        rank, rope = module.kv_lora_rank, module.qk_rope_head_dim
        heads = _first(module, "num_heads", "num_attention_heads") or config.num_attention_heads
        return Geometry(heads, 1, rank + rope, rank, latent=True)
    heads = _first(module, "num_heads", "num_attention_heads") or config.num_attention_heads
    key_dim = _first(module, "qk_head_dim", "head_dim", "head_size", "attention_head_size") or _first(
        config, "head_dim"
    )
    if key_dim is None:
        key_dim = config.hidden_size // heads
    kv_heads = _first(module, "num_key_value_heads", "kv_heads", "num_kv_heads")
    if kv_heads is None:
        projection = next((p for n in ("k_proj", "key") if isinstance(p := getattr(module, n, None), nn.Module)), None)
        width = None if projection is None else _first(projection, "out_features")  # quantised layers have it too
        if width is not None:
            kv_heads = width // key_dim
        else:
            kv_heads = heads // (_first(module, "num_key_value_groups") or 1)
    if not kv_heads or heads % kv_heads:
        refuse(module, f"has {heads} query heads and {kv_heads} KV heads, which do not share them evenly")
    return Geometry(heads, kv_heads, key_dim, _first(module, "v_head_dim") or key_dim)


def names_in(module: nn.Module) -> frozenset[str]:
    """Names that the methods of a module's class use, decorated ones too: what it calls, whatever it is called."""
    kind: Any = type(module)
    return _names_in(kind)


@functools.cache
def _names_in(kind: Any) -> frozenset[str]:
    methods = [f for c in kind.__mro__ if c is not nn.Module for f in vars(c).values() if callable(f)]
    plain = [inspect.unwrap(f) for f in methods]
    return frozenset(name for f in plain if isinstance(f, types.FunctionType) for name in f.__code__.co_names)


def attends(module: nn.Module) -> bool:
    """Whether a module calls transformers' attention interface itself, from a place in the cache, causally."""
    if getattr(module, "layer_idx", None) is None or not getattr(module, "is_causal", True):
        return False
    return "ALL_ATTENTION_FUNCTIONS" in names_in(module) and not _crosses(module)


def output_projection(module: nn.Module) -> nn.Module:
    """What an attention module ends with: [batch, tokens, heads · value_dim] -> [batch, tokens, hidden_size].

    Raises:
        ValueError: it cannot be told.
    """
    names = ("o_proj", "out_proj", "dense", "c_proj", "Wo")
    found = next((p for name in names if isinstance(p := getattr(module, name, None), nn.Module)), None)
    if found is None:
        raise ValueError(
            f"{type(module).__name__} has none of {', '.join(names)}, so that its output's error cannot be measured: "
            "use a loss that is not layer by layer."
        )
    return found


def foreign_layers(model: PreTrainedModel) -> list[bool]:
    """Which layers are transformers' own: a sliding window bounds them, or a state of fixed size; errors as above."""
    return [type(layer) not in GATED for layer in cache_layers(model)]


def readers_of(model: PreTrainedModel) -> dict[int, int]:
    """Layer -> the earlier, full-attention layer whose keys and values it reads.

    Raises:
        ValueError: a layer reads some, and it cannot be told whose.
    """
    config, found, layers = model.config.get_text_config(decoder=True), attention_modules(model), cache_layers(model)
    reading = [m.layer_idx for _, m in found if m.layer_idx >= len(layers) or isinstance(layers[m.layer_idx], NONE)]
    kinds, modes = getattr(config, "layer_types", None), getattr(config, "kv_sharing_modes", None)
    out = {}
    for place in reading:
        if kinds is None or modes is None:
            raise ValueError(
                f"layer {place} of {type(model).__name__} attends and keeps no keys and values, and its config does "
                "not say whose it reads: gatekv does not support this model."
            )
        source = next(i for i, mode in enumerate(modes) if mode == "store" and kinds[i] == kinds[place])
        if type(layers[source]) in GATED:
            out[place] = source
    latent = [m for _, m in found if m.layer_idx in {*out, *out.values()} and is_latent(m)]
    if latent:
        refuse(latent[0], "shares latents between layers")
    return out


def remembers(model: PreTrainedModel) -> bool:
    """Whether some layers keep a state (linear attention, Mamba, convolutions), which runs through a packed row."""
    return any(isinstance(layer, LinearAttentionLayer) for layer in cache_layers(model))


def crossing(model: PreTrainedModel) -> set[int]:
    """Layers whose keys and values are of images (mllama), and not of the text."""
    placed = [m for m in model.modules() if getattr(m, "layer_idx", None) is not None]
    return {cast("SelfAttention", m).layer_idx for m in placed if _crosses(m)}


def _crosses(module: nn.Module) -> bool:
    kind: Any = type(module)
    return _looks_at_images(kind)


@functools.cache
def _looks_at_images(kind: Any) -> bool:
    return "ALL_ATTENTION_FUNCTIONS" in _names_in(kind) and CROSS in inspect.signature(kind.forward).parameters


def layers_by_kind(model: PreTrainedModel) -> dict[str, int]:
    """How many layers there are of each kind, those that evict first; a layer with keys and a state counts once."""
    images, readers, counts = crossing(model), readers_of(model), Counter(evict=0)
    for i, layer in enumerate(cache_layers(model)):
        if i in images:
            counts["attend to images"] += 1
        elif type(layer) in GATED:
            counts["evict"] += 1
        elif isinstance(layer, DynamicSlidingWindowLayer):
            counts["have a sliding window"] += 1
        elif isinstance(layer, LinearAttentionLayer):
            counts["keep a state"] += 1
        else:
            counts["read an evicting layer's keys" if i in readers else "keep nothing"] += 1
    return dict(counts)


def cache_layers(model: PreTrainedModel) -> list[Any]:
    """A fresh cache layer of transformers' own for each layer of the text decoder.

    Raises:
        ValueError: when one remembers what gatekv neither copies nor counts.
    """
    layers = DynamicCache(config=model.config.get_text_config(decoder=True)).layers
    code = sys.modules[type(model).__module__]
    own = (c for c in vars(code).values() if isinstance(c, type) and issubclass(c, Cache))
    if (kind := next((c.__name__ for c in own if c.__module__ == code.__name__), None)) is not None:
        raise ValueError(
            f"{type(model).__name__} takes no cache but its own {kind}: gatekv does not support this model."
        )
    for layer in layers:
        if type(layer) not in (*GATED, *FOREIGN, *NONE):
            raise ValueError(
                f"{type(model).__name__} has layers that remember something else than keys and values or a state "
                f"({type(layer).__name__}), which gatekv can neither copy nor count: it does not support this model."
            )
    return layers


def attention_modules(model: PreTrainedModel) -> list[tuple[nn.Module, "SelfAttention"]]:
    """(parent, attention) of every layer of the text decoder that attends, by depth.

    Raises:
        ValueError: there is none, or several stand in one place of the cache.
    """
    name, config = type(model).__name__, model.config.get_text_config(decoder=True)
    found = [
        (parent, cast("SelfAttention", module))
        for parent in model.modules()
        for module in parent.children()
        # An image tower's attention has another config, and no place in the cache.
        if attends(module) and getattr(module, "config", config).model_type == config.model_type
    ]
    if not found:
        raise ValueError(_why_not(model))
    places = Counter(module.layer_idx for _, module in found)
    if twice := [place for place, count in places.items() if count > 1]:
        raise ValueError(
            f"{name} has {places[twice[0]]} attention modules for layer {twice[0]} of its cache: gatekv evicts from "
            "each layer by one module's attention, so it does not support this model."
        )
    return sorted(found, key=lambda pair: pair[1].layer_idx)


def _why_not(model: PreTrainedModel) -> str:
    """What keeps gatekv out of a model none of whose modules it could gate."""
    name = type(model).__name__
    placed = [type(m).__name__ for m in model.modules() if getattr(m, "layer_idx", None) is not None]
    kind = next((k for k in placed if "Attention" in k), None)
    if any(getattr(m, "is_causal", True) is False for m in model.modules()):
        return (
            f"{kind or name} is not causal: its text, or a part of it, attends both ways, so that tokens cannot leave "
            "as others come. A model of the BERT kind becomes a decoder by is_decoder=True in its config."
        )
    if kind is None and placed and not any("Attention" in type(m).__name__ for m in model.modules()):
        return f"{name} has no attention, so it keeps no keys and values that could leave."
    return NO_INTERFACE.format(kind or name)
