"""The training objective as a module: one forward = losses of one micro-batch. This is what DDP and DeepSpeed wrap."""

import torch
from torch import nn

from gatekv.gates.relaxations import RELAXATIONS, logit_of
from gatekv.modules import base_model, gates_off, parallel, wrappers
from gatekv.training.losses import (
    budget_cut,
    distillation_loss,
    keep_rates,
    lm_loss,
    oracle_loss,
    sparsity_gap,
    sparsity_loss,
)


class Objective(nn.Module):
    """Task loss + sparsity_weight · sparsity loss of a PEFT model with gates.

    Args:
        model: PEFT model; its base is frozen and doubles as the teacher, with the gates switched off.
        objective: "kl" (to the same model with gates off) or "lm".
        sparsity: "abs", "lagrange", or "budget": no penalty; each step holds exactly the target, at the threshold where
            the gates' logits in the teacher's pass would (the global budget that is deployed).
        scope: "layer" or "global". sparsity_weight: alpha.
        oracle_weight: of the layer-local regression to the attention that tokens receive in the teacher's pass.
    """

    def __init__(self, model, *, objective: str, sparsity: str, scope: str, sparsity_weight: float,
                 oracle_weight: float = 0.0):  # fmt: skip
        super().__init__()
        self.model = model
        self.objective, self.sparsity, self.scope, self.sparsity_weight = objective, sparsity, scope, sparsity_weight
        self.oracle_weight = oracle_weight
        units = len(wrappers(model)) if scope == "layer" else 1
        self.register_buffer("multiplier", torch.zeros(units))

    def _hidden(self, batch):
        inner = base_model(self.model)
        ids = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        return inner.base_model(**ids, use_cache=False).last_hidden_state

    def _teacher(self, batch, target: float) -> tuple[torch.Tensor | None, torch.Tensor]:
        """(the plain model's hidden states, oracle loss). Its pass also tells where a "budget" threshold must lie."""
        listen = self.sparsity == "budget" or self.oracle_weight > 0
        if self.objective == "lm" and not listen:
            return None, torch.zeros(())
        layers = wrappers(self.model)
        with torch.no_grad(), gates_off(self.model, listen=listen):
            hidden = self._hidden(batch)
        if not listen:
            return hidden, torch.zeros((), device=hidden.device)
        spec, valid = layers[0].specs[layers[0].active()], layers[0].recorded[1]
        oracle = [oracle_loss(w.recorded[0], w.recorded[2], valid, spec.sinks, spec.window) for w in layers]
        if self.sparsity == "budget":
            logits = torch.stack([w.recorded[0].detach() for w in layers])
            cut = budget_cut(logits, valid, target, spec.sinks, spec.window)
            for w in layers:
                w.threshold = cut
        return hidden, torch.stack(oracle).mean()

    def _task(self, batch, teacher) -> torch.Tensor:
        head = base_model(self.model).get_output_embeddings()
        weights = batch["weights"].float()  # weights[t]: of predicting token t + 1
        student = self._hidden(batch)
        if self.objective == "lm":
            return lm_loss(student, batch["input_ids"].roll(-1, 1), head, weights)
        return distillation_loss(student, teacher, head, weights)

    def forward(self, batch: dict[str, torch.Tensor], target: float, warm: bool = False) -> dict[str, torch.Tensor]:
        """batch: input_ids, attention_mask, weights [batch, tokens]; target: keep rate aimed at ("budget": held).

        warm: the oracle alone, without the student's pass (a third of the time); needs oracle_weight > 0.
        Returns {"loss", "task", "sparsity", "keep" (hard rate, scalar), "gap" [units] for the multipliers}.
        """
        layers = wrappers(self.model)
        teacher, oracle = self._teacher(batch, target)
        task = torch.zeros((), device=oracle.device) if warm else self._task(batch, teacher)
        soft, hard = [], []
        for w in layers:
            logits, valid, *_ = w.recorded
            spec = w.specs[w.active()]
            margin = logits - (logit_of(spec.threshold) if w.threshold is None else w.threshold)
            soft.append(keep_rates(RELAXATIONS[spec.relaxation](margin), valid, spec.sinks, spec.window))
            hard.append(keep_rates(RELAXATIONS["hard"](margin), valid, spec.sinks, spec.window))
            w.recorded = w.threshold = None
        gap = sparsity_gap(torch.stack(soft), target, self.scope)
        penalty = sparsity_loss(gap, self.sparsity, self.multiplier)
        return {
            "loss": task
            + (0 if self.sparsity == "budget" else self.sparsity_weight) * penalty
            + self.oracle_weight * oracle,
            "task": task.detach(),
            "oracle": oracle.detach(),
            "sparsity": penalty.detach(),
            "keep": torch.stack(hard).detach().mean(),
            "gap": gap.detach().mean(1),
        }

    @torch.no_grad()
    def move_multipliers(self, gap: torch.Tensor, rate: float = 0.5) -> None:
        """Gradient ascent on the multipliers, once an optimizer step; gap [units] averaged over the global batch."""
        if self.sparsity == "lagrange":
            self.multiplier += rate * gap

    @torch.no_grad()
    def soft_hard(self, batch, target: float) -> dict[str, float]:
        """Train soft, deploy hard: task loss under both, their gap, and how undecided the gates are."""
        layers = wrappers(self.model)
        teacher, _ = self._teacher(batch, target)
        cut = layers[0].threshold
        soft = float(self._task(batch, teacher))
        p = torch.stack([(w.recorded[0] - (0 if cut is None else cut)).sigmoid() for w in layers])
        with parallel(self.model, "hard", threshold=cut):
            hard = float(self._task(batch, teacher))
        undecided = float(((p > 0.05) & (p < 0.95)).float().mean())
        return {"soft": soft, "hard": hard, "soft_hard_gap": hard - soft, "undecided": undecided}
