"""Runs what documents print: blocks of code as they stand, in order, in an empty folder, with nothing put in.

    python tests/printed.py README.md          # with the Python of an environment that has gatekv, from any folder

Where no hub can be reached, a Hub cache made here holds the embedded model under its Hub name, so that a block that
names it finds it as it would with a network.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

COMMIT = "0" * 40


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of a page in one language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.S | re.M)


def commands(page: Path) -> list[list[str]]:
    """The commands of a page's bash blocks, as words, without comments; a backslash at a line's end joins it."""
    lines = "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def environment(folder: Path) -> dict[str, str]:
    """Variables under which the embedded model is found by its Hub name, offline. folder: for the cache."""
    from gatekv.bases import HUB_NAME
    from gatekv.fetch import fetch

    repository = folder / f"models--{HUB_NAME.replace('/', '--')}"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True, exist_ok=True)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / "main").write_text(COMMIT)
    for file in fetch().iterdir():
        if not (snapshot / file.name).exists():
            (snapshot / file.name).symlink_to(file)
    own = {"HF_HUB_CACHE": str(folder), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | own


def run(command: list[str], folder: Path, env: dict[str, str], timeout: int = 900) -> str:
    """What a command prints; AssertionError, with its errors, where it fails."""
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def run_python(page: Path, folder: Path, env: dict[str, str], timeout: int = 900) -> str:
    """The output of a page's Python blocks, run as one program by this Python in `folder`."""
    return run([sys.executable, "-c", "\n".join(blocks(page, "python"))], folder, env, timeout)


def smoke(page: Path) -> None:
    """What an installed gatekv must do in an empty folder: the page's Python, and the command."""
    import tempfile

    import gatekv

    with tempfile.TemporaryDirectory() as name:
        folder, checkout = Path(name), Path(__file__).resolve().parents[1]
        assert Path(gatekv.__file__).parent != checkout / "gatekv", "the installed package is tried, not the checkout"
        env = environment(folder / "hub")
        program = [sys.executable, "-m", "gatekv"]
        print(run_python(page, folder, env))
        adapter = ["--adapter", "smollm2-135m-gate"]
        for words in (
            ["--help"], ["evaluate", "--help"], ["generate", *adapter, "--budget", ".25"],
            ["evaluate", *adapter, "--n", "2", "--n_ppl", "1", "--policies", "gate+global,snapkv", "--out", "out"],
            ["validate", *adapter, "--prompt_tokens", "1024"],
        ):  # fmt: skip
            print(f"$ gatekv {' '.join(words)}")
            print(run([*program, *words], folder, env))
        assert (folder / "out" / "results.json").is_file()
    print("the installed package works")


if __name__ == "__main__":
    smoke(Path(sys.argv[1]).resolve())
