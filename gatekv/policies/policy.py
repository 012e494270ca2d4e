"""A policy: one answer to each question."""

from dataclasses import dataclass
from typing import Any

from gatekv.cache.segments.remainder import Remainder
from gatekv.policies.amount import Amount
from gatekv.policies.budgets import Rule
from gatekv.policies.layers import Layers
from gatekv.policies.parts import Needs, RemainderPolicy, Width
from gatekv.policies.scorer import Scorer
from gatekv.support import LATER


@dataclass
class Policy:
    """One answer to each question.

    Attributes:
        scorer: which tokens matter. rule: how heads share a layer's room. budget: what to hold, a share of the prompt
        (float) or tokens of it (int); None: the threshold decides, or all is kept. layers: how layers share the model's
        room. remainder: what becomes of evicted tokens. These are None until `resolve` fills in what the scorer's paper
        has, or threshold for a gate and uniform for others, even layers, nothing. width: how old tokens are stored
        (None: whole).
    """

    scorer: Scorer
    rule: Rule = LATER
    budget: Amount | None = None
    layers: Layers = LATER
    width: Width | None = None
    remainder: RemainderPolicy | None = None

    @property
    def needs(self) -> Needs:
        """See there."""
        scorer, rule = self.scorer, self.rule
        ranks = rule.scope != "token" and not rule.fades
        scope: Any = "model" if self.layers.scope == "model" else rule.scope
        return Needs(
            queries=max(scorer.queries if ranks else 0, self.width.window if self.width else 0),
            gate=scorer.gate,
            maps=getattr(self.remainder, "maps", False),
            rotary=scorer.cache_positions,
            attention=scorer.needs_attention,
            kinds=scorer.kinds,
            scope=scope,
        )

    def remainder_segment(self) -> Remainder:
        """What takes evicted tokens in, in one layer; without a remainder they are forgotten."""
        return Remainder() if self.remainder is None else self.remainder.segment()

    def __str__(self) -> str:
        layers = self.layers if self.layers and not self.layers.even else None
        return " x ".join(
            type(p).__name__ for p in (self.scorer, self.rule, layers, self.width, self.remainder) if p is not None
        )
