"""Run by `accelerate launch` in test_two_processes: worker.py BACKEND BASE OUT TASK…

BASE: the frozen model's folder. TASK: JOB trains jobs.JOBS[JOB] and saves its adapter in OUT/JOB as the recipes do;
JOB:stop is stopped half-way, by SIGTERM to the last process, OUT/JOB-stop holding a checkpoint; JOB:FOLDER resumes from
the newest checkpoint in FOLDER, results in OUT/JOB-resumed-FOLDER's name; "fill" checks what a checkpoint holds;
"recipes:NAME,…" runs recipes; "held" says what a loaded base takes. One launch does many tasks, because importing takes
longer than a task.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT), *(str(ROOT / p) for p in ("tests", "tests/unit"))]

import json
import os

import jobs
import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState, GradientState
from backends import on_cpu
from torch.distributed.tensor import DTensor

from gatekv.training import checkpoint, rotation, sharding
from gatekv.training.loop import train
from gatekv.training.signals import Stopped


def fresh() -> Accelerator:
    """An accelerator for the next task, over the same processes."""
    reset()
    return Accelerator()


def reset() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def work(job: str, how: str, base: Path, out: Path) -> None:
    """Train, or half of it, or the other half."""
    accelerator = fresh()
    resumed = f"-resumed-{Path(how).name}"
    folder = out / (job + {"": "", "stop": "-stop"}.get(how, resumed))
    source = Path(how)
    more = {"resume": str(rotation.folder_of(source, rotation.steps(source)[-1]))} if how not in ("", "stop") else {}
    shared = accelerator.parallelism_config
    readers = accelerator.num_processes // (shared.sp_size if shared else 1)
    objective, config = jobs.JOBS[job](base, folder, readers, **more)
    try:
        records = train(objective, jobs.HalfTheData() if how == "stop" else jobs.ToyData(), config, accelerator)
    except Stopped:
        assert how == "stop"
        records = []
    state = sharding.adapter_state(accelerator, objective.model)
    if records and accelerator.is_main_process:
        objective.model.save_pretrained(folder, state_dict=state)
        found = {"world": accelerator.num_processes, "losses": [r["loss"] for r in records]}
        found["probe"] = [r["soft_hard_gap"] for r in records if "soft_hard_gap" in r]
        (folder / "result.json").write_text(json.dumps(found))
    accelerator.wait_for_everyone()
    accelerator.free_memory()


def shards(optimizer, named: dict) -> list[tuple[torch.Tensor, bool]]:
    """What this process holds of every parameter and moment, and whether others hold other parts."""
    found = [(p.ds_tensor, True) if hasattr(p, "ds_tensor") else local(p) for p in named.values()]
    zero = hasattr(optimizer.optimizer, "optimizer")
    for state in (optimizer.optimizer.optimizer if zero else optimizer).state.values():
        found += [(state[key], True) if zero else local(state[key]) for key in sharding.MOMENTS]
    return found


def local(tensor: torch.Tensor) -> tuple[torch.Tensor, bool]:
    return (tensor.to_local(), True) if isinstance(tensor, DTensor) else (tensor, False)


@torch.no_grad()
def fill(backend: str, base: Path, out: Path) -> None:
    """Each process writes its number into what it holds, all is saved, zeroed, loaded: every shard is back."""
    accelerator = fresh()
    objective, config = jobs.JOBS["gate"](base, out / "fill", accelerator.num_processes)
    optimizer = torch.optim.AdamW(checkpoint.trained(objective).values())
    _, optimizer = sharding.prepare(accelerator, objective, optimizer, config)
    if backend.startswith("zero2"):
        assert optimizer.optimizer.cpu_offload == (backend == "zero2_offload")
    named = checkpoint.trained(objective)
    whole = sharding.gather(accelerator, named)
    moments = {f"{key}.{name}": torch.zeros_like(v) for key in sharding.MOMENTS for name, v in whole.items()}
    steps = {f"step.{name}": torch.tensor(7.0) for name in whole}
    sharding.put_moments(accelerator, optimizer, named, moments | steps)
    mine = shards(optimizer, named)
    for i, (shard, cut) in enumerate(mine):
        shard.fill_(10 * i + 1 + cut * accelerator.process_index)
    filled = [shard.clone() for shard, _ in mine]
    saved = checkpoint.tensors_of(accelerator, objective, optimizer)
    for shard, _ in mine:
        shard.zero_()
    checkpoint.restore(accelerator, saved, objective, optimizer)
    again = shards(optimizer, named)
    assert len(again) == len(filled)
    for (a, cut), b in zip(again, filled):
        real = a != 0  # a shard's padding has no place in a checkpoint
        assert torch.equal(a[real], b[real])
        assert real.all() or cut and real.float().mean() > 0.4
    if accelerator.is_main_process:
        tensors = {k: v for k, v in saved.items() if v.dim() and k != "multiplier"}
        numbers = {k: sorted({int(n) % 10 for n in v.flatten()}) for k, v in tensors.items()}
        (out / "fill").mkdir()
        (out / "fill" / "result.json").write_text(json.dumps(numbers))
    accelerator.wait_for_everyone()
    accelerator.free_memory()


def recipes(base: Path, out: Path, names: list[str]) -> None:
    """recipes/cpt.py, recipes/sft.py, then recipes/less.py beside its gates and LoRA, as a user runs them (those that
    are named)."""
    from gatekv.recipes import cpt, less, sft

    Accelerator.end_training = lambda self: None  # it would end the process group, which the next recipe needs
    common = ["--model", str(base), "--sequence_length", "100", "--max_steps", "2", "--threads", "1"]
    world, shared = (int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "PARALLELISM_CONFIG_SP_SIZE"))
    common += ["--dtype", "float32", "--accumulation", str(2 * shared // world)]
    task = ["--data", str(base / "task.jsonl")]
    maps = ["--adapter", str(out / "recipe-sft"), "--policy", "gate+global", "--rank", "4", "--hidden", "8"]
    for name, main, own in (
        ("cpt", cpt.main, ["--retrieval_share", "0", "--window", "4", "--hidden", "8"]),
        ("sft", sft.main, ["--lora_rank", "4", "--hidden", "8", "--batch_size", "1", *task]),
        ("less", less.main, ["--retrieval_share", "0", "--dropout", "0", *maps]),
    ):
        if name not in names:
            continue
        reset()
        main([*common, *own, "--target_keep", "0.5", "--output_dir", str(out / f"recipe-{name}")])
        PartialState().wait_for_everyone()  # the next recipe reads what the first process writes


def held(base: Path, out: Path) -> None:
    """What loading a base takes in each process, and the whole of it, in bytes."""
    from gatekv.hardware import choose
    from gatekv.recipes.common import load_model

    accelerator = fresh()
    found = torch.tensor([0, 0])
    for p in load_model(str(base), choose("cpu", "bfloat16"))[0].parameters():
        assert p.dtype == torch.bfloat16
        own, whole = (p.ds_tensor.numel() + p.numel(), p.ds_numel) if hasattr(p, "ds_numel") else (p.numel(), p.numel())
        found += 2 * torch.tensor([own, whole])
    found = accelerator.gather(found[None]).tolist()
    if accelerator.is_main_process:
        (out / "held.json").write_text(json.dumps(found))


def main(backend: str, base: Path, out: Path, tasks: list[str]) -> None:
    on_cpu(backend)
    for task in tasks:
        if task == "fill":
            fill(backend, base, out)
        elif task == "held":
            held(base, out)
        elif task.startswith("recipes:"):
            recipes(base, out, task.removeprefix("recipes:").split(","))
        else:
            job, _, how = task.partition(":")
            work(job, how, base, out)
    PartialState().wait_for_everyone()
    os._exit(0)  # all is written; gloo's threads sometimes abort a process that ends in the usual way


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
