"""Small bases that recall: what they read, and the recipe that trains and compares a gate on them, from end to end."""

import json

import pytest
import torch

import gatekv
from gatekv.recipes import hybrid
from gatekv.recipes.hybrid_base import ASK, FACT, KEYS, VALUES, VOCABULARY, Muon, Recall, fresh

KINDS = ("hybrid", "wide", "sinks", "dense")


def test_rows_hold_the_facts_that_they_ask_for():
    data = Recall(90, 8, 12, seed=0)
    row = data.row(3)
    assert row == Recall(90, 8, 12, seed=0).row(3) != Recall(90, 8, 12, seed=1).row(3)
    assert len(row) == data.length == 90 + 36
    context, asked = row[:90], [row[i : i + 3] for i in range(90, len(row), 3)]
    facts = {context[i + 1]: context[i + 2] for i, token in enumerate(context) if token == FACT}
    assert len(facts) == 8 and all(KEYS <= k < VALUES <= v < VOCABULARY for k, v in facts.items())
    assert all(mark == ASK and facts[key] == value for mark, key, value in asked)
    assert {key for _, key, _ in asked[:8]} == set(facts), "none is asked for again before all were"


def test_weights_are_of_what_can_be_known():
    data = Recall(90, 8, 4, seed=0)
    batch = data.batch(0, 2)
    ids, weights = batch["input_ids"], batch["weights"]
    answers = torch.tensor([91, 94, 97, 100])
    assert (weights[:, answers] == 20).all() and (ids[:, answers + 1] >= VALUES).all()
    text = (weights == 1).nonzero()
    assert len(text) >= 2 * (90 - 3 * 8 - 1) and all(ids[b, t + 1] < FACT for b, t in text)
    assert (weights.count_nonzero(1) == 4 + (weights == 1).sum(1)).all()


@pytest.mark.parametrize("shape", [(6, 6), (4, 10), (10, 4)])
def test_a_step_of_muon_is_orthogonal(shape):
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.zeros(shape))
    p.grad = torch.randn(shape)
    Muon([p], lr=1.0).step()
    values = torch.linalg.svdvals(p.detach() / max(1.0, shape[0] / shape[1]) ** 0.5)
    assert 0.5 < values.min() and values.max() < 1.5
    assert (p.detach() * p.grad).sum() < 0


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_read_once_is_decided_as_one_read_for_itself(kind):
    model = fresh(kind).eval()
    ids = torch.tensor([Recall(60, 5, 2, seed=0).row(0)])
    context, asked = ids[:, :60], ids[:, 60:]
    watched = gatekv.KVCache.undecided(model)
    model(context, past_key_values=watched)
    options = {"sinks": 2, "window": 4, "strict": True}
    decided = watched.decide("snapkv", 0.5, **options)
    own = gatekv.KVCache(model, "snapkv", 0.5, **options)
    model(context, past_key_values=own)
    wanted = model(asked, past_key_values=own).logits
    copies = decided.snapshot()
    copies.batch_repeat_interleave(2)
    for cache, rows in ((copies, 2), (decided, 1)):
        torch.testing.assert_close(
            model(asked.expand(rows, -1), past_key_values=cache).logits, wanted.expand(rows, -1, -1)
        )


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", KINDS)
def test_the_recipe_runs(kind, tmp_path, capsys):
    argv = f"--kind {kind} --out {tmp_path} --base_steps 2 --n 16 --context 96 --facts 9".split()
    found = hybrid.main([*argv, "--steps", "3"])
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["kind"] == kind and [c["budget"] for c in last["comparisons"]] == [0.25, 0.125]
    assert all(c["learned"] == "gate+global" for c in last["comparisons"])
    assert not [row["refused"] for row in found["rows"] if row.get("refused")]
    assert (tmp_path / "gate" / "adapter_config.json").is_file()
    base = (tmp_path / "base" / "model.safetensors").read_bytes()
    hybrid.main([*argv, "--steps", "2"])
    assert (tmp_path / "base" / "model.safetensors").read_bytes() == base, "a base that is there is not made again"
