"""Options of `recipes/sft.py`."""

from dataclasses import dataclass
from typing import ClassVar

from gatekv.config import GateSpec, option, strict
from gatekv.training.config import PREFILLS
from gatekv.training.examples import MODES
from gatekv.training.objective import check_objective
from gatekv.training.options import Gated, RunConfig
from gatekv.training.sparsity import KINDS as SPARSITIES
from gatekv.training.sparsity import SCOPES


@strict
@dataclass
class SFTConfig(Gated, RunConfig, GateSpec):
    """Fine-tuning on completions, with a gate and LoRA.

    See `gatekv.training.examples` for `fields`, `gatekv.training.objective.Objective` for losses and budgets.

    Raises:
        ValueError: with the option and the cure.
    """

    recipe: ClassVar[str] = "sft.py"
    warm_share: ClassVar[float] = 0.0  # what the loop asks of a config and this training has no choice in

    # Prompts of a few dozen tokens have no room for cpt.py's window of 32.
    relaxation: str = "ste"
    window: int = 4
    sinks: int = 4
    initial_logit: float = -5.0

    output_dir: str = "checkpoints/sft"
    sequence_length: int = 512
    batch_size: int = 4
    max_steps: int = 150
    learning_rate: float = 1e-3
    target_keep: float = 0.372  # the paper's 62.8 % evicted
    budget_spread: float = 1.0

    dataset_split: str = option("train", "Of Hub data sets.")
    fields: dict = option({}, "How an example is made of a row: its part's name -> a template over the columns.")
    too_long: str = option("error", "What to do with examples longer than a row.", choices=("error", "skip"))
    adapter: str = option("", "Folder, Hub or bundled name of an adapter whose gates these begin as.")
    mode: str = option("aware", "Compress the whole prompt, or its context before the question is seen.", choices=MODES)
    prefill: str = option("dense", "Flags act behind the compressed part (dense) or inside it too.", choices=PREFILLS)
    kl_weight: float = option(0.0, "Weight of the KL to the same model without gates, beside the LM loss.")
    sparsity: str = option(
        "budget", "How the share that is kept is held: exactly, or by a penalty.", choices=SPARSITIES
    )
    scope: str = option("global", "What the share is a mean over.", choices=SCOPES)
    sparsity_weight: float = option(1.0, "Weight of the sparsity penalty.")
    oracle_weight: float = option(0.3, "Weight of the regression to the attention that tokens receive.")
    target_share: float = option(0.5, "Share of the run over which the kept share falls from 1 to target_keep.")
    lora_rank: int = option(16, "Of LoRA; 0: the gate alone, on a frozen model.")
    lora_alpha: int = option(32, "As peft.LoraConfig has it.")
    lora_dropout: float = option(0.0, "As peft.LoraConfig has it.")
    lora_targets: list[str] = option(["all-linear"], "Names of linear modules, or all-linear.")
    gradient_checkpointing: bool = option(False, "Hold one layer's activations at a time, for a third more time.")

    def __post_init__(self) -> None:
        RunConfig.__post_init__(self)
        GateSpec.__post_init__(self)
        if self.lora_rank < 0:
            raise ValueError(f"lora_rank is at least 1, or 0 for no LoRA; got {self.lora_rank}.")
        if self.gate == "none":
            if not self.lora_rank:
                raise ValueError("gate='none' and lora_rank=0 leave nothing to train: choose a gate or a rank.")
            if self.adapter:
                raise ValueError("gate='none' has no gate that could begin as the adapter's: leave one of them out.")
            return
        if self.gradient_checkpointing and self.prefill == "dense" and not self.lora_rank:
            raise ValueError("gradient_checkpointing without LoRA is for prefill='sparse': the pass behind a dense "
                             "prompt is short, and all that is trained through.")  # fmt: skip
        check_objective("lm", self.prefill, self.sparsity, self.scope, self.spec)

    @property
    def lora(self) -> dict | None:
        """What `GateKVConfig(lora=…)` takes."""
        if not self.lora_rank:
            return None
        targets = "all-linear" if self.lora_targets == ["all-linear"] else self.lora_targets
        fields = {"r": self.lora_rank, "lora_alpha": self.lora_alpha, "lora_dropout": self.lora_dropout}
        return fields | {"target_modules": targets}
