"""A few rows times a weight, at the rate memory gives the weight: every dense projection of a decode step.

Up to 4 rows (2 of large weights), each program keeps whole weight rows in registers and multiplies plainly; up to
32, weights are the tall side of a tensor-core product. Bias, residual and the RMSNorm before the product can be
taken along, so that a step needs fewer launches. Beside it the two per-head products of absorbed attention (V2
report section 2.1, appendix C; facts 3.1): queries into latent space (W_UK) and attended latents into value space
(W_UV), on views of the one kv_b weight, bf16 or FP8 codes with 128x128 scales.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rorqual.kernels.gpu import tl, triton, usable
from rorqual.kernels.mode import by_fixed_kernels
from rorqual.kernels.quant import E8M0, FP8

ROWS = 32
"""Most rows the kernel is made for."""

PROCESSORS = 132
"""Multiprocessors of the GPU that the plans are made for."""

FMA_ROWS = 4
"""Most rows multiplied without tensor cores."""

FMA_WIDTH = 16384
"""Widest rows kept in registers for that."""

BLOCK = 128
"""Rows and columns of weight codes that share a scale."""


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


# ------------------------------------------------------------------------------------ products by head


@triton.jit(do_not_specialize=["rows"])
def by_head(
    x, w, scale, y, rows, outer, x_row, x_head, w_head, w_inner, w_outer, y_row, y_head,
    head_rows, first, s_row,
    INNER: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, UP: tl.constexpr,
    CODES: tl.constexpr, POWERS: tl.constexpr, STAGES: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """y[n, h, m] = sum over k of x[n, h, k] w[h, k, m]. CODES: w holds E4M3, multiplied out as it is read;
    columns of scale blocks lie along m if UP (a tile is in one), else along k."""
    release(AHEAD)
    head = tl.program_id(1).to(tl.int64)
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(2) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    x_at = x + head * x_head + n.to(tl.int64)[:, None] * x_row + k[None, :]
    w_at = w + head * w_head + k[:, None] * w_inner + m[None, :] * w_outer
    acc = tl.zeros((BN, BM), tl.float32)
    if INNER > BK:
        await_inputs(AHEAD)
    for step in tl.range(0, (INNER + BK - 1) // BK, num_stages=STAGES):
        start = step * BK
        live = start + k < INNER
        tile = tl.load(w_at, mask=live[:, None] & (m < outer)[None, :], other=0.0)
        if INNER <= BK:
            await_inputs(AHEAD)
        part = tl.load(x_at, mask=(n < rows)[:, None] & live[None, :], other=0.0)
        if CODES:
            if UP:
                line = tl.minimum(start + k, INNER - 1)[:, None]
                column = tl.program_id(0) * BM // 128
            else:
                line = tl.minimum(m, outer - 1)[None, :]
                column = tl.minimum(start + k, INNER - 1)[:, None] // 128 if BK > 128 else start // 128
            by = tl.load(scale + (head * head_rows + first + line) // 128 * s_row + column)
            if POWERS:
                bits = tl.where(by == 0, 0x00400000, by.to(tl.int32) << 23)
                by = tl.where(by == 255, float("nan"), bits.to(tl.float32, bitcast=True))
            tile = (tile.to(tl.float32) * by).to(x.dtype.element_ty)
        acc = tl.dot(part, tile, acc, input_precision="ieee")
        x_at += BK
        w_at += BK * w_inner
    inside = (n < rows)[:, None] & (m < outer)[None, :]
    y_at = y + head * y_head + n.to(tl.int64)[:, None] * y_row + m[None, :]
    tl.store(y_at, acc.to(y.dtype.element_ty), mask=inside)


def heads_reference(
    x_NHK: Tensor,
    w_HRC: Tensor,
    up: bool,
    out: Tensor | None = None,
    scale: Tensor | None = None,
    first: int = 0,
) -> Tensor:
    """`heads_up` (`up`) or `heads_down` in PyTorch; FP8 codes are multiplied out to x's type first."""
    if scale is not None:
        heads, rows, columns = w_HRC.shape
        line = torch.arange(heads, device=scale.device)[:, None] * (w_HRC.stride(0) // w_HRC.stride(1))
        line = (line + first + torch.arange(rows, device=scale.device)) // BLOCK
        column = torch.arange(columns, device=scale.device) // BLOCK
        w_HRC = (w_HRC.float() * scale.float()[line][..., column]).to(x_NHK.dtype)
    w_HKM = w_HRC if up else w_HRC.transpose(1, 2)
    if out is None:
        return torch.bmm(x_NHK.transpose(0, 1), w_HKM).transpose(0, 1)
    torch.bmm(x_NHK.transpose(0, 1), w_HKM, out=out.transpose(0, 1))
    return out


def heads_plan(rows: int, heads: int, up: bool, codes: bool) -> dict[str, int]:
    """How a product by head is cut. Depends on the shape alone."""
    many = heads >= 64
    if rows <= 16 and codes:
        return {"BN": 16, "BM": 64, "BK": 128, "STAGES": 3, "num_warps": 4}
    if rows <= 16 and (up or many):
        return {"BN": 16, "BM": 64 if many else 32, "BK": 128, "STAGES": 3, "num_warps": 2 if many else 1}
    if rows <= 16:
        return {"BN": 16, "BM": 32, "BK": 256, "STAGES": 3, "num_warps": 1}
    if rows <= 64:
        return {"BN": 64, "BM": 64, "BK": 128, "STAGES": 3, "num_warps": 4}
    return {"BN": 128, "BM": 128, "BK": 128, "STAGES": 3, "num_warps": 8}


def heads_fast(
    x_NHK: Tensor,
    w_HRC: Tensor,
    up: bool,
    out: Tensor | None = None,
    scale: Tensor | None = None,
    first: int = 0,
    ahead: bool = False,
    how: dict[str, int] | None = None,
) -> Tensor:
    """`heads_reference` by the kernel above. `how` replaces `heads_plan`."""
    (rows, heads, inner), outer = x_NHK.shape, w_HRC.shape[2 if up else 1]
    if out is None:
        out = x_NHK.new_empty(rows, heads, outer)
    how = dict(how or heads_plan(rows, heads, up, scale is not None))
    how["BK"] = min(how["BK"], max(16, triton.next_power_of_2(inner)))
    powers = scale is not None and scale.dtype == E8M0
    by_head[(triton.cdiv(outer, how["BM"]), heads, triton.cdiv(rows, how["BN"]))](
        x_NHK, w_HRC, scale.view(torch.uint8) if powers and scale is not None else scale, out,
        rows, outer, x_NHK.stride(0), x_NHK.stride(1),
        w_HRC.stride(0), w_HRC.stride(1 if up else 2), w_HRC.stride(2 if up else 1),
        out.stride(0), out.stride(1), w_HRC.stride(0) // w_HRC.stride(1), first,
        scale.stride(0) if scale is not None else 0,
        INNER=inner, UP=up, CODES=scale is not None, POWERS=powers, **how,
        **launching(ahead and x_NHK.is_cuda),
    )  # fmt: skip
    return out


def heads_fixed(
    x_NHK: Tensor,
    w_HRC: Tensor,
    up: bool,
    out: Tensor | None = None,
    scale: Tensor | None = None,
    first: int = 0,
) -> Tensor:
    """`heads_reference` so that a row's bits depend on that row alone. bf16 tiles may differ by the number of rows,
    as in `rorqual.kernels.fixed`; codes and fp32 have one tile each."""
    half = x_NHK.dtype in (torch.bfloat16, torch.float16)
    kept = x_NHK.dtype if scale is None else FP8
    if (half or x_NHK.dtype == torch.float32) and w_HRC.dtype == kept and w_HRC.stride(-1) == 1:
        if not len(x_NHK):
            return x_NHK.new_empty(0, x_NHK.shape[1], w_HRC.shape[2 if up else 1]) if out is None else out
        x_NHK = x_NHK if x_NHK.stride(-1) == 1 else x_NHK.contiguous()
        how = None if half else {"BN": 16, "BM": 32, "BK": 32, "STAGES": 2, "num_warps": 4}
        if (
            half and scale is not None
        ):  # tiles of 16 rows meet codes in another order of channels than larger ones
            how = {"BN": 64, "BM": 64, "BK": 128, "STAGES": 3, "num_warps": 4}
        return heads_fast(x_NHK, w_HRC, up, out, scale, first, how=how)
    rows = [heads_reference(x, w_HRC, up, None, scale, first) for x in x_NHK.split(1)]
    y = torch.cat(rows) if rows else x_NHK.new_empty(0, x_NHK.shape[1], w_HRC.shape[2 if up else 1])
    return y if out is None else out.copy_(y)


def heads_up(
    q_NHd: Tensor,
    w_HdC: Tensor,
    out: Tensor | None = None,
    scale: Tensor | None = None,
    first: int = 0,
    ahead: bool = False,
) -> Tensor:
    """Each head's queries `[N, H, d]` times its W_UK `[H, d, C]`: `[N, H, C]`, into `out` if given.

    All three may be views with any row and head strides. With `scale` `[ceil(H R / 128), ceil(C / 128)]`
    (fp32 or float8_e8m0fnu) the weight is a view of E4M3 codes `[H, R, C]` beginning `first` rows into each
    head's R. `ahead` as for `skinny`.
    """
    if by_fixed_kernels(q_NHd, w_HdC):
        return heads_fixed(q_NHd, w_HdC, True, out, scale, first)
    if _heads_fit(q_NHd, w_HdC, scale, ahead):
        return heads_fast(q_NHd, w_HdC, True, out, scale, first, ahead)
    return heads_reference(q_NHd, w_HdC, True, out, scale, first)


def heads_down(
    u_NHC: Tensor,
    w_HvC: Tensor,
    out: Tensor | None = None,
    scale: Tensor | None = None,
    first: int = 0,
    ahead: bool = False,
) -> Tensor:
    """Each head's attended latents `[N, H, C]` times its W_UV `[H, v, C]`: `[N, H, v]`. As `heads_up`; for a
    kv_b weight of codes, `first` is the width of the keys before the values."""
    if by_fixed_kernels(u_NHC, w_HvC):
        return heads_fixed(u_NHC, w_HvC, False, out, scale, first)
    if _heads_fit(u_NHC, w_HvC, scale, ahead):
        return heads_fast(u_NHC, w_HvC, False, out, scale, first, ahead)
    return heads_reference(u_NHC, w_HvC, False, out, scale, first)


def _heads_fit(x: Tensor, w: Tensor, scale: Tensor | None, ahead: bool) -> bool:
    """Whether the kernel takes these, and is not behind PyTorch's batched product: that wins from some rows on,
    and can't run ahead nor read codes."""
    return (
        usable(x, w)
        and not torch.is_grad_enabled()
        and x.shape[0] > 0
        and x.dtype == torch.bfloat16
        and w.dtype == (x.dtype if scale is None else FP8)
        and x.stride(-1) == w.stride(-1) == 1
        and (scale is not None or x.shape[0] <= (64 if ahead else 4))
    )
