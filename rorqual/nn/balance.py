"""Load of experts, and V3's balancing without an auxiliary loss (V3 report section 2.1.2; facts 3.3)."""

from __future__ import annotations

import torch
from torch import Tensor

from rorqual.nn.errors import InputError
from rorqual.nn.router import Router


def expert_load(ids_NK: Tensor, experts: int) -> Tensor:
    """Tokens that chose each expert, int64 [E]."""
    if ids_NK.is_cuda:  # where bincount waits for the device
        return (ids_NK.flatten()[:, None] == torch.arange(experts, device=ids_NK.device)).sum(0)
    return ids_NK.flatten().bincount(minlength=experts)


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


def sequence_loss(scores_BTE: Tensor, ids_BTK: Tensor) -> Tensor:
    """V3's sequence-wise balance loss before its factor alpha: the mean over sequences of
    sum_i f_i P_i with f_i = E / (K T) * count_i and P_i the mean of the normalised affinities."""
    experts, (time, chosen) = scores_BTE.shape[-1], ids_BTK.shape[-2:]
    count_BE = torch.stack([expert_load(ids_TK, experts) for ids_TK in ids_BTK]).to(scores_BTE.dtype)
    p_BE = (scores_BTE / scores_BTE.sum(-1, keepdim=True)).mean(1)
    return (count_BE * (experts / (chosen * time)) * p_BE).sum(-1).mean()
