"""Every fast path against its naive reference: forward and backward, odd lengths, float64."""

import pytest
import torch

from gatekv.ops import attention_mass, learned_sinks, naive
from gatekv.ops import gated_attention as fast
from gatekv.ops.on_the_spot import on_the_spot
from gatekv.ops.scale import Scale


def problem(n, heads=6, kv=3, d=8, batch=2, seed=0):
    torch.manual_seed(seed)
    q = torch.randn(batch, heads, n, d, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(batch, kv, n, d, dtype=torch.float64, requires_grad=True) for _ in range(2))
    gate = torch.rand(batch, kv, n, dtype=torch.float64)
    gate[gate < 0.4] = 0  # evicted ones must have a gradient too
    return q, k, v, gate.requires_grad_()


@pytest.mark.parametrize("n", [1, 5, 129, 300])
@pytest.mark.parametrize("window", [0, 1, 16, 200])
@pytest.mark.parametrize("masked", ["no", "left", "all rows alike"])
def test_gated_attention_matches_naive(n, window, masked):
    q, k, v, gate = problem(n)
    mask = None
    if masked != "no":
        mask = naive.causal_mask(n, n)[None, None].repeat(2 if masked == "left" else 1, 1, 1, 1)
        mask[-1, ..., : n // 3] = False
    grad = torch.randn_like(q)
    results = []
    for function in (naive.gated_attention, fast.gated_attention):
        out = function(q, k, v, gate, window=window, scale=0.35, mask=mask)
        results.append((out, *torch.autograd.grad(out, (q, k, v, gate), grad)))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("queries", [1, 37, 140])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("decay", [False, True])
def test_gated_attention_of_the_last_queries(queries, masked, decay):
    q, k, v, gate = problem(201)
    if decay:
        gate = (1 - 0.1 * gate.detach()).requires_grad_()
    q = q[:, :, -queries:].detach().requires_grad_()
    mask = naive.causal_mask(queries, 201)[None, None].repeat(2, 1, 1, 1) if masked else None
    if masked:
        mask[1, ..., :50] = False
    results = []
    for function in (naive.gated_attention, fast.gated_attention):
        out = function(q, k, v, gate, window=7, scale=0.35, mask=mask, decay=decay)
        results.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v, gate))))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


ODD = {"sinks": dict(sinks=True), "cap": dict(cap=0.7), "both": dict(sinks=True, cap=0.7), "narrow": dict(narrow=3)}


@pytest.mark.parametrize("odd", list(ODD))
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("n,queries,decay", [(1, 1, False), (150, 150, False), (61, 9, True)])
def test_gated_attention_with_sinks_caps_and_narrow_values(n, queries, decay, masked, odd):
    q, k, v, gate = problem(n)
    odd = ODD[odd]
    if decay:
        gate = (1 - 0.1 * gate.detach()).requires_grad_()
    q = q[:, :, -queries:].detach().requires_grad_()
    v = v[..., : odd.get("narrow", 8)].detach().requires_grad_()
    mask = naive.causal_mask(queries, n)[None, None].repeat(2, 1, 1, 1) if masked else None
    if masked:
        mask[1, ..., : n // 3] = False
    sinks = torch.tensor([-3.0, -1, 0, 0.5, 1, 4], dtype=torch.float64) if "sinks" in odd else None
    results = []
    for function in (naive.gated_attention, fast.gated_attention):
        scale = Scale(0.35, odd.get("cap"))
        out = function(q, k, v, gate, window=7, scale=scale, mask=mask, decay=decay, sinks=sinks)
        results.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v, gate))))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    if sinks is None and not odd.get("cap"):
        return
    plain = fast.gated_attention(q, k, v, gate, window=7, scale=0.35, mask=mask, decay=decay)
    assert n == 1 and sinks is None or (plain - results[0][0]).abs().max() > 1e-3, "it makes a difference"


