"""The three products of FP8 training, for one matrix or one an expert (V3 report section 3.3; facts 3.5).

`rows_product` is the forward product and, with the transposed weights' codes, the gradient of the input: runs of 128
channels by blocks of 128x128. `matrix_product` is the gradient of the weight: runs of 128 tokens by runs of 128 tokens.
Each 128 that the tensor cores have added up are multiplied by both scales and added to an fp32 sum.

On Hopper `fp8_train_gluon` and `fp8_train_gluon_tokens` do them, on other GPUs the Triton kernels here, elsewhere the
references.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from rorqual.kernels import fp8_train_gluon, fp8_train_gluon_tokens
from rorqual.kernels.fp8_train_quant import BLOCK, Codes, Matrices, room
from rorqual.kernels.gpu import tl, triton, usable
from rorqual.kernels.quant import QuantError, dequantize_fp8


@dataclass(frozen=True)
class Groups:
    """Which rows are which matrix's. `ends` int32 `[E]`: where each one's rows end, multiples of 128, ascending; they
    begin where the last one's end. `of_tile` int32: the matrix of every 128 rows, E where they are nobody's."""

    ends: Tensor
    of_tile: Tensor

    @classmethod
    def of(cls, ends: Tensor, rows: int) -> Groups:
        """Groups of `rows` rows, a multiple of 128 that the last end may fall short of."""
        if rows % BLOCK or ends.dtype != torch.int32:
            raise QuantError(f"groups need rows in 128s and int32 ends: got {rows} rows, {ends.dtype} ends")
        starts = torch.arange(0, rows, BLOCK, dtype=torch.int32, device=ends.device)
        return cls(ends, torch.searchsorted(ends, starts, right=True, out_int32=True))

    @property
    def end(self) -> Tensor:
        """Where the last one's rows end: int32 `[1]`."""
        return self.ends[-1:]

    def spans(self) -> list[tuple[int, int]]:
        """First row and end of each; waits for the device."""
        ends = self.ends.tolist()
        return list(zip([0, *ends], ends, strict=False))


