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

from rorqual.kernels import cross_entropy as rows_of
from rorqual.kernels.cross_entropy import IGNORED
from rorqual.kernels.gpu import usable

CHUNK, CHUNK_GPU = 2**25, 2**30
"""Logits that are held at once, about."""

__all__ = ["IGNORED", "cross_entropy", "reference"]


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
        fast = usable(hidden_ND, weight_VD) and wide == torch.float32
        make = rows_of.fast if fast else rows_of.reference
        for hidden, target, at in zip(
            hidden_ND.split(rows), target_N.split(rows), range(0, len(target_N), rows), strict=True
        ):
            hidden = hidden.to(matrix_VD.dtype)
            slope = F.linear(hidden, matrix_VD)  # logits now, their gradient in a moment
            one_by_one, hits = make(slope, target, learns or moves)
            loss += one_by_one.sum()
            right += hits.sum()
            if grad_ND is not None:
                grad_ND[at : at + rows] = slope @ matrix_VD
            if grad_VD is not None:
                _add_product(grad_VD, slope, hidden)
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


def _add_product(grad_VD: Tensor, slope_NV: Tensor, hidden_ND: Tensor) -> None:
    """grad += slope^T hidden, added up in grad's type throughout."""
    if grad_VD.dtype == slope_NV.dtype:
        grad_VD.addmm_(slope_NV.t(), hidden_ND)
    elif grad_VD.is_cuda:
        torch.addmm(grad_VD, slope_NV.t(), hidden_ND, out_dtype=grad_VD.dtype, out=grad_VD)
    else:
        grad_VD += slope_NV.t() @ hidden_ND


def cross_entropy(
    hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, *, full: bool = False, rows: int | None = None
) -> tuple[Tensor, Tensor]:
    """`reference`, `rows` rows at a time, and how many targets were the likeliest token. One backward pass."""
    if rows is None:
        most = max(1, (CHUNK_GPU if hidden_ND.is_cuda else CHUNK) // weight_VD.shape[0])
        rows = max(
            1, -(-len(hidden_ND) // max(1, -(-len(hidden_ND) // most)))
        )  # so that all chunks are alike
    loss, right = _Chunked.apply(hidden_ND, weight_VD, target_N, full, rows)
    return loss, right
