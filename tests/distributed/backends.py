"""Two processes on CPUs over gloo under each backend: how tests launch them, and what each needs to run there."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import ParallelismConfig, PartialState
from accelerate.utils import DeepSpeedPlugin, DistributedType
from conftest import tiny
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CPU = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
SHARDED = CPU | {"ACCELERATE_TORCH_DEVICE": "cpu", "DS_ACCELERATOR": "cpu"}
SHARED = {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_SP_SIZE": "2"}  # both have parts of each row
# Launch flags, environment. What plain accelerate cannot do on a CPU is patched by `on_cpu`.
BACKENDS = {
    "ddp": (["--config_file", "launch/ddp.yaml"], CPU | {"ACCELERATE_USE_CPU": "true"}),
    "zero1": (["--use_deepspeed", "--zero_stage", "1"], SHARDED),
    "zero2": (["--config_file", "launch/zero2.yaml"], SHARDED),
    "zero2_offload": (["--config_file", "launch/zero2.yaml", "--offload_optimizer_device", "cpu"], SHARDED),
    "zero3": (["--config_file", "launch/zero3.yaml"], SHARDED),
    "fsdp2": (["--config_file", "launch/fsdp2.yaml"], SHARDED),
    "sequence_ddp": (["--config_file", "launch/ddp.yaml"], CPU | {"ACCELERATE_USE_CPU": "true"} | SHARED),
    "sequence_zero2": (["--config_file", "launch/sequence.yaml", "--parallelism_config_sp_size", "2"], SHARDED),
    "sequence_zero3": (["--config_file", "launch/zero3.yaml"], SHARDED | SHARED),
}
SHARING = [name for name in BACKENDS if name.startswith("sequence")]
ONE = ([], CPU | {"ACCELERATE_USE_CPU": "true"})
ZERO = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false"}
LAUNCHED = {  # what `accelerate launch` would say in the environment
    "ddp": {},
    "zero2": ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
    "zero3": ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
    "fsdp2": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
              "FSDP_CPU_RAM_EFFICIENT_LOADING": "false", "FSDP_RESHARD_AFTER_FORWARD": "true"},
}  # fmt: skip


def save_base(folder, **changes) -> None:
    """A two-layer model with a tokenizer of characters, on disk, so that ZeRO-3 can load it in parts."""
    tiny(dtype=torch.float32, **changes).save_pretrained(folder)
    letters = Tokenizer(models.WordLevel({chr(i): i - 32 for i in range(32, 127)} | {"\n": 95}, unk_token=" "))
    letters.pre_tokenizer, letters.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=letters, eos_token="~").save_pretrained(folder)


def chosen_of(cases: list[tuple], core) -> list:
    """Parameters of all cases, of which those in `core` run in `make test`."""
    return [pytest.param(*case, marks=() if case in core else pytest.mark.exhaustive) for case in cases]


def to_run(request, test: str) -> list[tuple]:
    """The parameters of each case of a test that is to run: a launch does what those need and no more."""
    items = [item for item in request.session.items if item.path == request.path and item.originalname == test]
    return [tuple(item.callspec.params.values()) for item in items]


def free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def launch(script: str, backend: str, *arguments) -> None:
    """Run a script of this folder by `accelerate launch` in two processes, or alone in one if the backend is "single";
    its arguments are the backend and these."""
    flags, environment = ONE if backend == "single" else BACKENDS[backend]
    command = [sys.executable]
    if backend != "single":
        command += ["-m", "accelerate.commands.launch", *flags, "--num_machines", "1", "--num_processes", "2"]
        command += ["--main_process_port", free_port(), "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += [str(HERE / script), backend, *map(str, arguments)]
    run = subprocess.run(command, env=os.environ | environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-6000:]


def start(command: list[str], backend: str, **environment: str) -> list[subprocess.Popen]:
    """Both processes of a Python command, without a launcher that would stop one when the other ends."""
    common = BACKENDS[backend][1] | LAUNCHED[backend] | {"ACCELERATE_MIXED_PRECISION": "no"} | environment
    common |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    return [
        subprocess.Popen([sys.executable, *command], stderr=subprocess.PIPE, text=True, cwd=ROOT,
                         env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in (0, 1)
    ]  # fmt: skip


def end(processes: list[subprocess.Popen]) -> list[str]:
    """What each wrote to stderr; fails rather than waiting for ever."""
    try:
        return [p.communicate(timeout=240)[1] for p in processes]
    finally:
        for p in processes:
            p.kill()


def on_cpu(backend: str, smallest: int = 0) -> None:
    """To be called first in a process that was launched. smallest: numbers in a tensor that ZeRO-3 leaves whole."""
    torch.set_num_threads(1)
    if "zero" in backend:
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else a minute of compiling
        made = DeepSpeedPlugin.__post_init__

        def small(plugin):
            made(plugin)
            plugin.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = smallest

        DeepSpeedPlugin.__post_init__ = small
    if "zero" in backend or backend == "fsdp2":  # accelerate knows them on accelerators only
        PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
    if backend == "sequence_ddp":
        ParallelismConfig._validate_accelerator = lambda *args: None
