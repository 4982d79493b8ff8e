"""Whether codes and scales mean numbers, and numbers from which `save` finds the same codes again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rorqual.kernels import quant
from rorqual.weights.errors import CheckpointError
from rorqual.weights.shards import CHUNK, Reader, Stored

SCAN = 2**20
"""Bytes looked at at once: what a core's cache holds."""

SMALLEST_CODE = 2.0**-9
"""The smallest number of E4M3 above zero (E2M1's is larger)."""


def check_codes(codes: Tensor, what: str) -> None:
    """Raise CheckpointError if FP8 `codes` hold NaN (0x7F and 0xFF). Every FP4 code is a number."""
    if codes.dtype != quant.FP8:
        return
    for piece in codes.reshape(-1).view(torch.uint8).split(SCAN):
        if _may_hold_nan(piece) and (bad := int((piece.bitwise_and(0x7F) == 0x7F).sum())):
            raise CheckpointError(f"{what}: expected numbers, found {bad} FP8 codes of NaN")


def _may_hold_nan(codes: Tensor) -> bool:
    """Whether a closer look at these bytes is needed. Eight codes at a time: without its sign, a NaN is the
    one code to which adding 1 sets the top bit."""
    if codes.numel() % 8 or codes.storage_offset() % 8:
        return True
    words = codes.view(torch.int64) & 0x7F7F7F7F7F7F7F7F
    return bool(words.add_(0x0101010101010101).bitwise_and_(-0x7F7F7F7F7F7F7F80).any())


def check_stored_codes(reader: Reader, stored: Stored) -> None:
    """`check_codes` of a tensor in a file, read piece by piece."""
    for begin in range(0, stored.nbytes, CHUNK):
        check_codes(reader.piece(stored, begin, (min(CHUNK, stored.nbytes - begin),)), str(stored))


def check_scales(scale: Tensor, what: str) -> None:
    """Raise CheckpointError for scales that are NaN or infinite."""
    bad = int((~scale.float().isfinite()).sum())
    if bad:
        raise CheckpointError(f"{what}: expected finite scales, found {bad} NaN or infinite")


def extreme(scale: Tensor, dtype: torch.dtype) -> bool:
    """Whether products with finite `scale` may overflow `dtype`, lose digits in it, or vanish with a scale of 0."""
    size, limits = scale.float().abs(), torch.finfo(dtype)
    if not size.numel():
        return False
    return bool(size.min() * SMALLEST_CODE < limits.tiny or size.max().double() * quant.FP8_MAX > limits.max)


def check_recoverable(
    codes: Tensor, scale: Tensor, values: Tensor, block: Sequence[int], *, fp4: bool, what: str
) -> None:
    """Raise CheckpointError unless `values`, codes times scale, are finite and lead back to the same codes."""
    again = encode(values, scale, (block[0], block[1]), fp4=fp4)
    lost = int((again.view(torch.uint8) != codes.view(torch.uint8)).sum())
    infinite = int((~values.isfinite()).sum())
    if lost or infinite:
        raise CheckpointError(
            f"{what}: scales of zero or near the end of {values.dtype} lose {max(lost, infinite)} values: load "
            "with quantized=True, which keeps the codes"
        )


def encode(w: Tensor, scale: Tensor, block: tuple[int, int], *, fp4: bool) -> Tensor:
    """Codes of `w` under given scales. A scale of 0 keeps zeros (with their sign), which dividing would not."""
    if scale.dtype != quant.E8M0:
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return quant.encode_fp4(w, scale) if fp4 else quant.encode_fp8(w, scale, block)
