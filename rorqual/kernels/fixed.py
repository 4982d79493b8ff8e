"""A matrix product whose every row comes out the same to the last bit, whatever the other rows are.

One order of summation for every number of rows: along the width, 16 products at a time, into one fp32
accumulator. Libraries choose splits of the width by the number of rows, so a token's numbers change with the
batch that it shares. Batch-invariant serving (facts 3.10) and comparing training with serving need that not to
happen. Tiles may be of any shape: on Hopper, where alone they vary here, a sum of the tensor cores does not
depend on the tile it is part of (the tests hold that).
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rorqual.kernels import skinny
from rorqual.kernels.gpu import tl, triton, usable

CUTS = (
    {"BN": 128, "BO": 256, "BD": 64, "STAGES": 3, "num_warps": 8},
    {"BN": 128, "BO": 128, "BD": 64, "STAGES": 4, "num_warps": 8},
    {"BN": 64, "BO": 128, "BD": 64, "STAGES": 4, "num_warps": 4},
    {"BN": 64, "BO": 64, "BD": 128, "STAGES": 4, "num_warps": 4},
)
"""Cuts of bf16 products on Hopper, of which the first with work for most of the chip is taken."""

HALF = CUTS[1]
FULL = {"BN": 64, "BO": 64, "BD": 32, "STAGES": 3, "num_warps": 4}
"""The one cut of bf16 products elsewhere, and of fp32 products."""

FULL_FEW = {"BN": 16, "BO": 16, "BD": 64, "STAGES": 2, "num_warps": 4}
"""The same for up to 64 rows on a GPU, where fp32 products are added one after the other in any tile."""

BAND = 8
"""Tiles of rows that go through the weight together, so that both stay in L2."""


@triton.jit(do_not_specialize=["rows"])
def tiles(
    x, w, bias, y, rows, out_width, x_row, w_row, y_row,
    D: tl.constexpr, BN: tl.constexpr, BO: tl.constexpr, BD: tl.constexpr, STAGES: tl.constexpr, BAND: tl.constexpr,
    BIAS: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """y = x w^T, a tile [BN, BO] a program; programs go down BAND tiles of rows before they go across."""
    down, across = tl.cdiv(rows, BN), tl.cdiv(out_width, BO)
    pid = tl.program_id(0)
    band = pid // (BAND * across)
    high = tl.minimum(down - band * BAND, BAND)
    n = (band * BAND + pid % (BAND * across) % high) * BN + tl.arange(0, BN)
    o = pid % (BAND * across) // high * BO + tl.arange(0, BO)
    d = tl.arange(0, BD)
    # Rows past the end repeat the last one: no masks in the loop, and they are not stored.
    x_at = x + tl.minimum(n, rows - 1).to(tl.int64)[:, None] * x_row + d[None, :]
    w_at = w + tl.minimum(o, out_width - 1).to(tl.int64)[None, :] * w_row + d[:, None]
    acc = tl.zeros((BN, BO), tl.float32)
    for step in tl.range(0, (D + BD - 1) // BD, num_stages=STAGES):
        live = step * BD + d < D
        part = tl.load(x_at, mask=live[None, :], other=0.0)
        tile = tl.load(w_at, mask=live[:, None], other=0.0)
        if FULL:
            acc = tl.dot(part.to(tl.float32), tile.to(tl.float32), acc, input_precision="ieee")
        else:
            acc = tl.dot(part, tile, acc)
        x_at += BD
        w_at += BD
    if BIAS:
        acc += tl.load(bias + o, mask=o < out_width, other=0.0).to(tl.float32)[None, :]
    inside = (n < rows)[:, None] & (o < out_width)[None, :]
    tl.store(y + n.to(tl.int64)[:, None] * y_row + o[None, :], acc.to(y.dtype.element_ty), mask=inside)


def reference(
    x_ND: Tensor, weight_OD: Tensor, bias: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> Tensor:
    """x weight^T + bias in fp32, rounded once. One row at a time, so that it is invariant as well."""
    wide = torch.float64 if torch.float64 in (x_ND.dtype, weight_OD.dtype) else torch.float32
    weight, add = weight_OD.to(wide), None if bias is None else bias.to(wide)
    rows = [F.linear(row, weight, add) for row in x_ND.to(wide).split(1)]
    y = torch.cat(rows) if rows else x_ND.new_empty(0, weight_OD.shape[0])
    return y.to(out_dtype or x_ND.dtype)


def plan(rows: int, out_width: int) -> dict[str, Any]:
    """How a bf16 product on Hopper is cut. Depends on the shape alone, and only the speed depends on it."""
    for cut in CUTS[:-1]:
        if triton.cdiv(rows, cut["BN"]) * triton.cdiv(out_width, cut["BO"]) >= 120:
            return cut
    return CUTS[-1]


def fast(
    x_ND: Tensor,
    weight_OD: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    how: dict[str, Any] | None = None,
) -> Tensor:
    """`reference` by the kernel above, few rows by that of `skinny`."""
    (rows, width), out_width = x_ND.shape, weight_OD.shape[0]
    full = x_ND.dtype != torch.bfloat16 or weight_OD.dtype != torch.bfloat16
    hopper = not full and x_ND.is_cuda and torch.cuda.get_device_capability(x_ND.device)[0] == 9
    if how is None and hopper and rows <= skinny.ROWS:
        tall = skinny.dot_plan(out_width, width) | {"SPLIT": 1}
        return skinny.fast(x_ND, weight_OD, bias, out_dtype=out_dtype, how=tall)
    if how is None and full:
        how = FULL_FEW if x_ND.is_cuda and rows <= 64 else FULL
    how = how or (plan(rows, out_width) if hopper else HALF)
    y = x_ND.new_empty(rows, out_width, dtype=out_dtype or x_ND.dtype)
    tiles[(triton.cdiv(rows, how["BN"]) * triton.cdiv(out_width, how["BO"]),)](
        x_ND, weight_OD, bias, y, rows, out_width, x_ND.stride(0), weight_OD.stride(0), y.stride(0),
        D=width, BIAS=bias is not None, FULL=full, BAND=BAND, **how,
    )  # fmt: skip
    return y


def matmul_fixed(
    x_ND: Tensor, weight_OD: Tensor, bias: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> Tensor:
    """x `[N, D]` through a weight `[O, D]` (+ bias `[O]`): `[N, O]` in `out_dtype` (default x's).

    bf16, fp16 or fp32 each; unless both are bf16, products are taken in full fp32. A row's result depends on that
    row and the weight alone, bit for bit, not on N nor on its place.
    """
    types = (torch.bfloat16, torch.float16, torch.float32)
    if (
        usable(x_ND, weight_OD)
        and x_ND.shape[0] > 0
        and x_ND.dtype in types
        and weight_OD.dtype in types
        and x_ND.stride(1) == weight_OD.stride(1) == 1
    ):
        return fast(x_ND, weight_OD, bias, out_dtype)
    return reference(x_ND, weight_OD, bias, out_dtype)


def linear_fixed(
    x: Tensor, weight_OD: Tensor, bias: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> Tensor:
    """`matmul_fixed` for x `[..., D]`: `[..., O]`."""
    return matmul_fixed(x.flatten(0, -2), weight_OD, bias, out_dtype).unflatten(0, x.shape[:-1])
