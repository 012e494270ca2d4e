"""What is said before a cache is filled is what it then holds; what is refused is refused in the decision's words."""

import pytest
import torch
from conftest import gated, padded_batch, tiny
from peft import get_peft_model
from transformers import AutoModelForCausalLM

import gatekv
from gatekv.cache.forecast import forecast, shortest
from gatekv.policies.budgets import BudgetError

SPEC = dict(window=8, sinks=2)
# Heads hold what a rule gives each; where they compete, page ends depend on the text.
EVEN = [("full", None), ("snapkv", 0.4), ("snapkv+pyramid", 0.4), ("l2", 0.8), ("keydiff", 0.3), ("random", 0.5),
        ("h2o", 0.3), ("tova", 0.3), ("streaming_llm", 0.2), ("gate+uniform", 0.3), ("gate_alone+uniform", 0.3),
        ("snapkv+less", 0.4), ("gate+uniform+less", 0.3), ("nacl", 0.3), ("elastic", 0.3), ("h2o+merge_similar", 0.3)]  # fmt: skip
UNEVEN = [
    ("gate+global", 0.3),
    ("gate+ada", 0.3),
    ("snapkv+ada", 0.4),
    ("gate+global+less", 0.3),
    ("value_norm+global", 0.4),
    ("fastgen", 0.4),
]
THIN = [("think", None), ("snapkv+think", 0.4), ("streaming_llm+think", 0.3)]


def wide(**spec):
    """A tiny model whose tokens outweigh the tables beside them, as real ones do."""
    return gated(model=tiny(dtype=torch.float32, head_dim=32, num_hidden_layers=3), dtype=torch.float32, **SPEC, **spec)


@torch.no_grad()
def held(model, policy, budget, length, new, batch=1, **options):
    cache = gatekv.KVCache(model, policy, budget, **options)
    ids, _ = padded_batch([length + new] * batch)
    model(ids[:, :length], past_key_values=cache)
    prompt = cache.memory()
    for i in range(length, length + new):
        model(ids[:, i : i + 1], past_key_values=cache)
    return prompt, cache.memory()


@pytest.mark.covering(1)  # every policy, at either length
@pytest.mark.parametrize("policy,budget", EVEN + UNEVEN + THIN)
@pytest.mark.parametrize("length,new,batch", [(150, 0, 1), (301, 37, 2)])
def test_what_is_said_is_what_is_held(policy, budget, length, new, batch):
    model = wide(less_rank=4) if "less" in policy else wide()
    options = {"decode": "keep"} if policy.startswith("gate") else {}
    said = forecast(gatekv.KVCache(model, policy, budget, **options), length, new, batch)
    prompt, end = held(model, policy, budget, length, new, batch, **options)
    # Where heads compete half a page a row is assumed, and there are few rows here.
    row_end = 9 * batch * 8 * 68 * 4 if (policy, budget) in UNEVEN else 0
    assert (said.full_bytes, said.full_bytes_end) == (prompt["full_bytes"], end["full_bytes"])
    assert abs(said.bytes - prompt["bytes"]) <= 0.01 * prompt["bytes"] + row_end and not said.at_most
    assert abs(said.bytes_end - end["bytes"]) <= 0.01 * end["bytes"] + row_end


@pytest.mark.parametrize("policy,budget", [("qaq", None), ("snapkv+qaq", 0.5)])
def test_few_bits_are_foretold_by_their_mean(policy, budget):
    said = forecast(gatekv.KVCache(wide(), policy, budget), 301, 5)
    prompt, end = held(wide(), policy, budget, 301, 5)
    # How many pairs of widths a head has, and so how many pages are half empty, depends on the text.
    assert abs(said.bytes - prompt["bytes"]) <= 0.1 * prompt["bytes"]
    assert abs(said.bytes_end - end["bytes"]) <= 0.1 * end["bytes"]


