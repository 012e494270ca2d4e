"""KVCache: bytes are real, flags tell the truth, batch operations, errors."""

import pytest
import torch
from conftest import gated, padded_batch, tiny

import gatekv
from gatekv.cache.kvcache import distinct_bytes
from gatekv.gates.calibration import Calibration
from gatekv.modules import wrappers
from gatekv.policies import SnapKV


@torch.no_grad()
def filled(model, policy, budget, lengths=(60, 50), **kwargs):
    ids, mask = padded_batch(list(lengths))
    cache = gatekv.KVCache(model, policy, budget, **kwargs)
    model(ids, attention_mask=mask, past_key_values=cache)
    return cache, ids, mask


def live_tensors_bytes():
    import gc

    gc.collect()
    seen = {}
    for obj in gc.get_objects():
        if type(obj) is torch.Tensor:  # torch.compile leaves tensors without storage behind
            seen[obj.untyped_storage().data_ptr()] = obj.untyped_storage().nbytes()
    return sum(seen.values())


@pytest.mark.parametrize("policy", ["snapkv", "random", "random+global", "keydiff+ada", "gate+global"])
def test_bytes_are_counted_from_storages_and_follow_the_flags(policy):
    model = gated(window=4, sinks=2, dtype=torch.float32)
    cache, _, mask = filled(model, policy, 0.75, (200, 180))
    memory = cache.memory()
    kept = sum(int(f.sum()) for f in cache.flags())
    assert kept <= 0.75 * int(mask.sum()) * 3 * 2 + 6
    payload = kept * 2 * 8 * 4
    assert memory["full_bytes"] == int(mask.sum()) * 3 * 2 * 2 * 8 * 4
    pages = sum(int((-(-f.sum(-1) // 16)).sum()) for f in cache.flags())
    per_page = 16 * (2 * 8 * 4 + 4) + 5 * 4  # keys, values, positions; owner, ordinal and three table entries
    assert payload <= memory["bytes"] <= pages * per_page + 2 * 1500  # a layer's tail, counts and row starts
    assert memory["ratio"] == memory["bytes"] / memory["full_bytes"]


def test_memory_is_really_given_back():
    model = tiny(dtype=torch.float32, head_dim=32)
    before = live_tensors_bytes()
    cache, *_ = filled(model, "random", 0.25, (400, 400), block_size=8)
    held = live_tensors_bytes() - before
    assert held <= cache.memory()["bytes"] * 1.05 + 20_000, "something beside the cache still holds the prompt"
    assert cache.memory()["ratio"] < 0.29


def test_distinct_bytes_counts_a_storage_once_and_whole():
    base = torch.zeros(100)
    assert distinct_bytes([base, base[:10], base.view(10, 10)]) == 400


def test_flags_have_the_shape_of_everything_seen():
    cache, ids, mask = filled(gated(window=4), "gate", None)
    for f in cache.flags():
        assert f.shape == (2, 3, 60) and f.dtype == torch.bool
        assert not f[1, :, :10].any(), "pads are never kept"
        assert f[0, :, :4].all() and f[1, :, 10:14].all(), "sinks always are"
        assert f[..., -3:].all(), "and so is the window"
    assert 0.2 < torch.stack(cache.flags()).float().mean() < 0.9


def test_flags_without_generating(family):
    model = gated(family, window=4, sinks=2)
    ids, mask = padded_batch([40, 23])
    kept = gatekv.flags(model, ids, mask, "gate+global", 0.5)
    assert kept.shape == (2, 2, 3, 40) and kept.dtype == torch.bool
    assert not kept[:, 1, :, :17].any() and kept[:, 0, :, :2].all() and kept[:, :, :, -4:].all()
    assert kept[:, 0].float().mean().item() == pytest.approx(0.5, abs=0.01)
    assert kept[:, 1].float().mean().item() * 40 / 23 == pytest.approx(0.5, abs=0.03)
    cache = gatekv.KVCache(model, "gate+global", 0.5)
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
    assert torch.equal(kept, torch.stack(cache.flags()))
    with pytest.raises(ValueError, match="budget"):
        gatekv.flags(model, ids, mask, "snapkv")


def test_eviction_goes_on_while_decoding():
    model = gated(window=4, sinks=1)
    ids, _ = padded_batch([30])
    ratios = []
    for decode in ("evict", "keep"):
        cache = gatekv.KVCache(model, "gate+global", 0.5, decode=decode)
        model.generate(input_ids=ids, past_key_values=cache, max_new_tokens=100, do_sample=False)
        later = torch.stack(cache.flags())[..., 30:-4].float().mean().item()
        ratios.append(later)
    assert ratios[0] < 0.8 and ratios[1] == 1.0


def test_positions_follow_tokens_seen_not_stored():
    cache, *_ = filled(tiny(), "random", 0.75)
    assert cache.get_seq_length() == 60 and cache.get_mask_sizes(5, 0) == (65, 0)


@pytest.mark.parametrize("policy,budget", [("gate", None), ("gate+global", 0.6), ("random+global", 0.8)])
@pytest.mark.parametrize("window", [4, 16])
def test_reorder_repeat_and_select_follow_the_rows(policy, budget, window):
    model = gated(window=window, gate="attention", context_window=6)
    cache, ids, mask = filled(model, policy, budget)
    mask = torch.cat([mask, torch.ones(2, 3, dtype=torch.long)], 1)
    with torch.no_grad():  # tokens that the gate may not have read yet
        model(ids[:, -3:], attention_mask=mask, past_key_values=cache)
    twin = cache.snapshot()
    twin.reorder_cache(torch.tensor([1, 0]))
    more = cache.snapshot()
    more.batch_repeat_interleave(2)
    one = cache.snapshot()
    one.batch_select_indices(torch.tensor([1]))
    token = torch.tensor([[5], [6]])
    mask2 = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
    position = mask.sum(-1, keepdim=True)
    with torch.no_grad():
        plain = model(token, attention_mask=mask2, position_ids=position, past_key_values=cache.snapshot()).logits
        swapped = model(
            token.flip(0), attention_mask=mask2.flip(0), position_ids=position.flip(0), past_key_values=twin
        ).logits  # fmt: skip
        doubled = model(
            token.repeat_interleave(2, 0), attention_mask=mask2.repeat_interleave(2, 0),
            position_ids=position.repeat_interleave(2, 0), past_key_values=more,
        ).logits  # fmt: skip
        single = model(token[1:], attention_mask=mask2[1:], position_ids=position[1:], past_key_values=one).logits
    torch.testing.assert_close(swapped.flip(0), plain)
    torch.testing.assert_close(doubled, plain.repeat_interleave(2, 0))
    torch.testing.assert_close(single, plain[1:])


def test_beam_search_with_a_full_budget_equals_plain(family):
    model = tiny(family)
    ids, mask = padded_batch([30, 22])
    options = dict(attention_mask=mask, max_new_tokens=10, num_beams=3, do_sample=False)
    wanted = model.generate(ids, **options)
    got = model.generate(ids, past_key_values=gatekv.KVCache(model, "full"), **options)
    assert torch.equal(got, wanted)


@pytest.mark.covering(1)  # test_families has every family
@pytest.mark.parametrize("gate", ["mlp", "attention"])
@pytest.mark.parametrize(
    "search",
    [dict(num_beams=4, num_return_sequences=2), dict(do_sample=True, top_k=20, num_return_sequences=3)],
    ids=["beams", "samples"],
)
def test_generation_that_evicts_equals_generation_without_a_cache(family, gate, search):
    """The reference reads the whole sequence anew for every token, with the flags as a mask: the parallel form."""
    model = gated(family, window=4, sinks=2, gate=gate, context_window=6)
    ids, mask = padded_batch([30, 22])
    options = dict(attention_mask=mask, max_new_tokens=40, output_scores=True, return_dict_in_generate=True, **search)
    torch.manual_seed(5)
    with gatekv.parallel(model):
        wanted = model.generate(ids, use_cache=False, **options)
    torch.manual_seed(5)
    cache = gatekv.KVCache(model, "gate")
    got = model.generate(ids, past_key_values=cache, **options)
    assert torch.equal(got.sequences, wanted.sequences)
    torch.testing.assert_close(torch.stack(got.scores), torch.stack(wanted.scores), rtol=0, atol=1e-9)
    real = torch.cat([mask, mask.new_ones(2, 39)], 1).repeat_interleave(cache.flags()[0].shape[0] // 2, 0)
    kept = torch.stack(cache.flags()).sum() / (real.sum() * len(cache.flags()) * cache.flags()[0].shape[1])
    assert 0.3 < kept < 0.8, "the search went through evictions"
    torch.manual_seed(5)
    plain = model.generate(ids, **options)
    assert not torch.equal(plain.sequences, wanted.sequences), "and they matter"


def test_fork_shares_nothing_that_changes():
    model = gated(window=4)
    cache, ids, mask = filled(model, "gate", None, (40, 40))
    flags = [f.clone() for f in cache.flags()]
    twin = cache.snapshot()
    with torch.no_grad():
        for _ in range(40):
            model(torch.ones(2, 1, dtype=torch.long), past_key_values=twin)
    assert cache.get_seq_length() == 40 and twin.get_seq_length() == 80
    assert all(torch.equal(a, b) for a, b in zip(flags, cache.flags()))


def test_a_shared_prefill_is_scored_once_until_it_grows(monkeypatch):
    calls, model = [], gated(window=4)
    score = SnapKV.score
    monkeypatch.setattr(SnapKV, "score", lambda self, view: calls.append(view.layer_idx) or score(self, view))
    ids, mask = padded_batch([60, 50])
    watching = gatekv.KVCache.undecided(model)
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=watching)
        half = watching.decide("snapkv", 0.85, turns=True)
        watching.decide("snapkv+ada", 0.7)
        assert calls == [0, 1]
        watching.decide(SnapKV(window=8), 0.75)
        assert calls == [0, 1] * 2
        more = torch.cat([mask, torch.ones(2, 40, dtype=torch.long)], 1)
        model(torch.randint(1, 90, (2, 40)), attention_mask=more, past_key_values=half)
        half.compress()  # of its own turn, not of the prompt it came from
        model(torch.randint(1, 90, (2, 40)), attention_mask=more, past_key_values=watching)
        watching.decide("snapkv", 0.75)
        assert calls == [0, 1] * 4
        watching.batch_select_indices(torch.tensor([1]))
        assert len(watching.decide("snapkv", 0.75).flags()[0]) == 1


@pytest.mark.parametrize(
    "policy,budget", [("snapkv", 0.75), ("gate+global", 0.5), ("keydiff+ada", 0.5), ("full", None)]
)
def test_shared_prefill_decides_as_a_prefill_of_its_own(policy, budget):
    model = gated(window=4, gate="attention", context_window=6)
    ids, mask = padded_batch([60, 50])
    watching = gatekv.KVCache.undecided(model)
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=watching)
    shared = watching.decide(policy, budget)
    own, *_ = filled(model, policy, budget)
    assert all(torch.equal(a, b) for a, b in zip(shared.flags(), own.flags()))
    next_mask = torch.cat([mask, torch.ones(2, 20, dtype=torch.long)], 1)
    more = torch.randint(1, 90, (2, 20))
    with torch.no_grad():
        a, b = (model(more, attention_mask=next_mask, past_key_values=c).logits for c in (shared, own))
    torch.testing.assert_close(a, b)


def test_l2_skips_layers_and_the_others_pay():
    model = tiny()
    scorer = gatekv.policies.L2Norm(skip_layers=(0,))
    cache, *_ = filled(model, scorer, 0.75, (60,))
    assert cache.flags()[0].all() and cache.flags()[1].sum(-1).flatten().tolist() == [30] * 3
    with pytest.raises(ValueError, match="unreachable"):
        filled(model, scorer, 0.25, (60,), strict=True)


def test_reset_starts_over():
    model = gated(window=4)
    cache, ids, mask = filled(model, "gate+global", 0.5, (40,))
    first = [f.clone() for f in cache.flags()]
    cache.reset()
    assert cache.get_seq_length() == 0
    with torch.no_grad():
        model(ids, past_key_values=cache)
    assert all(torch.equal(a, b) for a, b in zip(first, cache.flags()))


def test_print_says_what_it_is():
    cache, *_ = filled(tiny(), "random+ada", 0.75)
    assert "Random x Ada" in repr(cache) and "budget=0.75" in repr(cache) and "bytes=" in repr(cache)


def test_errors_name_the_cure():
    model = tiny()
    with pytest.raises(ValueError, match="needs an adapter"):
        gatekv.KVCache(model, "gate")
    with pytest.raises(ValueError, match="Known: dense, sparse"):
        gatekv.KVCache(model, "keydiff", 0.5, prefill="spares")
    with pytest.raises(ValueError, match="needs a causal gate"):
        gatekv.KVCache(model, "keydiff", 0.5, prefill="sparse")
    with pytest.raises(ValueError, match="calibrat"):
        gatekv.KVCache(gated(), "gate", 0.25)
    with pytest.raises(ValueError, match="below the 36 that sinks . window protect"):
        filled(model, "random", 0.25, (60, 50), strict=True)
    with pytest.raises(ValueError, match="prompt_tokens=N"):
        ids, _ = padded_batch([40])
        cache = gatekv.KVCache(model, "keydiff", 0.5)
        model(ids[:, :20], past_key_values=cache)
        model(ids[:, 20:], past_key_values=cache)
    with pytest.raises(ValueError, match="cannot take back 3 tokens"):
        filled(model, "keydiff", 0.5)[0].crop(-3)
    with pytest.raises(ValueError, match="decide.. needs a cache made by"):
        filled(model, "keydiff", 0.5)[0].decide("keydiff", 0.5)
    paged = tiny()
    paged.set_attn_implementation("paged|eager")
    with pytest.raises(ValueError, match="has no mask function"):
        gatekv.KVCache(paged, "keydiff", 0.5)
    with pytest.raises(ValueError, match="Linear is no transformers model"):
        gatekv.KVCache(torch.nn.Linear(2, 2), "keydiff", 0.5)


def test_streaming_budget_below_protection_is_refused():
    model = gated(window=40, sinks=4)
    for w in wrappers(model):
        w.calibrations["default"] = Calibration([1.0], [0.0, 1.0], [[1.0, -1.0]])
    with pytest.raises(ValueError, match="below the 44"):
        filled(model, "gate", 0.25, (60,), strict=True)


def test_chunked_prefill_with_prompt_tokens_equals_one_call():
    model = gated(window=4, sinks=2)
    ids, _ = padded_batch([80])
    runs = []
    for chunk in (None, 13):
        cache = gatekv.KVCache(model, "snapkv+ada", 0.75, prompt_tokens=80)
        out = model.generate(
            input_ids=ids, past_key_values=cache, max_new_tokens=12, do_sample=False, prefill_chunk_size=chunk
        )
        runs.append((out, cache.flags()))
    assert torch.equal(runs[0][0], runs[1][0])
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1], runs[1][1]))


@pytest.mark.parametrize("window,decode,calls", [(16, "evict", 1 + 48 // 16), (4, "evict", 1 + 48), (16, "keep", 1)])
def test_the_gate_reads_sixteen_tokens_at_a_time_where_the_window_allows(monkeypatch, window, decode, calls):
    model = gated(window=window, sinks=2)
    ids, _ = padded_batch([60])
    cache = gatekv.KVCache(model, "gate+global", 0.5, decode=decode)
    gate, read = type(wrappers(model)[0].gate()), []
    forward = gate.forward
    monkeypatch.setattr(
        gate, "forward", lambda self, h, *a, **k: (read.append(h.shape[1]), forward(self, h, *a, **k))[1]
    )
    with torch.no_grad():
        model(ids, past_key_values=cache)
        for i in range(48):
            model(ids[:, i : i + 1], past_key_values=cache)
    assert len(read) == 2 * calls and sum(read) == 2 * (60 + (48 if decode == "evict" else 0))
