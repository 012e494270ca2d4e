"""Columns of padded rows in another order."""

import torch

Tensor = torch.Tensor


def order_of(valid: Tensor) -> Tensor:
    """[batch, n]: the columns with pads first, all else as it was."""
    return valid.to(torch.uint8).argsort(dim=-1, stable=True)


def along(x: Tensor, order: Tensor, dim: int) -> Tensor:
    """Columns of x [batch, ..., n at dim, ...] in another order [batch, n]."""
    dim %= x.ndim
    x = x.expand(len(order), *x.shape[1:])
    shape = [len(order)] + [1] * (x.ndim - 1)
    shape[dim] = order.shape[1]
    size = [*x.shape]
    size[dim] = order.shape[1]
    return x.gather(dim, order.view(shape).expand(size))
