"""Bits are the budget: what is stored, what it costs, who gets it, and that attention reads exactly that."""

import itertools

import pytest
import torch
from conftest import (
    KINDS,
    VOCAB,
    RoundedMemory,
    gated,
    padded_batch,
    plain_logits,
    recurrent_logits,
    rounded_logits,
    tiny,
)

import gatekv
from gatekv.cache.forecast import forecast
from gatekv.cache.segments.coded import token_bytes
from gatekv.ops import codec, naive
from gatekv.policies import KeyDiff, resolve
from gatekv.policies.bits import DISTORTION, allot, steps
from gatekv.policies.equal import Equal
from gatekv.policies.rate import Rate

POLICIES = ["h2o+rate", "snapkv+ada+rate", "snapkv+uniform+rate", "tova+rate", "rate", "l2+equal", "h2o+ada+equal"]


def with_width(policy, **fields):
    """The policy with other settings of its width."""
    from dataclasses import replace

    return replace(resolve(policy, 0.5), width=Rate(**fields), budget=None)


def bits_of(layer):
    """[2, batch, kv_heads, slots seen]: bits of each key and value, 16 where a token is whole, 0 where none is."""
    return layer.stage.bits(layer).movedim(-1, 0).long()


def decoded(x, bits):
    """As the naive code writes and reads vectors x [batch, kv_heads, n, head_dim] of so many bits each."""
    out, heads = x.clone(), torch.arange(x.shape[1])[:, None]
    turned = codec.turn(x, heads, x.shape[1])
    for b in codec.WIDTHS:
        mine = bits == b
        if mine.any():
            records = naive.encode(turned[mine], b, codec.levels(b), x.dtype)
            read = turned.clone()
            read[mine] = naive.decode(records, b, codec.levels(b), x.shape[-1], x.dtype)
            out = torch.where(mine[..., None], codec.turn_back(read, heads, x.shape[1]), out)
    return out


SHAPES = [
    ("llama", {}),
    *((kind, {}) for kind in KINDS if kind != "llama"),
    ("llama", dict(head_dim=64, num_attention_heads=8, num_key_value_heads=1)),
    ("llama", dict(head_dim=80, num_attention_heads=2, num_key_value_heads=2)),
    ("llama", dict(head_dim=96, num_attention_heads=4, num_key_value_heads=2)),
    ("llama", dict(head_dim=256, num_attention_heads=2, num_key_value_heads=1)),
]


@torch.no_grad()
@pytest.mark.parametrize("kind,changes", SHAPES, ids=str)
def test_recurrent_is_the_dense_form_over_what_was_coded(kind, changes):
    model = tiny(kind, **changes)
    prompt, budget = (171, 0.11) if "head_dim" in changes else (71, 0.3)  # of float64
    ids, mask = padded_batch([prompt + 20])
    cache = gatekv.KVCache(model, "snapkv+ada+rate", budget, decode="keep", sinks=2)
    got = recurrent_logits(model, ids, mask, cache, [prompt, prompt + 1, prompt + 9])
    pairs = {pair for layer in cache.evicting() for pair in layer.store.narrow.streams}
    assert len(pairs) > 1 and (got - plain_logits(model, ids, mask))[:, prompt:].abs().max() > 1e-3
    memories = {layer.layer_idx: RoundedMemory(bits_of(layer)[..., :prompt], decoded) for layer in cache.evicting()}
    wanted = rounded_logits(model, ids, memories)
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9 * wanted.abs().max().item())


