"""Policies: a scorer (which tokens matter?) and a budget rule (how much room has each head?)."""

from dataclasses import dataclass

from gatekv.config import check_choice
from gatekv.policies.budgets import BUDGETS, Ada, Global, Threshold, Uniform
from gatekv.policies.controls import Random, SinksRecent, ValueNorm
from gatekv.policies.full import Full
from gatekv.policies.gate import Gate
from gatekv.policies.l2 import L2Norm
from gatekv.policies.snapkv import SnapKV
from gatekv.policies.view import View

SCORERS = {
    "full": Full,
    "random": Random,
    "sinks_recent": SinksRecent,
    "value_norm": ValueNorm,
    "l2": L2Norm,
    "snapkv": SnapKV,
    "gate": Gate,
}

__all__ = ["Ada", "BUDGETS", "Full", "Gate", "Global", "L2Norm", "Policy", "Random", "SCORERS", "SinksRecent", "SnapKV"]
__all__ += ["Threshold", "Uniform", "ValueNorm", "View", "resolve"]


@dataclass
class Policy:
    """A scorer, a budget rule and the ratio to hold (None: the threshold decides, or everything is kept)."""

    scorer: object
    rule: object
    ratio: float | None


def resolve(policy, budget: float | None) -> Policy:
    """Turn "snapkv+ada", `SnapKV(window=16)` or a `Policy` into a Policy with its budget checked.

    Raises:
        ValueError: unknown name (with the nearest one), a budget outside (0, 1], or none where one is needed.
    """
    rule = None
    if isinstance(policy, Policy):
        policy, rule = policy.scorer, policy.rule
    elif isinstance(policy, str):
        name, *rules = policy.split("+")
        check_choice("policy", name, SCORERS)
        if len(rules) > 1:
            raise ValueError(f"policy {policy!r} names two budget rules; give one of {', '.join(BUDGETS)}.")
        for r in rules:
            check_choice("budget rule", r, BUDGETS)
            rule = BUDGETS[r]()
        policy = SCORERS[name]()
    elif not callable(getattr(policy, "score", None)):
        raise ValueError(f"policy must be a name, a scorer object or a Policy, not {policy!r}.")
    learned = isinstance(policy, Gate)
    rule = rule or (Threshold() if learned else Uniform())
    if isinstance(policy, Full):
        budget = 1.0
    if isinstance(rule, Threshold) and not learned:
        raise ValueError(f"{type(policy).__name__} has no threshold; use one of uniform, ada, global.")
    if budget is None and not isinstance(rule, Threshold):
        raise ValueError(f"policy {type(policy).__name__} under {type(rule).__name__} needs budget=, e.g. budget=0.25.")
    if budget is not None and not 0 < budget <= 1:
        raise ValueError(f"budget is the share of the prompt that is kept, above 0 and at most 1; got {budget}.")
    return Policy(policy, rule, budget)
