"""The demo: sized by what a step takes, an honest time left, a picture of three curves."""

import pytest

from gatekv.recipes import demo
from gatekv.report.curves import curves
from gatekv.training import eta


@pytest.mark.parametrize("seconds,warm,student,found", [
    (600, 1.0, 3.0, (140, 640)),  # all of the default recipe fits
    (300, 1.0, 4.0, (120, 640)),  # fewer steps
    (300, 6.0, 14.0, (50, 384)),  # shorter rows
    (10, 60.0, 180.0, (50, 384)),  # never less than what teaches something
])  # fmt: skip
def test_the_run_is_sized_by_the_time_of_a_step(seconds, warm, student, found):
    assert demo.sized(seconds, warm, student) == found


def test_minutes_are_checked_before_anything_is_loaded():
    with pytest.raises(ValueError, match="minutes is the time the demo may take, above 0; got 0"):
        demo.main(["--minutes", "0"])


def test_the_time_left_knows_that_later_steps_take_longer(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(eta.time, "monotonic", lambda: now[0])
    left = eta.Remaining(steps=10, warm=4)
    assert str(left) == "?"

    def step(seconds):
        now[0] += seconds
        left.step()

    step(50.0)  # the first makes what later ones find
    assert left.seconds() is None
    step(2.0)
    assert left.seconds() == 2 * 2 + 6 * 6, "a step with a student was not timed yet"
    step(2.0)
    step(2.0)
    step(9.0)
    step(10.0)
    assert left.seconds() == 4 * 10 and str(left) == "0:40"


def test_the_picture_has_a_curve_for_each_policy(tmp_path):
    rows = [{"policy": p, "budget": b, "score": s * b, "task": "niah"} for p, s in (("gate+global", 1.0), ("l2", 0.2))
            for b in (0.5, 0.25)]  # fmt: skip
    rows += [{"policy": "full", "budget": 1.0, "score": 0.9, "task": "niah"}]
    rows += [{"policy": "l2", "budget": 0.125, "score": None, "task": "niah"}]
    names = {"gate+global": ("trained gate", "blue"), "l2": ("without training", "red")}
    curves(rows, names, tmp_path / "curves.png", "Title")
    assert (tmp_path / "curves.png").stat().st_size > 10_000
