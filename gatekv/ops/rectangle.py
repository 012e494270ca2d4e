"""A memory that is a rectangle: what `joint_attention` reads, fast or readable."""

from typing import NamedTuple

import torch

Tensor = torch.Tensor


class Rectangle(NamedTuple):
    """A memory whose rows (sequence · kv_heads + head) hold equally many tokens.

    Attributes:
        keys: [rows, tokens, width]. values: [rows, tokens, head_dim].
        hidden: [rows or 1, queries or 1, tokens] bool, what a query does not see; None: it sees all.
        q: [batch, heads, queries, width], what these keys are asked; None: what all are asked.
    """

    keys: Tensor
    values: Tensor
    hidden: Tensor | None = None
    q: Tensor | None = None
