"""Which implementation of attention runs: chosen from what is installed, or (paged attention) named by the user."""

import importlib
import importlib.util
from collections.abc import Callable

import torch

from gatekv.config import check_choice

BACKENDS = {
    "torch": "gatekv.ops.paged_attention",
    "triton": "gatekv.ops.paged_triton",
    "flash": "gatekv.ops.paged_flash",
}
NEEDS = {"triton": "triton", "flash": "flash_attn"}


def choose(backend: str | None, block_size: int, device: torch.device, dtype: torch.dtype) -> str:
    """The name of the backend to use; None picks the best that can run here.

    Raises:
        ValueError: unknown name, a package that is not installed, or a block_size that flash-attn cannot read.
    """
    half = dtype in (torch.float16, torch.bfloat16)
    if backend is None:
        if device.type == "cuda":
            if half and block_size % 256 == 0 and importlib.util.find_spec("flash_attn"):
                return "flash"
            if importlib.util.find_spec("triton"):
                return "triton"
        return "torch"
    check_choice("backend", backend, BACKENDS)
    if backend in NEEDS and importlib.util.find_spec(NEEDS[backend]) is None:
        raise ValueError(f"backend={backend!r} needs the package {NEEDS[backend]}: install it, or use backend='torch'.")
    if backend == "flash" and (block_size % 256 or not half):
        raise ValueError(
            f"backend='flash' reads pages of a multiple of 256 tokens in half precision; got block_size={block_size}, "
            f"{dtype}: pass block_size=256 and load the model in bfloat16, or use backend='triton'."
        )
    return backend


def triton_serves(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether gated attention of such tensors runs in Triton: on a GPU, with Triton installed, below float64."""
    return device.type == "cuda" and dtype != torch.float64 and importlib.util.find_spec("triton") is not None


def load(name: str) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """The `paged_segment` of a backend."""
    return importlib.import_module(BACKENDS[name]).paged_segment


def load_coded(name: str) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """The `coded_segment` that goes with a backend of paged attention; flash-attn reads no codes, so Triton does."""
    compiled = name != "torch" and importlib.util.find_spec("triton") is not None
    return importlib.import_module(f"gatekv.ops.coded_{'triton' if compiled else 'attention'}").coded_segment
