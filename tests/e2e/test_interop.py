"""docs/interop.md runs as printed, block after block, in one process."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.exhaustive


def test_the_page_runs_as_printed():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "interop.md").read_text(), re.S)
    assert len(blocks) == 3
    env = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH": str(ROOT)}
    try:
        done = subprocess.run(
            [sys.executable, "-c", "\n".join(blocks)], cwd=ROOT, env=env, capture_output=True, text=True, timeout=600
        )
    finally:
        shutil.rmtree(ROOT / "checkpoints" / "trl", ignore_errors=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("'oracle'") == 2
    assert re.findall(r"^(\w+Press)\b", done.stdout, re.M) == ["GateKVPress", "AdaKVPress", "SnapKVPress"]
