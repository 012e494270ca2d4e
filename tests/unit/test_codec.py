"""The code of few bits: fast beside naive, distortion as measured, any even head_dim."""

import pytest
import torch

from gatekv.ops import codec, naive
from gatekv.policies.bits import DISTORTION

DIMS = (16, 20, 64, 80, 96, 128, 256)


def vectors(dim, n=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    channels = torch.rand(dim, generator=generator).exp() ** 3  # some channels much larger, as a key's are
    return torch.randn(2, 3, n, dim, generator=generator) * channels + 0.3


def heads(x):
    return torch.arange(x.shape[1])[:, None]


@pytest.mark.parametrize("dim", DIMS)
def test_a_rotation_keeps_products_and_is_undone(dim):
    x, y = vectors(dim).double(), vectors(dim, seed=1).double()
    turned = codec.turn(x, heads(x), 3)
    torch.testing.assert_close(codec.turn_back(turned, heads(x), 3), x, rtol=0, atol=1e-11)
    torch.testing.assert_close((turned * codec.turn(y, heads(y), 3)).sum(-1), (x * y).sum(-1), rtol=1e-10, atol=1e-10)
    assert not torch.equal(codec.turn(x[:, :1].expand_as(x), heads(x), 3)[0, 0], turned[0, 1])  # each head its own


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("bits", codec.WIDTHS)
@pytest.mark.parametrize("dim", DIMS)
def test_fast_and_naive_write_the_same_bytes_and_read_the_same_numbers(bits, dim, dtype):
    wide = torch.promote_types(dtype, torch.float32)
    x = vectors(dim, n=3).to(wide)
    x[0, 0, 0] = 0  # a vector of nothing has a scale of nothing
    y, levels = codec.turn(x, heads(x), 3), codec.levels(bits)
    records = codec.encode(y, bits, dtype)
    assert records.shape[-1] == codec.record_bytes(bits, dim, dtype.itemsize)
    plain, codes = naive.encode(y, bits, levels, dtype), records.shape[-1] - dtype.itemsize
    assert torch.equal(records[..., :codes], plain[..., :codes])  # the scale is a sum, in another order
    read = codec.decode(records, bits, dim, dtype)
    torch.testing.assert_close(
        read, naive.decode(plain, bits, levels, dim, dtype), rtol=1e-2 if dtype.itemsize == 2 else 1e-5, atol=1e-6
    )
    assert not read[0, 0, 0].any()
    assert codec.decode(records[:0], bits, dim, dtype).shape == (0, 3, 3, dim)


@pytest.mark.parametrize(
    "bits, dim, length", [(2, 64, 18), (3, 64, 26), (4, 64, 34), (5, 64, 42), (8, 64, 66), (3, 20, 10)]
)
def test_three_and_five_bits_cost_what_they_say(bits, dim, length):
    assert codec.record_bytes(bits, dim, 2) == length


@pytest.mark.parametrize("bits", codec.WIDTHS)
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
def test_the_distortion_is_what_the_allocation_is_told(bits, dim):
    x = vectors(dim, n=700)
    y = codec.turn(x, heads(x), 3)
    read = codec.decode(codec.encode(y, bits, torch.bfloat16), bits, dim, torch.bfloat16)
    error = ((read - y).square().sum(-1) / y.square().sum(-1)).mean()
    assert float(error) == pytest.approx(DISTORTION[bits], rel=0.08)


def test_levels_are_the_best_for_a_gaussian():
    assert torch.allclose(
        codec.levels(2), torch.tensor([-1.5104, -0.4528, 0.4528, 1.5104], dtype=torch.float64), atol=1e-3
    )
    for bits in codec.WIDTHS:
        levels = codec.levels(bits)
        assert (levels.diff() > 0).all() and torch.equal(levels, -levels.flip(0))


def test_what_inference_mode_made_first_can_be_trained_with():
    x = torch.randn(4, 24)
    with torch.inference_mode():
        codec.turn_back(codec.turn(x, torch.tensor(5), 7), torch.tensor(5), 7)
        codec.decode(codec.encode(x, 3, torch.float32), 3, 24, torch.float32)
    x.requires_grad_()
    codec.turn_back(codec.turn(x, torch.tensor(5), 7), torch.tensor(5), 7).square().sum().backward()
    torch.testing.assert_close(x.grad, 2 * x.detach(), rtol=1e-4, atol=1e-4)
