"""More than one prompt: turns that are compressed, snapshots, caches on disk, streams that go on and on."""

import pytest
import torch
from conftest import VOCAB, dense_reference, gated, padded_batch, tiny
from safetensors.torch import load_file, save_file

import gatekv
from gatekv.attention import live_mask
from gatekv.cache.kvcache import distinct_bytes
from gatekv.modules import base_model

POLICIES = [
    ("gate", None),
    ("gate+global", 0.5),
    ("gate+ada", 0.5),
    ("snapkv+ada", 0.75),
    ("keydiff", 0.5),
    ("full", None),
]


@torch.no_grad()
def feed(model, cache, ids):
    return model(ids, past_key_values=cache).logits


@pytest.mark.parametrize("policy", ["snapkv+ada", "keydiff", "random+global", "gate+global", "gate+ada"])
def test_each_turn_is_compressed_like_a_prompt(family, policy):
    model = gated(family, window=5, sinks=2)
    ids, _ = padded_batch([180])
    cache = gatekv.KVCache(model, policy, 0.75, turns=True)
    ends, got = [60, 120, 180], []
    live = [torch.ones(1, 3, 180, 180, dtype=torch.bool) for _ in range(2)]
    for start, end in zip([0, *ends], ends):
        cuts = [start, end] if start == 0 else [start, start + 20, start + 21, end]
        got += [feed(model, cache, ids[:, a:b]) for a, b in zip(cuts, cuts[1:])]
        assert all(f[..., start:].all() for f in cache.flags()) or start == 0, "a turn stays whole until it is over"
        if start:
            cache.compress()
        for mask, flags in zip(live, cache.flags()):
            mask[:, :, end:, :end] = flags[:, :, None]
        kept = torch.stack(cache.flags()).sum().item()
        assert kept == pytest.approx(0.75 * end * 6, abs=6)
    wanted = dense_reference(model, ids, live)
    torch.testing.assert_close(torch.cat(got, 1), wanted, rtol=1e-9, atol=1e-9)
    assert (wanted - dense_reference(model, ids, [torch.ones_like(m) for m in live])).abs().max() > 1e-3


def test_compress_says_what_it_needs():
    model = gated(window=4)
    ids, _ = padded_batch([60])
    cache = gatekv.KVCache(model, "keydiff", 0.5)
    feed(model, cache, ids)
    with pytest.raises(ValueError, match="turns=True"):
        cache.compress()
    cache = gatekv.KVCache(model, "snapkv", 0.75, turns=True, strict=True)
    feed(model, cache, ids)
    with pytest.raises(ValueError, match="nothing has been fed"):
        cache.compress()
    feed(model, cache, ids[:, :10])
    before = cache.flags()
    with pytest.raises(ValueError, match="below the 10"):
        cache.compress()
    assert all(torch.equal(a, b) for a, b in zip(before, cache.flags())), "a refused turn stays whole"
    with pytest.raises(ValueError, match="evicts as it goes"):
        gatekv.KVCache(model, "gate", turns=True)


@pytest.mark.parametrize("policy,budget", POLICIES)
def test_several_questions_from_one_snapshot(policy, budget):
    model = gated(window=16, sinks=2, gate="attention", context_window=6)
    ids, _ = padded_batch([60])
    questions = torch.randint(1, VOCAB, (3, 30), generator=torch.Generator().manual_seed(5))
    cache = gatekv.KVCache(model, policy, budget)
    feed(model, cache, ids)
    snapshot = cache.snapshot()
    for q in questions:
        alone = gatekv.KVCache(model, policy, budget)
        feed(model, alone, ids)
        wanted = torch.cat([feed(model, alone, q[None, i : i + 1]) for i in range(30)], 1)
        got = torch.cat([feed(model, cache, q[None, i : i + 1]) for i in range(30)], 1)
        torch.testing.assert_close(got, wanted)
        cache.restore(snapshot)
        assert cache.get_seq_length() == 60


