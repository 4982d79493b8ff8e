"""Memory for a model that was built on the meta device, and values into it."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

from rorqual.weights.errors import CheckpointError

HUGE_PAGE = 2 * 2**20
MADV_HUGEPAGE = 14


def room(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An empty tensor. On Linux a large CPU tensor asks for huge pages: its first filling is the better part
    of the time to load, and goes three times as fast."""
    tensor = torch.empty(shape, dtype=dtype, device=device)
    if device.type == "cpu" and tensor.nbytes >= 2 * HUGE_PAGE:
        start = -(-tensor.data_ptr() // HUGE_PAGE) * HUGE_PAGE
        end = (tensor.data_ptr() + tensor.nbytes) // HUGE_PAGE * HUGE_PAGE
        if advise := _madvise():
            advise(start, end - start, MADV_HUGEPAGE)  # a hint: refusal changes nothing
    return tensor


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function


def assign(model: nn.Module, ours: str, tensor: Tensor) -> None:
    """Make `tensor` the parameter or buffer `ours` of `model`, in place of what stands there."""
    owner, _, leaf = ours.rpartition(".")
    module = model.get_submodule(owner)
    if leaf in module._buffers:
        module._buffers[leaf] = tensor
    else:
        trains = getattr(module, leaf).requires_grad
        setattr(module, leaf, nn.Parameter(tensor, requires_grad=trains))


def put(slot: Tensor, values: Tensor, what: str) -> None:
    """slot <- values, cast. Raises CheckpointError, naming `what`, where float16 can't hold a value."""
    slot.copy_(values)
    if slot.dtype == torch.float16 and values.dtype != torch.float16:
        lost = int((slot.isinf() & values.to(slot.device).isfinite()).sum())
        if lost:
            raise CheckpointError(f"{what}: {lost} values exceed float16: load as bfloat16 or float32")
