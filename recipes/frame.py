"""The frame of a training run: before it, around it, what it leaves behind."""

import json
import os
import time
from pathlib import Path

import torch

from gatekv.hardware import AUTO, Hardware, choose
from gatekv.recipes.common import announce, load_model, read_shape


def predict(config, gated) -> dict:
    """Print what a run of `config` will take, and return it; no weights are read. gated: puts the adapter on a model.

    The result is `gatekv.training.dry_run.report`'s.
    """
    from gatekv.training.data import check_length
    from gatekv.training.dry_run import on_meta, report, text_of

    shape = read_shape(config.model)
    check_length(config.sequence_length, shape)
    hardware = choose(config.device, config.dtype, config.threads)
    config.dtype = hardware.dtype_name
    found = report(on_meta(shape, config.dtype, gated), config)
    if os.environ.get("RANK", "0") == "0":
        print(text_of(found))
    return found


def begin(config):
    """(accelerator, model, tokenizer) of a training run; config: `gatekv.training.options.RunConfig`, whose dtype is
    settled here, by the checkpoint where the run goes on from one.

    Raises:
        ValueError: a device that Accelerate does not train on here, a model that cannot be loaded, rows too long.
    """
    from accelerate import Accelerator
    from accelerate.utils import set_seed

    from gatekv.training.checkpoint import dtype_of
    from gatekv.training.data import check_length

    if config.device not in (AUTO, "cpu"):
        choose(config.device, config.dtype)  # what is not there is refused before any process group is made
    log_with = None if config.log_with == "none" else config.log_with
    accelerator = Accelerator(cpu=True if config.device == "cpu" else None, log_with=log_with)
    if config.device not in (AUTO, str(accelerator.device), accelerator.device.type):
        raise ValueError(
            f"device={config.device!r}, but Accelerate trains on {accelerator.device} here: say which devices with its "
            "launch file or CUDA_VISIBLE_DEVICES, and leave --device out."
        )
    pinned = dtype_of(config.resume, Path(config.output_dir)) if config.dtype == AUTO else None
    hardware = choose(accelerator.device, pinned or config.dtype, config.threads)
    announce(hardware)
    config.dtype = hardware.dtype_name
    set_seed(config.seed)
    model, tokenizer = load_model(config.model, Hardware(torch.device("cpu"), hardware.dtype, hardware.threads))
    check_length(config.sequence_length, model.config)
    return accelerator, model, tokenizer


def fit(objective, data, config, accelerator) -> tuple[list[dict], float]:
    """Train, resuming if config says so: (one record a step, seconds of this part of the run)."""
    from gatekv.training.loop import train

    objective.model.train()
    if accelerator.is_main_process:
        objective.model.print_trainable_parameters()
    accelerator.init_trackers("gatekv", config=config.options() | {"data": ",".join(config.data)})
    start = time.monotonic()
    records = train(objective, data, config, accelerator)
    return records, round(time.monotonic() - start, 1)


def judge(objective, data, config, accelerator) -> dict[str, float]:
    """The objective's numbers on a row that was not trained on. All processes call it."""
    from gatekv.training.loop import PROBE_ROW
    from gatekv.training.sharding import in_parts

    batch = {k: v.to(accelerator.device) for k, v in data.batch(PROBE_ROW, 1, align=True).items()}
    with in_parts(objective):
        return objective.soft_hard(batch, config.target_keep)


def save(accelerator, model, tokenizer, config, records: list[dict], seconds: float, found: dict) -> None:
    """Write the adapter, its card and training.json to config.output_dir. All processes call it, the first writes."""
    from gatekv.training.card import write_card
    from gatekv.training.sharding import adapter_state
    from gatekv.training.upload import upload_adapter

    state = adapter_state(accelerator, model)
    if not accelerator.is_main_process:
        return
    output = Path(config.output_dir)
    model.save_pretrained(output, state_dict=state)
    tokenizer.save_pretrained(output)
    log = {
        "recipe": config.recipe,
        "config": config.options(),
        "steps": records,
        "soft_hard": found,
        "seconds": seconds,
    }
    (output / "training.json").write_text(json.dumps(log, indent=1))
    write_card(output)
    print(f"saved {output}  loss {records[-1]['loss']:.4f}  {json.dumps(found)}")
    if config.push_to:
        print(f"copied to {upload_adapter(config.push_to, output)}")


def finish(accelerator) -> None:
    """Leave the process group. The wrapped model goes first: as the group's last owner it could wait for ever."""
    accelerator.free_memory()
    accelerator.end_training()
