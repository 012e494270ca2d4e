"""Scores and budget rules, each against its formula written out."""

import pytest
import torch

import gatekv
from gatekv.policies import BUDGETS, SCORERS, L2Norm, Random, SinksRecent, SnapKV, ValueNorm, View, resolve
from gatekv.policies.adakv import Ada
from gatekv.policies.amount import budget_text, checked_budget, count_of, read_budget, share_of
from gatekv.policies.budgets import Threshold, Uniform, check_counts
from gatekv.policies.layers import Even, layer_count


def view(batch=2, kv=2, groups=3, n=40, d=4, pads=0, seed=0):
    torch.manual_seed(seed)
    keys, values = torch.randn(batch, kv, n, d), torch.randn(batch, kv, n, d)
    valid = torch.ones(batch, n, dtype=torch.bool)
    valid[0, :pads] = False
    return View(keys, values, torch.randn(batch, kv * groups, n, d), valid, 0.5, 1, lambda: keys[..., 0])


@pytest.mark.parametrize("pooling", ["max", "mean"])
def test_snapkv_formula(pooling):
    v = view()
    got = SnapKV(window=8, kernel=5, pooling=pooling).score(v)
    for b in range(2):
        for h in range(2):
            votes = []
            for g in range(3):
                q = v.queries[b, h * 3 + g, -8:]
                s = q @ v.keys[b, h].T * 0.5
                for i in range(8):
                    s[i, 32 + i + 1 :] = -torch.inf
                votes.append(s.softmax(-1).sum(0))
            a = torch.stack(votes).mean(0)[:32]
            for j in range(32):
                near = a[max(0, j - 2) : j + 3]
                wanted = near.max() if pooling == "max" else near.sum() / 5
                assert got[b, h, j].item() == pytest.approx(wanted.item(), rel=1e-5)


@pytest.mark.parametrize("name", [n for n in SCORERS if n != "full"])
def test_padding_changes_no_score(name):
    padded = view(pads=11)
    scorer = SCORERS[name]()
    solo = View(*(t[:1, :, 11:] for t in (padded.keys, padded.values, padded.queries)), padded.valid[:1, 11:], 0.5, 1,
                lambda: padded.keys[:1, :, 11:, 0])  # fmt: skip
    torch.testing.assert_close(scorer.score(padded)[:1, :, 11:], scorer.score(solo))


def test_simple_scores():
    v = view()
    torch.testing.assert_close(L2Norm().score(v), -v.keys.norm(dim=-1))
    torch.testing.assert_close(ValueNorm().score(v), v.values.norm(dim=-1))
    assert SinksRecent().score(v)[0, 0].tolist() == list(range(40))
    assert L2Norm().score(View(v.keys.bfloat16(), v.values, v.queries, v.valid, 1, 0, None)).dtype == torch.float32


def test_random_is_seeded_spread_and_differs_by_layer_and_head():
    v = view(n=500)
    a, b = Random(seed=0).score(v), Random(seed=1).score(v)
    torch.testing.assert_close(a, Random(seed=0).score(v))
    assert not torch.equal(a, b) and not torch.equal(a[:, 0], a[:, 1])
    assert a.min() >= 0 and a.max() <= 1 and abs(a.mean() - 0.5) < 0.03
    assert torch.equal(a[0], a[1]), "the same row content-free, whatever its place in the batch"


def keep(rule, scores, ratio, protected=None, valid=None):
    valid = torch.ones(scores.shape[1], scores.shape[3], dtype=torch.bool) if valid is None else valid
    protected = torch.zeros_like(scores, dtype=torch.bool) if protected is None else protected
    counts = torch.tensor([Even().count(ratio, n, 0, 0, 1) for n in valid.sum(-1).tolist()])
    for guarded in protected:
        check_counts(counts, guarded, ratio, valid)
    return BUDGETS[rule]().keep(scores, protected, valid, counts.expand(len(scores), -1))


def test_uniform_keeps_the_top_of_each_head():
    scores = torch.randn(1, 2, 3, 20)
    got = keep("uniform", scores, 0.35)
    assert (got.sum(-1) == 7).all()
    for b in range(2):
        for h in range(3):
            assert set(got[0, b, h].nonzero().flatten().tolist()) == set(scores[0, b, h].topk(7).indices.tolist())


def test_global_keeps_the_top_of_everything():
    scores = torch.randn(4, 2, 3, 20)
    got = keep("global", scores, 0.25)
    for b in range(2):
        assert got[:, b].sum() == 4 * 3 * 5
        assert scores[:, b][got[:, b]].min() > scores[:, b][~got[:, b]].max()


def test_ada_is_the_papers_rule():
    torch.manual_seed(0)
    scores = torch.randn(1, 1, 4, 50) * torch.tensor([0.1, 1.0, 2.0, 3.0])[:, None]
    protected = torch.zeros(1, 1, 4, 50, dtype=torch.bool)
    protected[..., -5:] = True
    got = keep("ada", scores, 0.4, protected)
    free = 20 - 5
    joint = torch.zeros(4, dtype=torch.long)
    joint.scatter_add_(
        0, scores[0, 0, :, :45].flatten().topk(free * 4).indices // 45, torch.ones(free * 4, dtype=torch.long)
    )
    wanted = torch.round(0.8 * joint + 0.2 * free).long() + 5
    assert got[0, 0].sum(-1).tolist() == wanted.tolist()
    assert got[0, 0, :, -5:].all()
    assert wanted.max() > wanted.min() + 10, "heads must compete for this test to see it"


