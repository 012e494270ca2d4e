"""From what a user writes to a policy whose every question has an answer."""

from dataclasses import replace

from gatekv.config import check_choice
from gatekv.policies.amount import Amount, checked_budget
from gatekv.policies.budgets import Above, Global, Threshold, Uniform
from gatekv.policies.layers import Even
from gatekv.policies.policy import Policy
from gatekv.policies.registry import LAYERS, PARTS, SCORERS, WIDTHS
from gatekv.policies.scorer import Scorer


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
    scorer, learned = policy.scorer, policy.scorer.gate
    usual: dict[str, type] = {"rule": Threshold if learned else Uniform, "layers": Even, **scorer.partners}
    allots = policy.width is not None and policy.width.allots
    if allots and (learned or scorer.utility) and "rule" not in scorer.partners:
        usual["rule"] = Global
    if budget is None and scorer.absolute:
        usual["rule"] = Above
    missing = {part: kind() for part, kind in usual.items() if getattr(policy, part) is None}
    policy = replace(policy, **missing)
    rule = policy.rule
    if not scorer.evicts and not allots:
        budget = 1.0
    if rule.scope == "token" and not learned:
        raise ValueError(f"{type(scorer).__name__} has no threshold; use one of uniform, ada, global.")
    if not policy.layers.even and (rule.scope != "layer" or rule.absolute):
        name = next(name for name, kind in LAYERS.items() if isinstance(policy.layers, kind))
        raise ValueError(
            f"{name} gives each layer a number of tokens, and {type(rule).__name__} does not ask for it: use one of "
            f"uniform, ada with it, or even instead of {name}."
        )
    if allots and (rule.scope == "token" or rule.fades or rule.absolute):
        raise ValueError(
            f"rate and equal share out the bytes of a whole prompt, and {type(rule).__name__.lower()} shares out none: "
            "use global, ada or uniform."
        )
    if policy.width is not None and policy.width.utility and scorer.utility is None:
        raise ValueError(
            f"rate wants a utility: attention, or a gate's score. {type(scorer).__name__}'s scores only rank: use rate "
            "with gate, h2o, snapkv, tova or full."
        )
    if rule.absolute and not scorer.absolute:
        raise ValueError(
            f"above needs scores that are above 0 where they are worth it, as fastgen's; {type(scorer).__name__}'s are "
            "not: use one of uniform, ada, global."
        )
    if rule.absolute and budget is not None:
        raise ValueError("above keeps what scores above 0, however many that are: leave budget= out, or above.")
    if budget is None and rule.scope != "token" and not rule.absolute:
        raise ValueError(f"policy {type(scorer).__name__} under {type(rule).__name__} needs budget=, e.g. budget=0.25.")
    return replace(policy, budget=budget)
