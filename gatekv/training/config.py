"""Options of `recipes/cpt.py`: the gate's own beside the run's."""

from dataclasses import dataclass
from typing import ClassVar

from gatekv.config import GateSpec, option, strict
from gatekv.presets import PRESETS
from gatekv.training.objective import KINDS as OBJECTIVES
from gatekv.training.objective import check_objective
from gatekv.training.options import Gated, RunConfig
from gatekv.training.sparsity import KINDS as SPARSITIES
from gatekv.training.sparsity import SCOPES

PREFILLS = ("sparse", "dense")


@strict
@dataclass
class CPTConfig(Gated, RunConfig, GateSpec):
    """Continual pre-training of gates on a frozen model.

    See `gatekv.training.objective.Objective` for losses and budgets, `gatekv.training.data.TrainingData` for the rows.

    Raises:
        ValueError: with the option and the cure.
    """

    recipe: ClassVar[str] = "cpt.py"

    preset: str = option(
        "default", "Named recipe whose values stand where nothing else is given.", choices=tuple(PRESETS)
    )
    output_dir: str = "checkpoints/demo"
    objective: str = option("kl", "Task loss.", choices=OBJECTIVES)
    prefill: str = option(
        "sparse",
        "Flags act inside the prompt (sparse), behind it (dense), or behind it, where what is kept is read in the few "
        "bits in which `rate` stores it (rate).",
        choices=(*PREFILLS, "rate"),
    )
    retrieval_share: float = option(0.6, "Share of the rows with facts written in and asked for.")
    recite_share: float = option(0.0, "Share of the rows that ask for passages of their own text.")
    answer_weight: float = option(20.0, "Loss weight of the tokens that answer a question.")
    pack: bool = option(False, "Fill rows with several documents, kept apart.")
    sparsity: str = option("abs", "How the share that is kept is held: exactly, or by a penalty.", choices=SPARSITIES)
    scope: str = option("global", "What the share is a mean over.", choices=SCOPES)
    sparsity_weight: float = option(20.0, "Weight of the sparsity penalty.")
    polarise_weight: float = option(0.0, "Weight of the mean of 4p(1 - p), which pushes gates to 0 or 1.")
    oracle_weight: float = option(0.0, "Weight of the regression to the attention that tokens receive.")
    warm_share: float = option(0.0, "Share of the run that regresses to that attention alone.")
    target_share: float = option(0.5, "Share of the run over which the kept share falls from 1 to target_keep.")
    gradient_checkpointing: bool = option(False, "Hold one layer's activations at a time, for a third more time.")

    def __post_init__(self) -> None:
        RunConfig.__post_init__(self)
        GateSpec.__post_init__(self)
        if self.gate == "none":
            raise ValueError("gate='none' leaves nothing to train here: choose a gate.")
        if self.warm_share > 0 and self.oracle_weight == 0:
            raise ValueError("warm_share trains on the oracle alone: set oracle_weight above 0 too.")
        if self.objective == "none" and self.oracle_weight == 0:
            raise ValueError("objective='none' leaves the oracle alone to train on: set oracle_weight above 0.")
        if self.gradient_checkpointing and (self.prefill != "sparse" or self.objective in ("attention_mse", "none")):
            raise ValueError(
                "gradient_checkpointing is for prefill='sparse' and objectives that go backward through the model: "
                "without it the pass behind a dense prompt is short, and layer-local losses hold one layer at a time."
            )
        if self.pack and (self.prefill != "sparse" or self.context == "prompt"):
            raise ValueError("pack=true is for flags that act as tokens pass: use prefill='sparse' and causal gates.")
        prefill = "dense" if self.prefill == "rate" else self.prefill
        check_objective(self.objective, prefill, self.sparsity, self.scope, self.spec, self.prefill == "rate")
