"""RMSNorm with gradients, alone or after a residual add: one launch forward, one and a small sum backward.

Backward reads the normed rows' inputs once: the root mean square is found again, not kept. The gradient of the sum
x + residual comes in beside that of the norm and goes out with it, so the residual stream's gradients are never added
up in a pass of their own.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rorqual.kernels.fuse import WIDEST, add_rmsnorm_fast, rmsnorm_fast, row_warps
from rorqual.kernels.gpu import tl, triton

PROGRAMS = 528
"""Programs that share a backward pass's rows, four a multiprocessor; each keeps one sum for the weight's gradient."""


@triton.jit
def _norm_back(
    x_ptr, weight_ptr, slope_ptr, beside_ptr, dx_ptr, sums_ptr, rows, x_row, slope_row, dx_row, eps,
    D: tl.constexpr, WIDTH: tl.constexpr, BESIDE: tl.constexpr,
):  # fmt: skip
    """dx of every row, and this program's sum of the weight's gradient."""
    at = tl.arange(0, WIDTH)
    real = at < D
    weight = tl.load(weight_ptr + at, mask=real, other=0.0).to(tl.float32)
    total = tl.zeros((WIDTH,), tl.float32)
    first = tl.program_id(0).to(tl.int64)
    for n in range(first, rows, tl.num_programs(0)):
        x = tl.load(x_ptr + n * x_row + at, mask=real, other=0.0).to(tl.float32)
        slope = tl.load(slope_ptr + n * slope_row + at, mask=real, other=0.0).to(tl.float32)
        scale = 1.0 / tl.sqrt(tl.sum(x * x, 0) / D + eps)
        unit = x * scale
        total += slope * unit
        inner = slope * weight
        dx = (inner - unit * (tl.sum(inner * unit, 0) / D)) * scale
        if BESIDE:
            dx += tl.load(beside_ptr + n * D + at, mask=real, other=0.0).to(tl.float32)
        tl.store(dx_ptr + n * dx_row + at, dx.to(dx_ptr.dtype.element_ty), mask=real)
    tl.store(sums_ptr + tl.program_id(0).to(tl.int64) * D + at, total, mask=real)


def rmsnorm_backward_reference(
    x_ND: Tensor, weight_D: Tensor, eps: float, slope_ND: Tensor, beside_ND: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients of x `[N, D]` and of the weight `[D]`, from the norm's gradient and that of x itself, if any."""
    wide = torch.promote_types(x_ND.dtype, torch.float32)
    x, slope = x_ND.to(wide), slope_ND.to(wide)
    scale = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    unit, inner = x * scale, slope * weight_D.to(wide)
    dx = (inner - unit * (inner * unit).mean(-1, keepdim=True)) * scale
    dx = dx if beside_ND is None else dx + beside_ND.to(wide)
    return dx.to(x_ND.dtype), (slope * unit).sum(0).to(weight_D.dtype)


def rmsnorm_backward_fast(
    x_ND: Tensor,
    weight_D: Tensor,
    eps: float,
    slope_ND: Tensor,
    beside_ND: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`rmsnorm_backward_reference` for rows of any stride; x's gradient goes to `out` if given."""
    rows, width = x_ND.shape
    dx_ND = torch.empty((rows, width), dtype=x_ND.dtype, device=x_ND.device) if out is None else out
    programs = max(1, min(PROGRAMS, rows))
    sums = torch.empty(programs, width, dtype=torch.float32, device=x_ND.device)
    _norm_back[(programs,)](
        x_ND, weight_D, slope_ND, slope_ND if beside_ND is None else beside_ND, dx_ND, sums, rows, x_ND.stride(0),
        slope_ND.stride(0), dx_ND.stride(0), eps, D=width, WIDTH=triton.next_power_of_2(width),
        BESIDE=beside_ND is not None, num_warps=row_warps(width),
    )  # fmt: skip
    return dx_ND, sums.sum(0).to(weight_D.dtype)


def supported(x: Tensor) -> bool:
    """Whether rows of x `[..., D]` are worked by these kernels."""
    return x.dtype in (torch.bfloat16, torch.float16, torch.float32) and x.shape[-1] <= WIDEST


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x_ND, weight_D)
        ctx.eps = eps
        return rmsnorm_fast(x_ND, weight_D, eps)

    @staticmethod
    def backward(ctx: Any, *slopes: Any) -> Any:
        x_ND, weight_D = ctx.saved_tensors
        return *rmsnorm_backward_fast(x_ND, weight_D, ctx.eps, rows(slopes[0])), None


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, residual_ND: Tensor, weight_D: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        y_ND, total_ND = add_rmsnorm_fast(x_ND, residual_ND, weight_D, eps)
        ctx.save_for_backward(total_ND, weight_D)
        ctx.eps = eps
        return y_ND, total_ND

    @staticmethod
    def backward(ctx: Any, *slopes: Any) -> Any:
        total_ND, weight_D = ctx.saved_tensors
        slope_ND, beside_ND = slopes
        beside_ND = None if beside_ND is None else beside_ND.contiguous()
        dx_ND, dw_D = rmsnorm_backward_fast(total_ND, weight_D, ctx.eps, rows(slope_ND), beside_ND)
        return dx_ND, dx_ND, dw_D, None


def rows(x_ND: Tensor) -> Tensor:
    """x with channels side by side."""
    return x_ND if x_ND.stride(-1) == 1 else x_ND.contiguous()


def rmsnorm_trained(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """`fuse.rmsnorm` of rows `[..., D]` with gradients, on a GPU."""
    y: Tensor = _Norm.apply(x.flatten(0, -2), weight_D, eps)
    return y.view(x.shape)


def add_rmsnorm_trained(x: Tensor, residual: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`fuse.add_rmsnorm` of rows `[..., D]` with gradients, on a GPU."""
    y, total = _AddNorm.apply(x.flatten(0, -2), residual.flatten(0, -2), weight_D, eps)
    return y.view(x.shape), total.view(x.shape)
