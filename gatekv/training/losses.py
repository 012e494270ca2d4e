"""Losses as pure functions. Every loss is per sequence first and averaged over sequences after, so that gradient
accumulation and data parallelism change nothing."""

import torch
from torch import nn

# Logits live only for this many numbers at a time: [chunk, vocabulary], teacher and student.
CHUNK_NUMBERS = 1 << 23


class _FusedHead(torch.autograd.Function):
    """Sum of weighted token losses, its gradient computed chunk by chunk in the forward; the head itself is frozen."""

    @staticmethod
    def forward(ctx, hidden, head, token_loss, *extra):
        step = max(1, CHUNK_NUMBERS // head.out_features)
        grad = torch.empty_like(hidden)
        total = hidden.new_zeros((), dtype=torch.float32)
        with torch.enable_grad():
            for start in range(0, len(hidden), step):
                piece = hidden[start : start + step].detach().requires_grad_()
                loss = token_loss(head(piece).float(), *(e[start : start + step] for e in extra))
                (grad[start : start + step],) = torch.autograd.grad(loss, piece)
                total += loss.detach()
        ctx.save_for_backward(grad)
        return total

    @staticmethod
    def backward(ctx, dtotal):
        (grad,) = ctx.saved_tensors
        return grad * dtotal, None, None, *(None for _ in range(len(ctx.needs_input_grad) - 3))


def _row_shares(weights: torch.Tensor) -> torch.Tensor:
    """[batch, tokens] weights -> each token's share of the batch mean of per-row weighted means."""
    return weights / weights.sum(-1, keepdim=True).clamp_min(1e-9) / len(weights)


def distillation_loss(student: torch.Tensor, teacher: torch.Tensor, head: nn.Linear, weights: torch.Tensor):
    """Forward KL(teacher || student) over the vocabulary, weighted mean per row, then the mean over rows, in nats.

    student, teacher: last hidden states [batch, tokens, hidden_size]; weights: [batch, tokens], 0 where no prediction
    counts. The logits never exist in full: chunks of tokens, teacher and student side by side.
    """
    used = weights > 0
    shares = _row_shares(weights)[used]

    def token_loss(logits, teacher_hidden, share):
        with torch.no_grad():
            target = head(teacher_hidden).float().log_softmax(-1)
        kl = (target.exp() * (target - logits.log_softmax(-1))).sum(-1)
        return (kl * share).sum()

    return _FusedHead.apply(student[used], head, token_loss, teacher[used], shares)


def lm_loss(student: torch.Tensor, labels: torch.Tensor, head: nn.Linear, weights: torch.Tensor):
    """Cross-entropy of the next token, weighted mean per row, then the mean over rows, in nats.

    student: [batch, tokens, hidden_size]; labels: [batch, tokens] the token that follows; weights as above.
    """
    used = weights > 0

    def token_loss(logits, label, share):
        return (nn.functional.cross_entropy(logits, label, reduction="none") * share).sum()

    return _FusedHead.apply(student[used], head, token_loss, labels[used], _row_shares(weights)[used])


def keep_rates(kept: torch.Tensor, valid: torch.Tensor, sinks: int, window: int) -> torch.Tensor:
    """Share of a sequence's tokens that each head holds at its end.

    kept: [batch, kv_heads, tokens] in [0, 1]; valid: [batch, tokens]. Sinks and the last `window` real tokens count as
    kept, pads not at all. Returns [batch, kv_heads].
    """
    index = valid.long().cumsum(-1)
    last = index[:, -1:]
    protected = (index <= sinks) | (index > last - window)
    held = torch.where(protected[:, None], torch.ones_like(kept), kept)
    return (held * valid[:, None]).sum(-1) / valid.sum(-1)[:, None].clamp_min(1)


def oracle_loss(logits: torch.Tensor, received: torch.Tensor, valid: torch.Tensor, sinks: int, window: int):
    """Mean squared error of a gate's logits to log(received attention), per sequence, then the mean.

    logits, received: [batch, kv_heads, tokens]; tokens among the sinks or in the last window are not judged and do not
    count. Layer-local: every token of every head is supervised, at no backward pass through the model (KVzap's idea).
    """
    index = valid.long().cumsum(-1)
    judged = (valid & (index > sinks) & (index <= index[:, -1:] - window))[:, None].expand_as(logits)
    error = (logits - received.clamp_min(1e-6).log()).square().masked_fill(~judged, 0)
    return (error.flatten(1).sum(-1) / judged.flatten(1).sum(-1).clamp_min(1)).mean()


def budget_cut(logits: torch.Tensor, valid: torch.Tensor, ratio: float, sinks: int, window: int) -> torch.Tensor:
    """The threshold at which a sequence would hold exactly `ratio` of its tokens, all layers and heads competing.

    logits: [layers, batch, kv_heads, tokens]; valid: [batch, tokens]. Sinks and the last `window` tokens are inside the
    ratio. Returns [batch, 1, 1] without gradient.
    """
    index = valid.long().cumsum(-1)
    total = index[:, -1]
    open_tokens = valid & (index > sinks) & (index <= total[:, None] - window)
    cuts = []
    for row, n in enumerate(total.tolist()):
        scores = logits[:, row][..., open_tokens[row]].flatten()
        protected = min(n, sinks + window)
        keep = round(max(0.0, ratio * n - protected) / max(1, n - protected) * len(scores))
        ranked = scores.sort(descending=True).values
        cuts.append(ranked[min(keep, len(ranked) - 1)] if len(ranked) else scores.new_zeros(()))
    return torch.stack(cuts).detach()[:, None, None]


def sparsity_gap(rates: torch.Tensor, target: float, scope: str) -> torch.Tensor:
    """mean(g) - beta per sequence and unit of the scope. rates: [layers, batch, kv_heads] -> [units, batch]."""
    mean = rates.mean(-1)
    return (mean.mean(0, keepdim=True) if scope == "global" else mean) - target


def sparsity_loss(gap: torch.Tensor, kind: str, multiplier: torch.Tensor | None = None) -> torch.Tensor:
    """`abs`: |mean(g) - beta| per sequence (Attention-Gate's eviction loss, with the gradient its first version lacks);
    `lagrange`: multiplier · (mean(g) - beta), the multiplier [units] moving once an optimizer step. Mean over all."""
    if kind == "lagrange":
        return (multiplier.detach()[:, None] * gap).mean() + gap.square().mean()
    return gap.abs().mean()
