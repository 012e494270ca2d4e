"""The law (design): the parallel form that is trained equals the recurrent form that is deployed; a full budget, through
the same path, is the plain model."""

import pytest
import torch
from conftest import (
    assert_close,
    dense_reference,
    gated,
    padded_batch,
    parallel_logits,
    plain_logits,
    recurrent_logits,
    tiny,
)

import gatekv
from gatekv.attention import live_mask, sink_tokens
from gatekv.gates.calibration import Calibration
from gatekv.modules import base_model, wrappers
from gatekv.policies import D2O, ElasticCache

CHUNKS = {"whole": [], "odd": [7, 30, 31], "fine": list(range(5, 40, 5)), "tokens": list(range(20, 60))}

STREAMING = ("h2o", "tova", "streaming_llm")  # under decode="keep" they decide once, like the others
MERGING = ("d2o", "elastic", "snapkv+merge_near")  # they rewrite what is kept: no parallel form


@pytest.mark.parametrize("gate", ["linear", "mlp", "key_mlp", "attention"])
@pytest.mark.parametrize("window", [1, 16, 33])
@pytest.mark.parametrize("cuts", list(CHUNKS))
def test_parallel_equals_recurrent(family, gate, window, cuts):
    model = gated(family, gate=gate, window=window, sinks=2, context_window=9)
    ids, mask = padded_batch([60, 41, 17])
    wanted = parallel_logits(model, ids, mask)
    cache = gatekv.KVCache(model, "gate")
    got = recurrent_logits(model, ids, mask, cache, CHUNKS[cuts])
    assert_close(got, wanted, mask)
    dense = plain_logits(model, ids, mask)
    assert (wanted - dense)[mask.bool()].abs().max() > 1e-3, "the gates evicted nothing: the test would not notice"


@pytest.mark.parametrize("relaxation", ["log", "ste"])
def test_hard_threshold_of_both_relaxations(family, relaxation):
    model = gated(family, relaxation=relaxation, window=4, sinks=1, threshold=0.7)
    ids, mask = padded_batch([40, 23])
    wanted = parallel_logits(model, ids, mask, "ste" if relaxation == "ste" else "hard")
    got = recurrent_logits(model, ids, mask, gatekv.KVCache(model, "gate"), [13, 14])
    assert_close(got, wanted, mask)


def test_float32(family):
    model = gated(family, torch.float32, window=5)
    ids, mask = padded_batch([50, 31])
    wanted = parallel_logits(model, ids, mask)
    got = recurrent_logits(model, ids, mask, gatekv.KVCache(model, "gate"), [11, 12, 40])
    assert_close(got, wanted, mask, torch.float32)


@pytest.mark.covering(1)  # a policy does not know the family
@pytest.mark.parametrize("policy,budget", [("gate", None), ("gate+global", 0.5), ("gate+ada", 0.5), ("snapkv+ada", 0.75),
                                           ("keydiff", 0.5), ("random+global", 0.8), ("sinks_recent", 0.8),
                                           ("keydiff+ada+pyramid", 0.6), ("snapkv+pyramid", 0.9), ("h2o", 0.6),
                                           ("tova", 0.6), ("streaming_llm", 0.6), ("snapkv+think", 0.8),
                                           ("nacl", 0.6), ("nacl+ada", 0.6), ("fastgen", 0.6), ("fastgen", None),
                                           (D2O(skip_layers=()), 0.6), (D2O(skip_layers=(-1,)), 0.8),
                                           (ElasticCache(window=8), 0.6), ("h2o+variance", 0.6),
                                           ("snapkv+merge_near", 0.85), ("keydiff+merge_similar", 0.6), ("snapkv+qaq", 0.8)])  # fmt: skip