@torch.no_grad()
@pytest.mark.parametrize("policy", [*POLICIES, "gate+rate", "gate+ada+rate", "gate+rate+less"])
def test_padded_rows_are_solo_rows(policy):
    maps = dict(less_rank=3, less_hidden=12) if "less" in policy else {}
    model = gated(window=8, sinks=2, **maps) if "gate" in policy else tiny()
    ids, mask = padded_batch([90, 75])
    budget = 0.5 if policy == "rate" else 0.3
    together = recurrent_logits(model, ids, mask, c := gatekv.KVCache(model, policy, budget, decode="keep"), [80, 81])
    for row, n in enumerate((90, 75)):
        cuts = [80 - (90 - n), 81 - (90 - n)]
        cache = gatekv.KVCache(model, policy, budget, decode="keep")
        alone = recurrent_logits(model, ids[row : row + 1, 90 - n :], mask[row : row + 1, 90 - n :], cache, cuts)
        torch.testing.assert_close(together[row : row + 1, 90 - n :], alone, rtol=1e-9, atol=1e-8)
        for mine, solo in zip(c.evicting(), cache.evicting()):
            assert torch.equal(bits_of(mine)[:, row, :, 90 - n :], bits_of(solo)[:, 0])


@torch.no_grad()
@pytest.mark.parametrize("policy", ["h2o+rate", "snapkv+uniform+rate", "rate", "gate+rate", "l2+equal"])
def test_a_full_budget_is_the_plain_model_by_the_same_path(family, policy):
    model = gated(family) if "gate" in policy else tiny(family)
    ids, mask = padded_batch([60, 50])
    cache = gatekv.KVCache(model, policy, 1.0, decode="keep")
    got = recurrent_logits(model, ids, mask, cache, [50, 51])
    plain = model.base_model if "gate" in policy else model
    wanted = plain_logits(plain, ids, mask)
    torch.testing.assert_close(got[mask.bool()], wanted[mask.bool()], rtol=1e-12, atol=1e-12)
    for layer in cache.evicting():
        assert list(layer.store.narrow.streams) == [(16, 16)] and len(layer.store.narrow) > 0


@torch.no_grad()
@pytest.mark.parametrize(
    "dtype,cache_dtype", [(torch.bfloat16, None), (torch.float32, None), (torch.float32, "bfloat16")]
)
@pytest.mark.parametrize("policy,budget", [("h2o+rate", 0.03125), ("snapkv+ada+rate", 0.0625), ("tova+uniform+rate", 0.125),
                                           ("gate+rate", 0.25), ("rate", 0.3), ("h2o+rate", 0.5),
                                           ("keydiff+equal", 0.1), ("gate+equal", 0.1)])  # fmt: skip
def test_the_budget_is_of_bytes_and_foretold(policy, budget, dtype, cache_dtype):
    model = tiny(dtype=torch.float32, head_dim=64, hidden_size=384)
    model = gated(model=model, dtype=dtype, window=32) if "gate" in policy else model.to(dtype)
    ids = torch.randint(1, VOCAB, (2, 1024), generator=torch.Generator().manual_seed(0))
    cache = gatekv.KVCache(model, policy, budget, decode="keep", dtype=cache_dtype, strict=True)
    told = forecast(gatekv.KVCache(model, policy, budget, decode="keep", dtype=cache_dtype, strict=True), 1024, batch=2)
    model(ids, past_key_values=cache)
    memory = cache.memory()
    assert memory["ratio"] <= budget * 1.01 and memory["bytes"] == pytest.approx(told.bytes, rel=0.01)
    stores = [
        {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in layer.tensors()}
        for layer in cache.evicting()
    ]
    assert memory["bytes"] == sum(sum(layer.values()) for layer in stores)
    assert cache.evicting()[0].window.dtype == (torch.bfloat16 if cache_dtype else dtype)


