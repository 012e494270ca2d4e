"""The centroid form of the remainder: its sums, its maps, and what it must give back exactly."""

import pytest
import torch
from test_less import problem

from gatekv.config import LessSpec
from gatekv.less import LessMaps, State, Waiting
from gatekv.less.centroids import CentroidPhi, CentroidPsi
from gatekv.ops import naive, remainder, segments

SCALE = 0.35


def inputs(n=24, queries=None, heads=6, kv=3, d=8, seed=0):
    torch.manual_seed(seed)
    shapes = (heads, queries or n), (kv, n), (kv, n)
    q, k, v = (torch.randn(2, h, m, d, dtype=torch.float64, requires_grad=True) for h, m in shapes)
    return q, k, v, torch.rand(2, kv, n) < 0.5


def maps(rank=3, heads=6, kv=3, d=8):
    torch.manual_seed(1)
    return LessMaps(
        LessSpec(less_rank=rank, less_form="centroids", less_hidden=16, less_dropout=0.0), heads, kv, d
    ).double()


@pytest.mark.parametrize("n,queries", [(1, 1), (5, 5), (9, 4), (37, 37), (37, 1)])
@pytest.mark.parametrize("pads", [None, 3])
@pytest.mark.parametrize("heads,kv", [(6, 3), (8, 1)])
def test_reach_matches_naive(monkeypatch, n, queries, pads, heads, kv):
    monkeypatch.setattr(remainder, "CHUNK", 4)
    q, k, _, flags = inputs(n, queries, heads, kv)
    psi = problem(n, heads=heads, kv=kv)[1]
    mask = None
    if pads is not None:
        mask = naive.causal_mask(queries, n)[None, None].repeat(2, 1, 1, 1)
        mask[1, ..., : min(pads, n)] = False
    results = []
    for ops in (naive, remainder):
        reach, mass = ops.remainder_reach(q, k, psi, remainder.left_of(flags, 2), mask=mask)
        assert reach.shape == mass.shape == (2, heads, queries, psi.shape[-1])
        loss = (reach.sin() * torch.arange(reach.shape[2])[:, None]).sum() + mass.square().sum()
        results.append((reach, mass, *torch.autograd.grad(loss, (q, k, psi))))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("group", [1, 3, 8])
