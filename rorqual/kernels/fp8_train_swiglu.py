"""SwiGLU between FP8 products: what it gives, forward and backward, goes straight into codes (facts 3.5).

Forward writes the product's codes alone, not the product; backward works it out again from gate and up, as V3 does,
and writes its transposed codes for the gradient of the down matrix beside those of gate's and up's gradients.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rorqual.kernels.fp8_train_quant import (
    BLOCK,
    GRADIENT_FLOOR,
    Codes,
    by_words,
    empty_codes,
    place,
    rows_reference,
    store_four_runs,
    store_fours,
    store_runs,
    store_turned,
)
from rorqual.kernels.gpu import tl, triton, usable
from rorqual.kernels.quant import FP8_FLOOR

WARPS, REGISTERS = 16, 128
"""Warps of a program of the backward pass, and registers of a thread at most."""


@triton.jit
def sigmoid(x, ASM: tl.constexpr):
    """1 / (1 + exp(-x)); with ASM in four instructions where the operators take a dozen."""
    if ASM:
        return tl.inline_asm_elementwise(
            """{
            .reg .f32 t;
            mul.f32 t, $1, 0fBFB8AA3B;
            ex2.approx.ftz.f32 t, t;
            add.f32 t, t, 0f3F800000;
            rcp.approx.ftz.f32 $0, t;
            }""",
            "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def gated(gate, up, limit, LIMIT: tl.constexpr, ASM: tl.constexpr):
    """gate and up clamped if LIMIT, and sigmoid(gate), from what the products gave."""
    if LIMIT:
        gate = tl.minimum(gate, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit)
    return gate, up, sigmoid(gate, ASM)


@triton.jit(do_not_specialize=["limit", "rows"])
def swiglu_codes_kernel(
    both, weights, codes, scale, end, limit, rows, width, c_row, s_group,
    FLOOR: tl.constexpr, POWERS: tl.constexpr, ENDS: tl.constexpr, WEIGHED: tl.constexpr, LIMIT: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """A tile of 128 rows and channels a program. ENDS: rows from the number at `end` on are left out."""
    n = tl.program_id(0) * 128 + tl.arange(0, 128)
    d = tl.program_id(1) * 128 + tl.arange(0, 128)
    if tl.program_id(0) * 128 >= (tl.load(end) if ENDS else rows):
        return
    at = both + n.to(tl.int64)[:, None] * (2 * width) + d[None, :]
    gate, up, open = gated(tl.load(at).to(tl.float32), tl.load(at + width).to(tl.float32), limit, LIMIT, ASM)
    values = gate * open * up
    if WEIGHED:
        values *= tl.load(weights + n)[:, None]
    by = store_runs(values, n, d, codes, c_row, FLOOR, POWERS, ASM)
    tl.store(scale + tl.program_id(1) * s_group.to(tl.int64) + n, by)


@triton.jit
def back(
    both, weights, slope, n, d, limit, width, WEIGHED: tl.constexpr, LIMIT: tl.constexpr, ASM: tl.constexpr
):
    """Of rows n and channels d: the product, the gradients of gate and up, and this tile's share of the gradient of the
    rows' weights."""
    at = both + n.to(tl.int64)[:, None] * (2 * width) + d[None, :]
    raw_gate, raw_up = tl.load(at).to(tl.float32), tl.load(at + width).to(tl.float32)
    dh = tl.load(slope + n.to(tl.int64)[:, None] * width + d[None, :]).to(tl.float32)
    gate, up, open = gated(raw_gate, raw_up, limit, LIMIT, ASM)
    silu = gate * open
    h = silu * up
    share = tl.sum(dh * h, 1)
    if WEIGHED:
        weight = tl.load(weights + n)[:, None]
        h *= weight
        dh *= weight
    dgate = dh * up * tl.fma(silu, 1.0 - open, open)
    dup = dh * silu
    if LIMIT:
        dgate = tl.where(raw_gate <= limit, dgate, 0.0)
        dup = tl.where(tl.abs(raw_up) <= limit, dup, 0.0)
    return h, dgate, dup, share


