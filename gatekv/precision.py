"""Autocast ends where gatekv begins: queries, keys and values come in its dtype, and what follows chooses its own.

Under torch.autocast a float32 model hands attention keys in float32 (RoPE) beside values in bfloat16, and products that
ask for float32 come out in bfloat16. Inside `without_autocast` dtypes are what the code says, as without autocast.
"""

from contextlib import AbstractContextManager, nullcontext

import torch

Tensor = torch.Tensor


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Inside, tensors on such a device keep the dtypes they have."""
    if not torch.amp.is_autocast_available(device.type) or not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def attended(x: Tensor) -> Tensor:
    """A query, key or value as attention takes it: in autocast's dtype where that is on, float64 as it is."""
    kind = x.device.type
    if x.dtype is torch.float64 or not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return x
    return x.to(torch.get_autocast_dtype(kind))


def wide(numbers: torch.Tensor, beside: torch.Tensor | None = None) -> torch.Tensor:
    """In at least float32, in float64 if that is what they, or those beside them, are in: no loss is of half precision.

    numbers: of any shape, which they keep.
    """
    kind = torch.promote_types(numbers.dtype, torch.float32)
    return numbers.to(kind if beside is None else torch.promote_types(kind, beside.dtype))


def weight_dtype(linear: torch.nn.Module, otherwise: torch.dtype) -> torch.dtype:
    """What a linear layer multiplies in: its weight's dtype. Packed weights (bitsandbytes, GPTQ, AWQ, fp8) have none
    that numbers could be cast to; such layers take what the model computes in, which is `otherwise`."""
    dtype = getattr(getattr(linear, "weight", None), "dtype", otherwise)
    return dtype if dtype.is_floating_point and dtype.itemsize > 1 else otherwise
