"""Policies by name: gatekv's own, and those that others register."""

from dataclasses import asdict
from typing import Any

from gatekv.policies.adakv import Ada
from gatekv.policies.budgets import Above, Decay, Global, Rule, Threshold, Uniform
from gatekv.policies.controls import Random, SinksRecent, ValueNorm
from gatekv.policies.d2o import D2O
from gatekv.policies.elastic import ElasticCache
from gatekv.policies.equal import Equal
from gatekv.policies.fastgen import FastGen
from gatekv.policies.full import Full
from gatekv.policies.gate import Gate, GateAlone
from gatekv.policies.h2o import H2O
from gatekv.policies.keydiff import KeyDiff
from gatekv.policies.l2 import L2Norm
from gatekv.policies.layers import Even, Layers
from gatekv.policies.less import Less
from gatekv.policies.merging import MergeNear, MergeSimilar
from gatekv.policies.nacl import NACL
from gatekv.policies.parts import RemainderPolicy, Width
from gatekv.policies.policy import Policy
from gatekv.policies.pyramidkv import Pyramid
from gatekv.policies.qaq import Bits
from gatekv.policies.rate import Rate
from gatekv.policies.scorer import Scorer
from gatekv.policies.snapkv import SnapKV
from gatekv.policies.streaming_llm import StreamingLLM
from gatekv.policies.think import Channels
from gatekv.policies.tova import TOVA
from gatekv.policies.variance import Variance

SCORERS: dict[str, type[Scorer]] = {
    "full": Full,
    "random": Random,
    "sinks_recent": SinksRecent,
    "value_norm": ValueNorm,
    "l2": L2Norm,
    "keydiff": KeyDiff,
    "snapkv": SnapKV,
    "tova": TOVA,
    "h2o": H2O,
    "streaming_llm": StreamingLLM,
    "nacl": NACL,
    "fastgen": FastGen,
    "d2o": D2O,
    "elastic": ElasticCache,
    "gate": Gate,
    "gate_alone": GateAlone,
}
BUDGETS: dict[str, type[Rule]] = {
    "threshold": Threshold,
    "uniform": Uniform,
    "ada": Ada,
    "global": Global,
    "decay": Decay,
    "above": Above,
}
LAYERS: dict[str, type[Layers]] = {"even": Even, "pyramid": Pyramid, "variance": Variance}
WIDTHS: dict[str, type[Width]] = {"think": Channels, "qaq": Bits, "rate": Rate, "equal": Equal}
REMAINDERS: dict[str, type[RemainderPolicy]] = {"less": Less, "merge_similar": MergeSimilar, "merge_near": MergeNear}
PARTS: dict[str, dict] = {"rule": BUDGETS, "layers": LAYERS, "width": WIDTHS, "remainder": REMAINDERS}  # beside scorers
KINDS: dict[type, dict[str, Any]] = {
    Scorer: SCORERS,
    Rule: BUDGETS,
    Layers: LAYERS,
    Width: WIDTHS,
    RemainderPolicy: REMAINDERS,
}


def register_policy(name: str, kind: type) -> None:
    """Give a scorer, budget rule, way to share among layers, width or remainder of your own a name.

    From then on "name" or "snapkv+name" is a policy wherever one is asked for: `gatekv.KVCache`, recipes/evaluate.py,
    saved caches. Register it in every process that reads what another saved. docs/add-a-method.md shows how.

    Args:
        name: letters, digits and underscores, a digit not first; not in use.
        kind: a dataclass whose fields all have a default, derived from `Scorer`, or in `gatekv.policies` from
            `budgets.Rule`, `layers.Layers`, `parts.Width` or `parts.RemainderPolicy`.

    Raises:
        ValueError: the name is taken or no name, or the class is none of these.
    """
    known = next((table for base, table in KINDS.items() if isinstance(kind, type) and issubclass(kind, base)), None)
    if known is None:
        raise ValueError(
            f"register_policy({name!r}, …) takes a class derived from one of "
            f"{', '.join(base.__name__ for base in KINDS)}; got {kind!r}."
        )
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(
            f"a policy's name is made of letters, digits and underscores, a digit not first; got {name!r}."
        )
    if any(name in table and table[name] is not kind for table in KINDS.values()):
        raise ValueError(f"the policy name {name!r} is taken: choose another.")
    try:
        kind()
    except TypeError as error:
        raise ValueError(
            f"{kind.__name__} cannot be made from its name alone ({error}): give every field a default."
        ) from error
    known[name] = kind


def described(policy: Policy) -> dict[str, dict | None]:
    """{"scorer", "rule", …: {"name", "fields"} or None}: all but the budget, for `rebuilt`.

    Raises:
        ValueError: a part has no name.
    """
    out: dict[str, dict | None] = {}
    for field, known in {"scorer": SCORERS, **PARTS}.items():
        part = getattr(policy, field)
        name = next((n for n, kind in known.items() if kind is type(part)), None)
        if part is not None and name is None:
            raise ValueError(
                f"{type(part).__name__} has no name by which it could be found again: "
                f"gatekv.policies.register_policy('name', {type(part).__name__}) gives it one."
            )
        out[field] = None if part is None else {"name": name, "fields": asdict(part)}
    return out


def rebuilt(said: dict[str, dict | None]) -> Policy:
    """The policy that was `described`.

    Raises:
        ValueError: a name that is not registered here, or a class that takes no such fields.
    """
    parts: dict[str, Any] = {}
    for field, known in {"scorer": SCORERS, **PARTS}.items():
        if (part := said.get(field)) is None:
            continue
        name = part["name"]
        if name not in known:
            raise ValueError(
                f"the {field} {name!r} of a saved policy is not known here: import the module that registers it "
                "(gatekv.policies.register_policy) first."
            )
        try:
            parts[field] = known[name](**part["fields"])
        except TypeError as error:
            raise ValueError(
                f"the {field} {name!r} of a saved policy had other fields than {known[name].__name__} has: {error}."
            ) from error
    return Policy(**parts)
