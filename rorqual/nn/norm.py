"""Normalisation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rorqual.kernels import norm_grad
from rorqual.kernels.fuse import WIDEST, add_rmsnorm, rmsnorm
from rorqual.kernels.gpu import usable
from rorqual.kernels.mode import by_fixed_kernels


def upcast(x: Tensor) -> Tensor:
    """x in fp32, or in fp64 if it is fp64 already: where the family computes in full precision."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, computed in fp32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if usable(x):
            if not torch.is_grad_enabled():
                return rmsnorm(x.flatten(0, -2), self.weight, self.eps).view(x.shape)
            if norm_grad.supported(x):
                return norm_grad.rmsnorm_trained(x, self.weight, self.eps)
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)

    def after_add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of x + residual, and that sum."""
        if torch.is_grad_enabled():
            if usable(x) and norm_grad.supported(x):
                return norm_grad.add_rmsnorm_trained(x, residual, self.weight, self.eps)
            total = x + residual
            return self(total), total
        y, total = add_rmsnorm(x.flatten(0, -2), residual.flatten(0, -2), self.weight, self.eps)
        return y.view(x.shape), total.view(x.shape)


def unit_rms(x: Tensor, eps: float) -> Tensor:
    """RMS normalisation without a weight, in fp32, back in x's type (V4's query heads)."""
    if by_fixed_kernels(x) and x.shape[-1] <= WIDEST:  # PyTorch's may split a row's sum by the number of rows
        return rmsnorm(x.flatten(0, -2), x.new_ones(x.shape[-1]), eps).view(x.shape)
    return F.rms_norm(x, x.shape[-1:], None, eps)


class LayerNorm(nn.Module):
    """LayerNorm with weight and bias, computed in fp32 (the sparse indexer's keys)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        full = upcast(x)
        y = F.layer_norm(
            full, self.weight.shape, self.weight.to(full.dtype), self.bias.to(full.dtype), self.eps
        )
        return y.to(x.dtype)
