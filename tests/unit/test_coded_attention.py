"""Attention over codes: torch and Triton beside the readable reference, at odd lengths, over rows with nothing too."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gatekv.ops import backends, codec, coded_attention, naive
from gatekv.ops.coded_attention import Codes
from gatekv.ops.scale import Scale

PAIRS = [(2, 2), (3, 2), (4, 3), (5, 5), (8, 4), (2, 8)]
# Tokens of each row, stream after stream.
COUNTS = {
    "uneven": [[5, 0, 17, 1], [33, 0, 2, 3], [1, 0, 0, 16], [0, 0, 7, 0], [2, 0, 1, 0], [0, 0, 3, 9]],
    "one stream": [[7, 1, 0, 40]],
    "one token": [[0, 0, 1, 0], [0, 0, 0, 0]],
    "empty": [[0, 0, 0, 0], [0, 0, 0, 0]],
    "none": [],
}


def streams(counts, dims, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    found = []
    for pair, each in zip(PAIRS, counts):
        vectors = [torch.randn(sum(each), dim, generator=generator, dtype=torch.float64) * 2 for dim in dims]
        records = torch.cat([codec.encode(v, bits, dtype) for v, bits in zip(vectors, pair)], -1)
        found.append(Codes(records, torch.tensor(each, dtype=torch.int32), *pair))
    return found


def queries(heads, n, dim, dtype=torch.float64):
    return torch.randn(2, heads, n, dim, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def assert_same(got, wanted, rtol, atol):
    for a, b in zip(got, wanted):
        assert a.shape == b.shape and a.dtype == b.dtype and not torch.isnan(a).any()
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("group,n", [(1, 1), (3, 1), (8, 1), (2, 5), (3, 33)])
@pytest.mark.parametrize("dims", [(64, 64), (80, 80), (96, 96), (256, 256), (64, 20)])
def test_torch_matches_naive(counts, group, n, dims):
    q, held = queries(2 * group, n, dims[0]), streams(COUNTS[counts], dims)
    got, wanted = (
        f(q, held, 2, dims, torch.float64, 0.1) for f in (coded_attention.coded_segment, naive.coded_segment)
    )
    assert_same(got, wanted, 1e-9, 1e-11)
    for row in range(4):
        if not sum(each[row] for each in COUNTS[counts]):
            mine = row // 2, slice(row % 2 * group, (row % 2 + 1) * group)
            assert not got[0][mine].any() and (got[1][mine] == -torch.inf).all()


@pytest.mark.parametrize("counts", ["uneven", "empty"])
@pytest.mark.parametrize("n", [1, 33])
def test_capped_scores(counts, n):
    q, held, scale = queries(6, n, 64), streams(COUNTS[counts], (64, 64)), Scale(0.3, 0.8)
    got, wanted = (
        f(q, held, 2, (64, 64), torch.float64, scale) for f in (coded_attention.coded_segment, naive.coded_segment)
    )
    assert_same(got, wanted, 1e-9, 1e-11)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("asked", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("n", [1, 33])
def test_scales_of_one_dtype_and_queries_of_another(dtype, asked, n):
    q, held = queries(6, n, 64, asked), streams(COUNTS["uneven"], (64, 64), dtype)
    got, wanted = (f(q, held, 2, (64, 64), dtype, 0.1) for f in (coded_attention.coded_segment, naive.coded_segment))
    assert_same(got, wanted, 1e-4, 1e-5)


@pytest.mark.parametrize("rounds", [2, 3, 4, 9])
def test_rows_are_read_some_at_a_time(monkeypatch, rounds):
    tokens = sum(map(sum, COUNTS["uneven"]))
    monkeypatch.setattr(coded_attention, "SCORES", 4 * 3 * tokens / rounds**2)
    q, held = queries(6, 1, 64), streams(COUNTS["uneven"], (64, 64))
    got, wanted = (
        f(q, held, 2, (64, 64), torch.float64, 0.1) for f in (coded_attention.coded_segment, naive.coded_segment)
    )
    assert_same(got, wanted, 1e-9, 1e-11)


def test_no_row_hears_of_another():
    """A value beyond its dtype spoils its own row, and no other."""
    held, q = streams(COUNTS["uneven"], (64, 64), torch.float32), queries(6, 1, 64, torch.float32)
    clean = coded_attention.coded_segment(q, held, 2, (64, 64), torch.float32, 0.1)
    for first, length in ((16, 4), (36, 4)):  # scales of a key and of a value of 2 bits
        spoilt = held[0].records.clone()
        spoilt[0, first : first + length] = torch.tensor([torch.inf]).view(torch.uint8)
        out, lse = coded_attention.coded_segment(
            q, [held[0]._replace(records=spoilt), *held[1:]], 2, (64, 64), torch.float32, 0.1
        )
        assert not out[0, :3].isfinite().all()
        assert torch.equal(out[1], clean[0][1]) and torch.equal(lse[1], clean[1][1])


def test_what_was_decoded_stands_row_after_row():
    held = streams(COUNTS["uneven"], (64, 20))
    keys, values, table = coded_attention.decoded(held, (64, 20), torch.float64)
    counts = torch.tensor(COUNTS["uneven"]).sum(0)
    assert table.lengths.tolist() == counts.tolist() and keys.shape[1] == 64 and values.shape[1] == 20
    for row, pages in enumerate(table.pages.long().split(counts.tolist())):
        mine = [s.records[sum(s.counts[:row]) :][: s.counts[row]] for s in held]
        size = [codec.record_bytes(s.key_bits, 64, 8) for s in held]
        wanted = [codec.decode(m[:, :n], s.key_bits, 64, torch.float64) for m, n, s in zip(mine, size, held)]
        assert torch.equal(keys[pages], torch.cat(wanted))


@pytest.fixture
def on_triton(monkeypatch):
    """The kernel's answer beside the readable one's, on a GPU if there is one."""
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
        pytest.skip("needs TRITON_INTERPRET=1, which tests/conftest.py sets before triton is imported")
    from gatekv.ops import coded_triton

    monkeypatch.setattr(coded_triton, "PIECE", 48)  # several pieces, and several tiles, at lengths a test can afford
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def both(q, held, dims, dtype, scale):
        moved = [Codes(s.records.to(device), s.counts.to(device), *s[2:]) for s in held]
        got = coded_triton.coded_segment(q.to(device), moved, 2, dims, dtype, scale)
        return [t.cpu() for t in got], naive.coded_segment(q, held, 2, dims, dtype, scale)

    return both


@pytest.mark.covering(1)  # the interpreter takes a second a case
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("group,n,dims", [(1, 1, (64, 64)), (3, 1, (80, 80)), (8, 1, (96, 96)), (3, 3, (128, 128)),
                                          (2, 1, (64, 20)), (1, 33, (64, 64))])  # fmt: skip
def test_triton_matches_naive(on_triton, counts, group, n, dims):
    q, held = queries(2 * group, n, dims[0], torch.float32), streams(COUNTS[counts], dims, torch.float32)
    assert_same(*on_triton(q, held, dims, torch.float32, 0.1), 1e-4, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_triton_reads_scales_of_two_bytes_in_pieces(on_triton, dtype):
    q, counts = queries(6, 1, 64, dtype), [[5, 0, 131, 1], [96, 0, 2, 49], [1, 0, 0, 48]]
    for scale in (0.1, Scale(0.3, 0.8)):
        assert_same(*on_triton(q, streams(counts, (64, 64), dtype), (64, 64), dtype, scale), 1e-4, 1e-5)


def test_the_backend_of_pages_names_that_of_codes(on_triton, monkeypatch):
    from gatekv.ops import coded_triton

    assert backends.load_coded("torch") is coded_attention.coded_segment
    assert backends.load_coded("triton") is backends.load_coded("flash") is coded_triton.coded_segment
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    assert backends.load_coded("flash") is coded_attention.coded_segment


def test_the_kernel_compiles_and_fits_on_small_gpus(tmp_path):
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    script = Path(__file__).with_name("compile_kernels.py")
    made = subprocess.run([sys.executable, script, "coded"], env=environment, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    shared = [line.split() for line in made.stdout.splitlines()]
    assert len(shared) == 3 and all(int(size) <= 99 * 1024 for _, size in shared)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_on_a_gpu(on_triton, monkeypatch, dim):
    monkeypatch.undo()  # pieces of full length
    counts = torch.randint(0, 1500, (len(PAIRS), 4), generator=torch.Generator().manual_seed(0)).tolist()
    q, held = queries(12, 1, dim, torch.bfloat16), streams(counts, (dim, dim), torch.bfloat16)
    assert_same(*on_triton(q, held, (dim, dim), torch.bfloat16, dim**-0.5), 1e-3, 1e-3)
