"""LESS: the parallel form against its reference, the recurrent form against the parallel one, and the maps."""

import pytest
import torch

from gatekv.attention import live_mask
from gatekv.less import Phi, Psi, State
from gatekv.ops import naive, remainder, segments

SCALE = 0.35


def problem(n, queries=None, heads=6, kv=3, d=5, rank=4, batch=2, seed=0):
    torch.manual_seed(seed)
    phi = torch.rand(batch, heads, queries or n, rank, dtype=torch.float64, requires_grad=True)
    psi = torch.rand(batch, kv, n, rank, dtype=torch.float64, requires_grad=True)
    v = torch.randn(batch, kv, n, d, dtype=torch.float64, requires_grad=True)
    return phi, psi, v, torch.rand(batch, kv, n) < 0.5


def padded(n, queries, pads):
    mask = naive.causal_mask(queries, n)[None, None].repeat(2, 1, 1, 1)
    mask[1, ..., :pads] = False
    return mask


def assert_same(phi, psi, v, left, mask=None):
    """Forward, and the gradient of an answer merged with another: alone, a query that finds nothing has no lse."""
    torch.manual_seed(9)
    kept = torch.randn(*phi.shape[:3], v.shape[-1], dtype=v.dtype), torch.randn(phi.shape[:3], dtype=v.dtype)
    results = []
    for function in (naive.remainder_segment, remainder.remainder_segment):
        out, lse = function(phi, psi, v, left, mask=mask)
        whole, whole_lse = segments.merge([kept, (out, lse)])
        grads = torch.autograd.grad((whole * kept[0].cos()).sum() + whole_lse.square().sum(), (phi, psi, v))
        results.append((out, lse, *grads))
    for a, b in zip(*results):
        assert a.shape == b.shape and torch.isfinite(a).all() | (a is results[0][1])
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("n", [1, 5, 8, 9, 37])
@pytest.mark.parametrize("window", [0, 1, 7])
@pytest.mark.parametrize("pads", [None, 3])
def test_parallel_matches_naive(monkeypatch, n, window, pads):
    monkeypatch.setattr(remainder, "CHUNK", 4)
    phi, psi, v, flags = problem(n)
    assert_same(phi, psi, v, remainder.left_of(flags, window), None if pads is None else padded(n, n, min(pads, n)))


@pytest.mark.parametrize("n", [127, 128, 129, 300])
def test_parallel_at_borders_of_its_own_chunks(n):
    phi, psi, v, flags = problem(n, batch=1)
    assert_same(phi, psi, v, remainder.left_of(flags, 16))


@pytest.mark.parametrize("queries", [1, 4, 11])
@pytest.mark.parametrize("start", [0, 13, 30])
def test_the_last_queries_and_flags_that_act_after_a_prompt(monkeypatch, queries, start):
    monkeypatch.setattr(remainder, "CHUNK", 4)
    phi, psi, v, flags = problem(37, queries)
    assert_same(phi, psi, v, remainder.left_of(flags, 5, start), padded(37, queries, 9))


@pytest.mark.parametrize("when", ["any", "at once", "never", "too early"])
def test_tokens_leave_at_times_of_their_own(monkeypatch, when):
    monkeypatch.setattr(remainder, "CHUNK", 4)
    phi, psi, v, _ = problem(37, 29)
    left = {
        "any": torch.randint(0, 60, (2, 3, 37)),
        "at once": torch.full((2, 3, 37), 20),
        "never": torch.full((2, 3, 37), 37),
        "too early": torch.zeros(2, 3, 37, dtype=torch.int32),
    }[when]
    assert_same(phi, psi, v, left)


@pytest.mark.parametrize("heads,kv", [(2, 2), (6, 2), (8, 1)])
def test_groups(monkeypatch, heads, kv):
    monkeypatch.setattr(remainder, "CHUNK", 4)
    phi, psi, v, flags = problem(19, 17, heads, kv)
    assert_same(phi, psi, v, remainder.left_of(flags, 3))


