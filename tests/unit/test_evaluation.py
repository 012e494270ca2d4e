"""Evaluation: shared prefill scores, refusals, intervals, the picture, and the results file's shape."""

import pytest
import torch
from conftest import gated, tiny
from test_config_and_data import TEXT, Letters

from gatekv import report
from gatekv.evaluation import frontier, statistics, tasks
from gatekv.training.card import results_table, write_card


class Small(Letters):
    """Characters, within the tiny model's vocabulary."""


@pytest.fixture
def short_tasks(monkeypatch):
    def item(tokenizer, texts, mode, index, seed, tokens=None):
        generator = torch.Generator().manual_seed(index)
        ids = torch.randint(1, 90, (90,), generator=generator).tolist()
        return tasks.Item(ids[:80], [(ids[80:85], ids[85:88]), (ids[81:84], ids[86:])])

    monkeypatch.setattr(frontier, "TASKS", {"ppl": item, "niah_multikey": item})


def run(model, policies, budgets, task="ppl", n=6):
    return frontier.evaluate(model, Small(), [TEXT], policies, budgets, task, "agnostic", n, 0, progress=False)


def test_rows_carry_everything_and_full_is_exact(short_tasks):
    model = gated(window=4, sinks=2, dtype=torch.float32)
    cells = run(model, ["gate+global", "snapkv", "untrained+global", "random+ada"], [0.5, 0.9])
    rows = frontier.rows(cells, "ppl", "agnostic", 0)
    full = rows[0]
    assert (
        full["policy"] == "full" and full["score"] == 0 and full["kl"] == pytest.approx(0, abs=1e-7) and full["n"] == 6
    )
    fields = {
        "policy",
        "budget",
        "task",
        "mode",
        "score",
        "kl",
        "bytes_ratio",
        "bytes_ratio_end",
        "n",
        "ci_low",
        "ci_high",
        "seed",
    }
    for r in rows[1:]:
        assert fields <= set(r) and r["kl"] > 0 and r["ci_low"] <= r["score"] <= r["ci_high"]
        assert r["bytes_ratio"] < r["budget"] * 1.4  # half a page a head weighs much in a prompt this short
    assert "untrained" not in model.peft_config, "the control leaves no trace"
    pair = frontier.comparisons(cells, "ppl", "agnostic")
    assert [c["budget"] for c in pair] == [0.9, 0.5] and pair[0]["learned"] == "gate+global"


def test_a_full_budget_scores_as_the_full_cache(short_tasks):
    cells = run(gated(window=4, dtype=torch.float64), ["gate+global", "snapkv+ada", "keydiff"], [1.0], n=4)
    for cell in cells[1:]:
        assert max(abs(x) for group in cell.kls for x in group) < 1e-6


def test_impossible_budgets_are_refused_in_the_table_not_by_a_crash(short_tasks):
    cells = run(tiny(dtype=torch.float32), ["random", "keydiff"], [0.1], task="niah_multikey", n=2)
    rows = frontier.rows(cells, "niah_multikey", "agnostic", 0)
    assert rows[1]["score"] is None and "below the 36" in rows[1]["refused"]
    assert rows[2]["score"] is not None


def test_tasks_are_deterministic_and_aware_asks_inside_the_context():
    for mode in ("agnostic", "aware"):
        a = tasks.niah_multikey(Small(), [TEXT], mode, 3, 0)
        b = tasks.niah_multikey(Small(), [TEXT], mode, 3, 0)
        assert a == b and a != tasks.niah_multikey(Small(), [TEXT], mode, 4, 0)
    for tokens in (300, 3000):
        found = [len(tasks.niah_multikey(Small(), [TEXT * 9], "agnostic", i, 0, tokens).context) for i in range(4)]
        assert all(0.9 * tokens < n < 1.1 * tokens + 400 for n in found), "about that many, the facts on top"
        assert len(tasks.ppl(Small(), [TEXT * 9], "agnostic", 0, 0, tokens).context) == tokens - 1
    aware = tasks.niah_multikey(Small(), [TEXT], "aware", 3, 0)
    assert len(aware.asks) == 1 and len(aware.asks[0][0]) == 1, (
        "only the question's last token meets the compressed cache"
    )
    item = tasks.ppl(Small(), [TEXT], "agnostic", 0, 0, tokens=100, continuation=20)
    assert len(item.context) == 99 and len(item.asks[0][0]) == 1 and len(item.asks[0][1]) == 20


def test_paired_interval_is_narrower_than_the_unpaired_spread():
    groups_a = [[float(i % 2), float(i % 3 == 0)] for i in range(40)]
    groups_b = [[max(0.0, x - (i % 5 == 0)) for x in g] for i, g in enumerate(groups_a)]
    mean, low, high = statistics.paired_interval(groups_a, groups_b)
    assert low <= mean <= high and low >= 0
    assert statistics.interval([[0.5]] * 10) == (0.5, 0.5)
    low, high = statistics.interval([[0.0], [1.0]] * 20)
    assert 0.3 < low < 0.5 < high < 0.7


def test_picture_and_card(tmp_path, short_tasks):
    rows = []
    for task in ("ppl", "niah_multikey"):
        cells = run(tiny(dtype=torch.float32), ["snapkv", "random"], [0.5, 0.75], task=task, n=2)
        rows += frontier.rows(cells, task, "agnostic", 0)
    report.frontier({"rows": rows}, tmp_path / "frontier.png")
    assert (tmp_path / "frontier.png").read_bytes()[:4] == b"\x89PNG"
    (tmp_path / "results.json").write_text(__import__("json").dumps({"rows": rows}))
    write_card(tmp_path, {"model": "", "window": 3})
    card = (tmp_path / "README.md").read_text()
    assert (
        card.startswith("---\nbase_model: HuggingFaceTB/SmolLM2-135M-Instruct")
        and "| ppl | agnostic | snapkv |" in card
    )
    assert results_table(rows).count("\n") == len(rows) + 1


@pytest.mark.parametrize("policy,budget", [("full", None), ("gate+global", 0.6), ("snapkv", 0.7)])
def test_questions_asked_together_are_questions_asked_alone(policy, budget):
    model = gated(window=4, sinks=2, gate="attention", context_window=5)
    context = torch.randint(1, 90, (1, 60))
    asks = [([3, 4, 5], [6, 7]), ([8, 9, 10, 11, 12], [13]), ([14, 15, 16], [17, 18])]
    watching = frontier.KVCache.undecided(model)
    with torch.no_grad():
        model(context, past_key_values=watching)
        cache = watching.decide(policy, budget)
        together, _ = frontier._ask(model, cache, asks)
        for logits, ask in zip(together, asks):
            alone, _ = frontier._ask(model, cache, [ask])
            torch.testing.assert_close(logits, alone[0], rtol=1e-5, atol=1e-5)