@pytest.mark.parametrize("rule", ["uniform", "ada", "global"])
def test_rules_respect_pads_protection_and_a_full_budget(rule):
    scores = torch.randn(2, 2, 3, 30)
    valid = torch.ones(2, 30, dtype=torch.bool)
    valid[1, :10] = False
    protected = torch.zeros_like(scores, dtype=torch.bool)
    protected[:, 0, :, :2] = protected[:, 1, :, 10:12] = True
    got = keep(rule, scores, 0.5, protected, valid)
    assert not got[:, 1, :, :10].any() and got[protected].all()
    totals = got.sum((0, 2, 3))
    assert abs(totals[0] - 2 * 3 * 15) <= 6 and abs(totals[1] - 2 * 3 * 10) <= 6
    assert torch.equal(keep(rule, scores, 1.0, protected, valid), valid[None, :, None].expand_as(scores))


@pytest.mark.parametrize("rule", ["uniform", "ada", "global"])
def test_budget_below_protection_is_refused(rule):
    scores = torch.randn(1, 1, 2, 100)
    protected = torch.zeros_like(scores, dtype=torch.bool)
    protected[..., :40] = True
    with pytest.raises(ValueError, match="below the 40 that sinks . window protect: raise budget"):
        keep(rule, scores, 0.3, protected)


def test_layers_left_whole_are_paid_for_by_the_others():
    counts = [layer_count(Even(), (0, 1), 0.5, 120, 0, i, 8) for i in range(8)]
    assert counts[:2] == [120, 120] and sum(counts) == 4 * 120
    with pytest.raises(ValueError, match="unreachable"):
        layer_count(Even(), (0, 1), 0.25, 120, 0, 3, 8)
    assert [layer_count(Even(), (), 0.25, 120, 0, i, 3) for i in range(3)] == [30] * 3


def test_resolve_strings_objects_and_errors():
    p = resolve("snapkv+ada", 0.25)
    assert isinstance(p.scorer, SnapKV) and isinstance(p.rule, Ada) and p.budget == 0.25
    assert isinstance(resolve(SnapKV(window=16), 0.5).rule, Uniform)
    assert isinstance(resolve("gate", None).rule, Threshold)
    assert resolve("full", None).budget == 1.0
    assert resolve(p, 0.5).budget == 0.5
    with pytest.raises(ValueError, match="Did you mean 'snapkv'.*Known: full"):
        resolve("snapvk", 0.25)
    with pytest.raises(ValueError, match="Did you mean 'global'"):
        resolve("gate+globl", 0.25)
    with pytest.raises(ValueError, match="names two of threshold"):
        resolve("gate+ada+global", 0.25)
    with pytest.raises(ValueError, match="needs budget="):
        resolve("keydiff", None)
    with pytest.raises(ValueError, match="has no threshold"):
        resolve("keydiff+threshold", 0.2)
    for budget in (0, -1, 1.5, 0.0, float("inf"), float("nan"), -3.0):
        with pytest.raises(ValueError, match="above 0 and at most 1"):
            resolve("keydiff", budget)
    for budget in (True, False, "0.5"):
        with pytest.raises(ValueError, match="budget is a number, a share like 0.25 or tokens like 512"):
            resolve("keydiff", budget)
    with pytest.raises(ValueError, match="use 0.255 for 25.5 %, or 26 tokens"):
        resolve("keydiff", 25.5)
    with pytest.raises(ValueError, match="policy must be a name"):
        resolve(3, 0.5)
    with pytest.raises(ValueError, match="kernel must be odd"):
        SnapKV(kernel=4)
    with pytest.raises(ValueError, match="pooling"):
        SnapKV(pooling="avg")


def test_a_budget_is_a_share_or_a_number_of_tokens():
    for given, wanted in ((1, 1.0), (1.0, 1.0), (512, 512), (512.0, 512), (0.25, 0.25), (None, None)):
        found = checked_budget(given)
        assert found == wanted and type(found) is type(wanted)
    for text, wanted in ((".25", 0.25), ("1", 1.0), ("512", 512), ("1.0", 1.0), ("none", None)):
        found = read_budget(text)
        assert found == wanted and type(found) is type(wanted)
    for text in ("half", "", "nan", "1.5.2"):
        with pytest.raises(ValueError, match="is no number: use shares like .25, or tokens like 512"):
            read_budget(text)
    assert [budget_text(b) for b in (0.125, 512, None)] == ["12.5 %", "512 tokens", "no budget"]
    assert share_of(512, 1024) == 0.5 and share_of(512, 100) == 1.0 and share_of(0.3, 100) == 0.3
    assert all(count_of(512, n) == min(512, n) for n in range(1, 5000)), "to the token, whatever the rounding"


def test_older_names_of_public_things_still_serve_and_say_what_they_are_called():
    with pytest.warns(FutureWarning, match="Mine.streams is called evicts_in_decode now"):

        class Mine(gatekv.policies.KeyDiff):
            streams = True

    assert Mine.evicts_in_decode
    with pytest.warns(FutureWarning, match="positions='slot' is called 'cache' now"):
        assert gatekv.policies.StreamingLLM(positions="slot").cache_positions
