"""The training loop, on Accelerate: accumulation, clipping, schedules, checkpoints, a progress bar that says enough."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from gatekv.ops.sequence import Sequence
from gatekv.training import checkpoint, rotation, sharding, shared
from gatekv.training.eta import Remaining
from gatekv.training.guard import Fingerprint, LossGuard, failure, peers_named
from gatekv.training.loading import micro_batches, workers_for
from gatekv.training.objective import Objective
from gatekv.training.packing import RowSource
from gatekv.training.rows import Batch, on_device
from gatekv.training.schedule import learning_rate_at, target_at
from gatekv.training.signals import Stopped, StopSignals
from gatekv.training.streams import RESERVED
from gatekv.training.upload import Upload

if TYPE_CHECKING:
    from gatekv.training.config import CPTConfig
    from gatekv.training.joint import JointObjective
    from gatekv.training.lesson import LessObjective
    from gatekv.training.plain import PlainObjective
    from gatekv.training.schedule import AnyConfig

    AnyObjective = Objective | JointObjective | LessObjective | PlainObjective

Made = TypeVar("Made")
PROBE_ROW = RESERVED[0]  # far behind any run: a row on which soft and hard gates are compared


def train(objective: "AnyObjective", data: RowSource, config: "AnyConfig", accelerator: Accelerator) -> list[dict]:
    """Run to config.max_steps; returns one record per step of the whole run, those before a resume too: loss, task,
    sparsity, keep, target, lr; every save_every steps also the soft and hard loss on one row, their gap, and the share
    of undecided gates.

    Raises:
        FloatingPointError: a loss or gradient that is not finite, or an exploding loss; the checkpoints stay as they
            are. Stopped: SIGTERM or SIGINT came to any process; a checkpoint is saved. ConnectionError: another process
            is gone. ValueError: nothing to resume, a checkpoint of another run, or no right to write to config.push_to.
    """
    output = Path(config.output_dir)
    sequence = shared.sequence_of(accelerator)
    readers = accelerator.num_processes // sequence.size  # each reads rows of its own
    if sequence.size > 1:
        if not isinstance(objective, Objective):
            raise ValueError(f"{type(objective).__name__} computes whole rows: only gates train with sp_size above 1.")
        objective.share_rows(sequence)
    # Nobody but the optimizer may hold the parameters as they are now: FSDP2 puts parts in their place.
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(
        checkpoint.trained(objective).values(), lr=config.learning_rate, weight_decay=0.0
    )
    identity = checkpoint.identity(config, readers)
    upload = _by_main(accelerator, lambda: Upload(config.push_to)) if config.push_to else None
    module, optimizer = sharding.prepare(accelerator, objective, optimizer, config)
    records = _resume(config, objective, optimizer, data, identity, accelerator)
    guard = LossGuard(config.max_loss_ratio, [r["loss"] for r in records])
    start = len(records)
    saved, saved_at, gap = start, time.monotonic(), float("nan")
    probe = on_device(data.batch(PROBE_ROW, 1, align=True), accelerator.device)
    batches = _batches(data, config, accelerator, start, sequence)

    def save() -> None:
        nonlocal saved, saved_at
        tensors = checkpoint.tensors_of(accelerator, objective, optimizer)
        if accelerator.is_main_process:
            text = checkpoint.text_sha256(data, len(records), identity)
            state = {"identity": identity, "text": text, "records": records}
            folder = rotation.write(output, len(records), tensors, state, config.keep_checkpoints)
            if upload is not None:
                upload.checkpoint(folder)
        accelerator.wait_for_everyone()  # who leaves first has a launcher stop the others, in the middle of writing
        saved, saved_at = len(records), time.monotonic()

    steps = range(start, config.max_steps)
    remaining = Remaining(config.max_steps, math.ceil(config.warm_share * config.max_steps), start)
    bar = tqdm(
        steps, initial=start, total=config.max_steps, disable=not accelerator.is_local_main_process, desc="train",
        bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]",
    )  # fmt: skip
    with StopSignals() as signals, peers_named(), ExitStack() as ending:

        def wishes() -> list[bool]:
            late = 0 < config.save_minutes * 60 <= time.monotonic() - saved_at and accelerator.is_main_process
            return [signals.wanted, late]

        if upload is not None:
            ending.callback(upload.wait)  # however this ends: a process of a group leaves without waiting for threads
        for step in bar:
            lr, target = learning_rate_at(step, config), target_at(step, config)
            for group in optimizer.param_groups:
                group["lr"] = lr
            record, norm, (stop, late), found = _step(module, optimizer, batches, config, accelerator, sequence,
                                                      step, target, wishes)  # fmt: skip
            if verdict := guard.verdict(record["loss"], norm):
                last = next((str(rotation.folder_of(output, s)) for s in rotation.steps(output)[::-1]), "")
                raise failure(verdict, step, found, last)
            records.append(record | {"step": step, "target": target, "lr": lr})
            regular = config.save_every > 0 and len(records) % config.save_every == 0
            if regular:
                with sharding.in_parts(objective):
                    records[-1] |= objective.soft_hard(probe, config.target_keep)
                gap = records[-1]["soft_hard_gap"]
            state = {"loss": record["loss"], "keep": record["keep"], "target": target, "soft_hard_gap": gap}
            remaining.step()
            bar.set_postfix({"left": remaining} | {k: f"{v:.3f}" for k, v in state.items()})
            accelerator.log(records[-1], step=step)
            if regular or late or stop:
                save()
            if stop:
                raise Stopped(
                    f"stopped after step {len(records)} of {config.max_steps}; "
                    f"{rotation.folder_of(output, saved)} is saved: the same command with --resume goes on."
                )
        if saved < len(records):
            save()
    return records


def _by_main(accelerator: Accelerator, make: Callable[[], Made]) -> Made | None:
    """make() of the main process, None on the others; a ValueError is everyone's, who would else wait for the first."""
    made: Made | None = None
    error: list[str | None] = [None]
    if accelerator.is_main_process:
        try:
            made = make()
        except ValueError as refused:
            error = [str(refused)]
    broadcast_object_list(error)
    if error[0] is not None:
        raise ValueError(error[0])
    return made


