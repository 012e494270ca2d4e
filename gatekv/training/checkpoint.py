"""Training state in safetensors: trained parameters, AdamW moments, multipliers, the step. Atomic; never the base."""

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file


def trained(module: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The parameters that learn, by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def save(folder: Path, module, optimizer, step: int) -> None:
    """Write folder anew; a crash leaves the old one whole."""
    tensors = {"multiplier": module.multiplier.cpu()}
    for name, p in trained(module).items():
        tensors[f"param.{name}"] = p.detach().cpu()
        for key, value in optimizer.state.get(p, {}).items():
            tensors[f"adam.{key}.{name}"] = value.detach().cpu()
    work = folder.with_name(folder.name + ".partial")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    save_file({k: v.contiguous() for k, v in tensors.items()}, work / "state.safetensors")
    (work / "state.json").write_text(json.dumps({"step": step}))
    old = folder.with_name(folder.name + ".old")
    if folder.exists():
        os.replace(folder, old)
    os.replace(work, folder)
    shutil.rmtree(old, ignore_errors=True)


def load(folder: Path, module, optimizer) -> int:
    """Restore what `save` wrote; returns the step to go on from.

    Raises:
        ValueError: no checkpoint, a damaged one, or one of another run's shapes.
    """
    if not (folder / "state.json").is_file():
        raise ValueError(f"nothing to resume: {folder} holds no checkpoint; leave out --resume or fix --output_dir.")
    try:
        tensors = load_file(folder / "state.safetensors")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"the checkpoint in {folder} is damaged ({error}): delete it and start again.") from error
    parameters = trained(module)
    names = {k.removeprefix("param.") for k in tensors if k.startswith("param.")}
    if names != set(parameters) or any(tensors[f"param.{n}"].shape != p.shape for n, p in parameters.items()):
        raise ValueError(f"the checkpoint in {folder} is of another gate: resume with the options it was started with.")
    with torch.no_grad():
        module.multiplier.copy_(tensors["multiplier"])
        for name, p in parameters.items():
            p.copy_(tensors[f"param.{name}"])
            keys = [k for k in tensors if k.startswith("adam.") and k.split(".", 2)[2] == name]
            state = {k.split(".", 2)[1]: tensors[k].clone() for k in keys}
            if state:
                optimizer.state[p] = {k: v if k == "step" else v.to(p.device) for k, v in state.items()}
    return json.loads((folder / "state.json").read_text())["step"]
