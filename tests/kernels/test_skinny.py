"""A few rows times a weight, and the products by head, against fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rorqual.kernels import skinny
from rorqual.kernels.heads import heads_down, heads_fast, heads_reference, heads_up
from rorqual.kernels.quant import E8M0, dequantize_fp8, quantize_fp8
from tests.interpreter import repair


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    repair(monkeypatch)


HOW = {
    "fma": {"kind": "fma", "BO": 2, "num_warps": 1},
    "dot": {"kind": "dot", "BO": 16, "BD": 32, "SPLIT": 1, "STAGES": 2, "num_warps": 1, "FETCH": 32},
    "split": {"kind": "dot", "BO": 32, "BD": 32, "SPLIT": 3, "STAGES": 2, "num_warps": 1, "FETCH": 0},
}


def close(y: Tensor, want: Tensor, rtol: float) -> None:
    assert y.isfinite().all()
    error = (y.double() - want.double()).abs().max() / want.double().abs().max()
    assert error < max(rtol, 2e-5 if y.is_cuda else 0), error  # tensor cores cut sums off


def exact(x: Tensor, w: Tensor, bias: Any, residual: Any, norm: Any, eps: float) -> Tensor:
    x = x.double()
    if norm is not None:
        x = x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * norm.double()
    y = x @ w.double().T
    return y + (0 if bias is None else bias.double()) + (0 if residual is None else residual.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "rows", "out", "width"),
    [
        ("fma", 1, 5, 96),
        ("fma", 3, 7, 130),
        ("fma", 4, 2, 16),
        ("dot", 5, 37, 72),
        ("dot", 17, 16, 33),
        ("split", 2, 45, 200),
        ("split", 32, 33, 40),
    ],
)
def test_close_to_fp64(
    device: torch.device, kind: str, rows: int, out: int, width: int, dtype: torch.dtype
) -> None:
    x = torch.randn(rows, width + 8, device=device).to(dtype)[:, :width]
    w = torch.randn(out, width + 16, device=device).bfloat16()[:, :width]
    bias = torch.randn(out, device=device).to(dtype)
    residual = torch.randn(rows, 2 * out, device=device).to(dtype)[:, ::1][:, :out]
    rtol = 2e-6 if dtype == torch.float32 else 5e-3
    y = skinny.fast(x, w, how=HOW[kind])
    assert y.dtype == dtype
    close(y, exact(x, w, None, None, None, 0), rtol)
    close(skinny.fast(x, w, bias, residual, how=HOW[kind]), exact(x, w, bias, residual, None, 0), rtol)
    close(skinny.reference(x, w, bias, residual), exact(x, w, bias, residual, None, 0), rtol)


@pytest.mark.parametrize("kind", ["fma", "dot"])
def test_norm_taken_along(device: torch.device, kind: str) -> None:
    x, w = torch.randn(3, 100, device=device) * 20, torch.randn(9, 100, device=device).bfloat16()
    norm, residual = torch.rand(100, device=device).bfloat16() + 0.5, torch.randn(3, 9, device=device)
    want = exact(x, w, None, residual, norm, 0.1)
    close(skinny.fast(x, w, None, residual, norm, 0.1, how=HOW[kind]), want, 2e-6)
    close(skinny.reference(x, w, None, residual, norm, 0.1), want, 2e-6)
    with pytest.raises(ValueError, match="no split"):
        skinny.fast(x, w, None, residual, norm, 0.1, how=HOW["split"])


@pytest.mark.parametrize("rows", [1, 16, 32])
def test_logits_stay_fp32(device: torch.device, rows: int) -> None:
    x, w = torch.randn(rows, 128, device=device).bfloat16(), torch.randn(64, 128, device=device).bfloat16()
    for y in (
        skinny.fast(x, w, out_dtype=torch.float32),
        skinny.skinny(x, w, out_dtype=torch.float32),
    ):
        assert y.dtype == torch.float32
        close(y, exact(x, w, None, None, None, 0), 2e-6)


def test_public_op(device: torch.device) -> None:
    w = torch.randn(24, 64, device=device).bfloat16()
    norm = torch.rand(64, device=device).bfloat16()
    for rows in (0, 1, 4, 5, 32, 33):
        x = torch.randn(rows, 64, device=device).bfloat16()
        residual = torch.randn(rows, 24, device=device).bfloat16()
        with torch.no_grad():
            y = skinny.skinny(x, w, None, residual, norm)
        assert y.shape == (rows, 24)
        if rows:
            close(y, exact(x, w, None, residual, norm, 1e-6), 2e-2)


def test_same_bits_again(device: torch.device) -> None:
    x, w = torch.randn(8, 200, device=device).bfloat16(), torch.randn(48, 200, device=device).bfloat16()
    assert torch.equal(skinny.fast(x, w, how=HOW["split"]), skinny.fast(x, w, how=HOW["split"]))


# ------------------------------------------------------------------------------------ products by head


def exact_heads(x: Tensor, w: Tensor, up: bool) -> Tensor:
    return torch.einsum("nhd,hdc->nhc" if up else "nhc,hvc->nhv", x.double(), w.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 19])
def test_heads_on_views(device: torch.device, rows: int, dtype: torch.dtype) -> None:
    heads, nope, v, width = 3, 24, 20, 40
    kv_b = torch.randn(heads, nope + v, width, device=device).to(dtype)
    q = torch.randn(rows, heads, nope + 8, device=device).to(dtype)[..., :nope]
    wide = torch.full((rows, heads, width + 8), 7.0, device=device, dtype=dtype)
    how = {"BN": 16, "BM": 16, "BK": 16, "STAGES": 2, "num_warps": 1}
    rtol = 2e-6 if dtype == torch.float32 else 1e-2
    up = heads_fast(q, kv_b[:, :nope], True, wide[..., :width], how=how)
    close(up, exact_heads(q, kv_b[:, :nope], True), rtol)
    assert up.data_ptr() == wide.data_ptr() and (wide[..., width:] == 7).all()
    close(heads_up(q, kv_b[:, :nope]), exact_heads(q, kv_b[:, :nope], True), rtol)
    wide.fill_(7)
    up = heads_reference(q, kv_b[:, :nope], True, wide[..., :width])
    close(up, exact_heads(q, kv_b[:, :nope], True), rtol)
    assert up.data_ptr() == wide.data_ptr() and (wide[..., width:] == 7).all()
    u = wide[..., :width]
    down = heads_fast(u, kv_b[:, nope:], False, how=how)
    assert down.shape == (rows, heads, v)
    close(down, exact_heads(u, kv_b[:, nope:], False), rtol)
    close(heads_down(u, kv_b[:, nope:]), exact_heads(u, kv_b[:, nope:], False), rtol)


@pytest.mark.parametrize("powers", [False, True])
def test_heads_on_codes(device: torch.device, powers: bool) -> None:
    heads, nope, v, width, rows = 2, 96, 64, 160, 3  # heads of 160 rows: blocks of 128 lie across them
    dense = torch.randn(heads * (nope + v), width) * torch.rand(heads * (nope + v), 1) * 3
    codes, scale = quantize_fp8(dense, ue8m0=powers, scale_dtype=E8M0 if powers else torch.float32)
    codes, scale = codes.to(device), scale.to(device)
    kv_b = dequantize_fp8(codes, scale, (128, 128), torch.float32).view(heads, nope + v, width)
    by_head = codes.view(heads, nope + v, width)
    q, u = torch.randn(rows, heads, nope, device=device), torch.randn(rows, heads, width, device=device)
    how = {"BN": 16, "BM": 32, "BK": 32, "STAGES": 2, "num_warps": 1}
    want = exact_heads(q, kv_b[:, :nope], True)
    close(heads_fast(q, by_head[:, :nope], True, None, scale, how=how), want, 2e-6)
    close(heads_reference(q, by_head[:, :nope], True, None, scale), want, 2e-6)
    want = exact_heads(u, kv_b[:, nope:], False)
    close(heads_fast(u, by_head[:, nope:], False, None, scale, nope, how=how), want, 2e-6)
    close(heads_reference(u, by_head[:, nope:], False, None, scale, nope), want, 2e-6)
