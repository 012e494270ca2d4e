"""Prompts too short for their budget are held whole, or refused by a strict cache; budgets in tokens."""

import pytest
import torch
from conftest import gated, padded_batch, plain_logits, positions_of, recurrent_logits

import gatekv
from gatekv.cache.forecast import forecast
from gatekv.gates.calibration import Calibration
from gatekv.modules import wrappers
from gatekv.policies import D2O, ElasticCache, L2Norm, StreamingLLM
from gatekv.policies.budgets import BudgetError

LENGTHS = [40, 33, 8, 5, 3, 2, 1]
STEPS = 3
POLICIES = {
    **{name: name for name in (
        "snapkv", "snapkv+ada", "snapkv+pyramid", "keydiff", "keydiff+ada", "keydiff+global", "keydiff+ada+pyramid", "h2o",
        "h2o+variance", "h2o+pyramid", "tova", "streaming_llm", "l2", "nacl", "nacl+ada", "fastgen", "random+global",
        "value_norm", "sinks_recent", "d2o", "elastic", "snapkv+think", "h2o+think", "snapkv+qaq", "keydiff+merge_similar",
        "gate+global", "gate+ada", "gate+uniform", "gate_alone+global", "gate", "gate+global+less",
    )},
    "l2-one": L2Norm(skip_layers=(0,)),
    "d2o-one": D2O(skip_layers=(-1,)),
    "elastic-variance": ElasticCache(window=3),
    "slot": StreamingLLM(positions="cache"),
    "sparse": "gate+global",
    "decay": "gate+decay",
}  # fmt: skip


def model_for(name, **more):
    spec = {"relaxation": "decay"} if name == "decay" else {"less_rank": 4} if name.endswith("less") else {}
    model = gated(window=6, sinks=2, **spec, **more)
    for w in wrappers(model):
        if w.active():
            levels = [[6.0, 0.0, -6.0], [4.0, -1.0, -6.0]]
            w.calibrations["default"] = Calibration([1.0, 0.25], [0.0, 0.5, 1.0], levels)
    return model


def cache_for(model, name, budget, **options):
    if name == "sparse":
        options["prefill"] = "sparse"
    return gatekv.KVCache(model, POLICIES[name], budget, **options)


def run(model, cache, ids, mask, steps):
    """(logits of the prompt and the steps, flags after the prompt, at the end)."""
    n = ids.shape[1] - steps
    first = recurrent_logits(model, ids[:, :n], mask[:, :n], cache, [])
    flags = torch.stack(cache.flags())
    out, positions = [first], positions_of(mask)
    with torch.no_grad():
        for i in range(n, ids.shape[1]):
            part = dict(attention_mask=mask[:, : i + 1], position_ids=positions[:, i : i + 1])
            out.append(model(ids[:, i : i + 1], past_key_values=cache, **part).logits)
    return torch.cat(out, 1), flags, torch.stack(cache.flags())


@pytest.mark.covering(1)  # every policy, by turns under a share and a number of tokens
@pytest.mark.parametrize("budget", [0.25, 9])
@pytest.mark.parametrize("name", POLICIES)
def test_no_row_is_refused_or_left_with_nothing_and_each_is_its_solo_run(name, budget):
    model = model_for(name)
    ids, mask = padded_batch([n + STEPS for n in LENGTHS], seed=7)
    cache = cache_for(model, name, budget)
    logits, flags, end = run(model, cache, ids, mask, STEPS)
    assert flags.any(-1).all(), "every head holds something of every row"
    assert end.any(-1).all()
    whole = 0
    for row, length in enumerate(LENGTHS):
        pads = max(LENGTHS) - length
        alone = cache_for(model, name, budget)
        wanted, kept, later = run(model, alone, ids[row : row + 1, pads:], mask[row : row + 1, pads:], STEPS)
        assert torch.equal(flags[:, row, :, pads:], kept[:, 0]) and not flags[:, row, :, :pads].any()
        assert torch.equal(end[:, row, :, pads:], later[:, 0])
        torch.testing.assert_close(logits[row, pads:], wanted[0], rtol=1e-9, atol=1e-9)
        whole += alone.memory()["whole_rows"]
        strict = cache_for(model, name, budget, strict=True)
        prompt = ids[row : row + 1, pads:-STEPS], mask[row : row + 1, pads:-STEPS]
        if alone.memory()["whole_rows"]:
            assert "1 rows too short for the budget held whole" in repr(alone)
            with pytest.raises(BudgetError, match="is unreachable|use longer prompts"):
                recurrent_logits(model, *prompt, strict, [])
        elif row < 3:
            recurrent_logits(model, *prompt, strict, [])
    assert cache.memory()["whole_rows"] == whole