@functools.lru_cache(64)
def whole(rows: int, device: torch.device) -> Groups:
    """All rows, filled up to a multiple of 128, one matrix's."""
    with torch.inference_mode(False):
        tiles = torch.zeros(room(rows) // BLOCK, dtype=torch.int32, device=device)
        return Groups(torch.full((1,), room(rows), dtype=torch.int32, device=device), tiles)


def padded_ends(counts: Tensor) -> Tensor:
    """Rows of each expert `[E]` -> `Groups.ends`, every expert's rows filled up to a multiple of 128."""
    return ((counts + (BLOCK - 1)) // BLOCK * BLOCK).cumsum(0).to(torch.int32)


# ---------------------------------------------------------------------------------------------- rows


@triton.jit
def rows_product_kernel(
    x, x_scale, w, w_scale, of_tile, y, experts, out_width, depth, places, x_row, w_matrix, w_row, s_matrix, s_row,
    y_row, BO: tl.constexpr, ADD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y = x w^T for a tile of 128 rows and BO <= 128 outputs a program; zeros where the rows are nobody's."""
    across = tl.cdiv(out_width, BO)
    tile, left = tl.program_id(0) // across, tl.program_id(0) % across * BO
    matrix = tl.load(of_tile + tile)
    n = tile * 128 + tl.arange(0, 128)
    o = left + tl.arange(0, BO)
    k = tl.arange(0, 128)
    acc = tl.zeros((128, BO), tl.float32)
    if matrix < experts:
        x_at = x + n.to(tl.int64)[:, None] * x_row + k[None, :]
        w_at = w + matrix.to(tl.int64) * w_matrix + o.to(tl.int64)[None, :] * w_row + k[:, None]
        s_at = w_scale + matrix * s_matrix + left // 128 * s_row
        for step in tl.range(0, depth // 128, num_stages=STAGES):
            by = tl.load(x_scale + step * places + n) * tl.load(s_at + step)
            acc += tl.dot(tl.load(x_at), tl.load(w_at)) * by[:, None]
            x_at += 128
            w_at += 128
    to = y + n.to(tl.int64)[:, None] * y_row + o[None, :]
    there = (o < out_width)[None, :]
    if ADD:
        acc += tl.load(to, mask=there, other=0.0).to(tl.float32)
    tl.store(to, acc.to(y.dtype.element_ty), mask=there)


def rows_reference(x: Codes, weights: Matrices, groups: Groups, out_width: int, dtype: torch.dtype) -> Tensor:
    """The definition: both sides multiplied out, the product in fp32, rounded once."""
    rows = dequantize_fp8(x.codes, x.scale, (1, BLOCK), torch.float32)
    y = rows.new_zeros(rows.shape[0], out_width)
    for matrix, (begin, end) in enumerate(groups.spans()):
        w = dequantize_fp8(weights.codes[matrix], weights.scale[matrix], (BLOCK, BLOCK), torch.float32)
        y[begin:end] = rows[begin:end] @ w[:out_width].T
    return y.to(dtype)


def rows_fast(x: Codes, weights: Matrices, groups: Groups, y: Tensor, add: bool = False) -> None:
    """`rows_product` by the Triton kernel above."""
    BO = 128
    rows_product_kernel[(y.shape[0] // BLOCK * triton.cdiv(y.shape[1], BO),)](
        x.codes, x.scale, weights.codes, weights.scale, groups.of_tile, y, weights.codes.shape[0], y.shape[1],
        x.codes.shape[1], x.scale.stride(1), x.codes.stride(0), *weights.codes.stride()[:2],
        *weights.scale.stride()[:2], y.stride(0), BO=BO, ADD=add, STAGES=4, num_warps=8,
    )  # fmt: skip


def rows_product(
    x: Codes,
    weights: Matrices,
    groups: Groups,
    out_width: int,
    dtype: torch.dtype = torch.bfloat16,
    add: Tensor | None = None,
) -> Tensor:
    """x `[N, D]` times each row's own matrix of `[E, O, D]`: `[N, out_width]`, N a multiple of 128.

    Rows that are nobody's give zeros. `add` `[N, out_width]` is added in fp32 and overwritten: it is what is returned.
    Raises QuantError where the sides have different channels.
    """
    rows, depth = x.codes.shape
    if (
        weights.codes.shape[2] != depth
        or not weights.codes.shape[1] - BLOCK < out_width <= weights.codes.shape[1]
    ):
        raise QuantError(f"rows {rows} x {depth} meet {tuple(weights.codes.shape)} for {out_width} outputs")
    if not usable(x.codes):
        y = rows_reference(x, weights, groups, out_width, torch.float32 if add is not None else dtype)
        return y if add is None else add.copy_(y + add)
    y = add if add is not None else torch.empty(rows, out_width, dtype=dtype, device=x.codes.device)
    if fp8_train_gluon.supported(x.codes):
        fp8_train_gluon.rows_product(
            x.codes, x.scale, weights.codes, weights.scale, groups.of_tile, y, add is not None
        )
    else:
        rows_fast(x, weights, groups, y, add is not None)
    return y


# ------------------------------------------------------------------------------------------- matrices


@triton.jit
def matrix_product_kernel(
    dy, dy_scale, x, x_scale, ends, dw, out, width, d_row, d_group, x_row, x_group,
    ADD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dw = dy x^T over a matrix's tokens, for a tile of 128 outputs and 128 channels a program."""
    across = tl.cdiv(width, 128)
    matrix = tl.program_id(1)
    o = tl.program_id(0) // across * 128 + tl.arange(0, 128)
    d = tl.program_id(0) % across * 128 + tl.arange(0, 128)
    n = tl.arange(0, 128)
    begin = tl.load(ends + matrix - 1, mask=matrix > 0, other=0)
    acc = tl.zeros((128, 128), tl.float32)
    for at in tl.range(begin, tl.load(ends + matrix), 128, num_stages=STAGES):
        left = tl.load(dy + o.to(tl.int64)[:, None] * d_row + (at + n)[None, :])
        right = tl.load(x + d.to(tl.int64)[None, :] * x_row + (at + n)[:, None])
        by_o = tl.load(dy_scale + at // 128 * d_group + o)
        by_d = tl.load(x_scale + at // 128 * x_group + d)
        acc += tl.dot(left, right) * by_o[:, None] * by_d[None, :]
    to = dw + (matrix.to(tl.int64) * out + o[:, None]) * width + d[None, :]
    there = (o < out)[:, None] & (d < width)[None, :]
    if ADD:
        acc += tl.load(to, mask=there, other=0.0).to(tl.float32)
    tl.store(to, acc.to(dw.dtype.element_ty), mask=there)


def matrix_reference(dy: Codes, x: Codes, groups: Groups, out: int, width: int) -> Tensor:
    """The definition, in fp32."""
    left, right = (dequantize_fp8(c.codes, c.scale, (1, BLOCK), torch.float32) for c in (dy, x))
    parts = [left[:out, begin:end] @ right[:width, begin:end].T for begin, end in groups.spans()]
    return torch.stack(parts)


def matrix_fast(dy: Codes, x: Codes, groups: Groups, dw: Tensor, add: bool = False) -> None:
    """`matrix_product` by the Triton kernel above."""
    count, out, width = dw.shape
    matrix_product_kernel[(triton.cdiv(out, 128) * triton.cdiv(width, 128), count)](
        dy.codes, dy.scale, x.codes, x.scale, groups.ends, dw, out, width, dy.codes.stride(0), dy.scale.stride(1),
        x.codes.stride(0), x.scale.stride(1), ADD=add, STAGES=4, num_warps=8,
    )  # fmt: skip


def matrix_product(
    dy: Codes,
    x: Codes,
    groups: Groups,
    out: int,
    width: int,
    dtype: torch.dtype = torch.bfloat16,
    add: Tensor | None = None,
) -> Tensor:
    """The gradient of each matrix, `[E, out, width]`: dy `[O, N]` times x `[D, N]`, both transposed, over the tokens
    that are its own. `add` of that shape, contiguous, is added in fp32 and overwritten: it is what is returned.

    Raises QuantError where the sides have different tokens.
    """
    fits = dy.codes.shape == (room(out), x.codes.shape[1]) and x.codes.shape[0] == room(width)
    if not fits or (add is not None and not add.is_contiguous()):
        raise QuantError(
            f"a gradient {out} x {width} is not the product of {tuple(dy.codes.shape)} and {tuple(x.codes.shape)}"
        )
    if not usable(x.codes):
        dw = matrix_reference(dy, x, groups, out, width)
        return dw.to(dtype) if add is None else add.copy_(dw + add)
    count = groups.ends.shape[0]
    dw = add if add is not None else torch.empty(count, out, width, dtype=dtype, device=x.codes.device)
    if fp8_train_gluon.supported(x.codes):
        fp8_train_gluon_tokens.matrix_product(
            dy.codes, dy.scale, x.codes, x.scale, groups.ends, dw, add is not None
        )
    else:
        matrix_fast(dy, x, groups, dw, add is not None)
    return dw
