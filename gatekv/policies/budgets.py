"""Budget rules: from scores to flags, under a number of tokens that each head may keep on average.

Every rule answers `keep(scores, protected, valid, counts)`:
    scores [layers, batch, kv_heads, tokens], higher keeps · protected, same shape, bool: kept first, inside the
    budget · valid [batch, tokens] · counts [layers, batch] int64, tokens per head
    -> keep [layers, batch, kv_heads, tokens] bool
`scope` says how many layers it must see at once. What each layer may keep is another question (`layers.py`).
"""

from dataclasses import dataclass
from typing import Protocol

import torch

from gatekv.policies.amount import Amount


class BudgetError(ValueError):
    """A budget that no prompt of this length, or no prompt at all, can keep under the policy."""


class Rule:
    """How heads share a room; most rank (`Ranking`), a threshold judges tokens one by one.

    Attributes:
        scope: who must have seen the prompt before anything is decided: a "token", a "layer", the whole "model".
        even: the heads of a layer hold the same number of tokens. fades: scores sink with a token's age, and the
        lowest goes on leaving while decoding. absolute: what scores above 0 stays, without a budget.
    """

    scope = "layer"
    even = False
    fades = False
    absolute = False


class Ranking(Protocol):
    """A rule that turns scores into flags."""

    def keep(
        self, scores: torch.Tensor, protected: torch.Tensor, valid: torch.Tensor, counts: torch.Tensor
    ) -> torch.Tensor:
        """See the module."""
        ...


def too_small(budget: Amount, length: int, row: int, count: int, need: int) -> str:
    """Why `count` tokens a head of a row's `length` are too few, where `need` would be the least."""
    of = f"{budget} tokens" if isinstance(budget, int) else f"{budget:.4g}"
    cure = "that sinks + window protect: raise budget, lower sinks or window" if need > 1 else "at least: raise budget"
    said = f"budget {of} of the {length} tokens of row {row} is {count} a head, below the {need}"
    return f"{said} {cure}, use longer prompts."


def check_counts(counts: torch.Tensor, protected: torch.Tensor, budget: Amount, valid: torch.Tensor) -> None:
    """BudgetError when counts [batch] tokens a head do not hold the protected [batch, kv_heads or 1, tokens]."""
    for row, (count, need) in enumerate(zip(counts.tolist(), protected.sum(-1).amax(-1).tolist())):
        if count < need:
            raise BudgetError(too_small(budget, int(valid[row].sum()), row, count, need))


def ranked(scores: torch.Tensor, protected: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Scores with protected tokens first and pads last."""
    return scores.float().masked_fill(protected, torch.inf).masked_fill(~valid[:, None], -torch.inf)


def top(scores: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """Flags of the `count` highest along the last dimension; ties go to the earlier token. count: shape [..., 1]."""
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
    )
    return (rank < count) & (scores > -torch.inf)


@dataclass
class Uniform(Rule):
    """Every head of a layer keeps the same number of tokens."""

    even = True

    def keep(
        self, scores: torch.Tensor, protected: torch.Tensor, valid: torch.Tensor, counts: torch.Tensor
    ) -> torch.Tensor:
        return top(ranked(scores, protected, valid), counts[:, :, None, None])


@dataclass
class Global(Rule):
    """All heads of all layers compete for one budget; scores must be comparable across layers (a gate's are)."""

    scope = "model"

    def keep(
        self, scores: torch.Tensor, protected: torch.Tensor, valid: torch.Tensor, counts: torch.Tensor
    ) -> torch.Tensor:
        layers, batch, heads, tokens = scores.shape
        total = (counts * heads).sum(0)  # per row
        everything = ranked(scores, protected, valid).transpose(0, 1).flatten(1)  # [batch, layers·heads·tokens]
        return top(everything, total[:, None]).view(batch, layers, heads, tokens).transpose(0, 1)


@dataclass
class Threshold(Rule):
    """Each token is judged alone, as it leaves the window: gates only; streams, and needs no end of the prompt."""

    scope = "token"


@dataclass
class Above(Rule):
    """What scores above 0 stays, however many that are: for scores that know how much is enough (FastGen)."""

    absolute = True

    def keep(
        self, scores: torch.Tensor, protected: torch.Tensor, valid: torch.Tensor, counts: torch.Tensor
    ) -> torch.Tensor:
        return ((scores > 0) | protected) & valid[:, None]


def faded(logits: torch.Tensor, age: torch.Tensor) -> torch.Tensor:
    """log(beta^age), what a token is still worth; beta = sigmoid(logit). Shapes broadcast."""
    return torch.nn.functional.logsigmoid(logits.float()) * age


@dataclass
class Decay(Rule):
    """TRIM-KV: a buffer of a fixed number of tokens per head, in which each fades at the rate its gate gave it; the
    faintest goes, at the prompt's end and for as long as decoding lasts."""

    even = True
    fades = True

    def keep(
        self, scores: torch.Tensor, protected: torch.Tensor, valid: torch.Tensor, counts: torch.Tensor
    ) -> torch.Tensor:
        age = torch.arange(scores.shape[-1] - 1, -1, -1, device=scores.device)
        return top(ranked(faded(scores, age), protected, valid), counts[:, :, None, None])
