"""What share of a query's attention each of its chosen entries got, as a mean over heads: the target that V3.2's
indexer learns from in the sparse stage (V3.2 report section 2.1; facts 3.8).

`mla_sparse` leaves the log-sum-exp of every head, so a share is one product: exp(scale q K^T - lse), summed over heads.
"""

import torch
from torch import Tensor

from rorqual.kernels import mla_sparse_shares_gluon
from rorqual.kernels.gpu import tl, triton, usable
from rorqual.kernels.mla_prefill import LOG2_E


def reference(q_NHC: Tensor, latent_MC: Tensor, slots_NK: Tensor, lse_NH: Tensor, *, scale: float) -> Tensor:
    """The definition of `mla_sparse_shares`: in fp32 (or fp64 if q is), some queries at a time."""
    compute = torch.float64 if q_NHC.dtype == torch.float64 else torch.float32
    N, K = slots_NK.shape
    share_NK = torch.zeros(N, K, dtype=compute, device=q_NHC.device)
    step = max(1, 2**26 // max(1, K * q_NHC.shape[2]))
    for part in range(0, N, step):
        n = slice(part, part + step)
        there_nK = slots_NK[n] >= 0
        seen_nKC = latent_MC[slots_NK[n].clamp(min=0).long()].to(compute)
        seen_nKC = torch.where(there_nK[..., None], seen_nKC, 0)
        weight_nHK = (q_NHC[n].to(compute) @ seen_nKC.mT * scale - lse_NH[n, :, None]).exp()
        share_NK[n] = torch.where(there_nK, weight_nHK.mean(1), 0)
    return share_NK


@triton.jit
def _shares(  # type: ignore[no-untyped-def]
    q, latent, slots, lse, parts, scale, heads, head_blocks, keys, q_n, q_h, l_m, slots_n,
    RANK: tl.constexpr, ROPE: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
    LOG2_E: tl.constexpr,
):  # fmt: skip
    """The part of BLOCK_H heads of a query in its shares: every `num_programs(1)`-th tile of its row."""
    n = (tl.program_id(0) // head_blocks).to(tl.int64)
    h = tl.program_id(0) % head_blocks * BLOCK_H + tl.arange(0, BLOCK_H)
    real = (h < heads)[:, None]
    channel = tl.arange(0, RANK)
    turn = tl.arange(0, ROPE)
    q_ptr = q + n * q_n + h[:, None] * q_h
    query = tl.load(q_ptr + channel[None, :], mask=real, other=0.0)
    query_rope = tl.load(q_ptr + RANK + turn[None, :], mask=real, other=0.0)
    lse_h = tl.load(lse + n * heads + h, mask=h < heads, other=float("inf")) * LOG2_E
    to = parts + tl.program_id(0).to(tl.int64) * keys
    for start in range(tl.program_id(1) * BLOCK_K, keys, tl.num_programs(1) * BLOCK_K):
        place = start + tl.arange(0, BLOCK_K)
        slot = tl.load(slots + n * slots_n + place, mask=place < keys, other=-1)
        there = slot >= 0
        at = latent + slot.to(tl.int64)[:, None] * l_m
        key = tl.load(at + channel[None, :], mask=there[:, None], other=0.0)
        key_rope = tl.load(at + RANK + turn[None, :], mask=there[:, None], other=0.0)
        score = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        score = tl.dot(query_rope, tl.trans(key_rope), score, input_precision=PRECISION)
        weight = tl.sum(tl.exp2(score * (scale * LOG2_E) - lse_h[:, None]), 0)
        tl.store(to + place, tl.where(there, weight / heads, 0.0), mask=place < keys)


def fast(
    q_NHC: Tensor,
    latent_MC: Tensor,
    slots_NK: Tensor,
    lse_NH: Tensor,
    *,
    scale: float,
    hopper: bool | None = None,
    tiles: tuple[int, int, int, int] | None = None,
) -> Tensor:
    """The kernels. For measuring: `hopper` (the form for that GPU or the plain one), and the plain one's `tiles` (heads
    and entries of a tile, warps, stages)."""
    if hopper is None:
        hopper = mla_sparse_shares_gluon.supported(q_NHC, latent_MC, slots_NK)
    if hopper and slots_NK.numel():
        return mla_sparse_shares_gluon.shares(q_NHC, latent_MC, slots_NK, lse_NH, scale=scale)
    (N, H, C), K = q_NHC.shape, slots_NK.shape[1]
    rank = _rank(C)
    wide = q_NHC.dtype == torch.float32
    most, block_k, warps, stages = tiles or ((16, 16, 4, 1) if wide else (64, 64, 8, 2))
    block_h = max(16, min(most, triton.next_power_of_2(H)))
    blocks = triton.cdiv(H, block_h)
    parts_NbK = torch.empty(N, blocks, K, dtype=torch.float32, device=q_NHC.device)
    if N and K:
        _shares[(N * blocks, max(1, min(264 // (N * blocks), K // block_k)))](
            q_NHC, latent_MC, slots_NK, lse_NH.contiguous(), parts_NbK, scale, H, blocks, K, q_NHC.stride(0),
            q_NHC.stride(1), latent_MC.stride(0), slots_NK.stride(0), RANK=rank, ROPE=C - rank, BLOCK_H=block_h,
            BLOCK_K=block_k, PRECISION="ieee" if wide else "tf32", LOG2_E=LOG2_E, num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return parts_NbK.sum(1) if blocks > 1 else parts_NbK[:, 0]


def _rank(channels: int) -> int:
    """Tiles are powers of two wide: the widest part of them, and the rest."""
    return 1 << (channels.bit_length() - 1)


def supported(q_NHC: Tensor, latent_MC: Tensor, slots_NK: Tensor, lse_NH: Tensor) -> bool:
    """Whether `fast` takes these: one of bf16, fp16 and fp32, sums in fp32, parts that are powers of two of 16 to 512,
    last axes contiguous."""
    rank = _rank(q_NHC.shape[2])
    rest = q_NHC.shape[2] - rank
    return (
        q_NHC.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and q_NHC.dtype == latent_MC.dtype
        and lse_NH.dtype == torch.float32
        and rest >= 16
        and rest & (rest - 1) == 0
        and rank <= 512
        and q_NHC.stride(2) == latent_MC.stride(1) == slots_NK.stride(1) == 1
    )


@torch.no_grad()
def mla_sparse_shares(
    q_NHC: Tensor, latent_MC: Tensor, slots_NK: Tensor, lse_NH: Tensor, *, scale: float
) -> Tensor:
    """Each chosen entry's share of its query's attention, mean over heads: `[N, K]` in fp32 (fp64 if q is), 0 where
    there is no entry; a query's shares add up to 1.

    q `[N, H, rank + rope]`; latents `[M, rank + rope]`; `slots_NK` int32 rows of it, or -1 for none; lse `[N, H]` as
    `mla_sparse` gives it for the same choice and `scale`. Takes no gradient. Raises ValueError if shapes don't belong
    together.
    """
    if (
        len(slots_NK) != len(q_NHC)
        or latent_MC.shape[1:] != q_NHC.shape[2:]
        or lse_NH.shape != q_NHC.shape[:2]
    ):
        raise ValueError(
            f"queries {tuple(q_NHC.shape)}, latents {tuple(latent_MC.shape)}, slots {tuple(slots_NK.shape)} and sums "
            f"{tuple(lse_NH.shape)} don't fit"
        )
    given = q_NHC, latent_MC, slots_NK, lse_NH
    return (fast if usable(*given) and supported(*given) else reference)(*given, scale=scale)
