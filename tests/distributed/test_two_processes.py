"""Two processes on the CPU over gloo give the single process's loss: DDP and ZeRO-2."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = str(Path(__file__).with_name("worker.py"))
SETTINGS = {"abs": {}, "lagrange": {"sparsity": "lagrange"}, "accumulated": {"accumulation": 2}}


def launch(out: Path, batch_size: int, settings: dict, flags: list[str], **environment) -> dict:
    out.mkdir(parents=True)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--main_process_port",
        str(port),
        "--mixed_precision",
        "no",
    ]
    command += [
        "--num_machines",
        "1",
        "--dynamo_backend",
        "no",
        *flags,
        WORKER,
        str(out),
        str(batch_size),
        json.dumps(settings),
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", **environment}
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=400)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads((out / "result.json").read_text())


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    results = {}

    def get(name):
        if name not in results:
            folder = tmp_path_factory.mktemp("single") / name
            results[name] = launch(folder, 2, SETTINGS[name], ["--cpu", "--num_processes", "1"])
        return results[name]

    return get


@pytest.mark.parametrize("name", list(SETTINGS))
def test_ddp(name, single, tmp_path):
    flags = ["--multi_gpu", "--num_processes", "2"]
    got = launch(tmp_path / "ddp", 1, SETTINGS[name], flags, ACCELERATE_USE_CPU="true")
    assert got["world"] == 2
    assert got["losses"] == pytest.approx(single(name)["losses"], abs=1e-5)
    assert got["sum"] == pytest.approx(single(name)["sum"], rel=1e-5)


@pytest.mark.parametrize("name", ["abs", "accumulated"])
def test_zero2(name, single, tmp_path):
    flags = ["--use_deepspeed", "--zero_stage", "2", "--num_processes", "2"]
    got = launch(tmp_path / "deepspeed", 1, SETTINGS[name], flags, DS_ACCELERATOR="cpu")
    assert got["world"] == 2
    assert got["losses"] == pytest.approx(single(name)["losses"], abs=1e-5)
