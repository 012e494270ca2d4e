"""`GatedSFTTrainer`: TRL's SFTTrainer, whose loss is gatekv's objective.

Under SFTTrainer's own loss gates learn too, and go where the task leads: nothing there asks for a smaller cache, nor
compares with the whole one. The objective does, in two passes of one model, gates off and on.
"""

from collections import defaultdict
from typing import Any, cast

import torch
from peft import PeftModel
from torch import nn

try:
    from trl import SFTTrainer
except ImportError as error:
    raise ImportError(
        "gatekv.integrations.trl is for use with TRL, which cannot be imported: pip install 'gatekv[interop]'."
    ) from error

from gatekv.training.objective import Objective
from gatekv.training.packing import Row, collate
from gatekv.training.schedule import target_keep


def row_of(ids: list[int], mask: list[int], labels: list[int]) -> Row:
    """One row of TRL's batch, pads left out; what comes before the first label is its prompt.

    The prompt's last token is never compressed: it is fed to what was kept and says the completion's first.
    """
    real, learned = zip(*((i, label != -100) for i, m, label in zip(ids, mask, labels) if m))
    prompt = learned.index(True) if any(learned) else len(real)
    return Row([*real], [float(x) for x in learned[1:]] + [0.0], prompt - 1, [len(real)])


class GatedSFTTrainer(SFTTrainer):
    """Trains the gates of a gatekv PEFT model, and LoRA of the same adapter, on what SFTTrainer trains on.

    Args:
        args, kwargs: SFTTrainer's: a model with `peft_config=GateKVConfig(…)`, or a PEFT model. `SFTConfig` for
            one process, without padding-free batches; gradient checkpointing (TRL's default) may stay on.
        keep: share of the tokens that a head holds on average, which the objective aims at or, with
            sparsity="budget", holds exactly. It falls from 1 in the first half of the run.
        objective: arguments of `gatekv.training.objective.Objective` over {"objective": "lm", "oracle_weight": .3}.
            prefill="dense", for data with prompt and completion: flags act on the prompt alone, behind it.

    Logs, beside TRL's: `keep`, the share that hard flags keep; `task` and `oracle`, parts of the loss.

    Raises:
        ValueError: where gates would be trained wrongly, says which argument to change.
    """

    loss_is_scaled_for_ga: Any = False  # a mean over rows: Trainer divides it by the number of micro-batches

    def __init__(self, *args: Any, keep: float = 0.25, objective: dict | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.accelerator.num_processes > 1:
            raise ValueError(
                f"{type(self).__name__} runs in one process: the objective's passes bypass DistributedDataParallel. "
                "Use `accelerate launch recipes/sft.py` for several."
            )
        if self.padding_free:
            raise ValueError(
                "padding_free, and packing with it, puts rows end to end; gates judge one: set both False."
            )
        if not 0 < keep <= 1:
            raise ValueError(f"keep is the share of tokens that is held, above 0 and at most 1; got {keep}.")
        self.keep = keep
        self.found: dict[str, list[float]] = defaultdict(list)
        self.objective: Objective = Objective(
            cast(PeftModel, self.model), **{"objective": "lm", "oracle_weight": 0.3} | (objective or {})
        )
        if self.objective.sparsity == "lagrange":
            raise ValueError("sparsity='lagrange' has multipliers that Trainer would not save: use another penalty.")

    def batch_of(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What the objective takes: TRL's input_ids, attention_mask, labels [batch, tokens] with prompts aligned."""
        rows = [row_of(*row) for row in zip(*(inputs[k].tolist() for k in ("input_ids", "attention_mask", "labels")))]
        aligned = self.objective.prefill == "dense" or self.objective.spec.context == "prompt"
        if aligned and min(row.split for row in rows) < 1:
            raise ValueError("flags that act behind a prompt need one: give data with `prompt` and `completion`.")
        batch = collate(rows, aligned)
        return {k: v.to(inputs["input_ids"].device) for k, v in batch.items() if k not in ("segments", "position_ids")}

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """The objective's loss of a batch, a scalar."""
        if return_outputs:
            raise ValueError("the objective gives a loss and no logits: leave compute_metrics out.")
        step, training = self.state.global_step, cast(nn.Module, self.model).training
        target = target_keep(step, self.state.max_steps, self.keep, 0.5) if training else self.keep
        out = self.objective(self.batch_of(inputs), target, seed=step)
        for name in ("keep", "task", "oracle") if training else ():
            self.found[name].append(float(out[name]))
        return out["loss"]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the means since the last training log."""
        if "loss" in logs:
            logs |= {name: sum(values) / len(values) for name, values in self.found.items()}
            self.found.clear()
        super().log(logs, start_time)
