"""The end of a prompt or turn: scores become flags, per layer or over all layers at once."""

import weakref
from collections.abc import Iterator
from typing import Any, cast

import torch
from transformers.utils import logging

from gatekv.cache.layer import KVLayer
from gatekv.cache.plan import Plan
from gatekv.policies.amount import Amount, budget_text, count_of, share_of
from gatekv.policies.budgets import BudgetError, Ranking, ranked, too_small
from gatekv.policies.layers import Even, layer_count, whole_layers
from gatekv.policies.variance import Variance
from gatekv.precision import without_autocast

logger = logging.get_logger(__name__)


def needed(plan: Plan, length: int, counts: torch.Tensor, before: int = 0) -> torch.Tensor:
    """The least that heads with room for counts [...] tokens can hold of a row: sinks and last tokens, or one token.

    length: real tokens of the row's prompt or turn; before: of what came earlier, sinks among them.
    """
    recent = plan.policy.scorer.recent(counts, plan.window)
    return (recent + max(plan.sinks - before, 0)).clamp_min(1).clamp_max(length)


def rooms(plan: Plan, layers: int, length: int, before: int = 0, row: int = 0) -> tuple[list[int], str | None]:
    """(tokens that a head of each of `layers` layers keeps of a row on average; why that is not its budget, or None).

    Told from the row's length alone (as for `needed`): all of it where a threshold without a budget decides, which
    depends on the text. A row whose budget is below what the policy protects is held whole; where layers that are left
    whole cost more than all of the budget ("unreachable"), the others hold what is protected. row: its number, to name.
    """
    policy, everything = plan.policy, [length] * layers
    if policy.budget is None and policy.rule.scope == "token":
        return everything, None
    if policy.rule.scope == "token":
        counts = torch.full((layers,), count_of(policy.budget, length))
    else:
        # Layers that share by their variance have an even room on average, before there is a text.
        even = Even() if isinstance(policy.layers, Variance) else policy.layers
        share, guarded, skip = share_of(policy.budget, length), plan.sinks + plan.window, policy.scorer.skip_layers
        try:
            counts = torch.tensor([layer_count(even, skip, share, length, guarded, i, layers) for i in range(layers)])
        except BudgetError as error:
            skipped, _ = whole_layers(skip, 1.0, layers)
            least = int(needed(plan, length, torch.zeros(1, dtype=torch.long), before))
            return [length if i in skipped else least for i in range(layers)], str(error)
    need = needed(plan, length, counts, before)
    if bool((counts >= need).all()):
        return counts.tolist(), None
    worst = int((need - counts).argmax())
    why = too_small(cast(Amount, policy.budget), length, row, int(counts[worst]), int(need[worst]))
    # A threshold that does not know where the prompt ends has evicted what left the window before it could be seen.
    return (everything if plan.knows_end else need.tolist()), why


def admit(plan: Plan, layers: int, length: int, before: int = 0, row: int = 0) -> tuple[list[int], bool]:
    """(tokens that a head of each layer keeps of a row on average, whether they are its budget); see `rooms`.

    Raises:
        BudgetError: where they are not, in a strict cache.
    """
    counts, why = rooms(plan, layers, length, before, row)
    if why is not None and plan.strict:
        raise BudgetError(why)
    if why is not None:
        logger.warning_once(
            f"gatekv: a budget of {budget_text(plan.policy.budget)} cannot be kept for every prompt under "
            f"{plan.policy}; prompts too short for it are held whole, see KVCache.memory(). strict=True refuses them."
        )
    return counts, why is None


