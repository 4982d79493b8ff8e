"""AdamW's step on one tensor in one launch: gradient, master and moments are read once, and the weight written beside
them. The definition is `train.optim.Optimizer`'s own, in PyTorch.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
from torch import Tensor

from rorqual.kernels.gpu import tl, triton, usable

BLOCK = 4096


@triton.jit(do_not_specialize=["rate", "shrink", "one_corrected", "two_corrected"])
def _step(
    weight, master, grad, m, v, factor, size, rate, shrink, one, two, one_corrected, two_corrected, eps,
    APART: tl.constexpr, CLIPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = at < size
    g = tl.load(grad + at, mask=real, other=0.0).to(tl.float32)
    if CLIPPED:
        g *= tl.load(factor)
    first = tl.load(m + at, mask=real, other=0.0).to(tl.float32)
    second = tl.load(v + at, mask=real, other=0.0).to(tl.float32)
    first += (g - first) * (1.0 - one)
    second = second * two + g * g * (1.0 - two)
    # The update goes by the moments as they are kept.
    first = first.to(m.dtype.element_ty)
    second = second.to(v.dtype.element_ty)
    tl.store(m + at, first, mask=real)
    tl.store(v + at, second, mask=real)
    below = tl.sqrt(second.to(tl.float32) / two_corrected) + eps
    w = tl.load(master + at, mask=real, other=0.0) * shrink
    w -= rate / one_corrected * first.to(tl.float32) / below
    tl.store(master + at, w, mask=real)
    if APART:
        tl.store(weight + at, w.to(weight.dtype.element_ty), mask=real)


def supported(weight: Tensor, master: Tensor, grad: Tensor) -> bool:
    """Whether `step` takes these: on a GPU, fp32 to be moved, all without gaps."""
    return (
        usable(weight, grad)
        and master.dtype == torch.float32
        and weight.is_contiguous()
        and grad.is_contiguous()
        and grad.dtype != torch.float64
    )


def step(
    weight: Tensor, master: Tensor | None, grad: Tensor, m: Tensor, v: Tensor, factor: Tensor | None, *,
    rate: float, decay: float, betas: tuple[float, float], eps: float, number: int,
) -> None:  # fmt: skip
    """Move `master`, an fp32 copy whose rounded numbers `weight` then gets, or `weight` itself, by step `number`, from
    1 on, of the gradient times `factor` (fp32, one number on the device)."""
    one, two = betas
    apart = master is not None
    _step[(triton.cdiv(weight.numel(), BLOCK),)](
        weight, weight if master is None else master, grad, m, v, m if factor is None else factor,
        weight.numel(), rate, 1 - rate * decay, one, two, 1 - one**number,
        1 - two**number, eps, APART=apart, CLIPPED=factor is not None, BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip
