"""Putting values into a model that was built on the meta device."""

from __future__ import annotations

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


def put(slot: Tensor, values: Tensor, what: str) -> None:
    """slot <- values, cast. Raises CheckpointError, naming `what`, where float16 can't hold a value."""
    slot.copy_(values)
    if slot.dtype == torch.float16 and values.dtype != torch.float16:
        lost = int((slot.isinf() & values.to(slot.device).isfinite()).sum())
        if lost:
            raise CheckpointError(f"{what}: {lost} values exceed float16: load as bfloat16 or float32")
