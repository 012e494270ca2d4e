"""Parameters and optimizer state that are spread over processes (ZeRO, FSDP2): made ready, gathered, put back.

The rest of training never asks which backend runs. Every function here is called by all processes together.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType
from accelerate.utils import DynamoBackend
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.integrations import deepspeed_config, is_deepspeed_zero3_enabled

from gatekv.fingerprint import sampled
from gatekv.modules import attention_layers, wrappers

if TYPE_CHECKING:
    from gatekv.training.options import RunConfig

    class ZeroParameter(torch.nn.Parameter):
        """A parameter as ZeRO-3 leaves it: whole only while it is gathered."""

        ds_shape: torch.Size
        ds_tensor: torch.Tensor


Tensors = dict[str, torch.Tensor]
MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW


def prepare(
    accelerator: Accelerator, module: torch.nn.Module, optimizer: torch.optim.Optimizer, config: "RunConfig"
) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """`accelerator.prepare(module, optimizer)`, told how many rows make a step and along which modules to shard.

    Raises:
        ValueError: FSDP1, ZeRO stage 0, mixed precision or compilation of what is sharded.
    """
    accelerator.gradient_accumulation_steps = config.accumulation
    sharded = accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP)
    if sharded and accelerator.mixed_precision != "no":
        raise ValueError(
            f"mixed_precision={accelerator.mixed_precision} would train in it too: launch with mixed_precision='no', "
            "and choose the frozen base's dtype with --dtype."
        )
    compiler = accelerator.state.dynamo_plugin.backend
    if sharded and compiler != DynamoBackend.NO:
        raise ValueError(
            f"dynamo_backend={compiler.value} would compile around what is gathered layer by layer, which nothing here "
            "tests: launch with --dynamo_backend no."
        )
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        plugin = accelerator.state.deepspeed_plugin
        if plugin.zero_stage == 0:
            raise ValueError("zero_stage=0 shards nothing: launch with launch/ddp.yaml, or zero_stage 1, 2 or 3.")
        plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = config.batch_size
        plugin.deepspeed_config["gradient_accumulation_steps"] = config.accumulation
        plugin.deepspeed_config["gradient_clipping"] = config.max_grad_norm
        plugin.deepspeed_config["zero_allow_untested_optimizer"] = True
        # Under optimizer offload too it is PyTorch's AdamW that runs: DeepSpeed's own is compiled on first use.
        plugin.deepspeed_config["zero_force_ds_cpu_optimizer"] = False
    if accelerator.distributed_type == DistributedType.FSDP:
        if not accelerator.is_fsdp2:
            raise ValueError("FSDP1 is not supported: set fsdp_version: 2, as launch/fsdp2.yaml does.")
        plugin = accelerator.state.fsdp_plugin
        plugin.auto_wrap_policy, plugin.transformer_cls_names_to_wrap = transformer_auto_wrap_policy, _units(module)
    with _rows_whole(accelerator):
        return accelerator.prepare(module, optimizer)


@contextmanager
def _rows_whole(accelerator: Accelerator) -> Iterator[None]:
    """Inside, Accelerate sees no shared rows: under DeepSpeed it would give the model another attention for them."""
    split = accelerator.parallelism_config
    size = 1 if split is None else split.sp_size
    if size > 1:
        split.sp_size = 1
    try:
        yield
    finally:
        if size > 1:
            split.sp_size = size


@contextmanager
def loading(dtype: torch.dtype) -> Iterator[None]:
    """Inside, `from_pretrained` under ZeRO-3 keeps the base in `dtype`: zero.Init would take float32, whatever it asks.

    Raises:
        ValueError: float64 under ZeRO-3.
    """
    if not is_deepspeed_zero3_enabled() or dtype == torch.float32:
        yield
        return
    if dtype not in (kinds := {torch.bfloat16: "bf16", torch.float16: "fp16"}):
        raise ValueError(f"ZeRO-3 does not hold {dtype}: use float32, bfloat16 or float16, or launch/fsdp2.yaml.")
    settings = deepspeed_config()  # transformers' copy: the optimizer and what is trained stay in float32
    settings[kinds[dtype]] = {"enabled": True}
    try:
        yield
    finally:
        del settings[kinds[dtype]]


def _units(module: torch.nn.Module) -> list[str]:
    """Class names that FSDP2 gathers and frees as one: decoder layers, and in them what learns.

    A gate's loss may leave its layer beside the layer's output (`Observe`), so the gate needs a unit, and hooks on its
    own output, for its weights to be there in the backward pass.
    """
    found = {type(parent).__name__ for parent, _ in attention_layers(module)}
    for w in wrappers(module):
        found |= {type(part).__name__ for part in w.gatekv_gate.values()}
        found |= {type(part).__name__ for maps in w.gatekv_less.values() for part in maps.children()}
    return sorted(found)


def most(count: int, device: torch.device) -> int:
    """The largest `count` of all processes: a sharded module must be called equally often by each of them."""
    if not dist.is_initialized():
        return count
    largest = torch.tensor(count, device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


@contextmanager
def in_parts(module: torch.nn.Module) -> Iterator[None]:
    """Inside, parts of a prepared module may be called without going through its own forward.

    FSDP2 gathers what lies outside the decoder layers (embeddings, head) in the root's forward only.
    """
    if not isinstance(module, FSDPModule):
        yield
        return
    module.unshard()
    try:
        yield
    finally:
        module.reshard()


@contextmanager
def whole_sample(model: torch.nn.Module) -> Iterator[None]:
    """Inside, the weights of a model loaded under ZeRO-3 that an adapter's fingerprint of its base reads are whole."""
    if not is_deepspeed_zero3_enabled():
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([p for part in sampled(model).values() for p in part.values()]):
        yield