@pytest.mark.parametrize("policy,budget", POLICIES)
@pytest.mark.parametrize("turns", [False, True])
def test_a_saved_cache_goes_on_as_if_it_had_never_left(tmp_path, family, policy, budget, turns):
    if turns and policy == "gate":
        pytest.skip("a threshold gate has no turns")
    model = gated(family, window=16, sinks=2, gate="attention", context_window=6)
    ids, mask = padded_batch([60, 50])
    cache = gatekv.KVCache(model, policy, budget, turns=turns)
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
        mask = torch.cat([mask, torch.ones(2, 5, dtype=torch.long)], 1)
        model(ids[:, :5], attention_mask=mask, past_key_values=cache)
    path = tmp_path / "deep" / "prompt.safetensors"
    cache.save(path)
    loaded = gatekv.KVCache.load(path, model)
    assert repr(loaded).split("bytes=")[0] == repr(cache).split("bytes=")[0]
    assert loaded.memory()["bytes"] <= cache.memory()["bytes"], "a loaded cache has no slack yet"
    assert all(torch.equal(a, b) for a, b in zip(cache.flags(), loaded.flags()))
    mask = torch.cat([mask, torch.ones(2, 40, dtype=torch.long)], 1)
    more = torch.randint(1, VOCAB, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        a, b = (model(more, attention_mask=mask, past_key_values=c).logits for c in (cache, loaded))
    torch.testing.assert_close(a, b, rtol=0, atol=0)
    if turns and policy != "full":
        for c in (cache, loaded):
            c.compress()
        assert all(torch.equal(a, b) for a, b in zip(cache.flags(), loaded.flags()))
    assert path.stat().st_size < loaded.memory()["full_bytes"] * 1.6 + 30_000


def test_a_saved_cache_beside_sliding_layers(tmp_path):
    from test_modules import mixed

    model = mixed()
    ids, _ = padded_batch([40])
    cache = gatekv.KVCache(model, "keydiff+global", 0.5)
    feed(model, cache, ids)
    cache.save(tmp_path / "c.safetensors")
    loaded = gatekv.KVCache.load(tmp_path / "c.safetensors", model)
    torch.testing.assert_close(feed(model, cache, ids[:, :9]), feed(model, loaded, ids[:, :9]), rtol=0, atol=0)


def test_loading_refuses_what_does_not_fit(tmp_path):
    model = gated(window=4)
    ids, _ = padded_batch([60])
    path = tmp_path / "c.safetensors"
    cache = gatekv.KVCache(model, "gate+global", 0.5)
    with pytest.raises(ValueError, match="feed the prompt first"):
        cache.save(path)
    feed(model, cache, ids)
    cache.save(path)
    with pytest.raises(FileNotFoundError, match="cache.save"):
        gatekv.KVCache.load(tmp_path / "no.safetensors", model)
    with pytest.raises(ValueError, match="compressed by a model with num_hidden_layers 2"):
        gatekv.KVCache.load(path, tiny(num_hidden_layers=3))
    with pytest.raises(ValueError, match="other gates"):
        gatekv.KVCache.load(path, gated(window=4, seed=7, model=tiny()))
    tensors = load_file(path)
    save_file(tensors, tmp_path / "foreign.safetensors")
    with pytest.raises(ValueError, match="not a gatekv cache"):
        gatekv.KVCache.load(tmp_path / "foreign.safetensors", model)
    (tmp_path / "cut.safetensors").write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        gatekv.KVCache.load(tmp_path / "cut.safetensors", model)
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    wrong = {**tensors, "0.store.pages.owners": tensors["0.store.pages.owners"][:-1]}
    save_file(wrong, tmp_path / "wrong.safetensors", metadata=metadata)
    with pytest.raises(ValueError, match="layer 0 is damaged.*pages.owners"):
        gatekv.KVCache.load(tmp_path / "wrong.safetensors", model)
    fewer = {k: v for k, v in tensors.items() if k != "1.real"}
    save_file(fewer, tmp_path / "fewer.safetensors", metadata=metadata)
    with pytest.raises(ValueError, match="'1.real' is missing"):
        gatekv.KVCache.load(tmp_path / "fewer.safetensors", model)

    class Mine(gatekv.policies.KeyDiff):
        pass

    own = gatekv.KVCache(base_model(model), Mine(), 0.5)
    feed(base_model(model), own, ids)
    with pytest.raises(ValueError, match="Mine has no name .*register_policy"):
        own.save(path)


@torch.no_grad()
def test_chunked_sparse_prefill_never_holds_the_whole_prompt():
    model = gated(window=8, sinks=2, threshold=0.9, dtype=torch.float32)
    ids = torch.randint(1, VOCAB, (1, 500), generator=torch.Generator().manual_seed(0))
    cache, peaks, chunk = gatekv.KVCache(model, "gate"), [], 50
    for a in range(0, 500, chunk):
        feed(model, cache, ids[:, a : a + chunk])
        peaks.append(sum(distinct_bytes(layer.tensors()) for layer in cache.evicting()))
    flags = torch.stack(cache.flags())
    assert flags.float().mean() < 0.6
    per_token = 2 * 8 * 4 + 4
    for i, held in enumerate(peaks):
        seen = (i + 1) * chunk
        kept = int(flags[..., :seen].sum())
        pages = (kept / 16 + 6) * (16 * per_token + 20)
        assert held <= pages * 1.05 + 6 * (8 + 16) * per_token + 3000, f"after {seen} tokens"
    with gatekv.parallel(model):
        wanted = model(ids, use_cache=False).logits
    again = gatekv.KVCache(model, "gate")
    torch.testing.assert_close(feed(model, again, ids)[:, -1], wanted[:, -1], rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_a_long_call_is_cut_inside_so_that_its_pieces_see_only_what_is_live(monkeypatch):
    from gatekv.cache import stages

    monkeypatch.setattr(stages, "PIECE", 16)
    model = gated(window=5, sinks=2)
    ids, mask = padded_batch([100, 71])
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    with gatekv.parallel(model):
        wanted = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    got = model(ids, attention_mask=mask, position_ids=positions, past_key_values=gatekv.KVCache(model, "gate")).logits
    torch.testing.assert_close(got[mask.bool()], wanted[mask.bool()], rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_a_ten_times_longer_stream_takes_no_more_than_its_budget():
    from gatekv.gates.calibration import Calibration
    from gatekv.modules import wrappers

    model = gated(window=6, sinks=2, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    stream = torch.randint(1, VOCAB, (1, 400), generator=generator)
    with torch.no_grad(), gatekv.parallel(model) as layers:
        model(stream, use_cache=False)
        logits = torch.cat([w.recorded.logits.flatten() for w in layers]).sort(descending=True).values
    levels = [i / 20 for i in range(21)]
    table = [float(logits[min(int(x * len(logits)), len(logits) - 1)]) for x in levels]
    for w in wrappers(model):
        w.calibrations["default"] = Calibration([1.0], levels, [table])
    cache, held = gatekv.KVCache(model, "gate", 0.25), {}
    feed(model, cache, stream[:, :40])
    for i in range(40, 400):
        feed(model, cache, stream[:, i : i + 1])
        held[i + 1] = sum(int(f.sum()) for f in cache.flags())
    assert all(h <= 0.25 * n * 6 * 1.25 + 6 * 8 for n, h in held.items()), "the stream holds its share all along"
    assert all(len(layer.window) <= 6 + 16 for layer in cache.evicting())
    pages = [layer.store.pages for layer in cache.evicting()]
    assert all(p.free <= max(6, len(p.owners) // 50) for p in pages), "and no page lies idle"


@pytest.mark.parametrize("policy,budget", [("gate", None), ("snapkv+ada", 0.75)])
def test_a_compiled_model_gives_the_same_tokens(policy, budget):
    model = gated(window=5, sinks=2, dtype=torch.float32)
    ids, mask = padded_batch([60, 50])
    options = dict(attention_mask=mask, max_new_tokens=3, do_sample=False)  # each is captured anew
    wanted = model.generate(input_ids=ids, past_key_values=gatekv.KVCache(model, policy, budget), **options)
    inner = base_model(model)
    inner.forward = torch.compile(inner.forward, backend="eager")
    try:
        got = model.generate(input_ids=ids, past_key_values=gatekv.KVCache(model, policy, budget), **options)
    finally:
        del inner.forward
    assert torch.equal(got, wanted)
    assert not gatekv.KVCache(model, policy, budget).is_compileable, "its shapes follow the data"


def test_the_law_of_windows_is_what_the_reference_uses():
    flags = torch.zeros(1, 1, 4, dtype=torch.bool)
    slots = torch.arange(4)
    assert live_mask(slots, slots, flags, 2)[0, 0].tril().sum() == 4 + 3
