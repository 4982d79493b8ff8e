"""The row-wise operations between two matrices, each in one launch: RMSNorm, residual add with RMSNorm, SwiGLU.

They read and write each number once, and at batch 1 what they cost is the launch. A row is worked by one
program in a tile whose shape depends on the row's width alone, so a row's bits do not depend on how many
rows stand beside it. The roundings are those of `rorqual.nn`: sums and norms in fp32, cast once; the sum
x + residual is rounded to its type before it is normed, as PyTorch's addition would.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rorqual.kernels.gpu import tl, triton, usable

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
WIDEST = 16384
"""Channels of a row that one program holds at most."""

GATED = 1024
"""Channels of SwiGLU a program works."""

CHAINED_PROGRAMS = 1024
"""Programs of a launch up to which it may begin before the kernel in front of it has ended."""


def chained(x: Tensor, programs: int) -> dict[str, Any]:
    """Launch options for kernels that begin with `gdc_wait` if `CHAINED`: on Hopper and later the launch is
    prepared while the kernel before it still runs, which hides about half a microsecond. Large grids lose by
    it: their programs wait where programs of the kernel before could work."""
    if not x.is_cuda or programs > CHAINED_PROGRAMS or torch.cuda.get_device_capability(x.device)[0] < 9:
        return {"CHAINED": False}
    return {"CHAINED": True, "launch_pdl": True}


def row_warps(width: int) -> int:
    """Warps for a program that holds a row of `width` channels."""
    return 1 if width <= 256 else 2 if width <= 512 else 4 if width <= 2048 else 8


# ------------------------------------------------------------------------------------------- RMSNorm


def rmsnorm_reference(x_ND: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, in fp32, cast once."""
    return F.rms_norm(x_ND, weight_D.shape, weight_D.to(x_ND.dtype), eps)


