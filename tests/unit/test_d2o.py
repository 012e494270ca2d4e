"""D2O and Elastic-Cache as wholes: layers by variance, and every decoding step against a plain loop."""

import pytest
import torch
from conftest import VOCAB, tiny

import gatekv
from gatekv.attention import AttentionCall
from gatekv.policies import D2O, ElasticCache, Policy, resolve
from gatekv.policies.layers import Even, whole_layers
from gatekv.policies.merging import MergeNear, MergeSimilar
from gatekv.policies.variance import Variance

DIM, PROMPT, STEPS = 16, 40, 30


def test_sharper_layers_get_less_room():
    flat, sharp = torch.ones(2, 3, 50), torch.ones(2, 3, 50)
    sharp[..., 7] = 30
    valid = torch.ones(2, 50, dtype=torch.bool)
    weights = Variance().weights(torch.stack([flat, sharp, flat * 9]), valid)
    assert (weights[0] == weights[2]).all() and (weights[0] > weights[1]).all(), "the scale says nothing"
    wanted = 0.5 * (torch.tensor([0.0, 1.0, 0.0]) * 3).neg().exp()
    torch.testing.assert_close(weights[:, 0] / weights[0, 0], (wanted / wanted[0]).double())
    rooms = Variance(floor=0.0).rooms(weights[:, 0].tolist(), 0.4, 50, 0)
    assert sum(rooms) == pytest.approx(60, abs=3) and rooms[1] < rooms[0] == rooms[2]
    padded = torch.nn.functional.pad(torch.stack([flat, sharp]), (6, 0), value=5.0)
    both = Variance().weights(padded, torch.nn.functional.pad(valid, (6, 0)))
    torch.testing.assert_close(both, Variance().weights(torch.stack([flat, sharp]), valid))
    with pytest.raises(ValueError, match="reads attention that tokens receive.*or take even"):
        Variance().weights(-flat[None], valid)
    with pytest.raises(ValueError, match="floor is the share"):
        Variance(floor=2)


@pytest.mark.parametrize("ratio", [0.05, 0.3, 0.7, 0.95, 1.0])
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [1e-9, 1.0, 0.5], [1e-9, 1e-9, 1.0, 0.9]])
def test_rooms_are_within_bounds_and_pay_for_each_other(weights, ratio):
    rooms = Variance().rooms(weights, ratio, 200, 8)
    total = ratio * 200 * len(weights)
    assert total - len(weights) < sum(rooms) <= total + 1e-6
    assert all(min(8, int(ratio * 200)) <= r <= 200 for r in rooms)
    if 0.3 <= ratio <= 0.7 and weights[0] < 1:
        assert rooms[-2] > rooms[0] >= int(0.2 * ratio * 200)


@torch.no_grad()
@pytest.mark.parametrize("budget", [0.8, 0.9])
def test_layers_left_whole_are_paid_for(budget):
    model = tiny(num_hidden_layers=6, dtype=torch.float32)
    cache = gatekv.KVCache(model, "d2o", budget, decode="keep")
    model(torch.randint(1, VOCAB, (2, 200)), past_key_values=cache)
    held = torch.stack(cache.flags()).float().mean((1, 2, 3))
    assert (held[[0, 1, 5]] == 1).all() and held.mean().item() == pytest.approx(budget, abs=0.01)
    assert len(held[2:5].unique()) > 1, "the others share by variance"
    even = gatekv.KVCache(model, "d2o+even", budget, decode="keep")
    model(torch.randint(1, VOCAB, (1, 200)), past_key_values=even)
    assert torch.stack(even.flags()).float().mean((1, 2, 3))[2:5].unique().numel() == 1
    with pytest.raises(ValueError, match="budget 0.4 is unreachable: 3 of 6 layers are left whole; skip fewer"):
        model(torch.randint(1, VOCAB, (1, 200)), past_key_values=gatekv.KVCache(model, "d2o", 0.4, strict=True))


def test_what_a_name_stands_for():
    policy = resolve("d2o", 0.5)
    assert policy.needs.scope == "model" and str(policy) == "D2O x Uniform x Variance x MergeSimilar"
    assert str(resolve("elastic+ada", 0.5)) == "ElasticCache x Ada x MergeNear"
    assert isinstance(resolve("d2o+merge_near+even", 0.5).remainder, MergeNear)
    assert resolve("h2o", 0.5).remainder is None
    assert whole_layers((0, 1, -1, 9, -9), 0.5, 8) == ([0, 1, 7], (0.5 * 8 - 3) / 5)
    with pytest.raises(ValueError, match="variance gives each layer a number of tokens, and Global"):
        resolve("d2o+global", 0.5)


