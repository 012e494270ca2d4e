"""QAQ: old tokens are really stored in few bits, and attention is what it would be over the dequantised tensors."""

import pytest
import torch
from conftest import (
    KINDS,
    TOLERANCE,
    VOCAB,
    RoundedMemory,
    gated,
    padded_batch,
    plain_logits,
    positions_of,
    recurrent_logits,
    rounded_logits,
    tiny,
)

import gatekv
from gatekv.cache.segments.quantised import PAGE
from gatekv.evaluation import frontier
from gatekv.evaluation.tasks.item import Item, log_loss
from gatekv.ops import naive
from gatekv.ops.quantise import record_bytes
from gatekv.policies import QAQ, AdaKV, SnapKV, StreamingLLM
from gatekv.policies.qaq import Bits

POLICIES = ["qaq", "snapkv+qaq", "snapkv+ada+qaq", "keydiff+pyramid+qaq", "random+global+qaq", "h2o+qaq"]


def bits_of(layer):
    """[2, batch, kv_heads, slots seen]: bits of each key and value, 16 where a token is whole, 0 where none is."""
    return layer.stage.bits(layer).movedim(-1, 0).long()


def dequantised(outliers):
    """How the naive code writes and reads vectors."""

    def rounded(x, bits):
        out = x.clone()
        for b in (2, 4, 8):
            mine = bits == b
            if mine.any():
                records = naive.quantise(x[mine], b, outliers)
                out[mine] = naive.dequantise(records, b, outliers, x.shape[-1], x.dtype)
        return out

    return rounded


@torch.no_grad()
@pytest.mark.parametrize("kind,policy", [("llama", p) for p in POLICIES] + [(k, "snapkv+qaq") for k in KINDS])
def test_recurrent_is_the_dense_form_over_dequantised_tensors(kind, policy):
    model = tiny(kind)
    ids, mask = padded_batch([90])
    decode = {} if policy == "qaq" else {"decode": "keep"}
    cache = gatekv.KVCache(model, policy, 0.7, **decode)
    got = recurrent_logits(model, ids, mask, cache, [70, 71, 80])
    widths = {pair for layer in cache.evicting() for pair in layer.store.narrow.pages}
    assert len(widths) > 1 and (got - plain_logits(model, ids, mask))[:, 70:].abs().max() > 1e-3
    memories = {
        layer.layer_idx: RoundedMemory(bits_of(layer)[..., :70], dequantised(layer.store.narrow.outliers[0]))
        for layer in cache.evicting()
    }
    wanted = rounded_logits(model, ids, memories)
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9 * wanted.abs().max().item())


@torch.no_grad()
@pytest.mark.parametrize("policy,decode", [(p, "keep") for p in (*POLICIES, "gate+global+qaq", "gate+qaq")] + [
                         (p, "evict") for p in ("h2o+qaq", "tova+qaq", "gate+global+qaq", "gate+qaq")])  # fmt: skip
def test_padded_rows_are_solo_rows(policy, decode):
    model = gated(window=8, sinks=2) if "gate" in policy else tiny()
    budget = None if policy == "gate+qaq" else 0.7
    ids, mask = padded_batch([90, 75])
    decode = None if policy == "qaq" else decode
    together = recurrent_logits(model, ids, mask, c := gatekv.KVCache(model, policy, budget, decode=decode), [80, 81])
    for row, n in enumerate((90, 75)):
        cuts = [80 - (90 - n), 81 - (90 - n)]
        cache = gatekv.KVCache(model, policy, budget, decode=decode)
        alone = recurrent_logits(model, ids[row : row + 1, 90 - n :], mask[row : row + 1, 90 - n :], cache, cuts)
        torch.testing.assert_close(together[row : row + 1, 90 - n :], alone, rtol=1e-9, atol=1e-8)
        for mine, solo in zip(c.evicting(), cache.evicting()):
            assert torch.equal(bits_of(mine)[:, row, :, 90 - n :], bits_of(solo)[:, 0])


@torch.no_grad()
@pytest.mark.parametrize("policy", [QAQ(bits=16), QAQ(SnapKV(), bits=16), QAQ(SnapKV(), bits=16, outliers=0, window=5)])
def test_sixteen_bits_are_the_plain_model_by_the_same_path(family, policy):
    model = tiny(family)
    ids, mask = padded_batch([60, 50])
    cache = gatekv.KVCache(model, policy, 1.0)
    got = recurrent_logits(model, ids, mask, cache, [50, 51])
    wanted = plain_logits(model, ids, mask)
    torch.testing.assert_close(got[mask.bool()], wanted[mask.bool()], rtol=1e-12, atol=1e-12)
    for layer in cache.evicting():
        assert list(layer.store.narrow.pages) == [(16, 16)] and len(layer.store.narrow.pages[16, 16]) > 0
    tokens = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
    mine = gatekv.KVCache(model, policy, 1.0)
    assert torch.equal(
        model.generate(ids, attention_mask=mask, past_key_values=mine, max_new_tokens=12, do_sample=False), tokens
    )


