"""Options of `recipes/less.py`."""

from dataclasses import dataclass

from gatekv.config import check_choice, strict
from gatekv.policies import resolve
from gatekv.training.lesson import KINDS
from gatekv.training.options import RunConfig


@strict
@dataclass
class LessConfig(RunConfig):
    """Training of low-rank maps for a policy, on a frozen model; options of `gatekv.training.options.RunConfig`, and
    these.

    Attributes:
        adapter: to build on, folder or Hub name: its gate stays as it is, its maps, if it has any, are where these
            begin. Empty: low-rank maps alone.
        policy: whose evictions the maps learn, at budgets drawn around target_keep; gates need an adapter.
        objective: attention_mse (layer by layer, the paper's) or kl (end to end): see gatekv.training.lesson.
        form, rank, hidden, dropout: of the maps (paper: kernel, 8, 512, .3): see gatekv.config.LessSpec.
    """

    output_dir: str = "checkpoints/less"
    max_steps: int = 200
    learning_rate: float = 1e-3
    retrieval_share: float = 0.3
    recite_share: float = 0.3
    target_keep: float = 0.125
    budget_spread: float = 1.0
    adapter: str = ""
    policy: str = "snapkv"
    objective: str = "attention_mse"
    form: str = "kernel"
    rank: int = 8
    hidden: int = 512
    dropout: float = 0.3

    # What the loop asks of a config and this training has no choice in.
    prefill = "dense"
    sparsity = "budget"
    warm_share = 0.0
    target_share = 0.0

    def __post_init__(self):
        super().__post_init__()
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, not {self.rank}.")
        if self.target_keep * self.budget_spread > 1:
            raise ValueError(
                f"target_keep={self.target_keep} and budget_spread={self.budget_spread} must span budgets of at most 1."
            )
        check_choice("objective", self.objective, KINDS)
        if resolve(self.policy, self.target_keep).remainder is not None:
            raise ValueError(f"policy {self.policy!r}: leave +less out, the remainder is what is trained.")
        if self.policy.startswith("gate") and not self.adapter:
            raise ValueError(f"policy {self.policy!r} needs a trained gate: name its adapter with --adapter.")
