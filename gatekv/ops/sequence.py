"""Rows shared by several processes (Ulysses, arXiv 2309.14509): outside attention each has a part of the tokens and all
heads, in attention all tokens and a part of the heads.

A process's loss is its part of the row's, times the number of processes: data parallelism takes the mean over all
processes, of gradients too, and the mean is the loss. Every exchange here has its adjoint as its gradient.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Sequence:
    """The processes that share a row; rank: this one's place among them. Each call is made by all of them.

    `ALONE`: one process has whole rows, and nothing is exchanged.
    """

    group: ProcessGroup | None
    rank: int
    size: int

    def exchange(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, n, m / size, …] -> [batch, n / size, m, …]: into attention tokens come together and heads part, out
        of it the other way round."""
        return x if self.size == 1 else _Exchange.apply(x, 1, 2, self)

    def together(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """All processes' parts side by side along dim, on each of them."""
        return x if self.size == 1 else _Together.apply(x, dim, self)

    def part(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """This process's part of x, which all have."""
        return x if self.size == 1 else x.chunk(self.size, dim)[self.rank]

    def mean(self, x: torch.Tensor) -> torch.Tensor:
        """Over the processes; without a gradient."""
        return x.detach() if self.size == 1 else _sum(x, self.group) / self.size


ALONE = Sequence(None, 0, 1)


def _sum(x: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
    total = x.detach().clone()
    dist.all_reduce(total, group=group)
    return total


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, split: int, join: int, sequence: Sequence):
        ctx.back = join, split, sequence
        sent = torch.stack(x.chunk(sequence.size, split))
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=sequence.group)
        return torch.cat(received.unbind(), join)

    @staticmethod
    def backward(ctx, grad):
        return _Exchange.apply(grad, *ctx.back), None, None, None


class _Together(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dim: int, sequence: Sequence):
        ctx.back = dim, sequence
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(sequence.size)]
        dist.all_gather(parts, x.contiguous(), group=sequence.group)
        return torch.cat(parts, dim)

    @staticmethod
    def backward(ctx, grad):
        dim, sequence = ctx.back
        return sequence.part(_sum(grad, sequence.group), dim), None, None
