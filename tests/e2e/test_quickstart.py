"""docs/quickstart.md runs as printed, block after block, in one process."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.exhaustive


def test_quickstart_runs_as_printed():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "quickstart.md").read_text(), re.S)
    assert len(blocks) == 4
    env = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(ROOT)}
    code = "\n".join(blocks)
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=600
        )
    finally:
        shutil.rmtree(ROOT / "checkpoints" / "quickstart", ignore_errors=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "trainable params" in done.stdout and done.stdout.count("loss ") == 2 and "Where does he go?" in done.stdout