@torch.no_grad()
@pytest.mark.parametrize("bits", [2, 3.5, 8])
def test_bytes_are_those_of_the_records(bits):
    model = tiny(dtype=torch.bfloat16, head_dim=64, hidden_size=384)
    ids = torch.randint(1, VOCAB, (2, 480), generator=torch.Generator().manual_seed(0))
    cache = gatekv.KVCache(model, QAQ(bits=bits))
    model(ids, past_key_values=cache)
    for layer in cache.evicting():
        given = bits_of(layer)[..., : 480 - 32]
        assert layer.stage.held(layer).all() and set(given.unique().tolist()) <= {2, 4, 8, 16}
        assert given.sum() == pytest.approx(bits * given.numel(), abs=16) and given.sum() <= bits * given.numel()
        for pair, store in layer.store.narrow.pages.items():
            sizes = [record_bytes(b, apart, 64, 2) for b, apart in zip(pair, layer.store.narrow.outliers)]
            assert [t.nbytes for t in (store.keys, store.values)] == [PAGE * len(store.owners) * s for s in sizes]
            assert len(store.owners) == (-(-store.lengths // PAGE)).sum(), "no page is empty"
    stores = [t for layer in cache.evicting() for t in layer.tensors()]
    assert cache.memory()["bytes"] == sum(t.untyped_storage().nbytes() for t in stores if t.numel())


@torch.no_grad()
@pytest.mark.parametrize("policy,budget", [("qaq", 0.3), ("qaq", 0.45), ("qaq", 0.55), ("snapkv+qaq", 0.15), ("gate+global+qaq", 0.15),
                                           ("snapkv+qaq", 0.25), ("gate+global+qaq", 0.25), ("gate+uniform+qaq", 0.25), ("snapkv+qaq", 0.6)])  # fmt: skip
def test_the_frontier_lands_on_the_asked_bytes(policy, budget):
    model = tiny(dtype=torch.float32, head_dim=64, hidden_size=384)
    model = gated(model=model, dtype=torch.bfloat16, window=32) if "gate" in policy else model.bfloat16()
    ids = torch.randint(1, 90, (640,), generator=torch.Generator().manual_seed(0)).tolist()
    item = Item(ids[:620], [(ids[620:625], ids[625:628])], log_loss)
    beside = (
        policy.replace("+qaq", "").replace("qaq", "snapkv"),
        budget,
    )  # and what a gate remembers is no small thing in so small a model
    full, row, plain = frontier.run_item(model, item, [frontier.FULL, (policy, budget), beside], decode="keep")
    above = plain["ratio"] - budget if "gate" in policy else 0
    assert row["refused"] is None and budget - 0.03 <= row["ratio"] <= budget + above + 0.015
    assert row["kls"][0] > 0 == full["kls"][0]


@torch.no_grad()
def test_budgets_that_bits_cannot_meet_are_refused():
    ids = torch.randint(1, 90, (640,)).tolist()
    item = Item(ids[:620], [(ids[620:625], ids[625:628])])
    model = tiny(dtype=torch.bfloat16, head_dim=64, hidden_size=384)
    cells = [frontier.FULL, ("qaq", 0.2), ("snapkv+qaq", 0.06)]
    _, alone, both = frontier.run_item(model, item, cells)
    assert "unreachable: all tokens cost more, at 2 bits" in alone["refused"]
    assert "unreachable: 32 of 620 tokens stay whole" in both["refused"]


@torch.no_grad()
def test_a_question_a_turn_a_copy_and_a_file(tmp_path):
    model = tiny(dtype=torch.float64)
    ids = torch.randint(1, VOCAB, (2, 80), generator=torch.Generator().manual_seed(0))
    later = torch.randint(1, VOCAB, (2, 8), generator=torch.Generator().manual_seed(2))
    cache = gatekv.KVCache(model, AdaKV(QAQ(SnapKV(), bits=5)), 0.7)
    model(ids, past_key_values=cache)
    cache.save(tmp_path / "few.safetensors")
    twin, loaded = cache.snapshot(), gatekv.KVCache.load(tmp_path / "few.safetensors", model)
    assert str(loaded.config.policy) == "SnapKV x Ada x Bits" and loaded.config.policy.width.bits == 5
    for mine, theirs in zip(loaded.evicting(), twin.evicting()):
        held = [
            {pair: store.keys.nbytes for pair, store in layer.store.narrow.pages.items()} for layer in (mine, theirs)
        ]
        assert held[0] == held[1] and len(held[0]) > 1
    swapped = cache.snapshot()
    swapped.reorder_cache(torch.tensor([1, 0]))
    wanted = model(later, past_key_values=cache).logits
    torch.testing.assert_close(model(later, past_key_values=twin).logits, wanted)
    torch.testing.assert_close(model(later, past_key_values=loaded).logits, wanted)
    torch.testing.assert_close(model(later.flip(0), past_key_values=swapped).logits.flip(0), wanted)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_pair_of_widths_whose_only_row_is_dropped_answers_nothing(dtype):
    model = tiny(dtype=dtype, num_hidden_layers=3)
    ids, mask = padded_batch([36, 120, 36])
    cache = gatekv.KVCache(model, "h2o+qaq", 0.7, decode="keep")
    recurrent_logits(model, ids, mask, cache, [])
    alone = cache.snapshot()
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    stores = [store for layer in cache.evicting() for store in layer.store.narrow.pages.values()]
    assert any(not len(store) for store in stores), "only the dropped row had these widths"
    later = torch.randint(1, VOCAB, (3, 4), generator=torch.Generator().manual_seed(1))
    seen = torch.nn.functional.pad(mask[[2, 0, 0]], (0, 4), value=1)
    asked = dict(attention_mask=seen, position_ids=positions_of(seen)[:, -4:])
    got = model(later, past_key_values=cache, **asked).logits
    alone.reorder_cache(torch.tensor([2]))
    wanted = model(later[:1], past_key_values=alone, **{name: t[:1] for name, t in asked.items()}).logits
    torch.testing.assert_close(got[:1], wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@torch.no_grad()
def test_each_turn_shares_out_its_own_bits():
    model = tiny(dtype=torch.float64)
    ids = torch.randint(1, VOCAB, (1, 160), generator=torch.Generator().manual_seed(0))
    cache = gatekv.KVCache(model, QAQ(SnapKV(), bits=4), 0.6, turns=True)
    model(ids[:, :80], past_key_values=cache)
    first = [bits_of(layer) for layer in cache.evicting()]
    model(ids[:, 80:], past_key_values=cache)
    cache.compress()
    for layer, before in zip(cache.evicting(), first):
        after = bits_of(layer)
        assert torch.equal(after[..., :48], before[..., :48]), "what was encoded stays as it is"
        assert (after[..., 128:] == 16).all() and layer.stage.held(layer).sum(-1).unique().tolist() == [48 + 48]
        new = after[..., 48:128][after[..., 48:128] > 0]
        assert len(new) and 3 < new.double().mean() <= 4
    assert torch.isfinite(model(ids[:, :3], past_key_values=cache).logits).all()


@torch.no_grad()
def test_streaming_policies_evict_tokens_of_few_bits():
    model = tiny()
    ids, mask = padded_batch([100])
    for tokens, old in ((80, 56 - 32), (90, 56 - 32 - 10), (100, 56 - 32 - 20)):
        cache = gatekv.KVCache(model, "streaming_llm+qaq", 0.7, prompt_tokens=80)
        recurrent_logits(model, ids[:, :tokens], mask[:, :tokens], cache, [80][: tokens > 80])
        for layer in cache.evicting():
            assert layer.stage.held(layer).sum(-1).unique().tolist() == [56]
            assert sum(store.lengths for store in layer.store.narrow.stores()).tolist() == [old] * 3


def test_a_tolerance_asks_for_the_fewest_bits_that_meet_it():
    s = torch.rand(2, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 4
    held = torch.ones(2, 40, dtype=torch.bool)
    held[1, :13] = False
    for mean in (2, 2.7, 4, 6.5, 11, 16):
        got = Bits(bits=mean).allot(s, held)
        for row, real, bits in zip(s, held, got):
            row, bits = row[real], bits[real]
            assert bits.sum() <= mean * len(row) and (mean * len(row) - bits.sum() < 8 or mean == 16)
            # Errors at these bits and at the next fewer ones: some tolerance lies between.
            steps = lambda b: 2.0**b - 1  # noqa: E731
            low = (row / steps(bits))[bits < 16].amax() if (bits < 16).any() else 0
            fewer = (row / steps(bits / 2))[bits > 2]
            assert not len(fewer) or fewer.amin() >= low
    assert Bits(bits=2).allot(s, held)[held].unique().tolist() == [2]
    assert Bits(bits=16).allot(s, held)[held].unique().tolist() == [16]


def test_sensitivity_is_the_derivative_of_softmax():
    a = torch.tensor([[0.5, 0.2, 0.1, 0.0], [0.9, 0.9, 0.3, 0.0], [0.7, 0.0, 0.0, 0.0]], dtype=torch.float64)
    ones = torch.ones_like(a)
    size, query = torch.full((3, 1), 2.0), torch.full((3, 1), 0.25)
    held = a > -1
    keys, values = Bits(floor=0).sensitivity(a, held, 3 * ones, 5 * ones, size, query)
    for row, key, value in zip(a, keys, values):
        jacobian = torch.diag(row) - row[:, None] * row
        torch.testing.assert_close(key, jacobian.abs().amax(1) * 3 * 2 * 0.25)
        torch.testing.assert_close(value, row * 5)
    lonely = [t[:1, :1] for t in (a, held, ones, ones, size, query)]
    assert Bits(floor=0).sensitivity(*lonely)[0].item() == 0.5 * 0.5 * 0.5
    held[0, 3] = False
    _, least = Bits(floor=0.6).sensitivity(a, held, ones, ones, size, query)
    torch.testing.assert_close(least[0], a.new_tensor([0.5, 0.2, 0.2, 0]))
    torch.testing.assert_close(least[2], a.new_tensor([0.7, 0.15, 0.15, 0.15]))


@torch.no_grad()
@pytest.mark.parametrize("floor", [0, 2])
def test_bits_follow_the_attention_of_the_last_queries(floor):
    """Against the definition: softmax of the last queries over all tokens, the most over them and over a group."""
    model = tiny()
    ids, mask = padded_batch([70, 62])
    undecided = gatekv.KVCache.undecided(model, queries=32)
    recurrent_logits(model, ids, mask, undecided, [])
    cache = undecided.decide(QAQ(bits=4, floor=floor), 1.0)
    for layer, whole in zip(cache.evicting(), undecided.evicting()):
        k, v, q = whole.window.keys, whole.window.values, naive.group_queries(whole.evidence.queries[:, :, -32:], 3)
        s = torch.einsum("bkgqd,bktd->bkgqt", q, k) * whole.evidence.scaling
        seen = naive.causal_mask(32, 70) & whole.window.valid[:, None, None, None]
        a = s.masked_fill(~seen, -torch.inf).softmax(-1).amax((2, 3))[..., :38]
        old = whole.window.valid[:, None, :38].expand_as(a)
        width, n = Bits(bits=4, floor=floor), k.shape[1]
        spans = []
        for x in (k[:, :, :38], v[:, :, :38]):
            far = (x - x.mean(-1, keepdim=True)).abs().topk(2).indices
            rest = x.scatter(-1, far, torch.nan)
            spans.append(rest.nan_to_num(-torch.inf).amax(-1) - rest.nan_to_num(torch.inf).amin(-1))
        size = ((v[:, :, :38].square().mean(-1) * old).sum(-1) / old.sum(-1)).sqrt()
        asked = q.norm(dim=-1).amax((2, 3)) * whole.evidence.scaling
        rows = [t.flatten(0, 1) for t in (a, old, *spans)]
        sensitivity = width.sensitivity(*rows, size.flatten()[:, None], asked.flatten()[:, None]).view(2, 2, n, 38)
        wanted = width.allot(sensitivity.movedim(1, 0).flatten(1), old[:, None].expand(-1, 2, -1, -1).flatten(1))
        got = bits_of(layer)[..., :38]
        assert torch.equal(got * old, wanted.view(2, 2, n, 38).movedim(1, 0) * old)
        assert len(got.unique()) > 3


def test_errors():
    with pytest.raises(ValueError, match="bits is a mean"):
        Bits(bits=1.5)
    with pytest.raises(ValueError, match="outliers is the share"):
        Bits(outliers=0.5)
    with pytest.raises(ValueError, match="window counts"):
        Bits(window=0)
    with pytest.raises(ValueError, match="floor counts"):
        Bits(floor=-1)
    with pytest.raises(ValueError, match="use outliers=0"):
        Bits().apart(288)
    assert Bits(outliers=0).apart(288) == 0 and Bits().apart(64) == 2 and Bits().apart(256) == 4
    with pytest.raises(ValueError, match="names two of think, qaq"):
        gatekv.policies.resolve("snapkv+qaq+think", 0.5)
    with pytest.raises(ValueError, match="not made for each other"):
        gatekv.KVCache(tiny(), QAQ(StreamingLLM(positions="cache")), 0.5)