def test_recurrent_equals_parallel_whenever_tokens_are_folded(group):
    kv, n = 2, 30
    q, k, v, flags = inputs(n, heads=kv * group, kv=kv)
    m, left = maps(heads=kv * group, kv=kv), remainder.left_of(flags, 3)
    with torch.no_grad():
        psi = m.psi(k)
        whole, whole_lse = segments.merge(m.answer(q, SCALE, None, Waiting(psi, k, v, left, None)))
        state = m.state(v)
        for i in range(n):
            if i % 7 == 0:  # until then they wait, for as long as it happens to take
                gone = left < i
                state.fold(psi, k, v, gone)
                left = left.masked_fill(gone, n)
            part = Waiting(psi[:, :, : i + 1], k[:, :, : i + 1], v[:, :, : i + 1], left[:, :, : i + 1], None)
            out, lse = segments.merge(m.answer(q[:, :, i : i + 1], SCALE, state, part))
            torch.testing.assert_close(out, whole[:, :, i : i + 1], rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(lse, whole_lse[:, :, i : i + 1], rtol=1e-9, atol=1e-9)
    assert state.z.any() and state.m.any()


def test_a_group_of_one_key_is_that_key():
    """As many groups as keys and a hard assignment: full attention comes back, sharpness 1 and bias 0."""
    n, kv, heads = 12, 2, 6
    q, k, v, flags = inputs(n, heads=heads, kv=kv)
    psi = torch.eye(n, dtype=torch.float64).expand(2, kv, n, n)
    everything = torch.ones(1, 1, n, n, dtype=torch.bool)
    whole = naive.dense_segment(q, k, v, everything, SCALE)
    kept = naive.dense_segment(q, k, v, flags[:, :, None].expand(-1, -1, n, -1), SCALE)
    state = State(v, n, keys=True)
    state.fold(psi, k, v, ~flags)
    phi, shift = CentroidPhi(heads).double()(*state.reach(q), SCALE)
    out, lse = state.segment(phi)
    for a, b in zip(segments.merge([kept, (out, lse + shift)]), whole):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("heads,kv,queries", [(6, 3, 5), (8, 1, 1), (2, 2, 3)])
def test_asking_a_state_is_asking_its_sums(heads, kv, queries):
    q, k, v, flags = inputs(queries=queries, heads=heads, kv=kv)
    m = maps(heads=heads, kv=kv)
    with torch.no_grad():
        for p in m.phi.parameters():
            p.add_(torch.rand_like(p))
        state = m.state(v)
        for gone in (flags, ~flags):
            state.fold(m.psi(k), k, v, gone)
            phi, shift = m.phi(*state.reach(q), SCALE)
            out, lse = state.segment(phi)
            torch.testing.assert_close(m.answer(q, SCALE, state), [(out, lse + shift)], rtol=1e-10, atol=1e-10)
        state.index_select(torch.tensor([1]))
        alone = m.answer(q[1:], SCALE, state)[0][0]
        torch.testing.assert_close(alone, out[1:], rtol=1e-10, atol=1e-10)


def test_maps_follow_the_formula_head_by_head():
    psi = CentroidPsi(3, 8, rank=4, hidden=16)
    k = torch.randn(2, 3, 5, 8)
    for h in range(3):
        x = torch.nn.functional.gelu(k[:, h] @ psi.w1[h]) @ psi.w2[h] * 4 / 8**0.5
        torch.testing.assert_close(psi(k)[:, h], x[..., :4].softmax(-1) * x[..., 4:].exp())
    phi = CentroidPhi(6)
    with torch.no_grad():
        phi.sharpness.copy_(torch.rand(6, 1, 1)), phi.bias.copy_(torch.rand(6, 1, 1))
    reach, mass = torch.randn(2, 6, 5, 4), 0.5 + torch.rand(2, 6, 5, 4)
    features, shift = phi(reach, mass, SCALE)
    wanted = (phi.sharpness * reach / mass * SCALE + phi.bias).exp()
    torch.testing.assert_close(features * shift[..., None].exp(), wanted)
    assert features.max() == 1


def test_nothing_folded_says_nothing_and_huge_logits_stay_finite():
    m = maps().float()
    q, k, v, _ = (t.detach().float() for t in inputs())
    ((out, lse),) = m.answer(q, SCALE, m.state(v))
    assert not out.any() and (lse == -torch.inf).all()
    weights = list(m.parameters())
    left = torch.full((2, 3, 24), 10)
    for size in (1.0, 300.0):  # attention logits of thousands
        kept = naive.dense_segment(q, k, v, naive.causal_mask(24, 24)[None, None], SCALE)
        parts = m.answer(q * size, SCALE, None, Waiting(m.psi(k), k, v, left, None))
        out, lse = segments.merge([kept, *parts])
        grads = torch.autograd.grad(out.square().sum(), weights)
        assert torch.isfinite(out).all() and torch.isfinite(lse[:, :, 10:]).all()
        assert all(torch.isfinite(g).all() for g in grads)
    assert all(
        g.any()
        for g in torch.autograd.grad(
            m.answer(q, SCALE, None, Waiting(m.psi(k), k, v, left, None))[0][1][:, :, 11:].sum(), weights
        )
    )


def test_a_state_with_keys_counts_and_copies_them():
    _, k, v, flags = inputs()
    m = maps()
    state = m.state(v)
    assert [t.shape[-1] for t in state.tensors()] == [8, 3, 8]
    m.answer(torch.randn(2, 6, 1, 8, dtype=torch.float64), SCALE, state)
    held = [t for t in vars(state).values() if t is not None]
    assert all(isinstance(t, torch.Tensor) for t in held) and len(held) == 3  # asking leaves nothing uncounted behind
    assert sum(t.numel() for t in state.tensors()) == 2 * 3 * m.spec.state_numbers(8) == 2 * 3 * 3 * 17
    twin = state.fork()
    twin.fold(m.psi(k), k, v, flags)
    assert twin.m.any() and not state.m.any()
    held = twin.m
    twin.index_select(torch.tensor([1, 1, 0]))
    assert torch.equal(twin.m, held[[1, 1, 0]])


def test_an_unknown_form_is_refused():
    with pytest.raises(ValueError, match="less_form.*kernel.*centroids"):
        LessSpec(less_rank=4, less_form="centroid")