def test_values_that_need_no_gradient_and_half_precision():
    phi, psi, v, flags = problem(37)
    left = remainder.left_of(flags, 3)
    wanted = torch.autograd.grad(naive.remainder_segment(phi, psi, v, left)[0].square().sum(), (phi, psi))
    got = torch.autograd.grad(remainder.remainder_segment(phi, psi, v.detach(), left)[0].square().sum(), (phi, psi))
    for a, b in zip(got, wanted):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    out, lse = remainder.remainder_segment(phi.float(), psi.float(), v.bfloat16(), left)
    assert out.dtype == lse.dtype == torch.float32


def test_when_tokens_leave():
    flags = torch.tensor([[[True, False, False, False, False]]])
    assert remainder.left_of(flags, 2).tolist() == [[[5, 3, 4, 5, 5]]]
    assert remainder.left_of(flags.float(), 0).tolist() == [[[5, 2, 3, 4, 5]]]
    assert remainder.left_of(flags, 1, start=4).tolist() == [[[5, 4, 4, 4, 5]]]


@pytest.mark.parametrize("group", [1, 3, 8])
@pytest.mark.parametrize("window", [0, 4])
def test_recurrent_equals_parallel(group, window):
    """Token by token, folding what leaves, against one pass with a row mask and the parallel remainder."""
    n, pads, kv = 33, 6, 2
    phi, psi, v, flags = (t.detach() for t in problem(n, heads=kv * group, kv=kv))
    q, k = torch.randn(2, kv * group, n, 5, dtype=torch.float64), torch.randn(2, kv, n, 5, dtype=torch.float64)
    mask, slots = padded(n, n, pads), torch.arange(n)
    left = remainder.left_of(flags, window)
    live = live_mask(slots, slots, flags, window) & mask
    kept = segments.dense_segment(q, k, v, live, SCALE)
    whole, _ = segments.merge([kept, remainder.remainder_segment(phi, psi, v, left, mask=mask)])

    state = State(v, psi.shape[-1])
    for i in range(n):
        gone = (left == i) & mask[:, :, -1]
        state.fold(psi, v, v, gone)
        near = segments.dense_segment(q[:, :, i : i + 1], k, v, live[:, :, i : i + 1], SCALE)
        out, _ = segments.merge([near, state.segment(phi[:, :, i : i + 1])])
        assert (out - whole[:, :, i : i + 1]).abs().max() <= 1e-9 * whole.abs().max()
    assert state.z.any()


@pytest.mark.parametrize("window", [0, 3])
def test_the_exact_kernel_gives_full_attention_back(window):
    """ψ(k_j) = one-hot j and φ(q_i)_j = e^{q_i·k_j·scale}: nothing is lost, whatever the policy drops."""
    n, kv, group = 21, 2, 3
    _, _, v, flags = problem(n, heads=kv * group, kv=kv)
    q, k = torch.randn(2, kv * group, n, 5, dtype=torch.float64), torch.randn(2, kv, n, 5, dtype=torch.float64)
    phi = torch.exp(q @ k.repeat_interleave(group, 1).mT * SCALE)
    psi = torch.eye(n, dtype=torch.float64).expand(2, kv, n, n)
    causal, slots = padded(n, n, 0), torch.arange(n)
    whole, lse = naive.dense_segment(q, k, v, causal, SCALE)
    kept = naive.dense_segment(q, k, v, live_mask(slots, slots, flags, window) & causal, SCALE)
    for function in (naive.remainder_segment, remainder.remainder_segment):
        got = segments.merge([kept, function(phi, psi, v, remainder.left_of(flags, window))])
        for a, b in zip(got, (whole, lse)):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    state = State(v, n)
    state.fold(psi, v, v, ~flags)
    last = naive.dense_segment(q[:, :, -1:], k, v, flags[:, :, None], SCALE)
    for a, b in zip(segments.merge([last, state.segment(phi[:, :, -1:])]), (whole[:, :, -1:], lse[:, :, -1:])):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("function", [naive.remainder_segment, remainder.remainder_segment])
