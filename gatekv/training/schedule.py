"""Schedules: how the keep-rate target falls, and how the learning rate rises and falls."""

import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gatekv.training.config import CPTConfig
    from gatekv.training.less_config import LessConfig
    from gatekv.training.sft_config import SFTConfig

    AnyConfig = CPTConfig | LessConfig | SFTConfig

WARM_UP = 0.07  # of the steps
FINAL_RATE = 0.1  # of the learning rate


def target_keep(step: int, steps: int, final: float, share: float) -> float:
    """From 1 to `final` in a straight line over the first `share` of the run, then constant: no overshoot to undo."""
    ramp = max(1, round(steps * share))
    return final + (1 - final) * max(0.0, 1 - (step + 1) / ramp)


def learning_rate_factor(step: int, steps: int, warmup: float, final: float) -> float:
    """Linear warm-up over a share of the steps, then linear decay to `final` of the peak at the last one."""
    warmup = max(1, round(warmup * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 1 - (1 - final) * (step - warmup + 1) / max(1, steps - warmup)


def sampled_keep(step: int, seed: int, middle: float, spread: float) -> float:
    """A keep rate from middle / spread to middle · spread, at most 1, log-uniform; a pure function of (seed, step)."""
    share = random.Random(f"keep/{seed}/{step}").random()
    return min(1.0, middle * spread ** (2 * share - 1))


def learning_rate_at(step: int, config: "AnyConfig") -> float:
    """The learning rate of a step. config: `gatekv.training.options.RunConfig` of a recipe."""
    return config.learning_rate * learning_rate_factor(step, config.max_steps, WARM_UP, FINAL_RATE)


def target_at(step: int, config: "AnyConfig") -> float:
    """The keep rate that a step aims at: falling first, then, with sparsity="budget", drawn around the target."""
    target = target_keep(step, config.max_steps, config.target_keep, config.target_share)
    if config.sparsity == "budget" and target <= config.target_keep:
        return sampled_keep(step, config.seed, config.target_keep, config.budget_spread)
    return target
