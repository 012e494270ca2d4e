"""Attention over codes: torch and Triton beside the readable reference, at odd lengths, over rows with nothing too."""

import pytest
import torch

from gatekv.ops import codec, coded_attention, naive
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


@pytest.mark.parametrize("products", [1, 6, 9])
def test_rows_are_read_some_at_a_time(monkeypatch, products):
    monkeypatch.setattr(coded_attention, "PRODUCTS", products)
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
