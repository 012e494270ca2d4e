"""The end of a prompt or turn: scores become flags, per layer or over all layers at once."""

import torch

from gatekv.cache.layer import KVLayer
from gatekv.cache.plan import Plan
from gatekv.policies.budgets import check_counts
from gatekv.policies.layers import layer_count


class Decision:
    """Called by each layer when its prompt has ended; acts at once, or when the last layer reports."""

    def __init__(self, plan: Plan, layers: list[KVLayer]):
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
        elif rule.scope == "layer":
            self._decide([layer])
        elif layer is self.layers[-1]:
            self._decide(self.layers)

    def _counts(self, layers: list[KVLayer], valid: torch.Tensor) -> torch.Tensor:
        """[layers, batch] tokens that a head of each of these layers may keep of each row."""
        policy, order = self.plan.policy, {id(layer): i for i, layer in enumerate(self.layers)}
        guarded = self.plan.sinks + self.plan.window
        rows = [
            [
                layer_count(policy.layers, policy.scorer.skip_layers, policy.ratio, n, guarded, order[id(layer)],
                            len(self.layers))
                for n in valid.sum(-1).tolist()
            ]
            for layer in layers
        ]  # fmt: skip
        return torch.tensor(rows, device=valid.device)

    def _decide(self, layers: list[KVLayer]) -> None:
        policy = self.plan.policy
        _, valid = layers[0].protection()
        counts = self._counts(layers, valid)
        recent = policy.scorer.recent(counts, self.plan.window)
        protected = torch.stack([layer.protection(r)[0] for layer, r in zip(layers, recent)])
        for count, guarded in zip(counts, protected):
            check_counts(count, guarded, policy.ratio, valid)
        scores = torch.stack([layer.all_scores() for layer in layers])
        protected = protected.expand(scores.shape)
        keep = policy.rule.keep(scores, protected, valid, counts)
        cuts = [None] * len(layers)
        if self.plan.learned and not (self.plan.keep_later or self.plan.turns or self.plan.decays):
            logits = torch.stack([layer.all_logits() for layer in layers])
            alone = keep if self.plan.trims else policy.rule.keep(logits, protected, valid, counts)
            refused = logits.masked_fill(alone | protected | ~valid[:, None], -torch.inf).amax(-1, keepdim=True)
            if policy.rule.scope == "model":
                refused = refused.amax((0, 2), keepdim=True).expand(len(layers), -1, -1, -1)
            cuts = refused
        for layer, flags, cut, score, last in zip(layers, keep, cuts, scores, recent):
            layer.restrict(flags, cut, score, last)