def test_sinks_are_one_more_column_of_the_softmax():
    q, k, v, _ = problem(23)
    sinks = torch.randn(6, dtype=torch.float64)
    out = fast.gated_attention(q, k, v, torch.ones(2, 3, 23, dtype=torch.float64), window=1, scale=0.35, sinks=sinks)
    keys, values = (t.repeat_interleave(2, 1) for t in (k, v))
    s = (q @ keys.mT * 0.35).masked_fill(~naive.causal_mask(23, 23), -torch.inf)
    p = torch.cat([s, sinks[None, :, None, None].expand(2, -1, 23, 1)], -1).softmax(-1)[..., :-1]
    torch.testing.assert_close(out, p @ values, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(learned_sinks.attend(q, k, v, sinks, 0.35, None, causal=True), p @ values)
    visible = naive.causal_mask(23, 23)[None, None]
    torch.testing.assert_close(learned_sinks.attend(q, k, v, sinks, 0.35, visible, causal=False), p @ values)


@pytest.mark.parametrize("sinks", [None, torch.tensor([-3.0, -1, 0, 0.5, 1, 4], dtype=torch.float64)])
@pytest.mark.parametrize("cap", [None, 0.7])
def test_received_attention_and_mass_with_sinks_and_caps(sinks, cap):
    q, k, _, _ = problem(47)
    scale, valid = Scale(0.35, cap), torch.ones(2, 47, dtype=torch.bool)
    valid[1, :20] = False
    mask = naive.causal_mask(47, 47)[None, None] & valid[:, None, None]
    beside, near = torch.rand(2, 3, 47) < 0.2, torch.tensor([5, 9])
    found = []
    for form, mass in ((naive, naive), (fast, attention_mass)):
        found.append([
            form.received_attention(q, k, window=3, scale=scale, mask=mask, sinks=sinks).double(),
            mass.attention_mass(q, k, scale=scale, valid=valid, sinks=sinks),
            mass.local_mass(q, k, scale=scale, valid=valid, near=near, beside=beside, sinks=sinks),
        ])  # fmt: skip
    for (a, b), rtol in zip(zip(*found), (1e-5, 1e-10, 1e-10)):
        torch.testing.assert_close(a, b, rtol=rtol, atol=1e-7)


@pytest.mark.parametrize("heads,kv", [(4, 4), (8, 1), (6, 2)])
def test_gated_attention_groups(heads, kv):
    q, k, v, gate = problem(37, heads, kv)
    a = naive.gated_attention(q, k, v, gate, window=3, scale=0.3)
    b = fast.gated_attention(q, k, v, gate, window=3, scale=0.3)
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("masked", [False, True])
def test_gated_attention_of_all_heads_at_once(monkeypatch, masked):
    q, k, v, gate = problem(150)
    mask = naive.causal_mask(150, 150)[None, None].repeat(2, 1, 1, 1) if masked else None
    if masked:
        mask[0, ..., :40] = False
    results = []
    for at_once in (1, 6):
        monkeypatch.setattr(fast, "heads_at_once", lambda *a, n=at_once: n)
        out = fast.gated_attention(q, k, v, gate, window=9, scale=0.35, mask=mask)
        received = fast.received_attention(q, k, window=9, scale=0.35, mask=mask)
        results.append((out, received, *torch.autograd.grad(out.square().sum(), (q, k, v, gate))))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)


def test_gated_attention_in_bfloat16_rounds_as_little_as_its_inputs():
    q, k, v, gate = problem(300, d=64)
    low = [t.detach().bfloat16().requires_grad_() for t in (q, k, v)] + [gate.detach().float().requires_grad_()]
    same = [t.detach().double().requires_grad_() for t in low]
    grad = torch.randn(q.shape, dtype=torch.bfloat16)
    results = []
    for function, inputs in ((naive.gated_attention, same), (fast.gated_attention, low)):
        out = function(*inputs, window=16, scale=0.25)
        results.append((out, *torch.autograd.grad(out, inputs, grad.to(out.dtype))))
    for a, b in zip(*results):
        assert ((a - b).norm() / a.norm()).item() < 0.01
    gone = gate == 0
    wanted, got = results[0][-1][gone], results[1][-1][gone].double()
    assert ((wanted - got).norm() / wanted.norm()).item() < 0.01, "what was evicted is told as exactly as the rest"


def test_frozen_queries_keys_and_values_change_nothing_for_the_gate():
    q, k, v, gate = problem(140)
    wanted = torch.autograd.grad(fast.gated_attention(q, k, v, gate, window=3, scale=0.3).square().sum(), gate)
    q, k, v = (t.detach() for t in (q, k, v))
    got = torch.autograd.grad(fast.gated_attention(q, k, v, gate, window=3, scale=0.3).square().sum(), gate)
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)


