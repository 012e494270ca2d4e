"""Options of `recipes/less.py`."""

from dataclasses import dataclass
from typing import ClassVar

from gatekv.config import LESS_FORMS, GateSpec, option, strict
from gatekv.policies import resolve
from gatekv.presets import preset
from gatekv.training.lesson import KINDS
from gatekv.training.options import GATE_OPTIONS, RunConfig


@strict
@dataclass
class LessConfig(RunConfig):
    """Training of low-rank maps for what a policy evicts, on a frozen model. See `gatekv.training.lesson`.

    Raises:
        ValueError: with the option and the cure.
    """

    recipe: ClassVar[str] = "less.py"

    output_dir: str = "checkpoints/less"
    max_steps: int = 200
    target_keep: float = 0.125
    budget_spread: float = 1.0

    adapter: str = option("", "Folder, Hub or bundled name of an adapter to build on; its gate and LoRA stay.")
    policy: str = option("snapkv", "Whose evictions the maps learn; gates need an adapter, or train_gate.")
    objective: str = option("kl", "Each layer's own error, or end to end after warm_share of the run.", choices=KINDS)
    warm_share: float = option(0.65, "Share of the run that learns layer by layer.")
    train_gate: bool = option(False, "The gate learns with the maps: the adapter's, or a fresh one.")
    retrieval_share: float = option(0.0, "Share of the rows with facts written in and asked for.")
    recite_share: float = option(0.0, "Share of the rows that ask for passages of their own text.")
    form: str = option("centroids", "Of the maps; kernel is the paper's.", choices=LESS_FORMS)
    rank: int = option(4, "Numbers that stand for a key (the paper: 8).")
    hidden: int = option(512, "Width of the maps.")
    dropout: float = option(0.0, "In training (the paper: .3).")

    # What the loop asks of a config and this training has no choice in.
    prefill: ClassVar[str] = "dense"
    sparsity: ClassVar[str] = "budget"
    target_share: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, not {self.rank}.")
        if self.target_keep * self.budget_spread > 1:
            raise ValueError(
                f"target_keep={self.target_keep} and budget_spread={self.budget_spread} must span budgets of at most 1."
            )
        policy = resolve(self.policy, self.target_keep)
        if policy.remainder is not None:
            raise ValueError(f"policy {self.policy!r}: leave +less out, the remainder is what is trained.")
        gate = policy.needs.gate
        if gate and not (self.adapter or self.train_gate):
            raise ValueError(
                f"policy {self.policy!r} needs a gate: name a trained one's adapter with --adapter, or train one from "
                "scratch with --train_gate true."
            )
        if self.train_gate and not (gate and self.objective == "kl"):
            raise ValueError("train_gate learns end to end: use --objective kl, and a gate's policy, like gate+global.")

    @property
    def fresh_gate(self) -> GateSpec | None:
        """The gate that learns beside the maps where no adapter brings one."""
        if self.adapter or not self.train_gate:
            return None
        return GateSpec(**{k: v for k, v in preset("default").items() if k in GATE_OPTIONS})