def test_nothing_folded_is_the_policy_alone(function):
    n, maps = 9, (Phi(6, 5, hidden=16).double(), Psi(3, 5, hidden=16).double())
    _, _, v, flags = problem(n)
    q, k = torch.randn(2, 6, n, 5, dtype=torch.float64), torch.randn(2, 3, n, 5, dtype=torch.float64)
    kept = naive.dense_segment(q, k, v, padded(n, n, 0), SCALE)
    phi, psi = maps[0](q), maps[1](k)
    nothing = function(phi, psi, v, remainder.left_of(torch.ones_like(flags), 0))
    empty = State(v, 8).segment(phi)
    for out, lse in (nothing, empty):
        assert not out.any() and (lse == -torch.inf).all()
        torch.testing.assert_close(segments.merge([kept, (out, lse)]), kept, rtol=0, atol=0)
    weights = [p for m in maps for p in m.parameters()]
    for merge in (segments.merge, naive.merge):
        merged = merge([kept, nothing])[0]
        grads = torch.autograd.grad(merged.square().sum(), [v, *weights], retain_graph=True)
        assert all(torch.isfinite(g).all() for g in grads) and not any(g.any() for g in grads[1:])
        out, lse = merge([nothing, empty])
        assert not out.any() and (lse == -torch.inf).all()


def test_features_smaller_than_any_number_have_finite_gradients():
    phi, psi, v, flags = problem(9)
    phi, psi = ((x.float().detach() * scale).requires_grad_() for x, scale in ((phi, 1e-25), (psi, 1e-15)))
    kept = torch.randn(2, 6, 9, 5), torch.randn(2, 6, 9)
    out, _ = segments.merge([kept, remainder.remainder_segment(phi, psi, v.float(), remainder.left_of(flags, 0))])
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(out.square().sum(), (phi, psi)))


def maps_and_inputs(n=24, d=16):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, n, d) for heads in (6, 3, 3))
    return Phi(6, d), Psi(3, d), q, k, v, torch.rand(2, 3, n) < 0.5


def test_training_reaches_every_parameter():
    phi, psi, q, k, v, flags = maps_and_inputs()
    slots = torch.arange(q.shape[2])
    live = live_mask(slots, slots, flags, 4) & naive.causal_mask(24, 24)
    kept = naive.dense_segment(q, k, v, live, SCALE)
    whole, _ = naive.dense_segment(q, k, v, naive.causal_mask(24, 24)[None, None], SCALE)

    def error():
        left = remainder.left_of(flags, 4)
        return (segments.merge([kept, remainder.remainder_segment(phi(q), psi(k), v, left)])[0] - whole).square().mean()

    loss = error()
    loss.backward()
    for part in (phi, psi):
        for name, p in part.named_parameters():
            assert torch.isfinite(p.grad).all() and p.grad.flatten(1).any(1).all(), name
    optimizer = torch.optim.Adam([*phi.parameters(), *psi.parameters()], lr=1e-3)
    for part in (phi, psi):
        part.eval()
    before = error().item()
    for _ in range(60):
        optimizer.zero_grad()
        loss = error()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.9 * before


def test_fresh_maps_leave_the_policy_nearly_alone():
    phi, psi, q, k, v, flags = maps_and_inputs(64)
    phi.eval(), psi.eval()
    slots = torch.arange(64)
    kept = naive.dense_segment(q, k, v, live_mask(slots, slots, flags, 4) & naive.causal_mask(64, 64), SCALE)
    out, _ = segments.merge([kept, remainder.remainder_segment(phi(q), psi(k), v, remainder.left_of(flags, 4))])
    assert 0 < ((out - kept[0]).norm() / kept[0].norm()).item() < 1e-3


