"""PEFT's own LoRA layers in a gatekv adapter: put in beside the gates, taken out again. PEFT does the work.

Stock PEFT refuses LoRA beside another type in one PeftModel, so the gates' tuner calls this. LoRA is on or off with its
adapter: `disable_adapter` is the plain base. `gatekv.modules.gates_off` leaves it on: the teacher of a tuned model is
the tuned model with its whole cache.
"""

import re
from typing import Any

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers, check_target_module_exists
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import get_pattern_key
from torch import nn

from gatekv import modules
from gatekv.config import check_choice, check_keys, nearest
from gatekv.modules import base_model

# Fields of LoraConfig that leave the base's own parameters alone and need nothing beside LoRA's layers.
FIELDS = (
    "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "rank_pattern", "alpha_pattern", "use_rslora", "init_lora_weights",
)  # fmt: skip


def checked(lora: dict) -> dict:
    """All of FIELDS, PEFT's defaults written out, so that an adapter does not change its meaning with PEFT's version;
    patterns in the order of their names, as files have them: of several that fit a module the first counts.

    Raises:
        TypeError: an unknown field. ValueError: a value that LoRA cannot have.
    """
    check_keys("lora", lora, FIELDS)
    fields: dict[str, Any] = vars(LoraConfig(**lora))
    found: dict[str, Any] = {n: sorted(fields[n]) if isinstance(fields[n], set) else fields[n] for n in FIELDS}
    for name in ("rank_pattern", "alpha_pattern"):  # the first that fits counts, and a file has them in this order
        found[name] = dict(sorted(found[name].items()))
    if found["r"] < 1:
        raise ValueError(f"lora: r is a rank, at least 1, not {found['r']}.")
    if not 0 <= found["lora_dropout"] < 1:
        raise ValueError(f"lora: lora_dropout is a share, at least 0 and below 1, not {found['lora_dropout']}.")
    check_choice("lora: init_lora_weights", found["init_lora_weights"], (True, False, "gaussian"))
    return found


def check_ranks(model: nn.Module, lora: dict, shapes: dict[str, tuple[int, ...]]) -> None:
    """ValueError where the config asks for more LoRA than the adapter's file, with tensors of `shapes`, holds for that
    module: what is allocated is bounded by what is there."""
    held: dict[str, int] = {}
    for name, shape in shapes.items():
        module, found, _ = re.sub(r"\.base_layer(?=\.)", "", name).partition(".lora_")
        if found and re.search(r"\.lora_(embedding_)?A(\.|$)", name) and shape:
            held[module.removeprefix("base_model.model.")] = shape[0]
    for module, wanted in _ranks(model, lora).items():
        if wanted > held.get(module, 0):
            raise ValueError(
                f"lora asks for a rank of {wanted} in {module}, the adapter file has {held.get(module, 0)}: it belongs "
                "to another config or was edited; load the folder as it was saved."
            )


def _ranks(model: nn.Module, lora: dict) -> dict[str, int]:
    """Module -> rank of all that the config makes, as PEFT chooses them."""
    config: Any = LoraConfig(**lora)
    config = _maybe_include_all_linear_layers(config, model)
    if config.target_modules is None:
        model_type = getattr(getattr(model, "config", None), "model_type", "")
        config.target_modules = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model_type, [])
    modules, inside = [key for key, _ in model.named_modules()], _inside(model)
    found = [key for key in modules if not key.startswith(inside) and check_target_module_exists(config, key)]
    pattern = config.rank_pattern
    return {key: pattern.get(get_pattern_key(pattern.keys(), key), config.r) for key in found}


def _inside(model: nn.Module) -> tuple[str, ...]:
    """How the names begin of what stands inside other adapters' layers, gates too, which PEFT passes over."""
    return tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))


def inject(model: nn.Module, adapter_name: str, lora: dict, low_cpu_mem_usage: bool = False) -> None:
    """Put LoRA layers of one more adapter into a transformers model and make them the active ones.

    lora: what `checked` gave; target modules that PEFT chooses for the architecture are written into it.

    Raises:
        ValueError: a target module that the model does not have, or that LoRA cannot adapt.
    """
    config = LoraConfig(**lora)
    outer = vars(model).pop("peft_config", None)  # the gates'; LoraModel would write into it
    try:
        _check_targets(model, config.target_modules)
        inject_adapter_in_model(config, model, adapter_name, low_cpu_mem_usage)
    finally:
        vars(model).pop("peft_config", None)
        if outer is not None:
            model.peft_config = outer
    if lora["target_modules"] is None:
        lora["target_modules"] = sorted(config.target_modules or ())


def _check_targets(model: nn.Module, targets: list[str] | set[str] | str | None) -> None:
    """PEFT is content when one of several names is found; a mistyped one would be left out without a word."""
    if targets is None or isinstance(targets, str):  # PEFT's choice, or a regular expression
        return
    names = [name for name, _ in model.named_modules()]
    for target in sorted(targets):
        if not any(name == target or name.endswith(f".{target}") for name in names):
            linear = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear)})
            raise ValueError(
                f"lora: target module {target!r} is not in {type(model).__name__}.{nearest(target, linear)} "
                f"It has {', '.join(linear)}."
            )


def detach(model: nn.Module) -> nn.Module:
    """Undo `attach` and any adapter: the plain transformers model, bit-identical to before. Returns it.

    Raises:
        ValueError: LoRA is merged into the base's weights.
    """
    inner = base_model(model)
    layers = [(name, m) for name, m in inner.named_modules() if isinstance(m, LoraLayer)]
    if any(layer.merged for _, layer in layers):
        raise ValueError("LoRA is merged into the base: call unmerge_adapter() first, or merge_and_unload() instead.")
    for name, layer in layers:
        parent, _, child = name.rpartition(".")
        setattr(inner.get_submodule(parent), child, layer.get_base_layer())
    vars(inner).pop("peft_config", None)  # PEFT's mark on a model that has adapters
    return modules.detach(inner)
