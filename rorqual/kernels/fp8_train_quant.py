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

import functools
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

WARPS, REGISTERS = 8, 128
"""Warps of a program that quantises 128x128, and registers of a thread at most."""

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

    @property
    def words(self) -> Tensor:
        """The codes in fours."""
        return self.codes.view(torch.int32)


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
def reciprocal(x, ASM: tl.constexpr):
    """1 / x to an ulp or two; with ASM in one instruction where a division takes eight."""
    if ASM:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / x


@triton.jit
def scale_of(amax, FLOOR: tl.constexpr, POWERS: tl.constexpr, ASM: tl.constexpr):
    """amax / 448, floored, with POWERS the next power of two; and its reciprocal, to an ulp or two."""
    amax = tl.maximum(amax, FLOOR)
    by = amax * (1.0 / 448.0)
    by = tl.fma(tl.fma(by, -448.0, amax), 1.0 / 448.0, by)  # what was left over: now it is rounded correctly
    if POWERS:  # any bit of the fraction carries into the exponent
        exponent = (by.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000
        return exponent.to(tl.float32, bitcast=True), (0x7F000000 - exponent).to(tl.float32, bitcast=True)
    return by, reciprocal(by, ASM)


@triton.jit
def quotient(values, by, over, POWERS: tl.constexpr):
    """values / by, rounded correctly: by the reciprocal, and once what is left over (nothing is if by is a power of
    two). It can't exceed 448 by more than rounding."""
    ratio = values * over
    if not POWERS:
        ratio = tl.fma(tl.fma(ratio, -by, values), over, ratio)
    return ratio


@triton.jit
def store_runs(values, n, d, codes, c_row, FLOOR: tl.constexpr, POWERS: tl.constexpr, ASM: tl.constexpr):
    """Codes of tokens n and 128 channels d, in runs of channels; gives their scales."""
    by, over = scale_of(tl.max(tl.abs(values), 1), FLOOR, POWERS, ASM)
    code = quotient(values, by[:, None], over[:, None], POWERS).to(tl.float8e4nv)
    tl.store(codes + n.to(tl.int64)[:, None] * c_row + d[None, :], code)
    return by


@triton.jit
def store_fours(b0, b1, b2, b3, to):
    """128 numbers, of which b0 has every fourth, b1 those after them, and so on."""
    joined = tl.reshape(tl.join(tl.join(b0, b2), tl.join(b1, b3)), (128,))
    tl.store(to + tl.arange(0, 128), joined)


@triton.jit
def store_four_runs(
    v0, v1, v2, v3, n, d, tile, column, codes, scale, c_row, s_group, FLOOR: tl.constexpr, POWERS: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """Codes and scales of 128 tokens: v0 has every fourth token n, v1 those after them, and so on. Channels d are
    those of tile number `column`."""
    b0 = store_runs(v0, n, d, codes, c_row, FLOOR, POWERS, ASM)
    b1 = store_runs(v1, n + 1, d, codes, c_row, FLOOR, POWERS, ASM)
    b2 = store_runs(v2, n + 2, d, codes, c_row, FLOOR, POWERS, ASM)
    b3 = store_runs(v3, n + 3, d, codes, c_row, FLOOR, POWERS, ASM)
    store_fours(b0, b1, b2, b3, scale + column * s_group.to(tl.int64) + tile * 128)


@triton.jit
def bits(ratio):
    return ratio.to(tl.float8e4nv).to(tl.uint8, bitcast=True).to(tl.uint32)


@triton.jit
def four_codes(r0, r1, r2, r3, ASM: tl.constexpr):
    """The codes of four numbers in a word, the first one's lowest; with ASM in three instructions."""
    if ASM:
        return tl.inline_asm_elementwise(
            """{
            .reg .b16 low, high;
            cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
            cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
            mov.b32 $0, {low, high};
            }""",
            "=r,f,f,f,f", [r0, r1, r2, r3], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        word = bits(r0) | (bits(r1) << 8) | (bits(r2) << 16) | (bits(r3) << 24)
        return word.to(tl.int32, bitcast=True)


@triton.jit
def store_turned(
    v0, v1, v2, v3, n, d, tile, words, t_scale, t_row, t_group, FLOOR: tl.constexpr, POWERS: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """Codes and scales of the transpose of 128 tokens, those of tile number `tile`, and 128 channels d, in runs of
    tokens. v0 has every fourth token n, v1 those after them, and so on: a thread has the codes of four tokens in a row
    and moves them as one word, where single bytes would take most of the time. `words` are the codes in fours, t_row
    their number in a row."""
    amax = tl.maximum(tl.maximum(tl.abs(v0), tl.abs(v1)), tl.maximum(tl.abs(v2), tl.abs(v3)))
    by, over = scale_of(tl.max(amax, 0), FLOOR, POWERS, ASM)
    by_1, over_1 = by[None, :], over[None, :]
    r0, r1 = quotient(v0, by_1, over_1, POWERS), quotient(v1, by_1, over_1, POWERS)
    r2, r3 = quotient(v2, by_1, over_1, POWERS), quotient(v3, by_1, over_1, POWERS)
    word = four_codes(r0, r1, r2, r3, ASM)
    tl.store(words + d.to(tl.int64)[None, :] * t_row + (n // 4)[:, None], word)
    tl.store(t_scale + tile * t_group.to(tl.int64) + d, by)


@triton.jit
def place():
    """A program's tile of tokens and tile of channels, every fourth of its tokens, and its channels. All tokens of some
    channels come before the next channels: what several places read of a token is still in the cache."""
    tile, column = tl.program_id(0), tl.program_id(1)
    return tile, column, tile * 128 + 4 * tl.arange(0, 32), column * 128 + tl.arange(0, 128)


@triton.jit
def fetch(x, pair, n, d, rows, width, x_row, K: tl.constexpr, EVEN: tl.constexpr):
    """Rows n of x in fp32; with K > 0 the tokens of the pairs at places n, zeros where a pair is below 0."""
    row = n.to(tl.int64)
    if K > 0:
        which = tl.load(pair + n).to(tl.int32)
        row = (which // K).to(tl.int64)
        there = (which >= 0)[:, None] & (d < width)[None, :]
        return tl.load(x + row[:, None] * x_row + d[None, :], mask=there, other=0.0).to(tl.float32)
    at = x + row[:, None] * x_row + d[None, :]
    if EVEN:
        return tl.load(at).to(tl.float32)
    return tl.load(at, mask=(n < rows)[:, None] & (d < width)[None, :], other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["rows"])
def quantize_rows_kernel(
    x, pair, codes, scale, words, t_scale, end, rows, width, x_row, c_row, s_group, t_row, t_group,
    FLOOR: tl.constexpr, POWERS: tl.constexpr, BOTH: tl.constexpr, ENDS: tl.constexpr, EVEN: tl.constexpr,
    K: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """A tile of 128 rows and channels a program. ENDS: rows from the number at `end` on are left out."""
    tile, column, n, d = place()
    if tile * 128 >= (tl.load(end) if ENDS else rows):
        return
    v0 = fetch(x, pair, n, d, rows, width, x_row, K, EVEN)
    v1 = fetch(x, pair, n + 1, d, rows, width, x_row, K, EVEN)
    v2 = fetch(x, pair, n + 2, d, rows, width, x_row, K, EVEN)
    v3 = fetch(x, pair, n + 3, d, rows, width, x_row, K, EVEN)
    store_four_runs(v0, v1, v2, v3, n, d, tile, column, codes, scale, c_row, s_group, FLOOR, POWERS, ASM)
    if BOTH:
        store_turned(v0, v1, v2, v3, n, d, tile, words, t_scale, t_row, t_group, FLOOR, POWERS, ASM)


def by_words(x: Tensor) -> bool:
    """Whether x's device has the instructions that `four_codes` asks for: Nvidia's with FP8."""
    return x.is_cuda and torch.version.cuda is not None and _capability(x.device) >= (8, 9)


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


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
    pair_P: Tensor | None = None,
    chosen: int = 0,
) -> tuple[Codes, Codes | None]:
    """`quantize_both` or, with pairs, `spread_both`, or without `both` their first halves, by the kernel above."""
    width = x_ND.shape[1]
    rows = x_ND.shape[0] if pair_P is None else len(pair_P)
    full = room(rows), room(width)
    along = empty_codes(*full, x_ND)
    turned = empty_codes(full[1], full[0], x_ND) if both else along
    quantize_rows_kernel[(full[0] // BLOCK, full[1] // BLOCK)](
        x_ND, x_ND if pair_P is None else pair_P, along.codes, along.scale, turned.words, turned.scale,
        x_ND if end is None else end, rows, width, x_ND.stride(0), along.codes.stride(0), along.scale.stride(1),
        turned.codes.stride(0) // 4, turned.scale.stride(1), FLOOR=floor, POWERS=pow2, BOTH=both,
        ENDS=end is not None, EVEN=(rows, width) == full, K=chosen, ASM=by_words(x_ND),
        num_warps=WARPS, maxnreg=REGISTERS,
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


def spread_reference(
    x_ND: Tensor, pair_P: Tensor, chosen: int, pow2: bool = False, floor: float = FP8_FLOOR
) -> tuple[Codes, Codes]:
    """`spread_both` in PyTorch."""
    x_PD = x_ND[pair_P.clamp(min=0) // chosen].masked_fill((pair_P < 0)[:, None], 0)
    return rows_reference(x_PD, pow2, floor)


def spread_both(
    x_ND: Tensor,
    pair_P: Tensor,
    chosen: int,
    pow2: bool = False,
    floor: float = FP8_FLOOR,
    end: Tensor | None = None,
) -> tuple[Codes, Codes]:
    """`quantize_both` of x's rows at the places of pairs (token * `chosen` + choice; below 0: a row of zeros), P a
    multiple of 128, without writing those rows: codes `[P, D']` and `[D', P]`. `end` counts places."""
    if not _takes(x_ND):
        return spread_reference(x_ND, pair_P, chosen, pow2, floor)
    along, turned = rows_fast(x_ND, pow2, floor, end, True, pair_P, chosen)
    assert turned is not None
    return along, turned


# --------------------------------------------------------------------------------------------- weights


@triton.jit
def quantize_matrices_kernel(
    w, codes, scale, turned, t_scale, width, w_matrix, w_row, c_matrix, c_row, s_matrix, s_row,
    t_matrix, t_row, u_matrix, u_row, FLOOR: tl.constexpr, POWERS: tl.constexpr,
):  # fmt: skip
    """A block of 128x128 a program: its codes as they lie, and transposed."""
    across = tl.cdiv(width, 128)
    down, column = tl.program_id(0) // across, tl.program_id(0) % across
    matrix = tl.program_id(1).to(tl.int64)
    o = down * 128 + tl.arange(0, 128)
    d = column * 128 + tl.arange(0, 128)
    at = w + matrix * w_matrix + o.to(tl.int64)[:, None] * w_row + d[None, :]
    values = tl.load(at).to(tl.float32)
    by, over = scale_of(tl.max(tl.max(tl.abs(values), 1), 0), FLOOR, POWERS, False)
    code = quotient(values, by, over, POWERS).to(tl.float8e4nv)
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
    if _takes(w_EOD) and w_EOD.element_size() == 2 and out % BLOCK == 0 and width % BLOCK == 0:
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
    """The same by the kernel above, both ways, of 16-bit weights in whole blocks. (Of fp32 ones Triton 3.6 turns codes
    instead of numbers, and loses every second one on a GPU.)"""
    count, _, width = w_EOD.shape
    quantize_matrices_kernel[(codes.shape[1] * codes.shape[2] // BLOCK**2, count)](
        w_EOD, codes, scale, turned, t_scale, width, *w_EOD.stride()[:2], *codes.stride()[:2],
        *scale.stride()[:2], *turned.stride()[:2], *t_scale.stride()[:2],
        FLOOR=FP8_FLOOR, POWERS=pow2, num_warps=8,
    )  # fmt: skip
