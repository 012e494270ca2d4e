"""The training loop, on Accelerate: accumulation, clipping, schedules, checkpoints, a progress bar that says enough."""

from pathlib import Path

import torch
from accelerate import Accelerator
from tqdm import tqdm

from gatekv.training import checkpoint, sharding
from gatekv.training.config import CPTConfig
from gatekv.training.data import TrainingData
from gatekv.training.objective import Objective
from gatekv.training.schedule import learning_rate_factor, sampled_keep, target_keep
from gatekv.training.streams import RESERVED

WARM_UP = 0.07  # of the steps
FINAL_RATE = 0.1  # of the learning rate
PROBE_ROW = RESERVED[0]  # far behind any run: a row on which soft and hard gates are compared


def global_mean(accelerator: Accelerator, tensor: torch.Tensor) -> torch.Tensor:
    """Mean over processes."""
    return accelerator.reduce(tensor, reduction="mean")


def train(objective: Objective, data: TrainingData, config: CPTConfig, accelerator: Accelerator) -> list[dict]:
    """Run to config.max_steps; returns one record per step (loss, task, sparsity, keep, target, lr; at every checkpoint
    also the soft and hard loss on one row, their gap, and the share of undecided gates).

    Raises:
        FloatingPointError: a loss that is not finite; the last checkpoint stays as it is.
        KeyboardInterrupt: after saving a checkpoint.
    """
    parameters = list(checkpoint.trained(objective).values())
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=0.0)
    folder = Path(config.output_dir) / "checkpoint"
    module, optimizer = sharding.prepare(accelerator, objective, optimizer, config)
    start = checkpoint.load(folder, accelerator, objective, optimizer) if config.resume else 0
    rank, world = accelerator.process_index, accelerator.num_processes
    records, done, gap = [], start, float("nan")
    probe = {k: v.to(accelerator.device) for k, v in data.batch(PROBE_ROW, 1, align=True).items()}

    def save(done: int) -> None:
        checkpoint.save(folder, accelerator, objective, optimizer, done)

    bar = tqdm(range(start, config.max_steps), disable=not accelerator.is_local_main_process, desc="train")
    try:
        for step in bar:
            lr = config.learning_rate * learning_rate_factor(step, config.max_steps, WARM_UP, FINAL_RATE)
            for group in optimizer.param_groups:
                group["lr"] = lr
            target = target_keep(step, config.max_steps, config.target_keep, config.target_share)
            if config.sparsity == "budget" and target <= config.target_keep:
                target = sampled_keep(step, config.seed, config.target_keep, config.budget_spread)
            record = _step(module, optimizer, data, config, accelerator, step, target, rank, world)
            done = step + 1
            record |= {"step": step, "target": target, "lr": lr}
            records.append(record)
            if done % config.save_every == 0:
                save(done)
                with sharding.in_parts(objective):
                    record |= objective.soft_hard(probe, config.target_keep)
                gap = record["soft_hard_gap"]
            state = {"loss": record["loss"], "keep": record["keep"], "target": target, "soft_hard_gap": gap}
            bar.set_postfix({k: f"{v:.3f}" for k, v in state.items()})
            accelerator.log(record, step=step)
        save(done)
    except KeyboardInterrupt:
        save(done)
        raise
    return records


def _step(module, optimizer, data, config, accelerator, step, target, rank, world) -> dict[str, float]:
    """One optimizer step over accumulation · world · batch_size rows, whichever way they are split."""
    sums = {}
    rows = config.batch_size * config.accumulation * world
    aligned = config.prefill == "dense" or config.spec.context == "prompt"  # all rows of a batch share a split
    for micro in range(config.accumulation):
        first = step * rows + (micro * world + rank) * config.batch_size
        batch = {k: v.to(accelerator.device) for k, v in data.batch(first, config.batch_size, align=aligned).items()}
        with accelerator.accumulate(module):
            out = module(batch, target, warm=step < config.warm_share * config.max_steps, seed=config.seed + first)
            if not torch.isfinite(out["loss"]):
                raise FloatingPointError(
                    f"the loss is {float(out['loss'])} at step {step}, rows {first}…{first + config.batch_size - 1}: "
                    "lower learning_rate or sparsity_weight, or use dtype=float32; the last checkpoint is untouched."
                )
            accelerator.backward(out["loss"])  # divides by the number of micro-batches
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(module.parameters(), config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        for key, value in out.items():
            sums[key] = sums.get(key, 0) + value.detach() / config.accumulation
    sums = {k: global_mean(accelerator, v) for k, v in sums.items()}
    accelerator.unwrap_model(module).move_multipliers(sums.pop("gap"))
    return {k: float(v) for k, v in sums.items()}
