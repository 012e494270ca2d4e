"""A compressed cache as one safetensors file: a prompt is compressed once and reused."""

import dataclasses
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from gatekv.cache.buffer import Buffer
from gatekv.cache.layer import KVLayer, Phase
from gatekv.cache.pages import Pages
from gatekv.cache.quantised import Quantised
from gatekv.cache.slots import Slots
from gatekv.cache.thin import Thin
from gatekv.fingerprint import fingerprint, gates_sha256, lora_sha256
from gatekv.less.state import State
from gatekv.policies import PARTS, SCORERS, Policy
from gatekv.policies.qaq import PAGE, Bits
from gatekv.version import VERSION

if TYPE_CHECKING:
    from gatekv.cache.kvcache import KVCache

KEY = "gatekv_cache"
COUNTERS = ("seen", "folded", "base", "first_call")
POOL = ("keys", "values", "positions", "owners", "ordinals", "lengths", "scores", "counts")
TAIL = ("keys", "values", "flags", "valid", "scores", "psi")
SIDE = ("real", "cut", "queries", "unmet")
STATE = ("h", "z", "m")
ANSWERS: dict[str, dict[str, Any]] = {"scorer": SCORERS, **PARTS}  # of a policy, one to each question


def _describe(part: Any, known: dict, what: str) -> dict | None:
    """{"name", "fields"} of one part of a policy."""
    if part is None:
        return None
    name = next((n for n, cls in known.items() if cls is type(part)), None)
    if name is None:
        raise ValueError(
            f"only caches under gatekv's own policies can be saved: {type(part).__name__} is no {what} of it."
        )
    return {"name": name, "fields": dataclasses.asdict(part)}


def _tensors(layer: Any) -> dict[str, torch.Tensor]:
    """Name -> tensor of everything that one layer must get back."""
    if not isinstance(layer, KVLayer):  # a sliding layer of transformers' own
        return {"keys": layer.keys, "values": layer.values}
    kept = layer.kept
    named = {f"tail.{n}": getattr(layer.tail, n) for n in TAIL}
    named |= {f"pages.{n}": getattr(kept.pages, n) for n in POOL}
    named |= {n: getattr(layer, n) for n in SIDE}
    named |= {f"gate_state.{i}": t for i, t in enumerate(layer.judge.state or ())}
    named |= {"pending": layer.judge.pending}
    if kept.state is not None:
        named |= {f"state.{name}": getattr(kept.state, name) for name in STATE}
    if kept.merge is not None:
        named |= {"merge_threshold": kept.merge.threshold}
    if isinstance(kept.thin, Quantised):
        for bits, store in kept.thin.pages.items():
            named |= {f"quantised.{bits[0]}.{bits[1]}.{n}": getattr(store, n) for n in POOL}
    elif kept.thin is not None:
        named |= {f"thin.{n}": getattr(kept.thin.pages, n) for n in POOL} | {"channels": kept.thin.channels}
    if kept.slots is not None:
        named |= {f"slots.{n}": getattr(kept.slots.pages, n) for n in POOL}
        named |= dict(zip(("slot_cos", "slot_sin"), kept.slots.last)) | {"slot_wait": kept.slots.wait}
    if kept.buffer is not None:
        named |= {"room": kept.buffer.room, "recent": kept.buffer.recent}
    return {n: t for n, t in named.items() if t is not None}


def save(cache: "KVCache", path: str) -> None:
    """See `KVCache.save`.

    Raises:
        ValueError: when the prompt is not over, or the policy is not one of gatekv's own.
    """
    plan, layers = cache.plan, cache.evicting()
    if plan.defer or not layers[0].is_initialized or layers[0].phase is Phase.PROMPT:
        raise ValueError("only a cache whose prompt has been read and decided can be saved: feed the prompt first.")
    header: dict[str, Any] = {
        "version": VERSION,
        "base": fingerprint(cache.model),
        "gates": gates_sha256(cache.model) if plan.learned or plan.remembers else None,
        "lora": lora_sha256(cache.model),
        "policy": {part: _describe(vars(plan.policy)[part], known, part) for part, known in ANSWERS.items()},
        "budget": plan.policy.budget,
        "options": {
            "prefill": "dense" if plan.dense else "sparse", "decode": "keep" if plan.keep_later else "evict",
            **{n: getattr(plan, n) for n in ("sinks", "window", "prompt_tokens", "turns", "block_size", "strict")},
        },
        "layers": [], "names": [],
    }  # fmt: skip
    tensors: dict[str, torch.Tensor] = {}
    for i, layer in enumerate(cast("list[Any]", cache.layers)):
        own = isinstance(layer, KVLayer)
        counters = {n: getattr(layer, n) for n in COUNTERS} if own else {"cumulative_length": layer.cumulative_length}
        header["layers"].append(counters | ({"phase": layer.phase.name} if own else {}))
        tensors |= {f"{i}.{name}": t.contiguous().clone() for name, t in _tensors(layer).items()}
    header["names"] = sorted(tensors)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".part")
    save_file(tensors, partial, metadata={KEY: json.dumps(header)})
    os.replace(partial, target)  # an interrupted save leaves the older file whole


