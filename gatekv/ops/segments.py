"""Fast paths of `naive.ragged_segment`: equal heads are one batched product, uneven ones a loop over their slices."""

import torch

from gatekv.ops import naive


def ragged_segment(q, keys, values, offsets: list[int], scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """See `gatekv.ops.naive.ragged_segment`."""
    b = q.shape[0]
    heads = len(offsets) - 1
    length = offsets[1] - offsets[0]
    if all(offsets[r + 1] - offsets[r] == length for r in range(1, heads)):
        shape = (b, heads // b, length, q.shape[-1])
        mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=q.device)
        return naive.dense_segment(q, keys.view(shape), values.view(shape), mask, scale)
    return naive.ragged_segment(q, keys, values, offsets, scale)
