"""What the tests of the real model share: the README's training command, run once, and where its adapter lies."""

import re
import sys
from pathlib import Path

import pytest
from printed import commands, environment, run

README = Path(__file__).resolve().parents[2] / "README.md"
SHORT = ["--max_steps", "2", "--save_every", "1", "--sequence_length", "128", "--dtype", "float32", "--threads", "1"]


@pytest.fixture(scope="session")
def env(tmp_path_factory):
    """Variables under which the embedded model is found by its Hub name."""
    return environment(tmp_path_factory.mktemp("hub"))


@pytest.fixture(scope="session")
def adapter(tmp_path_factory, env) -> Path:
    """The folder that the README's training command writes, in two short steps and in an empty folder."""
    words = next(
        w for w in commands(README) if w[:2] == ["accelerate", "launch"] and re.search("recipes.cpt", " ".join(w))
    )
    folder = tmp_path_factory.mktemp("run")
    out = run([sys.executable, "-m", "accelerate.commands.launch", *words[2:], *SHORT], folder, env)
    name = words[words.index("--output_dir") + 1]
    assert f"saved {name}" in out
    return folder / name
