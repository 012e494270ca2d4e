"""Policies that evict at every step, against a naive loop over sets of tokens that knows nothing of pages."""

import pytest
import torch
from conftest import padded_batch, tiny

import gatekv
from gatekv.attention import AttentionCall
from gatekv.ops import naive
from gatekv.policies import H2O, TOVA, L2Norm, StreamingLLM
from gatekv.rotary import rotate

KV, GROUP, D, PROMPT, STEPS = 2, 2, 16, 40, 30
POLICIES = {
    "h2o": H2O(),
    "h2o-heavy": H2O(recent_share=0.0),
    "tova": TOVA(),
    "l2": L2Norm(skip_layers=()),
    "streaming_llm": StreamingLLM(sinks=2),
    "streaming_llm-slot": StreamingLLM(sinks=2, positions="cache"),
}


class Naive:
    """One head group of one row: a list of kept indices and their scores, recomputed in the plainest way."""

    def __init__(self, scorer, keys, values, queries, room):
        self.scorer, self.k, self.v, self.room = scorer, list(keys), list(values), room
        n = len(keys)
        p = keys.new_zeros(n, GROUP, n)
        for i in range(n):
            p[i, :, : i + 1] = (queries[:, i] @ keys[: i + 1].T / D**0.5).softmax(-1)
        self.mass = dict(enumerate(p.sum(0).mean(0).tolist()))
        self.last = dict(enumerate(p[-1].mean(0).tolist()))
        self.held = list(range(n))

    def step(self, key, value, query):
        """Attend with the new token and what is held; [group, D]."""
        self.k.append(key)
        self.v.append(value)
        self.held.append(len(self.k) - 1)
        self.mass[self.held[-1]] = 0.0
        k, v = (torch.stack([x[j] for j in self.held]) for x in (self.k, self.v))
        p = (query @ k.T / D**0.5).softmax(-1)
        for j, paid in zip(self.held, p.mean(0).tolist()):
            self.mass[j] += paid
        self.last = dict(zip(self.held, p.mean(0).tolist()))
        return p @ v

    def worth(self, j):
        if isinstance(self.scorer, H2O):
            return self.mass[j] if j < len(self.k) - int(self.room * self.scorer.recent_share) else torch.inf
        if isinstance(self.scorer, TOVA):
            return self.last[j] if j < len(self.k) - 1 else torch.inf
        if isinstance(self.scorer, StreamingLLM):
            return torch.inf if j < self.scorer.sinks else j
        return -float(self.k[j].norm())


def evict(heads):
    """Down to the room; TOVA's heads share one set, by their mean."""
    shared = isinstance(heads[0].scorer, TOVA)
    while len(heads[0].held) > heads[0].room:
        if shared:
            mean = lambda j: sum(h.worth(j) for h in heads) / len(heads)  # noqa: E731
            gone = min(heads[0].held, key=mean)
        for h in heads:
            h.held.remove(gone if shared else min(h.held, key=h.worth))


@pytest.mark.parametrize("chunk", [1, 7])
@pytest.mark.parametrize("name", [n for n in POLICIES if "slot" not in n])
def test_every_step_is_the_naive_loops(name, chunk):
    """One layer, queries, keys and values at random, prompt and steps, float64."""
    scorer, generator = POLICIES[name], torch.Generator().manual_seed(3)
    model = tiny(dtype=torch.float64)
    cache = gatekv.KVCache(model, scorer, 0.35, decode="evict")
    layer = cache.evicting()[0]
    draw = lambda heads, n: torch.randn(1, heads, n, D, generator=generator, dtype=torch.float64)  # noqa: E731
    n = PROMPT + STEPS
    q, k, v = draw(KV * GROUP, n), draw(KV, n), draw(KV, n)
    room = int(0.35 * PROMPT)
    heads = [
        Naive(scorer, k[0, h, :PROMPT], v[0, h, :PROMPT], q[0, h * GROUP : (h + 1) * GROUP, :PROMPT], room)
        for h in range(KV)
    ]
    evict(heads)
    call = AttentionCall(hidden=torch.zeros(1, PROMPT, 1), layer_idx=0)
    layer.expect(0)
    layer.update(k[:, :, :0], v[:, :, :0])
    layer.attend(call, q[:, :, :PROMPT], k[:, :, :PROMPT], v[:, :, :PROMPT], None, D**-0.5)
    assert [layer.stage.held(layer)[0, h].nonzero().flatten().tolist() for h in range(KV)] == [
        sorted(h.held) for h in heads
    ]
    for a in range(PROMPT, n, chunk):
        c = min(n, a + chunk)
        out = layer.attend(call, q[:, :, a:c], k[:, :, a:c], v[:, :, a:c], None, D**-0.5)
        for i in range(a, c):
            wanted = torch.cat([x.step(k[0, h, i], v[0, h, i], q[0, h * GROUP : (h + 1) * GROUP, i])
                                for h, x in enumerate(heads)])  # fmt: skip
            torch.testing.assert_close(out[0, :, i - a], wanted, rtol=1e-9, atol=1e-9)
            evict(heads)
        held = [layer.stage.held(layer)[0, h].nonzero().flatten().tolist() for h in range(KV)]
        assert held == [sorted(h.held) for h in heads]
    assert all(len(h.held) == room for h in heads)


