"""A small choice of a parametrised test's cases in which all pairs of values occur, where the whole is a product.

A test of three axes of 4, 3 and 5 values has 60 cases; 20 of them hold every pair of values. `make test` runs those,
`make test-all` all of them.
"""

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from itertools import combinations


def covering(cases: Sequence[Mapping[str, Hashable]], strength: int = 2) -> list[int]:
    """Places of cases that together hold every combination of `strength` values which any case holds.

    Greedy and deterministic: always the case that adds most; of equals the one whose values were chosen least often,
    then the first. With no more axes than `strength`: all places.

    Args:
        cases: the value that each case has on each axis, by the axis's name.
        strength: 1 = every value occurs, 2 = every pair of two axes' values.
    """
    if len(cases[0]) <= strength:
        return list(range(len(cases)))
    rows = [list(case.items()) for case in cases]
    missing = [set(combinations(row, strength)) for row in rows]
    chosen, used = [], Counter()
    while any(missing):
        best = max(range(len(rows)), key=lambda i: (len(missing[i]), -sum(used[value] for value in rows[i])))
        chosen.append(best)
        used.update(rows[best])
        found = set(missing[best])
        for left in missing:
            left -= found
    return sorted(chosen)
