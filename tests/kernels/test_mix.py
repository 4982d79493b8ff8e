"""Hyper-connection kernels against the brick and fp64."""

import pytest
import torch

from rorqual.family.parts import HyperConnection
from rorqual.kernels import mix
from rorqual.nn.hyper import Mix
from tests.interpreter import repair

SHAPES = [(1, 4, 96), (5, 4, 64), (17, 2, 40), (33, 4, 16), (2, 1, 130)]


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    repair(monkeypatch)


def inputs(rows, streams, hidden, dtype, device):
    outputs = streams * (2 + streams)
    x = torch.randn(rows, streams, hidden).to(dtype)
    y = torch.randn(rows, hidden).to(dtype)
    fn = torch.randn(outputs, streams * hidden) * (streams * hidden) ** -0.5
    base, scale = torch.randn(outputs), torch.rand(3) + 0.5
    return [z.to(device) for z in (x, y, fn, base, scale)]


@pytest.mark.parametrize("form", [mix.fast_read, mix.reference_read, mix.mix_read])
@pytest.mark.parametrize("shape", SHAPES)
def test_reading_equals_fp64(device, form, shape):
    x, _, fn, base, scale = inputs(*shape, torch.float32, device)
    expected = mix.reference_read(*(z.double() for z in (x, fn, base, scale)), 1e-6, 1e-6, 20)
    for got, want in zip(form(x, fn, base, scale, 1e-6, 1e-6, 20), expected, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("shape", SHAPES[:3])
def test_reading_bf16_streams_loses_nothing_but_the_last_rounding(device, shape):
    x, _, fn, base, scale = inputs(*shape, torch.bfloat16, device)
    expected = mix.reference_read(*(z.double() for z in (x, fn, base, scale)), 1e-6, 1e-6, 20)
    inner, post, comb = mix.fast_read(x, fn, base, scale, 1e-6, 1e-6, 20)
    assert inner.dtype == torch.bfloat16 and post.dtype == comb.dtype == torch.float32
    torch.testing.assert_close(inner.double(), expected[0], rtol=1e-2, atol=1e-4)
    for got, want in zip((post, comb), expected[1:], strict=True):
        torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("iterations", [1, 2, 20])
def test_reading_and_writing_equal_the_brick(iterations):
    x, y, fn, base, scale = inputs(6, 4, 24, torch.float32, "cpu")
    brick = Mix(24, HyperConnection(4, iterations, 1e-5), 1e-6).requires_grad_(False)
    brick.fn.copy_(fn), brick.base.copy_(base), brick.scale.copy_(scale)
    read = mix.reference_read(x, fn, base, scale, 1e-6, 1e-5, iterations)
    for got, want in zip(read, brick.read(x[None]), strict=True):
        torch.testing.assert_close(got, want[0], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(mix.reference_write(x, y, *read[1:]), brick.write(x, y, *read[1:]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_writing_equals_fp64(device, shape, dtype):
    x, y, fn, base, scale = inputs(*shape, dtype, device)
    _, post, comb = mix.reference_read(x, fn, base, scale, 1e-6, 1e-6, 20)
    want = mix.reference_write(*(z.double() for z in (x, y, post, comb)))
    for got in (mix.fast_write(x, y, post, comb), mix.mix_write(x, y, post, comb)):
        tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", SHAPES[:3])
def test_writing_and_reading_in_one_equals_one_after_the_other(device, shape):
    x, y, fn, base, scale = inputs(*shape, torch.float32, device)
    _, post, comb = mix.fast_read(x, fn, base, scale, 1e-6, 1e-6, 20)
    new, got = mix.fast_write_read(x, y, post, comb, fn, base, scale, 1e-6, 1e-6, 20)
    want = mix.fast_write(x, y, post, comb)
    torch.testing.assert_close(new, want, rtol=1e-6, atol=1e-6)
    for a, b in zip(got, mix.fast_read(want, fn, base, scale, 1e-6, 1e-6, 20), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_row_has_the_same_bits_in_any_company(device):
    x, y, fn, base, scale = inputs(35, 4, 96, torch.bfloat16, device)
    post, comb = torch.rand(35, 4, device=device), torch.rand(35, 4, 4, device=device)
    new, whole = mix.fast_write_read(x, y, post, comb, fn, base, scale, 1e-6, 1e-6, 20)
    for rows in ([3], [34], list(range(10, 22))):
        own = [z[rows].contiguous() for z in (x, y, post, comb)]
        one, alone = mix.fast_write_read(*own, fn, base, scale, 1e-6, 1e-6, 20)
        assert torch.equal(one, new[rows])
        for a, b in zip(alone, whole, strict=True):
            assert torch.equal(a, b[rows])


def test_no_rows(device):
    x, y, fn, base, scale = inputs(0, 4, 16, torch.float32, device)
    inner, post, comb = mix.fast_read(x, fn, base, scale, 1e-6, 1e-6, 20)
    assert inner.shape == (0, 16) and post.shape == (0, 4) and comb.shape == (0, 4, 4)
    assert mix.fast_write(x, y, post, comb).shape == (0, 4, 16)
