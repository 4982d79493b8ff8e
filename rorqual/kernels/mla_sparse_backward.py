"""The backward pass of `mla_sparse` (V3.2 report section 2.1, whose sparse stage trains through it; facts 3.8).

With P = exp(scale q K^T - lse) and delta = rowsum(o * do), per query over its own chosen rows:

    dS = scale P * (do V^T - delta),    dq = dS K,    dK = dS^T q,    dV = P^T do.

Three kernels, not one: of 128 heads q and do take 278 KB, the gradient of q another 295 KB and that of 64 rows 147 KB,
where a multiprocessor has 227 KB beside 256 KB of registers. Fused, it would have to take 64 heads at a time and add
every row's gradient to memory twice. So the first leaves P and dS in memory, some queries at a time; the second and
third only multiply. At 128 heads and 2,048 rows a query takes 1.44 GFLOP; P and dS are 1 MB there and 1 MB back,
0.5 us of 5.8 us at 250 TFLOP/s, and what is added to the rows of memory is 4.7 MB in fp32, once for all heads.

These additions are atomic, in no fixed order: two runs differ by the rounding of fp32 sums.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rorqual.kernels import mla_sparse_backward_entries, mla_sparse_backward_gluon
from rorqual.kernels.gpu import tl, triton, usable
from rorqual.kernels.mla_prefill import LOG2_E
from rorqual.kernels.mla_sparse import mla_sparse

TILE = 64
"""Keys of a tile, to whole ones of which P and dS are filled up."""

ROOM = 2**29
"""Bytes that P and dS may take together."""


def reference(
    q_NHC: Tensor,
    latent_MC: Tensor,
    slots_NK: Tensor,
    o_NHc: Tensor,
    lse_NH: Tensor,
    do_NHc: Tensor,
    *,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The definition of `mla_sparse_backward`: in fp32 (or fp64 if q is), some queries at a time."""
    compute = torch.float64 if q_NHC.dtype == torch.float64 else torch.float32
    N, K, rank = *slots_NK.shape, o_NHc.shape[2]
    dq_NHC = torch.zeros_like(q_NHC)
    dlatent_MC = torch.zeros(latent_MC.shape, dtype=compute, device=latent_MC.device)
    delta_NH = (o_NHc.to(compute) * do_NHc.to(compute)).sum(-1)
    step = max(1, 2**26 // max(1, K * q_NHC.shape[2]))
    for part in range(0, N if K else 0, step):
        rows = slice(part, part + step)
        there_nK = slots_NK[rows] >= 0
        at_nK = slots_NK[rows].clamp(min=0).long()
        seen_nKC = torch.where(there_nK[..., None], latent_MC[at_nK].to(compute), 0)
        q, do = q_NHC[rows].to(compute), do_NHc[rows].to(compute)
        score_nHK = (q @ seen_nKC.mT) * scale
        p_nHK = torch.where(there_nK[:, None], (score_nHK - lse_NH[rows, :, None]).exp(), 0)
        ds_nHK = p_nHK * (do @ seen_nKC[..., :rank].mT - delta_NH[rows, :, None]) * scale
        dq_NHC[rows] = (ds_nHK @ seen_nKC).to(dq_NHC.dtype)
        dseen_nKC = ds_nHK.mT @ q
        dseen_nKC[..., :rank] += p_nHK.mT @ do
        dlatent_MC.index_add_(0, at_nK[there_nK], dseen_nKC[there_nK])
    return dq_NHC, dlatent_MC


@triton.jit
def _begin(  # type: ignore[no-untyped-def]
    o, do, slots, delta, ends, heads, keys, o_n, o_h, do_n, do_h, slots_n,
    HEADS: tl.constexpr, KEYS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """delta of a query, and where its row of slots ends, the trailing -1 left off."""
    n = tl.program_id(0)
    place = tl.arange(0, KEYS)
    slot = tl.load(slots + n.to(tl.int64) * slots_n + place, mask=place < keys, other=-1)
    tl.store(ends + n, tl.max(tl.where(slot >= 0, place + 1, 0), 0))
    c = tl.arange(0, RANK)[None, :]
    for first in range(0, heads, HEADS):
        h = first + tl.arange(0, HEADS)
        real = (h < heads)[:, None]
        a = tl.load(o + n.to(tl.int64) * o_n + h[:, None] * o_h + c, mask=real, other=0.0)
        b = tl.load(do + n.to(tl.int64) * do_n + h[:, None] * do_h + c, mask=real, other=0.0)
        tl.store(delta + n * heads + h, tl.sum(a.to(tl.float32) * b.to(tl.float32), 1), mask=h < heads)


@triton.jit
def _weights(  # type: ignore[no-untyped-def]
    q, do, latent, slots, ends, lse, delta, p, ds, scale, heads, head_blocks, q_n, q_h, do_n, do_h, l_m, slots_n, p_n,
    p_h,
    RANK: tl.constexpr, ROPE: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
    LOG2_E: tl.constexpr,
):  # fmt: skip
    """P and dS of BLOCK_H heads of a query: every `num_programs(1)`-th tile of its row."""
    n = tl.program_id(0) // head_blocks
    h = tl.program_id(0) % head_blocks * BLOCK_H + tl.arange(0, BLOCK_H)
    real = (h < heads)[:, None]
    channel = tl.arange(0, RANK)
    turn = tl.arange(0, ROPE)
    q_ptr = q + n.to(tl.int64) * q_n + h[:, None] * q_h
    query = tl.load(q_ptr + channel[None, :], mask=real, other=0.0)
    query_rope = tl.load(q_ptr + RANK + turn[None, :], mask=real, other=0.0)
    d_o = tl.load(do + n.to(tl.int64) * do_n + h[:, None] * do_h + channel[None, :], mask=real, other=0.0)
    lse_h = tl.load(lse + n * heads + h, mask=h < heads, other=0.0) * LOG2_E
    delta_h = tl.load(delta + n * heads + h, mask=h < heads, other=0.0)
    end = tl.load(ends + n)
    slots += n.to(tl.int64) * slots_n
    to = n.to(tl.int64) * p_n + h[:, None] * p_h
    for start in range(tl.program_id(1) * BLOCK_K, end, tl.num_programs(1) * BLOCK_K):
        place = start + tl.arange(0, BLOCK_K)
        slot = tl.load(slots + place, mask=place < end, other=-1)
        there = slot >= 0
        at = latent + slot.to(tl.int64)[:, None] * l_m
        key = tl.load(at + channel[None, :], mask=there[:, None], other=0.0)
        key_rope = tl.load(at + RANK + turn[None, :], mask=there[:, None], other=0.0)
        score = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        score = tl.dot(query_rope, tl.trans(key_rope), score, input_precision=PRECISION)
        weight = tl.exp2(score * (scale * LOG2_E) - lse_h[:, None])
        weight = tl.where(there[None, :], weight, 0.0)
        slope = tl.dot(d_o, tl.trans(key), input_precision=PRECISION)
        slope = weight * (slope - delta_h[:, None]) * scale
        tl.store(p + to + place[None, :], weight.to(p.dtype.element_ty), mask=real)
        tl.store(ds + to + place[None, :], slope.to(ds.dtype.element_ty), mask=real)


@triton.jit
def _queries(  # type: ignore[no-untyped-def]
    ds, latent, slots, ends, dq, heads, head_blocks, l_m, slots_n, p_n, p_h, dq_n, dq_h,
    RANK: tl.constexpr, ROPE: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq = dS K of BLOCK_H heads of a query."""
    n = tl.program_id(0) // head_blocks
    h = tl.program_id(0) % head_blocks * BLOCK_H + tl.arange(0, BLOCK_H)
    real = (h < heads)[:, None]
    channel = tl.arange(0, RANK)
    turn = tl.arange(0, ROPE)
    end = tl.load(ends + n)
    slots += n.to(tl.int64) * slots_n
    ds += n.to(tl.int64) * p_n
    acc = tl.zeros([BLOCK_H, RANK], tl.float32)
    acc_rope = tl.zeros([BLOCK_H, ROPE], tl.float32)
    for start in range(0, end, BLOCK_K):
        place = start + tl.arange(0, BLOCK_K)
        slot = tl.load(slots + place, mask=place < end, other=-1)
        there = (slot >= 0)[:, None]
        at = latent + slot.to(tl.int64)[:, None] * l_m
        key = tl.load(at + channel[None, :], mask=there, other=0.0)
        key_rope = tl.load(at + RANK + turn[None, :], mask=there, other=0.0)
        slope = tl.load(ds + h[:, None] * p_h + place[None, :], mask=real, other=0.0)
        acc = tl.dot(slope, key, acc, input_precision=PRECISION)
        acc_rope = tl.dot(slope, key_rope, acc_rope, input_precision=PRECISION)
    to = dq + n.to(tl.int64) * dq_n + h[:, None] * dq_h
    tl.store(to + channel[None, :], acc.to(dq.dtype.element_ty), mask=real)
    tl.store(to + RANK + turn[None, :], acc_rope.to(dq.dtype.element_ty), mask=real)


@triton.jit
def _entries(  # type: ignore[no-untyped-def]
    p, ds, q, do, slots, ends, dlatent, heads, strips, q_n, q_h, do_n, do_h, slots_n, p_n, p_h, l_m,
    RANK: tl.constexpr, BLOCK_H: tl.constexpr, STRIP: tl.constexpr, TURN: tl.constexpr,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dK + dV of a query's rows, added to memory: STRIP channels of the latent and TURN rotary ones."""
    n = tl.program_id(0) // strips
    strip = tl.program_id(0) % strips
    channel = strip * STRIP + tl.arange(0, STRIP)
    turn = RANK + strip * TURN + tl.arange(0, TURN)
    end = tl.load(ends + n)
    slots += n.to(tl.int64) * slots_n
    q += n.to(tl.int64) * q_n
    do += n.to(tl.int64) * do_n
    part = n.to(tl.int64) * p_n
    for first in range(0, heads, BLOCK_H):
        h = first + tl.arange(0, BLOCK_H)
        real = (h < heads)[:, None]
        query = tl.load(q + h[:, None] * q_h + channel[None, :], mask=real, other=0.0)
        query_rope = tl.load(q + h[:, None] * q_h + turn[None, :], mask=real, other=0.0)
        d_o = tl.load(do + h[:, None] * do_h + channel[None, :], mask=real, other=0.0)
        for start in range(0, end, BLOCK_K):
            place = start + tl.arange(0, BLOCK_K)
            slot = tl.load(slots + place, mask=place < end, other=-1)
            there = (slot >= 0)[:, None]
            at = part + h[:, None] * p_h + place[None, :]
            weight = tl.trans(tl.load(p + at, mask=real, other=0.0))
            slope = tl.trans(tl.load(ds + at, mask=real, other=0.0))
            acc = tl.dot(weight, d_o, input_precision=PRECISION)
            acc = tl.dot(slope, query, acc, input_precision=PRECISION)
            acc_rope = tl.dot(slope, query_rope, input_precision=PRECISION)
            to = dlatent + slot.to(tl.int64)[:, None] * l_m
            tl.atomic_add(to + channel[None, :], acc, mask=there, sem="relaxed")
            tl.atomic_add(to + turn[None, :], acc_rope, mask=there, sem="relaxed")


def fast(
    q_NHC: Tensor,
    latent_MC: Tensor,
    slots_NK: Tensor,
    o_NHc: Tensor,
    lse_NH: Tensor,
    do_NHc: Tensor,
    *,
    scale: float,
    room: int = ROOM,
    plan: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """`mla_sparse_backward` in Triton. For measuring: `room`, and by `plan` for each kernel (weights, queries, entries)
    whether the form for Hopper is taken (`hopper`) and what it is to be told."""
    q_NHC, do_NHc, lse_NH = q_NHC.contiguous(), do_NHc.contiguous(), lse_NH.contiguous()
    (N, H), K, rank = q_NHC.shape[:2], slots_NK.shape[1], o_NHc.shape[2]
    dq_NHC = torch.zeros_like(q_NHC) if not K else torch.empty_like(q_NHC)
    dlatent_MC = torch.zeros(latent_MC.shape, dtype=torch.float32, device=latent_MC.device)
    if not N or not K:
        return dq_NHC, dlatent_MC
    device = q_NHC.device
    wide = triton.cdiv(K, TILE) * TILE
    at_once = max(1, min(N, room // (2 * H * wide * q_NHC.element_size())))
    held = torch.empty(2, at_once, H, wide, dtype=q_NHC.dtype, device=device)
    delta_NH = torch.empty(N, H, dtype=torch.float32, device=device)
    ends_N = torch.empty(N, dtype=torch.int32, device=device)
    _begin[(N,)](
        o_NHc, do_NHc, slots_NK, delta_NH, ends_N, H, K, o_NHc.stride(0), o_NHc.stride(1), do_NHc.stride(0),
        do_NHc.stride(1), slots_NK.stride(0), HEADS=16, KEYS=triton.next_power_of_2(K), RANK=rank, num_warps=4,
    )  # fmt: skip
    hopper = mla_sparse_backward_gluon.supported(q_NHC, latent_MC, slots_NK, do_NHc)
    how = {
        name: {"hopper": hopper, **(plan or {}).get(name, {})} for name in ("weights", "queries", "entries")
    }
    weights = mla_sparse_backward_gluon.weights if how["weights"].pop("hopper") else _run_weights
    queries = mla_sparse_backward_gluon.queries if how["queries"].pop("hopper") else _run_queries
    entries = mla_sparse_backward_entries.entries if how["entries"].pop("hopper") else _run_entries
    for first in range(0, N, at_once):
        n = slice(first, first + at_once)
        q, do, slots, ends = q_NHC[n], do_NHc[n], slots_NK[n], ends_N[n]
        p, ds = held[:, : len(q)]
        weights(q, latent_MC, slots, ends, lse_NH[n], do, delta_NH[n], p, ds, scale=scale, **how["weights"])
        queries(ds, latent_MC, slots, ends, dq_NHC[n], rank=rank, **how["queries"])
        entries(p, ds, q, slots, ends, do, dlatent_MC, **how["entries"])
    return dq_NHC, dlatent_MC


def _precision(x: Tensor) -> str:
    return "ieee" if x.dtype == torch.float32 else "tf32"


def _block(heads: int, most: int) -> int:
    return max(16, min(most, triton.next_power_of_2(heads)))


def _run_weights(
    q_NHC: Tensor, latent_MC: Tensor, slots_NK: Tensor, ends_N: Tensor, lse_NH: Tensor, do_NHc: Tensor,
    delta_NH: Tensor, p_NHK: Tensor, ds_NHK: Tensor, *, scale: float,
    tiles: tuple[int, int, int] | None = None,
) -> None:  # fmt: skip
    (N, H, C), rank = q_NHC.shape, do_NHc.shape[2]
    most, warps, stages = tiles or ((16, 4, 1) if q_NHC.dtype == torch.float32 else (64, 8, 1))
    block_h = _block(H, most)
    blocks = triton.cdiv(H, block_h)
    splits = max(1, min(264 // (N * blocks), p_NHK.shape[2] // TILE))
    _weights[(N * blocks, splits)](
        q_NHC, do_NHc, latent_MC, slots_NK, ends_N, lse_NH, delta_NH, p_NHK, ds_NHK, scale, H, blocks,
        q_NHC.stride(0), q_NHC.stride(1), do_NHc.stride(0), do_NHc.stride(1), latent_MC.stride(0), slots_NK.stride(0),
        p_NHK.stride(0), p_NHK.stride(1), RANK=rank, ROPE=C - rank, BLOCK_H=block_h, BLOCK_K=TILE,
        PRECISION=_precision(q_NHC), LOG2_E=LOG2_E, num_warps=warps, num_stages=stages,
    )  # fmt: skip


def _run_queries(
    ds_NHK: Tensor, latent_MC: Tensor, slots_NK: Tensor, ends_N: Tensor, dq_NHC: Tensor, *, rank: int,
    tiles: tuple[int, int, int, int] | None = None,
) -> None:  # fmt: skip
    N, H, C = dq_NHC.shape
    most, block_k, warps, stages = tiles or (
        (16, 16, 4, 1) if dq_NHC.dtype == torch.float32 else (64, 64, 8, 2)
    )
    block_h = _block(H, most)
    blocks = triton.cdiv(H, block_h)
    _queries[(N * blocks,)](
        ds_NHK, latent_MC, slots_NK, ends_N, dq_NHC, H, blocks, latent_MC.stride(0), slots_NK.stride(0),
        ds_NHK.stride(0), ds_NHK.stride(1), dq_NHC.stride(0), dq_NHC.stride(1), RANK=rank, ROPE=C - rank,
        BLOCK_H=block_h, BLOCK_K=block_k, PRECISION=_precision(dq_NHC), num_warps=warps, num_stages=stages,
    )  # fmt: skip


def _run_entries(
    p_NHK: Tensor, ds_NHK: Tensor, q_NHC: Tensor, slots_NK: Tensor, ends_N: Tensor, do_NHc: Tensor,
    dlatent_MC: Tensor, *, tiles: tuple[int, int, int, int] | None = None,
) -> None:  # fmt: skip
    (N, H, C), rank = q_NHC.shape, do_NHc.shape[2]
    most, block_k, warps, stages = tiles or (
        (32, 16, 4, 1) if q_NHC.dtype == torch.float32 else (128, 64, 8, 2)
    )
    strips = max(1, min(rank // 128, (C - rank) // 16))
    _entries[(N * strips,)](
        p_NHK, ds_NHK, q_NHC, do_NHc, slots_NK, ends_N, dlatent_MC, H, strips, q_NHC.stride(0), q_NHC.stride(1),
        do_NHc.stride(0), do_NHc.stride(1), slots_NK.stride(0), p_NHK.stride(0), p_NHK.stride(1), dlatent_MC.stride(0),
        RANK=rank, BLOCK_H=_block(H, most), STRIP=rank // strips, TURN=(C - rank) // strips, BLOCK_K=block_k,
        PRECISION=_precision(q_NHC), num_warps=warps, num_stages=stages,
    )  # fmt: skip


def supported(q_NHC: Tensor, latent_MC: Tensor, slots_NK: Tensor, o_NHc: Tensor, do_NHc: Tensor) -> bool:
    """Whether `fast` takes these: one of bf16, fp16 and fp32, parts that are powers of two from 16 on, last axes
    contiguous."""
    rank = o_NHc.shape[2]
    tensors = (q_NHC, latent_MC, o_NHc, do_NHc)
    return (
        q_NHC.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and all(t.dtype == q_NHC.dtype for t in tensors)
        and all(t.stride(-1) == 1 for t in (*tensors[:3], slots_NK))
        and all(w >= 16 and w & (w - 1) == 0 for w in (rank, q_NHC.shape[2] - rank))
        and rank <= 512
    )


def mla_sparse_backward(
    q_NHC: Tensor,
    latent_MC: Tensor,
    slots_NK: Tensor,
    o_NHc: Tensor,
    lse_NH: Tensor,
    do_NHc: Tensor,
    *,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The gradients of q and of the latents from that of `mla_sparse`'s result.

    q `[N, H, rank + rope]`; latents `[M, rank + rope]`, whose first `rank` channels are the values; `slots_NK` int32
    rows of it, or -1 for none; o `[N, H, rank]` and lse `[N, H]` fp32 as `mla_sparse` gave them; the gradient do of o.
    -> dq in q's dtype, and the latents' gradient in fp32 (fp64 if q is). Sums over the queries that chose a row come in
    any order. Raises ValueError if shapes don't belong together.
    """
    N, H, C = q_NHC.shape
    if (
        slots_NK.shape[0] != N
        or latent_MC.shape[-1] != C
        or o_NHc.shape != do_NHc.shape
        or o_NHc.shape[:2] != (N, H)
        or lse_NH.shape != (N, H)
        or o_NHc.shape[2] > C
    ):
        raise ValueError(
            f"queries {tuple(q_NHC.shape)}, latents {tuple(latent_MC.shape)}, slots {tuple(slots_NK.shape)}, results "
            f"{tuple(o_NHc.shape)} with sums {tuple(lse_NH.shape)} and their gradient {tuple(do_NHc.shape)} don't fit"
        )
    form = reference
    if usable(q_NHC, latent_MC, slots_NK) and supported(q_NHC, latent_MC, slots_NK, o_NHc, do_NHc):
        form = fast
    return form(q_NHC, latent_MC, slots_NK, o_NHc, lse_NH, do_NHc, scale=scale)


class _Trained(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_NHC: Tensor, latent_MC: Tensor, slots_NK: Tensor, rank: int, scale: float
    ) -> tuple[Tensor, Tensor]:
        o_NHc, lse_NH = mla_sparse(q_NHC, latent_MC[None], slots_NK, rank=rank, scale=scale, lse=True)
        ctx.save_for_backward(q_NHC, latent_MC, slots_NK, o_NHc, lse_NH)
        ctx.scale = scale
        ctx.mark_non_differentiable(lse_NH)
        return o_NHc, lse_NH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do_NHc: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        q_NHC, latent_MC, slots_NK, o_NHc, lse_NH = ctx.saved_tensors
        dq_NHC, dlatent_MC = mla_sparse_backward(
            q_NHC, latent_MC, slots_NK, o_NHc, lse_NH, do_NHc.contiguous(), scale=ctx.scale
        )
        return dq_NHC, dlatent_MC.to(latent_MC.dtype), None, None, None


def mla_sparse_trained(
    q_NHC: Tensor, latent_MC: Tensor, slots_NK: Tensor, *, rank: int, scale: float
) -> tuple[Tensor, Tensor]:
    """`mla_sparse` over latents `[M, rank + rope]` in one piece, with gradients of q and of the latents; and its
    log-sum-exp, without."""
    o_NHc, lse_NH = _Trained.apply(q_NHC, latent_MC, slots_NK, rank, scale)
    return o_NHc, lse_NH
