"""Fine-tuning without gates: LoRA alone, the control of every run with them; the loop takes it as Objective."""

import torch
from torch import nn

from gatekv.precision import wide
from gatekv.training.head import LogitHead
from gatekv.training.losses import lm_loss, row_shares
from gatekv.training.noise import announce, as_evaluated, quiet
from gatekv.training.rows import Batch, Rows


class PlainObjective(nn.Module):
    """Cross-entropy of the tokens that batch["weights"] counts, under the whole cache.

    Args:
        model: PEFT model with LoRA and without gates.
    """

    multiplier: torch.Tensor

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.head = model, LogitHead(model)
        announce(model)
        self.register_buffer("multiplier", torch.zeros(1))  # part of every objective's checkpoint

    def forward(
        self, batch: Batch, target: float, warm: bool = False, seed: int | None = None
    ) -> dict[str, torch.Tensor]:
        """batch: as `gatekv.training.objective.Objective.forward`, whose keys it returns; nothing is evicted."""
        self.head.ready()
        rows = Rows.of(batch, self.model)
        with quiet(self.model):
            hidden = rows.hidden(self.head.decoder)
            labels, shares = rows.ids.roll(-1, 1), row_shares(wide(batch["weights"], hidden))
            loss = lm_loss(hidden, labels, self.head, shares)
        zero = torch.zeros((), device=loss.device)
        return {"loss": loss, "task": loss.detach(), "sparsity": zero, "keep": zero + 1, "gap": zero[None]}

    def move_multipliers(self, gap: torch.Tensor) -> None:
        """Nothing to move."""

    @torch.no_grad()
    def soft_hard(self, batch: Batch, target: float) -> dict[str, float]:
        """The loss on a row kept apart; without flags, soft is hard."""
        with as_evaluated(self.model):
            loss = float(self(batch, target)["loss"])
        return {"soft": loss, "hard": loss, "soft_hard_gap": 0.0}
