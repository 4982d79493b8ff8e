"""The number formats of the released checkpoints: FP8 E4M3 in blocks, FP4 E2M1 in rows of 32
(facts 3.5, 3.9).

Plain PyTorch, and the definition that faster forms are held to. Shapes: a matrix is `[..., R, C]`, out by
in, any leading axes (stacked experts). FP8 has one scale a block of `br` rows and `bc` columns, so its
scales are `[..., ceil(R / br), ceil(C / bc)]`; the last block of an axis may be ragged. FP4 has one scale
for every 32 inputs, `[..., R, C / 32]`, and keeps two codes a byte, `[..., R, C / 2]` int8, the low nibble
first. Scales multiply, whatever the hub calls them (`weight_scale_inv`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

FP8 = torch.float8_e4m3fn
E8M0 = torch.float8_e8m0fnu
FP8_MAX = 448.0
FP8_FLOOR = 1e-4
"""Smallest amax an FP8 block is scaled by (facts 3.5)."""
FP4_MAX = 6.0
FP4_FLOOR = FP4_MAX * 2.0**-126
FP4_BLOCK = 32
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitude of each E2M1 code; bit 3 is the sign."""


class QuantError(ValueError):
    """Codes, scales and blocks that do not belong together, or a cast that would not be exact."""


