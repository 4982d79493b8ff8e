"""SwiGLU with gradients over rows that hold gate and up side by side, each row weighted if asked (experts).

What is kept for the backward pass is what came in; the gated product, which the next matrix's gradient needs, is made
anew on the way.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rorqual.kernels.gpu import tl, triton

TILE = 1024
"""Channels that a program works at a time."""


def forward_reference(both_N2W: Tensor, limit: float | None, weight_N: Tensor | None = None) -> Tensor:
    """weight * silu(gate) * up in at least fp32, cast once: `[N, W]`. `limit` as in `fuse.swiglu`."""
    wide = torch.promote_types(both_N2W.dtype, torch.float32)
    gate, up = both_N2W.to(wide).chunk(2, -1)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    inner = F.silu(gate) * up
    return (inner if weight_N is None else inner * weight_N[:, None].to(wide)).to(both_N2W.dtype)


def backward_reference(
    both_N2W: Tensor, limit: float | None, slope_NW: Tensor, weight_N: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Of the product's gradient: gradients of gate and up `[N, 2W]`, the product `[N, W]` itself, and the gradient of
    the weights `[N]`, if there are any. By autograd."""
    leaves = [both_N2W.detach().requires_grad_()]
    if weight_N is not None:
        leaves.append(weight_N.detach().requires_grad_())
    with torch.enable_grad():
        inner = forward_reference(leaves[0], limit, *leaves[1:])
    found = torch.autograd.grad(inner, leaves, slope_NW)
    return found[0], inner.detach(), found[1] if weight_N is not None else None


@triton.jit
def _gated(gate, up, limit, LIMITED: tl.constexpr):
    """silu(gate), its slope, and up, with what a limit does to them."""
    if LIMITED:
        held = tl.where(gate > limit, limit, gate)
        up_held = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
    else:
        held = gate
        up_held = up
    share = 1.0 / (1.0 + tl.exp(-held))
    silu = held * share
    slope = share * (1.0 + held * (1.0 - share))
    return silu, slope, up_held


@triton.jit
def _gated_there(
    both_ptr, weight_ptr, out_ptr, row, limit,
    W: tl.constexpr, TILE: tl.constexpr, LIMITED: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * TILE + tl.arange(0, TILE)
    real = at < W
    gate = tl.load(both_ptr + n * row + at, mask=real, other=0.0).to(tl.float32)
    up = tl.load(both_ptr + n * row + W + at, mask=real, other=0.0).to(tl.float32)
    silu, _, up = _gated(gate, up, limit, LIMITED)
    inner = silu * up
    if WEIGHTED:
        inner *= tl.load(weight_ptr + n)
    tl.store(out_ptr + n * W + at, inner.to(out_ptr.dtype.element_ty), mask=real)


@triton.jit
def _gated_back(
    both_ptr, weight_ptr, slope_ptr, dboth_ptr, inner_ptr, dweight_ptr, row, slope_row, limit,
    W: tl.constexpr, TILE: tl.constexpr, LIMITED: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """Gradients of one row's gate and up, its gated product once more, and the gradient of its weight."""
    n = tl.program_id(0).to(tl.int64)
    weight = 1.0
    if WEIGHTED:
        weight = tl.load(weight_ptr + n)
    total = 0.0
    for first in tl.static_range(0, W, TILE):
        at = first + tl.arange(0, TILE)
        real = at < W
        gate = tl.load(both_ptr + n * row + at, mask=real, other=0.0).to(tl.float32)
        up = tl.load(both_ptr + n * row + W + at, mask=real, other=0.0).to(tl.float32)
        slope = tl.load(slope_ptr + n * slope_row + at, mask=real, other=0.0).to(tl.float32)
        silu, bend, held = _gated(gate, up, limit, LIMITED)
        inner = silu * held
        if WEIGHTED:
            total += tl.sum(slope * inner, 0)
        slope *= weight
        dgate = slope * held * bend
        dup = slope * silu
        if LIMITED:
            dgate = tl.where(gate > limit, 0.0, dgate)
            dup = tl.where((up > limit) | (up < -limit), 0.0, dup)
        kind = dboth_ptr.dtype.element_ty
        tl.store(dboth_ptr + n * 2 * W + at, dgate.to(kind), mask=real)
        tl.store(dboth_ptr + n * 2 * W + W + at, dup.to(kind), mask=real)
        tl.store(inner_ptr + n * W + at, (inner * weight).to(kind), mask=real)
    if WEIGHTED:
        tl.store(dweight_ptr + n, total)


def forward_fast(both_N2W: Tensor, limit: float | None, weight_N: Tensor | None = None) -> Tensor:
    """`forward_reference` for rows of any stride; weights fp32."""
    rows, width = both_N2W.shape[0], both_N2W.shape[1] // 2
    out_NW = torch.empty(rows, width, dtype=both_N2W.dtype, device=both_N2W.device)
    tile = min(TILE, triton.next_power_of_2(width))
    if rows:
        _gated_there[(rows, triton.cdiv(width, tile))](
            both_N2W, both_N2W if weight_N is None else weight_N, out_NW, both_N2W.stride(0), limit or 0.0, W=width,
            TILE=tile, LIMITED=limit is not None, WEIGHTED=weight_N is not None, num_warps=4,
        )  # fmt: skip
    return out_NW


def backward_fast(
    both_N2W: Tensor, limit: float | None, slope_NW: Tensor, weight_N: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`backward_reference` for rows of any stride; weights fp32."""
    rows, width = slope_NW.shape
    dboth = torch.empty(rows, 2 * width, dtype=both_N2W.dtype, device=both_N2W.device)
    inner = torch.empty(rows, width, dtype=both_N2W.dtype, device=both_N2W.device)
    dweight = None if weight_N is None else torch.empty_like(weight_N)
    if rows:
        _gated_back[(rows,)](
            both_N2W, both_N2W if weight_N is None else weight_N, slope_NW, dboth, inner,
            inner if dweight is None else dweight, both_N2W.stride(0), slope_NW.stride(0), limit or 0.0, W=width,
            TILE=min(TILE, triton.next_power_of_2(width)), LIMITED=limit is not None, WEIGHTED=weight_N is not None,
            num_warps=4,
        )  # fmt: skip
    return dboth, inner, dweight
