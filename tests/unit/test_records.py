"""Records: a run that stops goes on where it stopped, and never under other settings."""

import json

import pytest
import torch
from conftest import tiny
from test_config_and_data import TEXT, Letters

from gatekv.evaluation import frontier, results
from gatekv.evaluation.records import Records
from gatekv.recipes import common, evaluate

PINNED = {"dtype": "float32", "tokens": None, "model": {"name": "embedded", "layers": 2}}


def go(path, policies=("snapkv", "keydiff", "random"), n=4, budgets=(0.5, 0.75), seed=0):
    records = Records(path, PINNED)
    model = tiny(dtype=torch.float32)
    where = (list(policies), list(budgets), "recall", "agnostic", n, seed, records)
    frontier.evaluate(model, Letters(), [TEXT], *where, tokens=300, progress=False)
    return records


def by_cell(records):
    return {
        json.dumps([line[k] for k in ("task", "seed", "index", "policy", "budget")]): line for line in records.lines
    }


def test_a_resumed_run_is_a_run(tmp_path):
    once = go(tmp_path / "once.jsonl", n=8)
    path = tmp_path / "resumed.jsonl"
    go(path, policies=["keydiff"])
    content = path.read_bytes()
    path.write_bytes(content[:-40])  # killed while writing
    go(path, n=8)
    resumed = Records(path, PINNED)
    assert by_cell(resumed) == by_cell(once) and len(resumed.lines) == len(once.lines) == 14
    key = lambda row: (row["policy"], row["budget"])  # noqa: E731
    assert sorted(results.rows(resumed.lines), key=key) == sorted(results.rows(once.lines), key=key)


def test_nothing_is_done_twice(tmp_path, monkeypatch):
    path, real = tmp_path / "r.jsonl", frontier.run_item
    go(path)
    monkeypatch.setattr(frontier, "run_item", lambda *a, **k: pytest.fail("computed what the records hold"))
    go(path)
    done = []
    monkeypatch.setattr(
        frontier,
        "run_item",
        lambda model, item, cells, *a, **k: done.append(cells) or real(model, item, cells, *a, **k),
    )
    before = len(path.read_text().splitlines())
    go(path, policies=("snapkv", "keydiff", "value_norm"))
    assert done == [[frontier.FULL, ("value_norm", 0.5), ("value_norm", 0.75)]], "the missing ones, and full for KL"
    assert len(path.read_text().splitlines()) == before + 2, "full is not written again"


def test_each_sample_is_on_disk_before_the_next_begins(tmp_path, monkeypatch):
    path, real, seen = tmp_path / "r.jsonl", frontier.run_item, []
    monkeypatch.setattr(
        frontier, "run_item", lambda *a, **k: seen.append(len(path.read_text().splitlines())) or real(*a, **k)
    )
    go(path, n=12)
    assert seen == [1, 8, 15]


@pytest.mark.parametrize("content", ["", '{"pinned": {"dty'])
def test_a_file_without_a_whole_header_is_begun_anew(tmp_path, content):
    path = tmp_path / "r.jsonl"
    path.write_text(content)
    assert Records(path, PINNED).lines == []
    assert json.loads(path.read_text()) == {"pinned": PINNED}


def test_other_settings_are_refused_by_name_and_fresh_is_the_way_out(tmp_path):
    path = tmp_path / "r.jsonl"
    go(path, policies=["keydiff"], budgets=[0.5])
    with pytest.raises(ValueError, match="dtype was 'float32' and is 'bfloat16'.*another --out, or --fresh"):
        Records(path, PINNED | {"dtype": "bfloat16"})
    with pytest.raises(ValueError, match="window was None and is 3"):
        Records(path, PINNED | {"window": 3})
    assert len(Records(path, PINNED).lines) == 2, "refusing changes nothing"
    assert Records(path, PINNED | {"window": 3}, fresh=True).lines == []
    assert len(path.read_text().splitlines()) == 1


def test_a_broken_line_in_the_middle_and_a_missing_header_are_errors(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps({"pinned": PINNED}) + "\n{oops\n{}\n")
    with pytest.raises(ValueError, match="a line that is not JSON"):
        Records(path, PINNED)
    path.write_text('{"task": "ppl"}\n')
    with pytest.raises(ValueError, match="no header of settings"):
        Records(path, PINNED)


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text(TEXT)
    monkeypatch.setattr(common, "load_model", lambda *a: (tiny(dtype=torch.float32), Letters()))

    def call(*more):
        argv = f"--policies keydiff,random --budgets .5 --tokens 250 --dtype float32 --data {tmp_path}/text.txt --out {tmp_path}/out"
        evaluate.main([*argv.split(), *more])
        return json.loads((tmp_path / "out" / "results.json").read_text())

    return call


def test_the_recipe_runs_several_tasks_modes_and_seeds_and_resumes(recipe, capsys):
    options = ["--tasks", "ppl,passkey", "--mode", "agnostic,aware", "--n", "2", "--n_ppl", "1"]
    first = recipe(*options)
    assert {(r["task"], r["mode"]) for r in first["rows"]} == {
        ("ppl", "agnostic"),
        ("passkey", "agnostic"),
        ("passkey", "aware"),
    }
    more = recipe(*options, "--seeds", "0,1")
    row = next(r for r in more["rows"] if r["task"] == "passkey" and r["policy"] == "random")
    assert row["seeds"] == [0, 1] and row["n"] == 4 and [c["depth"] for c in row["cells"]] == [0.0, 0.25]
    assert "depth 0.25, tokens 250" in capsys.readouterr().out
    for changed, name in (
        (["--decode", "evict"], "decode"),
        (["--window", "8"], "window"),
        (["--tokens", "260"], "tokens"),
    ):
        with pytest.raises(ValueError, match=f"{name} was"):
            recipe(*options, *changed)
    assert recipe(*options, "--window", "8", "--fresh")["rows"][0]["seeds"] == [0]


def test_the_recipe_takes_choices_from_a_file(recipe, tmp_path):
    path = tmp_path / "choices.jsonl"
    entry = {"context": TEXT[:200], "question": "Did it sail?", "choices": ["yes", "no"], "answer": "yes"}
    path.write_text("".join(json.dumps(entry) + "\n" for _ in range(3)))
    rows = recipe("--tasks", "classification", "--choices", str(path), "--n", "3")["rows"]
    assert [r["n"] for r in rows] == [3, 3, 3] and rows[0]["score"] in (0, 1)
    with pytest.raises(ValueError, match="has 3 examples: lower --n from 4"):
        recipe("--tasks", "classification", "--choices", str(path), "--n", "4")
