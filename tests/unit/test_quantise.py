"""Records of bytes against the readable reference, and what each number may lose."""

import pytest
import torch

from gatekv.ops import naive, quantise

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def vectors(d, dtype, seed=0):
    """[3, 5, d], some of them constant, one with a channel far out."""
    x = torch.randn(3, 5, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3 + 1
    x[0, 0], x[0, 1], x[1, 2, d // 2] = 0, -2.5, 300.0
    return x.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [8, 13, 64])
@pytest.mark.parametrize("bits,outliers", [(2, 0), (2, 3), (4, 1), (4, 2), (8, 0), (8, 2), (16, 2)])
def test_fast_matches_naive(dtype, d, bits, outliers):
    x = vectors(d, dtype)
    got, wanted = quantise.quantise(x, bits, outliers), naive.quantise(x, bits, outliers)
    apart = outliers if bits < 16 else 0
    codes = len(got[0, 0]) if bits == 16 else -(-d * bits // 8)
    parts = [t.split([codes, t.shape[-1] - codes - apart, apart], -1) for t in (got, wanted)]
    assert got.dtype == torch.uint8 and all(torch.equal(*pair) for pair in list(zip(*parts))[::2])
    numbers = [part[1].contiguous().view(dtype) for part in parts]
    torch.testing.assert_close(*numbers, rtol=1e-6, atol=0)  # the scale is a quotient, rounded once or twice
    assert got.shape[-1] == quantise.record_bytes(bits, outliers, d, x.element_size())
    back = [module.dequantise(got, bits, outliers, d, dtype) for module in (quantise, naive)]
    assert back[0].shape == x.shape and back[0].dtype == dtype
    torch.testing.assert_close(*back, rtol=0, atol=3e2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("bits,outliers", [(2, 2), (4, 0), (4, 2), (8, 2), (16, 0)])
def test_no_number_moves_by_more_than_half_a_step_and_outliers_not_at_all(bits, outliers):
    x = vectors(64, torch.float32)
    back = quantise.dequantise(quantise.quantise(x, bits, outliers), bits, outliers, 64, torch.float32)
    low, high, channels = quantise.spread(x, outliers)
    step = 0 if bits == 16 else (high - low) / (2**bits - 1)
    assert ((back - x).abs().amax(-1) <= step / 2 + 1e-5).all()
    assert torch.equal(back.gather(-1, channels), x.gather(-1, channels))
    if outliers:
        assert 32 in channels[1, 2] and high[1, 2] < 20, "the channel far out does not stretch the others' range"
    if bits < 16:
        assert (back != x).any() and torch.equal(back[0, :2], x[0, :2])
    else:
        assert torch.equal(back, x)


def test_slots_that_were_never_written_decode_to_something_finite():
    for bits in (2, 4, 8, 16):
        size = quantise.record_bytes(bits, 2, 64, 2)
        assert not quantise.dequantise(torch.zeros(2, 3, size, dtype=torch.uint8), bits, 2, 64, torch.bfloat16).any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_a_store_of_no_page_or_of_one_record_decodes(dtype, bits):
    x = vectors(13, dtype)
    records = quantise.quantise(x, bits, 2)
    whole = quantise.dequantise(records, bits, 2, 13, dtype)
    for rows, slots in (
        (slice(0), slice(None)),
        (slice(None), slice(0)),
        (slice(1), slice(1)),
        (slice(2, 3), slice(4, 5)),
    ):
        part = records[rows, slots]
        assert torch.equal(quantise.dequantise(part, bits, 2, 13, dtype), whole[rows, slots])
        assert naive.dequantise(part, bits, 2, 13, dtype).shape == whole[rows, slots].shape
