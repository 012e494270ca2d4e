"""Training state in safetensors: trained parameters, AdamW moments, multipliers, the step. Atomic; never the base."""

import json
import os
import shutil
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from gatekv.training import sharding


def trained(module: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The parameters that learn, by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def save(folder: Path, accelerator: Accelerator, module, optimizer, step: int) -> None:
    """Write folder anew; a crash leaves the old one whole. All processes call it, the first writes.

    What is spread over processes is gathered, so any number of them, under any launch file, can go on from it.
    """
    named = trained(module)
    tensors = {"multiplier": module.multiplier.cpu()}
    tensors |= {f"param.{k}": v for k, v in sharding.gather(accelerator, named).items()}
    tensors |= {f"adam.{k}": v for k, v in sharding.gather_moments(accelerator, optimizer, named).items()}
    if not accelerator.is_main_process:
        return
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


def load(folder: Path, accelerator: Accelerator, module, optimizer) -> int:
    """Restore what `save` wrote, into a prepared module and optimizer; returns the step to go on from.

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
    part = lambda start: {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}  # noqa: E731
    if {k: v.shape for k, v in part("param.").items()} != sharding.shapes(accelerator, parameters):
        raise ValueError(f"the checkpoint in {folder} is of another gate: resume with the options it was started with.")
    module.multiplier.copy_(tensors["multiplier"])
    sharding.put(accelerator, parameters, part("param."))
    sharding.put_moments(accelerator, optimizer, parameters, part("adam."))
    return json.loads((folder / "state.json").read_text())["step"]