def _read(path: str, device: torch.device) -> tuple[dict, dict[str, torch.Tensor]]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"no saved cache at {path}: write one with cache.save(path).")
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}): save the cache again.") from error
    if KEY not in metadata:
        raise ValueError(f"{path} is a safetensors file, but not a gatekv cache: write one with cache.save(path).")
    header = json.loads(metadata[KEY])
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
    weight = next(model.parameters())
    header, tensors = _read(path, weight.device)
    _check(path, header, model)
    said = {part: d for part, d in header["policy"].items() if d is not None}
    parts = {part: ANSWERS[part][d["name"]](**d["fields"]) for part, d in said.items()}
    policy = Policy(**parts)
    cache = cls(model, policy, header["budget"], backend=backend, **header["options"])
    for i, (layer, state) in enumerate(zip(cast("list[Any]", cache.layers), header["layers"])):
        mine = {n.split(".", 1)[1]: t for n, t in tensors.items() if n.split(".", 1)[0] == str(i)}
        if not isinstance(layer, KVLayer):
            layer.lazy_initialization(mine["keys"], mine["values"])
            layer.keys, layer.values, layer.cumulative_length = mine["keys"], mine["values"], state["cumulative_length"]
            continue
        try:
            _fill(layer, mine, state)
        except (KeyError, IndexError, RuntimeError, ValueError) as error:
            raise ValueError(f"{path}: layer {i} is damaged ({error!r}): save the cache again.") from error
    return cache


def _fill(layer: KVLayer, mine: dict[str, torch.Tensor], state: dict) -> None:
    """Put saved tensors and counters into a fresh layer."""
    layer.lazy_initialization(mine["tail.keys"][:, :, :0], None)
    layer.phase = Phase[state["phase"]]
    for name in COUNTERS:
        setattr(layer, name, state[name])
    layer.tail.scores = mine["tail.scores"][..., :0] if "tail.scores" in mine else None
    layer.tail.psi = mine["tail.psi"][:, :, :0] if "tail.psi" in mine else None
    layer.tail.append(*cast("tuple[Any, Any, Any, Any, Any, Any]", tuple(mine.get(f"tail.{n}") for n in TAIL)))
    if "state.h" in mine:
        layer.kept.state = State(mine["tail.values"], mine["state.z"].shape[-1])
        for name in STATE:
            setattr(layer.kept.state, name, mine.get(f"state.{name}"))
    layer.kept.pages.restore({n: mine.get(f"pages.{n}") for n in POOL})
    if layer.kept.merge is not None:
        layer.kept.merge.threshold = mine.get("merge_threshold")
    for name in SIDE:
        setattr(layer, name, mine.get(name))
    apart = Pages(mine["tail.keys"][:, :, :0], layer.plan.block_size)
    if "channels" in mine:
        apart.restore({n: mine.get(f"thin.{n}") for n in POOL})
        layer.kept.thin = Thin(apart, mine["channels"])
    elif isinstance(layer.plan.policy.width, Bits):
        like = mine["tail.keys"][:, :, :0]
        layer.kept.thin = Quantised(layer.plan.policy.width, like)
        for pair in {tuple(name.split(".")[1:3]) for name in mine if name.startswith("quantised.")}:
            store = layer.kept.thin.pages[int(pair[0]), int(pair[1])] = Pages(like, PAGE)
            store.restore({n: mine.get(f"quantised.{pair[0]}.{pair[1]}.{n}") for n in POOL})
    elif "slots.keys" in mine:
        apart.restore({n: mine.get(f"slots.{n}") for n in POOL})
        layer.kept.slots = Slots(apart, (mine["slot_cos"], mine["slot_sin"]), mine["slot_wait"])
    if "room" in mine:
        layer.kept.buffer = Buffer(mine["room"], mine["recent"])
    layer.judge.pending = mine.get("pending")
    layer.judge.state = tuple(mine[n] for n in sorted(mine) if n.startswith("gate_state.")) or None