def shapes(accelerator: Accelerator, named: dict[str, torch.nn.Parameter]) -> dict[str, torch.Size]:
    """Shapes of the whole tensors."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED and accelerator.state.deepspeed_plugin.zero_stage == 3:
        return {name: cast("ZeroParameter", p).ds_shape for name, p in named.items()}
    return {name: p.shape for name, p in named.items()}


def gather(accelerator: Accelerator, named: dict[str, torch.nn.Parameter]) -> Tensors:
    """Whole copies on the CPU, on every process."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return {name: _whole(p) for name, p in named.items()}
    import deepspeed

    found = {}
    for name, p in named.items():  # one by one: never more than one is held twice
        with deepspeed.zero.GatheredParameters([p]):
            found[name] = p.detach().cpu().clone()
    return found


def adapter_state(accelerator: Accelerator, model: torch.nn.Module) -> Tensors:
    """The adapter's tensors, whole, for `model.save_pretrained(folder, state_dict=…)`."""
    return gather(
        accelerator, {name: p for name, p in model.named_parameters() if "gatekv_" in name or ".lora_" in name}
    )


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu().clone()


def gather_moments(
    accelerator: Accelerator, optimizer: torch.optim.Optimizer, named: dict[str, torch.nn.Parameter]
) -> Tensors:
    """AdamW's state as {"exp_avg.NAME", "exp_avg_sq.NAME", "step.NAME"}, whole, on the CPU; empty before a step."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        state = optimizer.state
        return {f"{key}.{name}": _whole(v) for name, p in named.items() for key, v in state.get(p, {}).items()}
    from deepspeed.utils import safe_get_full_optimizer_state

    flat = list(_flat_state(optimizer).values())  # of this process's shards
    found: Tensors = {}
    for name, p in named.items() if flat else ():
        found |= {f"{key}.{name}": safe_get_full_optimizer_state(p, key).cpu() for key in MOMENTS}
        found[f"step.{name}"] = torch.tensor(float(flat[0]["step"]))
    return found


def _flat_state(optimizer: torch.optim.Optimizer) -> dict:
    """State of the AdamW inside ZeRO's optimizer inside accelerate's."""
    return cast(Any, optimizer).optimizer.optimizer.state


@torch.no_grad()
def put(accelerator: Accelerator, named: dict[str, torch.nn.Parameter], tensors: Tensors) -> None:
    """Overwrite parameters by whole tensors, which every process has."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        for name, p in named.items():
            p.copy_(_like(tensors[name], p))
        return
    import deepspeed

    for name, p in named.items():
        with deepspeed.zero.GatheredParameters([p], modifier_rank=0):
            p.copy_(tensors[name])
        _put_flat(accelerator, p, tensors[name])  # the optimizer has a copy of its own