def test_maps_follow_the_formula_head_by_head():
    phi, psi, q, k, _, _ = maps_and_inputs(3)
    with torch.no_grad():
        for p in (psi.s1, psi.s2):
            p.copy_(torch.randn_like(p))
    gelu = torch.nn.functional.gelu
    phi.eval(), psi.eval()
    for h in range(6):
        wanted = gelu(gelu(q[:, h] @ phi.w1[h]) @ phi.w2[h]).abs()
        torch.testing.assert_close(phi(q)[:, h], wanted)
    for h in range(3):
        g = psi.s1[h].abs() * gelu(gelu(k[:, h] @ psi.w1[h]) @ psi.w2[h])
        torch.testing.assert_close(psi(k)[:, h], (g + psi.s2[h] * (g @ psi.w3[h])).abs())
    assert phi.w1.shape == (6, 16, 512) and phi.w2.shape == (6, 512, 8) and psi.w3.shape == (3, 8, 8)
    bound = (6 / (16 + 512)) ** 0.5  # of each head's own matrix
    assert 0.99 * bound < phi.w1.abs().amax().item() <= bound and (psi.w2.abs() <= (6 / 520) ** 0.5).all()


def test_dropout_acts_in_training_only_and_long_inputs_go_in_parts(monkeypatch):
    phi, _, q, *_ = maps_and_inputs()
    assert not torch.equal(phi(q), phi(q))
    phi.eval()
    whole = phi(q)
    monkeypatch.setattr("gatekv.less.features.TOKENS", 7)
    torch.testing.assert_close(phi(q), whole)
    assert phi(q.bfloat16()).dtype == torch.float32 and phi.bfloat16()(q.bfloat16()).dtype == torch.float32
    assert phi(q[:, :, :0].bfloat16()).shape == (2, 6, 0, 8)


def test_a_state_counts_its_bytes_and_follows_the_batch():
    _, psi, v, flags = (t.detach() for t in problem(9))
    state = State(v.bfloat16(), 4)
    assert sum(t.nbytes for t in state.tensors()) == 2 * 3 * 4 * (5 + 1) * 4
    state.fold(psi, v, v, flags)
    held = [t.clone() for t in state.tensors()]
    twin = state.fork()
    twin.fold(psi, v, v, ~flags)
    torch.testing.assert_close(state.tensors(), held, rtol=0, atol=0)
    assert not torch.equal(twin.z, state.z)
    twin = state.fork()
    state.fold(psi, v, v, ~flags)
    torch.testing.assert_close(twin.tensors(), held, rtol=0, atol=0)
    twin.index_select(torch.tensor([1, 1, 0]))
    torch.testing.assert_close(twin.tensors(), [t[[1, 1, 0]] for t in held], rtol=0, atol=0)
    torch.testing.assert_close(state.z, psi.sum(2).float())  # whatever the order, all of it


def test_errors_name_the_argument():
    for wrong in ({"rank": 0}, {"hidden": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be at least 1"):
            Phi(2, 4, **wrong)
    for wrong in (1.0, -0.1):
        with pytest.raises(ValueError, match="dropout is a share"):
            Psi(2, 4, dropout=wrong)
    with pytest.raises(ValueError, match="rank must be at least 1"):
        State(torch.zeros(1, 2, 0, 4), 0)
    with pytest.raises(ValueError, match="not repeated"):
        Psi(2, 4)(torch.zeros(1, 6, 3, 4))
    state, v = State(torch.zeros(1, 2, 0, 4), 3), torch.zeros(1, 4, 5, 4)
    with pytest.raises(ValueError, match="psi has 4 heads, the state 2"):
        state.fold(torch.zeros(1, 4, 5, 3), v, v, torch.ones(1, 4, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="phi has 3 heads"):
        state.segment(torch.zeros(1, 3, 5, 3))
    with pytest.raises(ValueError, match="rank"):
        state.segment(torch.zeros(1, 4, 5, 8))
