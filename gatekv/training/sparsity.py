"""How training asks for a smaller cache: keep rates, penalties on them, and thresholds that hold a budget exactly."""

import torch
from torch.utils.checkpoint import checkpoint

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
    n = retention.shape[-1]
    log, total = retention.clamp_min(1e-9).log(), valid.sum(-1).clamp_min(1)
    excess = retention.new_zeros(retention.shape[:2])
    for start in range(0, n, block):  # each computed again in the backward pass: [steps, tokens] is never held
        excess = excess + checkpoint(
            _excess, log, valid, ratio * total, start, min(start + block, n), use_reentrant=False
        )
    return excess / total[:, None].square()


def _excess(log: torch.Tensor, valid: torch.Tensor, room: torch.Tensor, start: int, end: int) -> torch.Tensor:
    """[batch, kv_heads]: how much more than room [batch] is held, summed over the steps from start to end."""
    steps = torch.arange(end, device=valid.device)
    part = steps[start:, None]
    held = torch.exp(log[:, :, None, :end] * (part - steps).clamp_min(0))
    seen = (part >= steps) & valid[:, None, None, :end]
    over = (held.masked_fill(~seen, 0).sum(-1) - room[:, None, None]).relu()
    return (over * valid[:, None, start:end]).sum(-1)


def budget_cut(
    logits: torch.Tensor, valid: torch.Tensor, ratio: float, sinks: int, window: int, scope: str = "global"
) -> torch.Tensor:
    """The thresholds at which a sequence would hold exactly `ratio` of its tokens.

    logits: [layers, batch, kv_heads, tokens]; valid: [batch, tokens], on the CPU where the device shall not be waited
    for. Sinks and the last `window` tokens are inside the ratio. scope: who competes for it: "global" all layers and
    heads, "layer" the heads of a layer, "head" nobody. Of equal logits, as fresh gates have them, newer tokens stay, in
    all layers and heads alike.
    Returns [layers, batch, kv_heads, tokens] without gradient: one number for all who compete, but for ties at it.
    """
    layers, batch, heads, tokens = logits.shape
    groups = {"global": 1, "layer": layers, "head": layers * heads}[scope]
    members, device = layers * heads // groups, logits.device
    open_tokens = judged_tokens(valid, sinks, window)
    total, count = valid.sum(-1), open_tokens.sum(-1) * members
    protected = total.clamp_max(sinks + window)
    # In float64, which not every device has, and rounded as Python does.
    share = (ratio * total.double() - protected) / (total - protected).clamp_min(1).double()
    keep = (share.clamp(0, 1) * count).round().long()
    place = keep.clamp_max(count - 1).clamp_min(0)
    scores = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
    # [batch, groups, tokens x members]: by age, then layer and head
    scores = scores.transpose(0, 1).reshape(batch, groups, members, tokens).transpose(2, 3).flatten(2)
    asks = open_tokens.repeat_interleave(members, 1)[:, None].to(device)
    keep, place = keep.to(device)[:, None, None], place.to(device)[:, None, None]
    ranked = scores.masked_fill(~asks, -torch.inf).sort(descending=True).values
    cut = ranked.gather(-1, place.expand(-1, groups, -1))  # the highest score that goes
    # Scores equal to it could only stay or go together: those that are to stay, the newest, get one just below.
    tied, room = (scores == cut) & asks, keep - ((scores > cut) & asks).sum(-1, keepdim=True)
    stay = tied & (tied.flip(-1).long().cumsum(-1).flip(-1) <= room)
    cuts = torch.where(stay, cut - cut.abs().clamp_min(1.0) * 2.0**-20, cut)
    rest = cuts.masked_fill(~asks, -torch.inf).amax(-1, keepdim=True)  # of tokens that are not asked
    cuts = torch.where(asks, cuts, rest)
    cuts = cuts.masked_fill((count == 0).to(device)[:, None, None], 0)
    return cuts.unflatten(2, (tokens, members)).transpose(2, 3).reshape(batch, layers, heads, tokens).transpose(0, 1)


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
