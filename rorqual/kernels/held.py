"""fp32 copies of e8m0 scales, made once."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

_held: dict[int, tuple[weakref.ref[Tensor], int, Tensor]] = {}
"""fp32 copies of float8_e8m0fnu scales by the id of the tensor they were made of, with its version."""


def held_scale(scale: Tensor) -> Tensor:
    """`scale` in fp32: itself, or a copy that is kept as long as it lives and always in the same memory (recorded
    graphs read it). A tensor that was written to gets its copy refreshed when next asked for."""
    if scale.dtype == torch.float32:
        return scale
    if scale.is_inference():  # counts no versions
        return scale.float()
    key = id(scale)
    if key not in _held:
        with torch.inference_mode(False):
            made = scale.detach().float()
        if made.is_cuda and torch.cuda.is_current_stream_capturing():
            return made  # its memory and its content are the graph's
        gone = weakref.ref(scale, lambda _: _held.pop(key, None))
        _held[key] = gone, scale._version, made
    _, version, made = _held[key]
    if version != scale._version:
        made.copy_(scale.detach())
        _held[key] = _held[key][0], scale._version, made
    return made


def refresh_scales() -> None:
    """Bring all held scales up to date, for graphs recorded before their tensors were written to."""
    for found, _, _ in list(_held.values()):
        scale = found()
        if scale is not None:
            held_scale(scale)
