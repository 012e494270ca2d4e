"""NACL: the best by the proxies' attention, the rest by lot; the same lot in any batch."""

import pytest
import torch
from test_policies import view

import gatekv
from gatekv.ops import attention_mass, naive
from gatekv.policies import NACL


def chosen(scorer, v, counts):
    """What one layer keeps: [batch, kv_heads, tokens]."""
    counts = torch.tensor(counts)
    index = v.valid.long().cumsum(-1) - 1
    recent = scorer.recent(counts, scorer.window)
    length = v.valid.sum(-1)
    protected = ((index < scorer.sinks) | (index >= (length - recent)[:, None])) & v.valid
    sure = scorer.always_keep(v, protected[:, None], counts)
    rule = gatekv.policies.BUDGETS["uniform"]()
    return rule.keep(scorer.score(v)[None], sure[None], v.valid, counts[None])[0], sure, protected


def test_the_parts_of_what_is_kept():
    v, scorer = view(n=200), NACL(proxies=0.05, recent_share=0.2)
    keep, sure, protected = chosen(scorer, v, [80, 80])
    assert (keep.sum(-1) == 80).all() and (protected.sum(-1) == 4 + 12).all()
    free = 80 - 16
    drawn = round(free * 7 / 19)
    assert (sure.sum(-1) == 80 - drawn).all() and (keep & ~sure).sum(-1).unique().tolist() == [drawn]
    for b in range(2):
        for h in range(2):
            a = torch.zeros(200)
            for g in range(3):
                s = v.queries[b, h * 3 + g, -10:] @ v.keys[b, h].T * 0.5
                a += s.masked_fill(~naive.causal_mask(10, 200), -torch.inf).softmax(-1).sum(0) / 3
            best = a.masked_fill(protected[b], -1).topk(free - drawn).indices
            assert set((sure[b, h] & ~protected[b]).nonzero().flatten().tolist()) == set(best.tolist())


def test_the_lot_is_seeded_differs_by_head_and_ignores_batch_and_padding():
    padded = view(pads=11, n=90)
    keep = chosen(NACL(), padded, [30, 40])[0]
    assert torch.equal(keep, chosen(NACL(), padded, [30, 40])[0])
    assert not torch.equal(keep, chosen(NACL(seed=1), padded, [30, 40])[0])
    parts = (padded.keys, padded.values, padded.queries)
    solo = type(padded)(*(t[:1, :, 11:] for t in parts), padded.valid[:1, 11:], 0.5, 1, None)
    assert torch.equal(keep[:1, :, 11:], chosen(NACL(), solo, [30])[0]) and not keep[0, :, :11].any()


def test_who_is_drawn_follows_the_softmax_of_the_attention():
    """Over many seeds, a lot for one place among three goes by exp(a)."""
    v, draws = view(batch=1, kv=1, groups=1, n=3), torch.zeros(3)
    scorer = NACL(proxies=1.0)
    a = scorer.attention(v)[0, 0]
    for seed in range(4000):
        draws[NACL(proxies=1.0, seed=seed).score(v)[0, 0].argmax()] += 1
    torch.testing.assert_close(draws / 4000, a.softmax(-1), atol=0.03, rtol=0)


@pytest.mark.parametrize("count", [6, 20, 79, 400])
def test_recent_tokens_of_short_prompts_are_guarded(count):
    recent = int(NACL().recent(torch.tensor([count]), 1))
    assert recent == max(1, int(count * 0.05) - 4), "the newest token always stays"


@torch.no_grad()
@pytest.mark.parametrize("length", [12, 30])
def test_short_prompts_are_compressed_too(length):
    from conftest import VOCAB, tiny

    model = tiny(dtype=torch.float32)
    cache = gatekv.KVCache(model, "nacl", 0.5)
    model(torch.randint(1, VOCAB, (1, length)), past_key_values=cache)
    assert all((f.sum(-1) == length // 2).all() and f[..., -1].all() and f[..., :4].all() for f in cache.flags())
    with pytest.raises(ValueError, match="below the 5 that sinks . window protect: raise budget"):
        model(torch.randint(1, VOCAB, (1, length)), past_key_values=gatekv.KVCache(model, "nacl", 0.1, strict=True))


def test_shares_are_checked():
    for name in ("proxies", "sampled", "recent_share"):
        with pytest.raises(ValueError, match=f"{name} is a share, 0 to 1; got 1.5"):
            NACL(**{name: 1.5})


@pytest.mark.parametrize("n,last", [(7, 7), (33, 33), (33, 5)])
def test_blocks_are_the_whole_square(n, last, monkeypatch):
    monkeypatch.setattr(attention_mass, "ELEMENTS", 100)
    q, k = torch.randn(2, 6, last, 8, dtype=torch.float64), torch.randn(2, 3, n, 8, dtype=torch.float64)
    valid, asks = torch.ones(2, n, dtype=torch.bool), torch.ones(2, last, dtype=torch.bool)
    valid[1, : n // 3] = False
    asks[0, : last // 2] = False
    asks &= valid[:, -last:]
    options = dict(scale=0.3, valid=valid)
    wanted = naive.attention_mass(q, k, asks=asks, **options)
    torch.testing.assert_close(attention_mass.attention_mass(q, k, asks=asks, **options), wanted)
    torch.testing.assert_close(wanted.sum(-1), asks.sum(-1)[:, None].double().expand(2, 3))
    if last == n:
        near, beside = torch.tensor([3, n]), torch.rand(2, 3, n) < 0.3
        wanted = naive.local_mass(q, k, near=near, beside=beside, **options)
        torch.testing.assert_close(attention_mass.local_mass(q, k, near=near, beside=beside, **options), wanted)
        rest = naive.attention_mass(q, k, **options).masked_fill(beside, 0).sum(-1)
        torch.testing.assert_close(wanted[1], rest[1], msg="a window over everything finds everything beside")
        assert (wanted[0] < rest[0]).all()
