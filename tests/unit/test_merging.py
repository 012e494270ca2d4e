"""Evicted tokens merge into kept ones: means with counts, nothing lost, nothing from a pad."""

import pytest
import torch
from conftest import VOCAB, gated, padded_batch, positions_of, tiny

import gatekv
from gatekv.cache.segments import merge
from gatekv.cache.segments.merge import Merge
from gatekv.cache.segments.pages import Pages
from gatekv.policies import D2O, NACL, AdaKV, ElasticCache, FastGen, Policy, SnapKV, StreamingLLM, ThinK
from gatekv.policies.layers import Even
from gatekv.policies.merging import MergeNear, MergeSimilar, Tokens

D = 6


def store_and_left(kept_lengths, left_lengths, seed=0):
    """Pages of one sequence with a row a head, and what has left each row."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    rows, n, m = len(kept_lengths), max(kept_lengths), max(left_lengths)
    slots = torch.stack([torch.randperm(n + m, generator=generator) for _ in range(rows)])
    keys, values = draw(1, rows, n + m, D), draw(1, rows, n + m, D)
    pages = Pages(keys[:, :, :0], 4, with_counts=True)
    stays = torch.zeros(1, rows, n + m, dtype=torch.bool)
    left_at, held = torch.zeros(rows, m, dtype=torch.long), torch.arange(m) < torch.tensor(left_lengths)[:, None]
    for r in range(rows):
        stays[0, r, slots[r, : kept_lengths[r]]] = True
        left_at[r, : left_lengths[r]] = slots[r, n : n + left_lengths[r]]
    pages.append(keys, values, stays, 0)
    picked = (x[0].gather(1, left_at[..., None].expand(-1, -1, D)) for x in (keys, values))
    return pages, Tokens(*picked, left_at.int(), held)


def rows_of(pages):
    """[(position, count, key, value)] of each row, by position."""
    places, held = pages.places()
    found = []
    for at, real in zip(places, held):
        parts = [t.flatten(0, 1)[at[real]] for t in (pages.positions, pages.counts, pages.keys, pages.values)]
        found.append(sorted(zip(*(t.tolist() for t in parts[:2]), *parts[2:]), key=lambda x: x[0]))
    return found


def merged_by_hand(rule, before, left, thresholds):
    """One token after the other, in the plainest way."""
    out = []
    for r, row in enumerate(before):
        row = [list(token) for token in row]
        gone = [i for i in range(left.held.shape[1]) if left.held[r, i]]
        picks = []
        for i in gone if row else []:
            if isinstance(rule, MergeSimilar):
                closest = [float(torch.cosine_similarity(left.keys[r, i], token[2], dim=0)) for token in row]
            else:
                closest = [-abs(token[0] - int(left.positions[r, i])) for token in row]
                closest[: rule.spare] = [-float("inf")] * min(rule.spare, len(row))
            best = max(closest)
            picks.append((best, closest.index(best), i))
        picks = [p for p in picks if p[0] > -float("inf")]
        if isinstance(rule, MergeSimilar) and picks:
            mean = sum(p[0] for p in picks) / len(picks)
            old = thresholds[r]
            thresholds[r] = mean if old is None else rule.beta * mean + (1 - rule.beta) * old
            picks = [p for p in picks if p[0] >= thresholds[r] - 1e-12]
        sums = [[token[1], token[1] * token[2], token[1] * token[3]] for token in row]
        for _, j, i in picks:
            sums[j] = [sums[j][0] + 1, sums[j][1] + left.keys[r, i], sums[j][2] + left.values[r, i]]
        out.append([(token[0], c, k / c, v / c) for token, (c, k, v) in zip(row, sums)])
    return out


@pytest.mark.parametrize("block", [16, 2**24])
@pytest.mark.parametrize("rule", [MergeSimilar(), MergeSimilar(beta=0.9), MergeNear(), MergeNear(spare=0)])
def test_three_folds_are_those_of_a_plain_loop(rule, block, monkeypatch):
    monkeypatch.setattr(merge, "ELEMENTS", block)  # of closeness at a time
    pages, left = store_and_left([9, 3, 0, 12], [7, 10, 4, 0])
    folding, thresholds, some = Merge(rule), [None] * 4, 0
    for seed in range(3):
        if seed:
            left = store_and_left([1, 1, 1, 1], [1, 5, 3, 2], seed)[1]
        wanted = merged_by_hand(rule, rows_of(pages), left, thresholds)
        frozen = pages.fork()
        before = rows_of(frozen)
        folding.fold(pages, left)
        for mine, hand in zip(rows_of(pages), wanted):
            assert [t[:2] for t in mine] == [t[:2] for t in hand]
            for a, b in zip(mine, hand):
                torch.testing.assert_close(torch.stack(a[2:]), torch.stack(b[2:]), rtol=1e-12, atol=1e-12)
            some += sum(t[1] > 1 for t in mine)
        for a, b in zip(before, rows_of(frozen)):
            assert all(torch.equal(torch.stack(x[2:]), torch.stack(y[2:])) for x, y in zip(a, b)), (
                "a twin is left alone"
            )
    assert some > 3
    if isinstance(rule, MergeSimilar):
        known = [t is not None for t in thresholds]
        assert (~folding.threshold.isnan()).tolist() == known == [True, True, False, True]


def test_the_earlier_of_two_neighbours_and_no_sink_takes_a_token_in():
    pages, _ = store_and_left([5], [1])
    pages.positions[pages.occupied()] = torch.tensor([0, 1, 10, 14, 20], dtype=torch.int32)
    at = torch.tensor([[12, 2, 17, 19]], dtype=torch.int32)
    left = Tokens(torch.ones(1, 4, D).double(), torch.ones(1, 4, D).double(), at, torch.ones(1, 4, dtype=torch.bool))
    Merge(MergeNear(spare=2)).fold(pages, left)
    assert [(p, c) for p, c, _, _ in rows_of(pages)[0]] == [(0, 1), (1, 1), (10, 3), (14, 2), (20, 2)]


def watched(cache):
    """What each layer was fed, as it comes: a list of (keys, values) of each."""
    seen = []
    for layer in cache.evicting():
        seen.append([])
        attend = layer.attend

        def spy(call, q, k, v, mask, scaling, mine=seen[-1], attend=attend):
            mine.append((k, v))
            return attend(call, q, k, v, mask, scaling)

        layer.attend = spy
    return seen


def totals(layer):
    """(tokens that each head's kept ones stand for, Σ count · key, Σ count · value)."""
    pages = layer.store.pages
    places, held = pages.places()
    counts = pages.counts.flatten()[places] * held
    whole = [(t.flatten(0, 1)[places] * counts[..., None]).sum(1) for t in (pages.keys, pages.values)]
    return counts.sum(1), *whole


@torch.no_grad()
@pytest.mark.parametrize("policy,decode", [("snapkv+merge_near", "keep"), (ElasticCache(window=8), "keep"), ("h2o+merge_near", "keep"),
                                           (D2O(skip_layers=()), "evict"), ("h2o+merge_similar", "evict"), ("nacl+merge_near", "keep"),
                                           ("streaming_llm+merge_similar", "evict"), ("gate+uniform+merge_near", "keep")])  # fmt: skip
def test_mass_is_conserved_and_pads_give_none(policy, decode, family, monkeypatch):
    """Where all that leaves may merge, kept tokens stand for every real token of the row, in number and in sum."""
    monkeypatch.setattr(MergeSimilar, "admits", lambda self, best, held, threshold: (held, threshold))
    model = gated(family, window=6, sinks=2)
    ids, mask = padded_batch([70, 51])
    cache = gatekv.KVCache(model, policy, 0.8 if "snapkv" in str(policy) else 0.5, decode=decode, prefill="dense")
    seen = watched(cache)
    for a, c in ((0, 60), (60, 61), (61, 70)):
        model(ids[:, a:c], attention_mask=mask[:, :c], position_ids=positions_of(mask)[:, a:c], past_key_values=cache)
    for layer, parts in zip(cache.evicting(), seen):
        k, v = (torch.cat(part, 2) for part in zip(*parts))
        in_pages = mask[:, None, :, None].clone()
        in_pages[:, :, layer.folded :] = 0  # a gate's window stays apart
        wanted = [in_pages[..., 0].sum(-1).expand(2, 3), (k * in_pages).sum(2), (v * in_pages).sum(2)]
        for got, whole in zip(totals(layer), wanted):
            torch.testing.assert_close(got.double(), whole.flatten(0, 1).double(), rtol=1e-9, atol=1e-9)
        assert layer.store.pages.tokens < in_pages.sum() * 3 and layer.store.pages.counts.max() > 1


@torch.no_grad()
def test_what_stays_below_the_threshold_is_forgotten():
    model = tiny(num_hidden_layers=4)
    ids, mask = padded_batch([70, 51])
    cache = gatekv.KVCache(model, D2O(), 0.9, decode="keep")
    model(ids, attention_mask=mask, position_ids=positions_of(mask), past_key_values=cache)
    whole = mask.sum(-1, keepdim=True).expand(2, 3).flatten()
    for i, layer in enumerate(cache.evicting()):
        stands_for = totals(layer)[0]
        if i == 2:
            assert (stands_for < whole).all() and (stands_for > layer.store.pages.lengths).all()
            assert not layer.store.remainder.threshold.isnan().any()
        else:
            assert torch.equal(stands_for, whole) and layer.store.remainder.threshold is None, "layers left whole"


@torch.no_grad()
@pytest.mark.parametrize("policy,decode", [(D2O(skip_layers=()), "evict"), (ElasticCache(window=8), "evict"), ("snapkv+merge_similar", "keep")])  # fmt: skip
def test_copies_files_beams_and_bytes(policy, decode, tmp_path):
    model = tiny()
    ids = torch.randint(1, VOCAB, (2, 60), generator=torch.Generator().manual_seed(0))
    later = torch.randint(1, VOCAB, (2, 12), generator=torch.Generator().manual_seed(2))
    cache = gatekv.KVCache(model, policy, 0.7, decode=decode)
    model(ids, past_key_values=cache)
    model(later[:, :1], past_key_values=cache)
    cache.save(tmp_path / "merged.safetensors")
    twin, loaded = cache.snapshot(), gatekv.KVCache.load(tmp_path / "merged.safetensors", model)
    swapped = cache.snapshot()
    swapped.reorder_cache(torch.tensor([1, 0]))
    assert str(loaded.config.policy) == str(cache.config.policy)
    for a, b in zip(loaded.evicting(), cache.evicting()):
        assert torch.equal(a.store.pages.counts, b.store.pages.counts) and a.store.pages.counts.max() > 1
        assert any(t is b.store.pages.counts for t in b.tensors()), "counts are bytes that memory() counts"
    wanted = model(later, past_key_values=cache).logits
    for other in (twin, loaded):
        torch.testing.assert_close(model(later, past_key_values=other).logits, wanted)
    torch.testing.assert_close(model(later.flip(0), past_key_values=swapped).logits.flip(0), wanted)


@torch.no_grad()
def test_a_turn_merges_into_what_earlier_turns_left():
    model = tiny()
    ids = torch.randint(1, VOCAB, (2, 100), generator=torch.Generator().manual_seed(0))
    cache = gatekv.KVCache(model, "keydiff+merge_near", 0.5, turns=True)
    for a, b in ((0, 50), (50, 80)):
        model(ids[:, a:b], past_key_values=cache)
    cache.compress()
    for layer in cache.evicting():
        assert (totals(layer)[0] == 80).all() and (layer.store.pages.lengths == 40).all()
    assert torch.isfinite(model(ids[:, 80:], past_key_values=cache).logits).all()


@torch.no_grad()
@pytest.mark.parametrize("policy", [D2O(skip_layers=()), ElasticCache(window=8), "nacl", "fastgen"])
def test_a_shared_prefill_decides_as_one_of_its_own(policy):
    model = tiny()
    ids, later = torch.randint(1, VOCAB, (2, 60)), torch.randint(1, VOCAB, (2, 5))
    undecided, own = gatekv.KVCache.undecided(model), gatekv.KVCache(model, policy, 0.5)
    model(ids, past_key_values=undecided)
    model(ids, past_key_values=own)
    shared = undecided.decide(policy, 0.5)
    torch.testing.assert_close(model(later, past_key_values=shared).logits, model(later, past_key_values=own).logits)


@pytest.mark.parametrize("policy", [NACL(), FastGen(), D2O(skip_layers=()), ElasticCache(window=8)], ids=str)
def test_chunked_prompts_and_beams(policy):
    model = tiny()
    ids, mask = padded_batch([60, 44])
    options = dict(max_new_tokens=10, do_sample=False)
    wanted = model.generate(ids, attention_mask=mask, past_key_values=gatekv.KVCache(model, policy, 0.5), **options)
    assert not torch.equal(wanted, model.generate(ids, attention_mask=mask, **options)), "what is evicted matters"
    cache = gatekv.KVCache(model, policy, 0.5, prompt_tokens=60)
    assert torch.equal(
        model.generate(ids, attention_mask=mask, past_key_values=cache, prefill_chunk_size=17, **options), wanted
    )
    options["num_beams"] = 3
    beams = model.generate(ids, attention_mask=mask, past_key_values=gatekv.KVCache(model, policy, 0.5), **options)
    alone = model.generate(ids[1:, 16:], past_key_values=gatekv.KVCache(model, policy, 0.5), **options)
    assert torch.equal(beams[1, 60:], alone[0, 44:])


@torch.no_grad()
def test_evaluation_pays_for_the_counts_in_tokens():
    from gatekv.evaluation import frontier
    from gatekv.evaluation.tasks import Item

    model = tiny(dtype=torch.float32)
    ids = torch.randint(1, VOCAB, (800,), generator=torch.Generator().manual_seed(0)).tolist()
    item = Item(ids, [([5], [6, 7])], lambda log_p, answers, full: ([0.0], [0.0]))
    cells = [frontier.FULL, ("snapkv", 0.5), ("snapkv+merge_near", 0.5)]
    _, alone, merged = frontier.run_item(model, item, cells, decode="keep", sinks=None, window=None)
    assert merged["refused"] is None and merged["ratio"] == pytest.approx(alone["ratio"], abs=0.01)


def test_what_cannot_be_is_refused_with_the_cure():
    model = gated(window=4)
    with pytest.raises(ValueError, match="beta is the weight"):
        MergeSimilar(beta=2)
    with pytest.raises(ValueError, match="spare counts the first kept"):
        MergeNear(spare=-1)
    with pytest.raises(ValueError, match="with a gate use prefill='dense' and decode='keep'"):
        gatekv.KVCache(model, "gate+global+merge_near", 0.5)
    with pytest.raises(ValueError, match="positions='cache' and merging"):
        gatekv.KVCache(model, Policy(StreamingLLM(positions="cache"), remainder=MergeNear()), 0.5)
    with pytest.raises(ValueError, match="narrow tokens cannot be folded later"):
        gatekv.KVCache(model, ThinK(D2O(skip_layers=())), 0.5)
    with pytest.raises(ValueError, match="names two of less, merge_similar"):
        gatekv.KVCache(model, "snapkv+less+merge_near", 0.5)
    both = gatekv.KVCache(model, AdaKV(Policy(SnapKV(), layers=Even(), remainder=MergeNear())), 0.5)
    assert str(both.config.policy) == "SnapKV x Ada x MergeNear"
