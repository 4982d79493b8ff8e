"""Cross-entropy of rows of logits and its gradient, the latter written over the logits: read twice, written once."""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
from torch import Tensor

from rorqual.kernels.gpu import tl, triton

IGNORED = -1
"""A target that does not count."""

BLOCK = 8192
"""Logits that a program looks at together."""


def reference(logits_NV: Tensor, target_N: Tensor, learns: bool = True) -> tuple[Tensor, Tensor]:
    """Each row's loss in at least fp32 and whether its target was the likeliest (0 and False where it is `IGNORED`);
    with `learns` the logits become their gradients in their own type."""
    wide = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    counts_N, picked_N1 = target_N != IGNORED, target_N.clamp(min=0)[:, None]
    total_N = wide.logsumexp(-1)
    loss_N = (total_N - wide.gather(1, picked_N1)[:, 0]) * counts_N
    right_N = (wide.argmax(-1) == target_N) & counts_N
    if not learns:
        return loss_N, right_N
    slope_NV = (wide - total_N[:, None]).exp_()
    slope_NV.scatter_add_(1, picked_N1, slope_NV.new_full(picked_N1.shape, -1.0))
    logits_NV.copy_(slope_NV * counts_N[:, None])
    return loss_N, right_N


@triton.jit
def _rows(logits, target, loss, right, row, V, BLOCK: tl.constexpr, LEARNS: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    here = logits + n * row
    wanted = tl.load(target + n)
    best = -float("inf")
    place = 0
    total = 0.0
    for first in range(0, V, BLOCK):
        at = first + tl.arange(0, BLOCK)
        x = tl.load(here + at, mask=at < V, other=-float("inf")).to(tl.float32)
        top = tl.max(x, 0)
        # The first of equal ones, as argmax has it.
        where = tl.min(tl.where(x == top, at, 2**30), 0)
        place = tl.where(top > best, where, place)
        higher = tl.maximum(best, top)
        total = total * tl.exp(best - higher) + tl.sum(tl.exp(x - higher), 0)
        best = higher
    total = best + tl.log(total)
    counts = wanted >= 0
    # A target that is no token makes the loss no number: one reads nothing outside the row.
    logit = tl.load(here + tl.maximum(wanted, 0), mask=wanted < V, other=float("nan")).to(tl.float32)
    tl.store(loss + n, tl.where(counts, total - logit, 0.0))
    tl.store(right + n, counts & (place == wanted))
    if LEARNS:
        tl.debug_barrier()  # the target's logit is read before it is written over
        scale = tl.where(counts, 1.0, 0.0)
        for first in range(0, V, BLOCK):
            at = first + tl.arange(0, BLOCK)
            x = tl.load(here + at, mask=at < V, other=0.0).to(tl.float32)
            slope = (tl.exp(x - total) - tl.where(at == wanted, 1.0, 0.0)) * scale
            tl.store(here + at, slope.to(logits.dtype.element_ty), mask=at < V)


def fast(logits_NV: Tensor, target_N: Tensor, learns: bool = True) -> tuple[Tensor, Tensor]:
    """`reference` in one launch."""
    rows, vocab = logits_NV.shape
    loss_N = torch.empty(rows, dtype=torch.float32, device=logits_NV.device)
    right_N = torch.empty(rows, dtype=torch.bool, device=logits_NV.device)
    if rows:
        _rows[(rows,)](
            logits_NV, target_N, loss_N, right_N, logits_NV.stride(0), vocab,
            BLOCK=min(BLOCK, triton.next_power_of_2(vocab)), LEARNS=learns, num_warps=16 if vocab > BLOCK else 4,
        )  # fmt: skip
    return loss_N, right_N