def test_each_padded_row_is_its_solo_run(family, policy, budget):
    model = gated(family, window=6, sinks=2)
    lengths = [60, 50, 45]
    ids, mask = padded_batch(lengths)
    both = model.generate(
        input_ids=ids, attention_mask=mask, past_key_values=(c := gatekv.KVCache(model, policy, budget)),
        max_new_tokens=20, do_sample=False,
    )  # fmt: skip
    for row, length in enumerate(lengths):
        solo_cache = gatekv.KVCache(model, policy, budget)
        solo = model.generate(
            input_ids=ids[row : row + 1, -length:], past_key_values=solo_cache, max_new_tokens=20, do_sample=False
        )
        assert torch.equal(both[row, ids.shape[1] :], solo[0, length:])
        for mine, alone in zip(c.flags(), solo_cache.flags()):
            pads = ids.shape[1] - length
            assert torch.equal(mine[row, :, pads:], alone[0]) and not mine[row, :, :pads].any()


@pytest.mark.covering(1)  # a policy does not know the family
@pytest.mark.parametrize("policy", ["full", "gate", "gate+global", "gate+ada", "snapkv", "snapkv+ada", "keydiff", "random+global",
                                    "value_norm", "sinks_recent", "keydiff+pyramid", "nacl",
                                    "fastgen", *MERGING, *STREAMING])  # fmt: skip
def test_full_budget_is_the_plain_model(family, policy):
    model = gated(family, window=6)
    for w in wrappers(model):
        w.calibrations["default"] = Calibration([1.0], [0.0, 1.0], [[9.0, -9.0]])
    ids, mask = padded_batch([50, 20])
    wanted = base_model(model).generate(input_ids=ids, attention_mask=mask, max_new_tokens=24, do_sample=False)
    decode = "keep" if policy in (*STREAMING, *MERGING) else None
    cache = gatekv.KVCache(model, policy, 1.0, decode=decode)
    got = model.generate(
        input_ids=ids, attention_mask=mask, past_key_values=cache, max_new_tokens=24, do_sample=False
    )  # fmt: skip
    assert torch.equal(got, wanted)
    assert type(cache.layers[0]).__name__ == "KVLayer" and len(cache.layers[0].store.pages) > 0, (
        "it must take the same path"
    )
    full, mask_full = got, torch.cat([mask, torch.ones(2, 24, dtype=torch.long)], 1)
    cache = gatekv.KVCache(model, policy, 1.0, decode=decode)
    logits = recurrent_logits(model, full, mask_full, cache, [50, 51, 60])
    plain = plain_logits(model, full, mask_full)
    assert ((logits - plain)[mask_full.bool()].abs().max() / plain.abs().max()) <= 1e-12


def masked_reference(model, ids, flags, window, prompt):
    """Dense logits under the law: queries after the prompt see the prompt only where flagged (or in their window)."""
    queries = torch.arange(ids.shape[1])
    return dense_reference(
        model, ids, [live_mask(queries, queries, f, window) | (queries[:, None] < prompt) for f in flags]
    )


@pytest.mark.covering(1)  # a policy does not know the family
@pytest.mark.parametrize("policy", ["snapkv", "snapkv+ada", "keydiff+global", "random", "value_norm+ada", "gate+global",
                                    "gate+ada", "keydiff+ada+pyramid", "nacl", "fastgen", "h2o+variance",
                                    *STREAMING])  # fmt: skip
