"""What `generate` does with a KVCache: sampling, several sequences, turns, dtypes, and clear words where it cannot."""

import pytest
import torch
from conftest import gated, padded_batch, tiny

import gatekv
from gatekv.modules import base_model

GREEDY = dict(max_new_tokens=12, do_sample=False)


def test_sampling_with_a_full_budget_is_plain_sampling(family):
    model = tiny(family)
    ids, mask = padded_batch([30, 20])
    options = dict(attention_mask=mask, max_new_tokens=15, do_sample=True, temperature=0.8, top_k=20)
    torch.manual_seed(3)
    wanted = model.generate(ids, **options)
    torch.manual_seed(3)
    got = model.generate(ids, past_key_values=gatekv.KVCache(model, "full"), **options)
    assert torch.equal(got, wanted)


def test_several_return_sequences_share_a_prompt():
    model = gated(window=4)
    ids, _ = padded_batch([40])
    cache = gatekv.KVCache(model, "gate+global", 0.6)
    torch.manual_seed(0)
    out = model.generate(
        input_ids=ids, past_key_values=cache, do_sample=True, max_new_tokens=8, num_return_sequences=3
    )  # fmt: skip
    assert out.shape == (3, 48) and cache.flags()[0].shape[0] == 3
    assert all(torch.equal(f[0, :, :36], f[1, :, :36]) for f in cache.flags()), "the prompt was judged alike"


@torch.no_grad()
def test_a_conversation_over_one_cache_is_one_long_parallel_pass(family):
    model = gated(family, window=5, sinks=2)
    ids, _ = padded_batch([80])
    cache = gatekv.KVCache(model, "gate")
    turns = [model(ids[:, a:b], past_key_values=cache).logits for a, b in ((0, 33), (33, 40), (40, 41), (41, 80))]
    with gatekv.parallel(model):
        wanted = model(ids, use_cache=False).logits
    torch.testing.assert_close(torch.cat(turns, 1), wanted, rtol=1e-9, atol=1e-9)


def test_generate_continues_a_cache_that_was_filled_before():
    model = gated(window=5)
    ids, _ = padded_batch([50])
    at_once = model.generate(input_ids=ids, past_key_values=gatekv.KVCache(model, "gate"), **GREEDY)
    cache = gatekv.KVCache(model, "gate")
    with torch.no_grad():
        model(ids[:, :31], past_key_values=cache)
    later = model.generate(input_ids=ids, past_key_values=cache, **GREEDY)
    assert torch.equal(at_once, later)


def test_a_question_after_the_prompt_is_not_compressed():
    model = tiny()
    ids, _ = padded_batch([60])
    cache = gatekv.KVCache(model, "keydiff", 0.5)
    with torch.no_grad():
        model(ids[:, :40], past_key_values=cache)
        model(ids[:, 40:], past_key_values=cache)
    for f in cache.flags():
        assert (f[..., :40].sum(-1) == 20).all() and f[..., 40:].all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("policy,budget", [("gate", None), ("gate+global", 0.5), ("snapkv+ada", 0.8)])
def test_half_precision_holds_its_own_dtype(dtype, policy, budget):
    model = gated(window=4, dtype=torch.float32)
    base_model(model).to(dtype)
    ids, mask = padded_batch([50, 44])
    cache = gatekv.KVCache(model, policy, budget)
    out = model.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, **GREEDY)
    assert out.shape == (2, 62)
    layer = cache.evicting()[0]
    assert layer.window.keys.dtype == layer.store.pages.keys.dtype == dtype


def test_full_budget_matches_plain_tokens_in_bfloat16_closely():
    model = tiny(dtype=torch.bfloat16)
    ids, mask = padded_batch([50, 44])
    with torch.no_grad():
        plain = model(ids, attention_mask=mask, use_cache=False).logits.float()
        cached = model(ids, attention_mask=mask, past_key_values=gatekv.KVCache(model, "full")).logits.float()
    assert (plain - cached)[mask.bool()].abs().max() <= 0.05 * plain.abs().max()


def test_rollback_is_refused_in_one_line():
    model = tiny()
    ids, _ = padded_batch([40])
    with pytest.raises(ValueError, match="prompt_tokens=N"):
        model.generate(ids, past_key_values=gatekv.KVCache(model, "keydiff", 0.5), prompt_lookup_num_tokens=3, **GREEDY)


def test_disabling_the_adapter_in_use_is_noticed():
    model = gated(window=4)
    ids, _ = padded_batch([30])
    cache = gatekv.KVCache(model, "gate")
    with torch.no_grad():
        model(ids, past_key_values=cache)
        with model.disable_adapter(), pytest.raises(ValueError, match="adapter was disabled"):
            model(ids[:, :1], past_key_values=cache)


def test_streaming_memory_stays_bounded_by_what_is_kept():
    model = gated(window=6, sinks=2)
    ids, _ = padded_batch([40])
    cache = gatekv.KVCache(model, "gate")
    model.generate(input_ids=ids, past_key_values=cache, max_new_tokens=300, do_sample=False)
    for layer in cache.evicting():
        assert len(layer.window) <= 6 + 16, "the dense tail is folded"
        assert len(layer.store.pages) < 340 * 3
    assert cache.get_seq_length() == 339
