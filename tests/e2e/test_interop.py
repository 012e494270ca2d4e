"""docs/integrations.md runs as printed, its TRL and kvpress blocks in one process, outside the checkout."""

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


def test_the_page_runs_as_printed(tmp_path):
    page = (ROOT / "docs" / "integrations.md").read_text().split("## lm-evaluation-harness")[0]  # needs data sets
    blocks = re.findall(r"```python\n(.*?)```", page, re.S)
    assert len(blocks) == 3
    (tmp_path / HUB_NAME).parent.mkdir()
    (tmp_path / HUB_NAME).symlink_to(Path(fetch()).resolve())  # the Hub's name, where there is no Hub
    env = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", "\n".join(blocks)]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("'oracle'") == 2
    assert re.findall(r"^(\w+Press)\b", done.stdout, re.M) == ["GateKVPress", "AdaKVPress", "SnapKVPress"]
