"""`mla_sparse` for Hopper in Gluon: 64 heads of a query a program, keys gathered by warps of their own.

Four warps fetch the chosen rows into a ring of two tiles of 64 keys. A first group of four warps makes the scores
of a tile, takes the softmax, puts the weights where the second group finds them, and adds a quarter of the values;
the second adds the other three while the first is at the next tile's scores. So no group holds more of the result
than its registers take.
"""

import math
from typing import Any

import torch
from torch import Tensor

from rorqual.kernels.gpu import INSTALLED, tl, triton

gluon: Any
gl: Any
try:
    import triton.experimental.gluon as gluon  # type: ignore[no-redef]
    import triton.experimental.gluon.language as gl  # type: ignore[no-redef]
    from triton.experimental.gluon.language.nvidia.hopper import (
        async_copy,
        fence_async_shared,
        mbarrier,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
except ImportError:  # Triton too old, or none: `supported` says so
    gluon, gl = triton, tl
    AVAILABLE = False
else:
    AVAILABLE = INSTALLED

LOG2_E = math.log2(math.e)
BLOCK_H = 64
BLOCK_K = 64
STAGES = 2


@triton.jit
def _ends(slots, ends, keys, slots_n, KEYS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where each row of slots ends, its trailing -1 left off."""
    n = tl.program_id(0)
    place = tl.arange(0, KEYS)
    slot = tl.load(slots + n.to(tl.int64) * slots_n + place, mask=place < keys, other=-1)
    tl.store(ends + n, tl.max(tl.where(slot >= 0, place + 1, 0), 0))


@gluon.jit
def _item(  # type: ignore[no-untyped-def]
    item, ends, head_blocks, splits, share, keys,
    BLOCK_H: gl.constexpr, BLOCK_K: gl.constexpr, COUNTED: gl.constexpr,
):  # fmt: skip
    """What work item `item` is: query, first head, split of its row, first key, key tiles."""
    split = item // head_blocks % splits
    n = item // (head_blocks * splits)
    end = keys
    if COUNTED:
        end = gl.load(ends + n)
    start = split * share
    tiles = (gl.maximum(gl.minimum(end - start, share), 0) + BLOCK_K - 1) // BLOCK_K
    return n, item % head_blocks * BLOCK_H, split, start, tiles


@gluon.jit
def _decode(  # type: ignore[no-untyped-def]
    codes, scales, rotary, chosen, k_parts, full, free, stage, parity, ROWS: gl.constexpr
):
    """A tile of FP8 rows: read while the tile before it in the ring is in use, then multiplied out into it."""
    k_a, k_b, k_c, k_e = k_parts
    A: gl.constexpr = k_a.shape[2]
    E: gl.constexpr = k_e.shape[2]
    there = chosen[:, None]
    column = gl.arange(0, A, gl.SliceLayout(0, ROWS))[None, :]
    code_0 = gl.load(codes + column, mask=there, other=0.0)
    code_1 = gl.load(codes + A + column, mask=there, other=0.0)
    code_2 = gl.load(codes + 2 * A + column, mask=there, other=0.0)
    code_3 = gl.load(codes + 3 * A + column, mask=there, other=0.0)
    scale_0 = gl.load(scales, mask=chosen, other=0.0)
    scale_1 = gl.load(scales + 1, mask=chosen, other=0.0)
    scale_2 = gl.load(scales + 2, mask=chosen, other=0.0)
    scale_3 = gl.load(scales + 3, mask=chosen, other=0.0)
    turned = gl.load(rotary + gl.arange(0, E, gl.SliceLayout(0, ROWS))[None, :], mask=there, other=0.0)
    mbarrier.wait(free, parity)
    dtype: gl.constexpr = k_a.dtype
    k_a.index(stage).store((code_0.to(gl.float32) * scale_0[:, None]).to(dtype))
    k_b.index(stage).store((code_1.to(gl.float32) * scale_1[:, None]).to(dtype))
    k_c.index(stage).slice(0, A, dim=1).store((code_2.to(gl.float32) * scale_2[:, None]).to(dtype))
    k_c.index(stage).slice(A, A, dim=1).store((code_3.to(gl.float32) * scale_3[:, None]).to(dtype))
    k_e.index(stage).store(turned.to(dtype))
    fence_async_shared()
    mbarrier.arrive(full)


@gluon.jit
def _fetch(  # type: ignore[no-untyped-def]
    q, pages, scales, rotary, slots, ends, q_parts, k_parts, bars, items, head_blocks, splits, share, heads, keys, q_n,
    q_h, p_t, s_t, r_8, slots_n,
    QUANTIZED: gl.constexpr, COUNTED: gl.constexpr,
):  # fmt: skip
    """The fetching warps: each item's queries, then its keys tile by tile."""
    q_full, q_free, k_full, k_free, _p_full, _p_free = bars
    q_a, q_b, q_c, q_e = q_parts
    k_a, k_b, k_c, k_e = k_parts
    BLOCK_H: gl.constexpr = q_a.shape[0]
    STAGES: gl.constexpr = k_a.shape[0]
    BLOCK_K: gl.constexpr = k_a.shape[1]
    A: gl.constexpr = q_a.shape[1]
    C: gl.constexpr = q_c.shape[1]
    E: gl.constexpr = q_e.shape[1]
    # Eight threads a row, so that a thread has few rows; 16 bytes a thread.
    ROWS: gl.constexpr = gl.BlockedLayout([1, 16 if QUANTIZED else 8], [4, 8], [4, 1], [1, 0])
    to_a = gl.arange(0, A, gl.SliceLayout(0, ROWS))[None, :]
    to_c = gl.arange(0, C, gl.SliceLayout(0, ROWS))[None, :] + 2 * A
    to_e = gl.arange(0, E, gl.SliceLayout(0, ROWS))[None, :] + 2 * A + C
    h = gl.arange(0, BLOCK_H, gl.SliceLayout(1, ROWS))[:, None]
    k = gl.arange(0, BLOCK_K, gl.SliceLayout(1, ROWS))
    done = 0
    tile = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        n, first, _split, start, tiles = _item(
            item, ends, head_blocks, splits, share, keys, BLOCK_H, BLOCK_K, COUNTED
        )
        of_h = q + n.to(gl.int64) * q_n + (first + h) * q_h
        real = first + h < heads
        mbarrier.wait(q_free, (done & 1) ^ 1)
        async_copy.async_copy_global_to_shared(q_a, of_h + to_a, mask=real)
        async_copy.async_copy_global_to_shared(q_b, of_h + A + to_a, mask=real)
        async_copy.async_copy_global_to_shared(q_c, of_h + to_c, mask=real)
        async_copy.async_copy_global_to_shared(q_e, of_h + to_e, mask=real)
        async_copy.mbarrier_arrive(q_full, increment_count=False)
        row = slots + n.to(gl.int64) * slots_n + start
        for j in range(tiles):
            stage = tile % STAGES
            slot = gl.load(row + j * BLOCK_K + k, mask=start + j * BLOCK_K + k < keys, other=-1)
            chosen = slot >= 0
            there = chosen[:, None]
            slot = gl.maximum(slot, 0).to(gl.int64)
            parity = ((tile // STAGES) & 1) ^ 1
            if QUANTIZED:
                _decode(
                    pages + (slot * p_t)[:, None], scales + slot * s_t, rotary + (slot * r_8 * 8)[:, None], chosen,
                    k_parts, k_full.index(stage), k_free.index(stage), stage, parity, ROWS,
                )  # fmt: skip
            else:
                at = pages + (slot * p_t)[:, None]
                mbarrier.wait(k_free.index(stage), parity)
                async_copy.async_copy_global_to_shared(k_a.index(stage), at + to_a, mask=there)
                async_copy.async_copy_global_to_shared(k_b.index(stage), at + A + to_a, mask=there)
                async_copy.async_copy_global_to_shared(k_c.index(stage), at + to_c, mask=there)
                async_copy.async_copy_global_to_shared(k_e.index(stage), at + to_e, mask=there)
                async_copy.mbarrier_arrive(k_full.index(stage), increment_count=False)
            tile += 1
        done += 1  # noqa: SIM113


@gluon.jit
def _write(  # type: ignore[no-untyped-def]
    o, acc, n, first, split, heads, o_s, o_n, o_h, COLUMN: gl.constexpr, LAYOUT: gl.constexpr
):
    """A part of the result of 64 heads, from COLUMN on, to memory."""
    BLOCK_H: gl.constexpr = acc.shape[0]
    WIDTH: gl.constexpr = acc.shape[1]
    h = first + gl.arange(0, BLOCK_H, gl.SliceLayout(1, LAYOUT))[:, None]
    c = COLUMN + gl.arange(0, WIDTH, gl.SliceLayout(0, LAYOUT))[None, :]
    to = o + split.to(gl.int64) * o_s + n.to(gl.int64) * o_n + h * o_h + c
    gl.store(to, acc.to(o.dtype.element_ty), mask=h < heads)


@gluon.jit
def _lead(  # type: ignore[no-untyped-def]
    o, sums, slots, ends, q_parts, k_parts, p_tile, fades, bars, items, head_blocks, splits, share, heads, keys,
    factor, slots_n, o_s, o_n, o_h, sums_s,
    COUNTED: gl.constexpr, LN_2: gl.constexpr,
):  # fmt: skip
    """The first group: scores, softmax and the first part of the values."""
    q_full, q_free, k_full, k_free, p_full, p_free = bars
    q_a, q_b, q_c, q_e = q_parts
    k_a, k_b, k_c, k_e = k_parts
    BLOCK_H: gl.constexpr = q_a.shape[0]
    STAGES: gl.constexpr = k_a.shape[0]
    BLOCK_K: gl.constexpr = k_a.shape[1]
    A: gl.constexpr = q_a.shape[1]
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_K, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, A, 16])
    done = 0
    tile = 0
    shared = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        n, first, split, start, tiles = _item(
            item, ends, head_blocks, splits, share, keys, BLOCK_H, BLOCK_K, COUNTED
        )
        row = slots + n.to(gl.int64) * slots_n
        mbarrier.wait(q_full, done & 1)
        # Lowest finite number, not -inf: a fade of exp2(-inf + inf) would be NaN.
        top = gl.full([BLOCK_H], -1e30, gl.float32, gl.SliceLayout(1, S_LAYOUT))
        total = gl.zeros([BLOCK_H], gl.float32, gl.SliceLayout(1, S_LAYOUT))
        acc = gl.zeros([BLOCK_H, A], gl.float32, O_LAYOUT)
        for j in range(tiles):
            stage = tile % STAGES
            place = start + j * BLOCK_K + gl.arange(0, BLOCK_K, gl.SliceLayout(0, S_LAYOUT))
            slot = gl.load(row + place, mask=place < keys, other=-1)
            mbarrier.wait(k_full.index(stage), (tile // STAGES) & 1)
            fence_async_shared()  # ordinary copies wrote what the tensor cores read
            score = gl.zeros([BLOCK_H, BLOCK_K], gl.float32, S_LAYOUT)
            score = warpgroup_mma(q_e, k_e.index(stage).permute((1, 0)), score, use_acc=False, is_async=True)
            score = warpgroup_mma(q_a, k_a.index(stage).permute((1, 0)), score, is_async=True)
            score = warpgroup_mma(q_b, k_b.index(stage).permute((1, 0)), score, is_async=True)
            score = warpgroup_mma(q_c, k_c.index(stage).permute((1, 0)), score, is_async=True)
            score = warpgroup_mma_wait(0, deps=[score])
            score = gl.where((slot >= 0)[None, :], score, float("-inf"))
            higher = gl.maximum(top, gl.max(score, 1) * factor)
            weight = gl.exp2(score * factor - higher[:, None])
            fade = gl.exp2(top - higher)
            total = total * fade + gl.sum(weight, 1)
            top = higher
            half_weight = weight.to(p_tile.dtype)
            mbarrier.wait(p_free, (shared & 1) ^ 1)
            p_tile.store(half_weight)
            fades.store(fade)
            fence_async_shared()
            mbarrier.arrive(p_full)
            shared += 1
            acc = acc * gl.convert_layout(fade, gl.SliceLayout(1, O_LAYOUT))[:, None]
            operand = gl.convert_layout(half_weight, gl.DotOperandLayout(0, O_LAYOUT, 2))
            acc = warpgroup_mma(operand, k_a.index(stage), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(k_free.index(stage))
            tile += 1
        mbarrier.arrive(q_free)
        done += 1  # noqa: SIM113
        part = gl.where(total > 0, 1.0 / total, 0.0)
        mbarrier.wait(p_free, (shared & 1) ^ 1)
        fades.store(part)
        mbarrier.arrive(p_full)
        shared += 1
        acc = acc * gl.convert_layout(part, gl.SliceLayout(1, O_LAYOUT))[:, None]
        _write(o, acc, n, first, split, heads, o_s, o_n, o_h, 0, O_LAYOUT)
        h = first + gl.arange(0, BLOCK_H, gl.SliceLayout(1, S_LAYOUT))
        sum_ = gl.where(total > 0, top * LN_2 + gl.log(total), float("-inf"))
        gl.store(sums + split * sums_s + n * heads + h, sum_, mask=h < heads)


@gluon.jit
def _follow(  # type: ignore[no-untyped-def]
    o, ends, k_parts, p_tile, fades, bars, items, head_blocks, splits, share, heads, keys, o_s, o_n, o_h,
    COUNTED: gl.constexpr,
):  # fmt: skip
    """The second group: the other values, by weights that the first left in `p_tile`."""
    _q_full, _q_free, k_full, k_free, p_full, p_free = bars
    _k_a, k_b, k_c, _k_e = k_parts
    BLOCK_H: gl.constexpr = p_tile.shape[0]
    STAGES: gl.constexpr = k_b.shape[0]
    BLOCK_K: gl.constexpr = k_b.shape[1]
    A: gl.constexpr = k_b.shape[2]
    C: gl.constexpr = k_c.shape[2]
    B_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, A, 16])
    C_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C, 16])
    tile = 0
    shared = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        n, first, split, _start, tiles = _item(
            item, ends, head_blocks, splits, share, keys, BLOCK_H, BLOCK_K, COUNTED
        )
        acc_b = gl.zeros([BLOCK_H, A], gl.float32, B_LAYOUT)
        acc_c = gl.zeros([BLOCK_H, C], gl.float32, C_LAYOUT)
        for _ in range(tiles):
            stage = tile % STAGES
            mbarrier.wait(k_full.index(stage), (tile // STAGES) & 1)
            fence_async_shared()
            mbarrier.wait(p_full, shared & 1)
            fade = fades.load(gl.SliceLayout(1, C_LAYOUT))
            acc_c = acc_c * fade[:, None]
            acc_b = acc_b * gl.convert_layout(fade, gl.SliceLayout(1, B_LAYOUT))[:, None]
            acc_c = warpgroup_mma(p_tile, k_c.index(stage), acc_c, is_async=True)
            acc_b = warpgroup_mma(p_tile, k_b.index(stage), acc_b, is_async=True)
            acc_b, acc_c = warpgroup_mma_wait(0, deps=[acc_b, acc_c])
            mbarrier.arrive(p_free)
            mbarrier.arrive(k_free.index(stage))
            shared += 1
            tile += 1
        mbarrier.wait(p_full, shared & 1)
        part = fades.load(gl.SliceLayout(1, C_LAYOUT))
        mbarrier.arrive(p_free)
        shared += 1
        acc_c = acc_c * part[:, None]
        acc_b = acc_b * gl.convert_layout(part, gl.SliceLayout(1, B_LAYOUT))[:, None]
        _write(o, acc_b, n, first, split, heads, o_s, o_n, o_h, A, B_LAYOUT)
        _write(o, acc_c, n, first, split, heads, o_s, o_n, o_h, 2 * A, C_LAYOUT)


@gluon.jit(do_not_specialize=("items", "splits", "sums_s"))
def _sparse(  # type: ignore[no-untyped-def]
    q, pages, scales, rotary, slots, ends, o, sums, factor, items, head_blocks, splits, share, heads, keys, q_n, q_h,
    p_t, s_t, r_8, slots_n, o_s, o_n, o_h, sums_s,
    RANK: gl.constexpr, ROPE: gl.constexpr, BLOCK_H: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
    LEAD: gl.constexpr, FOLLOW: gl.constexpr, QUANTIZED: gl.constexpr, COUNTED: gl.constexpr, LN_2: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = q.dtype.element_ty
    SWIZZLED: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    BAR: gl.constexpr = mbarrier.MBarrierLayout()
    QUARTER: gl.constexpr = RANK // 4
    HALF: gl.constexpr = RANK // 2
    # A row in four parts: channels of the first group's values, two of the second's, the rotary part.
    q_a = gl.allocate_shared_memory(dtype, [BLOCK_H, QUARTER], SWIZZLED)
    q_b = gl.allocate_shared_memory(dtype, [BLOCK_H, QUARTER], SWIZZLED)
    q_c = gl.allocate_shared_memory(dtype, [BLOCK_H, HALF], SWIZZLED)
    q_e = gl.allocate_shared_memory(dtype, [BLOCK_H, ROPE], SWIZZLED)
    k_a = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_K, QUARTER], SWIZZLED)
    k_b = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_K, QUARTER], SWIZZLED)
    k_c = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_K, HALF], SWIZZLED)
    k_e = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_K, ROPE], SWIZZLED)
    p_tile = gl.allocate_shared_memory(dtype, [BLOCK_H, BLOCK_K], SWIZZLED)
    fades = gl.allocate_shared_memory(gl.float32, [BLOCK_H], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    q_full = gl.allocate_shared_memory(gl.int64, [1], BAR)
    q_free = gl.allocate_shared_memory(gl.int64, [1], BAR)
    p_full = gl.allocate_shared_memory(gl.int64, [1], BAR)
    p_free = gl.allocate_shared_memory(gl.int64, [1], BAR)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    mbarrier.init(q_full, count=128)  # every fetching thread, when its copies are there
    mbarrier.init(q_free, count=1)
    mbarrier.init(p_full, count=1)
    mbarrier.init(p_free, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1 if QUANTIZED else 128)
        mbarrier.init(k_free.index(i), count=2)
    q_parts = (q_a, q_b, q_c, q_e)
    k_parts = (k_a, k_b, k_c, k_e)
    bars = (q_full, q_free, k_full, k_free, p_full, p_free)
    gl.warp_specialize(
        [
            (
                _lead,
                (
                    o, sums, slots, ends, q_parts, k_parts, p_tile, fades, bars, items, head_blocks, splits, share,
                    heads, keys, factor, slots_n, o_s, o_n, o_h, sums_s, COUNTED, LN_2,
                ),
            ),
            (
                _follow,
                (
                    o, ends, k_parts, p_tile, fades, bars, items, head_blocks, splits, share, heads, keys, o_s, o_n,
                    o_h, COUNTED,
                ),
            ),
            (
                _fetch,
                (
                    q, pages, scales, rotary, slots, ends, q_parts, k_parts, bars, items, head_blocks, splits, share,
                    heads, keys, q_n, q_h, p_t, s_t, r_8, slots_n, QUANTIZED, COUNTED,
                ),
            ),
        ],
        [4, 4],
        [FOLLOW, 512 - LEAD - FOLLOW],
    )  # fmt: skip


def supported(q_NHC: Tensor, pages_PTC: Tensor, slots_NK: Tensor, rank: int) -> bool:
    """Whether `launch` takes these: bf16 or fp16 on a Hopper GPU, a latent of 512 and a rotary part of 64, pages
    one after the other, and rows that 16-byte copies can read."""
    return (
        AVAILABLE
        and q_NHC.is_cuda
        and torch.cuda.get_device_capability(q_NHC.device)[0] == 9
        and q_NHC.dtype in (torch.bfloat16, torch.float16)
        and pages_PTC.dtype in (q_NHC.dtype, torch.uint8)
        and (rank, q_NHC.shape[2]) == (512, 576)
        and pages_PTC.stride(0) == pages_PTC.shape[1] * pages_PTC.stride(1)
        and slots_NK.stride(1) == 1
        and all(
            t.stride(-1) == 1
            and all(n % 16 == 0 for n in (t.data_ptr(), *(s * t.element_size() for s in t.stride()[:-1])))
            for t in (q_NHC, pages_PTC)
        )
    )


def launch(
    q_NHC: Tensor,
    pages: tuple[Tensor, Tensor, Tensor],
    slots_NK: Tensor,
    parts: Tensor,
    sums: Tensor,
    share: int,
    *,
    scale: float,
    programs: int | None = None,
    registers: tuple[int, int] | None = None,
) -> None:
    """Attention of each query to every `share` (a multiple of BLOCK_K) slots of its row by themselves, into
    `parts` `[splits, N, H, rank]`, and the log-sum-exp of the scores into `sums` `[splits, N, H]`. `pages`: as they
    are three times over, or the codes, scales and rotary keys of FP8 pages."""
    held, scales, rotary = pages
    quantized = held is not rotary
    (splits, N, H, rank), K = parts.shape, slots_NK.shape[1]
    head_blocks = triton.cdiv(H, BLOCK_H)
    items = N * head_blocks * splits
    if programs is None:
        programs = torch.cuda.get_device_properties(q_NHC.device).multi_processor_count
    counted = items > programs  # else a row's end is found out while others are at work, and gains nothing
    lead, follow = registers or ((144, 224) if quantized else (184, 240))
    ends_N = slots_NK
    if counted:
        ends_N = torch.empty(N, dtype=torch.int32, device=q_NHC.device)
        _ends[(N,)](slots_NK, ends_N, K, slots_NK.stride(0), KEYS=triton.next_power_of_2(K), num_warps=4)
    _sparse[(min(programs, items),)](
        q_NHC, held, scales, rotary, slots_NK, ends_N, parts, sums, scale * LOG2_E, items, head_blocks, splits, share,
        H, K, q_NHC.stride(0), q_NHC.stride(1), held.stride(1), scales.stride(1), rotary.stride(1) // 8,
        slots_NK.stride(0), parts.stride(0), parts.stride(1), parts.stride(2), sums.stride(0), RANK=rank,
        ROPE=q_NHC.shape[2] - rank, BLOCK_H=BLOCK_H, BLOCK_K=BLOCK_K, STAGES=STAGES, LEAD=lead, FOLLOW=follow,
        QUANTIZED=quantized, COUNTED=counted, LN_2=math.log(2), num_warps=4,
    )  # fmt: skip
