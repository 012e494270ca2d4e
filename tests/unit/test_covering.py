"""`make test` runs a choice of each large matrix, and only a choice: what it leaves out is what it says it leaves out."""

from itertools import combinations, product

import pytest
from conftest import axes
from covering import covering


def matrix(*sizes: int) -> list[dict[str, int]]:
    return [dict(zip("abcdef", numbers)) for numbers in product(*map(range, sizes))]


@pytest.mark.parametrize("sizes", [(4, 3, 5), (2, 2, 2), (2, 4, 3, 4), (5, 4, 3, 3, 2)], ids=str)
def test_every_pair_of_values_occurs_in_a_small_part_of_the_product(sizes):
    cases = matrix(*sizes)
    chosen = [cases[i] for i in covering(cases)]
    for a, b in combinations("abcdef"[: len(sizes)], 2):
        assert {(c[a], c[b]) for c in chosen} == {(c[a], c[b]) for c in cases}
    largest = sorted(sizes)[-2] * sorted(sizes)[-1]
    assert largest <= len(chosen) <= 1.5 * largest and chosen == [cases[i] for i in covering(cases)]


def test_two_axes_are_run_whole_unless_one_value_at_a_time_is_enough():
    cases = matrix(6, 2)
    assert covering(cases) == list(range(12))
    chosen = [cases[i] for i in covering(cases, 1)]
    assert [c["a"] for c in chosen] == list(range(6))
    assert [c["b"] for c in chosen].count(0) == 3, "the values of the shorter axis take turns"


def test_combinations_that_do_not_exist_are_not_missed():
    rest = [case for case in matrix(3, 3, 3) if case != {"a": 0, "b": 0, "c": 0}]
    pairs = {(c["a"], c["b"]) for c in rest}
    assert {(rest[i]["a"], rest[i]["b"]) for i in covering(rest)} == pairs


@pytest.mark.parametrize("name,number", [("one", 1), ("two", 2), ("one", 3)])
@pytest.mark.parametrize("third", [[1], [2], [3]])
def test_names_of_one_parametrize_are_one_axis_and_a_fixture_is_another(request, family, name, number, third):
    found = axes(request.node)
    assert found == {"name,number": repr([name, number]), "third": repr([third]), "family": repr(family)}
    cases = [item for item in request.session.items if item.originalname == request.node.originalname]
    left = [item for item in cases if item.get_closest_marker("exhaustive")]
    assert len(cases) < 18 or 9 <= 18 - len(left) <= 12
