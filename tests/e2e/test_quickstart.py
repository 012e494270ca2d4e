"""docs/quickstart.md runs as printed, block after block, in one process, outside the checkout."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gatekv.bases import HUB_NAME
from gatekv.fetch import fetch

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.exhaustive


def test_quickstart_runs_as_printed(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "quickstart.md").read_text(), re.S)
    assert len(blocks) == 6
    (tmp_path / HUB_NAME).parent.mkdir()
    (tmp_path / HUB_NAME).symlink_to(Path(fetch()).resolve())  # the Hub's name, where there is no Hub
    env = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", "\n".join(blocks)]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "trainable params" in done.stdout and done.stdout.count("loss ") == 2 and "Where does he go?" in done.stdout
    assert (tmp_path / "moby.safetensors").is_file() and (tmp_path / "my-gate" / "adapter_config.json").is_file()