class Head:
    """One query head over its own keys: lists of what is held, in the plainest way."""

    def __init__(self, keys, values, queries, room, recent, threshold=None):
        n = len(keys)
        self.room, self.recent, self.threshold, self.seen = room, recent, threshold, n
        p = torch.stack([torch.nn.functional.pad((queries[i] @ keys[: i + 1].T / DIM**0.5).softmax(-1), (0, n - 1 - i))
                         for i in range(n)])  # fmt: skip
        self.tokens = [[j, keys[j], values[j], 1, p[:, j].sum().item()] for j in range(n)]

    def step(self, key, value, query):
        """Attend with the new token and what is held."""
        self.tokens.append([self.seen, key, value, 1, 0.0])
        self.seen += 1
        k, v = (torch.stack([t[i] for t in self.tokens]) for i in (1, 2))
        p = (query @ k.T / DIM**0.5).softmax(-1)
        for token, paid in zip(self.tokens, p.tolist()):
            token[4] += paid
        return p @ v

    def evict(self, merge):
        """D2O: the least attended outside the recent ones go together, and merge if near enough."""
        old = [t for t in self.tokens if self.seen - t[0] > self.recent]
        gone = sorted(old, key=lambda t: t[4])[: max(len(self.tokens) - self.room, 0)]
        self.tokens = [t for t in self.tokens if all(t is not g for g in gone)]
        if not gone:
            return
        near = [
            max((float(torch.cosine_similarity(g[1], t[1], dim=0)), -i) for i, t in enumerate(self.tokens))
            for g in gone
        ]
        mean = sum(c for c, _ in near) / len(near)
        self.threshold = mean if self.threshold is None else 0.5 * mean + 0.5 * self.threshold
        into: dict = {}
        for g, (c, i) in zip(gone, near):
            if c >= self.threshold - 1e-12:
                into.setdefault(-i, []).append(g)
        for i, guests in into.items() if merge else ():
            t = self.tokens[i]
            for part in (1, 2):
                t[part] = (t[part] * t[3] + sum(g[part] * g[3] for g in guests)) / (t[3] + sum(g[3] for g in guests))
            t[3] += sum(g[3] for g in guests)


def fed(policy, ratio):
    """One layer of a cache, and random queries, keys, values of it."""
    generator = torch.Generator().manual_seed(3)
    cache = gatekv.KVCache(tiny(num_attention_heads=2, num_key_value_heads=2), policy, ratio, decode="evict")
    layer = cache.evicting()[0]
    q, k, v = (torch.randn(1, 2, PROMPT + STEPS, DIM, generator=generator, dtype=torch.float64) for _ in range(3))
    call = AttentionCall(hidden=torch.zeros(1, PROMPT, 1), layer_idx=0)
    layer.expect(0)
    layer.update(k[:, :, :0], v[:, :, :0])
    layer.cache = cache  # which lives as long as its layer is asked
    return layer, q, k, v, lambda a, c: layer.attend(call, q[:, :, a:c], k[:, :, a:c], v[:, :, a:c], None, DIM**-0.5)


@pytest.mark.parametrize("chunk", [1, 7])
def test_every_step_of_d2o_is_the_plain_loops(chunk):
    policy = Policy(D2O(skip_layers=()), layers=Even())
    layer, q, k, v, feed = fed(policy, 0.35)
    room = int(0.35 * PROMPT)
    heads = [Head(k[0, h, :PROMPT], v[0, h, :PROMPT], q[0, h, :PROMPT], room, int(room * 0.25)) for h in range(2)]
    alone = [Head(k[0, h, :PROMPT], v[0, h, :PROMPT], q[0, h, :PROMPT], room, int(room * 0.25)) for h in range(2)]
    for head in heads:
        head.evict(True)
    for head in alone:
        head.evict(False)
    feed(0, PROMPT)
    differs = 0.0
    for a in range(PROMPT, PROMPT + STEPS, chunk):
        c = min(PROMPT + STEPS, a + chunk)
        out = feed(a, c)
        for i in range(a, c):
            for h in range(2):
                wanted = heads[h].step(k[0, h, i], v[0, h, i], q[0, h, i])
                torch.testing.assert_close(out[0, h, i - a], wanted, rtol=1e-9, atol=1e-9)
                differs += float((alone[h].step(k[0, h, i], v[0, h, i], q[0, h, i]) - wanted).abs().max())
                heads[h].evict(True)
                alone[h].evict(False)
        held = [layer.stage.held(layer)[0, h].nonzero().flatten().tolist() for h in range(2)]
        assert held == [sorted(t[0] for t in head.tokens) for head in heads]
        wanted = torch.tensor([head.threshold for head in heads], dtype=torch.float64)
        torch.testing.assert_close(layer.store.remainder.threshold, wanted)
    assert differs > 1, "merging matters"
    assert isinstance(layer.config.policy.remainder, MergeSimilar)


def test_elastic_cache_clears_a_fixed_place_at_every_step():
    layer, _, _, _, feed = fed(ElasticCache(sinks=2, window=6), 0.5)
    feed(0, PROMPT)
    held = layer.stage.held(layer)[0]
    assert (held.sum(-1) == 20).all() and held[:, :2].all() and held[:, -6:].all()
    stays = [[j for j in row.nonzero().flatten().tolist() if j < PROMPT - 6] for row in held]
    for i in range(PROMPT, PROMPT + STEPS):
        feed(i, i + 1)
        for h in range(2):
            wanted = stays[h] + list(range(i - 5, i + 1))
            assert layer.stage.held(layer)[0, h].nonzero().flatten().tolist() == wanted
    counts = layer.store.pages.counts[layer.store.pages.occupied()]
    assert counts.max() > 1