def test_bits_are_what_buys_the_least_distortion():
    """Against every way to spend the bytes, for three tokens."""
    dims, itemsize, generator = (64, 64), 2, torch.Generator().manual_seed(0)
    pairs = [(0, 0), *itertools.product(codec.WIDTHS, codec.WIDTHS)]
    cost = torch.tensor([token_bytes(p, dims, itemsize) if any(p) else 0.0 for p in pairs], dtype=torch.float64)
    key, value = torch.tensor([[DISTORTION.get(b, 1.0) for b in p] for p in pairs], dtype=torch.float64).T
    every = lambda t: t[0][:, None, None] + t[1][:, None] + t[2]  # noqa: E731  of each choice for three tokens
    none = torch.zeros(1, 3, dtype=torch.bool)
    for room in (60.0, 130.0, 200.0, 280.0) * 3:
        u = (torch.randn(3, generator=generator, dtype=torch.float64) * 2).exp()
        w = (torch.rand(3, generator=generator, dtype=torch.float64) * 3).exp()  # 1 to 20
        bits = allot(u.log()[None], w.log()[None], none, none, torch.tensor([room]), 1.0, dims, itemsize)[0].tolist()
        lost = torch.where(cost > 0, w[:, None] * key + value, 1.0) * u[:, None]
        at = [pairs.index(tuple(pair)) for pair in bits]
        spent, mine = cost[at].sum(), lost[range(3), at].sum()
        assert spent <= room and mine <= every(lost)[every(cost.expand(3, -1)) <= spent].min() * (1 + 1e-6)


def test_every_step_costs_and_gains():
    for dims in ((64, 64), (96, 80), (16, 16)):
        path = steps(dims, 2)
        assert all(s.price > 0 and s.key >= 0 and s.value >= 0 and s.key + s.value > 0 for s in path)
        assert sum(s.price for s in path) == pytest.approx(token_bytes((16, 16), dims, 2))
        assert sum(s.key for s in path) == sum(s.value for s in path) == pytest.approx(1)


@torch.no_grad()
def test_sinks_and_the_last_tokens_stay_whole_and_the_window_stays():
    model = gated(window=32, sinks=4)
    ids, mask = padded_batch([200, 150])
    cache = gatekv.KVCache(model, "gate+rate", 0.2, decode="keep")
    recurrent_logits(model, ids, mask, cache, [])
    for layer in cache.evicting():
        bits = bits_of(layer)
        assert (bits[..., -8:] == 16).all() and (bits[:, 0, :, :4] == 16).all() and (bits[:, 1, :, 50:54] == 16).all()
        assert (bits[..., -32:] >= 2).all() and (bits[0] == 0).any()


@torch.no_grad()
def test_a_question_a_turn_a_copy_and_a_file(tmp_path):
    model = tiny(dtype=torch.float64)
    ids = torch.randint(1, VOCAB, (2, 80), generator=torch.Generator().manual_seed(0))
    later = torch.randint(1, VOCAB, (2, 8), generator=torch.Generator().manual_seed(2))
    cache = gatekv.KVCache(model, with_width("snapkv+ada", slope=0.5, window=5), 0.4)
    model(ids, past_key_values=cache)
    cache.save(tmp_path / "few.safetensors")
    twin, loaded = cache.snapshot(), gatekv.KVCache.load(tmp_path / "few.safetensors", model)
    assert str(loaded.config.policy) == "SnapKV x Ada x Rate" and loaded.config.policy.width.slope == 0.5
    assert loaded.memory() == twin.memory()
    swapped = cache.snapshot()
    swapped.reorder_cache(torch.tensor([1, 0]))
    doubled = cache.snapshot()
    doubled.batch_repeat_interleave(2)
    held = [layer.keys.clone() for layer in cache.evicting()]
    wanted = model(later, past_key_values=cache).logits
    torch.testing.assert_close(model(later, past_key_values=twin).logits, wanted)
    torch.testing.assert_close(model(later, past_key_values=loaded).logits, wanted)
    torch.testing.assert_close(model(later.flip(0), past_key_values=swapped).logits.flip(0), wanted)
    torch.testing.assert_close(model(later.repeat_interleave(2, 0), past_key_values=doubled).logits[::2], wanted)
    assert all(keys.abs().sum() > 0 for keys in held)


