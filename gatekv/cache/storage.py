"""A compressed cache as one safetensors file: a prompt is compressed once and reused."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from gatekv.cache import stages
from gatekv.cache.layer import KVLayer
from gatekv.cache.segments.foreign import Foreign
from gatekv.fingerprint import fingerprint, gates_sha256, lora_sha256
from gatekv.modules import device_of, wrappers
from gatekv.parts import Part, below
from gatekv.policies.registry import described, rebuilt
from gatekv.version import VERSION

if TYPE_CHECKING:
    from gatekv.cache.kvcache import KVCache

KEY = "gatekv_cache"
FORMAT = 2  # of the file; version 0.1 wrote others, which name none
OPTIONS = ("sinks", "window", "prompt_tokens", "turns", "block_size", "strict")


def save(cache: "KVCache", path: str) -> None:
    """See `KVCache.save`.

    Raises:
        ValueError: when the prompt is not over, or a part of the policy has no name (`register_policy`).
    """
    config, layers = cache.config, cache.evicting()
    if config.defer or not layers[0].is_initialized or not layers[0].decided:
        raise ValueError("only a cache whose prompt has been read and decided can be saved: feed the prompt first.")
    header: dict[str, Any] = {
        "version": VERSION,
        "format": FORMAT,
        "base": fingerprint(cache.model),
        "gates": gates_sha256(cache.model) if config.needs.gate or config.needs.maps else None,
        "lora": lora_sha256(cache.model),
        "policy": described(config.policy),
        "budget": config.policy.budget,
        "options": {
            "prefill": "dense" if config.dense_prefill else "sparse",
            "decode": "keep" if config.keep_later else "evict",
            **{n: getattr(config, n) for n in OPTIONS},
        },
        "names": [],
    }  # fmt: skip
    tensors: dict[str, torch.Tensor] = {}
    for i, layer in enumerate(cast("list[Any]", cache.layers)):
        part = layer if isinstance(layer, KVLayer) else Foreign(layer)
        tensors |= {f"{i}.{name}": t.contiguous().clone() for name, t in part.state_dict().items()}
    header["names"] = sorted(tensors)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".part")
    save_file(tensors, partial, metadata={KEY: json.dumps(header)})
    os.replace(partial, target)  # an interrupted save leaves the older file whole


def _read(path: str) -> tuple[dict, dict[str, torch.Tensor]]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"no saved cache at {path}: write one with cache.save(path).")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}): save the cache again.") from error
    if KEY not in metadata:
        raise ValueError(f"{path} is a safetensors file, but not a gatekv cache: write one with cache.save(path).")
    header = json.loads(metadata[KEY])
    if header.get("format", 1) != FORMAT:
        raise ValueError(
            f"{path} was written by gatekv {header.get('version')}, in a form that this version "
            f"({VERSION}) does not read: compress the prompt again, and save it."
        )
    if missing := sorted(set(header["names"]) ^ set(tensors)):
        raise ValueError(f"{path}: tensor {missing[0]!r} is missing or stray: save the cache again.")
    return header, tensors


def _check(path: str, header: dict, model: nn.Module) -> None:
    found, wanted = fingerprint(model), header["base"]
    for name, value in wanted.items():
        if found[name] != value:
            raise ValueError(
                f"{path} was compressed by a model with {name} {value!r}, this one has {found[name]!r}: load the model "
                "that wrote it, or compress the prompt again."
            )
    if header["gates"] is not None and gates_sha256(model) != header["gates"]:
        raise ValueError(
            f"{path} was compressed by other gates or maps: load the adapter that wrote it, or compress again."
        )
    if lora_sha256(model) != header.get("lora"):  # caches written before there was LoRA do not name it
        raise ValueError(
            f"{path} was compressed under other LoRA weights, or none: load that adapter, or compress again."
        )


def load(cls: type["KVCache"], path: str, model: nn.Module, backend: str | None) -> "KVCache":
    """See `KVCache.load`."""
    header, tensors = _read(path)
    _check(path, header, model)
    homes, elsewhere = {w.layer_idx: device_of(w.module) for w in wrappers(model)}, device_of(model)
    policy = rebuilt(header["policy"])
    cache = cls(model, policy, header["budget"], backend=backend, **header["options"])
    for i, layer in enumerate(cast("list[Any]", cache.layers)):
        home = homes.get(i, elsewhere)
        mine = {name: t.to(home) for name, t in below(tensors, str(i)).items()}
        part: Part = layer if isinstance(layer, KVLayer) else Foreign(layer)
        try:
            if isinstance(layer, KVLayer):
                _empty(layer, mine["window.keys"], mine["window.values"])
            part.load_state_dict(mine)
        except (KeyError, IndexError, RuntimeError, ValueError) as error:
            raise ValueError(f"{path}: layer {i} is damaged ({error!r}): save the cache again.") from error
    return cache


def _empty(layer: KVLayer, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Make a fresh layer what a decided one is before it holds anything; keys, values: [batch, kv_heads, tokens, …]."""
    layer.lazy_initialization(keys[:, :, :0], values[:, :, :0])
    layer.evictor = layer.evictor.successor()
    layer.stage = stages.Turn() if layer.config.turns else layer.evictor.stage()
    layer.evictor.begin(layer)
