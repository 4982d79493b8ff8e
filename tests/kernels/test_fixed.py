"""Products whose rows do not depend on one another, bit for bit."""

from __future__ import annotations

import pytest
import torch

from rorqual.kernels import fixed
from tests.interpreter import repair


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    repair(monkeypatch)


HOW = {"BN": 16, "BO": 32, "BD": 32, "STAGES": 2, "num_warps": 4}


def how(device: torch.device) -> dict[str, int] | None:
    """Small tiles where they are interpreted, the real ones where they are compiled."""
    return HOW if device.type == "cpu" else None


@pytest.mark.parametrize(
    ("x_type", "w_type"), [(torch.bfloat16,) * 2, (torch.float32,) * 2, (torch.float32, torch.bfloat16)]
)
@pytest.mark.parametrize(("rows", "out", "width"), [(1, 40, 72), (37, 33, 96), (20, 5, 33)])
def test_close_to_fp64(
    device: torch.device, rows: int, out: int, width: int, x_type: torch.dtype, w_type: torch.dtype
) -> None:
    x = torch.randn(rows, width + 8, device=device).to(x_type)[:, :width]
    w, bias = torch.randn(out, width, device=device).to(w_type), torch.randn(out, device=device)
    want = x.double() @ w.double().T + bias.double()
    fine = 2e-5 if device.type == "cuda" else 2e-6  # tensor cores cut sums off
    rtol = fine if x_type == torch.float32 else 5e-3
    for y in (
        fixed.fast(x, w, bias, how=how(device)),
        fixed.reference(x, w, bias),
        fixed.matmul_fixed(x, w, bias),
    ):
        assert y.dtype == x_type
        assert (y.double() - want).abs().max() < rtol * want.abs().max()
    y = fixed.fast(x, w, out_dtype=torch.float32, how=how(device))
    assert y.dtype == torch.float32
    want = x.double() @ w.double().T
    assert (y.double() - want).abs().max() < fine * want.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_do_not_depend_on_one_another(device: torch.device, dtype: torch.dtype) -> None:
    out, width = (48, 96) if device.type == "cpu" else (1100, 1500)
    sizes = (
        (1, 2, 5, 17, 33) if device.type == "cpu" else (1, 2, 8, 16, 17, 32, 33, 64, 65, 128, 129, 500, 2048)
    )
    x = torch.randn(max(sizes), width, device=device).to(dtype)
    w = torch.randn(out, width, device=device).to(dtype)
    full = fixed.fast(x, w, out_dtype=torch.float32, how=how(device))
    for rows in sizes:
        assert torch.equal(fixed.fast(x[:rows], w, out_dtype=torch.float32, how=how(device)), full[:rows])
        assert torch.equal(fixed.fast(x[-rows:], w, out_dtype=torch.float32, how=how(device)), full[-rows:])
    order = torch.randperm(len(x), device=device)
    assert torch.equal(fixed.fast(x[order], w, out_dtype=torch.float32, how=how(device)), full[order])


def test_no_rows(device: torch.device) -> None:
    w = torch.randn(4, 8, device=device)
    assert fixed.matmul_fixed(w[:0], w).shape == (0, 4)
