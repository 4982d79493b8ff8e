"""Rotary positions: plain, linear-scaled, YaRN and llama3; interleaved and half-split layouts."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from rorqual.family.parts import LinearScaling, Llama3Scaling, Rope, Yarn
from rorqual.nn.norm import upcast

Rotation = tuple[Tensor, Tensor]
"""cos and sin, each `[..., dim / 2]` in fp32."""


@lru_cache(maxsize=64)
def inverse_frequencies(rope: Rope, device: torch.device | str = "cpu") -> Tensor:
    """Radians a position for each channel pair, fp32 `[dim / 2]` (facts 3.2 for YaRN); not to be written to."""
    with torch.inference_mode(False):  # so that one made there can be used anywhere
        pair = torch.arange(0, rope.dim, 2, dtype=torch.float32, device=device)
        freq = 1.0 / (rope.theta ** (pair / rope.dim))
        match rope.scaling:
            case None:
                return freq
            case LinearScaling(factor=factor):
                return freq / factor
            case Yarn() as yarn:
                return _yarn(freq, rope, yarn)
            case Llama3Scaling() as bands:
                return _llama3(freq, bands)


def _yarn(freq: Tensor, rope: Rope, yarn: Yarn) -> Tensor:
    def channel(rotations: float) -> float:
        """The channel pair that turns `rotations` times over the original length."""
        return rope.dim * math.log(yarn.original / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low = max(math.floor(channel(yarn.beta_fast)), 0)
    high = min(math.ceil(channel(yarn.beta_slow)), rope.dim - 1)
    index = torch.arange(rope.dim // 2, dtype=torch.float32, device=freq.device)
    ramp = ((index - low) / max(high - low, 0.001)).clamp(0, 1)
    return freq / yarn.factor * ramp + freq * (1 - ramp)


def _llama3(freq: Tensor, bands: Llama3Scaling) -> Tensor:
    wavelength = 2 * math.pi / freq
    smooth = (bands.original / wavelength - bands.low) / (bands.high - bands.low)
    blended = (1 - smooth) * freq / bands.factor + smooth * freq
    scaled = torch.where(wavelength > bands.original / bands.low, freq / bands.factor, blended)
    return torch.where(wavelength < bands.original / bands.high, freq, scaled)


def rotation(rope: Rope, positions: Tensor) -> Rotation:
    """cos and sin at integer `positions` [...]: two fp32 tensors `[..., dim / 2]`."""
    angle = positions[..., None].float() * inverse_frequencies(rope, positions.device)
    amplitude = rope.scaling.rotation_amplitude() if isinstance(rope.scaling, Yarn) else 1.0
    return angle.cos() * amplitude, angle.sin() * amplitude


def rotate(x: Tensor, turn: Rotation, interleaved: bool, inverse: bool = False) -> Tensor:
    """Rotate all channels of x by `turn` (whose leading axes must broadcast), in fp32.

    Pairs are (2i, 2i+1) if `interleaved`, else (i, i + dim/2). `inverse` turns back.
    """
    cos, sin = turn
    if inverse:
        sin = -sin
    full = upcast(x)
    if interleaved:
        a, b = full.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2).to(x.dtype)
    a, b = full.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


def rotate_tail(x: Tensor, turn: Rotation, inverse: bool = False) -> Tensor:
    """Rotate the last channels of x (as many as `turn` covers), interleaved; the rest passes (V4)."""
    width = 2 * turn[0].shape[-1]
    still, moving = x.split((x.shape[-1] - width, width), -1)
    return torch.cat((still, rotate(moving, turn, interleaved=True, inverse=inverse)), -1)