@triton.jit(do_not_specialize=["limit", "rows"])
def swiglu_codes_backward_kernel(
    both, weights, slope, h_words, h_scale, codes, scale, words, t_scale, w_slope, end, limit, rows, width, h_row,
    h_group, c_row, s_group, t_row, t_group, FLOOR: tl.constexpr, SMALL: tl.constexpr, POWERS: tl.constexpr,
    SLOPE_POWERS: tl.constexpr, ENDS: tl.constexpr, WEIGHED: tl.constexpr, LIMIT: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """A tile of 128 rows and channels a program: the transposed codes of the product, with floor FLOOR, and the codes
    of gate's and up's gradients, both ways, with floor SMALL. Sums a row of this tile's share of the weight's gradient
    go to `w_slope` `[W / 128, N]`."""
    tile, column, n, d = place()
    shares = w_slope + column * h_row * 4 + tile * 128
    if tile * 128 >= (tl.load(end) if ENDS else rows):
        if WEIGHED:
            tl.store(shares + tl.arange(0, 128), tl.zeros((128,), tl.float32))
        return
    h0, g0, u0, s0 = back(both, weights, slope, n, d, limit, width, WEIGHED, LIMIT, ASM)
    h1, g1, u1, s1 = back(both, weights, slope, n + 1, d, limit, width, WEIGHED, LIMIT, ASM)
    h2, g2, u2, s2 = back(both, weights, slope, n + 2, d, limit, width, WEIGHED, LIMIT, ASM)
    h3, g3, u3, s3 = back(both, weights, slope, n + 3, d, limit, width, WEIGHED, LIMIT, ASM)
    if WEIGHED:
        store_fours(s0, s1, s2, s3, shares)
    store_turned(h0, h1, h2, h3, n, d, tile, h_words, h_scale, h_row, h_group, FLOOR, POWERS, ASM)
    store_four_runs(
        g0, g1, g2, g3, n, d, tile, column, codes, scale, c_row, s_group, SMALL, SLOPE_POWERS, ASM
    )
    store_turned(g0, g1, g2, g3, n, d, tile, words, t_scale, t_row, t_group, SMALL, SLOPE_POWERS, ASM)
    d += width
    column += width // 128
    store_four_runs(
        u0, u1, u2, u3, n, d, tile, column, codes, scale, c_row, s_group, SMALL, SLOPE_POWERS, ASM
    )
    store_turned(u0, u1, u2, u3, n, d, tile, words, t_scale, t_row, t_group, SMALL, SLOPE_POWERS, ASM)


def reference(both_NW: Tensor, weights_N: Tensor | None, limit: float | None) -> Tensor:
    """weight * silu(gate) * up of gate and up side by side `[N, 2 W]`, in fp32 (fp64 of fp64): `[N, W]`."""
    gate, up = both_NW.to(torch.promote_types(both_NW.dtype, torch.float32)).chunk(2, 1)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    h = torch.nn.functional.silu(gate) * up
    return h if weights_N is None else h * weights_N[:, None]


def forward_reference(
    both_NW: Tensor, weights_N: Tensor | None, limit: float | None, pow2: bool, end: Tensor | None
) -> Codes:
    return rows_reference(reference(both_NW, weights_N, limit), pow2, FP8_FLOOR, end)[0]


def backward_reference(
    both_NW: Tensor,
    weights_N: Tensor | None,
    slope_NW: Tensor,
    limit: float | None,
    pow2: bool,
    slope_pow2: bool,
    end: Tensor | None,
) -> tuple[Codes, Codes, Codes, Tensor | None]:
    with torch.enable_grad():
        both = both_NW.float().detach().requires_grad_()
        weights = None if weights_N is None else weights_N.detach().requires_grad_()
        h = reference(both, weights, limit)
        wanted = [both] if weights is None else [both, weights]
        slopes = torch.autograd.grad(h, wanted, slope_NW.float())
    turned = rows_reference(h.detach(), pow2, FP8_FLOOR, end)[1]
    along, across = rows_reference(slopes[0], slope_pow2, GRADIENT_FLOOR, end)
    if weights is None:
        return turned, along, across, None
    w_slope = slopes[1]
    if end is not None:
        w_slope = w_slope.masked_fill(torch.arange(len(w_slope), device=end.device) >= end, 0)
    return turned, along, across, w_slope


def _options(both: Tensor, weights: Tensor | None, limit: float | None, end: Tensor | None) -> dict[str, Any]:
    return {
        "FLOOR": FP8_FLOOR,
        "ENDS": end is not None,
        "WEIGHED": weights is not None,
        "LIMIT": limit is not None,
        "ASM": by_words(both),
    }


def forward_fast(
    both_NW: Tensor, weights_N: Tensor | None, limit: float | None, pow2: bool, end: Tensor | None
) -> Codes:
    rows, width = both_NW.shape[0], both_NW.shape[1] // 2
    h = empty_codes(rows, width, both_NW)
    swiglu_codes_kernel[(rows // BLOCK, width // BLOCK)](
        both_NW, both_NW if weights_N is None else weights_N, h.codes, h.scale, both_NW if end is None else end,
        limit or 0.0, rows, width, h.codes.stride(0), h.scale.stride(1), POWERS=pow2,
        **_options(both_NW, weights_N, limit, end), num_warps=8,
    )  # fmt: skip
    return h


def backward_fast(
    both_NW: Tensor,
    weights_N: Tensor | None,
    slope_NW: Tensor,
    limit: float | None,
    pow2: bool,
    slope_pow2: bool,
    end: Tensor | None,
) -> tuple[Codes, Codes, Codes, Tensor | None]:
    rows, width = slope_NW.shape
    h, along, turned = (
        empty_codes(a, b, both_NW) for a, b in ((width, rows), (rows, 2 * width), (2 * width, rows))
    )
    shares = both_NW.new_empty((width // BLOCK, rows) if weights_N is not None else (1,), dtype=torch.float32)
    swiglu_codes_backward_kernel[(rows // BLOCK, width // BLOCK)](
        both_NW, both_NW if weights_N is None else weights_N, slope_NW, h.words, h.scale, along.codes, along.scale,
        turned.words, turned.scale, shares, both_NW if end is None else end, limit or 0.0, rows, width,
        h.codes.stride(0) // 4, h.scale.stride(1), along.codes.stride(0), along.scale.stride(1),
        turned.codes.stride(0) // 4, turned.scale.stride(1), SMALL=GRADIENT_FLOOR, POWERS=pow2,
        SLOPE_POWERS=slope_pow2, **_options(both_NW, weights_N, limit, end), num_warps=WARPS,
        maxnreg=REGISTERS,
    )  # fmt: skip
    return h, along, turned, shares.sum(0) if weights_N is not None else None


def forward(
    both_NW: Tensor,
    weights_N: Tensor | None = None,
    limit: float | None = None,
    pow2: bool = False,
    end: Tensor | None = None,
) -> Codes:
    """Codes `[N, W]` of weight * silu(gate) * up, from gate and up side by side `[N, 2 W]`, contiguous, N and W
    multiples of 128; weights fp32 `[N]`. `limit` (V4) clamps gate from above and up on both sides. `pow2` and `end` as
    for `fp8_train_quant.quantize_both`."""
    run = forward_fast if usable(both_NW) else forward_reference
    return run(both_NW, weights_N, limit, pow2, end)


def backward(
    both_NW: Tensor,
    weights_N: Tensor | None,
    slope_NW: Tensor,
    limit: float | None = None,
    pow2: bool = False,
    slope_pow2: bool = False,
    end: Tensor | None = None,
) -> tuple[Codes, Codes, Codes, Tensor | None]:
    """From `forward`'s arguments and the gradient of its values `[N, W]`: the values' transposed codes `[W, N]`; the
    codes of gate's and up's gradients, `[N, 2 W]` and transposed; the weights' gradient `[N]`, fp32."""
    run = backward_fast if usable(both_NW) else backward_reference
    return run(both_NW, weights_N, slope_NW, limit, pow2, slope_pow2, end)
