"""What can be told of an adapter's two files before anything is built on them, in a folder or on the Hub.

Only JSON and safetensors are asked for, and no tensor is read: sizes come from the file's header, whose own size is
bounded. Everything that is wrong is a ValueError that says what to do.
"""

import json
import os
from typing import Any

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError, safe_open

MOST_CONFIG = 4 << 20  # bytes; a calibration takes some 20 kB
MOST_HEADER = 16 << 20  # bytes; a tensor takes some 150
FLOATS = ("F64", "F32", "F16", "BF16")
AGAIN = "copy the whole folder again, or download it with force_download=True"


def find(name: str, filename: str, subfolder: str | None = None, **hub: Any) -> str | None:
    """Where a file of an adapter lies: in the folder `name`, or in the Hub's cache, downloaded if need be.

    hub: `revision`, `token`, `cache_dir`, … of `huggingface_hub.hf_hub_download`. None: the adapter has no such file.

    Raises:
        ValueError: neither a folder nor a repository that can be read.
    """
    if os.path.isdir(name):
        path = os.path.join(name, subfolder or "", filename)
        return path if os.path.isfile(path) else None
    try:
        if not constants.HF_HUB_OFFLINE:  # a cached file alone is not enough: PEFT asks again, and would try the pickle
            url = hf_hub_url(name, filename, subfolder=subfolder, revision=hub.get("revision"))
            get_hf_file_metadata(url, token=hub.get("token"))
        return hf_hub_download(name, filename, subfolder=subfolder, **hub)
    except GatedRepoError as error:
        raise ValueError(f"{name} is gated: ask for access on its page, then pass token=… or log in.") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ValueError(
            f"{name} is no folder here, and no repository on the Hub that you may read: check the name; for a private "
            "one pass token=…, or log in with `hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        raise ValueError(f"{name} has no revision {hub.get('revision')!r}: name a branch, tag or commit.") from error
    except LocalEntryNotFoundError as error:
        raise ValueError(
            f"{filename} of {name} is not in the cache and cannot be downloaded ({str(error).splitlines()[0]}): check "
            "the network, or give an adapter's folder."
        ) from error
    except EntryNotFoundError:
        return None
    except HTTPError as error:
        raise ValueError(
            f"{filename} of {name} cannot be downloaded ({str(error).partition(chr(10))[0]}): try again, or work from "
            "the cache with HF_HUB_OFFLINE=1."
        ) from error


def read_config(path: str) -> dict:
    """The JSON object in a file; ValueError: damaged, too large, or something else."""
    if os.path.getsize(path) > MOST_CONFIG:
        raise ValueError(f"{path} has {os.path.getsize(path):,} bytes, which no adapter's config has: {AGAIN}.")
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}): {AGAIN}.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no JSON object: {AGAIN}.")
    return found


def read_shapes(path: str) -> dict[str, tuple[int, ...]]:
    """Name -> shape of a safetensors file's tensors, from its header.

    Raises:
        ValueError: damaged, a header too large to be one, or tensors that are not floating point.
    """
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
    if size > MOST_HEADER:
        raise ValueError(f"{path} is truncated or damaged (a header of {size:,} bytes): {AGAIN}.")
    try:
        with safe_open(path, "pt") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}
            dtypes = {name: part.get_dtype() for name, part in parts.items()}
            shapes = {name: tuple(part.get_shape()) for name, part in parts.items()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is truncated or damaged ({error}): {AGAIN}.") from error
    for name, dtype in dtypes.items():
        if dtype not in FLOATS:
            raise ValueError(f"tensor '{name}' of {path} has dtype {dtype}, gates are floating point: {AGAIN}.")
    return shapes


def check_shapes(found: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]]) -> None:
    """ValueError unless every wanted tensor is there, in its shape."""
    cure = "the file belongs to another config or base, or was edited: load the folder as it was saved."
    if missing := sorted(set(wanted) - set(found)):
        raise ValueError(f"missing tensor '{missing[0]}' ({len(missing)} in all) in the adapter file: {cure}")
    for name, shape in wanted.items():
        if found[name] != shape:
            raise ValueError(f"tensor '{name}' has shape {found[name]}, the config asks for {shape}: {cure}")
