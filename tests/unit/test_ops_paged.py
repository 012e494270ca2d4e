"""Paged attention backends against the readable reference: odd lengths, unequal and empty heads, every group size."""

import os
import sys
import types

import pytest
import torch

from gatekv.ops import backends, naive, paged_attention, paged_flash, segments
from gatekv.ops.page_table import PageTable
from gatekv.ops.scale import Scale

COUNTS = {
    "equal": [33] * 6,
    "one page": [5] * 6,
    "unequal": [0, 70, 1, 16, 17, 200],
    "empty": [0] * 6,
    "long": [2100] * 6,
}


def memory(counts, block=16, d=8, dtype=torch.float64, seed=0):
    """A pool in random order with garbage in what no row owns, and its table."""
    generator = torch.Generator().manual_seed(seed)
    need = [-(-c // block) for c in counts]
    pool = sum(need) + 3
    keys, values = (torch.randn(pool, block, d, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    pages = torch.randperm(pool, generator=generator)[: sum(need)].int()
    owners = torch.tensor([r for r, n in enumerate(need) for _ in range(n)], dtype=torch.int32)
    fill = torch.tensor([min(block, c - i * block) for c, n in zip(counts, need) for i in range(n)], dtype=torch.int32)
    even = need[0] if need[0] and len(set(need)) == 1 else None
    for page, used in zip(pages.tolist(), fill.tolist()):
        keys[page, used:] = 1e4  # whoever reads an unused slot will be wrong by far
    return keys, values, PageTable(pages, owners, fill, len(counts), even)


def queries(b, h, n, d, dtype=torch.float64):
    return torch.randn(b, h, n, d, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("counts", list(COUNTS))
@pytest.mark.parametrize("n,heads", [(1, 6), (1, 24), (5, 6), (33, 12)])
def test_torch_matches_naive(counts, n, heads):
    keys, values, table = memory(COUNTS[counts])
    q = queries(2, heads, n, 8)
    got = paged_attention.paged_segment(q, keys, values, table, 0.3)
    wanted = naive.paged_segment(q, keys, values, table, 0.3)
    for a, b in zip(got, wanted):
        assert a.shape == b.shape and not torch.isnan(a).any()
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("counts", ["equal", "unequal", "empty"])
@pytest.mark.parametrize("n", [1, 33])
def test_capped_scores(counts, n):
    keys, values, table = memory(COUNTS[counts])
    keys = keys.clamp(-3, 3)
    q, scale = queries(2, 12, n, 8), Scale(0.3, 0.8)
    got = paged_attention.paged_segment(q, keys, values, table, scale)
    wanted = naive.paged_segment(q, keys, values, table, scale)
    for a, b in zip(got, wanted):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    paid = [f(q, keys, table, wanted[1], scale) for f in (paged_attention.paged_mass, naive.paged_mass)]
    torch.testing.assert_close(*paid, rtol=1e-10, atol=1e-12)
    dense = torch.randn(2, 6, 19, 8, dtype=torch.float64), torch.randn(2, 6, 19, 5, dtype=torch.float64)
    for a, b in zip(segments.dense_segment(q, *dense, None, scale), naive.dense_segment(q, *dense, None, scale)):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    for a, b in zip(segments.in_blocks(q, *dense, None, scale), naive.dense_segment(q, *dense, None, scale)):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("counts", list(COUNTS))
@pytest.mark.parametrize("n", [1, 33])
def test_keys_may_be_narrower_than_values(counts, n):
    keys, values, table = memory(COUNTS[counts])
    keys, q = keys[..., :5].contiguous(), queries(2, 6, n, 5)
    got = paged_attention.paged_segment(q, keys, values, table, 0.3)
    wanted = naive.paged_segment(q, keys, values, table, 0.3)
    for a, b in zip(got, wanted):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize("counts", list(COUNTS))
def test_the_attention_each_token_receives(counts, n):
    keys, values, table = memory(COUNTS[counts])
    q = queries(2, 12, n, 8)
    _, lse = naive.paged_segment(q, keys, values, table, 0.3)
    for most in (True, False):
        got = paged_attention.paged_mass(q, keys, table, lse, 0.3, most)
        torch.testing.assert_close(got, naive.paged_mass(q, keys, table, lse, 0.3, most), rtol=1e-10, atol=1e-12)
    assert got.sum() == pytest.approx(sum(c > 0 for c in COUNTS[counts]))


@pytest.mark.parametrize("block", [1, 16, 64])
def test_torch_matches_naive_in_bfloat16_with_other_blocks(block):
    keys, values, table = memory(COUNTS["unequal"], block, 64, torch.bfloat16)
    q = queries(2, 9, 1, 64, torch.bfloat16)
    got = paged_attention.paged_segment(q, keys, values, table, 0.125)
    wanted = naive.paged_segment(q, keys, values, table, 0.125)
    for a, b in zip(got, wanted):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_spans_of_pages_are_merged(monkeypatch):
    monkeypatch.setattr(paged_attention, "CHUNK", 4)
    for counts in ("equal", "unequal"):
        keys, values, table = memory(COUNTS[counts])
        q = queries(2, 6, 2, 8)
        for a, b in zip(
            paged_attention.paged_segment(q, keys, values, table, 0.3), naive.paged_segment(q, keys, values, table, 0.3)
        ):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("masked", [None, "shared", "per head", "nothing"])
@pytest.mark.parametrize("n,t", [(1, 1), (1, 37), (7, 37)])
def test_dense_segment_matches_naive(masked, n, t):
    torch.manual_seed(0)
    q, k, v = queries(2, 6, n, 8), *(torch.randn(2, 3, t, 8, dtype=torch.float64) for _ in range(2))
    heads = 3 if masked == "per head" else 1
    mask = None if masked is None else torch.rand(2, heads, n, t) > (2 if masked == "nothing" else 0.6)
    for a, b in zip(segments.dense_segment(q, k, v, mask, 0.3), naive.dense_segment(q, k, v, mask, 0.3)):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_merge_matches_naive_and_is_the_whole_attention():
    keys, values, table = memory(COUNTS["unequal"])
    q = queries(2, 6, 3, 8)
    k, v = (torch.randn(2, 3, 9, 8, dtype=torch.float64) for _ in range(2))
    far, near = naive.paged_segment(q, keys, values, table, 0.3), naive.dense_segment(q, k, v, None, 0.3)
    empty = (torch.zeros_like(far[0]), torch.full_like(far[1], -torch.inf))
    for parts in ([far, near], [near, far], [empty, far, near], [empty, empty], [far]):
        for a, b in zip(segments.merge(parts), naive.merge(parts)):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    out, lse = segments.merge([far, near])
    for r in range(6):
        mine = table.owners == r
        held = [(keys[p, :f], values[p, :f]) for p, f in zip(table.pages[mine].tolist(), table.fill[mine].tolist())]
        row, head = divmod(r, 3)
        whole_k = torch.cat([k[row, head], *(a for a, _ in held)])
        whole_v = torch.cat([v[row, head], *(b for _, b in held)])
        s = q[row, head * 2 : head * 2 + 2] @ whole_k.T * 0.3
        torch.testing.assert_close(out[row, head * 2 : head * 2 + 2], s.softmax(-1) @ whole_v)
        torch.testing.assert_close(lse[row, head * 2 : head * 2 + 2], s.logsumexp(-1))


@pytest.fixture
def triton_on_cpu():
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
        pytest.skip("needs TRITON_INTERPRET=1, which tests/conftest.py sets before triton is imported")
    from gatekv.ops import paged_triton

    return paged_triton, torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("counts", ["equal", "one page", "unequal", "empty"])
@pytest.mark.parametrize("group,d", [(1, 64), (3, 64), (8, 128), (2, 80), (2, 256)])
def test_triton_matches_naive(triton_on_cpu, monkeypatch, counts, group, d):
    triton, device = triton_on_cpu
    monkeypatch.setattr(triton, "SPLIT_TOKENS", 48)  # several splits at lengths a test can afford
    keys, values, table = memory(COUNTS[counts], 16, d, torch.float32)
    table = PageTable(*(t.to(device) for t in (table.pages, table.owners, table.fill)), table.rows, table.even)
    q = queries(2, 3 * group, 1, d, torch.float32)
    got = triton.paged_segment(*(t.to(device) for t in (q, keys, values)), table, d**-0.5)
    wanted = naive.paged_segment(q, keys, values, memory(COUNTS[counts], 16, d)[2], d**-0.5)
    for a, b in zip(got, wanted):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("counts", ["one page", "unequal"])
def test_triton_reads_keys_narrower_than_values(triton_on_cpu, counts):
    triton, device = triton_on_cpu
    keys, values, table = memory(COUNTS[counts], 16, 64, torch.float32)
    table = PageTable(*(t.to(device) for t in (table.pages, table.owners, table.fill)), table.rows, table.even)
    keys, q = keys[..., :39].contiguous(), queries(2, 9, 1, 39, torch.float32)
    got = triton.paged_segment(*(t.to(device) for t in (q, keys, values)), table, 0.125)
    wanted = naive.paged_segment(q, keys, values, memory(COUNTS[counts], 16, 64)[2], 0.125)
    for a, b in zip(got, wanted):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("block,n", [(8, 2), (16, 5), (64, 1), (128, 3)])
def test_triton_with_several_queries_and_other_pages(triton_on_cpu, block, n):
    triton, device = triton_on_cpu
    keys, values, table = memory(COUNTS["unequal"], block, 32, torch.float32)
    table = PageTable(*(t.to(device) for t in (table.pages, table.owners, table.fill)), table.rows)
    q = queries(2, 12, n, 32, torch.float32)
    got = triton.paged_segment(*(t.to(device) for t in (q, keys, values)), table, 0.2)
    wanted = naive.paged_segment(q, keys, values, memory(COUNTS["unequal"], block, 32)[2], 0.2)
    for a, b in zip(got, wanted):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-4, atol=1e-5)


def with_kvcache(
    q, k_cache, v_cache, *, cache_seqlens, block_table, softmax_scale, causal, return_softmax_lse, softcap=0.0
):
    """What flash-attn documents for `flash_attn_with_kvcache`, in plain torch; +inf for empty rows, as its kernel."""
    assert return_softmax_lse and not causal and k_cache.shape[1] % 256 == 0 and k_cache.shape[2] == 1
    assert cache_seqlens.dtype == block_table.dtype == torch.int32
    outs, lses = [], []
    for row, length in enumerate(cache_seqlens.tolist()):
        k, v = (c[block_table[row].long(), :, 0].flatten(0, 1)[:length].float() for c in (k_cache, v_cache))
        s = torch.einsum("qgd,td->gqt", q[row].float(), k) * softmax_scale
        s = (s / softcap).tanh() * softcap if softcap else s
        outs.append(torch.einsum("gqt,td->qgd", s.softmax(-1), v).to(q.dtype))
        lses.append(s.logsumexp(-1) if length else torch.full(s.shape[:2], torch.inf))
    return torch.stack(outs), torch.stack(lses)


@pytest.mark.parametrize("block", [256, 8])  # pages too small for the kernel go to another
@pytest.mark.parametrize("counts", [[300, 256, 0, 1, 700, 257], [0] * 6])
def test_flash_is_called_as_documented(monkeypatch, counts, block):
    module = types.ModuleType("flash_attn")
    module.flash_attn_with_kvcache = with_kvcache
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    keys, values, table = memory(counts, block, 16, torch.float32)
    q = queries(2, 6, 3, 16, torch.float32)
    for scale in (0.25, Scale(0.25, 0.8)):
        got = paged_flash.paged_segment(q, keys, values, table, scale)
        for a, b in zip(got, naive.paged_segment(q, keys, values, table, scale)):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name,block", [("triton", 16), ("torch", 16), ("flash", 256)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_backends_on_a_gpu(name, block, dtype):
    if name in backends.NEEDS:
        pytest.importorskip(backends.NEEDS[name])
    keys, values, table = memory([3000, 1, 0, 777, 256, 5000], block, 128, dtype)
    q = queries(2, 12, 1, 128, dtype)
    wanted = naive.paged_segment(q, keys, values, table, 128**-0.5)
    table = PageTable(*(t.cuda() for t in (table.pages, table.owners, table.fill)), table.rows)
    got = backends.load(name)(q.cuda(), keys.cuda(), values.cuda(), table, 128**-0.5)
    for a, b in zip(got, wanted):
        torch.testing.assert_close(a.cpu().float(), b, rtol=2e-2, atol=2e-2)


def test_choice_of_backend(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    here = lambda *names: lambda name: name in names or None  # noqa: E731
    monkeypatch.setattr(backends.importlib.util, "find_spec", here("triton", "flash_attn"))
    assert backends.choose(None, 16, cpu, torch.bfloat16) == "torch"
    assert backends.choose(None, 16, cuda, torch.bfloat16) == "triton"
    assert backends.choose(None, 256, cuda, torch.bfloat16) == "flash"
    assert backends.choose(None, 256, cuda, torch.float32) == "triton"
    assert backends.choose("torch", 16, cuda, torch.bfloat16) == "torch"
    with pytest.raises(ValueError, match="block_size=256"):
        backends.choose("flash", 16, cuda, torch.bfloat16)
    monkeypatch.setattr(backends.importlib.util, "find_spec", here())
    assert backends.choose(None, 256, cuda, torch.bfloat16) == "torch"
    with pytest.raises(ValueError, match="needs the package triton"):
        backends.choose("triton", 16, cuda, torch.bfloat16)
    with pytest.raises(ValueError, match="Did you mean 'triton'"):
        backends.choose("tritton", 16, cpu, torch.bfloat16)
