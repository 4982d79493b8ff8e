"""A few rows times a weight, at the rate memory gives the weight: every dense projection of a decode step.

Up to 4 rows (2 of large weights), each program keeps whole weight rows in registers and multiplies plainly; up to
32, weights are the tall side of a tensor-core product. Bias, residual and the RMSNorm before the product can be
taken along, so that a step needs fewer launches.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rorqual.kernels.gpu import tl, triton, usable

ROWS = 32
"""Most rows the kernel is made for."""

PROCESSORS = 132
"""Multiprocessors of the GPU that the plans are made for."""

FMA_ROWS = 4
"""Most rows multiplied without tensor cores."""

FMA_WIDTH = 16384
"""Widest rows kept in registers for that."""


@triton.jit
def release(AHEAD: tl.constexpr):
    """Let the next kernel start, if it was launched to run ahead."""
    if AHEAD:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def await_inputs(AHEAD: tl.constexpr):
    """Wait until all that the kernels before wrote can be read."""
    if AHEAD:
        tl.extra.cuda.gdc_wait()


@triton.jit
def fetch_ahead(
    w, row, w_row, first, D: tl.constexpr, ITEM: tl.constexpr, WIDTH: tl.constexpr, AHEAD: tl.constexpr
):  # fmt: skip
    """Ask for `WIDTH` items (of ITEM bytes) of weight rows from item `first` on to be brought into L2."""
    if AHEAD and WIDTH > 0:
        LINES: tl.constexpr = WIDTH * ITEM // 128
        d = tl.minimum(first + tl.arange(0, LINES) * (128 // ITEM), D - 1)
        at = w + row.to(tl.int64)[:, None] * w_row + d[None, :]
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
            "=r,l",
            [at.to(tl.int64)],
            tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def rows_fma(
    x, w, bias, residual, norm, y, out_width, x_row, w_row, r_row, y_row, eps,
    D: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, BO: tl.constexpr, BD: tl.constexpr,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, NORM: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """y[n, o] = x[n] . w[o] for BO weight rows a program; they are read once and held for all N rows of x."""
    release(AHEAD)
    o = tl.program_id(0) * BO + tl.arange(0, BO)
    d = tl.arange(0, BD)
    inside = o < out_width
    tile = tl.load(
        w + o.to(tl.int64)[:, None] * w_row + d[None, :],
        mask=inside[:, None] & (d < D)[None, :],
        other=0.0,
        eviction_policy="evict_first",
    )
    await_inputs(AHEAD)
    # Rows leave together at the end: a store in between would hold back the loads of the rows after it.
    which = tl.arange(0, NP)
    values = tl.zeros((BO, NP), tl.float32)
    for n in tl.static_range(N):
        row = tl.load(x + n * x_row + d, mask=d < D, other=0.0).to(tl.float32)
        if NORM:
            rms = tl.rsqrt(tl.sum(row * row, 0) / D + eps)
            row = row * rms * tl.load(norm + d, mask=d < D, other=0.0).to(tl.float32)
        value = tl.sum(tile.to(tl.float32) * row[None, :], 1)
        values = tl.where((which == n)[None, :], value[:, None], values)
    mask = inside[:, None] & (which < N)[None, :]
    if BIAS:
        values += tl.load(bias + o, mask=inside, other=0.0).to(tl.float32)[:, None]
    if RESIDUAL:
        values += tl.load(residual + which[None, :] * r_row + o[:, None], mask=mask, other=0.0).to(tl.float32)
    tl.store(y + which[None, :] * y_row + o[:, None], values.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def rows_dot(
    x, w, bias, residual, norm, y, rows, out_width, x_row, w_row, r_row, y_row, y_split, eps,
    D: tl.constexpr, BO: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr,
    EXACT: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, NORM: tl.constexpr,
    FETCH: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """The same on tensor cores: w [BO, BD] times x^T [BD, BN].

    Split s of SPLIT takes its share of the width and writes its part to y + s * y_split. EXACT multiplies fp32 x
    as three bf16 parts. NORM: products are of x times the norm's weight, and take the row's 1 / rms at the end.
    FETCH: weights asked for ahead.
    """
    release(AHEAD)
    STEPS: tl.constexpr = ((D + BD - 1) // BD + SPLIT - 1) // SPLIT
    o = tl.program_id(0) * BO + tl.arange(0, BO)
    n = tl.arange(0, BN)
    split = tl.program_id(1)
    first = split * (STEPS * BD)
    fetch_ahead(w, tl.minimum(o, out_width - 1), w_row, first, D, 2, FETCH, AHEAD)
    await_inputs(AHEAD)
    d = first + tl.arange(0, BD)
    w_at = w + o.to(tl.int64)[:, None] * w_row + d[None, :]
    x_at = x + n[None, :] * x_row + d[:, None]
    acc = tl.zeros((BO, BN), tl.float32)
    squares = tl.zeros((BN,), tl.float32)
    for step in tl.range(0, STEPS, num_stages=STAGES):
        live = step * BD + d < D
        tile = tl.load(w_at, mask=(o < out_width)[:, None] & live[None, :], other=0.0)
        part = tl.load(x_at, mask=(n < rows)[None, :] & live[:, None], other=0.0)
        if NORM:
            values = part.to(tl.float32)
            squares += tl.sum(values * values, 0)
            by = tl.load(norm + step * BD + d, mask=live, other=0.0)
            part = (values * by.to(tl.float32)[:, None]).to(part.dtype)
        if EXACT:
            high = part.to(tl.bfloat16)
            rest = part - high.to(tl.float32)
            middle = rest.to(tl.bfloat16)
            low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
            acc = tl.dot(tile, low, acc)
            acc = tl.dot(tile, middle, acc)
            acc = tl.dot(tile, high, acc)
        else:
            acc = tl.dot(tile, part, acc)
        w_at += BD
        x_at += BD
    inside = (o < out_width)[:, None] & (n < rows)[None, :]
    if NORM:
        acc *= tl.rsqrt(squares / D + eps)[None, :]
    if BIAS:
        acc += tl.load(bias + o, mask=o < out_width, other=0.0).to(tl.float32)[:, None]
    if RESIDUAL:
        acc += tl.load(residual + n[None, :] * r_row + o[:, None], mask=inside, other=0.0).to(tl.float32)
    tl.store(y + split * y_split + n[None, :] * y_row + o[:, None], acc.to(y.dtype.element_ty), mask=inside)


@triton.jit
def add_parts(
    part, bias, residual, y, out_width, p_split, p_row, r_row, y_row,
    SPLIT: tl.constexpr, BO: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """y[n, o] = the sum over splits of part[s, n, o], in order, plus bias and residual."""
    release(AHEAD)
    await_inputs(AHEAD)
    n = tl.program_id(1)
    o = tl.program_id(0) * BO + tl.arange(0, BO)
    inside = o < out_width
    total = tl.zeros((BO,), tl.float32)
    for s in tl.static_range(SPLIT):
        total += tl.load(part + s * p_split + n * p_row + o, mask=inside, other=0.0)
    if BIAS:
        total += tl.load(bias + o, mask=inside, other=0.0).to(tl.float32)
    if RESIDUAL:
        total += tl.load(residual + n * r_row + o, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + n * y_row + o, total.to(y.dtype.element_ty), mask=inside)


def reference(
    x_ND: Tensor,
    weight_OD: Tensor,
    bias: Tensor | None = None,
    residual_NO: Tensor | None = None,
    norm_weight_D: Tensor | None = None,
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """The definition, in fp32, rounded once: (norm(x) weight^T + bias + residual) as `out_dtype`."""
    x = x_ND.float()
    if norm_weight_D is not None:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * norm_weight_D.float()
    y = F.linear(x, weight_OD.float(), None if bias is None else bias.float())
    if residual_NO is not None:
        y = y + residual_NO.float()
    return y.to(out_dtype or x_ND.dtype)


def plan(rows: int, out_width: int, width: int) -> dict[str, Any]:
    """How a product of this shape is cut. Depends on the shape alone."""
    if rows <= FMA_ROWS and width <= FMA_WIDTH and (rows <= 2 or (out_width <= 2048 and width <= 4096)):
        if width > 4096:
            return {"kind": "fma", "BO": 2, "num_warps": 2}
        if rows == 1 or out_width <= 1024:
            return {"kind": "fma", "BO": 1, "num_warps": 2}
        return {"kind": "fma", "BO": 2 if rows == 2 else 1, "num_warps": 1}
    return dot_plan(out_width, width)


def dot_plan(out_width: int, width: int) -> dict[str, Any]:
    """`plan` for tensor cores."""
    if out_width <= 2112:
        how = {"BO": 16, "BD": 256, "SPLIT": 1, "STAGES": 4, "num_warps": 2, "FETCH": fetched(width)}
    elif out_width < 7168:
        how = {"BO": 32, "BD": 256, "SPLIT": 1, "STAGES": 4, "num_warps": 4, "FETCH": fetched(width)}
    elif out_width < 65536:  # more stages where a multiprocessor has one program alone
        stages = 6 if out_width <= 64 * PROCESSORS else 4
        how = {"BO": 64, "BD": 128, "SPLIT": 1, "STAGES": stages, "num_warps": 4, "FETCH": 0}
    else:
        how = {"BO": 128, "BD": 64, "SPLIT": 1, "STAGES": 5, "num_warps": 4, "FETCH": 0}
    return {"kind": "dot", **how}


def fetched(width: int) -> int:
    """How many numbers of a weight row to ask for ahead: a power of two, 2 KB at most."""
    return min(1024, 1 << width.bit_length() - 1) if width >= 64 else 0


def launching(ahead: bool) -> dict[str, bool]:
    """Launch options of a kernel that may run ahead."""
    return {"AHEAD": True, "launch_pdl": True} if ahead else {"AHEAD": False}


def fast(
    x_ND: Tensor,
    weight_OD: Tensor,
    bias: Tensor | None = None,
    residual_NO: Tensor | None = None,
    norm_weight_D: Tensor | None = None,
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
    ahead: bool = False,
    how: dict[str, Any] | None = None,
) -> Tensor:
    """`reference` by the kernels above. `how` replaces `plan`."""
    (rows, width), out_width = x_ND.shape, weight_OD.shape[0]
    y = x_ND.new_empty(rows, out_width, dtype=out_dtype or x_ND.dtype)
    how = dict(how or plan(rows, out_width, width))
    kind = how.pop("kind")
    r_row = residual_NO.stride(0) if residual_NO is not None else 0
    launch = launching(ahead and x_ND.is_cuda)
    extras = {"BIAS": bias is not None, "RESIDUAL": residual_NO is not None}
    if kind == "fma":
        rows_fma[(triton.cdiv(out_width, how["BO"]),)](
            x_ND, weight_OD, bias, residual_NO, norm_weight_D, y, out_width,
            x_ND.stride(0), weight_OD.stride(0), r_row, y.stride(0), eps,
            D=width, N=rows, NP=triton.next_power_of_2(rows), BD=triton.next_power_of_2(width),
            NORM=norm_weight_D is not None, **extras, **how, **launch,
        )  # fmt: skip
        return y
    split = how["SPLIT"]
    if norm_weight_D is not None and split > 1:
        raise ValueError("the norm needs whole rows: no split of the width")
    part = y if split == 1 else y.new_empty(split, rows, out_width, dtype=torch.float32)
    rows_dot[(triton.cdiv(out_width, how["BO"]), split)](
        x_ND, weight_OD, bias, residual_NO, norm_weight_D, part, rows, out_width,
        x_ND.stride(0), weight_OD.stride(0), r_row, part.stride(-2), part.stride(0) if split > 1 else 0, eps,
        D=width, NORM=norm_weight_D is not None, BN=max(16, triton.next_power_of_2(rows)),
        EXACT=x_ND.dtype == torch.float32,
        **(extras if split == 1 else {"BIAS": False, "RESIDUAL": False}), **how, **launch,
    )  # fmt: skip
    if split > 1:
        add_parts[(triton.cdiv(out_width, 256), rows)](
            part, bias, residual_NO, y, out_width, part.stride(0), part.stride(1), r_row, y.stride(0),
            SPLIT=split, BO=256, num_warps=2, **extras, **launch,
        )  # fmt: skip
    return y


def skinny(
    x_ND: Tensor,
    weight_OD: Tensor,
    bias: Tensor | None = None,
    residual_NO: Tensor | None = None,
    norm_weight_D: Tensor | None = None,
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
    ahead: bool = False,
) -> Tensor:
    """x `[N, D]` (bf16 or fp32) through a bf16 weight `[O, D]`: `[N, O]` in `out_dtype` (default x's).

    bias `[O]` and residual `[N, O]` are added in fp32 before the one rounding; `norm_weight_D` takes the
    RMSNorm of x (`eps` inside the root) along. Other shapes and types go through PyTorch.

    `ahead` lets the kernel start, and ask for its weight, while the kernel launched before it is still running
    (programmatic dependent launch); the weight must not be what that kernel writes.
    """
    wanted = out_dtype or x_ND.dtype
    if not _fits(x_ND, weight_OD, norm_weight_D):
        if norm_weight_D is not None:
            x_ND = F.rms_norm(x_ND, (x_ND.shape[1],), norm_weight_D.to(x_ND.dtype), eps)
        if wanted == x_ND.dtype == weight_OD.dtype:
            y = F.linear(x_ND, weight_OD, bias)
            return y if residual_NO is None else y + residual_NO
        return reference(x_ND, weight_OD, bias, residual_NO, out_dtype=wanted)
    return fast(x_ND, weight_OD, bias, residual_NO, norm_weight_D, eps, wanted, ahead)


def _fits(x_ND: Tensor, weight_OD: Tensor, norm_weight_D: Tensor | None) -> bool:
    return (
        usable(x_ND, weight_OD)
        and not torch.is_grad_enabled()
        and 0 < x_ND.shape[0] <= ROWS
        and weight_OD.dtype == torch.bfloat16
        and x_ND.dtype in (torch.bfloat16, torch.float32)
        and x_ND.stride(1) == weight_OD.stride(1) == 1
    )