def test_one_shot_policies_mask_the_prompt_for_later_queries(family, policy):
    model = gated(family, window=5, sinks=2)
    ids, mask = padded_batch([70])
    prompt = 50
    decode = "keep" if policy in (*STREAMING, "h2o+variance") else None
    cache = gatekv.KVCache(model, policy, 0.75, decode=decode)
    recurrent_logits(model, ids[:, :prompt], mask[:, :prompt], cache, [])
    learned = policy.startswith("gate")
    flags = [torch.ones(1, 3, 70, dtype=torch.bool) for _ in range(2)]
    for f, layer in zip(flags, cache.evicting()):
        f[..., :prompt] = layer.stage.held(layer)
    if learned:  # the window and what follows are judged as they leave it: read off a cache that saw everything
        cache_all = gatekv.KVCache(model, policy, 0.75)
        recurrent_logits(model, ids, mask, cache_all, [prompt])
        window = 5
        for f, layer in zip(flags, cache_all.evicting()):
            held = layer.stage.held(layer)
            f[..., prompt - window + 1 :] = held[..., prompt - window + 1 :]
            f[..., 70 - window + 1 :] = True
    cache = gatekv.KVCache(model, policy, 0.75, decode=decode)
    got = recurrent_logits(model, ids, mask, cache, [prompt, prompt + 1, prompt + 9])
    wanted = masked_reference(model, ids, flags, 5 if learned else 0, prompt)
    assert_close(got, wanted, mask)
    assert (got - plain_logits(model, ids, mask))[mask.bool()].abs().max() > 1e-3


def test_streaming_budget_does_not_depend_on_the_calls(family):
    model = gated(family, window=6, sinks=2)
    for w in wrappers(model):
        w.calibrations["default"] = Calibration([1.0, 0.25], [0.0, 0.5, 1.0], [[3.0, 0.0, -3.0], [2.0, -0.5, -3.0]])
    ids, mask = padded_batch([90, 64])
    runs, cuts = [], ([], [33, 35, 70])
    for cut in cuts:
        cache = gatekv.KVCache(model, "gate", 0.4, prompt_tokens=ids.shape[1])
        runs.append(recurrent_logits(model, ids, mask, cache, cut))
    assert_close(runs[0], runs[1], mask)
    assert cache.memory()["ratio"] < 0.9


@pytest.mark.parametrize("policy", ["gate+global", "gate+uniform"])
def test_sparse_prefill_then_exact_trim(policy):
    model = gated(window=6, sinks=2)
    for w in wrappers(model):
        w.calibrations["default"] = Calibration([1.0], [0.0, 0.5, 1.0], [[6.0, 0.0, -6.0]])
    ids, mask = padded_batch([96])
    runs = []
    for cuts in ([], [31, 64]):
        cache = gatekv.KVCache(model, policy, 0.5, prefill="sparse", prompt_tokens=96)
        runs.append(recurrent_logits(model, ids, mask, cache, cuts))
        held = torch.stack(cache.flags()).sum().item()
        assert held <= 0.5 * 96 * 6
        assert held >= 0.4 * 96 * 6
    assert_close(runs[0], runs[1], mask)


@pytest.mark.parametrize("cuts", [[], [20], [20, 45, 47]])
def test_sparse_prefill_that_keeps_nothing_before_the_trim(cuts):
    model = gated(window=6, sinks=0)
    for w in wrappers(model):
        w.calibrations["default"] = Calibration([1.0], [0.0, 0.5, 1.0], [[1e3, 1e3, 1e3]])
    ids, mask = padded_batch([60])
    cache = gatekv.KVCache(model, "gate+global", 0.5, prefill="sparse", prompt_tokens=60)
    recurrent_logits(model, ids, mask, cache, cuts)
    for f in cache.flags():
        assert f[..., -5:].all() and not f[..., :54].any(), "only the window was left to keep"


def test_another_cache_or_none_is_bit_identical(family):
    plain = tiny(family)
    ids, mask = padded_batch([40, 25])
    with torch.no_grad():
        before = plain(ids, attention_mask=mask).logits
        loss = plain(ids, attention_mask=mask, use_cache=False).logits
        tokens = plain.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
        gatekv.KVCache(plain, "snapkv", 0.5)
        assert torch.equal(plain(ids, attention_mask=mask).logits, before)
        assert torch.equal(plain(ids, attention_mask=mask, use_cache=False).logits, loss)
        assert torch.equal(plain.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False), tokens)
        names = [n for n, _ in plain.named_modules()]
        gatekv.detach(plain)
        assert [n for n, _ in plain.named_modules()] == names and not wrappers(plain)
        assert plain.config._attn_implementation == "sdpa"
        assert torch.equal(plain(ids, attention_mask=mask).logits, before)


