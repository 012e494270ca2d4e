"""Bootstrap intervals that resample contexts, because questions about one context are not independent."""

import numpy as np


def _means(groups: list[list[float]], draws: int, seed: int) -> np.ndarray:
    """[draws] means over resampled groups."""
    rng = np.random.default_rng(seed)
    sums, sizes = np.array([sum(g) for g in groups]), np.array([len(g) for g in groups])
    picks = rng.integers(0, len(groups), (draws, len(groups)))
    return sums[picks].sum(1) / sizes[picks].sum(1)


def mean(groups: list[list[float]]) -> float:
    """Mean over all values of all groups."""
    return sum(map(sum, groups)) / sum(map(len, groups))


def interval(groups: list[list[float]], draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean over all values, resampling groups."""
    low, high = np.quantile(_means(groups, draws, seed), (0.025, 0.975))
    return float(low), float(high)


def paired_interval(a: list[list[float]], b: list[list[float]]) -> tuple[float, float, float]:
    """(mean, low, high) of a - b on the same contexts and questions."""
    groups = [[x - y for x, y in zip(ga, gb)] for ga, gb in zip(a, b)]
    return mean(groups), *interval(groups)