@torch.no_grad()
def test_each_turn_shares_out_its_own_bytes():
    model = tiny(dtype=torch.float64)
    ids = torch.randint(1, VOCAB, (1, 160), generator=torch.Generator().manual_seed(0))
    cache = gatekv.KVCache(model, "snapkv+ada+rate", 0.4, turns=True)
    model(ids[:, :80], past_key_values=cache)
    first = [bits_of(layer) for layer in cache.evicting()]
    model(ids[:, 80:], past_key_values=cache)
    cache.compress()
    for layer, before in zip(cache.evicting(), first):
        after = bits_of(layer)
        assert torch.equal(after[..., :80], before[..., :80]), "what was coded stays as it is"
        assert (after[..., -8:] == 16).all() and (after[..., 80:] < 16).any()
    assert cache.memory()["ratio"] <= 0.42
    assert torch.isfinite(model(ids[:, :3], past_key_values=cache).logits).all()


@torch.no_grad()
def test_equal_keeps_the_best_in_the_same_bits():
    model = tiny(dtype=torch.float32, head_dim=64, hidden_size=384)
    ids, mask = padded_batch([200, 150])
    cache, undecided = gatekv.KVCache(model, "keydiff+equal", 0.1, decode="keep"), gatekv.KVCache.undecided(model)
    for c in (cache, undecided):
        recurrent_logits(model, ids, mask, c, [])
    for layer, whole in zip(cache.evicting(), undecided.evicting()):
        bits, real = bits_of(layer), mask.bool()[:, None].expand(-1, 3, -1)
        assert {(4, 3), (16, 16), (0, 0)} == {tuple(pair) for pair in bits.flatten(1).T[real.flatten()].tolist()}
        scores = KeyDiff().score(whole.evictor.view(whole))
        for row, head in itertools.product(range(2), range(3)):
            mine, score = bits[0, row, head], scores[row, head]
            assert score[mine == 4].min() >= score[(mine == 0) & real[row, head]].max()


def test_positions_beyond_two_bytes():
    from gatekv.cache.segments.coded import Stream

    counts = torch.tensor([2, 1])
    near = Stream(torch.zeros(3, 4, dtype=torch.uint8), torch.tensor([5, 65535, 40000], dtype=torch.int32), counts)
    assert near.positions.dtype == torch.int16 and near.numbers().tolist() == [5, 65535, 40000]
    far = Stream(torch.ones(3, 4, dtype=torch.uint8), torch.tensor([7, 65536, 1], dtype=torch.int32), counts)
    both = near.joined(far)
    assert both.positions.dtype == torch.int32 and both.numbers().tolist() == [5, 65535, 7, 65536, 40000, 1]
    assert (
        both.records[:, 0].tolist() == [0, 0, 1, 1, 0, 1]
        and both.rows(torch.tensor([1, 1])).numbers().tolist() == [40000, 1] * 2
    )


def test_what_cannot_be_is_refused_with_its_cure():
    model = tiny()
    for policy, why in [
        ("l2+rate", "utility"), ("random+rate", "utility"), ("snapkv+rate+qaq", "names two of think, qaq, rate"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=why):
            gatekv.KVCache(model, policy, 0.5)
    with pytest.raises(ValueError, match="decode='keep'"):
        gatekv.KVCache(model, "h2o+rate", 0.5, decode="evict")
    with pytest.raises(ValueError, match="budget"):
        gatekv.KVCache(model, "snapkv+rate")
    with pytest.raises(ValueError, match="threshold"):
        gatekv.KVCache(gated(), "gate+threshold+rate", 0.5)
    with pytest.raises(ValueError, match="prefill='dense'"):
        gatekv.KVCache(gated(), "gate+rate", 0.5, prefill="sparse")
    with pytest.raises(ValueError, match="dtype"):
        gatekv.KVCache(model, "snapkv", 0.5, dtype="int8")
    with pytest.raises(ValueError, match="keys is a number of bits"):
        Equal(keys=6)
    for wrong in (dict(slope=0.0), dict(key_weight=0.0), dict(window=0), dict(sinks=-1), dict(evicted=0.0)):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Rate(**wrong)
    ids = torch.randint(1, VOCAB, (1, 60))
    cache = gatekv.KVCache(model, "rate", 0.1, strict=True)
    with pytest.raises(ValueError, match="below the"), torch.no_grad():
        model(ids, past_key_values=cache)
