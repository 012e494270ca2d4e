"""Rows that several processes compute together: what they need to agree on, and what cannot be computed so."""

import torch.distributed as dist
from accelerate import Accelerator, DistributedType
from torch import nn

from gatekv.config import GateSpec
from gatekv.geometry import foreign_layers
from gatekv.modules import base_model, wrappers
from gatekv.ops.sequence import ALONE, Sequence


def sequence_of(accelerator: Accelerator) -> Sequence:
    """The processes that share this one's rows: neighbours, `sp_size` of accelerate's parallelism_config at a time.

    Raises:
        ValueError: tp_size or cp_size, a backend that cannot, or a size that does not divide the processes.
    """
    split = accelerator.parallelism_config
    if split is None or split.non_data_parallel_size == 1:
        return ALONE
    size, world = split.sp_size, accelerator.num_processes
    if split.non_data_parallel_size != size:
        raise ValueError(
            "gates judge whole rows, which tp_size and cp_size cut apart (docs/distributed.md says why): set them to 1 "
            "and let processes share rows by sp_size."
        )
    if accelerator.distributed_type == DistributedType.FSDP:
        raise ValueError(f"sp_size={size} is not supported under FSDP2: launch with launch/sequence.yaml (ZeRO).")
    if world % size:
        raise ValueError(f"sp_size={size} must divide the number of processes, which is {world}.")
    group, _ = dist.new_subgroups(size)
    return Sequence(group, dist.get_rank(group), size)


def check(model: nn.Module, spec: GateSpec, prefill: str, sequence: Sequence) -> None:
    """ValueError where rows cannot be shared: says what to change. model: with gates as spec says."""
    inner, size = base_model(model), sequence.size
    heads = wrappers(model)[0].geometry.kv_heads
    if heads % size:
        raise ValueError(
            f"sp_size={size} must divide the model's {heads} KV heads: in attention each process has some."
        )
    if any(foreign_layers(inner)):
        raise ValueError(
            f"{type(inner).__name__} has layers with a sliding window or a state, whose rows are not shared: set "
            "sp_size to 1."
        )
    if inner.config._attn_implementation != "sdpa":
        raise ValueError("sp_size above 1 needs attn_implementation='sdpa', whose masks may be left out.")
    if spec.gate == "attention":
        raise ValueError(
            "gate='attention' reads other tokens, which other processes have: use another gate, or sp_size 1."
        )
    if prefill == "dense":
        raise ValueError("prefill='dense' trains behind a cached prompt, which is not shared: use prefill='sparse'.")
