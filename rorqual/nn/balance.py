"""Load of experts, and V3's balancing without an auxiliary loss (V3 report section 2.1.2; facts 3.3)."""

from __future__ import annotations

import torch
from torch import Tensor

from rorqual.kernels.experts_sort import counts
from rorqual.nn.errors import InputError
from rorqual.nn.router import Router


def expert_load(ids_NK: Tensor, experts: int) -> Tensor:
    """Tokens that chose each expert, int64 [E]."""
    return counts(ids_NK.flatten()[None], experts)[0]


def max_violation(load_E: Tensor) -> float:
    """How far the busiest expert lies above the mean load: max / mean - 1. Zero is perfect balance."""
    return float(load_E.max() / load_E.double().mean() - 1)


@torch.no_grad()
def update_bias(router: Router, load_E: Tensor, speed: float) -> None:
    """Move a router's balance bias after a step: down by `speed` for experts above the mean load of the
    whole batch, up by `speed` for those below."""
    if router.bias is None:
        raise InputError("this router has no balance bias: only V3's and V4's do")
    load = load_E.to(router.bias.dtype)
    router.bias += speed * torch.sign(load.mean() - load)