@torch.no_grad()
def put_moments(
    accelerator: Accelerator, optimizer: torch.optim.Optimizer, named: dict[str, torch.nn.Parameter], tensors: Tensors
) -> None:
    """Overwrite AdamW's state by what `gather_moments` found, with however many processes."""
    if not tensors:
        return
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        for name, p in named.items():
            state = {key: _like(tensors[f"{key}.{name}"], p) for key in MOMENTS}
            optimizer.state[p] = {"step": tensors[f"step.{name}"].clone()} | state
        return
    _create_state(accelerator, optimizer)
    for name, p in named.items():
        for key in MOMENTS:
            _put_flat(accelerator, p, tensors[f"{key}.{name}"], key)
    step = tensors[f"step.{next(iter(named))}"]
    for state in _flat_state(optimizer).values():
        state["step"] = step.clone() if torch.is_tensor(state["step"]) else int(step)


def _create_state(accelerator: Accelerator, optimizer: torch.optim.Optimizer) -> None:
    """ZeRO has no optimizer state to write to before its first step: zeros, as AdamW would make them."""
    from deepspeed.utils import lazy_init_hp_params_optimizer_state

    zero = cast(Any, optimizer).optimizer
    adam, stage3 = zero.optimizer, accelerator.state.deepspeed_plugin.zero_stage == 3
    flats = zero.fp32_partitioned_groups_flat if stage3 else zero.single_partition_of_fp32_groups
    for i, flat in enumerate(flats):
        step = torch.tensor(0.0) if isinstance(adam, torch.optim.AdamW) else 0  # DeepSpeedCPUAdam counts in int
        adam.state[flat] = {"step": step} | {key: torch.zeros_like(flat) for key in MOMENTS}
        if not stage3:  # which looks the state up at every access
            lazy_init_hp_params_optimizer_state(zero.bit16_groups[i], flat, adam.state)


def _put_flat(accelerator: Accelerator, p: torch.nn.Parameter, value: torch.Tensor, key: str | None = None) -> None:
    """Write p's part of the optimizer's flat fp32 parameters, or of their moment `key`."""
    from deepspeed import utils

    value = value.to(accelerator.device)
    if accelerator.state.deepspeed_plugin.zero_stage == 3:
        # This process's part by hand: safe_set_full_* reads past the end of tensors that do not divide evenly.
        size = cast("ZeroParameter", p).ds_tensor.numel()
        padded = torch.nn.functional.pad(value.flatten(), (0, size * accelerator.num_processes - value.numel()))
        part = padded.narrow(0, size * accelerator.process_index, size)
        if key is None:
            utils.safe_set_local_fp32_param(p, part)
        else:
            utils.safe_set_local_optimizer_state(p, part, key)
    elif key is None:
        utils.safe_set_full_fp32_param(p, value)
    else:
        utils.safe_set_full_optimizer_state(p, value, key)


def _like(tensor: torch.Tensor, p: torch.nn.Parameter) -> torch.Tensor:
    """A whole tensor on p's device, cut as p is."""
    if isinstance(p, DTensor):
        return distribute_tensor(tensor.to(p.device), p.device_mesh, p.placements, src_data_rank=None)
    return tensor.to(p.device, copy=True)
