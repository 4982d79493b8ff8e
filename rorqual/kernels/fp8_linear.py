"""Linear layers on FP8 tensor cores (V3 report section 3.3; facts 3.5).

Weights are E4M3 codes with a scale for every 128x128 block. Activations are cut into runs of 128 channels,
each with its own scale, as they arrive. The tensor cores add up 128 channels at a time; each such part is
multiplied by both scales and added to an fp32 accumulator.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rorqual.kernels import fp8_gluon, peers
from rorqual.kernels.gpu import tl, triton, usable
from rorqual.kernels.mode import by_fixed_kernels
from rorqual.kernels.quant import E8M0, FP8, blocks, dequantize_fp8, encode_fp8, fp8_scale
from rorqual.kernels.skinny import PROCESSORS, add_parts, await_inputs, fetch_ahead, launching, release

BLOCK = 128
"""Channels, and weight rows, that share a scale."""

FEW_WIDTH = 4096
"""Widest single row that is multiplied without tensor cores."""

BAND = 8
"""Tiles of rows that go through the weight together, so that both stay in L2."""

FIXED_ROWS = 2048
"""Rows that the form for batch-invariant mode takes at a time."""

# ---------------------------------------------------------------------------------------- activations


@triton.jit
def quantize(
    x, codes, scale, rows, room, width, x_row, c_row, s_row, s_group,
    BN: tl.constexpr, POWERS: tl.constexpr, LATE: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """One run of 128 channels of BN rows a program: scale amax / 448, floored as in quant.py; POWERS rounds it up
    to a power of two. Rows from `rows` to `room` count as zero. LATE: what follows starts once all before is done."""
    release(AHEAD and not LATE)
    n = (tl.program_id(0) * BN + tl.arange(0, BN)).to(tl.int64)
    group = tl.program_id(1)
    d = group * 128 + tl.arange(0, 128)
    live = (d < width)[None, :]
    await_inputs(AHEAD)
    release(AHEAD and LATE)
    values = tl.load(x + n[:, None] * x_row + d[None, :], mask=(n < rows)[:, None] & live, other=0.0)
    values = values.to(tl.float32)
    by = tl.div_rn(tl.maximum(tl.max(tl.abs(values), 1), 1e-4), 448.0)
    if POWERS:  # any bit of the fraction carries into the exponent
        by = ((by.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
    # values / by, rounded correctly: a quotient by the reciprocal, and once what is left over.
    over = tl.div_rn(1.0, by)[:, None]
    ratio = values * over
    ratio = tl.fma(tl.fma(-ratio, by[:, None], values), over, ratio)
    code = tl.minimum(tl.maximum(ratio, -448.0), 448.0).to(tl.float8e4nv)
    tl.store(codes + n[:, None] * c_row + d[None, :], code, mask=(n < room)[:, None] & live)
    tl.store(scale + n * s_row + group * s_group, by, mask=n < room)


def quantize_reference(x_ND: Tensor, pow2: bool = False) -> tuple[Tensor, Tensor]:
    """`quantize_rows` in PyTorch, by the rules of `rorqual.kernels.quant`."""
    scale = fp8_scale(x_ND, (1, BLOCK), pow2)
    return encode_fp8(x_ND.float(), scale, (1, BLOCK)), scale


def quantize_fast(
    x_ND: Tensor,
    pow2: bool = False,
    ahead: bool = False,
    how: dict[str, int] | None = None,
    followed: bool = False,
) -> tuple[Tensor, Tensor]:
    """`quantize_rows` by the kernel above. The tensors returned have room for rows up to a multiple of 4. `followed`:
    the next kernel is launched to run ahead, but not before all kernels before this one are done unless `ahead`."""
    rows, width = x_ND.shape
    room, groups = blocks(rows, 4) * 4, blocks(width, BLOCK)
    codes = torch.empty(room, width, dtype=FP8, device=x_ND.device)
    scale = torch.empty(groups, room, dtype=torch.float32, device=x_ND.device).t()
    how = how or {"BN": 1 if rows <= 16 else 16, "num_warps": 1 if rows <= 16 else 4}
    quantize[(triton.cdiv(room, how["BN"]), groups)](
        x_ND, codes, scale, rows, room, width, x_ND.stride(0), codes.stride(0), scale.stride(0), scale.stride(1),
        POWERS=pow2, LATE=not ahead, **how, **launching(followed or (ahead and x_ND.is_cuda)),
    )  # fmt: skip
    return codes[:rows], scale[:rows]


def quantize_rows(x_ND: Tensor, pow2: bool = False, ahead: bool = False) -> tuple[Tensor, Tensor]:
    """x `[N, D]` -> E4M3 codes `[N, D]` and fp32 scales `[N, ceil(D / 128)]` of runs of 128 channels.

    scale = max(amax, 1e-4) / 448, with `pow2` the next power of two. The scales lie rows side by side.
    """
    if usable(x_ND) and x_ND.stride(1) == 1 and x_ND.numel():
        return quantize_fast(x_ND, pow2, ahead)
    return quantize_reference(x_ND, pow2)


# -------------------------------------------------------------------------------------------- product


@triton.jit
def factor(at, POWERS: tl.constexpr):
    """Scales of a weight as fp32; bytes of float8_e8m0fnu are exponents."""
    by = tl.load(at)
    if POWERS:
        bits = tl.where(by == 0, 0x00400000, by.to(tl.int32) << 23)
        by = tl.where(by == 255, float("nan"), bits.to(tl.float32, bitcast=True))
    return by


@triton.jit
def few(
    x, x_scale, w, w_scale, bias, y, out_width, x_row, s_row, s_group, w_row, b_row, y_row,
    D: tl.constexpr, GROUPS: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, BO: tl.constexpr,
    POWERS: tl.constexpr, BIAS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """y = x w^T for N rows, BO outputs a program, without tensor cores: whole weight rows are held in registers."""
    release(AHEAD)
    first = tl.program_id(0) * BO
    o = first + tl.arange(0, BO)
    g = tl.arange(0, GROUPS)
    d = g[:, None] * 128 + tl.arange(0, 128)[None, :]
    inside = o < out_width
    tile = tl.load(
        w + o.to(tl.int64)[:, None, None] * w_row + d[None, :, :],
        mask=inside[:, None, None] & (d < D)[None, :, :],
        other=0.0,
        eviction_policy="evict_first",
    )
    real = g < (D + 127) // 128
    by = factor(w_scale + first // 128 * b_row + tl.where(real, g, 0), POWERS)
    await_inputs(AHEAD)
    which = tl.arange(0, NP)
    values = tl.zeros((BO, NP), tl.float32)
    for n in tl.static_range(N):
        row = tl.load(x + n * x_row + d, mask=d < D, other=0.0).to(tl.float32)
        parts = tl.sum(tile.to(tl.float32) * row[None, :, :], 2)
        by_n = tl.load(x_scale + n * s_row + g * s_group, mask=real, other=0.0)
        value = tl.sum(parts * (by_n * by)[None, :], 1)
        values = tl.where((which == n)[None, :], value[:, None], values)
    if BIAS:
        values += tl.load(bias + o, mask=inside, other=0.0).to(tl.float32)[:, None]
    at = y + which[None, :] * y_row + o[:, None]
    tl.store(at, values.to(y.dtype.element_ty), mask=inside[:, None] & (which < N)[None, :])


@triton.jit(do_not_specialize=["rows"])
def product(
    x, x_scale, w, w_scale, bias, y, rows, out_width, x_row, s_row, s_group, w_row, b_row, y_row, y_split,
    D: tl.constexpr, BN: tl.constexpr, BO: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr,
    BAND: tl.constexpr, TALL: tl.constexpr, POWERS: tl.constexpr, BIAS: tl.constexpr, FETCH: tl.constexpr,
    UNROLL: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """y = x w^T, a tile of BN rows and BO <= 128 outputs a program.

    TALL: weights are the tall side of the tensor cores (few rows). Split s of SPLIT takes its share of the
    channels and writes to y + s * y_split. FETCH: channels of the weight asked for ahead.
    """
    release(AHEAD)
    STEPS: tl.constexpr = ((D + 127) // 128 + SPLIT - 1) // SPLIT
    down, across = tl.cdiv(rows, BN), tl.cdiv(out_width, BO)
    pid, split = tl.program_id(0), tl.program_id(1)
    band = pid // (BAND * across)
    high = tl.minimum(down - band * BAND, BAND)
    n = (band * BAND + pid % (BAND * across) % high) * BN + tl.arange(0, BN)
    left = pid % (BAND * across) // high * BO
    o = left + tl.arange(0, BO)
    row = tl.minimum(n, rows - 1).to(tl.int64)  # past the end: the last one again, not stored
    col = tl.minimum(o, out_width - 1).to(tl.int64)
    first = split * (STEPS * 128)
    fetch_ahead(w, col, w_row, first, D, 1, FETCH, AHEAD)
    await_inputs(AHEAD)
    k = first + tl.arange(0, 128)
    if TALL:
        x_at = x + row[None, :] * x_row + k[:, None]
        w_at = w + col[:, None] * w_row + k[None, :]
        acc = tl.zeros((BO, BN), tl.float32)
    else:
        x_at = x + row[:, None] * x_row + k[None, :]
        w_at = w + col[None, :] * w_row + k[:, None]
        acc = tl.zeros((BN, BO), tl.float32)
    for step in tl.range(0, STEPS, num_stages=STAGES, loop_unroll_factor=UNROLL):
        if D % (128 * SPLIT) == 0:
            part = tl.load(x_at)
            tile = tl.load(w_at)
        else:
            live = step * 128 + k < D
            part = tl.load(x_at, mask=tl.expand_dims(live, 1 if TALL else 0), other=0.0)
            tile = tl.load(w_at, mask=tl.expand_dims(live, 0 if TALL else 1), other=0.0)
        group = tl.minimum(split * STEPS + step, (D + 127) // 128 - 1)  # past the end: any, times zeros
        by_o = factor(w_scale + left // 128 * b_row + group, POWERS)
        by_n = tl.load(x_scale + row * s_row + group * s_group)
        by = tl.expand_dims(by_n * by_o, 0 if TALL else 1)
        if TALL:
            acc += tl.dot(tile, part) * by
        else:
            acc += tl.dot(part, tile) * by
        x_at += 128
        w_at += 128
    if TALL:
        n, o = n[None, :], o[:, None]
    else:
        n, o = n[:, None], o[None, :]
    if BIAS:
        acc += tl.load(bias + o, mask=o < out_width, other=0.0).to(tl.float32)
    y_at = y + split * y_split + n.to(tl.int64) * y_row + o
    tl.store(y_at, acc.to(y.dtype.element_ty), mask=(n < rows) & (o < out_width))


def reference(
    x_ND: Tensor,
    codes_OD: Tensor,
    scale: Tensor,
    block: tuple[int, int] = (BLOCK, BLOCK),
    bias: Tensor | None = None,
    pow2: bool = False,
) -> Tensor:
    """The definition: quantise x, multiply both out in fp32, take the product in fp32, round once."""
    x_codes, x_scale = quantize_reference(x_ND, pow2)
    x = dequantize_fp8(x_codes, x_scale, (1, BLOCK), torch.float32)
    w = dequantize_fp8(codes_OD, scale, block, torch.float32)
    return F.linear(x, w, None if bias is None else bias.float()).to(x_ND.dtype)


def plan(rows: int, out_width: int, width: int, gluon: bool = True) -> dict[str, Any]:
    """How a product of this shape is cut, by `fp8_gluon` ("STEPS") or not. Depends on the shape alone."""
    how = fp8_gluon.plan(rows, out_width, width) if gluon else None
    if how is not None:
        return how
    if rows == 1 and width <= FEW_WIDTH:
        if width > 2048:
            return {"FEW": True, "BO": 4, "num_warps": 4}
        return {"FEW": True, "BO": 4 if out_width <= 1024 else 8, "num_warps": 2 if out_width <= 1024 else 4}
    how = {"SPLIT": 1, "TALL": rows <= 32, "num_warps": 4, "FETCH": 0, "UNROLL": 1}
    BN = 64 if rows > 32 else max(16, triton.next_power_of_2(rows))
    tiles, groups = blocks(out_width, 64) * blocks(rows, BN), blocks(width, BLOCK)
    if rows > 64 and tiles >= 4 * PROCESSORS:
        wide, high = (
            blocks(blocks(rows, BN) * blocks(out_width, BO), 2 * PROCESSORS)
            for BN, BO in ((64, 128), (128, 64))
        )
        return how | {"BN": 64 if wide <= high else 128, "BO": 128 if wide <= high else 64, "STAGES": 4}
    split = 1  # of work for less than half the chip down to 4 runs of channels each; of more, to 16
    while (
        split < 8
        and tiles * split <= PROCESSORS
        and groups >= split * (8 if 2 * tiles * split <= PROCESSORS else 32)
    ):
        split *= 2
    how |= {"SPLIT": split, "BN": BN, "BO": 64, "FETCH": 512 if rows <= 32 and width >= 512 else 0}
    if rows <= 32:
        return how | {"STAGES": 4, "UNROLL": 2}
    return how | {"STAGES": 8 if tiles * split <= PROCESSORS else 6}  # one program a multiprocessor, or two


def fixed_plan(rows: int, out_width: int, width: int) -> dict[str, Any]:
    """The same where a row's bits may not depend on the number of rows: the weight on the tall side, and the channels
    split by the weight's shape alone."""
    tiles, groups, split = blocks(out_width, 64), blocks(width, BLOCK), 1
    while split < 8 and tiles * split <= PROCESSORS and groups >= 8 * split:
        split *= 2
    BN = 128 if rows > 64 else max(16, triton.next_power_of_2(rows))
    return {
        "SPLIT": split, "TALL": True, "BN": BN, "BO": 64, "STAGES": 4, "UNROLL": 1, "FETCH": 0, "num_warps": 4,
    }  # fmt: skip


