"""One token's way through a layer in few launches: what stands between two matrices goes into the second's kernel.

At one row a kernel's work takes a microsecond or two, and so does the way from one to the next. Here the norm is
computed by every program of the product that reads it (2,048 numbers: cheaper than a launch), the residual is
added by the product before, and FP8 activations are quantised where they are read. Kernels start while those
before them still run (programmatic dependent launch): each asks for its weights first, then waits for its row.

`rows`: products of a normed row. Its parts are rounded where `rorqual.nn` rounds them: the normed row, the
product and the sum with the residual each once.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rorqual.kernels import fp8_linear, single_boxes
from rorqual.kernels.fuse import swiglu_reference
from rorqual.kernels.gpu import tl, triton, usable
from rorqual.kernels.quant import E8M0, FP8
from rorqual.kernels.skinny import await_inputs, release

BLOCK = 128
"""Rows and columns of weight codes that share a scale, and channels of a row that do."""

ROWS = 2
"""Most rows these kernels are made for."""

WIDEST = 8192
"""Channels of a row that one program holds at most."""

WIDEST_GATED = 16384
"""The same between a dense layer's matrices."""


@triton.jit
def ask(at, size, program, programs, THREADS: tl.constexpr, SPAN: tl.constexpr):
    """Ask for this program's share of `size` bytes from `at` on to be brought into L2: one thread of each warp, SPAN
    bytes at a time. `at`, `size` and SPAN are multiples of 16."""
    thread = tl.arange(0, THREADS)
    first = (program * (THREADS // 32) + thread // 32) * SPAN
    for start in range(0, size, programs * (THREADS // 32) * SPAN):
        place = start + first
        amount = tl.where(thread % 32 == 0, tl.maximum(tl.minimum(size - place, SPAN), 0), 0)
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.s32 p, $2, 0; @p cp.async.bulk.prefetch.L2.global [$1], $2; mov.b32 $0, 0; }",
            "=r,l,r",
            [at.to(tl.int64) + place.to(tl.int64), amount],
            tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def factor(at, mask, POWERS: tl.constexpr):
    """Scales of a weight as fp32, 0 where masked; bytes of float8_e8m0fnu are exponents."""
    by = tl.load(at, mask=mask, other=0)
    if POWERS:
        bits = tl.where(by == 0, 0x00400000, by.to(tl.int32) << 23)
        by = tl.where(by == 255, float("nan"), bits.to(tl.float32, bitcast=True))
    return by


@triton.jit
def rows_kernel(
    x, up, norm, w0, w1, scale0, scale1, residual, y0, y1, normed, limit, out0, out1,
    x_row, up_row, w0_row, w1_row, s0_row, s1_row, r_row, y0_row, y1_row, eps,
    D: tl.constexpr, GROUPS: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, BO: tl.constexpr,
    NORM: tl.constexpr, NORMED: tl.constexpr, GATED: tl.constexpr, LIMIT: tl.constexpr,
    RESIDUAL: tl.constexpr, CODES: tl.constexpr, POWERS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """y0 = norm(x) w0^T (and y1 with w1), BO outputs a program, plus the residual; the first program also
    writes the normed rows. GATED: silu(x) * up in x's place."""
    release(AHEAD)
    first = tl.cdiv(out0, BO)
    other = tl.program_id(0) >= first
    left = (tl.program_id(0) - tl.where(other, first, 0)) * BO
    o = left + tl.arange(0, BO)
    inside = o < tl.where(other, out1, out0)
    w = tl.where(other, w1, w0)
    w_row = tl.where(other, w1_row, w0_row)
    g = tl.arange(0, GROUPS)
    d = g[:, None] * 128 + tl.arange(0, 128)[None, :]
    tile = tl.load(
        w + o.to(tl.int64)[:, None, None] * w_row + d[None, :, :],
        mask=inside[:, None, None] & (d < D)[None, :, :],
        other=0.0,
        eviction_policy="evict_first",
    )
    if CODES:
        s_row = tl.where(other, s1_row, s0_row)
        by = factor(tl.where(other, scale1, scale0) + left // 128 * s_row + g, g < (D + 127) // 128, POWERS)
    if NORM:
        weight = tl.load(norm + d, mask=d < D, other=0.0).to(x.dtype.element_ty).to(tl.float32)
    await_inputs(AHEAD)
    which = tl.arange(0, NP)
    values = tl.zeros((BO, NP), tl.float32)
    for n in tl.static_range(N):
        row = tl.load(x + n * x_row + d, mask=d < D, other=0.0).to(tl.float32)
        if GATED:
            by_row = tl.load(up + n * up_row + d, mask=d < D, other=0.0).to(tl.float32)
            if LIMIT:
                row = tl.minimum(row, limit)
                by_row = tl.minimum(tl.maximum(by_row, -limit), limit)
            row = row * tl.sigmoid(row)
            if not LIMIT:
                row = row.to(x.dtype.element_ty).to(tl.float32)
            row = (row * by_row).to(x.dtype.element_ty).to(tl.float32)
        if NORM:
            rms = tl.rsqrt(tl.sum(row * row) / D + eps)
            short = (row * rms * weight).to(x.dtype.element_ty)
            if NORMED:  # noqa: SIM102 (a constant: the rest is not compiled)
                if tl.program_id(0) == 0:
                    tl.store(normed + n * D + d, short, mask=d < D)
            row = short.to(tl.float32)
        if CODES:
            step = tl.div_rn(tl.maximum(tl.max(tl.abs(row), 1), 1e-4), 448.0)
            # row / step, rounded correctly: a quotient by the reciprocal, and once what is left over.
            over = tl.div_rn(1.0, step)[:, None]
            ratio = row * over
            ratio = tl.fma(tl.fma(-ratio, step[:, None], row), over, ratio)
            row = tl.minimum(tl.maximum(ratio, -448.0), 448.0).to(tl.float8e4nv).to(tl.float32)
            parts = tl.sum(tile.to(tl.float32) * row[None, :, :], 2)
            value = tl.sum(parts * (step * by)[None, :], 1)
        else:
            value = tl.sum(tl.sum(tile.to(tl.float32) * row[None, :, :], 2), 1)
        values = tl.where((which == n)[None, :], value[:, None], values)
    mask = inside[:, None] & (which < N)[None, :]
    if RESIDUAL:
        values = values.to(x.dtype.element_ty).to(tl.float32)
        values += tl.load(residual + which[None, :] * r_row + o[:, None], mask=mask, other=0.0).to(tl.float32)
    y = tl.where(other, y1, y0)
    y_row = tl.where(other, y1_row, y0_row)
    tl.store(y + which[None, :] * y_row + o[:, None], values.to(y0.dtype.element_ty), mask=mask)


def asking(weight: Tensor | None, programs: int, warps: int) -> tuple[Tensor | None, int, int]:
    """A weight that a kernel of `programs` asks for on behalf of a later one: the weight, its bytes, and `ask`'s
    SPAN (0: nothing to ask for)."""
    if weight is None or not weight.is_cuda or not weight.is_contiguous() or weight.data_ptr() % 16:
        return None, 0, 0
    size = weight.numel() * weight.element_size() // 16 * 16
    return weight, size, min(16384, max(128, triton.next_power_of_2(triton.cdiv(size, programs * warps))))


def rows_reference(
    x_ND: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor | None],
    norm: tuple[Tensor, float] | None = None,
    residual_NO: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    up_ND: Tensor | None = None,
    limit: float | None = None,
) -> list[Tensor]:
    """The definition of `rows`; the normed row is not among its results."""
    if up_ND is not None:
        x_ND = swiglu_reference(x_ND, up_ND, limit)
    if norm is not None:
        x_ND = F.rms_norm(x_ND, (x_ND.shape[1],), norm[0].to(x_ND.dtype), norm[1])
    out = []
    for weight_OD, scale in zip(weights, scales, strict=True):
        if scale is None:
            y = F.linear(x_ND.float(), weight_OD.float()).to(out_dtype or x_ND.dtype)
        else:
            y = fp8_linear.reference(x_ND, weight_OD, scale)
        out.append(y if residual_NO is None else y + residual_NO)
    return out


def rows_plan(width: int, outputs: int) -> dict[str, int]:
    """Outputs a program and its warps, by the shape alone."""
    if width > 4096:
        return {"BO": 2, "num_warps": 8}
    if outputs <= 512:
        return {"BO": 1, "num_warps": 4}
    return {"BO": 4 if outputs <= 2048 else 8, "num_warps": 8}


def launch_options(x: Tensor) -> dict[str, Any]:
    """Kernels start while the one before still runs, on Hopper and later."""
    if not x.is_cuda or torch.cuda.get_device_capability(x.device)[0] < 9:
        return {"AHEAD": False}
    return {"AHEAD": True, "launch_pdl": True}


def rows(
    x_ND: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor | None],
    norm: tuple[Tensor, float] | None = None,
    residual_NO: Tensor | None = None,
    normed_ND: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    how: dict[str, int] | None = None,
    up_ND: Tensor | None = None,
    limit: float | None = None,
) -> list[Tensor]:
    """Rows x `[N, D]` (at most `ROWS`), normed by `norm` (weight and eps) if given, through one or two weights
    `[O, D]`: a list of `[N, O]`.

    A weight is plain (`scales` None), or E4M3 codes with scales `[ceil(O / 128), ceil(D / 128)]`; then the row
    is quantised in runs of 128 channels. `residual_NO` is added to the (one) product. `normed_ND` takes the normed
    rows. With `up_ND` it is swiglu(x, up), within `limit`, that goes through the weight. All weights must be fit
    (`rows_fit`). `how`: one form's plan.
    """
    (count, width), dtype = x_ND.shape, out_dtype or x_ND.dtype
    outs = [w.shape[0] for w in weights]
    ys = [x_ND.new_empty(count, o, dtype=dtype) for o in outs]
    codes = scales[0] is not None
    plain = normed_ND is None and dtype == x_ND.dtype
    if plain and (how is None or "BOXES" in how) and single_boxes.supported(x_ND, weights, scales):
        held = [s for s in scales if s is not None]
        single_boxes.launch(x_ND, weights, held, norm, residual_NO, ys, up_ND, limit, how)
        return ys
    powers = codes and scales[0].dtype == E8M0  # type: ignore[union-attr]
    by = [s.view(torch.uint8) if powers and s is not None else s for s in scales]
    s_rows = [s.stride(0) if s is not None else 0 for s in by]
    how = how or rows_plan(width, sum(outs))
    two = len(weights) == 2
    grid = triton.cdiv(outs[0], how["BO"]) + (triton.cdiv(outs[1], how["BO"]) if two else 0)
    rows_kernel[(grid,)](
        x_ND, up_ND, norm[0] if norm is not None else x_ND, weights[0], weights[-1], by[0], by[-1], residual_NO, ys[0],
        ys[-1], normed_ND, limit or 0.0, outs[0], outs[1] if two else 0, x_ND.stride(0),
        up_ND.stride(0) if up_ND is not None else 0, weights[0].stride(0), weights[-1].stride(0), s_rows[0], s_rows[-1],
        residual_NO.stride(0) if residual_NO is not None else 0, ys[0].stride(0), ys[-1].stride(0),
        norm[1] if norm is not None else 0.0,
        D=width, GROUPS=triton.next_power_of_2(triton.cdiv(width, 128)), N=count, NP=triton.next_power_of_2(count),
        NORM=norm is not None, NORMED=normed_ND is not None, GATED=up_ND is not None, LIMIT=limit is not None,
        RESIDUAL=residual_NO is not None, CODES=codes, POWERS=powers, **how, **launch_options(x_ND),
    )  # fmt: skip
    return ys


def rows_fit(
    x_ND: Tensor, *weights: tuple[Tensor, Tensor | None, tuple[int, int] | None], widest: int = WIDEST
) -> bool:
    """Whether `rows` takes these rows and weights (codes or floats, scales, block)."""
    return (
        usable(x_ND, *(w for w, _, _ in weights))
        and not torch.is_grad_enabled()
        and 0 < x_ND.shape[0] <= ROWS
        and x_ND.dtype == torch.bfloat16
        and x_ND.shape[1] <= widest
        and x_ND.stride(1) == 1
        and all(fits(w, s, block) for w, s, block in weights)
        and len({(w.dtype, None if s is None else s.dtype) for w, s, _ in weights}) == 1
    )


def fits(weight: Tensor, scale: Tensor | None, block: tuple[int, int] | None) -> bool:
    """Whether a matrix is bf16, or codes in blocks of 128x128, in rows without gaps."""
    if scale is None:
        return weight.dtype == torch.bfloat16 and weight.stride(-1) == 1
    good = scale.dtype in (torch.float32, E8M0) and scale.stride(-1) == 1 and weight.stride(-1) == 1
    return good and weight.dtype == FP8 and tuple(block or ()) == (BLOCK, BLOCK)
