"""What a run will take, said before it starts: parameters, memory of each process, tokens, schedules. No weights.

The model is built on torch's meta device from its config alone, so a 70B shape takes seconds. Memory is what stays for
the whole run; activations, communication in flight and the allocator's own losses are not in it (see `Memory`).
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from gatekv.config import check_choice
from gatekv.training.checkpoint import trained
from gatekv.training.schedule import learning_rate_at, target_at

if TYPE_CHECKING:
    from gatekv.training.schedule import AnyConfig

# What each plan divides by the number of processes: frozen weights, trained weights, gradients, AdamW's state.
DIVIDED = {
    "ddp": (False, False, False, False),
    "zero1": (False, False, False, True),
    "zero2": (False, False, True, True),
    "zero3": (True, True, True, True),
    "fsdp2": (True, True, True, True),
}
BUCKET = 500_000_000  # float32 numbers: DeepSpeed's reduce_bucket_size, allocated whole however few there are to reduce
LEFT_WHOLE = 100_000  # numbers: DeepSpeed's stage3_param_persistence_threshold; tensors this small stay gathered
LEFT_OUT = "activations, the teacher's cache, layers gathered for use, the framework itself"


@dataclass(frozen=True)
class Plan:
    """How a run is spread: kind, a key of DIVIDED; processes, all machines together; sharing, how many of them share
    a row."""

    kind: str
    processes: int
    sharing: int = 1

    def __post_init__(self) -> None:
        check_choice("dry_run plan", self.kind, DIVIDED)
        if self.processes < 1:
            raise ValueError(f"a plan has at least 1 process, not {self.processes}.")
        if self.sharing < 1 or self.processes % self.sharing:
            raise ValueError(
                f"rows are shared by a number that divides {self.processes} processes, not {self.sharing}."
            )


@dataclass(frozen=True)
class Memory:
    """Bytes that one process holds all the time, and in all; the last two fields stand beside the sum of the others.

    Attributes:
        frozen: weights of the base, and of a gate that stays as it is. trained: gates or low-rank maps. Under ZeRO-3
            with small tensors whole, beside their parts.
        gradients: of what is trained, from the backward pass to the optimizer's step. optimizer: AdamW's two moments
            and, under ZeRO, its own copy of the trained weights. buckets: what DDP and DeepSpeed reduce gradients in.
        total: of these. largest_layer: bytes of the largest decoder layer, whole: what ZeRO-3 and FSDP2 gather at a
            time, once or (prefetching) twice, on top of the total.
    """

    frozen: int
    trained: int
    gradients: int
    optimizer: int
    buckets: int
    total: int
    largest_layer: int


def plan_of(text: str, environment: Mapping[str, str] = os.environ) -> Plan:
    """A plan from "zero3:16", or "zero3:16/8" where 8 share a row; "auto": from what `accelerate launch` says in
    the environment.

    Raises:
        ValueError: not of this form, or an unknown kind.
    """
    if text != "auto":
        match = re.fullmatch(r"(\w+):(\d+)(?:/(\d+))?", text)
        if not match:
            raise ValueError(f"dry_run={text!r}: write auto, or a kind and a number of processes as in zero3:16.")
        return Plan(match[1], int(match[2]), int(match[3] or 1))
    kind = "ddp"
    if environment.get("ACCELERATE_USE_DEEPSPEED", "false") == "true":
        stage = environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
        file = Path(environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", ""))
        if file.is_file():
            stage = json.loads(file.read_text()).get("zero_optimization", {}).get("stage", 0)
        kind = f"zero{stage}" if int(stage) else "ddp"
    elif environment.get("ACCELERATE_USE_FSDP", "false") == "true":
        kind = "fsdp2"
    split = environment.get("ACCELERATE_USE_PARALLELISM_CONFIG", "false") == "true"
    sharing = int(environment.get("PARALLELISM_CONFIG_SP_SIZE", "1")) if split else 1
    return Plan(kind, int(environment.get("WORLD_SIZE", "1")), sharing)


def memory(module: nn.Module, plan: Plan) -> Memory:
    """Bytes each process of a plan holds for a module, on whatever device its parameters are; frozen ones have no
    gradient. Sharded parts are counted as even shares, rounded up."""

    def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
        return sum(t.numel() * t.element_size() for t in tensors)

    def share(whole: int, divided: bool) -> int:
        return -(-whole // plan.processes) if divided else whole

    def weights(parameters: Sequence[torch.Tensor], divided: bool) -> int:
        small = bytes_of(p for p in parameters if p.numel() <= LEFT_WHOLE) if plan.kind == "zero3" else 0
        return share(bytes_of(parameters), divided) + small

    learning = list(trained(module).values())
    at_rest = [p for p in module.parameters() if not p.requires_grad]
    held, numbers = bytes_of(learning), sum(p.numel() for p in learning)
    f, t, g, o = DIVIDED[plan.kind]
    moments, copy, buckets = 2 * held, 0, 0
    if plan.kind.startswith("zero"):
        copy, moments, buckets = 4 * numbers, 8 * numbers, 4 * BUCKET
    elif plan.kind == "ddp" and plan.processes > 1:
        buckets = held  # gradients are copied into them
    still, moving = weights(at_rest, f) + bytes_of(module.buffers()), weights(learning, t)
    parts = still, moving, share(held, g), share(moments + copy, o), buckets
    layers = max((m for m in module.modules() if isinstance(m, nn.ModuleList)), key=len, default=nn.ModuleList())
    return Memory(*parts, sum(parts), max((bytes_of(layer.parameters()) for layer in layers), default=0))


def report(module: nn.Module, config: "AnyConfig") -> dict:
    """What a run of `config` on `module` takes, as a plain dict that JSON can say.

    module: the PEFT model, on the meta device or a real one.
    """
    plan = plan_of(config.dry_run)
    learning = sum(p.numel() for p in trained(module).values())
    every = sum(p.numel() for p in module.parameters())
    rows = config.batch_size * config.accumulation * (plan.processes // plan.sharing)
    last = config.max_steps - 1
    steps = sorted({0, round(0.07 * last), last // 4, last // 2, 3 * last // 4, last})
    return {
        "plan": asdict(plan),
        "parameters": every,
        "trained": learning,
        "trained_share": learning / every,
        "bytes": asdict(memory(module, plan)),
        "left_out": LEFT_OUT,
        "rows_per_step": rows,
        "tokens_per_step": rows * config.sequence_length,
        "tokens": rows * config.sequence_length * config.max_steps,
        "schedule": [
            {"step": s, "learning_rate": learning_rate_at(s, config), "target": target_at(s, config)} for s in steps
        ],
    }


def text_of(found: dict) -> str:
    """`report` in lines for a terminal."""
    plan, held = found["plan"], found["bytes"]
    lines = [
        f"plan        {plan['kind']}, {plan['processes']} processes"
        + (f", {plan['sharing']} of which share a row" if plan["sharing"] > 1 else ""),
        f"parameters  {found['parameters']:,}, of which {found['trained']:,} learn ({found['trained_share']:.2%})",
        f"memory      {held['total'] / 1e6:,.0f} MB each process: "
        + ", ".join(f"{k} {held[k] / 1e6:,.0f}" for k in ("frozen", "trained", "gradients", "optimizer", "buckets")),
        f"            not counted: {found['left_out']}; largest layer {held['largest_layer'] / 1e6:,.0f} MB",
        f"tokens      {found['tokens_per_step']:,} a step at most, {found['tokens']:,} in all",
    ]
    for at in found["schedule"]:
        lines.append(f"step {at['step']:<6} learning rate {at['learning_rate']:.2e}  target {at['target']:.3f}")
    return "\n".join(lines)


def on_meta(shape: PretrainedConfig, dtype: str, gated: Callable[[PreTrainedModel], nn.Module]) -> nn.Module:
    """A model without weights. shape: its config. gated: puts an adapter on a transformers model and returns both."""
    with torch.device("meta"):
        return gated(AutoModelForCausalLM.from_config(shape, dtype=getattr(torch, dtype)))
