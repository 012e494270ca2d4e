"""Dataclass configs whose unknown keys are errors that name the nearest known key."""

import dataclasses
import difflib
import functools
import typing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from huggingface_hub.dataclasses import type_validator

Config = TypeVar("Config")


def nearest(name: object, known: Iterable) -> str:
    """' Did you mean 'x'?' or '' for a mistyped name."""
    close = difflib.get_close_matches(str(name), [str(k) for k in known], n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else ""


def check_choice(argument: str, value: object, known: Iterable) -> None:
    """Raise ValueError that lists what `argument` may be."""
    if value not in known:
        raise ValueError(f"unknown {argument} {value!r}.{nearest(value, known)} Known: {', '.join(map(str, known))}.")


def check_keys(owner: str, keys: Iterable[str], known: Iterable[str]) -> None:
    """Raise TypeError for the first unknown key, with the nearest known one."""
    for key in keys:
        if key not in known:
            raise TypeError(f"unknown key '{key}' in {owner}.{nearest(key, known)} Known: {', '.join(sorted(known))}.")


def strict(cls: type[Config]) -> type[Config]:
    """Class decorator for dataclasses: keyword arguments that are no field raise with the nearest name."""
    init: Callable[..., None] = cls.__init__
    known = {f.name for f in dataclasses.fields(cast(Any, cls)) if f.init}

    @functools.wraps(init)
    def __init__(self: Config, *args: Any, **kwargs: Any) -> None:
        check_keys(cls.__name__, kwargs, known)
        init(self, *args, **kwargs)

    cast(Any, cls).__init__ = __init__
    return cls


def option(
    default: Any, help: str, *, choices: Sequence[str] = (), positional: bool = False, bare: str | None = None
) -> Any:
    """A field of an options class.

    Args:
        default: lists and dicts are copied for each instance. help: one sentence. choices: all that it may be.
        positional: given by its place instead of by `--name`. bare: what `--name` without a value means.
    """
    metadata = {"help": help, "choices": tuple(choices), "positional": positional, "bare": bare}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def check_options(options: Any) -> None:
    """ValueError for a field of a dataclass instance that has choices and is none of them; lists are read through."""
    for name, (_, field) in declared(type(options)).items():
        if known := field.metadata.get("choices"):
            value = getattr(options, name)
            for one in value if isinstance(value, list) else [value]:
                check_choice(name, one, known)


def declared(cls: type) -> dict[str, tuple[type, dataclasses.Field]]:
    """Field name -> (the class that declares it first, its field there: help, choices), in the order of `cls`."""
    found: dict[str, tuple[type, dataclasses.Field]] = {}
    for owner in reversed(cls.__mro__):
        for name, field in vars(owner).get("__dataclass_fields__", {}).items():
            if name in vars(owner).get("__annotations__", {}) and field.init:
                found.setdefault(name, (owner, field))
    order = [field.name for field in dataclasses.fields(cls) if field.init]
    return {name: found[name] for name in order}


MOST = 2**31 - 1  # of any number: what positions are held in
WIDEST = 2**20  # of any part of a gate or map: no model is so wide, and products of two still fit in a size


def check_types(owner: type, config: Any) -> None:
    """TypeError unless every field of the dataclass `owner` has its type in `config`; whole numbers pass as floats."""
    for name, kind in typing.get_type_hints(owner).items():
        value = getattr(config, name)
        parts = [part for part in typing.get_args(kind) if part is not type(None)]
        optional = type(None) in typing.get_args(kind) and len(parts) == 1
        if optional and value is None:
            continue
        one = parts[0] if optional else kind
        number = one in (int, float)  # NaN, infinity and numbers of any length are JSON for Python
        try:
            if number and (isinstance(value, bool) or not abs(value) <= MOST):
                raise TypeError
            type_validator(name, float(value) if one is float else value, one)
        except TypeError as error:
            said = kind.__name__ if isinstance(kind, type) else str(kind)
            limit = f" of at most {MOST}" if number else ""
            raise TypeError(
                f"{name} must be {said}{limit}, not {repr(value)[:60]}: set it to one, or leave it out."
            ) from error


GATES = ("linear", "mlp", "key_mlp", "attention", "none")
LESS_FORMS = ("kernel", "centroids")
CONTEXTS = ("causal", "prompt")
RELAXATIONS = ("log", "ste", "gumbel", "decay")


@strict
@dataclass
class GateSpec:
    """What a gate is and when its flags act; everything inference needs to know about it.

    Raises:
        ValueError, TypeError: a value out of range, or of another type.
    """

    _argument_group_name = "gate"

    gate: str = option(
        "mlp",
        "Form: linear or mlp read each token's layer input, key_mlp each head's own key, attention (the paper's "
        "reduced multi-head attention) a short past, none: no gate.",
        choices=GATES,
    )
    context: str = option(
        "causal", "Tokens are judged as they come, or by the attention gate after the whole prompt (the paper).",
        choices=CONTEXTS,
    )  # fmt: skip
    mask_prompt: bool = option(True, "With context=prompt: flags act for the prompt's own queries too (the paper).")
    hidden: int = option(128, "Width of the mlp and key_mlp gates.")
    heads: int = option(4, "Of the attention gate.")
    head_dim: int = option(32, "Of the attention gate.")
    context_window: int = option(64, "Tokens that the attention gate looks back on; its ring counts as cache.")
    relaxation: str = option(
        "log",
        "How a hard flag has a gradient: ste (Attention-Gate, straight-through), log (bias log sigmoid), gumbel (the "
        "same with logistic noise, as DMS), decay (TRIM-KV: tokens fade at the rate of their gate).",
        choices=RELAXATIONS,
    )
    window: int = option(32, "Tokens behind the query that ignore their flag (0: the paper).")
    sinks: int = option(4, "First real tokens of a row that are always kept.")
    threshold: float = option(0.5, "A token stays where its probability is above this.")
    initial_logit: float = option(4.6, "Bias of the last layer at the start; 4.6 is p = .99: everything is kept.")
    logit_scale: float = option(1.0, "Factor of the linear gate's output (DMS: 100).")
    temperature: float = option(0.1, "Of the gumbel noise.")

    def __post_init__(self) -> None:
        check_types(GateSpec, self)
        check_options(self)
        if self.context == "prompt" and self.gate != "attention":
            raise ValueError(f"context='prompt' is the attention gate's: set gate='attention', not {self.gate!r}.")
        if self.temperature <= 0 or self.logit_scale <= 0:
            raise ValueError(f"temperature and logit_scale must be positive: {self.temperature}, {self.logit_scale}.")
        if self.window < 0 or self.sinks < 0:
            raise ValueError(f"window and sinks count tokens and cannot be negative: {self.window}, {self.sinks}.")
        if not 0 < self.threshold < 1:
            raise ValueError(f"threshold is a probability between 0 and 1, not {self.threshold}.")
        for name in ("hidden", "heads", "head_dim", "context_window"):
            if not 1 <= getattr(self, name) <= WIDEST:
                raise ValueError(f"{name} must be at least 1 and at most {WIDEST}, not {getattr(self, name)}.")


@strict
@dataclass
class LessSpec:
    """The low-rank remainder beside a gate or alone (LESS, arXiv 2402.09398).

    Attributes:
        less_rank: R, numbers that stand for a key; 0 = no remainder (paper: 8).
        less_form: "kernel" (the paper's φ(q)·ψ(k)) or "centroids" (see gatekv.less.centroids; the state is twice as
            large at the same rank).
        less_hidden: width of the feature maps (paper: 512). less_dropout: in training (paper: .3).
        less_policy, less_budget: what the maps were trained under; another one works, with a warning.
    """

    less_rank: int = 0
    less_form: str = "kernel"
    less_hidden: int = 512
    less_dropout: float = 0.3
    less_policy: str | None = None
    less_budget: float | None = None

    def __post_init__(self) -> None:
        check_types(LessSpec, self)
        if not 0 <= self.less_rank <= WIDEST or not 1 <= self.less_hidden <= WIDEST:
            sizes = f"{self.less_rank} and {self.less_hidden}"
            raise ValueError(f"less_rank and less_hidden are sizes of at most {WIDEST}, got {sizes}.")
        if not 0 <= self.less_dropout < 1:
            raise ValueError(f"less_dropout is a share, at least 0 and below 1; got {self.less_dropout}.")
        check_choice("less_form", self.less_form, LESS_FORMS)

    def state_numbers(self, head_dim: int) -> int:
        """Numbers that a state holds for one KV head."""
        return self.less_rank * (head_dim * (2 if self.less_form == "centroids" else 1) + 1)
