"""What a checkpoint holds: trained parameters, AdamW moments, multipliers; never the base. And which run it is of."""

import hashlib
import json
from pathlib import Path
from typing import cast

import torch
from accelerate import Accelerator
from transformers.utils import logging

from gatekv.training import rotation, sharding
from gatekv.training.options import RunConfig
from gatekv.training.packing import RowSource
from gatekv.training.rows import Batch

logger = logging.get_logger(__name__)

TEXT_ROWS = 4  # that are hashed: several, because rows come from several sources


def trained(module: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The parameters that learn, by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def tensors_of(
    accelerator: Accelerator, module: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, torch.Tensor]:
    """What is to be saved: whole tensors on the CPU, however they are spread. Every process must call it."""
    named = trained(module)
    tensors = {"multiplier": cast(torch.Tensor, module.multiplier).cpu()}
    tensors |= {f"param.{k}": v for k, v in sharding.gather(accelerator, named).items()}
    tensors |= {f"adam.{k}": v for k, v in sharding.gather_moments(accelerator, optimizer, named).items()}
    return {k: v.contiguous() for k, v in tensors.items()}


def restore(
    accelerator: Accelerator,
    tensors: dict[str, torch.Tensor],
    module: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Put back what `tensors_of` gave, under any sharding, into what `sharding.prepare` has prepared.

    Every process must call it, with all tensors. ValueError when they are of other parameters.
    """
    named = trained(module)
    part = lambda start: {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}  # noqa: E731
    if {k: v.shape for k, v in part("param.").items()} != sharding.shapes(accelerator, named):
        raise ValueError("the checkpoint is of another gate: resume with the options it was started with.")
    cast(torch.Tensor, module.multiplier).copy_(tensors["multiplier"])
    sharding.put(accelerator, named, part("param."))
    sharding.put_moments(accelerator, optimizer, named, part("adam."))


def batch_sha256(batch: Batch) -> str:
    """The first half of the sha256 of a batch's input_ids [rows, tokens]."""
    return hashlib.sha256(batch["input_ids"].cpu().contiguous().numpy().tobytes()).hexdigest()[:32]


def identity(config: RunConfig, processes: int) -> dict:
    """What a run's result depends on beside its text: its options, and rows a step, however they are split."""
    rows = config.batch_size * config.accumulation * processes
    return {"options": config.decisive(), "rows_per_step": rows}


def text_sha256(data: RowSource, step: int, run: dict) -> str:
    """Hash of the next rows that a run reads, which tells whether its text, tokenizer and order are still the same.

    data: `gatekv.training.data.TrainingData`. run: what `identity` gave.
    """
    return batch_sha256(data.batch(step * run["rows_per_step"], TEXT_ROWS))


def check_identity(saved: dict, mine: dict, folder: Path) -> None:
    """ValueError, naming what differs, when a checkpoint belongs to a run with another result.

    saved, mine: {"identity": of `identity`, "text": of `text_sha256`}.
    """
    cure = f"resume {folder} with what it was started with, or start anew without --resume."
    was, now = saved["identity"], mine["identity"]
    for name in sorted(was["options"].keys() | now["options"].keys()):
        then, given = (options.get(name, "not an option") for options in (was["options"], now["options"]))
        if then != given:
            raise ValueError(f"{name}={given!r}, but the checkpoint was trained with {name}={then!r}: {cure}")
    if was["rows_per_step"] != now["rows_per_step"]:
        raise ValueError(
            f"a step reads {now['rows_per_step']} rows (batch_size · accumulation · processes), but the checkpoint's "
            f"read {was['rows_per_step']}: {cure}"
        )
    if saved["text"] != mine["text"]:
        raise ValueError(f"the training text or the tokenizer is not what the checkpoint was trained on: {cure}")


def find(resume: str, output: Path) -> tuple[Path | None, dict, dict]:
    """(folder, tensors, state) of the checkpoint that `resume` asks for; (None, {}, {}) to start anew.

    Raises:
        ValueError: a folder was named and holds no whole checkpoint, or none of output's checkpoints is whole.
    """
    if not resume:
        return None, {}, {}
    if resume != "auto":
        try:
            return Path(resume), *rotation.read(Path(resume))
        except ValueError as error:
            raise ValueError(f"{error} Name a whole checkpoint-<step> folder, or use --resume auto.") from error
    newest = rotation.steps(output)[::-1]
    for step in newest:
        folder = rotation.folder_of(output, step)
        try:
            return folder, *rotation.read(folder)
        except ValueError as error:
            logger.warning(f"{error} Going back to the checkpoint before it.")
    if newest:
        raise ValueError(f"none of the {len(newest)} checkpoints in {output} is whole: start anew without --resume.")
    logger.warning(f"no checkpoint in {output}: starting anew.")
    return None, {}, {}


def dtype_of(resume: str, output: Path) -> str | None:
    """The dtype of the base under which the checkpoint that `resume` asks for was trained; None without one."""
    if not resume:
        return None
    newest = [rotation.folder_of(output, step) for step in rotation.steps(output)[::-1]]
    for folder in newest if resume == "auto" else [Path(resume)]:
        state = folder / rotation.STATE
        try:
            return json.loads(state.read_text())["identity"]["options"]["dtype"]
        except (OSError, ValueError, KeyError, TypeError):  # `find` says what is wrong with it
            continue
    return None
