"""What a lightning indexer learns in V3.2's sparse stage, over the entries chosen for each query (V3.2 report section
2.1; facts 3.8):

    L = sum over queries t of KL(p_t || softmax over chosen s of I_t,s),   I_t,s = sum over h of w_t,h ReLU(q_t,h . k_s)

p_t comes from the main attention (`mla_sparse_shares`) and takes no gradient. With slope = softmax(I) - p:

    dw_h = sum_s slope_s ReLU(q_h . k_s),   dot_h,s = slope_s w_h [q_h . k_s > 0],   dq = dot k,   dk = dot^T q.

Two kernels: scores, and from them loss and gradients, whose products are made again: of 64 heads and 2,048 entries they
would be 512 KB a query, where the entries' keys are as much and 34 MFLOP take 0.1 us. Loss and gradients come in one
pass, so that a backward pass only multiplies. Gradients of keys are added to memory by atomic additions, in no fixed
order: two runs differ by the rounding of fp32 sums.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rorqual.kernels.gpu import tl, triton, usable

Found = tuple[Tensor, Tensor, Tensor, Tensor]
"""The loss, and the gradients of index queries, keys and weights."""


def reference(q_NHd: Tensor, k_Md: Tensor, w_NH: Tensor, slots_NK: Tensor, target_NK: Tensor) -> Found:
    """The definition: in fp32 (or fp64 if q is), some queries at a time."""
    compute = torch.float64 if q_NHd.dtype == torch.float64 else torch.float32
    (N, H, d), K = q_NHd.shape, slots_NK.shape[1]
    loss = torch.zeros((), dtype=compute, device=q_NHd.device)
    dq_NHd, dw_NH = torch.zeros_like(q_NHd), torch.zeros_like(w_NH)
    dk_Md = torch.zeros(k_Md.shape, dtype=compute, device=k_Md.device)
    step = max(1, 2**24 // max(1, K * (H + d)))
    for first in range(0, N if K else 0, step):
        n = slice(first, first + step)
        there_nK, at_nK = slots_NK[n] >= 0, slots_NK[n].clamp(min=0).long()
        q_nHd, w_nH, p_nK = q_NHd[n].to(compute), w_NH[n].to(compute), target_NK[n].to(compute)
        k_nKd = torch.where(there_nK[..., None], k_Md[at_nK].to(compute), 0)
        worth_nHK = (q_nHd @ k_nKd.mT).relu()
        score_nK = (w_nH[:, None] @ worth_nHK).squeeze(1).masked_fill(~there_nK, -1e30)
        log_nK = score_nK.log_softmax(-1).masked_fill(~there_nK, 0)
        loss += (torch.xlogy(p_nK, p_nK) - p_nK * log_nK).sum()
        slope_nK = (log_nK.exp() - p_nK).masked_fill(~there_nK, 0)
        dot_nHK = slope_nK[:, None] * w_nH[..., None] * (worth_nHK > 0)
        dw_NH[n] = (worth_nHK @ slope_nK[..., None]).squeeze(-1).to(dw_NH.dtype)
        dq_NHd[n] = (dot_nHK @ k_nKd).to(dq_NHd.dtype)
        dk_Md.index_add_(0, at_nK[there_nK], (dot_nHK.mT @ q_nHd)[there_nK])
    return loss, dq_NHd, dk_Md, dw_NH


@triton.jit
def _score(  # type: ignore[no-untyped-def]
    q, k, w, slots, scores, heads, keys, q_n, q_h, k_m, slots_n,
    HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """I of a query over its chosen entries, -inf where there is none: every `num_programs(1)`-th tile of its row."""
    n = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, HEADS)
    d = tl.arange(0, DIM)
    query = tl.load(q + n * q_n + h[:, None] * q_h + d[None, :], mask=(h < heads)[:, None], other=0.0)
    weight = tl.load(w + n * heads + h, mask=h < heads, other=0.0)
    for start in range(tl.program_id(1) * BLOCK_K, keys, tl.num_programs(1) * BLOCK_K):
        place = start + tl.arange(0, BLOCK_K)
        slot = tl.load(slots + n * slots_n + place, mask=place < keys, other=-1)
        there = slot >= 0
        key = tl.load(k + slot.to(tl.int64)[:, None] * k_m + d[None, :], mask=there[:, None], other=0.0)
        worth = tl.maximum(tl.dot(key, tl.trans(query), input_precision=PRECISION), 0.0)
        score = tl.where(there, tl.sum(worth * weight[None, :], 1), float("-inf"))
        tl.store(scores + n * keys + place, score, mask=place < keys)


@triton.jit
def _learn(  # type: ignore[no-untyped-def]
    q, k, w, slots, scores, target, loss, dq, dk, dw, heads, keys, q_n, q_h, k_m, slots_n, dq_n, dq_h, dk_m,
    HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_K: tl.constexpr, ROW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A query's loss and all gradients from its scores and its target."""
    n = tl.program_id(0).to(tl.int64)
    scores += n * keys
    target += n * keys
    slots += n * slots_n
    top = tl.full([ROW], -1e30, tl.float32)  # finite: -inf - -inf would be NaN
    total = tl.zeros([ROW], tl.float32)
    told = tl.zeros([ROW], tl.float32)
    last = tl.zeros([ROW], tl.int32)
    mass = tl.zeros([ROW], tl.float32)
    for start in range(0, keys, ROW):
        place = start + tl.arange(0, ROW)
        score = tl.load(scores + place, mask=place < keys, other=float("-inf"))
        there = score > float("-inf")
        p = tl.load(target + place, mask=there, other=0.0)
        higher = tl.maximum(top, score)
        total = total * tl.exp(top - higher) + tl.exp(score - higher)
        top = higher
        told += p * (tl.log(tl.where(p > 0, p, 1.0)) - tl.where(there, score, 0.0))
        mass += p
        last = tl.where(there, place + 1, last)
    highest = tl.max(top, 0)
    sum_ = tl.sum(total * tl.exp(top - highest), 0)
    lse = highest + tl.log(tl.where(sum_ > 0, sum_, 1.0))
    tl.store(loss + n, tl.sum(told, 0) + lse * tl.sum(mass, 0))

    h = tl.arange(0, HEADS)
    d = tl.arange(0, DIM)
    real = (h < heads)[:, None]
    query = tl.load(q + n * q_n + h[:, None] * q_h + d[None, :], mask=real, other=0.0)
    weight = tl.load(w + n * heads + h, mask=h < heads, other=0.0)
    acc = tl.zeros([HEADS, DIM], tl.float32)
    of_w = tl.zeros([HEADS], tl.float32)
    for start in range(0, tl.max(last, 0), BLOCK_K):
        place = start + tl.arange(0, BLOCK_K)
        slot = tl.load(slots + place, mask=place < keys, other=-1)
        there = slot >= 0
        key = tl.load(k + slot.to(tl.int64)[:, None] * k_m + d[None, :], mask=there[:, None], other=0.0)
        score = tl.load(scores + place, mask=place < keys, other=float("-inf"))
        slope = tl.exp(score - lse) - tl.load(target + place, mask=place < keys, other=0.0)
        slope = tl.where(there, slope, 0.0)
        dots = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        of_w += tl.sum(tl.maximum(dots, 0.0) * slope[None, :], 1)
        dot = tl.where(dots > 0, weight[:, None] * slope[None, :], 0.0).to(key.dtype)
        acc = tl.dot(dot, key, acc, input_precision=PRECISION)
        of_key = tl.dot(tl.trans(dot), query, input_precision=PRECISION)
        to = dk + slot.to(tl.int64)[:, None] * dk_m + d[None, :]
        tl.atomic_add(to, of_key, mask=there[:, None], sem="relaxed")
    tl.store(dq + n * dq_n + h[:, None] * dq_h + d[None, :], acc.to(dq.dtype.element_ty), mask=real)
    tl.store(dw + n * heads + h, of_w, mask=h < heads)


