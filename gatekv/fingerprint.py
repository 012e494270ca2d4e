"""Which model, which gates: hashes and shapes that tell a file from another model's."""

import hashlib
import re
from collections.abc import Mapping
from typing import cast

import torch
from torch import nn

from gatekv.geometry import geometry_of
from gatekv.modules import attention_layers, base_model, saved_names, wrappers

HASHES = ("weights", "last_layer")  # of a fingerprint; the rest are shapes
SAMPLE = 64  # numbers of each of the last layer's tensors


def tensors_sha256(tensors: Mapping[str, torch.Tensor]) -> str:
    """Hash of names, dtypes, shapes and bytes; the same before saving and after loading."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        t = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {t.dtype} {tuple(t.shape)}".encode())
        digest.update(t.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def sampled(model: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    """The base's weights that a fingerprint reads, for each of HASHES. Fine-tuning often leaves the embeddings as they
    are, and LoRA merged into a base always does: hence a layer's too."""
    layer, _ = attention_layers(model)[-1]
    mine = {n.replace("base_layer.", ""): p for n, p in layer.named_parameters()
            if "gatekv_" not in n and ".lora_" not in n}  # fmt: skip
    embed = cast(nn.Embedding, base_model(model).get_input_embeddings()).weight
    return {"weights": {"embed": cast(nn.Parameter, embed)}, "last_layer": mine}


def _hash(parameters: dict[str, nn.Parameter], numbers: int) -> str | None:
    """None where some have no numbers: on the meta device, or in another process."""
    if any(p.device.type == "meta" or not p.numel() for p in parameters.values()):
        return None
    return tensors_sha256({n: p.detach().flatten()[:numbers].to(torch.bfloat16) for n, p in parameters.items()})[:16]


def fingerprint(model: nn.Module) -> dict:
    """Shapes that a gate depends on (must match) and hashes of some weights (a mismatch is only worth a warning)."""
    config = base_model(model).config.get_text_config(decoder=True)
    parts = sampled(model)
    return {
        "model_type": config.model_type,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": geometry_of(attention_layers(model)[-1][1]).kv_heads,
        "weights": _hash(parts["weights"], 4096),
        "last_layer": _hash(parts["last_layer"], SAMPLE),
    }


def gates_sha256(model: nn.Module) -> str | None:
    """Hash of the gates and low-rank maps in force, or None for a model without."""
    parts = [(w.layer_idx, part) for w in wrappers(model) for part in (w.gate(), w.less()) if part is not None]
    tensors = {f"{i}.{name}": t for i, part in parts for name, t in part.state_dict().items()}
    return tensors_sha256(tensors) if tensors else None


def lora_sha256(model: nn.Module) -> str | None:
    """Hash of the LoRA weights in force, whatever their adapter is called, or None for a model without."""
    names = next((w.in_force() for w in wrappers(model)), [])
    if not names:
        return None
    mine = re.compile(rf"(\.lora_\w+)\.(?:{'|'.join(map(re.escape, names))})(?=\.|$)")
    inner = base_model(model)
    found = {n: p for n, p in inner.named_parameters() if mine.search(n)}
    saved = saved_names(inner, found)
    tensors = {mine.sub(r"\1", saved[n]): p for n, p in found.items()}
    return tensors_sha256(tensors) if tensors else None
