"""Schedules: how the keep-rate target falls, and how the learning rate rises and falls."""

import random


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
