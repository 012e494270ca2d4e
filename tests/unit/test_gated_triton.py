"""The Triton kernels of gated attention against the readable reference: output and all four gradients, odd lengths.

Without a GPU they run in Triton's interpreter; there tiles are cut to 16 tokens, so that short rows have several.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gatekv.ops import backends, gated_attention, naive

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    pytest.skip("needs TRITON_INTERPRET=1, which tests/conftest.py sets", allow_module_level=True)

from gatekv.ops import gated_triton
from gatekv.ops.scale import Scale

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GATES = {
    "all evicted": torch.zeros_like,
    "all kept": torch.ones_like,
    "mixed": lambda u: (u > 0.6).to(u),
    "in blocks": lambda u: (torch.arange(u.shape[-1], device=u.device) // 16 % 3 == 1).to(u).expand_as(u).clone(),
    "soft": lambda u: u.masked_fill(u < 0.3, 0),
    "fading": lambda u: (1 - 0.1 * u).masked_fill(u < 0.2, 0),
}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(gated_triton, "TILE_BYTES", 1)


def problem(n, gates="mixed", queries=None, batch=1, heads=2, kv=1, d=16, dtype=torch.float32):
    """q, k, v, gate and a gradient of the output."""
    generator = torch.Generator().manual_seed(n)
    shapes = [(batch, heads, queries or n, d), *[(batch, kv, n, d)] * 2, (batch, heads, queries or n, d)]
    q, k, v, dout = (torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes)
    gate = GATES[gates](torch.rand(batch, kv, n, generator=generator).to(DEVICE))
    return [t.requires_grad_() for t in (q, k, v, gate)], dout


def results(function, inputs, dout, **options):
    """(out, dq, dk, dv, dgate)."""
    out = function(*inputs, scale=inputs[0].shape[-1] ** -0.5, **options)
    return out, *torch.autograd.grad(out, [t for t in inputs if t.requires_grad], dout)


def assert_same(inputs, dout, rtol=1e-4, atol=1e-5, **options):
    got = results(gated_triton.gated_attention, inputs, dout, **options)
    for name, a, b in zip(
        ("out", "dq", "dk", "dv", "dgate"), got, results(naive.gated_attention, inputs, dout, **options)
    ):
        size = b.abs().max().item()
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol * max(1.0, size), msg=lambda m, name=name: f"{name}: {m}")
    return got


@pytest.mark.covering(1)  # the interpreter takes a second a case
@pytest.mark.parametrize("gates", ["all evicted", "all kept", "mixed", "in blocks", "soft"])
@pytest.mark.parametrize("n,window", [(1, 0), (53, 1), (70, 32), (37, 100)])
def test_matches_naive(gates, n, window):
    assert_same(*problem(n, gates), window=window)


@pytest.mark.parametrize("window", [70, pytest.param(5, marks=pytest.mark.exhaustive)])
def test_full_tiles(monkeypatch, window):
    monkeypatch.undo()
    inputs, dout = problem(150)
    with torch.no_grad():
        inputs[3][..., :64] = 0
    assert_same(inputs, dout, window=window)


@pytest.mark.parametrize("group,kv", [(1, 3), (2, 2), pytest.param(8, 1, marks=pytest.mark.exhaustive)])
def test_groups(group, kv):
    assert_same(*problem(21, heads=group * kv, kv=kv, batch=2 if kv == 2 else 1), window=5)


@pytest.mark.parametrize("d", [8, 64, 80, 96])
def test_head_dims(d):
    assert_same(*problem(37, d=d), window=5)


@pytest.mark.covering(1)  # the interpreter takes a second a case
@pytest.mark.parametrize("gates", ["all evicted", "mixed", "in blocks"])
@pytest.mark.parametrize("queries", [1, 19, 48])
def test_the_last_queries(gates, queries):
    assert_same(*problem(61, gates, queries), window=7)


@pytest.mark.parametrize("queries", [37, 11])
def test_decay(queries):
    assert_same(*problem(37, "fading", queries), window=3, decay=True)


def padded_and_packed(n, queries):
    """[3, 1, queries, n]: a full row, a left-padded one whose pads see nothing, and two documents in one row."""
    mask = naive.causal_mask(n, n, DEVICE)[None, None].repeat(3, 1, 1, 1)
    mask[1, ..., : n // 3] = False
    mask[2, :, n // 2 :, : n // 2] = False
    return mask[:, :, -queries:]


@pytest.mark.covering(1)  # the interpreter takes five seconds a case
@pytest.mark.parametrize("sinks,cap,narrow", [(True, None, 16), (False, 0.8, 16), (True, 0.8, 9)])
def test_sinks_caps_and_narrow_values(sinks, cap, narrow):
    (q, k, v, gate), dout = problem(37, queries=21, batch=2)
    v = v[..., :narrow].detach().requires_grad_()
    own = torch.tensor([-2.0, 3], device=DEVICE) if sinks else None
    options, scale = dict(window=7, sinks=own), Scale(16**-0.5, cap)
    found = []
    for function in (gated_triton.gated_attention, naive.gated_attention):
        out = function(q, k, v, gate, scale=scale, **options)
        found.append((out, *torch.autograd.grad(out, (q, k, v, gate), dout[..., :narrow])))
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.covering(1)  # the interpreter takes seconds a case
@pytest.mark.parametrize("gates", ["in blocks", "soft"])
@pytest.mark.parametrize("queries", [37, 20])
def test_masks(gates, queries):
    inputs, dout = problem(37, gates, queries, batch=3, heads=2)
    got = assert_same(inputs, dout, window=6, mask=padded_and_packed(37, queries))
    assert queries < 37 or (got[0][1, :, : 37 // 3] == 0).all(), "a pad sees nothing and says nothing"


def test_one_mask_for_all_rows_cut_out_of_a_larger_one():
    mask = naive.causal_mask(60, 60, DEVICE)[None, None].clone()
    mask[..., 5:9] = False
    assert_same(*problem(37, batch=2, queries=20), window=6, mask=mask[:, :, 17:37, :37])


@pytest.fixture
def bfloat16_in_the_interpreter(monkeypatch):
    """Triton 3.9's interpreter holds bfloat16 as its bits, and its dot product multiplies those: widen them first."""
    if DEVICE.type == "cpu":
        import triton.language as tl
        from triton.runtime.interpreter import InterpreterBuilder

        dot = InterpreterBuilder.create_dot
        wide = lambda self, x: self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x  # noqa: E731
        patched = lambda self, a, b, *rest: dot(self, wide(self, a), wide(self, b), *rest)  # noqa: E731
        monkeypatch.setattr(InterpreterBuilder, "create_dot", patched)


