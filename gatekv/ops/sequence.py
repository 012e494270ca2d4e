"""Rows shared by several processes (Ulysses, arXiv 2309.14509): outside attention each has a part of the tokens and all
heads, in attention all tokens and a part of the heads.

A process's loss is its part of the row's, times the number of processes: data parallelism takes the mean over all
processes, of gradients too, and the mean is the loss. Every exchange here has its adjoint as its gradient.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Sequence:
    """The processes that share rows; rank: this one's place among them. Each call is made by all of them.

    tokens: of the rows at hand; parts differ by one where they are no multiple of size. `ALONE`: one process has whole
    rows, and nothing is exchanged.
    """

    group: ProcessGroup | None
    rank: int
    size: int
    tokens: int = 0

    def of(self, tokens: int) -> "Sequence":
        """For rows of as many tokens."""
        return replace(self, tokens=tokens)

    def into(self, x: torch.Tensor) -> torch.Tensor:
        """Into attention: [batch, heads, part of the tokens, …] -> [batch, heads / size, tokens, …]."""
        return x if self.size == 1 else _Into.apply(x, 2, 1, self)

    def out_of(self, x: torch.Tensor) -> torch.Tensor:
        """Out of attention: [batch, tokens, heads / size, …] -> [batch, part of the tokens, heads, …]."""
        return x if self.size == 1 else _OutOf.apply(x, 1, 2, self)

    def together(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """All processes' heads side by side along dim, on each of them."""
        return x if self.size == 1 else _Together.apply(x, dim, self)

    def part(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """This process's tokens, or heads, of x, which all have whole."""
        return x.tensor_split(self.size, dim)[self.rank]

    def mean(self, x: torch.Tensor) -> torch.Tensor:
        """Over the processes; without a gradient."""
        return x.detach() if self.size == 1 else _sum(x, self.group) / self.size

    def parts(self) -> list[int]:
        """How many of the tokens each process has."""
        each, more = divmod(self.tokens, self.size)
        return [each + (rank < more) for rank in range(self.size)]  # as tensor_split


ALONE = Sequence(None, 0, 1)


def _sum(x: torch.Tensor, group: ProcessGroup | None) -> torch.Tensor:
    total = x.detach().clone()
    dist.all_reduce(total, group=group)
    return total


def _exchange(sent: list[torch.Tensor], dim: int, sequence: Sequence) -> torch.Tensor:
    """The r-th tensor goes to process r. All are sent as long as the longest along dim; returns them stacked."""
    longest = max(sequence.parts())
    for r, x in enumerate(sent):
        if missing := longest - x.shape[dim]:
            shape = [missing if d == dim else n for d, n in enumerate(x.shape)]
            sent[r] = torch.cat([x, x.new_zeros(shape)], dim)
    received = torch.empty_like(whole := torch.stack(sent))
    dist.all_to_all_single(received, whole, group=sequence.group)
    return received


class _Into(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, tokens: int, heads: int, sequence: Sequence) -> torch.Tensor:
        ctx.back = tokens, heads, sequence
        received = _exchange(list(x.chunk(sequence.size, heads)), tokens, sequence)
        return torch.cat([x.narrow(tokens, 0, n) for x, n in zip(received, sequence.parts())], tokens)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return _OutOf.apply(grad, *ctx.back), None, None, None


class _OutOf(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, tokens: int, heads: int, sequence: Sequence) -> torch.Tensor:
        ctx.back = tokens, heads, sequence
        received = _exchange(list(x.tensor_split(sequence.size, tokens)), tokens, sequence)
        return torch.cat([x.narrow(tokens, 0, sequence.parts()[sequence.rank]) for x in received], heads)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return _Into.apply(grad, *ctx.back), None, None, None


class _Together(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dim: int, sequence: Sequence) -> torch.Tensor:
        ctx.back = dim, sequence
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(sequence.size)]
        dist.all_gather(parts, x.contiguous(), group=sequence.group)
        return torch.cat(parts, dim)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        dim, sequence = ctx.back
        return sequence.part(_sum(grad, sequence.group), dim), None, None
