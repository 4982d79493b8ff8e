"""Putting values into a model that was built on the meta device, and the device it goes to."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from rorqual.weights.errors import CheckpointError


def assign(model: nn.Module, ours: str, tensor: Tensor) -> None:
    """Make `tensor` the parameter or buffer `ours` of `model`, in place of what stands there."""
    owner, _, leaf = ours.rpartition(".")
    module = model.get_submodule(owner)
    if leaf in module._buffers:
        module._buffers[leaf] = tensor
    else:
        trains = getattr(module, leaf).requires_grad
        setattr(module, leaf, nn.Parameter(tensor, requires_grad=trains))


def put(slot: Tensor, values: Tensor, what: str) -> int:
    """slot <- values, cast. Returns how many became zero and were not.

    Raises CheckpointError, naming `what`, where float16 can't hold a value.
    """
    slot.copy_(values)
    if slot.dtype.itemsize >= values.dtype.itemsize and slot.dtype != torch.float16:
        return 0
    values = values.to(slot.device)
    if slot.dtype == torch.float16:
        lost = int((slot.isinf() & values.isfinite()).sum())
        if lost:
            raise CheckpointError(f"{what}: {lost} values exceed float16: load as bfloat16 or float32")
    return int(values.count_nonzero() - slot.count_nonzero())


def warn_of_zeros(count: int, dtype: torch.dtype, where: object) -> None:
    """Say that `count` values are lost in `dtype`, if any are."""
    if count:
        warnings.warn(
            f"{where}: {count} values too small for {str(dtype).removeprefix('torch.')} became zero, and will be "
            "saved as zeros: load as bfloat16 or float32 to keep them (float16 does not hold every bfloat16 or "
            "FP8 checkpoint without loss)",
            stacklevel=3,
        )


def usable(device: torch.device | str) -> torch.device:
    """The device of a name. Raises ValueError for one that is unknown, absent, or can't hold values."""
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, TypeError, ImportError) as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"device {str(device)!r} can't be used here: {why}") from error
    if found.type == "meta":
        raise ValueError("device 'meta' holds no values: load to the CPU or a GPU")
    return found
