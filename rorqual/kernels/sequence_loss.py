"""V3's sequence-wise balance loss and its gradient from router logits, two launches (V3 report 2.1.2, eq. 17 to 20).

    sum over experts of f_e P_e, mean over sequences;  f_e = E / (K T) * count_e;  P_e = mean over t of s_te / sum s_t

count_e: how many tokens have expert e among the K likeliest by affinity s alone, without bias and groups (eq. 18).
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rorqual.kernels.affinity import affinities, affinities_and_slopes
from rorqual.kernels.experts_sort import counts
from rorqual.kernels.gpu import tl, triton, usable

ROWS = 32
"""Tokens that a program looks at together."""

TILES = 4
"""Such lots that a program adds up."""


def reference(logits_BTE: Tensor, top_k: int, score: str) -> Tensor:
    """The loss, one number."""
    score_BTE = affinities(logits_BTE, score)
    time, experts = score_BTE.shape[1:]
    best_BTK = score_BTE.detach().topk(top_k, -1).indices
    f_BE = counts(best_BTK.flatten(1), experts).to(score_BTE.dtype) * (experts / (top_k * time))
    p_BE = (score_BTE / score_BTE.sum(-1, keepdim=True)).mean(1)
    return (f_BE * p_BE).sum(-1).mean()


@triton.jit
def _sums(
    logits, shares, found, T,
    E: tl.constexpr, EP: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr, SCORE: tl.constexpr,
):  # fmt: skip
    """Of TILES * ROWS tokens of a sequence: sums of normalised affinities, and counts of the K likeliest."""
    b, chunk = tl.program_id(0), tl.program_id(1)
    e = tl.arange(0, EP)[None, :]
    share = tl.zeros((EP,), tl.float32)
    count = tl.zeros((EP,), tl.int32)
    for tile in range(TILES):
        t = (chunk * TILES + tile) * ROWS + tl.arange(0, ROWS)
        real = (t < T)[:, None] & (e < E)
        at = (b.to(tl.int64) * T + t)[:, None] * E + e
        score, _ = affinities_and_slopes(tl.load(logits + at, mask=real, other=0.0), real, SCORE)
        total = tl.sum(score, 1)
        share += tl.sum(score / tl.where(t < T, total, 1.0)[:, None], 0)
        left = tl.where(real, score, -1.0)
        for _ in tl.static_range(K):
            best = tl.max(left, 1)
            first = tl.min(tl.where(left == best[:, None], e, EP), 1)
            hit = (e == first[:, None]) & real
            count += tl.sum(hit.to(tl.int32), 0)
            left = tl.where(hit, -1.0, left)
    to = (b * tl.num_programs(1) + chunk) * E + tl.arange(0, EP)
    tl.store(shares + to, share, mask=tl.arange(0, EP) < E)
    tl.store(found + to, count, mask=tl.arange(0, EP) < E)


@triton.jit
def _slopes(
    logits, slope, out, T, E: tl.constexpr, EP: tl.constexpr, ROWS: tl.constexpr, SCORE: tl.constexpr
):
    """Gradient of the logits from that of P."""
    b = tl.program_id(0)
    e = tl.arange(0, EP)[None, :]
    t = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    real = (t < T)[:, None] & (e < E)
    at = (b.to(tl.int64) * T + t)[:, None] * E + e
    score, bend = affinities_and_slopes(tl.load(logits + at, mask=real, other=0.0), real, SCORE)
    c = tl.load(slope + b * E + e, mask=e < E, other=0.0) / T
    total = tl.where(t < T, tl.sum(score, 1), 1.0)[:, None]
    d = (c - tl.sum(score * c, 1)[:, None] / total) / total
    if SCORE == "softmax":
        d = bend * (d - tl.sum(bend * d, 1)[:, None])
    else:
        d *= bend
    tl.store(out + at, d, mask=real)


def sums_fast(logits_BTE: Tensor, top_k: int, score: str) -> tuple[Tensor, Tensor]:
    """f and P, fp32 `[B, E]` each, of fp32 logits."""
    batch, time, experts = logits_BTE.shape
    chunks = triton.cdiv(time, ROWS * TILES)
    shares = torch.empty(batch, chunks, experts, dtype=torch.float32, device=logits_BTE.device)
    found = torch.empty(batch, chunks, experts, dtype=torch.int32, device=logits_BTE.device)
    _sums[(batch, chunks)](
        logits_BTE, shares, found, time, E=experts, EP=triton.next_power_of_2(experts), K=top_k, ROWS=ROWS,
        TILES=TILES, SCORE=score, num_warps=4,
    )  # fmt: skip
    return found.sum(1).float() * (experts / (top_k * time)), shares.sum(1) / time


def slopes_fast(logits_BTE: Tensor, slope_BE: Tensor, score: str) -> Tensor:
    """Gradient of the logits from that of P."""
    batch, time, experts = logits_BTE.shape
    out = torch.empty_like(logits_BTE)
    _slopes[(batch, triton.cdiv(time, ROWS))](
        logits_BTE, slope_BE, out, time, E=experts, EP=triton.next_power_of_2(experts), ROWS=ROWS, SCORE=score,
        num_warps=4,
    )  # fmt: skip
    return out


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_BTE: Tensor, top_k: int, score: str) -> Tensor:
        f_BE, p_BE = sums_fast(logits_BTE, top_k, score)
        ctx.save_for_backward(logits_BTE, f_BE)
        ctx.score = score
        return (f_BE * p_BE).sum() / len(f_BE)

    @staticmethod
    def backward(ctx: Any, *slopes: Any) -> Any:
        logits_BTE, f_BE = ctx.saved_tensors
        return slopes_fast(logits_BTE, f_BE * (slopes[0] / len(f_BE)), ctx.score), None, None


def sequence_loss(logits_BTE: Tensor, top_k: int, score: str) -> Tensor:
    """`reference`, by kernels on a GPU."""
    if usable(logits_BTE) and logits_BTE.dtype == torch.float32 and logits_BTE.shape[2] <= 1024:
        loss: Tensor = _Loss.apply(logits_BTE.contiguous(), top_k, score)
        return loss
    return reference(logits_BTE, top_k, score)
