"""A gate and low-rank maps that learn at once: the gate what the maps cannot say, the maps what the gate lets go."""

import torch
from peft import PeftModel
from torch import nn

from gatekv.training.lesson import LessObjective
from gatekv.training.objective import Objective
from gatekv.training.rows import Batch


class JointObjective(nn.Module):
    """Warm steps: every layer by itself, the gate after the attention that tokens receive, the maps after what the gate
    evicts. Then the model with its gate and its remainder is distilled from the model with its whole cache: a token
    weighs g in attention and 1 - g in the state, so that both learn from one error.

    Args:
        model: PEFT model with gates and low-rank maps, both of which learn.
        policy: a gate's, whose decisions the maps learn from while they are warm.
        oracle_weight: of the gate's regression to received attention, beside the divergence.

    Raises:
        ValueError: an adapter without gates or without maps, a policy that is no gate's, or what `Objective` refuses.
    """

    def __init__(self, model: PeftModel, policy: str, oracle_weight: float = 0.3) -> None:
        super().__init__()
        self.maps = LessObjective(model, policy)
        self.gate = Objective(
            model, objective="kl", prefill="dense", sparsity="budget", scope="global", oracle_weight=oracle_weight
        )
        self.model, self.multiplier = model, self.gate.multiplier

    def forward(self, batch: Batch, target: float, warm: bool = False, seed: int | None = None) -> dict:
        """As `LessObjective.forward` and `Objective.forward`; target: the budget of both."""
        gate = self.gate(batch, target, warm=warm, seed=seed)
        if not warm:
            return gate
        maps = self.maps(batch, target, warm=True)
        return gate | {"loss": gate["loss"] + maps["loss"], "task": maps["task"]}

    def move_multipliers(self, gap: torch.Tensor) -> None:
        """Nothing to move: budgets are held exactly."""

    def soft_hard(self, batch: Batch, target: float) -> dict[str, float]:
        """What `LessObjective.soft_hard` finds of the layers, and the divergence with hard flags and a state."""
        return self.maps.soft_hard(batch, target) | {"kl": self.gate.soft_hard(batch, target)["hard"]}
