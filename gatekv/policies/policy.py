"""A policy: one answer to each question, by name or by object."""

from dataclasses import dataclass, replace

from gatekv.config import check_choice
from gatekv.policies.adakv import Ada
from gatekv.policies.amount import Amount, checked_budget
from gatekv.policies.budgets import Above, Decay, Global, Rule, Threshold, Uniform
from gatekv.policies.controls import Random, SinksRecent, ValueNorm
from gatekv.policies.d2o import D2O
from gatekv.policies.elastic import ElasticCache
from gatekv.policies.fastgen import FastGen
from gatekv.policies.full import Full
from gatekv.policies.gate import Gate, GateAlone
from gatekv.policies.h2o import H2O
from gatekv.policies.keydiff import KeyDiff
from gatekv.policies.l2 import L2Norm
from gatekv.policies.layers import Even
from gatekv.policies.less import Less
from gatekv.policies.merging import MergeNear, MergeSimilar
from gatekv.policies.nacl import NACL
from gatekv.policies.pyramidkv import Pyramid
from gatekv.policies.qaq import Bits
from gatekv.policies.scorer import Scorer
from gatekv.policies.snapkv import SnapKV
from gatekv.policies.streaming_llm import StreamingLLM
from gatekv.policies.think import Channels
from gatekv.policies.tova import TOVA
from gatekv.policies.variance import Variance
from gatekv.support import LATER

SCORERS = {
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
BUDGETS = {"threshold": Threshold, "uniform": Uniform, "ada": Ada, "global": Global, "decay": Decay, "above": Above}
LAYERS = {"even": Even, "pyramid": Pyramid, "variance": Variance}
WIDTHS = {"think": Channels, "qaq": Bits}
REMAINDERS = {"less": Less, "merge_similar": MergeSimilar, "merge_near": MergeNear}
PARTS: dict[str, dict] = {"rule": BUDGETS, "layers": LAYERS, "width": WIDTHS, "remainder": REMAINDERS}  # beside scorers


@dataclass
class Policy:
    """One answer to each question.

    Attributes:
        scorer: which tokens matter. rule: how heads share a layer's room. budget: what to hold, a share of the prompt
        (float) or tokens of it (int); None: the threshold decides, or all is kept. layers: how layers share the model's
        room. remainder: what becomes of evicted tokens. These are None until `resolve` fills in what the scorer's paper
        has, or threshold for a gate and uniform for others, even layers, nothing. width: how old tokens are stored
        (None: whole).
    """

    scorer: Scorer
    rule: Rule = LATER
    budget: Amount | None = None
    layers: Even | Pyramid | Variance = LATER
    width: Channels | Bits | None = None
    remainder: Less | MergeSimilar | MergeNear | None = None

    @property
    def queries(self) -> int:
        """How many of the prompt's last queries a decision at its end looks at."""
        return max(self.scorer.queries, self.width.window if self.width else 0)

    @property
    def scope(self) -> str:
        """Who must have seen the prompt before anything can be decided: a "token", a "layer", the whole "model"."""
        return "model" if self.layers.scope == "model" else self.rule.scope

    def __str__(self) -> str:
        layers = None if isinstance(self.layers, Even) else self.layers
        return " x ".join(
            type(p).__name__ for p in (self.scorer, self.rule, layers, self.width, self.remainder) if p is not None
        )


def _parse(name: str) -> Policy:
    """ "scorer+part+part" -> Policy; a part is a budget rule, a way to share among layers, a width or a remainder."""
    first, *parts = name.split("+")
    if first in WIDTHS:  # a width alone: every token stays
        first, parts = "full", [first, *parts]
    check_choice("policy", first, {**SCORERS, **WIDTHS})
    found: dict = {}
    for part in parts:
        check_choice("policy part", part, {name: 0 for known in PARTS.values() for name in known})
        field, kind = next((field, known) for field, known in PARTS.items() if part in known)
        if field in found:
            raise ValueError(f"policy {name!r} names two of {', '.join(kind)}: give one.")
        found[field] = kind[part]()
    return Policy(SCORERS[first](), **found)


def resolve(policy: Policy | Scorer | str, budget: Amount | None) -> Policy:
    """Turn "snapkv+ada+pyramid", `SnapKV(window=16)` or a `Policy` into a Policy with its budget checked.

    Raises:
        ValueError: unknown name (with the nearest one), no budget (see `checked_budget`), or none where one is needed.
    """
    budget = checked_budget(budget)
    if isinstance(policy, str):
        policy = _parse(policy)
    if isinstance(policy, Scorer):
        policy = Policy(policy)
    if not isinstance(policy, Policy):
        raise ValueError(
            f"policy must be a name, a Policy, or an object of a class derived from Scorer, not {policy!r}."
        )
    scorer, learned = policy.scorer, isinstance(policy.scorer, Gate)
    usual: dict[str, type] = {"rule": Threshold if learned else Uniform, "layers": Even, **scorer.partners}
    if budget is None and scorer.absolute:
        usual["rule"] = Above
    missing = {part: kind() for part, kind in usual.items() if getattr(policy, part) is None}
    policy = replace(policy, **missing)
    rule = policy.rule
    if isinstance(scorer, Full):
        budget = 1.0
    if isinstance(rule, Threshold) and not learned:
        raise ValueError(f"{type(scorer).__name__} has no threshold; use one of uniform, ada, global.")
    if not isinstance(policy.layers, Even) and (rule.scope != "layer" or isinstance(rule, Above)):
        name = next(name for name, kind in LAYERS.items() if isinstance(policy.layers, kind))
        raise ValueError(
            f"{name} gives each layer a number of tokens, and {type(rule).__name__} does not ask for it: use one of "
            f"uniform, ada with it, or even instead of {name}."
        )
    if isinstance(rule, Above) and not scorer.absolute:
        raise ValueError(
            f"above needs scores that are above 0 where they are worth it, as fastgen's; {type(scorer).__name__}'s are "
            "not: use one of uniform, ada, global."
        )
    if isinstance(rule, Above) and budget is not None:
        raise ValueError("above keeps what scores above 0, however many that are: leave budget= out, or above.")
    if budget is None and not isinstance(rule, (Threshold, Above)):
        raise ValueError(f"policy {type(scorer).__name__} under {type(rule).__name__} needs budget=, e.g. budget=0.25.")
    return replace(policy, budget=budget)
