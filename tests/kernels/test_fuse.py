"""RMSNorm, the residual add and SwiGLU in one launch each, against the bricks they stand in for."""

import pytest
import torch
from torch import Tensor

from rorqual.kernels import fuse
from rorqual.nn import mlp
from rorqual.nn.norm import RMSNorm
from tests.interpreter import repair

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's, over an overflow

CLOSE = {torch.float32: 2e-6, torch.bfloat16: 2**-7}
"""A unit or two of the last place: sums are taken in another order, so a rounding may fall the other way."""


@pytest.fixture(autouse=True)
def rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    repair(monkeypatch)


def strided(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A random [rows, width] view whose rows lie apart."""
    return torch.randn(rows, width + 24, device=device).to(dtype)[:, 8 : 8 + width]


def near(actual: Tensor, expected: Tensor) -> bool:
    tolerance = CLOSE[actual.dtype]
    same = actual.dtype == expected.dtype and torch.allclose(actual, expected, rtol=tolerance, atol=1e-6)
    return same and (actual.dtype == torch.float32 or (actual != expected).float().mean().item() < 0.03)


@pytest.mark.parametrize("dtype", CLOSE)
def test_references_are_the_bricks(dtype: torch.dtype) -> None:
    x, y = torch.randn(5, 48).to(dtype), torch.randn(5, 48).to(dtype)
    brick = RMSNorm(48, 1e-5)
    torch.nn.init.normal_(brick.weight)
    assert torch.equal(fuse.rmsnorm_reference(x, brick.weight, 1e-5), brick(x))
    normed, total = fuse.add_rmsnorm_reference(x, y, brick.weight, 1e-5)
    assert torch.equal(total, x + y) and torch.equal(normed, brick(x + y))
    for limit in (None, 0.5):
        assert torch.equal(fuse.swiglu_reference(x, y, limit), mlp.swiglu(x, y, limit))


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (1, 2048), (3, 576), (5, 96), (2, 1000)])
def test_norms(device: torch.device, rows: int, width: int, dtype: torch.dtype) -> None:
    x, residual = strided(rows, width, dtype, device), strided(rows, width, dtype, device)
    weight = torch.randn(width, device=device).to(dtype)
    assert near(fuse.rmsnorm_fast(x, weight, 1e-6), fuse.rmsnorm_reference(x, weight, 1e-6))
    normed, total = fuse.add_rmsnorm_fast(x, residual, weight, 1e-6)
    assert torch.equal(total, x + residual)  # one rounding, and the same
    assert near(normed, fuse.rmsnorm_reference(total, weight, 1e-6))


def test_norm_agrees_with_doubles(device: torch.device) -> None:
    x, weight = torch.randn(3, 200, device=device) * 1e-3, torch.randn(200, device=device)
    full = x.double()
    expected = full / (full.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
    torch.testing.assert_close(fuse.rmsnorm_fast(x, weight, 1e-6).double(), expected, rtol=2e-6, atol=1e-9)


def test_the_sum_is_rounded_before_it_is_normed(device: torch.device) -> None:
    x, residual = (torch.zeros(1, 64, device=device).bfloat16() for _ in range(2))
    x[0, 0], residual[0, 0], residual[0, 1] = 0.98, 256.0, 1.0  # 256.98 is 256 in bf16
    normed, total = fuse.add_rmsnorm_fast(x, residual, torch.ones(64, device=device).bfloat16(), 0.0)
    assert torch.equal(total, residual)
    assert normed[0, :2].tolist() == [8.0, 1 / 32]  # of a root mean square of 256 / 8


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("limit", [None, 0.75])
@pytest.mark.parametrize(("rows", "width"), [(1, 8), (3, 1408), (2, 1000)])
def test_swiglu(device: torch.device, rows: int, width: int, limit: float | None, dtype: torch.dtype) -> None:
    both = strided(rows, 2 * width, dtype, device)
    both[0, 0], both[0, 1] = -200.0, 200.0  # exp overflows on one side
    gate, up = both.chunk(2, -1)
    actual = fuse.swiglu_fast(gate, up, limit)
    assert actual.is_contiguous() and near(actual, fuse.swiglu_reference(gate, up, limit))


def test_swiglu_keeps_nan(device: torch.device) -> None:
    bad = torch.full((1, 4), float("nan"), device=device)
    for limit in (None, 7.0):
        assert fuse.swiglu_fast(bad, torch.ones_like(bad), limit).isnan().all()
        assert fuse.swiglu_fast(torch.ones_like(bad), bad, limit).isnan().all()


def test_a_row_does_not_see_its_neighbours(device: torch.device) -> None:
    x, residual = torch.randn(7, 640, device=device).bfloat16(), torch.randn(7, 640, device=device).bfloat16()
    weight = torch.randn(640, device=device).bfloat16()
    normed, _ = fuse.add_rmsnorm_fast(x, residual, weight, 1e-6)
    gated = fuse.swiglu_fast(x, residual, None)
    for row in range(7):
        one = slice(row, row + 1)
        assert torch.equal(fuse.add_rmsnorm_fast(x[one], residual[one], weight, 1e-6)[0], normed[one])
        assert torch.equal(fuse.swiglu_fast(x[one], residual[one], None), gated[one])


def test_no_rows(device: torch.device) -> None:
    x = torch.empty(0, 64, device=device)
    normed, total = fuse.add_rmsnorm_fast(x, x, torch.ones(64, device=device), 1e-6)
    assert normed.shape == total.shape == fuse.swiglu_fast(x, x, None).shape == (0, 64)


def test_the_public_operations_choose(device: torch.device) -> None:
    x, residual = torch.randn(2, 64, device=device), torch.randn(2, 64, device=device)
    weight = torch.randn(64, device=device)
    assert near(fuse.rmsnorm(x, weight, 1e-6), fuse.rmsnorm_reference(x, weight, 1e-6))
    assert near(
        fuse.add_rmsnorm(x, residual, weight, 1e-6)[0],
        fuse.add_rmsnorm_reference(x, residual, weight, 1e-6)[0],
    )
    assert near(
        fuse.swiglu(x.t()[:2], residual.t()[:2]), fuse.swiglu_reference(x.t()[:2], residual.t()[:2], None)
    )
