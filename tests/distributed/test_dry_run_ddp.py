"""What a dry run says of two processes is what each of them holds."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = str(Path(__file__).with_name("holder.py"))


def test_ddp_holds_what_was_predicted(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", port, "--mixed_precision", "no",
               "--num_machines", "1", "--dynamo_backend", "no", "--multi_gpu", "--num_processes", "2", WORKER,
               str(tmp_path / "result.json")]  # fmt: skip
    env = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr[-3000:]
    result = json.loads((tmp_path / "result.json").read_text())
    for part, found in result["found"].items():
        assert result["said"][part] == pytest.approx(found, rel=0.1), part
    assert result["said"]["total"] == pytest.approx(sum(result["found"].values()), rel=0.1)
