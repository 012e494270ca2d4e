"""Options of `recipes/cpt.py`: a dataclass, overridden by a preset, a YAML file and `--key value`, in that order."""

import dataclasses
import typing
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from gatekv.config import GateSpec, check_choice, check_keys, strict
from gatekv.presets import PRESETS, preset


@strict
@dataclass
class CPTConfig:
    """Continual pre-training of gates on a frozen model.

    Attributes:
        model: folder or Hub name; empty = the embedded demo model. preset: see gatekv.presets.
        data: files, folders or Hub names; empty = the bundled sample.
        sequence_length: tokens a row, at most. batch_size: rows per device and micro-batch.
        accumulation: micro-batches a step. max_steps: optimizer steps.
        learning_rate, warmup_steps, final_lr (share of the peak), max_grad_norm: AdamW.
        objective: kl | lm. answer_weight: loss weight of retrieval answers. retrieval_share: of rows.
        sparsity: abs | lagrange | budget; scope: layer | global; sparsity_weight: alpha.
        target_keep: beta, reached from 1 after target_share of the run.
        oracle_weight: of the regression to received attention; warm_share: of the run that does only that.
        gate, hidden, relaxation, window, sinks, initial_logit: see gatekv.config.GateSpec.
        dtype: of the frozen base. save_every: steps between checkpoints. resume: go on from output_dir/checkpoint.
        calibrate_rows: training rows read for the thresholds. log_with: tracker known to accelerate, or none.
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
    warmup_steps: int = 10
    final_lr: float = 0.1
    max_grad_norm: float = 1.0
    objective: str = "kl"
    answer_weight: float = 20.0
    retrieval_share: float = 0.6
    sparsity: str = "abs"
    scope: str = "global"
    sparsity_weight: float = 20.0
    oracle_weight: float = 0.0
    warm_share: float = 0.0
    target_keep: float = 0.2
    target_share: float = 0.5
    gate: str = "mlp"
    hidden: int = 128
    relaxation: str = "log"
    window: int = 32
    sinks: int = 4
    initial_logit: float = 4.6
    dtype: str = "bfloat16"
    save_every: int = 50
    resume: bool = False
    calibrate_rows: int = 4
    log_with: str = "none"
    seed: int = 0

    def __post_init__(self):
        check_choice("preset", self.preset, PRESETS)
        check_choice("objective", self.objective, ("kl", "lm"))
        check_choice("sparsity", self.sparsity, ("abs", "lagrange", "budget"))
        check_choice("scope", self.scope, ("layer", "global"))
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
        self.gate_fields()

    def gate_fields(self) -> dict:
        """The part that goes into GateKVConfig, checked."""
        known = {f.name for f in dataclasses.fields(GateSpec)}
        fields = {k: v for k, v in dataclasses.asdict(self).items() if k in known}
        GateSpec(**fields)
        return fields


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


def load_config(argv: list[str], cls=CPTConfig):
    """`--config FILE` and `--key value` pairs -> config.

    Raises:
        TypeError, ValueError: with the key and the cure.
    """
    kinds = typing.get_type_hints(cls)
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
    base = preset(given.get("preset", settings.get("preset", cls.preset)))
    return cls(**{**base, **settings, **given})
