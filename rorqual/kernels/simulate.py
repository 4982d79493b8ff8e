"""Rounding that the released kernels apply to activations, on values kept in their own type.

The released V3.2 and V4 round some cached entries and index vectors to FP8 or FP4. These functions do
the same rounding (quantise and multiply back), so that a model can be run as it was served.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rorqual.kernels.quant import FP4_FLOOR, FP4_MAX, FP8_FLOOR, FP8_MAX, ceil_power_of_two


def _power_of_two_scale(blocks: Tensor, largest: float, floor: float) -> Tensor:
    """The power of two that brings each block's largest value (last axis, floored) to at most `largest`."""
    return ceil_power_of_two(blocks.abs().amax(-1, keepdim=True).clamp(min=floor) / largest)


def fake_fp8(x: Tensor, block: int) -> Tensor:
    """x rounded to E4M3 with a power-of-two scale for every `block` channels of the last axis."""
    blocks = x.float().unflatten(-1, (-1, block))
    scale = _power_of_two_scale(blocks, FP8_MAX, FP8_FLOOR)
    rounded = (blocks / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).float()
    return (rounded * scale).flatten(-2).to(x.dtype)


def fake_fp4(x: Tensor, block: int) -> Tensor:
    """x rounded to E2M1 with a power-of-two scale for every `block` channels of the last axis.

    E2M1 has the magnitudes 0, .5, 1, 1.5, 2, 3, 4, 6; halfway cases go to the even code.
    """
    blocks = x.float().unflatten(-1, (-1, block))
    scale = _power_of_two_scale(blocks, FP4_MAX, FP4_FLOOR)
    magnitude = (blocks / scale).abs()
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    rounded = (torch.round(magnitude / step) * step).clamp(max=FP4_MAX)
    return (rounded.copysign(blocks) * scale).flatten(-2).to(x.dtype)


def hadamard(x: Tensor) -> Tensor:
    """Orthonormal Walsh-Hadamard transform of the last axis (a power of two)."""
    width = x.shape[-1]
    if width & (width - 1):
        raise ValueError(f"a Hadamard transform needs a power-of-two width, got {width}")
    y, half = x.float(), 1
    while half < width:
        a, b = y.unflatten(-1, (-1, 2, half)).unbind(-2)
        y = torch.stack((a + b, a - b), -2).flatten(-3)
        half *= 2
    return (y * width**-0.5).to(x.dtype)