@pytest.mark.parametrize(
    "name", [n for n in POLICIES if n not in ("snapkv+think", "h2o+think", "snapkv+qaq", "l2", "d2o")]
)
def test_a_row_held_whole_is_the_plain_model_and_the_long_one_is_compressed(name):
    model = model_for(name)
    budget = 0.75 if name in ("l2-one", "d2o-one") else 0.5
    lengths = [
        90,
        1 if name.startswith(("keydiff", "h2o", "tova", "fastgen", "l2", "d2o")) else 3,
    ]  # these protect none
    ids, mask = padded_batch(lengths)
    known = {"prompt_tokens": 90} if name == "gate" else {}  # a threshold must know where the prompt ends
    cache = cache_for(model, name, budget, **known)
    recurrent_logits(model, ids, mask, cache, [])
    flags = torch.stack(cache.flags())
    assert flags[:, 1, :, 90 - lengths[1] :].all(), "whole in every layer"
    assert flags[:, 0].float().mean() < 0.85, "while its neighbour is compressed"
    assert cache.memory()["whole_rows"] == 1
    more = torch.full((2, 1), 5)
    mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
    with torch.no_grad():
        got = model(more, attention_mask=mask, position_ids=positions_of(mask)[:, -1:], past_key_values=cache).logits
    wanted = plain_logits(model, torch.cat([ids, more], 1), mask)
    torch.testing.assert_close(got[1, -1], wanted[1, -1], rtol=1e-9, atol=1e-9)
    if name != "gate+global+less":  # what is evicted is not forgotten, and these maps are untrained
        assert (got[0, -1] - wanted[0, -1]).abs().max() > 1e-4


@pytest.mark.parametrize("name,cuts", [("gate", [7, 20, 22]), ("sparse", [30]), ("snapkv", [11, 13])])
@pytest.mark.parametrize("budget", [0.5, 20])
def test_chunks_change_nothing(name, cuts, budget):
    model = model_for(name)
    ids, mask = padded_batch([60, 13, 9])
    runs = [cache_for(model, name, budget, prompt_tokens=60) for _ in range(2)]
    one, two = (recurrent_logits(model, ids, mask, cache, c) for cache, c in zip(runs, ([], cuts)))
    torch.testing.assert_close(one[mask.bool()], two[mask.bool()], rtol=1e-9, atol=1e-9)
    assert all(torch.equal(a, b) for a, b in zip(runs[0].flags(), runs[1].flags()))


@pytest.mark.parametrize("name", ["h2o", "tova", "streaming_llm", "slot", "elastic-variance", "decay"])
def test_a_buffer_fills_up_to_what_is_protected_before_anything_leaves(name):
    model = model_for(name)
    cache = cache_for(model, name, 0.25)
    ids, mask = padded_batch([2 + 40])
    run(model, cache, ids, mask, 40)
    plan, slots = cache.config, torch.arange(42)
    least = plan.sinks + plan.window
    for flags in cache.flags():
        near = plan.window - (name == "decay")  # a gate's window has the query in it
        assert (flags.sum(-1) >= least).all() and flags[..., slots >= 42 - near].all()
        if name != "slot":  # there only the sinks of the prompt are sinks
            assert flags[..., : plan.sinks].all(), "sinks that came after the prompt stay too"
        assert flags.sum(-1).max() < 30, "and then they do leave"


