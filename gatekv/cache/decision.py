"""The end of a prompt or turn: scores become flags, per layer or over all layers at once."""

from typing import cast

import torch

from gatekv.attention import sink_tokens
from gatekv.cache.layer import KVLayer
from gatekv.cache.plan import Plan
from gatekv.policies.budgets import Ranking, check_counts
from gatekv.policies.layers import Even, layer_count, whole_layers
from gatekv.policies.variance import Variance


def _count(plan: Plan, layer: int, layers: int, length: int) -> int:
    """Tokens that a head of the layer, number `layer` of `layers`, may keep of a row of `length` real tokens."""
    policy = plan.policy
    ratio = 1.0 if policy.ratio is None else policy.ratio  # without a budget the rule itself knows when to stop
    rooms = Even() if isinstance(policy.layers, Variance) else policy.layers  # on average, before there is a text
    guarded = plan.sinks + plan.window
    return layer_count(rooms, policy.scorer.skip_layers, ratio, length, guarded, layer, layers)


def admit(plan: Plan, layers: int, length: int) -> list[int]:
    """What a decision on a prompt of `length` real tokens will leave to a head of each of `layers` layers on average,
    told before there is a prompt. All of it where a threshold without a budget decides, which depends on the text.

    Raises:
        BudgetError: as the decision itself will.
    """
    ratio, rule = plan.policy.ratio, plan.policy.rule
    if ratio is None:
        return [length] * layers
    if rule.scope == "token":
        counts = torch.full((layers,), int(length * ratio))
        recent = torch.full((layers,), plan.window)
    else:
        counts = torch.tensor([_count(plan, i, layers, length) for i in range(layers)])
        recent = plan.policy.scorer.recent(counts, plan.window)
    valid = torch.ones(1, length, dtype=torch.bool)
    for count, last in zip(counts, recent):
        protected = sink_tokens(valid, plan.sinks) | (torch.arange(length) >= length - last)
        check_counts(count[None], protected[:, None], ratio, valid)
    return counts.tolist()


class Decision:
    """Called by each layer when its prompt has ended; acts at once, or when the last layer reports."""

    def __init__(self, plan: Plan, layers: list[KVLayer]) -> None:
        self.plan, self.layers = plan, layers

    def __call__(self, layer: KVLayer) -> None:
        rule, ratio = self.plan.policy.rule, self.plan.policy.ratio
        if rule.scope == "token":
            protected, valid = layer.protection()
            if ratio is not None:
                check_counts((valid.sum(-1) * ratio).long(), protected, ratio, valid)
            if self.plan.keep_later and (self.plan.dense or self.plan.whole):
                layer.protect(protected)
            layer.settle()
        elif self.plan.policy.scope == "layer":
            self._decide([layer])
        elif layer is self.layers[-1]:
            self._decide(self.layers)

    def _counts(self, layers: list[KVLayer], valid: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """[layers, batch] tokens that a head of each of these layers may keep of each row."""
        policy, order = self.plan.policy, {id(layer): i for i, layer in enumerate(self.layers)}
        lengths = valid.sum(-1).tolist()
        if isinstance(policy.layers, Variance):
            ratio, guarded = 1.0 if policy.ratio is None else policy.ratio, self.plan.sinks + self.plan.window
            skipped, rest = whole_layers(policy.scorer.skip_layers, ratio, len(layers))
            others = [i for i in range(len(layers)) if i not in skipped]
            counts = valid.sum(-1).repeat(len(layers), 1)
            if others:
                weights = policy.layers.weights(scores[others], valid)
                rooms = [policy.layers.rooms(w, rest, n, guarded) for w, n in zip(weights.T.tolist(), lengths)]
                counts[others] = counts.new_tensor(rooms).T
            return counts
        rows = [[_count(self.plan, order[id(layer)], len(self.layers), n) for n in lengths] for layer in layers]
        return torch.tensor(rows, device=valid.device)

    def _decide(self, layers: list[KVLayer]) -> None:
        policy = self.plan.policy
        _, valid = layers[0].protection()
        scores = torch.stack([layer.all_scores() for layer in layers])
        counts = self._counts(layers, valid, scores)
        recent = policy.scorer.recent(counts, self.plan.window)
        protected = torch.stack([layer.protection(r)[0] for layer, r in zip(layers, recent)])
        for count, guarded in zip(counts, protected):
            check_counts(count, guarded, policy.ratio or 1.0, valid)
        sure = [policy.scorer.sure(x.view(), guarded, count) for x, guarded, count in zip(layers, protected, counts)]
        protected = torch.stack(sure).expand(scores.shape)
        rule = cast(Ranking, policy.rule)  # a threshold decides nothing here
        keep = rule.keep(scores, protected, valid, counts)
        cuts: torch.Tensor | list[None] = [None] * len(layers)
        if self.plan.learned and not (self.plan.keep_later or self.plan.turns or self.plan.decays):
            logits = torch.stack([layer.all_logits() for layer in layers])
            alone = keep if self.plan.trims else rule.keep(logits, protected, valid, counts)
            refused = logits.masked_fill(alone | protected | ~valid[:, None], -torch.inf).amax(-1, keepdim=True)
            if policy.rule.scope == "model":
                refused = refused.amax((0, 2), keepdim=True).expand(len(layers), -1, -1, -1)
            cuts = refused
        for layer, flags, cut, score, last in zip(layers, keep, cuts, scores, recent):
            layer.restrict(flags, cut, score, last)
