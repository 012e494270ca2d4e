"""Policies: a scorer (which tokens matter?), a budget (how much room has each head, each layer?), a width (of keys), a
remainder (what becomes of the rest?)."""

from dataclasses import replace
from typing import Any

from gatekv.policies.adakv import Ada
from gatekv.policies.controls import Random, SinksRecent, ValueNorm
from gatekv.policies.d2o import D2O
from gatekv.policies.elastic import ElasticCache
from gatekv.policies.fastgen import FastGen
from gatekv.policies.full import Full
from gatekv.policies.gate import Gate
from gatekv.policies.h2o import H2O
from gatekv.policies.keydiff import KeyDiff
from gatekv.policies.l2 import L2Norm
from gatekv.policies.nacl import NACL
from gatekv.policies.policy import Policy
from gatekv.policies.pyramidkv import Pyramid
from gatekv.policies.qaq import Bits
from gatekv.policies.registry import BUDGETS, LAYERS, PARTS, REMAINDERS, SCORERS, WIDTHS, register_policy
from gatekv.policies.resolve import resolve
from gatekv.policies.scorer import Scorer, View
from gatekv.policies.snapkv import SnapKV
from gatekv.policies.streaming_llm import StreamingLLM
from gatekv.policies.think import Channels
from gatekv.policies.tova import TOVA

__all__ = ["AdaKV", "BUDGETS", "D2O", "ElasticCache", "FastGen", "Full", "Gate", "H2O", "KeyDiff", "L2Norm", "LAYERS"]
__all__ += ["NACL", "PARTS", "Policy", "PyramidKV", "QAQ", "REMAINDERS", "Random", "SCORERS", "Scorer", "SinksRecent"]
__all__ += ["SnapKV", "StreamingLLM", "TOVA", "ThinK", "ValueNorm", "View", "WIDTHS", "register_policy", "resolve"]


def _over(policy: Policy | Scorer | None, default: Scorer, **parts: Any) -> Policy:
    """The policy, or scorer, or default, with some parts replaced."""
    policy = default if policy is None else policy
    return replace(policy if isinstance(policy, Policy) else Policy(policy), **parts)


def AdaKV(policy: Policy | Scorer | None = None, *, alpha: float = 0.2, floor: str = "soft") -> Policy:
    """Ada-KV (arXiv 2407.11550) over a scorer or policy (None: SnapKV); see `gatekv.policies.adakv.Ada`."""
    return _over(policy, SnapKV(), rule=Ada(alpha, floor))


def PyramidKV(policy: Policy | Scorer | None = None, *, beta: int = 20, variant: str = "paper") -> Policy:
    """PyramidKV (arXiv 2406.02069) over a scorer or policy (None: SnapKV); see `gatekv.policies.pyramidkv.Pyramid`."""
    return _over(policy, SnapKV(), layers=Pyramid(beta, variant))


def ThinK(policy: Policy | Scorer | None = None, *, prune: float = 0.4, window: int = 32) -> Policy:
    """ThinK (arXiv 2407.21018) over a scorer or policy (None: no token goes); see `gatekv.policies.think.Channels`."""
    return _over(policy, Full(), width=Channels(prune, window))


def QAQ(
    policy: Policy | Scorer | None = None,
    *,
    bits: float = 3.0,
    outliers: float = 0.01,
    window: int = 32,
    floor: float = 8.0,
) -> Policy:
    """QAQ (arXiv 2403.04643) over a scorer or policy (None: no token goes); see `gatekv.policies.qaq.Bits`."""
    return _over(policy, Full(), width=Bits(bits, outliers, window, floor))
