"""The training objective as a module: one forward = losses of one micro-batch. This is what DDP and DeepSpeed wrap."""

import torch
from torch import nn

from gatekv.gates.relaxations import RELAXATIONS
from gatekv.modules import base_model, gates_off, parallel, wrappers
from gatekv.training.losses import distillation_loss, keep_rates, lm_loss, sparsity_gap, sparsity_loss


class Objective(nn.Module):
    """Task loss + sparsity_weight · sparsity loss of a PEFT model with gates.

    Args:
        model: PEFT model; its base is frozen and doubles as the teacher, with the gates switched off.
        objective: "kl" (to the same model with gates off) or "lm".
        sparsity: "abs" or "lagrange". scope: "layer" or "global". sparsity_weight: alpha.
    """

    def __init__(self, model, *, objective: str, sparsity: str, scope: str, sparsity_weight: float):
        super().__init__()
        self.model = model
        self.objective, self.sparsity, self.scope, self.sparsity_weight = objective, sparsity, scope, sparsity_weight
        units = len(wrappers(model)) if scope == "layer" else 1
        self.register_buffer("multiplier", torch.zeros(units))

    def _hidden(self, batch):
        inner = base_model(self.model)
        ids = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        return inner.base_model(**ids, use_cache=False).last_hidden_state

    def _task(self, batch) -> torch.Tensor:
        head = base_model(self.model).get_output_embeddings()
        weights = batch["weights"].float()  # weights[t]: of predicting token t + 1
        student = self._hidden(batch)
        if self.objective == "lm":
            return lm_loss(student, batch["input_ids"].roll(-1, 1), head, weights)
        with torch.no_grad(), gates_off(self.model):
            teacher = self._hidden(batch)
        return distillation_loss(student, teacher, head, weights)

    def forward(self, batch: dict[str, torch.Tensor], target: float) -> dict[str, torch.Tensor]:
        """batch: input_ids, attention_mask, weights [batch, tokens]; target: keep rate aimed at.

        Returns {"loss", "task", "sparsity", "keep" (hard rate, scalar), "gap" [units] for the multipliers}.
        """
        task = self._task(batch)
        soft, hard = [], []
        for w in wrappers(self.model):
            logits, valid = w.recorded
            spec = w.specs[w.active()]
            soft.append(keep_rates(RELAXATIONS[spec.relaxation](logits, spec.threshold), valid, spec.sinks, spec.window))
            hard.append(keep_rates(RELAXATIONS["hard"](logits, spec.threshold), valid, spec.sinks, spec.window))
            w.recorded = None
        gap = sparsity_gap(torch.stack(soft), target, self.scope)
        penalty = sparsity_loss(gap, self.sparsity, self.multiplier)
        return {
            "loss": task + self.sparsity_weight * penalty,
            "task": task.detach(),
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
    def soft_hard(self, batch) -> dict[str, float]:
        """Train soft, deploy hard: task loss under both, their gap, and how undecided the gates are."""
        soft = float(self._task(batch))
        undecided = torch.stack([((p := w.recorded[0].sigmoid()) > 0.05) & (p < 0.95) for w in wrappers(self.model)])
        with parallel(self.model, "hard"):
            hard = float(self._task(batch))
        return {"soft": soft, "hard": hard, "soft_hard_gap": hard - soft, "undecided": float(undecided.float().mean())}
