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
    fours,
    rows_reference,
    store_runs,
    store_turned,
)
from rorqual.kernels.gpu import tl, triton, usable
from rorqual.kernels.quant import FP8_FLOOR

WARPS, REGISTERS, BAND = 8, 128, 0
"""Warps of a program of the backward pass, registers of a thread at most, and tiles of channels that are worked side
by side before those of the next 128 rows (0: all rows first)."""

SPLIT = True
"""Whether the product and the two gradients have a program each."""


@triton.jit
def gated(gate, up, limit, LIMIT: tl.constexpr):
    """gate and up clamped if LIMIT, and sigmoid(gate), from what the products gave."""
    if LIMIT:
        gate = tl.minimum(gate, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit)
    root = tl.rsqrt(
        1.0 + tl.exp(-gate)
    )  # squared it is the sigmoid, in fewer instructions than a division takes
    return gate, up, root * root


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
    gate, up, open = gated(tl.load(at).to(tl.float32), tl.load(at + width).to(tl.float32), limit, LIMIT)
    values = gate * open * up
    if WEIGHED:
        values *= tl.load(weights + n)[:, None]
    store_runs(values, n, d, codes, scale, c_row, s_group, FLOOR, POWERS, ASM)


@triton.jit
def part_of(
    both, weights, slope, w_slope, n, d, limit, width,
    PART: tl.constexpr, WEIGHED: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """Of rows n and channels d: the product (PART 0), whose share of the weights' gradient goes to `w_slope`, the
    gradient of gate (1) or that of up (2)."""
    at = both + n.to(tl.int64)[:, None] * (2 * width) + d[None, :]
    raw_gate, raw_up = tl.load(at).to(tl.float32), tl.load(at + width).to(tl.float32)
    gate, up, open = gated(raw_gate, raw_up, limit, LIMIT)
    if PART > 0 or WEIGHED:
        dh = tl.load(slope + n.to(tl.int64)[:, None] * width + d[None, :]).to(tl.float32)
    if WEIGHED:
        weight = tl.load(weights + n)[:, None]
    if PART == 0:
        found = gate * open * up
        if WEIGHED:
            tl.store(w_slope + n, tl.sum(dh * found, 1))
    elif PART == 1:
        found = dh * up * open * (1.0 + gate * (1.0 - open))
        if LIMIT:
            found = tl.where(raw_gate <= limit, found, 0.0)
    else:
        found = dh * (gate * open)
        if LIMIT:
            found = tl.where(tl.abs(raw_up) <= limit, found, 0.0)
    if WEIGHED:
        found *= weight
    return found


@triton.jit(do_not_specialize=["limit", "rows"])
def swiglu_codes_backward_kernel(
    both, weights, slope, h_words, h_scale, codes, scale, words, t_scale, w_slope, end, limit, rows, width, h_row,
    h_group, c_row, s_group, t_row, t_group, FLOOR: tl.constexpr, SMALL: tl.constexpr, POWERS: tl.constexpr,
    SLOPE_POWERS: tl.constexpr, ENDS: tl.constexpr, WEIGHED: tl.constexpr, LIMIT: tl.constexpr, BAND: tl.constexpr,
    SPLIT: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """A tile of 128 rows and channels a program: the transposed codes of the product, with floor FLOOR, and the codes
    of gate's and up's gradients, both ways, with floor SMALL. Sums a row of this tile's share of the weight's gradient
    go to `w_slope` `[W / 128, N]`.

    The three parts come one after the other, or with SPLIT each by a program of its own; what they read again is in the
    cache, where registers would not hold it."""
    tile, n, d = fours(BAND)
    shares = w_slope + tl.min(d, 0) // 128 * h_row * 4
    if tile * 128 >= (tl.load(end) if ENDS else rows):
        if WEIGHED:
            for r in tl.static_range(4):
                tl.store(shares + n + r, tl.zeros((32,), tl.float32))
        return
    for PART in tl.static_range(3):
        if not SPLIT or tl.program_id(2) == PART:
            v0 = part_of(both, weights, slope, shares, n, d, limit, width, PART, WEIGHED, LIMIT)
            v1 = part_of(both, weights, slope, shares, n + 1, d, limit, width, PART, WEIGHED, LIMIT)
            v2 = part_of(both, weights, slope, shares, n + 2, d, limit, width, PART, WEIGHED, LIMIT)
            v3 = part_of(both, weights, slope, shares, n + 3, d, limit, width, PART, WEIGHED, LIMIT)
            if PART == 0:
                store_turned(v0, v1, v2, v3, n, d, h_words, h_scale, h_row, h_group, FLOOR, POWERS, ASM)
            else:
                channel = d + (PART - 1) * width
                store_runs(v0, n, channel, codes, scale, c_row, s_group, SMALL, SLOPE_POWERS, ASM)
                store_runs(v1, n + 1, channel, codes, scale, c_row, s_group, SMALL, SLOPE_POWERS, ASM)
                store_runs(v2, n + 2, channel, codes, scale, c_row, s_group, SMALL, SLOPE_POWERS, ASM)
                store_runs(v3, n + 3, channel, codes, scale, c_row, s_group, SMALL, SLOPE_POWERS, ASM)
                store_turned(
                    v0, v1, v2, v3, n, channel, words, t_scale, t_row, t_group, SMALL, SLOPE_POWERS, ASM
                )


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
    swiglu_codes_backward_kernel[(rows // BLOCK, width // BLOCK, 3 if SPLIT else 1)](
        both_NW, both_NW if weights_N is None else weights_N, slope_NW, h.words, h.scale, along.codes, along.scale,
        turned.words, turned.scale, shares, both_NW if end is None else end, limit or 0.0, rows, width,
        h.codes.stride(0) // 4, h.scale.stride(1), along.codes.stride(0), along.scale.stride(1),
        turned.codes.stride(0) // 4, turned.scale.stride(1), SMALL=GRADIENT_FLOOR, POWERS=pow2,
        SLOPE_POWERS=slope_pow2, **_options(both_NW, weights_N, limit, end), BAND=BAND, SPLIT=SPLIT, num_warps=WARPS,
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
