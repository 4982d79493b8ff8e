"""Two of the three kernels of `mla_sparse_backward` for Hopper in Gluon.

Programs stay, with warps that gather rows into a ring of tiles of 64 keys and two groups of four warps that multiply.
*Weights*: 64 heads of a query; q lies in the registers of the first group (72 KB), do in those of the
second (64 KB), so that only rows of keys pass through shared memory, and both products read one operand from there.
The first leaves P where the second makes dS of it; the copy engine (TMA) takes both to memory. *Queries*: 128 heads
and half the channels, so that a gathered row is read by both groups.
"""

# mypy: disable-error-code="no-untyped-def"

import functools
import math
from typing import Any

import torch
from torch import Tensor

from rorqual.kernels.gluon_rings import (
    AVAILABLE,
    TensorDescriptor,
    async_copy,
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    processors,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

BLOCK_K = 64
HEADS = 128
PARTS = 2
LOG2_E = math.log2(math.e)


@gluon.jit
def _fetch_rows(
    ds_desc, latent, slots, ends, s_tiles, k_tiles, e_tiles, full, free, items, parts, heads, slots_n, l_m,
    RANK: gl.constexpr, SLOPES: gl.constexpr,
):  # fmt: skip
    """Warps that gather an item's rows: the channels of its part, of the latent and of the rest. With SLOPES the copy
    engine brings dS beside them, and its bytes and the threads' copies fill one barrier."""
    STAGES: gl.constexpr = k_tiles.shape[0]
    BLOCK_K: gl.constexpr = k_tiles.shape[1]
    WIDE: gl.constexpr = k_tiles.shape[2]
    NARROW: gl.constexpr = e_tiles.shape[2]
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    SHORT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // NARROW, NARROW // 8], [4, 1], [1, 0])
    to_k = gl.arange(0, WIDE, gl.SliceLayout(0, ROWS))[None, :]
    to_e = gl.arange(0, NARROW, gl.SliceLayout(0, SHORT))[None, :]
    key = gl.arange(0, BLOCK_K, gl.SliceLayout(1, ROWS))
    short = gl.arange(0, BLOCK_K, gl.SliceLayout(1, SHORT))
    tile = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        n = item // parts
        part = item % parts
        if WIDE == RANK:
            part = 0
        end = gl.load(ends + n)
        row = slots + n.to(gl.int64) * slots_n
        for start in range(0, end, BLOCK_K):
            stage = tile % STAGES
            slot = gl.load(row + start + key, mask=start + key < end, other=-1)
            slot_e = gl.load(row + start + short, mask=start + short < end, other=-1)
            at = latent + (gl.maximum(slot, 0).to(gl.int64) * l_m + part * WIDE)[:, None]
            at_e = latent + (gl.maximum(slot_e, 0).to(gl.int64) * l_m + RANK + part * NARROW)[:, None]
            mbarrier.wait(free.index(stage), ((tile // STAGES) & 1) ^ 1)
            if SLOPES:
                mbarrier.expect(full.index(stage), 2 * ds_desc.block_type.nbytes)
                for half in gl.static_range(2):
                    tma.async_copy_global_to_shared(
                        ds_desc,
                        [n * heads + half * 64, start],
                        full.index(stage),
                        s_tiles.index(2 * stage + half),
                    )
            async_copy.async_copy_global_to_shared(k_tiles.index(stage), at + to_k, mask=(slot >= 0)[:, None])
            async_copy.async_copy_global_to_shared(
                e_tiles.index(stage), at_e + to_e, mask=(slot_e >= 0)[:, None]
            )
            async_copy.mbarrier_arrive(full.index(stage), increment_count=False)
            tile += 1


@gluon.jit
def _scores(
    q, slots, ends, lse, p_desc, k_tiles, e_tiles, p_tiles, bars, items, head_blocks, heads, factor, q_n, q_h, slots_n,
    LOG2_E: gl.constexpr,
):  # fmt: skip
    """The first group of `_weights`: P."""
    full, free, p_full, p_free = bars
    STAGES: gl.constexpr = k_tiles.shape[0]
    BLOCK_K: gl.constexpr = k_tiles.shape[1]
    RANK: gl.constexpr = k_tiles.shape[2]
    ROPE: gl.constexpr = e_tiles.shape[2]
    DEPTH: gl.constexpr = p_tiles.shape[0]
    BLOCK_H: gl.constexpr = p_tiles.shape[1]
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_K, 16])
    A: gl.constexpr = gl.DotOperandLayout(0, LAYOUT, 2)
    h = gl.arange(0, BLOCK_H, gl.SliceLayout(1, A))[:, None]
    c = gl.arange(0, RANK, gl.SliceLayout(0, A))[None, :]
    e = RANK + gl.arange(0, ROPE, gl.SliceLayout(0, A))[None, :]
    head = gl.arange(0, BLOCK_H, gl.SliceLayout(1, LAYOUT))
    tile = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        n = item // head_blocks
        first = item % head_blocks * BLOCK_H
        end = gl.load(ends + n)
        row = slots + n.to(gl.int64) * slots_n
        of_h = q + n.to(gl.int64) * q_n + (first + h) * q_h
        query = gl.load(of_h + c)
        query_rope = gl.load(of_h + e)
        less = gl.load(lse + n * heads + first + head) * LOG2_E
        for start in range(0, end, BLOCK_K):
            stage = tile % STAGES
            place = start + gl.arange(0, BLOCK_K, gl.SliceLayout(0, LAYOUT))
            there = gl.load(row + place, mask=place < end, other=-1) >= 0
            mbarrier.wait(full.index(stage), (tile // STAGES) & 1)
            fence_async_shared()  # ordinary copies wrote what the tensor cores read
            score = gl.zeros([BLOCK_H, BLOCK_K], gl.float32, LAYOUT)
            score = warpgroup_mma(
                query, k_tiles.index(stage).permute((1, 0)), score, use_acc=False, is_async=True
            )
            score = warpgroup_mma(query_rope, e_tiles.index(stage).permute((1, 0)), score, is_async=True)
            score = warpgroup_mma_wait(0, deps=[score])
            mbarrier.arrive(free.index(stage))
            weight = gl.exp2(score * factor - less[:, None])
            weight = gl.where(there[None, :], weight, 0.0)
            spot = tile % DEPTH
            tma.store_wait(DEPTH - 1)
            mbarrier.wait(p_free.index(spot), ((tile // DEPTH) & 1) ^ 1)
            p_tiles.index(spot).store(weight.to(p_tiles.dtype))
            fence_async_shared()
            mbarrier.arrive(p_full.index(spot))
            tma.async_copy_shared_to_global(p_desc, [n * heads + first, start], p_tiles.index(spot))
            tile += 1
    tma.store_wait(0)


@gluon.jit
def _slopes(
    do, ends, delta, ds_desc, k_tiles, p_tiles, ds_tile, bars, items, head_blocks, heads, scale, do_n, do_h
):
    """The second group of `_weights`: dS."""
    full, free, p_full, p_free = bars
    STAGES: gl.constexpr = k_tiles.shape[0]
    BLOCK_K: gl.constexpr = k_tiles.shape[1]
    RANK: gl.constexpr = k_tiles.shape[2]
    DEPTH: gl.constexpr = p_tiles.shape[0]
    BLOCK_H: gl.constexpr = p_tiles.shape[1]
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_K, 16])
    A: gl.constexpr = gl.DotOperandLayout(0, LAYOUT, 2)
    h = gl.arange(0, BLOCK_H, gl.SliceLayout(1, A))[:, None]
    c = gl.arange(0, RANK, gl.SliceLayout(0, A))[None, :]
    head = gl.arange(0, BLOCK_H, gl.SliceLayout(1, LAYOUT))
    tile = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        n = item // head_blocks
        first = item % head_blocks * BLOCK_H
        end = gl.load(ends + n)
        d_o = gl.load(do + n.to(gl.int64) * do_n + (first + h) * do_h + c)
        less = gl.load(delta + n * heads + first + head) * scale
        for start in range(0, end, BLOCK_K):
            stage = tile % STAGES
            mbarrier.wait(full.index(stage), (tile // STAGES) & 1)
            fence_async_shared()
            slope = gl.zeros([BLOCK_H, BLOCK_K], gl.float32, LAYOUT)
            slope = warpgroup_mma(
                d_o, k_tiles.index(stage).permute((1, 0)), slope, use_acc=False, is_async=True
            )
            slope = warpgroup_mma_wait(0, deps=[slope])
            mbarrier.arrive(free.index(stage))
            spot = tile % DEPTH
            mbarrier.wait(p_full.index(spot), (tile // DEPTH) & 1)
            weight = p_tiles.index(spot).load(LAYOUT)
            mbarrier.arrive(p_free.index(spot))
            slope = weight.to(gl.float32) * (slope * scale - less[:, None])
            tma.store_wait(0)
            ds_tile.store(slope.to(ds_tile.dtype))
            fence_async_shared()
            tma.async_copy_shared_to_global(ds_desc, [n * heads + first, start], ds_tile)
            tile += 1
    tma.store_wait(0)


@gluon.jit(do_not_specialize=("items",))
def _weights(
    q, do, latent, slots, ends, lse, delta, p_desc, ds_desc, scale, factor, items, head_blocks, heads, q_n, q_h, do_n,
    do_h, l_m, slots_n,
    RANK: gl.constexpr, ROPE: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, DEPTH: gl.constexpr,
    LOG2_E: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = q.dtype.element_ty
    BAR: gl.constexpr = mbarrier.MBarrierLayout()
    SWIZZLED: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    BLOCK_H: gl.constexpr = p_desc.block_type.shape[0]
    k_tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_K, RANK], SWIZZLED)
    e_tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_K, ROPE], SWIZZLED)
    p_tiles = gl.allocate_shared_memory(dtype, [DEPTH, BLOCK_H, BLOCK_K], p_desc.layout)
    ds_tile = gl.allocate_shared_memory(dtype, [BLOCK_H, BLOCK_K], ds_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    p_full = gl.allocate_shared_memory(gl.int64, [DEPTH, 1], BAR)
    p_free = gl.allocate_shared_memory(gl.int64, [DEPTH, 1], BAR)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=128)  # every fetching thread, when its copies are there
        mbarrier.init(free.index(i), count=2)
    for i in gl.static_range(DEPTH):
        mbarrier.init(p_full.index(i), count=1)
        mbarrier.init(p_free.index(i), count=1)
    bars = (full, free, p_full, p_free)
    gl.warp_specialize(
        [
            (
                _scores,
                (
                    q, slots, ends, lse, p_desc, k_tiles, e_tiles, p_tiles, bars, items, head_blocks, heads, factor,
                    q_n, q_h, slots_n, LOG2_E,
                ),
            ),
            (
                _slopes,
                (
                    do, ends, delta, ds_desc, k_tiles, p_tiles, ds_tile, bars, items, head_blocks, heads, scale, do_n,
                    do_h,
                ),
            ),
            (
                _fetch_rows,
                (
                    ds_desc, latent, slots, ends, p_tiles, k_tiles, e_tiles, full, free, items, head_blocks, heads,
                    slots_n, l_m, RANK, False,
                ),
            ),
        ],
        [4, 4],
        [208, 80],
    )  # fmt: skip


@gluon.jit
def _query_group(
    dq, ends, s_tiles, k_tiles, e_tiles, full, free, items, parts, dq_n, dq_h, RANK: gl.constexpr, GROUP: gl.constexpr
):  # fmt: skip
    """64 heads of dq = dS K."""
    STAGES: gl.constexpr = k_tiles.shape[0]
    BLOCK_K: gl.constexpr = k_tiles.shape[1]
    WIDE: gl.constexpr = k_tiles.shape[2]
    NARROW: gl.constexpr = e_tiles.shape[2]
    K_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDE, 16])
    E_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, NARROW, 16])
    tile = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        n = item // parts
        part = item % parts
        end = gl.load(ends + n)
        acc = gl.zeros([64, WIDE], gl.float32, K_LAYOUT)
        acc_e = gl.zeros([64, NARROW], gl.float32, E_LAYOUT)
        for _ in range(0, end, BLOCK_K):
            stage = tile % STAGES
            mbarrier.wait(full.index(stage), (tile // STAGES) & 1)
            fence_async_shared()
            slope = s_tiles.index(2 * stage + GROUP)
            acc = warpgroup_mma(slope, k_tiles.index(stage), acc, is_async=True)
            acc_e = warpgroup_mma(slope, e_tiles.index(stage), acc_e, is_async=True)
            acc, acc_e = warpgroup_mma_wait(0, deps=[acc, acc_e])
            mbarrier.arrive(free.index(stage))
            tile += 1
        to = dq + n.to(gl.int64) * dq_n
        h = GROUP * 64 + gl.arange(0, 64, gl.SliceLayout(1, K_LAYOUT))[:, None]
        c = part * WIDE + gl.arange(0, WIDE, gl.SliceLayout(0, K_LAYOUT))[None, :]
        gl.store(to + h * dq_h + c, acc.to(dq.dtype.element_ty))
        h = GROUP * 64 + gl.arange(0, 64, gl.SliceLayout(1, E_LAYOUT))[:, None]
        e = RANK + part * NARROW + gl.arange(0, NARROW, gl.SliceLayout(0, E_LAYOUT))[None, :]
        gl.store(to + h * dq_h + e, acc_e.to(dq.dtype.element_ty))


@gluon.jit(do_not_specialize=("items",))
def _queries(
    ds_desc, latent, slots, ends, dq, items, heads, dq_n, dq_h, l_m, slots_n,
    RANK: gl.constexpr, ROPE: gl.constexpr, PARTS: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = latent.dtype.element_ty
    BAR: gl.constexpr = mbarrier.MBarrierLayout()
    SWIZZLED: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    NARROW: gl.constexpr = gl.NVMMASharedLayout(128 // PARTS, 16, 2)
    s_tiles = gl.allocate_shared_memory(dtype, [2 * STAGES, 64, BLOCK_K], ds_desc.layout)
    k_tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_K, RANK // PARTS], SWIZZLED)
    e_tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_K, ROPE // PARTS], NARROW)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=129)
        mbarrier.init(free.index(i), count=2)
    gl.warp_specialize(
        [
            (
                _query_group,
                (dq, ends, s_tiles, k_tiles, e_tiles, full, free, items, PARTS, dq_n, dq_h, RANK, 0),
            ),
            (
                _query_group,
                (dq, ends, s_tiles, k_tiles, e_tiles, full, free, items, PARTS, dq_n, dq_h, RANK, 1),
            ),
            (
                _fetch_rows,
                (
                    ds_desc, latent, slots, ends, s_tiles, k_tiles, e_tiles, full, free, items, PARTS, heads, slots_n,
                    l_m, RANK, True,
                ),
            ),
        ],
        [4, 4],
        [208, 96],
    )  # fmt: skip


def supported(q_NHC: Tensor, latent_MC: Tensor, slots_NK: Tensor, do_NHc: Tensor) -> bool:
    """Whether these kernels take such tensors: bf16 or fp16 on a Hopper GPU, 128 heads, a latent of 512 and a rotary
    part of 64, and rows that 16-byte copies can read."""
    return (
        AVAILABLE
        and q_NHC.is_cuda
        and torch.cuda.get_device_capability(q_NHC.device)[0] == 9
        and q_NHC.dtype in (torch.bfloat16, torch.float16)
        and q_NHC.dtype == latent_MC.dtype == do_NHc.dtype
        and (*q_NHC.shape[1:], do_NHc.shape[2]) == (HEADS, 576, 512)
        and q_NHC.is_contiguous()
        and do_NHc.is_contiguous()
        and slots_NK.stride(1) == latent_MC.stride(1) == 1
        and latent_MC.stride(0) % 8 == 0
        and all(t.data_ptr() % 16 == 0 for t in (q_NHC, latent_MC, do_NHc))
    )


@functools.cache
def _layout(rows: int, columns: int, dtype: torch.dtype) -> Any:
    """Kept: making it takes the host 20 us."""
    return gl.NVMMASharedLayout.get_default_for([rows, columns], getattr(gl, str(dtype).split(".")[-1]))


def descriptor(x: Tensor, rows: int, columns: int) -> Any:
    """Tiles `[rows, columns]` of x `[N, H, C]`, heads under one another."""
    flat = x.flatten(0, 1)
    return TensorDescriptor(
        flat, list(flat.shape), list(flat.stride()), [rows, columns], _layout(rows, columns, x.dtype)
    )


def weights(
    q_NHC: Tensor, latent_MC: Tensor, slots_NK: Tensor, ends_N: Tensor, lse_NH: Tensor, do_NHc: Tensor,
    delta_NH: Tensor, p_NHK: Tensor, ds_NHK: Tensor, *, scale: float,
) -> None:  # fmt: skip
    """P and dS, of whole tiles as far as a row's end reaches."""
    N, H, C = q_NHC.shape
    rank = do_NHc.shape[2]
    items = N * (H // 64)
    _weights[(min(processors(q_NHC), items),)](
        q_NHC, do_NHc, latent_MC, slots_NK, ends_N, lse_NH, delta_NH, descriptor(p_NHK, 64, BLOCK_K),
        descriptor(ds_NHK, 64, BLOCK_K), scale, scale * LOG2_E, items, H // 64, H, q_NHC.stride(0), q_NHC.stride(1),
        do_NHc.stride(0), do_NHc.stride(1), latent_MC.stride(0), slots_NK.stride(0), RANK=rank, ROPE=C - rank,
        BLOCK_K=BLOCK_K, STAGES=2, DEPTH=2, LOG2_E=LOG2_E, num_warps=4,
    )  # fmt: skip


def queries(
    ds_NHK: Tensor, latent_MC: Tensor, slots_NK: Tensor, ends_N: Tensor, dq_NHC: Tensor, *, rank: int,
) -> None:  # fmt: skip
    """dq = dS K."""
    N, H, C = dq_NHC.shape
    items = N * PARTS
    _queries[(min(processors(dq_NHC), items),)](
        descriptor(ds_NHK, 64, BLOCK_K), latent_MC, slots_NK, ends_N, dq_NHC, items, H, dq_NHC.stride(0),
        dq_NHC.stride(1), latent_MC.stride(0), slots_NK.stride(0), RANK=rank, ROPE=C - rank, PARTS=PARTS,
        BLOCK_K=BLOCK_K, STAGES=4, num_warps=4,
    )  # fmt: skip