@pytest.mark.parametrize(
    "name", ["snapkv", "snapkv+ada", "keydiff+global", "snapkv+pyramid", "h2o", "gate+global", "decay"]
)
def test_tokens_as_budget_are_what_is_held(name):
    model = model_for(name)
    ids, mask = padded_batch([80, 60, 30])
    cache = cache_for(model, name, 40)
    recurrent_logits(model, ids, mask, cache, [])
    held = torch.stack(cache.flags()).sum((0, 2, 3))
    assert held[:2].tolist() == pytest.approx([40 * 6] * 2, abs=6) and held[2] == 30 * 6
    assert forecast(cache_for(model, name, 40), 80).tokens == pytest.approx([40, 40], abs=15)
    assert forecast(cache_for(model, name, 40), 30).tokens == [30, 30]
    assert cache.memory()["whole_rows"] == 0, "a prompt of fewer tokens is within its budget"


def test_tokens_as_budget_of_a_threshold_know_the_prompts_end():
    model = model_for("gate")
    ids, mask = padded_batch([300, 150])
    cache = cache_for(model, "gate", 60)
    recurrent_logits(model, ids, mask, cache, [])
    same = cache_for(model, "gate", 60, prompt_tokens=300)
    recurrent_logits(model, ids, mask, same, [100, 200])
    assert all(torch.equal(a, b) for a, b in zip(cache.flags(), same.flags()))
    with pytest.raises(ValueError, match="prompt_tokens=N"):
        recurrent_logits(model, ids, mask, cache_for(model, "gate", 60), [150])


def test_tokens_as_budget_in_turns_snapshots_and_files(tmp_path):
    model = model_for("snapkv")
    ids, _ = padded_batch([200])
    cache = cache_for(model, "snapkv", 40, turns=True)
    with torch.no_grad():
        model(ids[:, :100], past_key_values=cache)
        model(ids[:, 100:170], past_key_values=cache)
        cache.compress()
        twin = cache.snapshot()
        cache.save(tmp_path / "c.safetensors")
        loaded = gatekv.KVCache.load(tmp_path / "c.safetensors", model)
        assert loaded.config.policy.budget == 40 and type(loaded.config.policy.budget) is int
        for c in (cache, twin, loaded):
            model(ids[:, 170:], past_key_values=c)
            c.compress()
            assert [int(f.sum()) for f in c.flags()] == [3 * (40 + 40 + 30)] * 2
            assert c.memory()["whole_rows"] == 0 and not c.config.strict
    strict = cache_for(model, "snapkv", 20, turns=True)
    with torch.no_grad():
        model(ids[:, :100], past_key_values=strict)
        strict.save(tmp_path / "d.safetensors")
        loaded = gatekv.KVCache.load(tmp_path / "d.safetensors", model)
    assert loaded.memory()["whole_rows"] == strict.memory()["whole_rows"] == 1, "20 tokens are less than the window"


def test_rows_held_whole_follow_their_beams():
    model = model_for("snapkv")
    ids, mask = padded_batch([90, 10])
    cache = cache_for(model, "snapkv", 0.5)
    recurrent_logits(model, ids, mask, cache, [])
    cache.batch_repeat_interleave(3)
    assert cache.memory()["whole_rows"] == 3
    cache.batch_select_indices(torch.tensor([0, 1, 5]))
    assert cache.memory()["whole_rows"] == 1


def test_flags_of_short_prompts_and_a_budget_that_no_prompt_can_keep():
    model = model_for("l2")
    ids, mask = padded_batch([50])
    assert gatekv.flags(model, ids, mask, "snapkv", 0.25).all()
    with pytest.raises(BudgetError, match="12 a head, below the 32"):
        gatekv.flags(model, ids, mask, "snapkv", 0.25, strict=True)
    found = gatekv.flags(model, ids, mask, L2Norm(skip_layers=(0,)), 0.25)
    assert found[0].all() and (found[1].sum(-1) == 1).all()
    with pytest.raises(BudgetError, match="unreachable"):
        gatekv.flags(model, ids, mask, L2Norm(skip_layers=(0,)), 0.25, strict=True)
