"""What Muon does around its products, in two launches a tensor: momentum and update there, decay and step back.
The definition is `train.optim.Optimizer`'s own, in PyTorch.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
from torch import Tensor

from rorqual.kernels.gpu import tl, triton

BLOCK = 4096


@triton.jit
def _momentum(
    grad, m, out, squares, factor, size, momentum,
    NESTEROV: tl.constexpr, CLIPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of BLOCK numbers of matrix `program_id(0)`: the momentum, the update, and the sum of its squares."""
    which = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = at < size
    g = tl.load(grad + which * size + at, mask=real, other=0.0).to(tl.float32)
    if CLIPPED:
        g *= tl.load(factor)
    kept = tl.load(m + which * size + at, mask=real, other=0.0) * momentum + g
    tl.store(m + which * size + at, kept, mask=real)
    update = g + momentum * kept if NESTEROV else kept
    tl.store(out + which * size + at, update.to(out.dtype.element_ty), mask=real)
    tl.store(squares + which * tl.num_programs(1) + tl.program_id(1), tl.sum(update * update, 0))


@triton.jit(do_not_specialize=["shrink", "stride"])
def _move(weight, master, update, size, shrink, stride, APART: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = at < size
    w = tl.load(master + at, mask=real, other=0.0) * shrink
    w -= stride * tl.load(update + at, mask=real, other=0.0).to(tl.float32)
    tl.store(master + at, w, mask=real)
    if APART:
        tl.store(weight + at, w.to(weight.dtype.element_ty), mask=real)


def momentum(
    grad: Tensor, m: Tensor, factor: Tensor | None, rate: float, nesterov: bool, kind: torch.dtype
) -> tuple[Tensor, Tensor]:
    """m = rate * m + grad * factor, in place, fp32; the update in `kind`, and the Frobenius norm of each of its
    matrices `[..., R, C]`: `[..., 1, 1]`."""
    size = m.shape[-2] * m.shape[-1]
    count, chunks = m.numel() // size, triton.cdiv(size, BLOCK)
    update = torch.empty(m.shape, dtype=kind, device=m.device)
    squares = torch.empty(*m.shape[:-2], chunks, dtype=torch.float32, device=m.device)
    _momentum[(count, chunks)](
        grad, m, update, squares, m if factor is None else factor, size, rate, NESTEROV=nesterov,
        CLIPPED=factor is not None, BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip
    return update, squares.sum(-1).sqrt()[..., None, None]


def move(weight: Tensor, master: Tensor | None, update: Tensor, *, shrink: float, stride: float) -> None:
    """master = shrink * master - stride * update, an fp32 copy whose rounded numbers `weight` then gets, or `weight`
    itself."""
    _move[(triton.cdiv(weight.numel(), BLOCK),)](
        weight, weight if master is None else master, update, weight.numel(), shrink, stride,
        APART=master is not None, BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip
