"""Drafts that are taken back leave no trace: logits stay those of the accepted tokens alone."""

import random

import pytest
import torch
from conftest import VOCAB, gated, padded_batch, tiny
from hypothesis import given, settings
from hypothesis import strategies as st

import gatekv
from gatekv.cache.gate_stream import ROLLBACK
from gatekv.cache.rollback import croppable
from gatekv.modules import base_model

GREEDY = dict(max_new_tokens=40, do_sample=False)


def feed(model, cache, ids, mask=None):
    with torch.no_grad():
        if mask is None:
            return model(ids, past_key_values=cache).logits
        positions = (mask.cumsum(-1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        return model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits


def drafted(model, cache, ids, mask, start, seed):
    """Feed ids from start in calls of random length, each with a wrong draft behind it that is then taken back."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    at, out = start, []
    while at < ids.shape[1]:
        n, wrong = rng.randint(1, 6), rng.randint(0, 9)
        piece = ids[:, at : at + n]
        draft = torch.randint(1, VOCAB, (len(ids), wrong), generator=generator)
        seen = mask[:, : at + piece.shape[1]]
        out.append(feed(model, cache, torch.cat([piece, draft], 1), torch.cat([seen, torch.ones_like(draft)], 1)))
        out[-1] = out[-1][:, : piece.shape[1]]
        cache.crop(-wrong)
        at += piece.shape[1]
    return torch.cat(out, 1)


@pytest.mark.parametrize("gate", ["mlp", "attention"])
@pytest.mark.parametrize("window", [1, 7, 20])  # from 16 on, the gate reads late
def test_gates_after_rollbacks_equal_the_parallel_form(family, gate, window):
    model = gated(family, gate=gate, window=window, sinks=2, context_window=9)
    ids, mask = padded_batch([90, 71])
    with torch.no_grad(), gatekv.parallel(model):
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        wanted = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    cache = gatekv.KVCache(model, "gate")
    head = feed(model, cache, ids[:, :30], mask[:, :30])
    cache.activate_past_recording()
    got = torch.cat([head, drafted(model, cache, ids, mask, 30, 0)], 1)
    scale = wanted[mask.bool()].abs().max()
    assert ((got - wanted)[mask.bool()].abs().max() / scale) <= 1e-9
    assert cache.get_seq_length() == 90 and not torch.stack(cache.flags()).all()


@pytest.mark.parametrize(
    "policy,budget", [("gate+global", 0.5), ("gate+ada", 0.5), ("snapkv+ada", 0.75), ("keydiff", 0.5), ("full", None)]
)
def test_one_shot_policies_after_rollbacks_equal_a_run_without_drafts(family, policy, budget):
    model = gated(family, window=16, sinks=2, gate="attention", context_window=9)
    ids, mask = padded_batch([90, 80])
    straight, cache = (gatekv.KVCache(model, policy, budget) for _ in range(2))
    for c in (straight, cache):
        feed(model, c, ids[:, :60], mask[:, :60])
    wanted = torch.cat([feed(model, straight, ids[:, i : i + 1], mask[:, : i + 1]) for i in range(60, 90)], 1)
    cache.activate_past_recording()
    got = drafted(model, cache, ids, mask, 60, 1)
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)
    assert all(torch.equal(a, b) for a, b in zip(cache.flags(), straight.flags()))
    assert all(torch.equal(a.real, b.real) for a, b in zip(cache.evicting(), straight.evicting()))


@pytest.mark.parametrize("policy", ["keydiff", "gate"])
def test_what_is_still_in_the_tail_needs_no_recording(policy):
    model = gated(window=5, sinks=2)
    ids, _ = padded_batch([70])
    cache = gatekv.KVCache(model, policy, 0.5 if policy == "keydiff" else None)
    feed(model, cache, ids[:, :60])
    clean = cache.snapshot()
    feed(model, cache, ids[:, 60:63])
    cache.crop(-3)
    torch.testing.assert_close(feed(model, cache, ids[:, 63:]), feed(model, clean, ids[:, 63:]), rtol=1e-12, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(0, 40)), min_size=1, max_size=8),
    st.sampled_from([1, 3, 12, 16, 25]),
)
def test_any_feeding_and_cropping_equals_the_parallel_form(calls, window):
    model = gated(window=window, sinks=1, gate="attention", context_window=5)
    cache = gatekv.KVCache(model, "gate")
    cache.activate_past_recording()
    generator = torch.Generator().manual_seed(window)
    ids, got = torch.zeros(1, 0, dtype=torch.long), torch.zeros(1, 0, VOCAB, dtype=torch.float64)
    for n, back in calls:
        new = torch.randint(1, VOCAB, (1, n), generator=generator)
        got, ids = torch.cat([got, feed(model, cache, new)], 1), torch.cat([ids, new], 1)
        back = min(back, croppable(cache.evicting()[0]), ids.shape[1] - 1)
        cache.crop(-back)
        ids, got = ids[:, : ids.shape[1] - back], got[:, : got.shape[1] - back]
        assert cache.get_seq_length() == ids.shape[1]
    with torch.no_grad(), gatekv.parallel(model):
        wanted = model(ids, use_cache=False).logits
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.covering(1)  # every policy, by turns with either kind of drafts
@pytest.mark.parametrize(
    "policy,budget", [("gate", None), ("gate+ada", 0.5), ("snapkv+ada", 0.75), ("keydiff", 0.5), ("full", None)]
)
@pytest.mark.parametrize("how", ["lookup", "assistant"])
def test_assisted_generation_gives_the_unassisted_tokens(family, policy, budget, how):
    model = gated(family, window=5, sinks=2)
    ids, _ = padded_batch([60])
    ids = torch.cat([ids, ids[:, 20:50]], 1)  # something for the lookup to find
    options = {"prompt_lookup_num_tokens": 4} if how == "lookup" else {"assistant_model": tiny(family, seed=0)}
    runs = []
    for extra in ({}, options):
        cache = gatekv.KVCache(model, policy, budget, prompt_tokens=90)
        runs.append((model.generate(input_ids=ids, past_key_values=cache, **GREEDY, **extra), cache))
    assert torch.equal(runs[0][0], runs[1][0])
    n = min(c.get_seq_length() for _, c in runs)
    for a, b in zip(*(c.flags() for _, c in runs)):
        assert torch.equal(a[..., : n - 8], b[..., : n - 8]), (
            "the same tokens are held (the last ones may be in a window)"
        )


def test_assisted_generation_needs_to_know_where_the_prompt_ends():
    model = gated(window=5, sinks=2)
    ids, _ = padded_batch([60])
    ids = torch.cat([ids, ids[:, 20:50]], 1)
    with pytest.raises(ValueError, match="prompt_tokens=N"):
        model.generate(
            input_ids=ids, past_key_values=gatekv.KVCache(model, "keydiff", 0.5), prompt_lookup_num_tokens=4, **GREEDY
        )
    with pytest.raises(ValueError, match="use uniform, ada or a threshold gate"):
        cache = gatekv.KVCache(model, "gate+global", 0.5, prompt_tokens=90)
        model.generate(input_ids=ids, past_key_values=cache, prompt_lookup_num_tokens=4, **GREEDY)


@pytest.mark.parametrize("policy", ["snapkv+ada", "gate+uniform", "random"])
def test_a_call_that_runs_past_the_prompt_is_two_calls(family, policy):
    model = gated(family, window=5, sinks=2)
    ids, mask = padded_batch([90, 80])
    both = gatekv.KVCache(model, policy, 0.8, prompt_tokens=70)
    one = gatekv.KVCache(model, policy, 0.8)
    got = feed(model, both, ids, mask)
    wanted = torch.cat([feed(model, one, ids[:, :70], mask[:, :70]), feed(model, one, ids[:, 70:], mask)], 1)
    torch.testing.assert_close(got[mask.bool()], wanted[mask.bool()], rtol=1e-9, atol=1e-9)
    assert all(torch.equal(a, b) for a, b in zip(both.flags(), one.flags()))


def test_a_streaming_gate_takes_its_prompt_with_the_first_draft(family):
    model = gated(family, window=5, sinks=2)
    ids, _ = padded_batch([60])
    ids = torch.cat([ids, ids[:, 20:50]], 1)
    plain = model.generate(input_ids=ids, past_key_values=gatekv.KVCache(model, "gate"), **GREEDY)
    found = model.generate(
        input_ids=ids, past_key_values=gatekv.KVCache(model, "gate"), prompt_lookup_num_tokens=4, **GREEDY
    )
    assert torch.equal(plain, found)


def test_prompt_lookup_beside_sliding_layers():
    from test_modules import mixed

    model = mixed()
    ids, _ = padded_batch([40])
    ids = torch.cat([ids, ids[:, 5:30]], 1)
    wanted = model.generate(ids, prompt_lookup_num_tokens=4, **GREEDY)
    cache = gatekv.KVCache(model, "full")
    assert torch.equal(model.generate(ids, past_key_values=cache, prompt_lookup_num_tokens=4, **GREEDY), wanted)


def test_recording_holds_a_bounded_number_of_tokens():
    model = gated(window=4)
    cache = gatekv.KVCache(model, "gate")
    cache.activate_past_recording()
    for _ in range(60):
        feed(model, cache, torch.randint(1, VOCAB, (1, 20)))
    layer = cache.evicting()[0]
    assert len(layer.window) <= ROLLBACK + 4 + 20 + 16
    assert croppable(layer) >= ROLLBACK
    cache.crop(-ROLLBACK)
    assert len(layer.window) < 4 + 16, "what is certain is folded"


def test_what_cannot_be_taken_back_is_refused_and_nothing_is_lost():
    model = gated(window=4, gate="attention", context_window=5)
    ids, _ = padded_batch([80])
    cache = gatekv.KVCache(model, "gate")
    feed(model, cache, ids)
    flags = cache.flags()
    with pytest.raises(ValueError, match="activate_past_recording"):
        cache.crop(-30)
    assert cache.get_seq_length() == 80 and all(torch.equal(a, b) for a, b in zip(flags, cache.flags()))
    once = gatekv.KVCache(base_model(model), "keydiff", 0.5)
    feed(model, once, ids)
    with pytest.raises(ValueError, match="compressed prompt"):
        once.crop(-1)
    with pytest.raises(ValueError, match="minus the number"):
        once.crop(3)
    gatekv.KVCache(model, "gate").crop(-5)  # nothing fed: nothing to do, as in transformers
