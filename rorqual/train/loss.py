"""Cross-entropy that never holds all logits: a few rows at a time, forward and backward together.

For N tokens and a vocabulary of V the logits alone are N * V numbers, and their gradient as many again. Here each
chunk of rows is multiplied by the head, turned into its loss and its gradient, and forgotten; what stays until the
backward pass are the gradients of the hidden states and of the head.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 2**25
"""Logits that are held at once, about."""

IGNORED = -1
"""A target that does not count."""


def reference(hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, full: bool = False) -> Tensor:
    """Sum over rows of -log softmax(hidden @ weight^T)[target], at least in fp32; targets of `IGNORED` don't count.
    With `full` the product is made in fp32 too (V4's head)."""
    wide = torch.promote_types(hidden_ND.dtype, torch.float32)
    if full:
        hidden_ND, weight_VD = hidden_ND.to(wide), weight_VD.to(wide)
    return F.cross_entropy(
        F.linear(hidden_ND, weight_VD).to(wide), target_N, ignore_index=IGNORED, reduction="sum"
    )


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, full: bool, rows: int
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(hidden_ND.dtype, torch.float32)
        learns, moves = ctx.needs_input_grad[:2]
        loss, right = hidden_ND.new_zeros((), dtype=wide), target_N.new_zeros(())
        grad_ND = torch.empty_like(hidden_ND) if learns else None
        grad_VD = torch.zeros_like(weight_VD, dtype=wide) if moves else None
        matrix_VD = weight_VD.to(wide) if full else weight_VD
        for hidden, target, at in zip(
            hidden_ND.split(rows), target_N.split(rows), range(0, len(target_N), rows), strict=True
        ):
            hidden = hidden.to(matrix_VD.dtype)
            logits = F.linear(hidden, matrix_VD).to(wide)
            counts = target != IGNORED
            picked = target.clamp(min=0)[:, None]
            total = logits.logsumexp(-1)
            loss += ((total - logits.gather(1, picked)[:, 0]) * counts).sum()
            right += ((logits.argmax(-1) == target) & counts).sum()
            if learns or moves:
                slope = logits.sub_(total[:, None]).exp_()
                slope.scatter_add_(1, picked, slope.new_full(picked.shape, -1.0))
                slope = (slope * counts[:, None]).to(matrix_VD.dtype)
                if grad_ND is not None:
                    grad_ND[at : at + rows] = slope @ matrix_VD
                if grad_VD is not None:
                    grad_VD += slope.T @ hidden
        ctx.grads = grad_ND, None if grad_VD is None else grad_VD.to(weight_VD.dtype)
        ctx.mark_non_differentiable(right)
        return loss, right

    @staticmethod
    def backward(ctx: Any, slope: Tensor, _: Any) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        grad_ND, grad_VD = ctx.grads
        ctx.grads = None, None
        # One number for all, so that nothing large is made: what was computed is scaled where it lies.
        for grad in (grad_ND, grad_VD):
            if grad is not None:
                grad.mul_(slope)
        return grad_ND, grad_VD, None, None, None


def cross_entropy(
    hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, *, full: bool = False, rows: int | None = None
) -> tuple[Tensor, Tensor]:
    """`reference`, `rows` rows at a time, and how many targets were the likeliest token. One backward pass."""
    rows = rows or max(1, CHUNK // weight_VD.shape[0])
    loss, right = _Chunked.apply(hidden_ND, weight_VD, target_N, full, rows)
    return loss, right
