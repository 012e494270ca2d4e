"""A scalar whose gradient is computed together with it, in the forward pass.

For a loss that is measured inside a layer, beside the layer's output. Where weights are sharded, they are whole while
their layer runs forward; nothing gathers them again for a backward pass that does not come through that output.
"""

from collections.abc import Callable
from typing import Any

import torch


class _OnTheSpot(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, function: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            value = function(x)
            (gradient,) = torch.autograd.grad(value, x)
        ctx.save_for_backward(gradient)
        return value.detach()

    @staticmethod
    def backward(ctx: Any, dvalue: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * dvalue, None


def on_the_spot(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """function(x), a scalar; its gradient reaches x, once, and nothing else that function uses."""
    if not (x.requires_grad and torch.is_grad_enabled()):
        return function(x)
    return _OnTheSpot.apply(x, function)