def test_layers_that_share_by_variance_are_told_on_average():
    cache = gatekv.KVCache(wide(), "h2o+variance", 0.3)
    said = forecast(cache, 301)
    assert said.tokens == [90] * 3
    assert said.bytes == pytest.approx(held(wide(), "h2o+variance", 0.3, 301, 0)[0]["bytes"], rel=0.03)


def test_upper_bounds_are_called_so_and_hold():
    said = forecast(gatekv.KVCache(wide(), "gate"), 200, 40)
    prompt, end = held(wide(), "gate", None, 200, 40)
    assert said.at_most and prompt["bytes"] < said.bytes and end["bytes"] < said.bytes_end
    said = forecast(gatekv.KVCache(wide(), "gate+global", 0.3), 200, 40)
    prompt, end = held(wide(), "gate+global", 0.3, 200, 40)
    assert not said.at_most and said.at_most_end and end["bytes"] <= said.bytes_end * 1.01


@pytest.mark.parametrize("spec", [dict(gate="attention", context_window=16), dict(gate="key_mlp"), dict(gate="linear")])
def test_a_gates_own_memory_is_counted(spec):
    said = forecast(gatekv.KVCache(wide(**spec), "gate+uniform", 0.3), 150)
    assert said.bytes == pytest.approx(held(wide(**spec), "gate+uniform", 0.3, 150, 0)[0]["bytes"], rel=0.01)


@pytest.mark.parametrize("length,new", [(40, 0), (40, 3)])
def test_sliding_layers_hold_what_transformers_holds(length, new):
    model = tiny("gemma3", torch.float32, head_dim=32)
    said = forecast(gatekv.KVCache(model, "snapkv", 0.9), length, new)
    prompt, end = held(model, "snapkv", 0.9, length, new)
    assert (said.full_bytes, said.full_bytes_end) == (prompt["full_bytes"], end["full_bytes"])
    assert said.bytes == pytest.approx(prompt["bytes"], rel=0.01) and len(said.tokens) == 1
    assert said.bytes_end == pytest.approx(end["bytes"], rel=0.01)


def test_no_weights_are_needed():
    real = wide(less_rank=4)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(real.base_model.model.config, dtype=torch.float32)
        empty = get_peft_model(empty, real.peft_config["default"])
    for policy, budget in EVEN:
        one, two = (forecast(gatekv.KVCache(model, policy, budget), 200, 5) for model in (real, empty))
        assert one == two


@pytest.mark.parametrize("policy,budget,length", [
    ("snapkv", 0.3, 60), ("gate+global", 0.3, 20), ("l2", 0.9, 100), ("random", 0.2, 100), ("h2o", 0.1, 5),
])  # fmt: skip
def test_what_is_refused_and_from_which_length_on_it_is_not(policy, budget, length):
    model = gated(dtype=torch.float32, model=tiny(dtype=torch.float32, num_hidden_layers=3), **SPEC)

    def refusal(n):
        ids, _ = padded_batch([n])
        try:
            with torch.no_grad():
                model(ids, past_key_values=gatekv.KVCache(model, policy, budget, strict=True))
        except BudgetError as error:
            return str(error)

    cache = gatekv.KVCache(model, policy, budget, strict=True)
    if refusal(length) is None:
        assert forecast(cache, length).tokens
        return
    with pytest.raises(BudgetError) as said:
        forecast(cache, length)
    assert str(said.value) == refusal(length)
    if (enough := shortest(cache, length)) is not None:
        assert refusal(enough) is None and refusal(enough - 1) is not None


def test_layers_left_whole_can_make_a_budget_unreachable_at_any_length():
    model = tiny(dtype=torch.float32, num_hidden_layers=4)
    cache = gatekv.KVCache(model, "l2", 0.4, strict=True)
    with pytest.raises(BudgetError, match="unreachable: 2 of 4 layers are left whole"):
        forecast(cache, 1000)
    assert shortest(cache, 1000) is None
    assert forecast(gatekv.KVCache(model, "l2", 0.4), 1000).tokens == [1000, 1000, 1, 1]
    assert forecast(gatekv.KVCache(model, "l2", 0.75), 100).tokens == [100, 100, 50, 50]