@pytest.mark.parametrize("ratio", [0.35, 1.0])
def test_slot_positions_are_places_in_the_cache(ratio):
    """Raw keys rotated anew at every step by their place in the cache: sinks, window, the new token."""
    generator, sinks = torch.Generator().manual_seed(5), 2
    draw = lambda heads: torch.randn(1, heads, PROMPT + STEPS, D, generator=generator, dtype=torch.float64)  # noqa: E731
    q, k, v = draw(KV * GROUP), draw(KV), draw(KV)
    angles = torch.arange(PROMPT + STEPS)[None, :, None] * 0.7 ** torch.arange(D // 2).double()
    angles = torch.cat([angles, angles], -1)
    at = lambda x, places: rotate(x, (1.5 * angles[:, places].cos(), 1.5 * angles[:, places].sin()))  # noqa: E731
    everywhere = list(range(PROMPT + STEPS))
    cache = gatekv.KVCache(tiny(dtype=torch.float64), StreamingLLM(sinks=sinks, positions="cache"), ratio)
    layer, room = cache.evicting()[0], int(ratio * PROMPT)
    layer.expect(0)
    layer.update(k[:, :, :0], v[:, :, :0])
    for a, c in ((0, PROMPT), (PROMPT, PROMPT + 1), (PROMPT + 1, PROMPT + STEPS)):
        rotary = (1.5 * angles[:, a:c].cos(), 1.5 * angles[:, a:c].sin())
        call = AttentionCall(hidden=torch.zeros(1, c - a, 1), layer_idx=0, rotary=rotary)
        out = layer.attend(call, at(q, everywhere)[:, :, a:c], at(k, everywhere)[:, :, a:c], v[:, :, a:c], None, 0.25)
        layer = layer.fork()
        for i in range(max(a, PROMPT), c):
            held = [j for j in range(i + 1) if j < sinks or j > i - (room - sinks) - 1]
            places = list(range(len(held)))
            keys = at(k[:, :, held], places).repeat_interleave(GROUP, 1)
            p = (at(q[:, :, i : i + 1], places[-1:]) @ keys.transpose(2, 3) * 0.25).softmax(-1)
            wanted = p @ v[:, :, held].repeat_interleave(GROUP, 1)
            torch.testing.assert_close(out[:, :, i - a : i - a + 1], wanted, rtol=1e-9, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("name", [*POLICIES, "h2o+ada", "tova+pyramid", "h2o+global"])
def test_padded_rows_are_solo_rows_in_every_step(name):
    model = tiny(dtype=torch.float64)
    ids, mask = padded_batch([60, 44])
    policy = POLICIES.get(name, name)
    later = torch.randint(1, 90, (2, 12), generator=torch.Generator().manual_seed(1))
    cache = gatekv.KVCache(model, policy, 0.5, decode="evict")
    _feed(model, cache, ids, mask)
    together = _feed(model, cache, later, torch.cat([mask, torch.ones_like(later)], 1))
    for row, n in enumerate((60, 44)):
        alone = gatekv.KVCache(model, policy, 0.5, decode="evict")
        _feed(model, alone, ids[row : row + 1, 60 - n :])
        got = torch.cat([_feed(model, alone, later[row : row + 1, i : i + 1]) for i in range(12)], 1)
        torch.testing.assert_close(together[row : row + 1], got, rtol=1e-9, atol=1e-9)
        for batch, solo in zip(cache.flags(), alone.flags()):
            assert torch.equal(batch[row, :, 60 - n :], solo[0])


def _feed(model, cache, ids, mask=None):
    positions = None if mask is None else (mask.cumsum(-1) - 1).clamp_min(0)[:, -ids.shape[1] :]
    return model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits


@torch.no_grad()
@pytest.mark.parametrize("name", POLICIES)
def test_a_full_budget_streams_the_plain_models_tokens_until_the_buffer_is_full(name):
    model = tiny(dtype=torch.float64)
    ids = torch.randint(1, 90, (1, 50), generator=torch.Generator().manual_seed(0))
    cache = gatekv.KVCache(model, POLICIES[name], 1.0, decode="evict")
    _feed(model, cache, ids[:, :40])
    kept = gatekv.KVCache(model, POLICIES[name], 1.0, decode="keep")
    _feed(model, kept, ids[:, :40])
    torch.testing.assert_close(_feed(model, kept, ids[:, 40:]), model(ids).logits[:, 40:], rtol=1e-12, atol=1e-12)
    _feed(model, cache, ids[:, 40:])
    assert all((f.sum(-1) == 40).all() for f in cache.flags()) and all((f.sum(-1) == 50).all() for f in kept.flags())


@torch.no_grad()
@pytest.mark.parametrize("name", POLICIES)
def test_bytes_stay_level_while_decoding(name):
    model = tiny(dtype=torch.float32)
    cache = gatekv.KVCache(model, POLICIES[name], 0.25, decode="evict")
    _feed(model, cache, torch.randint(1, 90, (1, 200)))
    held = []
    for _ in range(60):
        _feed(model, cache, torch.randint(1, 90, (1, 1)))
        held.append(cache.memory()["bytes"])
    assert max(held[20:]) <= max(held[:20]) and cache.memory()["ratio"] < (
        0.36 if "slot" in name else 0.3
    )  # a page of its own


@torch.no_grad()
@pytest.mark.parametrize("name", ["h2o", "streaming_llm-slot"])
def test_copies_saves_and_beams_take_the_buffer_along(name, tmp_path):
    model = tiny(dtype=torch.float64)
    ids = torch.randint(1, 90, (2, 50), generator=torch.Generator().manual_seed(0))
    later = torch.randint(1, 90, (2, 8), generator=torch.Generator().manual_seed(2))
    cache = gatekv.KVCache(model, POLICIES[name], 0.4)
    _feed(model, cache, ids)
    cache.save(tmp_path / "cache.safetensors")
    twin, loaded = cache.snapshot(), gatekv.KVCache.load(tmp_path / "cache.safetensors", model)
    swapped = cache.snapshot()
    swapped.reorder_cache(torch.tensor([1, 0]))
    wanted = _feed(model, cache, later)
    torch.testing.assert_close(_feed(model, twin, later), wanted)
    torch.testing.assert_close(_feed(model, loaded, later), wanted)
    torch.testing.assert_close(_feed(model, swapped, later.flip(0)).flip(0), wanted)


@torch.no_grad()
def test_what_cannot_be_is_refused_with_the_cure():
    model = tiny(dtype=torch.float32)
    with pytest.raises(ValueError, match="SnapKV decides once, at the prompt's end; leave decode out"):
        gatekv.KVCache(model, "snapkv", 0.5, decode="evict")
    with pytest.raises(ValueError, match="recent_share is a share"):
        H2O(recent_share=1.0)
    with pytest.raises(ValueError, match="positions"):
        StreamingLLM(positions="slots")
    cache = gatekv.KVCache(model, "h2o", 0.5, prompt_tokens=40)
    cache.activate_past_recording()
    _feed(model, cache, torch.randint(1, 90, (1, 40)))
    with pytest.raises(ValueError, match="H2O cannot bring back .*decode='keep'"):
        _feed(model, cache, torch.randint(1, 90, (1, 3)))


@pytest.mark.parametrize("n", [1, 7, 33])
def test_attention_mass_in_blocks_is_the_whole_square(n, monkeypatch):
    from gatekv.ops import attention_mass

    monkeypatch.setattr(attention_mass, "ELEMENTS", 100)
    q, k = torch.randn(2, 6, n, 8, dtype=torch.float64), torch.randn(2, 3, n, 8, dtype=torch.float64)
    valid = torch.ones(2, n, dtype=torch.bool)
    valid[1, : n // 3] = False
    wanted = naive.attention_mass(q, k, scale=0.3, valid=valid)
    torch.testing.assert_close(attention_mass.attention_mass(q, k, scale=0.3, valid=valid), wanted)
    torch.testing.assert_close(wanted.sum(-1), valid.sum(-1)[:, None].double().expand(2, 3))
