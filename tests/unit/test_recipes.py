"""The recipes' own code: one-line errors, option parsing, medians that are interleaved."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import tiny
from peft import get_peft_model

import gatekv
from gatekv.hardware import choose
from gatekv.recipes import benchmark, common, evaluate, measure, measure_training
from gatekv.training.signals import Stopped


def boom(error):
    def main(argv):
        raise error

    return main


@pytest.mark.parametrize("error,match", [
    (ValueError("budget 2 is too much"), "error: budget 2"), (FloatingPointError("the loss is nan"), "error: the loss is nan"),
    (TypeError("unknown key 'x'"), "error: unknown key"), (OSError("disk full"), "error: disk full"),
])  # fmt: skip
def test_expected_errors_become_one_line_and_exit_code_1(error, match, capsys):
    with pytest.raises(SystemExit) as stop:
        common.run(boom(error))
    said = capsys.readouterr().err
    assert stop.value.code == 1 and match in said and said.count("\n") == 1


@pytest.mark.parametrize("error,code", [(Stopped("checkpoint-3 is saved"), 75), (KeyboardInterrupt(), 130)])
def test_stopping_is_neither_success_nor_error(error, code, capsys):
    with pytest.raises(SystemExit) as stop:
        common.run(boom(error))
    assert stop.value.code == code and str(error) in capsys.readouterr().err


@pytest.mark.parametrize("error,code", [
    ("Stopped('checkpoint-3 is saved')", 75),
    pytest.param("ValueError('no budget')", 1, marks=pytest.mark.exhaustive),  # leaves by the same line
])  # fmt: skip
def test_a_process_of_a_group_leaves_without_the_interpreters_shutdown(tmp_path, error, code):
    program = f"""
import atexit, sys
import torch
from gatekv.recipes.common import run
from gatekv.hardware import choose
from gatekv.training.signals import Stopped
atexit.register(print, "shut down")
torch.distributed.init_process_group("gloo", init_method="file://{tmp_path}/store", rank=0, world_size=1)
def main(argv):
    print("half a line", end="")
    raise {error}
run(main)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == code and done.stdout == "half a line" and eval(error).args[0] in done.stderr


def test_bugs_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        common.run(boom(ZeroDivisionError()))


def test_a_missing_model_is_named(unreachable):
    with pytest.raises(ValueError, match="model 'nowhere/at-all' cannot be loaded"):
        common.load_model("nowhere/at-all", choose("cpu", "float32"))


def test_evaluate_checks_its_arguments_before_loading_anything(monkeypatch):
    monkeypatch.setattr(common, "load_model", lambda *a: pytest.fail("loaded a model for bad arguments"))
    for argv, match in (
        (["--policies", "snapvk"], "Did you mean 'snapkv'"),
        (["--budgets", "1.5"], "above 0 and at most 1"),
        (["--tasks", "pppl"], "Did you mean 'ppl'"),
        (["--mode", "blind"], "Known: agnostic, aware"),
        (["--n", "0"], "at least 1"),
        (["--seeds", "0,x"], "--seeds: invalid list of int, with commas value"),
        (["--decode", "drop"], "Known: keep, evict"),
        (["--tasks", "classification", "--choices", "none.jsonl"], "is not a file"),
    ):
        with pytest.raises(ValueError, match=match):
            evaluate.main(argv)


def test_provenance_says_what_ran():
    run = evaluate.provenance(["--n", "3"], choose("cpu", "float32"))
    assert run["command"].endswith("evaluate.py --n 3") and {"gatekv", "torch", "transformers", "peft"} <= set(
        run["versions"]
    )


def test_a_remainder_brings_its_control():
    options = evaluate.EvaluateOptions(policies=["snapkv+ada+less", "h2o", "h2o+less"], budgets=[".5", "64"])
    assert evaluate.check(options) == (["snapkv+ada+less", "h2o", "h2o+less", "snapkv+ada"], [0.5, 64])


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


def test_growth_of_memory_is_a_line_or_says_that_it_is_none():
    contexts = [1024, 2048, 4096, 8192]
    line = measure_training.growth(contexts, [100 + 0.5 * t for t in contexts])
    assert (line["mb"], line["mb_per_1k"], line["worst_residual"]) == (100.0, 512.0, 0.0) and line["exponent"] < 1
    square = measure_training.growth(contexts, [t * t / 1e4 for t in contexts])
    assert square["exponent"] == 2.0 and square["worst_residual"] > 0.5
    with pytest.raises(ValueError, match="at least two contexts"):
        measure_training.growth([1024, 1024], [1.0, 2.0])
    rows = [{"context": t, "objective": o, "peak_mb": t * n} for t in contexts for o, n in (("lm", 1), ("kl", 2))]
    fits = measure_training.memory(rows)
    assert fits["kl"]["mb_per_1k"] == 2 * fits["lm"]["mb_per_1k"] and measure_training.memory(rows[:2]) == {}


@pytest.mark.parametrize("extra", [[], ["--gradient_checkpointing"]])
def test_benchmark_of_training_measures_time_and_memory_of_every_objective(monkeypatch, capsys, extra):
    monkeypatch.setattr(measure, "small_llama", lambda dtype: tiny(dtype=dtype))
    benchmark.main(["train", "--model", "small", "--contexts", "48,96", "--repeats", "1", "--device", "cpu", *extra])
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    names = ["plain", *measure_training.OBJECTIVES]
    assert [(r["context"], r["objective"]) for r in last["rows"]] == [(t, n) for t in (48, 96) for n in names]
    assert all(r["time_vs_full"] > 0 and r["peak_mb"] >= 0 for r in last["rows"])
    assert last["rows"][0]["time_vs_full"] == 1


@pytest.mark.parametrize("what", ["decode", "cache"])
def test_benchmarks_of_the_cache_end_in_json(monkeypatch, capsys, what):
    monkeypatch.setattr(measure, "small_llama", lambda dtype: tiny(dtype=torch.float32))
    options = ["--model", "small", "--contexts", "256", "--batches", "1", "--keeps", "1,.5", "--repeats", "1"]
    benchmark.main([what, *options])
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert {"context", "batch", "keep", "bytes_ratio", "time_vs_full", "time_vs_limit"} <= set(rows[0])
    assert all(row["context"] == 256 and 0 < row["bytes_ratio"] < 1.5 for row in rows)


def test_training_steps_leave_the_base_alone_and_move_the_gates():
    peft = get_peft_model(tiny(), gatekv.GateKVConfig()).train()
    trained = {n: p for n, p in peft.named_parameters() if p.requires_grad}
    for name, step in measure_training.training_steps(peft, 60).items():
        peft.zero_grad()
        step()
        moved = [p.grad is not None and bool(p.grad.any()) for p in trained.values()]
        assert not any(moved) if name == "plain" else any(moved), name
        assert all(p.grad is None for n, p in peft.named_parameters() if n not in trained)