def fast(
    q_NHd: Tensor,
    k_Md: Tensor,
    w_NH: Tensor,
    slots_NK: Tensor,
    target_NK: Tensor,
    *,
    tiles: tuple[int, int, int] | None = None,
) -> Found:
    """The kernels. For measuring: `tiles` (entries of a tile, warps, stages of the second)."""
    (N, H, d), K = q_NHd.shape, slots_NK.shape[1]
    w_NH, target_NK = w_NH.contiguous(), target_NK.contiguous()
    loss_N = torch.zeros(N, dtype=torch.float32, device=q_NHd.device)
    dq_NHd = torch.zeros_like(q_NHd) if not K else torch.empty_like(q_NHd)
    dw_NH = torch.zeros_like(w_NH) if not K else torch.empty_like(w_NH)
    dk_Md = torch.zeros(k_Md.shape, dtype=torch.float32, device=k_Md.device)
    if N and K:
        wide = q_NHd.dtype == torch.float32
        block, warps, stages = tiles or ((16, 4, 1) if wide else (64, 8, 2))
        heads, scores_NK = max(16, triton.next_power_of_2(H)), torch.empty_like(target_NK)
        shape: dict[str, Any] = {"HEADS": heads, "DIM": d, "PRECISION": "ieee" if wide else "tf32"}
        _score[(N, max(1, min(264 // N, K // 64)))](
            q_NHd, k_Md, w_NH, slots_NK, scores_NK, H, K, q_NHd.stride(0), q_NHd.stride(1), k_Md.stride(0),
            slots_NK.stride(0), BLOCK_K=16 if wide else 64, num_warps=4, num_stages=1 if wide else 3, **shape,
        )  # fmt: skip
        _learn[(N,)](
            q_NHd, k_Md, w_NH, slots_NK, scores_NK, target_NK, loss_N, dq_NHd, dk_Md, dw_NH, H, K, q_NHd.stride(0),
            q_NHd.stride(1), k_Md.stride(0), slots_NK.stride(0), dq_NHd.stride(0), dq_NHd.stride(1), dk_Md.stride(0),
            BLOCK_K=block, ROW=512, num_warps=warps, num_stages=stages, **shape,
        )  # fmt: skip
    return loss_N.sum(), dq_NHd, dk_Md, dw_NH


def supported(q_NHd: Tensor, k_Md: Tensor, w_NH: Tensor, slots_NK: Tensor, target_NK: Tensor) -> bool:
    """Whether `fast` takes these: queries and keys of one of bf16, fp16 and fp32, 16 to 128 channels, a power of two;
    up to 128 heads; weights and target in fp32; last axes contiguous."""
    (_, H, d) = q_NHd.shape
    return (
        q_NHd.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and q_NHd.dtype == k_Md.dtype
        and w_NH.dtype == target_NK.dtype == torch.float32
        and 16 <= d <= 128
        and d & (d - 1) == 0
        and H <= 128
        and q_NHd.stride(2) == k_Md.stride(1) == slots_NK.stride(1) == 1
    )


class _Learned(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_NHd: Tensor, k_Md: Tensor, w_NH: Tensor, slots_NK: Tensor, target_NK: Tensor
    ) -> Tensor:
        given = (q_NHd, k_Md, w_NH, slots_NK, target_NK)
        loss, dq_NHd, dk_Md, dw_NH = (fast if usable(*given) and supported(*given) else reference)(*given)
        ctx.save_for_backward(dq_NHd, dk_Md.to(k_Md.dtype), dw_NH)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        return (*(grad * slope.to(grad.dtype) for grad in ctx.saved_tensors), None, None)


def index_loss(q_NHd: Tensor, k_Md: Tensor, w_NH: Tensor, slots_NK: Tensor, target_NK: Tensor) -> Tensor:
    """The sum over queries of how far (KL, in nats) softmax(I) lies from `target_NK`, over chosen entries.

    Index queries `[N, H, d]`, keys `[M, d]`, head weights `[N, H]` that carry all scales: these get gradients.
    `slots_NK` int32: rows of the keys, or -1, anywhere in the row, for none; a query with none adds nothing.
    `target_NK`: non-negative, of sum 1 over a query's entries, 0 where there is none. -> fp32 (fp64 if q is).
    Raises ValueError if shapes don't belong together.
    """
    N, H, d = q_NHd.shape
    if (
        k_Md.shape[1:] != (d,)
        or w_NH.shape != (N, H)
        or slots_NK.shape != target_NK.shape
        or len(slots_NK) != N
    ):
        raise ValueError(
            f"index queries {tuple(q_NHd.shape)}, keys {tuple(k_Md.shape)}, weights {tuple(w_NH.shape)}, slots "
            f"{tuple(slots_NK.shape)} and target {tuple(target_NK.shape)} don't fit"
        )
    loss: Tensor = _Learned.apply(q_NHd, k_Md, w_NH, slots_NK, target_NK)
    return loss
