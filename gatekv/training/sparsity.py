"""How training asks for a smaller cache: keep rates, penalties on them, and thresholds that hold a budget exactly."""

import torch

KINDS = ("budget", "abs", "square", "hinge", "linear", "lagrange", "concave", "capacity")
SCOPES = ("global", "layer", "head")


def judged_tokens(valid: torch.Tensor, sinks: int, window: int) -> torch.Tensor:
    """[batch, tokens] bool: real tokens that are neither sinks nor among the last `window` of their row."""
    index = valid.long().cumsum(-1)
    return valid & (index > sinks) & (index <= index[:, -1:] - window)


def keep_rates(kept: torch.Tensor, valid: torch.Tensor, sinks: int, window: int) -> torch.Tensor:
    """Share of a sequence's tokens that each head holds at its end.

    kept: [batch, kv_heads, tokens] in [0, 1]; valid: [batch, tokens]. Sinks and the last `window` real tokens count as
    kept, pads not at all. Returns [batch, kv_heads].
    """
    held = torch.where(judged_tokens(valid, sinks, window)[:, None], kept, torch.ones_like(kept))
    return (held * valid[:, None]).sum(-1) / valid.sum(-1)[:, None].clamp_min(1)


def overfull(retention: torch.Tensor, valid: torch.Tensor, ratio: float, block: int = 128) -> torch.Tensor:
    """How far fading tokens exceed a buffer of M = ratio · n tokens (TRIM-KV's capacity loss), as a share of n.

    retention: beta [batch, kv_heads, tokens]; at step t token i counts beta_i^(t - i). Returns [batch, kv_heads]: the
    mean over steps of relu(sum_i beta_i^(t - i) - M) / n, n the row's real tokens.
    """
    b, kv, n = retention.shape
    log, total = retention.clamp_min(1e-9).log(), valid.sum(-1).clamp_min(1)
    steps = torch.arange(n, device=valid.device)
    excess = retention.new_zeros(b, kv)
    for start in range(0, n, block):
        part = steps[start : start + block, None]
        end = min(start + block, n)
        held = torch.exp(log[:, :, None, :end] * (part - steps[:end]).clamp_min(0))
        seen = (part >= steps[:end]) & valid[:, None, None, :end]
        over = (held.masked_fill(~seen, 0).sum(-1) - ratio * total[:, None, None]).relu()
        excess = excess + (over * valid[:, None, start:end]).sum(-1)
    return excess / total[:, None].square()


def _cut(scores: torch.Tensor, ratio: float, total: int, protected: int) -> torch.Tensor:
    """[groups, n] scores, newer tokens last -> thresholds of the same shape, which the right share of each group is
    above.

    One threshold a group: the highest score that goes. Scores equal to it could only stay or go together, so those that
    are to stay, the newest, get a threshold just below.
    """
    n = scores.shape[1]
    if not n:
        return scores
    keep = round(min(1.0, max(0.0, ratio * total - protected) / max(1, total - protected)) * n)
    cut = scores.sort(descending=True).values[:, min(keep, n - 1), None]
    tied = scores == cut
    room = keep - (scores > cut).sum(-1, keepdim=True)
    stay = tied & (tied.flip(-1).long().cumsum(-1).flip(-1) <= room)
    return torch.where(stay, cut - cut.abs().clamp_min(1.0) * 2.0**-20, cut)


def budget_cut(
    logits: torch.Tensor, valid: torch.Tensor, ratio: float, sinks: int, window: int, scope: str = "global"
) -> torch.Tensor:
    """The thresholds at which a sequence would hold exactly `ratio` of its tokens.

    logits: [layers, batch, kv_heads, tokens]; valid: [batch, tokens]. Sinks and the last `window` tokens are inside the
    ratio. scope: who competes for it: "global" all layers and heads, "layer" the heads of a layer, "head" nobody. Of
    equal logits, as fresh gates have them, newer tokens stay, in all layers and heads alike.
    Returns [layers, batch, kv_heads, tokens] without gradient: one number for all who compete, but for ties at it.
    """
    layers, _, heads, _ = logits.shape
    open_tokens = judged_tokens(valid, sinks, window)
    groups = {"global": 1, "layer": layers, "head": layers * heads}[scope]
    rows = []
    for row, total in enumerate(valid.sum(-1).tolist()):
        scores = logits[:, row].detach()
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        judged = scores[..., open_tokens[row]].reshape(groups, layers * heads // groups, -1)
        cuts = _cut(judged.mT.flatten(1), ratio, total, min(total, sinks + window))  # by age, then layer and head
        found = (cuts.amax(1) if cuts.numel() else cuts.new_zeros(groups)).repeat_interleave(scores.numel() // groups)
        found = found.view_as(scores)
        found[..., open_tokens[row]] = cuts.view(groups, -1, judged.shape[1]).mT.reshape(layers, heads, -1)
        rows.append(found)
    return torch.stack(rows, 1)


def sparsity_gap(rates: torch.Tensor, target: float, scope: str) -> torch.Tensor:
    """mean(g) - beta per sequence and unit of the scope. rates: [layers, batch, kv_heads] -> [units, batch]."""
    units = {"global": rates.mean((0, 2))[None], "layer": rates.mean(-1), "head": rates.transpose(1, 2).flatten(0, 1)}
    return units[scope] - target


def sparsity_loss(gap: torch.Tensor, kind: str, multiplier: torch.Tensor | None = None) -> torch.Tensor:
    """A penalty on gap [units, batch] = mean(g) - beta, per sequence, then the mean over all.

    `abs`: |gap| (Attention-Gate's eviction loss, with the gradient its first version lacks); `square`: gap²; `hinge`:
    relu(gap), one-sided (DMS); `linear`: gap itself, a constant price for a token; `concave`: the same for rates of
    1 - (1 - g)² (WG-KV); `capacity`: gap is `overfull` already (TRIM-KV); `lagrange`: multiplier · gap + gap², the
    multiplier [units] moving once an optimizer step.
    """
    if kind == "lagrange":
        assert multiplier is not None
        return (multiplier.detach()[:, None] * gap).mean() + gap.square().mean()
    return {"square": gap.square(), "hinge": gap.relu(), "linear": gap, "concave": gap, "capacity": gap}.get(
        kind, gap.abs()
    ).mean()


def undecided(margins: torch.Tensor, valid: torch.Tensor, sinks: int, window: int) -> torch.Tensor:
    """Mean of 4p(1 - p) over judged tokens: 1 where a gate shrugs, 0 where it has decided. Minimised, it polarises.

    margins: [batch, kv_heads, tokens]. Returns a scalar.
    """
    judged = judged_tokens(valid, sinks, window)[:, None].expand_as(margins)
    p = margins.sigmoid()
    return (4 * p * (1 - p)).masked_fill(~judged, 0).sum() / judged.sum().clamp_min(1)