class Decision:
    """Called by each layer when its prompt has ended; acts at once, or when the last layer reports."""

    def __init__(self, layers: list[Any]) -> None:
        """layers: all of the cache's, those with a sliding window too."""
        # The cache holds its layers and they the plan, which holds this: without a cycle all goes with the cache.
        self._layers = [weakref.ref(layer) for layer in layers if isinstance(layer, KVLayer)]
        self._others = [(i, weakref.ref(layer)) for i, layer in enumerate(layers) if not isinstance(layer, KVLayer)]

    @property
    def layers(self) -> list[KVLayer]:
        """The cache's, by depth."""
        return [cast(KVLayer, layer()) for layer in self._layers]

    def others(self) -> Iterator[tuple[int, Any]]:
        """(place, layer) of the cache's layers that transformers bounds itself."""
        return ((i, layer()) for i, layer in self._others)

    @property
    def plan(self) -> Plan:
        """What they share."""
        return self.layers[0].plan

    def __call__(self, layer: KVLayer) -> None:
        if self.plan.policy.rule.scope == "token":
            protected, valid = layer.protection()
            if self.plan.policy.budget is not None:
                _, layer.unmet = self._admit(layer, valid)
            if self.plan.keep_later and (self.plan.dense or self.plan.whole):
                layer.protect(protected)
            layer.settle()
        elif self.plan.policy.scope == "layer":
            self._decide([layer])
        elif layer is self.layers[-1]:
            self._decide(self.layers)

    def too_short(self, length: int) -> bool:
        """Whether a prompt of `length` real tokens is too short for the budget."""
        return rooms(self.plan, len(self.layers), length)[1] is not None

    def admit(self, lengths: torch.Tensor, before: torch.Tensor | None = None) -> list[tuple[list[int], bool]]:
        """`admit` for every row, of so many real tokens [batch], behind `before` [batch]; BudgetError in a strict
        cache."""
        earlier = [0] * len(lengths) if before is None else before.tolist()
        rows = enumerate(zip(lengths.tolist(), earlier))
        return [admit(self.plan, len(self._layers), n, b, row) for row, (n, b) in rows]

    def _admit(self, layer: KVLayer, valid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(counts [all layers, batch], which rows hold what is not their budget [batch] bool), for what `layer` read
        since its base, valid [batch, n]."""
        lengths = valid.sum(-1)
        found = self.admit(lengths, layer.real[:, 0] - lengths)
        counts = torch.tensor([counts for counts, _ in found], device=valid.device).T
        return counts, torch.tensor([not kept for _, kept in found], device=valid.device)

    def _share_by_variance(self, scores: torch.Tensor, valid: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """counts [layers, batch], which are even among the layers that are not left whole, in proportion to how spread
        each one's attention is; no layer gets less than it needs."""
        policy, layers = self.plan.policy, len(self.layers)
        skipped, _ = whole_layers(policy.scorer.skip_layers, 1.0, layers)
        if not (others := [i for i in range(layers) if i not in skipped]):
            return counts
        shares = cast(Variance, policy.layers)
        lengths, weights = valid.sum(-1).tolist(), shares.weights(scores[others], valid)
        rows = []
        for w, n in zip(weights.T.tolist(), lengths):
            _, rest = whole_layers(policy.scorer.skip_layers, share_of(policy.budget, n), layers)
            found = torch.tensor(shares.rooms(w, rest, n, self.plan.sinks + self.plan.window))
            rows.append(torch.maximum(found, needed(self.plan, n, found)))
        counts = counts.clone()
        counts[others] = torch.stack(rows, -1).to(counts)
        return counts

    def _decide(self, layers: list[KVLayer]) -> None:
        with without_autocast(layers[0].real.device):
            self._choose(layers)

    def _choose(self, layers: list[KVLayer]) -> None:
        policy = self.plan.policy
        _, valid = layers[0].protection()
        counts, whole = self._admit(layers[0], valid)
        scores = torch.stack([layer.all_scores() for layer in layers])
        if isinstance(policy.layers, Variance):
            kept = ~whole
            shared = self._share_by_variance(scores[:, kept], valid[kept], counts[:, kept]) if kept.any() else None
            counts[:, kept] = counts[:, kept] if shared is None else shared
        counts = torch.stack([counts[self.layers.index(layer)] for layer in layers])
        recent = policy.scorer.recent(counts, self.plan.window)
        protected = torch.stack([layer.protection(r)[0] for layer, r in zip(layers, recent)])
        sure = [policy.scorer.sure(x.view(), guarded, count) for x, guarded, count in zip(layers, protected, counts)]
        protected = torch.stack(sure).expand(scores.shape)
        rule = cast(Ranking, policy.rule)  # a threshold decides nothing here
        keep = self._never_none(rule.keep(scores, protected, valid, counts), scores, protected, valid)
        cuts: torch.Tensor | list[None] = [None] * len(layers)
        if self.plan.learned and not (self.plan.keep_later or self.plan.turns or self.plan.decays):
            logits = torch.stack([layer.all_logits() for layer in layers])
            alone = keep if self.plan.trims else rule.keep(logits, protected, valid, counts)
            refused = logits.masked_fill(alone | protected | ~valid[:, None], -torch.inf).amax(-1, keepdim=True)
            if policy.rule.scope == "model":
                refused = refused.amax((0, 2), keepdim=True).expand(len(layers), -1, -1, -1)
            cuts = refused
        for layer, flags, cut, score, last in zip(layers, keep, cuts, scores, recent):
            layer.unmet = whole
            layer.restrict(flags, cut, score, last)

    @staticmethod
    def _never_none(
        keep: torch.Tensor, scores: torch.Tensor, protected: torch.Tensor, valid: torch.Tensor
    ) -> torch.Tensor:
        """keep, and the best token of heads that compete and would be left with nothing; all as a rule takes them."""
        best = ranked(scores, protected, valid).argmax(-1, keepdim=True)
        best = torch.zeros_like(keep).scatter_(-1, best, True) & valid[:, None]
        return keep | (best & ~keep.any(-1, keepdim=True))
