"""Budget rules: from scores to flags. A ratio is the share of a row's real tokens that a KV head holds on average.

Every rule answers `keep(scores, protected, valid, ratios)`:
    scores [layers, batch, kv_heads, tokens], higher keeps · protected, same shape, bool: kept first, inside the
    budget · valid [batch, tokens] · ratios [layers] float
    -> keep [layers, batch, kv_heads, tokens] bool
`scope` says how many layers it must see at once.
"""

import math
from dataclasses import dataclass

import torch


def row_budgets(ratio: float, valid: torch.Tensor, protected: torch.Tensor) -> list[int]:
    """Tokens per head for one ratio, per row.

    Raises:
        ValueError: when they do not hold the `protected` [batch, kv_heads, tokens].
    """
    counts = [math.floor(ratio * n + 1e-6) for n in valid.sum(-1).tolist()]
    for row, (count, need) in enumerate(zip(counts, protected.sum(-1).amax(-1).tolist())):
        if count < need:
            raise ValueError(
                f"budget {ratio:.4g} of the {int(valid[row].sum())} tokens of row {row} is {count} a head, below "
                f"the {need} that sinks + window protect: raise budget, lower sinks or window, use longer prompts."
            )
    return counts


def _ranked(scores: torch.Tensor, protected: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Scores with protected tokens first and pads last."""
    return scores.float().masked_fill(protected, torch.inf).masked_fill(~valid[:, None], -torch.inf)


def _top(ranked: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """Flags of the `count` highest along the last dimension; ties go to the earlier token. count: shape [..., 1]."""
    order = ranked.sort(dim=-1, descending=True, stable=True).indices
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
    )
    return (rank < count) & (ranked > -torch.inf)


def _counts(ratios, valid, protected) -> torch.Tensor:
    """[layers, batch] tokens per head."""
    return torch.tensor([row_budgets(r, valid, p) for r, p in zip(ratios, protected)], device=valid.device)


@dataclass
class Uniform:
    """Every head of every layer keeps the same number of tokens."""

    scope = "layer"

    def keep(self, scores, protected, valid, ratios):
        counts = _counts(ratios, valid, protected)
        return _top(_ranked(scores, protected, valid), counts[:, :, None, None])


@dataclass
class Ada:
    """Ada-KV (arXiv 2407.11550): heads of a layer compete; B_h = round((1 - alpha) c_h + alpha b).

    The paper's code has int(alpha b), which loses a token of a full budget; rounding once does not.
    c_h: how many of the layer's top (kv_heads · b) unprotected tokens lie in head h; b: unprotected tokens per head.
    """

    alpha: float = 0.2
    scope = "layer"

    def keep(self, scores, protected, valid, ratios):
        counts = _counts(ratios, valid, protected)
        layers, batch, heads, tokens = scores.shape
        guarded = protected & valid[:, None]
        free = counts - guarded.sum(-1).amax(-1)  # b, per layer and row
        open_scores = scores.float().masked_fill(guarded | ~valid[:, None], -torch.inf)
        joint = _top(open_scores.flatten(-2), (free * heads)[..., None]).view(scores.shape).sum(-1)
        head_counts = torch.round((1 - self.alpha) * joint + (self.alpha * free)[..., None]).long()
        return _top(open_scores, head_counts[..., None]) | guarded


@dataclass
class Global:
    """All heads of all layers compete for one budget; scores must be comparable across layers (a gate's are)."""

    scope = "model"

    def keep(self, scores, protected, valid, ratios):
        layers, batch, heads, tokens = scores.shape
        total = (_counts(ratios, valid, protected) * heads).sum(0)  # per row
        ranked = _ranked(scores, protected, valid).transpose(0, 1).flatten(1)  # [batch, layers·heads·tokens]
        return _top(ranked, total[:, None]).view(batch, layers, heads, tokens).transpose(0, 1)


@dataclass
class Threshold:
    """Each token is judged alone, as it leaves the window: gates only; streams, and needs no end of the prompt."""

    scope = "token"


def faded(logits: torch.Tensor, age: torch.Tensor) -> torch.Tensor:
    """log(beta^age), what a token is still worth; beta = sigmoid(logit). Shapes broadcast."""
    return torch.nn.functional.logsigmoid(logits.float()) * age


@dataclass
class Decay:
    """TRIM-KV: a buffer of a fixed number of tokens per head, in which each fades at the rate its gate gave it; the
    faintest goes, at the prompt's end and for as long as decoding lasts."""

    scope = "layer"

    def keep(self, scores, protected, valid, ratios):
        counts = _counts(ratios, valid, protected)
        age = torch.arange(scores.shape[-1] - 1, -1, -1, device=scores.device)
        return _top(_ranked(faded(scores, age), protected, valid), counts[:, :, None, None])


BUDGETS = {"threshold": Threshold, "uniform": Uniform, "ada": Ada, "global": Global, "decay": Decay}
