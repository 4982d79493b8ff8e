"""The codes that FP8 training multiplies (V3 report section 3.3; facts 3.5).

A product adds up along one axis, and both its sides have their scales along that axis. So rows are quantised twice,
in one pass over memory: in runs of 128 channels for products that add up channels (forward, and the gradient of the
input), and transposed, in runs of 128 tokens of a channel, for the gradient of the weight. Weights have blocks of
128x128, whose codes serve both ways; the tensor cores want them transposed in memory, too.

Whatever is quantised is filled up with zeros to multiples of 128 both ways. Where rows lie by expert, every expert's
begin at a multiple of 128, so no run of tokens belongs to two.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rorqual.kernels.gpu import tl, triton, usable
from rorqual.kernels.quant import (
    FP8,
    FP8_FLOOR,
    FP8_MAX,
    QuantError,
    block_amax,
    blocks,
    ceil_power_of_two,
    encode_fp8,
)

BLOCK = 128
"""Channels, tokens and weight rows that share a scale."""

GRADIENT_FLOOR = 1e-20
"""Smallest amax a gradient is scaled by: no gradient meets it but zeros. (Of a mean loss over many tokens all are
below the 1e-4 of activations, and would lose bits to it.)"""

WARPS = 8
"""Of a program that quantises 128x128."""

KINDS = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Codes:
    """E4M3 codes `[R, C]`, both multiples of 128, and fp32 scales `[R, C / 128]` of runs of 128 along C, which lie
    rows side by side (stride 1 along R)."""

    codes: Tensor
    scale: Tensor

    def rows(self, first: int, end: int) -> Codes:
        """Those of rows `first` to `end`."""
        return Codes(self.codes[first:end], self.scale[first:end])


@dataclass(frozen=True)
class Matrices:
    """Weights `[E, O, D]` as E4M3 codes, O and D multiples of 128, with fp32 scales `[E, O / 128, D / 128]`."""

    codes: Tensor
    scale: Tensor


def room(size: int) -> int:
    """`size` rounded up to a multiple of 128."""
    return blocks(size, BLOCK) * BLOCK


def empty_codes(rows: int, width: int, like: Tensor) -> Codes:
    codes = torch.empty(rows, width, dtype=FP8, device=like.device)
    return Codes(codes, torch.empty(width // BLOCK, rows, dtype=torch.float32, device=like.device).t())


# ------------------------------------------------------------------------------------------------ rows


@triton.jit
def scale_of(amax, FLOOR: tl.constexpr, POWERS: tl.constexpr):
    """amax / 448, floored, with POWERS the next power of two; and its reciprocal."""
    by = tl.div_rn(tl.maximum(amax, FLOOR), 448.0)
    if POWERS:  # any bit of the fraction carries into the exponent
        by = ((by.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
    return by, tl.div_rn(1.0, by)


@triton.jit
def encode(values, by, over):
    """values / by, rounded correctly, as codes: a quotient by the reciprocal, and once what is left over. It can't
    exceed 448 by more than rounding."""
    ratio = values * over
    return tl.fma(tl.fma(-ratio, by, values), over, ratio).to(tl.float8e4nv)


@triton.jit
def store_runs(values, n, d, codes, scale, c_row, s_group, FLOOR: tl.constexpr, POWERS: tl.constexpr):
    """Codes and scales of a tile [128 tokens n, 128 channels d], in runs of channels."""
    by, over = scale_of(tl.max(tl.abs(values), 1), FLOOR, POWERS)
    tl.store(codes + n.to(tl.int64)[:, None] * c_row + d[None, :], encode(values, by[:, None], over[:, None]))
    tl.store(scale + tl.min(d, 0) // 128 * s_group.to(tl.int64) + n, by)


@triton.jit
def store_turned(values, n, d, turned, t_scale, t_row, t_group, FLOOR: tl.constexpr, POWERS: tl.constexpr):
    """Codes and scales of the transpose of a tile [128 tokens n, 128 channels d], in runs of tokens."""
    by, over = scale_of(tl.max(tl.abs(values), 0), FLOOR, POWERS)
    code = encode(values, by[None, :], over[None, :])
    tl.store(turned + d.to(tl.int64)[None, :] * t_row + n[:, None], code)
    tl.store(t_scale + tl.min(n, 0) // 128 * t_group.to(tl.int64) + d, by)


@triton.jit(do_not_specialize=["rows"])
def rows_kernel(
    x, codes, scale, turned, t_scale, end, rows, width, x_row, c_row, s_group, t_row, t_group,
    FLOOR: tl.constexpr, POWERS: tl.constexpr, BOTH: tl.constexpr, ENDS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """A tile of 128 rows and channels a program. ENDS: rows from the number at `end` on are left out."""
    n = tl.program_id(0) * 128 + tl.arange(0, 128)
    d = tl.program_id(1) * 128 + tl.arange(0, 128)
    if tl.program_id(0) * 128 >= (tl.load(end) if ENDS else rows):
        return
    at = x + n.to(tl.int64)[:, None] * x_row + d[None, :]
    if EVEN:
        values = tl.load(at).to(tl.float32)
    else:
        values = tl.load(at, mask=(n < rows)[:, None] & (d < width)[None, :], other=0.0).to(tl.float32)
    store_runs(values, n, d, codes, scale, c_row, s_group, FLOOR, POWERS)
    if BOTH:
        store_turned(values, n, d, turned, t_scale, t_row, t_group, FLOOR, POWERS)


def quantize_runs(x: Tensor, block: tuple[int, int], pow2: bool, floor: float) -> tuple[Tensor, Tensor]:
    """x `[..., R, C]` -> codes and fp32 scales of its blocks, by the rules of `rorqual.kernels.quant`."""
    scale = block_amax(x.abs().float(), block).clamp(min=floor) / FP8_MAX
    scale = ceil_power_of_two(scale) if pow2 else scale
    return encode_fp8(x.float(), scale, block), scale


def rows_reference(
    x_ND: Tensor, pow2: bool = False, floor: float = FP8_FLOOR, end: Tensor | None = None
) -> tuple[Codes, Codes]:
    """`quantize_both` in PyTorch. Rows from `end` on count as zero."""
    rows, width = x_ND.shape
    if end is not None:
        x_ND = x_ND.masked_fill((torch.arange(rows, device=x_ND.device) >= end)[:, None], 0)
    x_ND = F.pad(x_ND, (0, room(width) - width, 0, room(rows) - rows))
    found = [quantize_runs(x, (1, BLOCK), pow2, floor) for x in (x_ND, x_ND.t().contiguous())]
    along, turned = (Codes(codes, scale.t().contiguous().t()) for codes, scale in found)
    return along, turned


def rows_fast(
    x_ND: Tensor,
    pow2: bool = False,
    floor: float = FP8_FLOOR,
    end: Tensor | None = None,
    both: bool = True,
) -> tuple[Codes, Codes | None]:
    """`quantize_both`, or without `both` its first half, by the kernel above."""
    (rows, width), full = x_ND.shape, (room(x_ND.shape[0]), room(x_ND.shape[1]))
    along = empty_codes(*full, x_ND)
    turned = empty_codes(full[1], full[0], x_ND) if both else along
    rows_kernel[(full[0] // BLOCK, full[1] // BLOCK)](
        x_ND, along.codes, along.scale, turned.codes, turned.scale, x_ND if end is None else end, rows, width,
        x_ND.stride(0), along.codes.stride(0), along.scale.stride(1), turned.codes.stride(0), turned.scale.stride(1),
        FLOOR=floor, POWERS=pow2, BOTH=both, ENDS=end is not None, EVEN=(rows, width) == full, num_warps=WARPS,
    )  # fmt: skip
    return along, turned if both else None


def _takes(x: Tensor) -> bool:
    return usable(x) and x.stride(-1) == 1 and x.numel() > 0 and x.dtype in KINDS


def quantize_both(
    x_ND: Tensor, pow2: bool = False, floor: float = FP8_FLOOR, end: Tensor | None = None
) -> tuple[Codes, Codes]:
    """x `[N, D]` -> its codes `[N', D']` in runs of 128 channels, and those of its transpose `[D', N']` in runs of 128
    tokens; N' and D' are the next multiples of 128.

    scale = max(amax, floor) / 448, with `pow2` the next power of two. Rows from `end` (one int32 on x's device, a
    multiple of 128) on are not looked at, and what stands there is undefined.
    """
    if not _takes(x_ND):
        return rows_reference(x_ND, pow2, floor, end)
    along, turned = rows_fast(x_ND, pow2, floor, end)
    assert turned is not None
    return along, turned


def quantize_along(
    x_ND: Tensor, pow2: bool = False, floor: float = FP8_FLOOR, end: Tensor | None = None
) -> Codes:
    """The first half of `quantize_both`."""
    if not _takes(x_ND):
        return rows_reference(x_ND, pow2, floor, end)[0]
    return rows_fast(x_ND, pow2, floor, end, both=False)[0]


# --------------------------------------------------------------------------------------------- weights


@triton.jit
def matrices_kernel(
    w, codes, scale, turned, t_scale, out, width, w_matrix, w_row, c_matrix, c_row, s_matrix, s_row,
    t_matrix, t_row, u_matrix, u_row, FLOOR: tl.constexpr, POWERS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """A block of 128x128 a program: its codes as they lie, and transposed."""
    across = tl.cdiv(width, 128)
    down, column = tl.program_id(0) // across, tl.program_id(0) % across
    matrix = tl.program_id(1).to(tl.int64)
    o = down * 128 + tl.arange(0, 128)
    d = column * 128 + tl.arange(0, 128)
    at = w + matrix * w_matrix + o.to(tl.int64)[:, None] * w_row + d[None, :]
    if EVEN:
        values = tl.load(at).to(tl.float32)
    else:
        values = tl.load(at, mask=(o < out)[:, None] & (d < width)[None, :], other=0.0).to(tl.float32)
    by, over = scale_of(tl.max(tl.max(tl.abs(values), 1), 0), FLOOR, POWERS)
    code = encode(values, by, over)
    tl.store(codes + matrix * c_matrix + o.to(tl.int64)[:, None] * c_row + d[None, :], code)
    tl.store(turned + matrix * t_matrix + d.to(tl.int64)[None, :] * t_row + o[:, None], code)
    tl.store(scale + matrix * s_matrix + down * s_row + column, by)
    tl.store(t_scale + matrix * u_matrix + column * u_row + down, by)


def empty_matrices(count: int, out: int, width: int, device: torch.device) -> tuple[Matrices, Matrices]:
    """Room for weights `[E, O, D]` filled up to multiples of 128, and for their transposes."""
    shape = room(out), room(width)
    found = []
    for rows, columns in (shape, shape[::-1]):
        codes = torch.empty(count, rows, columns, dtype=FP8, device=device)
        scale = torch.empty(count, rows // BLOCK, columns // BLOCK, dtype=torch.float32, device=device)
        found.append(Matrices(codes, scale))
    return found[0], found[1]


def quantize_matrices(
    w_EOD: Tensor, into: tuple[Matrices, Matrices], first: int = 0, pow2: bool = False
) -> None:
    """Write the codes of weights `[E, O, D]`, blocks of 128x128, as they are and transposed, filled up with zeros to
    multiples of 128, into matrices of `empty_matrices`, from row `first` (column, of the transposes) on. Raises
    QuantError where they don't fit."""
    count, out, width = w_EOD.shape
    codes, scale = into[0].codes[:, first : first + room(out)], into[0].scale[:, first // BLOCK :]
    turned, t_scale = into[1].codes[..., first : first + room(out)], into[1].scale[..., first // BLOCK :]
    if codes.shape != (count, room(out), room(width)) or first % BLOCK:
        raise QuantError(
            f"weights {tuple(w_EOD.shape)} do not fit from row {first} on into {tuple(into[0].codes.shape)}"
        )
    if _takes(w_EOD):
        matrices_fast(w_EOD, codes, scale, turned, t_scale, pow2)
        return
    found, by = matrices_reference(w_EOD, pow2)
    codes.copy_(found)
    turned.copy_(found.transpose(1, 2))
    scale[:, : by.shape[1]].copy_(by)
    t_scale[..., : by.shape[1]].copy_(by.transpose(1, 2))


def matrices_reference(w_EOD: Tensor, pow2: bool = False) -> tuple[Tensor, Tensor]:
    """Codes `[E, O', D']` and scales of weights, in PyTorch."""
    out, width = w_EOD.shape[1:]
    filled = F.pad(w_EOD, (0, room(width) - width, 0, room(out) - out))
    return quantize_runs(filled, (BLOCK, BLOCK), pow2, FP8_FLOOR)


def matrices_fast(
    w_EOD: Tensor, codes: Tensor, scale: Tensor, turned: Tensor, t_scale: Tensor, pow2: bool = False
) -> None:
    """The same by the kernel above, both ways."""
    count, out, width = w_EOD.shape
    matrices_kernel[(codes.shape[1] * codes.shape[2] // BLOCK**2, count)](
        w_EOD, codes, scale, turned, t_scale, out, width, *w_EOD.stride()[:2], *codes.stride()[:2],
        *scale.stride()[:2], *turned.stride()[:2], *t_scale.stride()[:2],
        FLOOR=FP8_FLOOR, POWERS=pow2, EVEN=(out, width) == codes.shape[1:], num_warps=WARPS,
    )  # fmt: skip