def test_a_query_that_may_only_look_at_evicted_keys_gets_nothing():
    q, k, v, gate = problem(40, batch=1)
    mask = naive.causal_mask(40, 40)[None, None].clone()
    mask[..., 30:] = False  # pads on the right: they see the text and not themselves
    gate = torch.zeros_like(gate).requires_grad_()
    out = fast.gated_attention(q, k, v, gate, window=4, scale=0.35, mask=mask)
    torch.testing.assert_close(out, naive.gated_attention(q, k, v, gate, window=4, scale=0.35, mask=mask))
    assert (out[:, :, 34:] == 0).all()
    wanted = torch.autograd.grad(naive.gated_attention(
        q[:, :, :30], k[:, :, :30], v[:, :, :30], gate[..., :30], window=4, scale=0.35).sum(), gate)  # fmt: skip
    torch.testing.assert_close(torch.autograd.grad(out[:, :, :30].sum(), gate), wanted)


def test_gate_gradient_is_the_papers_formula():
    q, k, v, gate = problem(20, 1, 1, batch=1)
    out = fast.gated_attention(q, k, v, gate, window=1, scale=1.0)
    upstream = torch.randn_like(out)
    (got,) = torch.autograd.grad(out, gate, upstream)
    s = (q[0, 0] @ k[0, 0].T).detach()
    i, j = torch.arange(20)[:, None], torch.arange(20)
    weight = torch.where(i == j, 1.0, gate[0, 0].detach()) * (j <= i)
    lse = (weight * s.exp()).sum(-1).log()
    # d o_i / d g_j = e^{s_ij - lse_i} (v_j - o_i), for keys behind the window
    e = (s - lse[:, None]).exp() * (j < i)
    wanted = (e * ((upstream[0, 0] @ v[0, 0].T) - (upstream[0, 0] * out[0, 0]).sum(-1, keepdim=True))).sum(0)
    torch.testing.assert_close(got[0, 0], wanted.detach(), rtol=1e-9, atol=1e-12)
    assert (got[0, 0][:-1][gate[0, 0][:-1] == 0] != 0).all(), "an evicted token must be able to come back"


def test_all_kept_is_plain_attention():
    q, k, v, _ = problem(50)
    out = fast.gated_attention(q, k, v, torch.ones(2, 3, 50), window=0, scale=8**-0.5)
    k, v = (t.repeat_interleave(2, 1) for t in (k, v))
    torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))


def test_evicted_key_that_outweighs_all_live_ones_stays_finite():
    q, k, v, gate = problem(8, 1, 1, batch=1)
    q, k = (q * 30).detach().float().requires_grad_(), (k * 30).detach().float()
    v, gate = v.detach().float(), torch.zeros(1, 1, 8, requires_grad=True)
    out = fast.gated_attention(q, k, v, gate, window=0, scale=1.0)
    torch.testing.assert_close(out, v, msg="every query sees itself alone")
    out.sum().backward()
    assert torch.isfinite(q.grad).all() and torch.isfinite(gate.grad).all()


def test_merging_two_empty_memories_gives_nothing_not_nan():
    empty = (torch.zeros(1, 2, 3, 4), torch.full((1, 2, 3), -torch.inf))
    out, lse = naive.merge([empty, empty])
    assert (out == 0).all() and (lse == -torch.inf).all()


def test_merge_is_associative():
    torch.manual_seed(1)
    parts = [
        (torch.randn(1, 2, 3, 4, dtype=torch.float64), torch.randn(1, 2, 3, dtype=torch.float64)) for _ in range(3)
    ]
    a = naive.merge([naive.merge(parts[:2]), parts[2]])
    b = naive.merge(parts)
    torch.testing.assert_close(a[0], b[0])
    torch.testing.assert_close(a[1], b[1])


def test_a_gradient_taken_on_the_spot_is_the_gradient_and_needs_no_weights_later():
    weight = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    loss = lambda x: (x @ weight).square().mean()  # noqa: E731
    wanted = torch.autograd.grad(3 * loss(x), x)[0]
    value = on_the_spot(loss, x)
    assert value.item() == loss(x).item()
    weight.data.fill_(float("nan"))  # as sharding frees it behind the forward pass
    (3 * value).backward()
    torch.testing.assert_close(x.grad, wanted)
    assert weight.grad is None
    with torch.no_grad():
        assert not on_the_spot(loss, x).requires_grad