def add_rmsnorm_reference(
    x_ND: Tensor, residual_ND: Tensor, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """(RMSNorm(x + residual), x + residual), the sum rounded to its type first."""
    total_ND = x_ND + residual_ND
    return rmsnorm_reference(total_ND, weight_D, eps), total_ND


@triton.jit
def _rmsnorm_kernel(  # type: ignore[no-untyped-def]
    x_ptr, residual_ptr, weight_ptr, out_ptr, total_ptr, x_stride, residual_stride, eps,
    D: tl.constexpr, WIDTH: tl.constexpr, ADD: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    if CHAINED:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, WIDTH)
    real = at < D
    x = tl.load(x_ptr + row * x_stride + at, mask=real, other=0.0)
    weight = tl.load(weight_ptr + at, mask=real, other=0.0).to(x.dtype).to(tl.float32)
    full = x.to(tl.float32)
    if ADD:
        residual = tl.load(residual_ptr + row * residual_stride + at, mask=real, other=0.0)
        total = (full + residual.to(tl.float32)).to(x.dtype)
        tl.store(total_ptr + row * D + at, total, mask=real)
        full = total.to(tl.float32)
    scale = tl.rsqrt(tl.sum(full * full, 0) / D + eps)
    tl.store(out_ptr + row * D + at, (full * scale * weight).to(x.dtype), mask=real)


def _norm(x_ND: Tensor, residual_ND: Tensor | None, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    (rows, width), add = x_ND.shape, residual_ND is not None
    out_ND = torch.empty((rows, width), dtype=x_ND.dtype, device=x_ND.device)
    total_ND = torch.empty_like(out_ND) if add else out_ND
    second = residual_ND if residual_ND is not None else x_ND
    if rows:
        _rmsnorm_kernel[(rows,)](
            x_ND,
            second,
            weight_D,
            out_ND,
            total_ND,
            x_ND.stride(0),
            second.stride(0),
            eps,
            D=width,
            WIDTH=triton.next_power_of_2(width),
            ADD=add,
            num_warps=row_warps(width),
            **chained(x_ND, rows),
        )
    return out_ND, total_ND


def rmsnorm_fast(x_ND: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """`rmsnorm_reference` for rows of any stride."""
    return _norm(x_ND, None, weight_D, eps)[0]


def add_rmsnorm_fast(
    x_ND: Tensor, residual_ND: Tensor, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """`add_rmsnorm_reference` for rows of any stride."""
    return _norm(x_ND, residual_ND, weight_D, eps)


def _rows(*tensors: Tensor) -> bool:
    """Whether these are matrices of one float type whose rows lie without gaps."""
    return all(
        t.dim() == 2 and t.stride(1) == 1 and t.dtype == tensors[0].dtype and t.dtype in FLOATS
        for t in tensors
    )


def rmsnorm(x_ND: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """RMSNorm of each row of x `[N, D]`, in x's type."""
    if usable(x_ND, weight_D) and _rows(x_ND) and x_ND.shape[1] <= WIDEST:
        return rmsnorm_fast(x_ND, weight_D, eps)
    return rmsnorm_reference(x_ND, weight_D, eps)


def add_rmsnorm(x_ND: Tensor, residual_ND: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """A block's output x `[N, D]` added to the residual stream `[N, D]`: (the normed sum, the sum)."""
    if usable(x_ND, residual_ND, weight_D) and _rows(x_ND, residual_ND) and x_ND.shape[1] <= WIDEST:
        return add_rmsnorm_fast(x_ND, residual_ND, weight_D, eps)
    return add_rmsnorm_reference(x_ND, residual_ND, weight_D, eps)


# -------------------------------------------------------------------------------------------- SwiGLU


def swiglu_reference(gate_NW: Tensor, up_NW: Tensor, limit: float | None) -> Tensor:
    """silu(gate) * up: silu is rounded to the type before it meets `up`. With `limit` (V4) gate is clamped
    from above, up on both sides, and all is in fp32 until the one cast at the end."""
    if limit is None:
        return F.silu(gate_NW) * up_NW
    gate, up = gate_NW.float(), up_NW.float()
    return (F.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)).to(gate_NW.dtype)


@triton.jit
def _swiglu_kernel(  # type: ignore[no-untyped-def]
    gate_ptr, up_ptr, out_ptr, gate_stride, up_stride, limit,
    W: tl.constexpr, TILE: tl.constexpr, LIMITED: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    if CHAINED:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * TILE + tl.arange(0, TILE)
    real = at < W
    gate = tl.load(gate_ptr + row * gate_stride + at, mask=real, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + at, mask=real, other=0.0).to(tl.float32)
    kind = out_ptr.dtype.element_ty
    if LIMITED:
        gate = tl.where(gate > limit, limit, gate)  # NaN stays NaN, as in clamp
        up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
    silu = gate / (1.0 + tl.exp(-gate))
    if not LIMITED:
        silu = silu.to(kind).to(tl.float32)
    tl.store(out_ptr + row * W + at, (silu * up).to(kind), mask=real)


def swiglu_fast(gate_NW: Tensor, up_NW: Tensor, limit: float | None) -> Tensor:
    """`swiglu_reference` for rows of any stride."""
    rows, width = gate_NW.shape
    out_NW = torch.empty((rows, width), dtype=gate_NW.dtype, device=gate_NW.device)
    tile = min(GATED, triton.next_power_of_2(width))
    blocks = triton.cdiv(width, tile)
    if rows and width:
        _swiglu_kernel[(rows, blocks)](
            gate_NW,
            up_NW,
            out_NW,
            gate_NW.stride(0),
            up_NW.stride(0),
            0.0 if limit is None else limit,
            W=width,
            TILE=tile,
            LIMITED=limit is not None,
            num_warps=4,
            **chained(gate_NW, rows * blocks),
        )
    return out_NW


def swiglu(gate_NW: Tensor, up_NW: Tensor, limit: float | None = None) -> Tensor:
    """silu(gate) * up of `[N, W]` each, which may be the halves of one `[N, 2W]` tensor: `[N, W]`."""
    if usable(gate_NW, up_NW) and _rows(gate_NW, up_NW):
        return swiglu_fast(gate_NW, up_NW, limit)
    return swiglu_reference(gate_NW, up_NW, limit)
