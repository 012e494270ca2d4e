"""The end of a prompt or turn: scores become flags, per layer or over all layers at once."""

import torch

from gatekv.cache.layer import KVLayer
from gatekv.cache.plan import Plan
from gatekv.policies.budgets import row_budgets


def layer_ratios(ratio: float, skip_layers: tuple[int, ...], num_layers: int) -> list[float]:
    """Ratio of each layer when those in `skip_layers` stay whole and the others pay for them.

    Raises:
        ValueError: when nothing would be left for the others ("unreachable").
    """
    skipped = {i for i in skip_layers if i < num_layers}
    if not skipped:
        return [ratio] * num_layers
    others = num_layers - len(skipped)
    rest = (ratio * num_layers - len(skipped)) / others if others else 0.0
    if rest <= 0 and ratio < 1:
        raise ValueError(
            f"budget {ratio} is unreachable: {len(skipped)} of {num_layers} layers are left whole; skip fewer layers."
        )
    return [1.0 if i in skipped else rest for i in range(num_layers)]


class Decision:
    """Called by each layer when its prompt has ended; acts at once, or when the last layer reports."""

    def __init__(self, plan: Plan, layers: list[KVLayer]):
        self.plan, self.layers = plan, layers

    def __call__(self, layer: KVLayer) -> None:
        rule, ratio = self.plan.policy.rule, self.plan.policy.ratio
        if rule.scope == "token":
            protected, valid = layer.protection()
            if ratio is not None:
                row_budgets(ratio, valid, protected)
            if self.plan.keep_later and (self.plan.dense or self.plan.whole):
                layer.protect(protected)
            layer.settle()
        elif rule.scope == "layer":
            self._decide([layer])
        elif layer is self.layers[-1]:
            self._decide(self.layers)

    def _decide(self, layers: list[KVLayer]) -> None:
        policy = self.plan.policy
        ratios = layer_ratios(policy.ratio, policy.scorer.skip_layers, len(self.layers))
        order = {id(layer): i for i, layer in enumerate(self.layers)}
        scores = torch.stack([layer.all_scores() for layer in layers])
        protected, valid = layers[0].protection()
        protected = protected.expand(scores.shape)
        keep = policy.rule.keep(scores, protected, valid, [ratios[order[id(layer)]] for layer in layers])
        cuts = [None] * len(layers)
        if self.plan.learned and not (self.plan.keep_later or self.plan.turns or self.plan.decays):
            refused = scores.masked_fill(keep | protected | ~valid[:, None], -torch.inf).amax(-1, keepdim=True)
            if policy.rule.scope == "model":
                refused = refused.amax((0, 2), keepdim=True).expand(len(layers), -1, -1, -1)
            cuts = refused
        for layer, flags, cut in zip(layers, keep, cuts):
            layer.restrict(flags, cut)
