"""V2's balance losses (V2 report 2.2.3; facts 3.3): by expert, by device, and by what is sent to a device."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rorqual.family.parts import Router
from rorqual.kernels.affinity import affinities


@dataclass(frozen=True)
class V2Balance:
    """Factors α1, α2, α3 (V2: 0.003, 0.05, 0.02; V2-Lite: 0.001, 0, 0). Devices are the router's groups."""

    expert: float = 0.003
    device: float = 0.05
    communication: float = 0.02

    def __post_init__(self) -> None:
        if not all(0 <= factor < math.inf for factor in (self.expert, self.device, self.communication)):
            raise ValueError(f"{self}: each factor must be a number and not below 0")


def v2_losses(logits_BTE: Tensor, ids_BTK: Tensor, router: Router, factors: V2Balance) -> Tensor:
    """Mean over sequences of α1 Σ f_i P_i + α2 Σ f'_j P'_j + α3 Σ f''_j P''_j, over experts i and devices j."""
    score_BTE = affinities(logits_BTE, router.score)
    (batch, time, experts), chosen = score_BTE.shape, ids_BTK.shape[-1]
    devices, most = router.groups, router.keep
    p_BE = score_BTE.mean(1)
    count_BE = torch.zeros_like(p_BE).scatter_add_(
        1, ids_BTK.flatten(1), torch.ones_like(ids_BTK, dtype=p_BE.dtype).flatten(1)
    )
    f_BE = count_BE * (experts / (chosen * time))
    loss = factors.expert * (f_BE * p_BE).sum(-1).mean()
    if devices > 1:
        f_BG, p_BG = f_BE.unflatten(1, (devices, -1)).mean(-1), p_BE.unflatten(1, (devices, -1)).sum(-1)
        on_BTK = ids_BTK // (experts // devices)
        sent_BTG = torch.zeros(batch, time, devices, dtype=p_BE.dtype, device=p_BE.device).scatter_(
            2, on_BTK, 1.0
        )
        sent_BG = sent_BTG.sum(1) * (devices / (most * time))
        loss = loss + factors.device * (f_BG * p_BG).sum(-1).mean()
        loss = loss + factors.communication * (sent_BG * p_BG).sum(-1).mean()
    return loss
