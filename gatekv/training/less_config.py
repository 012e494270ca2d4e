"""Options of `recipes/less.py`."""

from dataclasses import dataclass, field

from gatekv.config import check_choice, strict
from gatekv.policies import resolve
from gatekv.training.lesson import KINDS


@strict
@dataclass
class LessConfig:
    """Training of low-rank maps for a policy, on a frozen model.

    Attributes:
        model, output_dir, data, sequence_length, batch_size, accumulation, max_steps, learning_rate, max_grad_norm,
        retrieval_share, recite_share, dtype, save_every, resume, log_with, seed: see
            gatekv.training.config.CPTConfig.
        adapter: to build on, folder or Hub name: its gate stays as it is, its maps, if it has any, are where these
            begin. Empty: low-rank maps alone.
        policy: whose evictions the maps learn; gates need an adapter. target_keep: the budget; budget_spread: each step
            draws one from target_keep / spread … · spread (1: fixed).
        objective: attention_mse (layer by layer, the paper's) or kl (end to end): see gatekv.training.lesson.
        form, rank, hidden, dropout: of the maps (paper: kernel, 8, 512, .3): see gatekv.config.LessSpec.
    """

    model: str = ""
    adapter: str = ""
    output_dir: str = "checkpoints/less"
    policy: str = "snapkv"
    target_keep: float = 0.125
    budget_spread: float = 1.0
    objective: str = "attention_mse"
    form: str = "kernel"
    rank: int = 8
    hidden: int = 512
    dropout: float = 0.3
    data: list[str] = field(default_factory=list)
    sequence_length: int = 640
    batch_size: int = 1
    accumulation: int = 1
    max_steps: int = 200
    learning_rate: float = 1e-3
    max_grad_norm: float = 1.0
    retrieval_share: float = 0.3
    recite_share: float = 0.3
    dtype: str = "bfloat16"
    save_every: int = 50
    resume: bool = False
    log_with: str = "none"
    seed: int = 0

    # What the loop asks of a config and this training has no choice in.
    prefill = "dense"
    sparsity = "budget"
    warm_share = 0.0
    target_share = 0.0

    def __post_init__(self):
        check_choice("dtype", self.dtype, ("bfloat16", "float16", "float32", "float64"))
        for name in ("batch_size", "accumulation", "max_steps", "save_every", "rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}.")
        if self.budget_spread < 1 or not 0 < self.target_keep * self.budget_spread <= 1:
            raise ValueError(
                f"target_keep={self.target_keep} and budget_spread={self.budget_spread} must span budgets above 0 and "
                "at most 1, and the spread be at least 1."
            )
        check_choice("objective", self.objective, KINDS)
        if resolve(self.policy, self.target_keep).remainder is not None:
            raise ValueError(f"policy {self.policy!r}: leave +less out, the remainder is what is trained.")
        if self.policy.startswith("gate") and not self.adapter:
            raise ValueError(f"policy {self.policy!r} needs a trained gate: name its adapter with --adapter.")

    @classmethod
    def from_options(cls, options: dict) -> "LessConfig":
        """From one flat dict."""
        return cls(**options)

    def options(self) -> dict:
        """The flat dict that `from_options` takes."""
        return dict(vars(self))