@pytest.mark.parametrize("dtype,tolerance", [(torch.bfloat16, 3e-2), (torch.float16, 5e-3)])
def test_half_precision(bfloat16_in_the_interpreter, dtype, tolerance):
    assert_same(*problem(37, d=64, dtype=dtype), rtol=tolerance, atol=tolerance, window=9)


def test_inputs_of_several_types_and_layouts():
    (q, k, v, gate), dout = problem(37)
    v = v.detach().bfloat16().requires_grad_()
    k = k.detach().transpose(2, 3).contiguous().transpose(2, 3).requires_grad_()
    assert_same([q, k, v, gate], dout, rtol=1e-2, atol=1e-2, window=5)


def test_evicted_keys_are_not_read():
    (q, k, v, gate), dout = problem(96, queries=10)
    j = torch.arange(96, device=DEVICE)
    gate = (j % 3 == 1).float().expand_as(gate).clone().requires_grad_()
    gone = (gate == 0) & (j < 72)  # three tiles of the list, behind the windows of all ten queries
    poisoned = [t.detach().masked_fill(gone[..., None], float("nan")).requires_grad_() for t in (k, v)]
    got = results(gated_triton.gated_attention, [q, *poisoned, gate.detach()], dout, window=8)
    for a, b in zip(got, results(naive.gated_attention, [q, k, v, gate.detach()], dout, window=8)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert gone.sum() == 48 and all((t[gone] == 0).all() for t in got[2:])
    with_gate = results(gated_triton.gated_attention, [q, *poisoned, gate], dout, window=8)
    assert with_gate[4][gone].isnan().all(), "a gate that learns is judged by all of its keys"


@pytest.mark.parametrize("needed", ["k", "qv", "gate"])
def test_gradients_that_nobody_wants_change_no_other(needed):
    inputs, dout = problem(37)
    all_of_them = dict(zip(("q", "k", "v", "gate"), results(gated_triton.gated_attention, inputs, dout, window=6)[1:]))
    names = [name for name in all_of_them if name in needed or name == needed]
    some = [t.detach().requires_grad_(name in names) for name, t in zip(all_of_them, inputs)]
    got = results(gated_triton.gated_attention, some, dout, window=6)[1:]
    assert len(got) == len(names) and all(torch.equal(a, all_of_them[name]) for name, a in zip(names, got))


def test_evicted_keys_that_outweigh_all_live_ones_stay_finite():
    (q, k, v, gate), dout = problem(40, "all evicted")
    inputs = [(q * 30).detach().requires_grad_(), (k * 30).detach().requires_grad_(), v, gate]
    out, dq, dk, dv, dgate = results(gated_triton.gated_attention, inputs, dout, window=0)
    assert torch.isfinite(dgate).all() and dgate.abs().max() > 1e20
    torch.testing.assert_close(out, v.expand_as(out))  # each token sees itself alone
    torch.testing.assert_close(dv, dout.sum(1, keepdim=True))
    assert dq.abs().max() < 1e-3 and dk.abs().max() < 1e-3


def test_no_second_derivative_is_made_up():
    inputs, dout = problem(5)
    out = gated_triton.gated_attention(*inputs, window=1, scale=1.0)
    (dgate,) = torch.autograd.grad(out, inputs[3], dout.requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dgate.sum().backward()


def test_where_triton_serves(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert backends.triton_serves(cuda, torch.bfloat16) and backends.triton_serves(cuda, torch.float32)
    assert not backends.triton_serves(cuda, torch.float64) and not backends.triton_serves(cpu, torch.bfloat16)
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    assert not backends.triton_serves(cuda, torch.bfloat16)


def test_training_reaches_the_kernels(monkeypatch):
    monkeypatch.setattr(backends, "triton_serves", lambda device, dtype: True)
    inputs, dout = problem(20)
    wanted = results(gated_triton.gated_attention, inputs, dout, window=3)
    with monkeypatch.context() as patch:
        patch.setattr(gated_attention._GatedAttention, "apply", None)  # the blocked path would fail
        got = results(gated_attention.gated_attention, inputs, dout, window=3)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted))


def test_kernels_compile_and_fit_on_small_gpus(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    script = Path(__file__).with_name("compile_kernels.py")
    made = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    shared = dict(line.split() for line in made.stdout.splitlines())
    assert set(shared) == {"_forward", "_grad_queries", "_grad_keys"}
    assert all(int(size) <= 99 * 1024 for size in shared.values()), "what a block may take since compute capability 8.6"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 3e-2), (torch.float16, 5e-3)])
@pytest.mark.parametrize("d", [64, 128, 256])
@pytest.mark.parametrize("masked", [False, True])
def test_on_a_gpu(monkeypatch, dtype, tolerance, d, masked):
    monkeypatch.undo()  # full tiles
    inputs, dout = problem(1999, "mixed", batch=3, heads=8, kv=2, d=d, dtype=dtype)
    mask = padded_and_packed(1999, 1999) if masked else None
    assert_same(inputs, dout, rtol=tolerance, atol=tolerance, window=32, mask=mask)
    first, second = (results(gated_triton.gated_attention, inputs, dout, window=32, mask=mask) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second)), "equal inputs give equal bits"
