"""Where checkpoints lie: `checkpoint-<step>` folders that are whole or not there, of which the newest few stay.

A folder is written under another name, every file and then the folder is flushed to disk, and one rename makes it a
checkpoint. `state.json` records the hash of the tensors beside it, so that a file damaged later is noticed too. What is
to go gets another name first. A crash at any moment leaves the checkpoints whole and, at most, a `.partial` folder that
nothing reads and the next save clears away.
"""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

PARTIAL = ".partial"
TENSORS, STATE = "state.safetensors", "state.json"


def _flush(path: Path) -> None:
    """Have the system write a file, or a folder's list of names, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remove(folder: Path) -> None:
    """A half-removed folder must not look like a checkpoint, so it loses its name first."""
    gone = folder.with_name(f"{folder.name}.old{PARTIAL}")
    shutil.rmtree(gone, ignore_errors=True)
    os.replace(folder, gone)
    shutil.rmtree(gone, ignore_errors=True)


def steps(output: Path) -> list[int]:
    """Steps of the checkpoints in a folder, ascending."""
    names = (re.fullmatch(r"checkpoint-(\d+)", p.name) for p in output.glob("checkpoint-*"))
    return sorted(int(match[1]) for match in names if match)


def folder_of(output: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return output / f"checkpoint-{step}"


def write(output: Path, step: int, tensors: dict[str, torch.Tensor], state: dict, keep: int) -> Path:
    """Add a checkpoint, then remove all but the newest `keep`, and any of a later step: it is of an abandoned run.

    tensors: on the CPU, contiguous. state: what JSON can say. Returns the checkpoint's folder. OSError: disk full, …
    """
    output.mkdir(parents=True, exist_ok=True)
    for stale in output.glob(f"checkpoint-*{PARTIAL}"):
        shutil.rmtree(stale, ignore_errors=True)
    folder = folder_of(output, step)
    work = folder.with_name(folder.name + PARTIAL)
    work.mkdir()
    save_file(tensors, work / TENSORS)
    (work / STATE).write_text(json.dumps(state | {"step": step, "sha256": _sha256(work / TENSORS)}))
    for path in (work / TENSORS, work / STATE, work):
        _flush(path)
    if folder.exists():  # a damaged one that was passed over on resuming
        _remove(folder)
    os.replace(work, folder)
    _flush(output)
    found = steps(output)
    earlier = [s for s in found if s <= step]
    for old in earlier[:-keep] + [s for s in found if s > step]:
        _remove(folder_of(output, old))
    return folder


def read(folder: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """(tensors, state) of a checkpoint.

    Raises:
        ValueError: nothing there, or not what was written.
    """
    if not (folder / STATE).is_file():
        raise ValueError(f"{folder} is no checkpoint: it has no {STATE}.")
    try:
        state = json.loads((folder / STATE).read_text())
        whole = _sha256(folder / TENSORS) == state["sha256"]
        tensors = load_file(folder / TENSORS) if whole else {}
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"the checkpoint in {folder} is damaged ({type(error).__name__}: {error}).") from error
    if not whole:
        raise ValueError(f"the checkpoint in {folder} is damaged: {TENSORS} is not what {STATE} says was written.")
    return tensors, state