def _resume(
    config: "AnyConfig",
    objective: "AnyObjective",
    optimizer: torch.optim.Optimizer,
    data: RowSource,
    identity: dict,
    accelerator: Accelerator,
) -> list[dict]:
    """Put back what config.resume asks for; returns the records of the steps that were done."""
    chosen = _by_main(accelerator, lambda: checkpoint.find(config.resume, Path(config.output_dir)))
    name = [chosen and chosen[0]]
    broadcast_object_list(name)
    if name[0] is None:
        return []
    tensors, state = (
        chosen[1:] if chosen else rotation.read(name[0])
    )  # the others read what it chose from the same disk
    text = checkpoint.text_sha256(data, state["step"], identity)
    checkpoint.check_identity(state, {"identity": identity, "text": text}, name[0])
    checkpoint.restore(accelerator, tensors, objective, optimizer)
    return state["records"]


def _batches(
    data: RowSource, config: "AnyConfig", accelerator: Accelerator, start: int, sequence: Sequence
) -> Iterator[tuple[int, Batch]]:
    """(first row, batch) of every micro-batch that this process computes from step `start` on. Readers are the
    processes, or groups of them that share rows."""
    reader, readers = accelerator.process_index // sequence.size, accelerator.num_processes // sequence.size
    micro = range(start * config.accumulation, config.max_steps * config.accumulation)
    firsts = [(m * readers + reader) * config.batch_size for m in micro]
    # All rows of a batch share a split.
    aligned = config.prefill != "sparse" or cast("CPTConfig", config).spec.context == "prompt"
    workers = workers_for(config.dataloader_num_workers, accelerator.device)
    return zip(firsts, micro_batches(data, firsts, config.batch_size, aligned, workers, accelerator.device))


def _step(
    module: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[tuple[int, Batch]],
    config: "AnyConfig",
    accelerator: Accelerator,
    sequence: Sequence,
    step: int,
    target: float,
    wishes: Callable[[], list[bool]],
) -> tuple[dict[str, float], float | None, list[bool], list[Fingerprint]]:
    """One optimizer step over accumulation · readers · batch_size rows, whichever way they are split.

    wishes: asked at the step's end. Returns (means over all processes, the gradient's norm or None, which wishes any
    process has, fingerprints of this process's micro-batches).
    """
    sums: dict[str, torch.Tensor] = {}
    found: list[Fingerprint] = []
    norm: Any = None
    for first, read in islice(batches, config.accumulation):
        batch = on_device(read, accelerator.device)
        seed = (config.seed + first) * sequence.size + sequence.rank
        torch.manual_seed(seed)  # dropout too is a function of the row, or a resumed run would draw other numbers
        with accelerator.accumulate(module):
            out = module(batch, target, warm=step < config.warm_share * config.max_steps, seed=seed)
            accelerator.backward(out["loss"])  # divides by the number of micro-batches
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(module.parameters(), config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        found.append(Fingerprint(first, config.batch_size, checkpoint.batch_sha256(read), out["loss"].detach()))
        for key, value in out.items():
            sums[key] = sums.get(key, 0) + value.detach() / config.accumulation
    gap = sums.pop("gap")
    told = [*sums.values(), *([] if norm is None else [_whole(norm, gap)])]
    told += [gap.new_tensor(wish, dtype=torch.float32) for wish in wishes()]
    means = accelerator.reduce(torch.cat([gap, *(t.reshape(1) for t in told)]), reduction="mean")
    accelerator.unwrap_model(module).move_multipliers(means[: len(gap)])
    record, rest = (values := means[len(gap) :].tolist())[: len(sums)], values[len(sums) :]  # the step's only look
    return dict(zip(sums, record)), rest[0] if norm is not None else None, [w > 0 for w in rest[-2:]], found


def _whole(norm: torch.Tensor | float, like: torch.Tensor) -> torch.Tensor:
    """A gradient's norm as a scalar beside `like`, as each backend gives it."""
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    return torch.as_tensor(norm, dtype=torch.float32, device=like.device)
