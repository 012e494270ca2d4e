"""Options that every training recipe has, in the groups that `--help` shows."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar, cast

from gatekv.config import GateSpec, check_options, option
from gatekv.options import HardwareOptions, load
from gatekv.presets import preset

GATE_OPTIONS = {f.name for f in dataclasses.fields(GateSpec)}
# A run may go on with other values of these; batch_size and accumulation as long as a step has as many rows.
FREE = {"output_dir", "log_with", "push_to", "save_every", "save_minutes", "keep_checkpoints", "resume", "dry_run",
        "preset", "max_loss_ratio", "batch_size", "accumulation", "gradient_checkpointing", "device",
        "threads", "dataloader_num_workers"}  # fmt: skip
Config = TypeVar("Config", bound="RunConfig")


@dataclass
class TextOptions(HardwareOptions):
    """The base and the text."""

    _argument_group_name = "model and data"

    model: str = option("", "Base model, folder or Hub name; left out: the embedded SmolLM2-135M-Instruct.")
    data: list[str] = option([], "Files, folders or Hub sets, each as name or name=weight; left out: the bundled text.")
    sequence_length: int = option(640, "Tokens of a row, at most.")
    seed: int = option(0, "Of everything that is drawn.")
    dataloader_num_workers: int = option(-1, "Processes that read rows ahead; -1: two beside an accelerator.")


@dataclass
class StepOptions:
    """How many steps, and what one does."""

    _argument_group_name = "steps"

    max_steps: int = option(90, "Optimizer steps.")
    batch_size: int = option(1, "Rows of a device and micro-batch.")
    accumulation: int = option(1, "Micro-batches of a step.")
    learning_rate: float = option(2e-3, "Of AdamW; it rises over 7 % of the steps and then decays to a tenth.")
    max_grad_norm: float = option(1.0, "Gradients are clipped to this norm.")
    max_loss_ratio: float = option(20.0, "Stop at a loss above this many times the running median; 0: never.")
    target_keep: float = option(0.2, "Share of the tokens to keep.")
    budget_spread: float = option(2.2, "Each step draws its share from target_keep / spread to target_keep * spread.")


@dataclass
class OutputOptions:
    """What is written, where, and how often."""

    _argument_group_name = "output"

    output_dir: str = option("", "Folder for checkpoints and the adapter.")
    save_every: int = option(50, "Steps between checkpoints; 0: as save_minutes says.")
    save_minutes: float = option(15.0, "Minutes between checkpoints, if they are over first; 0: as save_every says.")
    keep_checkpoints: int = option(2, "Newest checkpoints that stay.")
    resume: str = option("", "Go on from a checkpoint's folder, or, bare, from the newest in output_dir.", bare="auto")
    dry_run: str = option(
        "", "Say what the run takes and stop: bare for this launch, or a plan such as ddp:8, zero3:16.", bare="auto"
    )
    push_to: str = option("", "user/name on the Hub, which gets checkpoints and the adapter; a new one is private.")
    log_with: str = option("none", "A tracker that accelerate knows, such as trackio, wandb or tensorboard.")


@dataclass
class RunConfig(OutputOptions, StepOptions, TextOptions):
    """What `recipes/cpt.py`, `recipes/less.py` and `recipes/sft.py` have in common.

    Attributes:
        recipe: the script that these options are of.

    Raises:
        ValueError: with the option and the cure.
    """

    recipe: ClassVar[str] = ""

    def __post_init__(self) -> None:
        check_options(self)
        for name in ("batch_size", "accumulation", "max_steps", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}.")
        for name in ("save_every", "save_minutes", "max_loss_ratio"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, which switches it off, not {getattr(self, name)}.")
        if self.dataloader_num_workers < -1:
            raise ValueError(
                f"dataloader_num_workers={self.dataloader_num_workers} is no number of processes: give 0 or more, "
                "or -1 to leave it to the machine."
            )
        if self.push_to and self.model and Path(self.model).is_dir():
            raise ValueError(
                f"push_to shares the adapter, but nobody else finds its base in the folder {self.model}: give --model "
                "the base's name on the Hub."
            )
        if not 0 < self.target_keep <= 1:
            raise ValueError(
                f"target_keep is the share of tokens to keep, above 0 and at most 1; got {self.target_keep}."
            )
        if self.budget_spread < 1:
            raise ValueError(f"budget_spread is a factor, at least 1; got {self.budget_spread}.")

    def options(self) -> dict:
        """Every option by name, as `load_config` and the class itself take them."""
        return dataclasses.asdict(self)

    def decisive(self) -> dict:
        """The options that a run's result depends on: a checkpoint goes with these and no others."""
        return {name: value for name, value in self.options().items() if name not in FREE}


class Gated:
    """For options that include a gate's own."""

    @property
    def spec(self) -> GateSpec:
        """The gate that these options describe."""
        return GateSpec(**{name: getattr(self, name) for name in GATE_OPTIONS})


def load_config(argv: Sequence[str], cls: type[Config], doc: str | None = None) -> Config:
    """Preset, `--config FILE` and `--key value`, each of which goes before the one named before it -> a `cls`.

    Raises:
        TypeError, ValueError: with the option and the cure.
    """
    defaults = None
    if "preset" in {field.name for field in dataclasses.fields(cls)}:
        defaults = lambda given: preset(given.get("preset") or cast(Any, cls).preset)  # noqa: E731
    return load(argv, cls, doc, defaults)
