"""Adapters side by side: paired on shared samples, and nothing compared that was not measured alike."""

import json
from pathlib import Path

import pytest

from gatekv.evaluation.arms import read_arms, table
from gatekv.recipes import compare

PINNED = {"model": {"name": "m"}, "adapter": None, "dtype": "bfloat16", "sinks": 4, "choices": "abc"}


def line(index: int, score: float, policy: str = "full", budget: float = 1.0, **other) -> dict:
    found = {"task": "classification", "mode": "aware", "seed": 0, "index": index, "policy": policy, "budget": budget}
    return (
        found
        | {"scores": [score], "kls": [], "ratio": budget, "ratio_end": budget, "place": None, "refused": None}
        | other
    )


def folder(path: Path, lines: list[dict], **pinned) -> str:
    path.mkdir(parents=True)
    header = {"pinned": PINNED | pinned}
    (path / "records.jsonl").write_text("".join(json.dumps(x) + "\n" for x in (header, *lines)))
    return str(path)


def scores(values, policy="full", budget=1.0) -> list[dict]:
    return [line(i, v, policy, budget) for i, v in enumerate(values)]


def test_rows_are_paired_with_the_baseline_over_runs_and_samples():
    arms = {
        "lora": [scores([1, 0, 1, 0]) + scores([0, 0, 1, 0], "l2", 0.25), scores([1, 1, 1, 0]) + scores([0, 0, 0, 0], "l2", 0.25)],
        "both": [scores([1, 1, 1, 1], "gate", 0.25), scores([1, 1, 1, 0], "gate", 0.25)],
    }  # fmt: skip
    rows = {(r["arm"], r["policy"]): r for r in table(arms, ("lora", "full"))}
    assert rows["lora", "full"]["score"] == 5 / 8 and rows["lora", "full"]["difference"] == 0
    assert rows["both", "gate"]["by_run"] == [1.0, 0.75] and rows["both", "gate"]["difference"] == 2 / 8
    assert rows["lora", "l2"]["difference"] == -4 / 8 and rows["lora", "l2"]["difference_high"] < 0
    assert rows["both", "gate"]["bytes_ratio"] == 0.25 and rows["both", "gate"]["contexts"] == 4


def test_only_samples_that_every_row_has_count():
    arms = {"a": [scores([1, 0, 1])], "b": [[line(1, 1), line(2, 1)]]}
    for row in table(arms, ("a", "full")):
        assert row["contexts"] == 2
    assert [r["score"] for r in table(arms, ("a", "full"))] == [0.5, 1.0]


def test_a_policy_that_refused_a_sample_has_no_score_and_takes_none_from_others():
    short = [line(0, 0, "l2", 0.25, refused="too short"), line(1, 1, "l2", 0.25)]
    full, l2 = table({"a": [scores([1, 0]) + short]}, ("a", "full"))
    assert full["contexts"] == 2 and full["score"] == 0.5 and full["refused"] is None
    assert l2 == {"arm": "a", "policy": "l2", "budget": 0.25, "refused": "too short"}
    assert "| a | `l2` | 25 % | – | refused | | |" in compare.markdown([full, l2])


@pytest.mark.parametrize("arms,match", [
    ({"a": [scores([1])], "b": [scores([1]), scores([1])]}, "different numbers of runs \\(a 1, b 2\\)"),
    ({"a": [scores([1])], "b": [[line(0, 1, task="ppl")]]}, "several tasks or modes"),
    ({"b": [scores([1])]}, "no baseline a:full; there are b:full"),
    ({"a": [scores([1])], "b": [[line(7, 1)]]}, "no sample was scored by all"),
])  # fmt: skip
def test_what_cannot_be_compared_is_refused(arms, match):
    with pytest.raises(ValueError, match=match):
        table(arms, ("a", "full"))


def test_folders_must_agree_in_all_but_the_adapter(tmp_path):
    one = folder(tmp_path / "one", scores([1]))
    assert len(read_arms({"a": [one], "b": [folder(tmp_path / "two", scores([0]), adapter={"lora": "1"})]})["b"]) == 1
    with pytest.raises(ValueError, match="three was measured with other settings than the first folder \\(sinks\\)"):
        read_arms({"a": [one], "b": [folder(tmp_path / "three", scores([0]), sinks=8)]})
    with pytest.raises(ValueError, match="records.jsonl is no file"):
        read_arms({"a": [str(tmp_path / "nowhere")]})


def test_the_recipe_writes_table_and_rows(tmp_path, capsys):
    a, b = folder(tmp_path / "a", scores([1, 0])), folder(tmp_path / "b", scores([1, 1], "gate", 0.5))
    compare.main([f"lora={a}", f"both={b}", "--baseline", "lora:full", "--out", str(tmp_path / "out")])
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["rows"] == 2 and len(json.loads((tmp_path / "out" / "arms.json").read_text())["rows"]) == 2
    assert "| both | `gate` | 50 % | 0.500 | 1.000 | 1.000 | +0.500 (" in (tmp_path / "out" / "arms.md").read_text()


@pytest.mark.parametrize("argv,match", [
    (["lora"], "is not NAME=FOLDER"), (["a=x", "a=y"], "name of its own"), (["a=x", "--baseline", "a"], "not NAME:POLICY"),
])  # fmt: skip
def test_arguments_are_checked_first(argv, match):
    with pytest.raises(ValueError, match=match):
        compare.main(["--baseline", "a:full", *argv])
