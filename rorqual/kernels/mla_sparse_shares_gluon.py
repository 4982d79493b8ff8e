"""`mla_sparse_shares` for Hopper in Gluon: 128 heads of a query, so that a row is gathered once.

Programs stay. Warps gather rows into a ring of tiles of 64; each of two groups of four warps keeps q of 64 heads in its
registers (72 KB) and sums its heads' shares. 9.4 MFLOP a tile stand against 74 KB from the cache.
"""

# mypy: disable-error-code="no-untyped-def"

import torch
from torch import Tensor

from rorqual.kernels.gluon_rings import (
    AVAILABLE,
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    processors,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from rorqual.kernels.mla_sparse_backward_gluon import BLOCK_K, HEADS, LOG2_E, _fetch_rows

STAGES = 3


@gluon.jit
def _share_group(
    q, slots, ends, lse, shares, k_tiles, e_tiles, full, free, items, factor, q_n, q_h, slots_n, s_n, s_g,
    GROUP: gl.constexpr, HEADS: gl.constexpr, LOG2_E: gl.constexpr,
):  # fmt: skip
    """The part of 64 heads in the shares."""
    STAGES: gl.constexpr = k_tiles.shape[0]
    BLOCK_K: gl.constexpr = k_tiles.shape[1]
    RANK: gl.constexpr = k_tiles.shape[2]
    ROPE: gl.constexpr = e_tiles.shape[2]
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_K, 16])
    A: gl.constexpr = gl.DotOperandLayout(0, LAYOUT, 2)
    FLAT: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    h = GROUP * 64 + gl.arange(0, 64, gl.SliceLayout(1, A))[:, None]
    c = gl.arange(0, RANK, gl.SliceLayout(0, A))[None, :]
    e = RANK + gl.arange(0, ROPE, gl.SliceLayout(0, A))[None, :]
    head = GROUP * 64 + gl.arange(0, 64, gl.SliceLayout(1, LAYOUT))
    tile = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        n = gl.cast(item, gl.int64)
        end = gl.load(ends + n)
        row = slots + n * slots_n
        to = shares + n * s_n + GROUP * s_g
        of_h = q + n * q_n + h * q_h
        query = gl.load(of_h + c)
        query_rope = gl.load(of_h + e)
        less = gl.load(lse + n * HEADS + head) * LOG2_E
        for start in range(0, end, BLOCK_K):
            stage = tile % STAGES
            place = start + gl.arange(0, BLOCK_K, FLAT)
            there = gl.load(row + place, mask=place < end, other=-1) >= 0
            mbarrier.wait(full.index(stage), (tile // STAGES) & 1)
            fence_async_shared()  # ordinary copies wrote what the tensor cores read
            score = gl.zeros([64, BLOCK_K], gl.float32, LAYOUT)
            score = warpgroup_mma(
                query, k_tiles.index(stage).permute((1, 0)), score, use_acc=False, is_async=True
            )
            score = warpgroup_mma(query_rope, e_tiles.index(stage).permute((1, 0)), score, is_async=True)
            score = warpgroup_mma_wait(0, deps=[score])
            mbarrier.arrive(free.index(stage))
            share = gl.sum(gl.exp2(score * factor - less[:, None]), 0)
            share = gl.convert_layout(share, FLAT) / HEADS
            gl.store(to + place, gl.where(there, share, 0.0), mask=place < end)
            tile += 1


@gluon.jit(do_not_specialize=("items",))
def _shares(
    q, latent, slots, ends, lse, shares, items, factor, q_n, q_h, l_m, slots_n, s_n, s_g,
    RANK: gl.constexpr, ROPE: gl.constexpr, HEADS: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
    LOG2_E: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = q.dtype.element_ty
    BAR: gl.constexpr = mbarrier.MBarrierLayout()
    SWIZZLED: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    k_tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_K, RANK], SWIZZLED)
    e_tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_K, ROPE], SWIZZLED)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=128)  # every fetching thread, when its copies are there
        mbarrier.init(free.index(i), count=2)
    gl.warp_specialize(
        [
            (
                _share_group,
                (
                    q, slots, ends, lse, shares, k_tiles, e_tiles, full, free, items, factor, q_n, q_h, slots_n, s_n,
                    s_g, 0, HEADS, LOG2_E,
                ),
            ),
            (
                _share_group,
                (
                    q, slots, ends, lse, shares, k_tiles, e_tiles, full, free, items, factor, q_n, q_h, slots_n, s_n,
                    s_g, 1, HEADS, LOG2_E,
                ),
            ),
            (
                _fetch_rows,
                (
                    latent, latent, slots, ends, k_tiles, k_tiles, e_tiles, full, free, items, 1, HEADS, slots_n, l_m,
                    RANK, False,
                ),
            ),
        ],
        [4, 4],
        [208, 80],
    )  # fmt: skip


def supported(q_NHC: Tensor, latent_MC: Tensor, slots_NK: Tensor) -> bool:
    """Whether this kernel takes such tensors: bf16 or fp16 on a Hopper GPU, 128 heads, a latent of 512 and a rotary
    part of 64, and rows that 16-byte copies can read."""
    return (
        AVAILABLE
        and q_NHC.is_cuda
        and torch.cuda.get_device_capability(q_NHC.device)[0] == 9
        and q_NHC.dtype in (torch.bfloat16, torch.float16)
        and q_NHC.dtype == latent_MC.dtype
        and q_NHC.shape[1:] == (HEADS, 576)
        and q_NHC.stride(2) == latent_MC.stride(1) == slots_NK.stride(1) == 1
        and latent_MC.stride(0) % 8 == 0
        and latent_MC.data_ptr() % 16 == 0
    )


def shares(q_NHC: Tensor, latent_MC: Tensor, slots_NK: Tensor, lse_NH: Tensor, *, scale: float) -> Tensor:
    """The shares of all entries, `[N, K]` in fp32."""
    N, K = slots_NK.shape
    place_K = torch.arange(1, K + 1, device=slots_NK.device, dtype=torch.int32)
    ends_N = torch.where(slots_NK >= 0, place_K, 0).amax(1)
    halves_2NK = torch.zeros(2, N, K, dtype=torch.float32, device=q_NHC.device)
    _shares[(min(processors(q_NHC), N),)](
        q_NHC, latent_MC, slots_NK, ends_N, lse_NH.contiguous(), halves_2NK, N, scale * LOG2_E, q_NHC.stride(0),
        q_NHC.stride(1), latent_MC.stride(0), slots_NK.stride(0), K, N * K, RANK=512, ROPE=64, HEADS=HEADS,
        BLOCK_K=BLOCK_K, STAGES=STAGES, LOG2_E=LOG2_E, num_warps=4,
    )  # fmt: skip
    return halves_2NK[0].add_(halves_2NK[1])
