"""The recipes' own code: one-line errors, option parsing, medians that are interleaved."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "recipes"), str(ROOT)]

import benchmark
import common
import evaluate

from gatekv.training.signals import Stopped


def boom(error):
    def main(argv):
        raise error

    return main


@pytest.mark.parametrize("error,match", [
    (ValueError("budget 2 is too much"), "error: budget 2"), (FloatingPointError("the loss is nan"), "error: the loss is nan"),
    (TypeError("unknown key 'x'"), "error: unknown key"), (OSError("disk full"), "error: disk full"),
])  # fmt: skip
def test_expected_errors_become_one_line_and_exit_code_1(error, match):
    with pytest.raises(SystemExit) as stop:
        common.run(boom(error))
    assert match in str(stop.value.code) and "\n" not in str(stop.value.code)


@pytest.mark.parametrize("error,code", [(Stopped("checkpoint-3 is saved"), 75), (KeyboardInterrupt(), 130)])
def test_stopping_is_neither_success_nor_error(error, code, capsys):
    with pytest.raises(SystemExit) as stop:
        common.run(boom(error))
    assert stop.value.code == code and str(error) in capsys.readouterr().err


def test_bugs_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        common.run(boom(ZeroDivisionError()))


def test_a_missing_model_is_named():
    with pytest.raises(ValueError, match="model 'nowhere/at-all' cannot be loaded"):
        common.load_model("./nowhere/at-all".removeprefix("./"), "float32")


def test_evaluate_checks_its_arguments_before_loading_anything(monkeypatch):
    monkeypatch.setattr(evaluate, "load_model", lambda *a: pytest.fail("loaded a model for bad arguments"))
    for argv, match in (
        (["--policies", "snapvk"], "Did you mean 'snapkv'"),
        (["--budgets", "1.5"], "above 0 and at most 1"),
        (["--tasks", "pppl"], "Did you mean 'ppl'"),
        (["--mode", "blind"], "Known: agnostic, aware"),
        (["--n", "0"], "at least 1"),
        (["--seeds", "0,x"], "whole numbers with commas"),
        (["--decode", "drop"], "Known: keep, evict"),
        (["--tasks", "classification", "--choices", "none.jsonl"], "is not a file"),
    ):
        with pytest.raises(ValueError, match=match):
            evaluate.main(argv)


def test_provenance_says_what_ran():
    run = evaluate.provenance(["--n", "3"])
    assert run["command"].endswith("evaluate.py --n 3") and {"gatekv", "torch", "transformers", "peft"} <= set(
        run["versions"]
    )


def test_table_prints_refusals(capsys):
    row = {"task": "ppl", "mode": "agnostic", "policy": "l2", "budget": 0.1, "score": None, "refused": "below the 36"}
    whole = row | {"refused": "budget 0.1 is unreachable: 2 of 8 layers are left whole; skip fewer layers."}
    evaluate.print_table([row, whole], [])
    _, refused, unreachable = capsys.readouterr().out.splitlines()
    assert refused.endswith("refused: below the 36") and unreachable.endswith(" unreachable")


def test_timings_are_interleaved_medians_without_the_warm_up():
    order = []
    work = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    times = benchmark.interleaved(work, repeats=3, device="cpu")
    assert order == ["a", "b"] * 4 and set(times) == {"a", "b"} and all(t >= 0 for t in times.values())