def test_eager_implementation_keeps_the_law_too(family):
    model = tiny(family, torch.float32)  # in float64 the eager mask overflows on pads: transformers' own, not ours
    model.set_attn_implementation("eager")
    ids, mask = padded_batch([40, 25])
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        before = model(ids, attention_mask=mask, position_ids=positions).logits
    peft = gated(model=model, dtype=torch.float32, window=5)
    wanted = parallel_logits(peft, ids, mask)
    got = recurrent_logits(peft, ids, mask, gatekv.KVCache(peft), [12])
    assert_close(got, wanted, mask, torch.float32)
    with torch.no_grad():
        after = peft(ids, attention_mask=mask, position_ids=positions).logits
        assert torch.equal(after[mask.bool()], before[mask.bool()])


def test_sinks_are_the_first_real_tokens():
    valid = torch.tensor([[False, True, True, True], [True, True, True, True]])
    assert sink_tokens(valid, 2).tolist() == [[False, True, True, False], [True, True, False, False]]


@pytest.mark.parametrize("gate", ["linear", "key_mlp", "attention"])
@pytest.mark.parametrize("window", [0, 5])
def test_flags_that_act_after_the_prompt(family, gate, window):
    """prefill="dense", later tokens kept: the parallel form with a split."""
    model = gated(family, gate=gate, window=window, sinks=2, context_window=9)
    ids, mask = padded_batch([60, 41, 17 + 13])
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad(), gatekv.parallel(model, threshold=0.3, split=40):
        wanted = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        judged = [w.recorded for w in wrappers(model)]
    assert all(j.logits.shape == (3, 3, 40) for j in judged)
    spec = wrappers(model)[0].specs["default"]
    keep = torch.stack([(j.logits > 0.3) & j.valid[:, None] for j in judged])
    protected = sink_tokens(judged[0].valid, spec.sinks) | (torch.arange(40) >= 40 - window) & judged[0].valid
    cache = gatekv.KVCache(model, "gate+global", 0.99, decode="keep")
    cache.config.policy.rule.keep = lambda *_: keep | protected[:, None]
    got = recurrent_logits(model, ids, mask, cache, [40, 41, 55])
    assert_close(got, wanted, mask)
    assert (wanted - plain_logits(model, ids, mask))[:, 41:][mask[:, 41:].bool()].abs().max() > 1e-3


@pytest.mark.parametrize("mask_prompt", [True, False])
@pytest.mark.parametrize("window", [0, 5])
def test_prompt_gates_equal_their_one_shot_parallel_form(family, mask_prompt, window):
    model = gated(family, gate="attention", context="prompt", mask_prompt=mask_prompt, window=window, sinks=2)
    ids, mask = padded_batch([60, 41, 30])
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad(), gatekv.parallel(model, split=40):
        wanted = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    got = recurrent_logits(model, ids, mask, gatekv.KVCache(model, "gate"), [40, 41, 55])
    assert_close(got, wanted, mask)
    dense = plain_logits(model, ids, mask)
    prompt = (got - dense)[:, :40][mask[:, :40].bool()].abs().max()
    assert (prompt > 1e-3) == mask_prompt
    with pytest.raises(ValueError, match="in one call"):
        recurrent_logits(model, ids, mask, gatekv.KVCache(model, "gate", prompt_tokens=40), [20, 40])
    with pytest.raises(ValueError, match="prefill='dense'"):
        gatekv.KVCache(model, "gate+global", 0.5, prefill="sparse")


def test_a_full_budget_under_a_prompt_gate_is_the_plain_model(family):
    model = gated(family, gate="attention", context="prompt", window=4)
    ids, mask = padded_batch([40, 23])
    got = recurrent_logits(model, ids, mask, gatekv.KVCache(model, "gate+global", 1.0), [30, 31])
    assert (got - plain_logits(model, ids, mask))[mask.bool()].abs().max() <= 1e-12 * got.abs().max()
