"""V2's token dropping: what a device's experts have no room for (V2 report 2.2.4; facts 3.3)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Capacity:
    """Each of a router's groups of experts is a device, and takes `factor` times its even share of a pass's (token,
    expert) pairs. `exempt_B`: rows none of whose tokens is dropped. `dropped[i]`: how many pairs layer i dropped."""

    factor: float
    exempt_B: Tensor
    dropped: dict[int, Tensor] = field(default_factory=dict)


def kept(
    affinity_NK: Tensor, ids_NK: Tensor, exempt_N: Tensor, *, experts: int, devices: int, factor: float
) -> Tensor:
    """Which pairs stay, bool `[N, K]`: on each device those of exempt tokens, and of the others the ones of highest
    affinity, as many as are left of floor(factor * N * K / devices). Equal affinities: the earlier pair stays."""
    room = int(factor * ids_NK.numel() / devices)
    device_P = (ids_NK // (experts // devices)).flatten()
    exempt_P = exempt_N[:, None].expand_as(ids_NK).flatten()
    worth_P = affinity_NK.detach().flatten().masked_fill(exempt_P, float("inf"))
    # Best first, and then by device: each device's pairs stand together, its best at the front.
    order_P = worth_P.argsort(descending=True, stable=True)
    order_P = order_P[device_P[order_P].argsort(stable=True)]
    count_G = device_P.bincount(minlength=devices)
    begin_G = count_G.cumsum(0) - count_G
    rank_P = torch.empty_like(order_P)
    rank_P[order_P] = torch.arange(len(order_P), device=order_P.device) - begin_G[device_P[order_P]]
    return ((rank_P < room) | exempt_P).view_as(ids_NK)