def fixed(
    x_ND: Tensor, codes_OD: Tensor, scale: Tensor, bias: Tensor | None = None, pow2: bool = False
) -> Tensor:
    """`fast` for batch-invariant mode: `FIXED_ROWS` rows at a time, for each split leaves a sum a row in fp32."""
    out_width, width = codes_OD.shape
    parts = [
        fast(x, codes_OD, scale, bias, pow2, how=fixed_plan(x.shape[0], out_width, width))
        for x in x_ND.split(FIXED_ROWS)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def in_library(rows: int, out_width: int, width: int) -> bool:
    """Whether cuBLASLt takes the shape and is faster: where its tiles fill the chip. It reads the scales of a
    weight in fours along the width, whatever their stride says."""
    tiles = blocks(rows, 128) * blocks(out_width, 128)
    busy = tiles / (blocks(tiles, PROCESSORS) * PROCESSORS)
    return rows > 64 and out_width % 16 == 0 and width % (4 * BLOCK) == 0 and tiles >= 96 and busy > 0.55


def fast(
    x_ND: Tensor,
    codes_OD: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    pow2: bool = False,
    ahead: bool = False,
    how: dict[str, Any] | None = None,
    quantized: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """`reference` by the kernels above, blocks of 128x128. `how` replaces `plan`; `quantized` is x's codes and
    scales where they are at hand."""
    (rows, width), out_width = x_ND.shape, codes_OD.shape[0]
    how = how or plan(rows, out_width, width)
    # Of few rows the product is set up while they are quantised, whatever was before.
    chained = (
        rows <= (128 if "STEPS" in how else 64)
        and quantized is None
        and x_ND.is_cuda
        and torch.cuda.get_device_capability(x_ND.device)[0] >= 9
    )
    x, x_scale = quantized or quantize_fast(x_ND, pow2, ahead, followed=chained)
    if "STEPS" in how and not fp8_gluon.supported(x, codes_OD):
        how = plan(rows, out_width, width, gluon=False)
    launch = launching(chained or (ahead and x_ND.is_cuda))
    powers = scale.dtype == E8M0
    scale = scale.view(torch.uint8) if powers else scale
    y = x_ND.new_empty(rows, out_width)
    if how.get("FEW"):
        few[(triton.cdiv(out_width, how["BO"]),)](
            x, x_scale, codes_OD, scale, bias, y, out_width, x.stride(0), x_scale.stride(0), x_scale.stride(1),
            codes_OD.stride(0), scale.stride(0), y.stride(0), D=width, N=rows, NP=triton.next_power_of_2(rows),
            BO=how["BO"], GROUPS=triton.next_power_of_2(x_scale.shape[1]), POWERS=powers, BIAS=bias is not None,
            num_warps=how["num_warps"], **launch,
        )  # fmt: skip
        return y
    split = width // BLOCK // how["STEPS"] if "STEPS" in how else how["SPLIT"]
    part = y if split == 1 else torch.empty(split, rows, out_width, dtype=torch.float32, device=y.device)
    if "STEPS" in how:
        launch = launching(True)
        first = bias if split == 1 else None
        fp8_gluon.product(x, x_scale, codes_OD, scale, first, part, how, early=chained or ahead)
    else:
        product[(triton.cdiv(rows, how["BN"]) * triton.cdiv(out_width, how["BO"]), split)](
            x, x_scale, codes_OD, scale, bias, part, rows, out_width,
            x.stride(0), x_scale.stride(0), x_scale.stride(1), codes_OD.stride(0), scale.stride(0),
            part.stride(-2), part.stride(0) if split > 1 else 0,
            D=width, BAND=BAND, POWERS=powers, BIAS=bias is not None and split == 1, **how, **launch,
        )  # fmt: skip
    if split > 1:
        add_parts[(triton.cdiv(out_width, 256), rows)](
            part, bias, None, y, out_width, part.stride(0), part.stride(1), 0, y.stride(0),
            SPLIT=split, BO=256, BIAS=bias is not None, RESIDUAL=False, num_warps=2, **launch,
        )  # fmt: skip
    return y


def library(
    x_ND: Tensor,
    codes_OD: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    pow2: bool = False,
    quantized: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """`reference` by cuBLASLt where `in_library`; it wants rows in fours."""
    codes, x_scale = quantized or quantize_fast(x_ND, pow2)
    room = x_scale.stride(1)
    codes = codes.as_strided((room, codes.shape[1]), codes.stride())
    x_scale = x_scale.as_strided((room, x_scale.shape[1]), x_scale.stride())
    y = torch._scaled_mm(codes, codes_OD.t(), x_scale, scale.float().t(), out_dtype=torch.bfloat16)
    return y[: x_ND.shape[0]] if bias is None else y[: x_ND.shape[0]] + bias


def fp8_linear(
    x_ND: Tensor,
    codes_OD: Tensor,
    scale: Tensor,
    block: tuple[int, int] = (BLOCK, BLOCK),
    bias: Tensor | None = None,
    pow2: bool = False,
    ahead: bool = False,
) -> Tensor:
    """x `[N, D]` through a weight of E4M3 codes `[O, D]` and scales `[ceil(O / 128), ceil(D / 128)]` (fp32 or
    float8_e8m0fnu): `[N, O]` in x's dtype. x is quantised in runs of 128 channels, `pow2` as `quantize_rows`.

    `ahead` as for `rorqual.kernels.skinny.skinny`. Raises QuantError (off the GPU) on scales of another shape.
    """
    if (
        usable(x_ND, codes_OD)
        and tuple(block) == (BLOCK, BLOCK)
        and x_ND.shape[0] > 0
        and x_ND.dtype in (torch.bfloat16, torch.float32)
        and x_ND.stride(1) == codes_OD.stride(1) == scale.stride(1) == 1
    ):
        if by_fixed_kernels(x_ND):
            return fixed(x_ND, codes_OD, scale, bias, pow2)
        peer = peers.fp8_linear(x_ND, codes_OD, scale, bias, partial(quantize_fast, pow2=pow2))
        if peer is not None:
            return peer
        whole = x_ND.is_cuda and x_ND.dtype == torch.bfloat16 and scale.is_contiguous()
        if whole and in_library(x_ND.shape[0], *codes_OD.shape):
            return library(x_ND, codes_OD, scale, bias, pow2)
        return fast(x_ND, codes_OD, scale, bias, pow2, ahead)
    return reference(x_ND, codes_OD, scale, block, bias, pow2)
