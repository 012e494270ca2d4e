"""Options of `recipes/cpt.py`: a dataclass, overridden by a preset, a YAML file and `--key value`, in that order."""

import dataclasses
import typing
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from gatekv.config import GateSpec, check_choice, check_keys, strict
from gatekv.presets import PRESETS, preset
from gatekv.training.objective import KINDS as OBJECTIVES
from gatekv.training.objective import check_objective
from gatekv.training.sparsity import KINDS as SPARSITIES
from gatekv.training.sparsity import SCOPES

GATE_OPTIONS = {f.name for f in dataclasses.fields(GateSpec)}


@strict
@dataclass
class CPTConfig:
    """Continual pre-training of gates on a frozen model.

    Attributes:
        model: folder or Hub name; empty = the embedded demo model. preset: see gatekv.presets.
        data: files, folders or Hub names; empty = the bundled sample.
        sequence_length: tokens a row, at most. batch_size: rows per device and micro-batch.
        accumulation: micro-batches a step. max_steps: optimizer steps.
        learning_rate, max_grad_norm: of AdamW; the rate rises over 7 % of the steps and decays to a tenth.
        objective, prefill, sparsity, scope, sparsity_weight, polarise_weight, oracle_weight: see
            gatekv.training.objective.Objective. warm_share: of the run that regresses to the oracle alone.
        retrieval_share, recite_share, answer_weight, pack: see gatekv.training.data.TrainingData.
        target_keep: beta, reached from 1 after target_share of the run.
        budget_spread: with sparsity="budget", later targets are drawn from target_keep / spread … · spread; 1: fixed.
        gradient_checkpointing: hold one layer's activations at a time, for a third more time; with prefill="sparse".
        dtype: of the frozen base. save_every: steps between checkpoints. resume: go on from output_dir/checkpoint.
        log_with: tracker known to accelerate, or none.
        spec: the gate, whose own options stand beside these in YAML and on the command line.
    """

    model: str = ""
    preset: str = "default"
    output_dir: str = "checkpoints/demo"
    data: list[str] = field(default_factory=list)
    sequence_length: int = 640
    batch_size: int = 1
    accumulation: int = 1
    max_steps: int = 90
    learning_rate: float = 2e-3
    max_grad_norm: float = 1.0
    objective: str = "kl"
    prefill: str = "sparse"
    answer_weight: float = 20.0
    retrieval_share: float = 0.6
    recite_share: float = 0.0
    pack: bool = False
    sparsity: str = "abs"
    scope: str = "global"
    sparsity_weight: float = 20.0
    polarise_weight: float = 0.0
    oracle_weight: float = 0.0
    warm_share: float = 0.0
    target_keep: float = 0.2
    target_share: float = 0.5
    budget_spread: float = 2.2
    gradient_checkpointing: bool = False
    dtype: str = "bfloat16"
    save_every: int = 50
    resume: bool = False
    log_with: str = "none"
    seed: int = 0
    spec: GateSpec = field(default_factory=GateSpec)

    def __post_init__(self):
        check_choice("preset", self.preset, PRESETS)
        if self.spec.gate == "none":
            raise ValueError("gate='none' leaves nothing to train here: choose a gate.")
        check_choice("objective", self.objective, OBJECTIVES)
        check_choice("prefill", self.prefill, ("sparse", "dense"))
        check_choice("sparsity", self.sparsity, SPARSITIES)
        check_choice("scope", self.scope, SCOPES)
        check_choice("dtype", self.dtype, ("bfloat16", "float16", "float32", "float64"))
        for name in ("batch_size", "accumulation", "max_steps", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}.")
        if not 0 < self.target_keep <= 1:
            raise ValueError(
                f"target_keep is the share of tokens to keep, above 0 and at most 1; got {self.target_keep}."
            )
        if self.warm_share > 0 and self.oracle_weight == 0:
            raise ValueError("warm_share trains on the oracle alone: set oracle_weight above 0 too.")
        if self.objective == "none" and self.oracle_weight == 0:
            raise ValueError("objective='none' leaves the oracle alone to train on: set oracle_weight above 0.")
        if self.gradient_checkpointing and (self.prefill == "dense" or self.objective in ("attention_mse", "none")):
            raise ValueError(
                "gradient_checkpointing is for prefill='sparse' and objectives that go backward through the model: "
                "without it the pass behind a dense prompt is short, and layer-local losses hold one layer at a time."
            )
        if self.budget_spread < 1:
            raise ValueError(f"budget_spread is a factor, at least 1; got {self.budget_spread}.")
        if self.pack and (self.prefill == "dense" or self.spec.context == "prompt"):
            raise ValueError("pack=true is for flags that act as tokens pass: use prefill='sparse' and causal gates.")
        check_objective(self.objective, self.prefill, self.sparsity, self.scope, self.spec)

    @classmethod
    def from_options(cls, options: dict) -> "CPTConfig":
        """From one flat dict, in which the gate's options stand beside the run's."""
        gate = {k: v for k, v in options.items() if k in GATE_OPTIONS}
        rest = {k: v for k, v in options.items() if k not in GATE_OPTIONS}
        check_keys(cls.__name__, rest, {f.name for f in dataclasses.fields(cls)} | GATE_OPTIONS)
        return cls(**rest, spec=GateSpec(**gate))

    def options(self) -> dict:
        """The flat dict that `from_options` takes."""
        return {k: v for k, v in vars(self).items() if k != "spec"} | vars(self.spec)


def _parse(name: str, text: str, kind):
    """A command-line string as the field's type."""
    if typing.get_origin(kind) is list:
        return [t for t in text.split(",") if t]
    if kind is bool:
        check_choice(name, text.lower(), ("true", "false"))
        return text.lower() == "true"
    try:
        return kind(text)
    except ValueError as error:
        raise ValueError(f"{name}={text!r} is not of type {kind.__name__}.") from error


def load_config(argv: list[str], cls=CPTConfig) -> CPTConfig:
    """`--config FILE` and `--key value` pairs -> config.

    Raises:
        TypeError, ValueError: with the key and the cure.
    """
    kinds = typing.get_type_hints(cls)
    if kinds.pop("spec", None):
        kinds |= typing.get_type_hints(GateSpec)
    given, settings = {}, {}
    rest = list(argv)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--"):
            raise TypeError(f"expected --key value, got {flag!r}.")
        name, _, value = flag[2:].partition("=")
        check_keys("the command line", [name], [*kinds, "config"])
        if not value and kinds.get(name) is bool and (not rest or rest[0].startswith("--")):
            value = "true"
        elif not value and not rest:
            raise TypeError(f"--{name} needs a value.")
        value = value or rest.pop(0)
        if name == "config":
            path = Path(value)
            if not path.is_file():
                raise ValueError(f"--config {value}: no such file.")
            settings = yaml.safe_load(path.read_text()) or {}
            check_keys(value, settings, kinds)
        else:
            given[name] = _parse(name, value, kinds[name])
    base = preset(given.get("preset", settings.get("preset", cls.preset))) if "preset" in kinds else {}
    return cls.from_options({**base, **settings, **given})