def blocks(size: int, block: int) -> int:
    """How many blocks cover an axis, the last one perhaps ragged."""
    return -(-size // block)


def ceil_power_of_two(x: Tensor) -> Tensor:
    """2^ceil(log2(x)) for x > 0, exactly, in fp32 (log2 itself rounds near a power of two). NaN and infinity
    stay."""
    x = x.float()
    mantissa, exponent = torch.frexp(x)
    power = torch.ldexp(torch.ones_like(mantissa), exponent - (mantissa == 0.5).to(exponent.dtype))
    return torch.where(x.isfinite(), power, x)


def _check_scale(codes: Tensor, scale: Tensor, block: tuple[int, int]) -> None:
    *lead, rows, columns = codes.shape
    expected = (*lead, blocks(rows, block[0]), blocks(columns, block[1]))
    if tuple(scale.shape) != expected:
        raise QuantError(
            f"codes {tuple(codes.shape)} in {block} blocks need scales {expected}, got {tuple(scale.shape)}"
        )


def _blockwise(
    values: Tensor, scale: Tensor, block: tuple[int, int], operation: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """`values` [..., R, C] times (`Tensor.mul_`) or over (`Tensor.div_`) the scale of its block, in place.

    The scale is spread over rows only (R x C/bc numbers); along columns it is broadcast, the whole blocks
    first and then the ragged rest.
    """
    rows, columns = values.shape[-2:]
    if block[0] > 1:
        scale = scale.repeat_interleave(block[0], -2)[..., :rows, :]
    whole = columns // block[1]
    if whole:
        operation(values[..., : whole * block[1]].unflatten(-1, (whole, block[1])), scale[..., :whole, None])
    if whole * block[1] < columns:
        operation(values[..., whole * block[1] :], scale[..., whole:])
    return values


def block_amax(magnitudes: Tensor, block: tuple[int, int]) -> Tensor:
    """Largest entry of each block of non-negative `magnitudes` [..., R, C]: `[..., R / br, C / bc]`."""
    rows, columns = magnitudes.shape[-2:]
    down, across = blocks(rows, block[0]), blocks(columns, block[1])
    padding = (0, across * block[1] - columns, 0, down * block[0] - rows)
    if any(padding):
        magnitudes = F.pad(magnitudes, padding)
    return magnitudes.unflatten(-1, (across, block[1])).amax(-1).unflatten(-2, (down, block[0])).amax(-2)


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


# ------------------------------------------------------------------------------------------------ FP8


def dequantize_fp8(codes: Tensor, scale: Tensor, block: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """codes `[..., R, C]` float8_e4m3fn times scale `[..., R/br, C/bc]` (fp32 or float8_e8m0fnu) -> `dtype`.

    The product is taken in fp32 (fp64 if asked) and rounded once. Raises QuantError on a wrong scale shape.
    """
    _check_scale(codes, scale, block)
    compute = _compute_dtype(dtype)
    return _blockwise(decode_fp8(codes, compute), scale.to(compute), block, Tensor.mul_).to(dtype)


def decode_fp8(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """The E4M3 values themselves, unscaled. On the CPU by a table of the 256 codes: four times as fast as
    PyTorch's own cast."""
    if codes.device.type != "cpu":
        return codes.to(dtype)
    table = torch.arange(256, dtype=torch.uint8).view(FP8).to(dtype)
    return table.index_select(0, codes.reshape(-1).view(torch.uint8).int()).view(codes.shape)


def fp8_scale(w: Tensor, block: tuple[int, int], ue8m0: bool = False) -> Tensor:
    """fp32 scale of each block of `w` [..., R, C]: amax / 448, or the next power of two if `ue8m0`."""
    scale = block_amax(w.abs().float(), block).clamp(min=FP8_FLOOR) / FP8_MAX
    return ceil_power_of_two(scale) if ue8m0 else scale


def encode_fp8(w: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """Codes of `w` [..., R, C] under given scales: w / scale, clamped to +-448, rounded to nearest even."""
    _check_scale(w, scale, block)
    compute = _compute_dtype(w.dtype)
    # Dividing, not multiplying by 1 / scale: a held product code * scale must find its code again.
    ratio = _blockwise(w.to(compute, copy=True), scale.to(compute), block, Tensor.div_)
    return ratio.clamp_(-FP8_MAX, FP8_MAX).to(FP8)


def quantize_fp8(
    w: Tensor,
    block: tuple[int, int] = (128, 128),
    ue8m0: bool = False,
    scale_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """`w` [..., R, C] -> E4M3 codes of its shape and scales `[..., R/br, C/bc]` (facts 3.5).

    `ue8m0` makes the scales powers of two; they may then be kept as float8_e8m0fnu.
    """
    if scale_dtype == E8M0 and not ue8m0:
        raise QuantError("float8_e8m0fnu holds powers of two only: ask for ue8m0 scales")
    scale = fp8_scale(w, block, ue8m0)
    return encode_fp8(w, scale, block), scale.to(scale_dtype)


# ------------------------------------------------------------------------------------------------ FP4


def pack_fp4(codes: Tensor) -> Tensor:
    """E2M1 codes 0..15 `[..., C]` -> `[..., C / 2]` int8, the even input in the low nibble."""
    if codes.shape[-1] % 2:
        raise QuantError(f"two FP4 codes share a byte: {codes.shape[-1]} inputs can't be packed")
    codes = codes.to(torch.uint8)
    return (codes[..., 0::2] | (codes[..., 1::2] << 4)).view(torch.int8)


def unpack_fp4(packed: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """`[..., C / 2]` packed bytes -> the E2M1 values `[..., C]`, unscaled. Exact in every float type."""
    single = torch.tensor((*FP4_VALUES, *(-v for v in FP4_VALUES)), dtype=dtype, device=packed.device)
    byte = torch.arange(256, device=packed.device)
    pairs = torch.stack((single[byte % 16], single[byte // 16]), -1)
    return F.embedding(packed.view(torch.uint8).int(), pairs).flatten(-2)


def dequantize_fp4(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Packed codes `[..., R, C/2]` times scale `[..., R, C/32]` (fp32 or float8_e8m0fnu) -> `[..., R, C]`.

    Exact in bf16 and wider when the scales are powers of two. Raises QuantError on a wrong scale shape.
    """
    *lead, half = codes.shape
    if tuple(scale.shape) != (*lead, blocks(2 * half, FP4_BLOCK)):
        raise QuantError(
            f"packed codes {tuple(codes.shape)} need scales {(*lead, blocks(2 * half, FP4_BLOCK))}, "
            f"got {tuple(scale.shape)}"
        )
    exact = scale.dtype == E8M0 and dtype == torch.bfloat16
    compute = dtype if exact else _compute_dtype(dtype)
    return _blockwise(unpack_fp4(codes, compute), scale.to(compute), (1, FP4_BLOCK), Tensor.mul_).to(dtype)


def fp4_scale(w: Tensor) -> Tensor:
    """fp32 power-of-two scale of every 32 inputs of `w` [..., C]: 2^ceil(log2(amax / 6))."""
    return ceil_power_of_two(block_amax(w.abs().float(), (1, FP4_BLOCK)).clamp(min=FP4_FLOOR) / FP4_MAX)


def encode_fp4(w: Tensor, scale: Tensor) -> Tensor:
    """Packed codes of `w` [..., R, C] under given scales, rounded to nearest, halfway to the even code."""
    compute = _compute_dtype(w.dtype)
    ratio = _blockwise(w.to(compute, copy=True), scale.to(compute), (1, FP4_BLOCK), Tensor.div_)
    size = ratio.abs()
    # Neighbours lie 1/2 apart below 2, 1 apart below 4, then 2; torch.round goes to even, as do the codes.
    code = torch.where(
        size < 2, (2 * size).round(), torch.where(size < 4, size.round() + 2, (size / 2).round() + 4)
    )
    return pack_fp4(code.clamp_(max=7).to(torch.uint8) | (ratio.signbit().to(torch.uint8) << 3))


def quantize_fp4(w: Tensor, scale_dtype: torch.dtype = E8M0) -> tuple[Tensor, Tensor]:
    """`w` [..., R, C] -> packed E2M1 `[..., R, C/2]` int8 and power-of-two scales `[..., R, C/32]`."""
    if w.shape[-1] % FP4_BLOCK:
        raise QuantError(f"FP4 shares a scale among {FP4_BLOCK} inputs: {w.shape[-1]} is not a multiple")
    scale = fp4_scale(w)
    return encode_fp4(w, scale), scale.to(scale_dtype)


def recast_fp4(codes: Tensor, scale: Tensor, block: tuple[int, int] = (128, 128)) -> tuple[Tensor, Tensor]:
    """An FP4 matrix as FP8 with exactly its values: codes `[..., R, C]` and fp32 scales `[..., R/br, C/bc]`.

    For devices that multiply FP8 but not FP4 (facts 3.9; the engine does not call it yet). Each block takes its
    largest FP4 scale / 2^6, which is exact where the scales of a block differ by at most 2^6
    (6 * 2^6 = 384 < 448). Raises QuantError, and casts nothing, where a value would not survive.
    """
    if block[1] % FP4_BLOCK:
        raise QuantError(f"FP8 blocks of {block[1]} columns cut through FP4 groups of {FP4_BLOCK}")
    wide = block_amax(scale.float(), (block[0], block[1] // FP4_BLOCK)) / 64.0
    values = dequantize_fp4(codes, scale, torch.float32)
    recast = encode_fp8(values, wide, block)
    lost = dequantize_fp8(recast, wide, block, torch.float32) != values
    if lost.any():
        raise QuantError(
            f"{int(lost.sum())} of {lost.numel()} FP4 values are not exact in FP8 with {block} blocks: "
            "their scales lie too far apart"
        )
    return recast, wide
