"""Task losses as pure functions. Every loss is per sequence first and averaged over sequences after, so that gradient
accumulation and data parallelism change nothing."""

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import nn

from gatekv.precision import wide
from gatekv.training.sharding import most
from gatekv.training.sparsity import judged_tokens

# Logits live only for this many numbers at a time: [chunk, vocabulary], teacher and student.
CHUNK_NUMBERS = 1 << 23


class Head(Protocol):
    """The way from hidden states [tokens, hidden_size] to logits: `gatekv.training.head.LogitHead`, or a linear map."""

    out_features: int

    def __call__(self, hidden: torch.Tensor, /) -> torch.Tensor: ...


def stacked(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """One tensor of those of all layers, which may lie on several devices, on the first one's."""
    found = list(tensors)
    return torch.stack([t.to(found[0].device) for t in found])


class _FusedHead(torch.autograd.Function):
    """Sum of weighted token losses, its gradient computed chunk by chunk in the forward; the head itself is frozen."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, head: Head, token_loss: Callable[..., torch.Tensor], *extra: torch.Tensor
    ) -> torch.Tensor:
        step = max(1, CHUNK_NUMBERS // head.out_features)
        grad = torch.empty_like(hidden)
        total = wide(hidden.new_zeros(()))
        with torch.enable_grad():
            for start in range(0, most(len(hidden), hidden.device), step):  # past our own tokens: nothing, of no weight
                piece = hidden[start : start + step].detach().requires_grad_()
                loss = token_loss(wide(head(piece)), *(e[start : start + step] for e in extra))
                (grad[start : start + step],) = torch.autograd.grad(loss, piece)
                total += loss.detach().to(total.device)
        ctx.save_for_backward(grad)
        return total

    @staticmethod
    def backward(ctx: Any, dtotal: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return grad * dtotal, None, None, *(None for _ in range(len(ctx.needs_input_grad) - 3))


def row_shares(weights: torch.Tensor) -> torch.Tensor:
    """[batch, tokens] weights -> each token's share of the batch mean of per-row weighted means."""
    return weights / weights.sum(-1, keepdim=True).clamp_min(1e-9) / len(weights)


def _used(shares: torch.Tensor, beside: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(which of all tokens have a share, their shares), on the hidden states' device.

    Which they are decides shapes, so it is read where `shares` lies: from the CPU, no device is waited for.
    """
    used = shares.flatten().nonzero()[:, 0]
    return used.to(beside.device), shares.flatten()[used].to(beside.device)


def _at(x: torch.Tensor, used: torch.Tensor) -> torch.Tensor:
    """The used ones of [batch, tokens, ...], on their device."""
    return x.to(used.device).flatten(0, 1)[used]


def distillation_loss(
    student: torch.Tensor, teacher: torch.Tensor, head: Head, shares: torch.Tensor, reverse: bool = False
) -> torch.Tensor:
    """KL(teacher || student) over the vocabulary, weighted mean per row, then the mean over rows, in nats.

    student, teacher: last hidden states [batch, tokens, hidden_size]; shares: [batch, tokens] of `row_shares`, 0 where
    no prediction counts, on their device or on the CPU. reverse: KL(student || teacher). The logits never exist in
    full: chunks of tokens, both side by side.
    """
    used, shares = _used(shares, student)

    def token_loss(logits: torch.Tensor, teacher_hidden: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            target = wide(head(teacher_hidden)).log_softmax(-1)
        mine = logits.log_softmax(-1)
        p, q = (mine, target) if reverse else (target, mine)
        return ((p.exp() * (p - q)).sum(-1) * share.to(p.device)).sum()

    return _FusedHead.apply(student.flatten(0, 1)[used], head, token_loss, _at(teacher, used), shares)


def hidden_loss(student: torch.Tensor, teacher: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """Squared error of the last hidden states as a share of the teacher's square (WG-KV), weighted as above."""
    teacher = teacher.to(student.device)
    error = wide(student - teacher).square().mean(-1) / wide(teacher).square().mean(-1).clamp_min(1e-6)
    return (error * shares.to(error.device)).sum()


def lm_loss(student: torch.Tensor, labels: torch.Tensor, head: Head, shares: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the next token, weighted mean per row, then the mean over rows, in nats.

    student: [batch, tokens, hidden_size]; labels: [batch, tokens] the token that follows; shares as above.
    """
    used, shares = _used(shares, student)

    def token_loss(logits: torch.Tensor, label: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
        label, share = label.to(logits.device), share.to(logits.device)  # the head may lie on another device
        return (nn.functional.cross_entropy(logits, label, reduction="none") * share).sum()

    return _FusedHead.apply(student.flatten(0, 1)[used], head, token_loss, _at(labels, used), shares)


def oracle_loss(
    logits: torch.Tensor, received: torch.Tensor, valid: torch.Tensor, sinks: int, window: int
) -> torch.Tensor:
    """Mean squared error of a gate's logits to log(received attention), per sequence, then the mean.

    logits, received: [batch, kv_heads, tokens]; tokens among the sinks or in the last window are not judged and do not
    count. Layer-local: every token of every head is supervised, at no backward pass through the model (KVzap's idea).
    """
    judged = judged_tokens(valid, sinks, window)[:, None].expand_as(logits)
    error = (logits - received.clamp_min(1e-6).log()).square().masked_fill(~judged, 0)
    return (error.flatten(1).sum(-1) / judged.flatten(1).sum(-1).clamp_min(1)).mean()
