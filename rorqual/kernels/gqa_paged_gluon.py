"""The prefill form of `gqa_paged` for Hopper in Gluon, where the programmer places what Triton otherwise decides.

One program is a warp that fetches keys and values page by page with the bulk copy engine (TMA) and two groups of four
warps, each with 64 of the 128 rows (queries times a group's heads). A group asks for the scores of a tile together
with the values of the tile before, and takes the softmax of the one while the other is under way (the order of
FlashAttention-3, Shah et al. 2024, section 3).
"""

from typing import Any

import torch
from torch import Tensor

from rorqual.kernels.gpu import INSTALLED

gluon: Any
gl: Any
try:
    from triton.experimental import gluon  # type: ignore[no-redef]
    from triton.experimental.gluon import language as gl  # type: ignore[no-redef]
    from triton.experimental.gluon.language.nvidia.hopper import (
        fence_async_shared,
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
except ImportError:  # Triton too old, or none: `supported` says so
    from rorqual.kernels.gpu import tl as gl
    from rorqual.kernels.gpu import triton as gluon

    AVAILABLE = False
else:
    AVAILABLE = INSTALLED

BLOCK_M = 128
HALF_TILE = 64
"""Keys that are fetched at once, all of one page. Two of them make a tile."""

STAGES = 2


@gluon.jit
def _fetch(  # type: ignore[no-untyped-def]
    k_desc, v_desc, k_ring, v_ring, bars, table_ptr, column, tiles, last, PAGE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The fetching warp: two pieces of keys and two of values a tile. Past the last key the last page comes again."""
    k_full, k_free, v_full, v_free = bars
    STEP: gl.constexpr = k_desc.block_type.shape[0]
    low = gl.load(table_ptr, mask=tiles > 0, other=0)
    high = gl.load(table_ptr + gl.minimum(STEP, last - 1) // PAGE, mask=tiles > 0, other=0)
    for j in range(tiles):
        stage = j % STAGES
        parity = ((j // STAGES) & 1) ^ 1
        key = j * 2 * STEP
        first = low * PAGE + key % PAGE
        second = high * PAGE + (key + STEP) % PAGE
        low = gl.load(table_ptr + gl.minimum(key + 2 * STEP, last - 1) // PAGE)
        high = gl.load(table_ptr + gl.minimum(key + 3 * STEP, last - 1) // PAGE)
        mbarrier.wait(k_free.index(stage), parity)
        full = k_full.index(stage)
        mbarrier.expect(full, 2 * k_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(k_desc, [first, column], full, k_ring.index(2 * stage))
        tma.async_copy_global_to_shared(k_desc, [second, column], full, k_ring.index(2 * stage + 1))
        mbarrier.wait(v_free.index(stage), parity)
        full = v_full.index(stage)
        mbarrier.expect(full, 2 * v_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(v_desc, [first, column], full, v_ring.index(2 * stage))
        tma.async_copy_global_to_shared(v_desc, [second, column], full, v_ring.index(2 * stage + 1))


@gluon.jit
def _clear(values, there):  # type: ignore[no-untyped-def]
    """Zero values from number `there` on: what lies in a page past its content may be NaN. Both groups of warps do
    it; what one writes a second time is what stands there."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    STEP: gl.constexpr = values.shape[0]
    kept = gl.arange(0, STEP, gl.SliceLayout(1, LAYOUT)) < there
    held = values.load(LAYOUT)
    values.store(gl.where(kept[:, None], held, gl.zeros_like(held)))
    fence_async_shared()


@gluon.jit
def _hold(total):  # type: ignore[no-untyped-def]
    """`total`, computed before whatever follows: the assembler would otherwise move a softmax behind the wait that
    it is to fill."""
    return gl.inline_asm_elementwise(
        "{ .reg .b32 m; shr.u32 m, $2, 31; sub.u32 m, m, 1; bar.warp.sync m; mov.b32 $0, $2; mov.b32 $1, $3; }",
        "=f,=f,f,f", [total], dtype=gl.float32, is_pure=False, pack=2,
    )  # fmt: skip


@gluon.jit
def _scores(q, k_ring, k_full, stage, parity, S: gl.constexpr):  # type: ignore[no-untyped-def]
    """The scores of a tile's two pieces, asked for."""
    ROWS: gl.constexpr = q.shape[0]
    STEP: gl.constexpr = k_ring.shape[1]
    mbarrier.wait(k_full.index(stage), parity)
    left = gl.zeros([ROWS, STEP], gl.float32, S)
    right = gl.zeros([ROWS, STEP], gl.float32, S)
    left = warpgroup_mma(q, k_ring.index(2 * stage).permute((1, 0)), left, use_acc=False, is_async=True)
    right = warpgroup_mma(q, k_ring.index(2 * stage + 1).permute((1, 0)), right, use_acc=False, is_async=True)
    return left, right


@gluon.jit
def _soften(left, right, top, total, scale, place, start, MASKED: gl.constexpr, S: gl.constexpr):  # type: ignore[no-untyped-def]
    """Scores to weights: (weights of both pieces, fade of what was summed before, new top, new total)."""
    if MASKED:
        STEP: gl.constexpr = left.shape[1]
        key = start + gl.arange(0, STEP, gl.SliceLayout(0, S))
        left = gl.where(key[None, :] <= place[:, None], left, -float("inf"))
        right = gl.where(key[None, :] + STEP <= place[:, None], right, -float("inf"))
    higher = gl.maximum(top, gl.max(gl.maximum(left, right), 1) * scale)
    left = gl.exp2(left * scale - higher[:, None])
    right = gl.exp2(right * scale - higher[:, None])
    fade = gl.exp2(top - higher)
    total = total * fade + gl.sum(left + right, 1)
    return left, right, fade, higher, total


@gluon.jit
def _step(  # type: ignore[no-untyped-def]
    q, k_ring, v_ring, bars, acc, left, right, top, total, scale, place, j, last,
    MASKED: gl.constexpr, S: gl.constexpr, A: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Scores of tile j with the values of tile j - 1 beside them, then the softmax of tile j."""
    k_full, k_free, v_full, v_free = bars
    STEP: gl.constexpr = k_ring.shape[1]
    stage = j % STAGES
    before = (j - 1) % STAGES
    new_left, new_right = _scores(q, k_ring, k_full, stage, (j // STAGES) & 1, S)
    mbarrier.wait(v_full.index(before), ((j - 1) // STAGES) & 1)
    acc = warpgroup_mma(left, v_ring.index(2 * before), acc, is_async=True)
    acc = warpgroup_mma(right, v_ring.index(2 * before + 1), acc, is_async=True)
    new_left, new_right = warpgroup_mma_wait(2, deps=[new_left, new_right])
    mbarrier.arrive(k_free.index(stage))
    new_left, new_right, fade, top, total = _soften(
        new_left, new_right, top, total, scale, place, j * 2 * STEP, MASKED, S
    )
    new_left = gl.convert_layout(new_left.to(v_ring.dtype), gl.DotOperandLayout(0, A, 2))
    new_right = gl.convert_layout(new_right.to(v_ring.dtype), gl.DotOperandLayout(0, A, 2))
    total = _hold(total)
    acc, left, right, new_left, new_right, fade, total = warpgroup_mma_wait(
        0, deps=[acc, left, right, new_left, new_right, fade, total]
    )
    mbarrier.arrive(v_free.index(before))
    acc = acc * gl.convert_layout(fade, gl.SliceLayout(1, A))[:, None]
    return acc, new_left, new_right, top, total


@gluon.jit
def _compute(  # type: ignore[no-untyped-def]
    q_tile, k_ring, v_ring, bars, o_ptr, start, end, count, head, heads, scale, block, tiles, last,
    HALF: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A group of four warps: its half of the rows."""
    k_full, k_free, v_full, _v_free = bars
    STEP: gl.constexpr = k_ring.shape[1]
    SIZE: gl.constexpr = k_ring.shape[2]
    ROWS: gl.constexpr = q_tile.shape[1]
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, STEP, 16])
    A: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SIZE, 16])
    q = q_tile.index(HALF)
    first = (2 * block + HALF) * ROWS
    place = end - count + (first + gl.arange(0, ROWS, gl.SliceLayout(1, S))) // GROUP
    acc = gl.zeros([ROWS, SIZE], gl.float32, A)
    # The lowest finite number, not -inf: a fade of exp2(-inf + inf) would be NaN.
    top = gl.full([ROWS], -1e30, gl.float32, gl.SliceLayout(1, S))
    total = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, S))
    if tiles > 0:
        left, right = _scores(q, k_ring, k_full, 0, 0, S)
        left, right = warpgroup_mma_wait(0, deps=[left, right])
        mbarrier.arrive(k_free.index(0))
        left, right, _fade, top, total = _soften(left, right, top, total, scale, place, 0, True, S)
        left = gl.convert_layout(left.to(v_ring.dtype), gl.DotOperandLayout(0, A, 2))
        right = gl.convert_layout(right.to(v_ring.dtype), gl.DotOperandLayout(0, A, 2))
        whole = gl.minimum((end - count + first // GROUP + 1) // (2 * STEP), tiles)
        for j in range(1, whole):
            acc, left, right, top, total = _step(
                q,
                k_ring,
                v_ring,
                bars,
                acc,
                left,
                right,
                top,
                total,
                scale,
                place,
                j,
                last,
                False,
                S,
                A,
                STAGES,
            )
        for j in range(gl.maximum(whole, 1), tiles):
            acc, left, right, top, total = _step(
                q,
                k_ring,
                v_ring,
                bars,
                acc,
                left,
                right,
                top,
                total,
                scale,
                place,
                j,
                last,
                True,
                S,
                A,
                STAGES,
            )
        before = (tiles - 1) % STAGES
        mbarrier.wait(v_full.index(before), ((tiles - 1) // STAGES) & 1)
        there = last - (tiles - 1) * 2 * STEP
        if there < 2 * STEP:
            _clear(v_ring.index(2 * before), there)
            _clear(v_ring.index(2 * before + 1), there - STEP)
        acc = warpgroup_mma(left, v_ring.index(2 * before), acc, is_async=True)
        acc = warpgroup_mma(right, v_ring.index(2 * before + 1), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
        known = gl.where(total > 0, total, 1.0)
        acc = acc / gl.convert_layout(known, gl.SliceLayout(1, A))[:, None]
        row = first + gl.arange(0, ROWS, gl.SliceLayout(1, A))
        at = (start + row // GROUP).to(gl.int64) * heads + head * GROUP + row % GROUP
        channel = gl.arange(0, SIZE, gl.SliceLayout(0, A))
        to = o_ptr + at[:, None] * SIZE + channel[None, :]
        gl.store(to, acc.to(o_ptr.dtype.element_ty), mask=(row < count * GROUP)[:, None])


@gluon.jit(do_not_specialize=("groups", "table_stride"))
def _attend(  # type: ignore[no-untyped-def]
    k_desc, v_desc, q_ptr, table_ptr, ends_ptr, starts_ptr, o_ptr, scale, groups, table_stride,
    GROUP: gl.constexpr, PAGE: gl.constexpr, STAGES: gl.constexpr, ROWS: gl.constexpr,
):  # fmt: skip
    """2 * ROWS rows of a sequence against all the keys that they see."""
    STEP: gl.constexpr = k_desc.block_type.shape[0]
    SIZE: gl.constexpr = k_desc.block_type.shape[1]
    dtype: gl.constexpr = k_desc.dtype
    block = gl.num_programs(0) - 1 - gl.program_id(0)  # the longest first
    head = gl.program_id(1)
    s = gl.program_id(2)
    start = gl.load(starts_ptr + s)
    count = gl.load(starts_ptr + s + 1) - start
    end = gl.load(ends_ptr + s)
    heads = groups * GROUP
    last = gl.minimum(end, end - count + (block * 2 * ROWS + 2 * ROWS - 1) // GROUP + 1)
    # A block without queries runs through, touching nothing.
    tiles = gl.where(block * 2 * ROWS < count * GROUP, gl.cdiv(gl.maximum(last, 0), 2 * STEP), 0)
    held = gl.where(tiles > 0, count * GROUP, 0)

    Q: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    q_tile = gl.allocate_shared_memory(
        dtype, [2, ROWS, SIZE], gl.NVMMASharedLayout.get_default_for([ROWS, SIZE], dtype)
    )
    for half in gl.static_range(2):
        row = (2 * block + half) * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, Q))
        at = (start + row // GROUP).to(gl.int64) * heads + head * GROUP + row % GROUP
        from_ptr = q_ptr + at[:, None] * SIZE + gl.arange(0, SIZE, gl.SliceLayout(0, Q))[None, :]
        q_tile.index(half).store(gl.load(from_ptr, mask=(row < held)[:, None], other=0.0))
    k_ring = gl.allocate_shared_memory(dtype, [2 * STAGES, STEP, SIZE], k_desc.layout)
    v_ring = gl.allocate_shared_memory(dtype, [2 * STAGES, STEP, SIZE], v_desc.layout)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_free.index(i), count=2)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_free.index(i), count=2)
    fence_async_shared()
    bars = (k_full, k_free, v_full, v_free)
    table_ptr += s * table_stride
    gl.warp_specialize(
        [
            (
                _compute,
                (
                    q_tile, k_ring, v_ring, bars, o_ptr, start, end, count, head, heads, scale, block, tiles, end,
                    0, GROUP, STAGES,
                ),
            ),
            (
                _compute,
                (
                    q_tile, k_ring, v_ring, bars, o_ptr, start, end, count, head, heads, scale, block, tiles, end,
                    1, GROUP, STAGES,
                ),
            ),
            (_fetch, (k_desc, v_desc, k_ring, v_ring, bars, table_ptr, head * SIZE, tiles, end, PAGE, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def supported(q_NHd: Tensor, k_pages_PTGd: Tensor, v_pages_PTGd: Tensor) -> bool:
    """Whether `launch` takes these: bf16 heads of 64 or 128 channels on a Hopper GPU, pages of 64 tokens or more."""
    return (
        AVAILABLE
        and q_NHd.is_cuda
        and torch.cuda.get_device_capability(q_NHd.device)[0] == 9
        and all(t.dtype == torch.bfloat16 and t.is_contiguous() for t in (q_NHd, k_pages_PTGd, v_pages_PTGd))
        and q_NHd.shape[2] in (64, 128)
        and k_pages_PTGd.shape[1] % HALF_TILE == 0
    )


def launch(
    q_NHd: Tensor,
    k_pages_PTGd: Tensor,
    v_pages_PTGd: Tensor,
    table_SB: Tensor,
    ends_S: Tensor,
    starts_S1: Tensor,
    o_NHd: Tensor,
    *,
    max_count: int,
    scale: float,
) -> None:
    """Fill o for at most `max_count` queries a sequence; `scale` for base-2 exponents."""
    (page, groups, size), heads = k_pages_PTGd.shape[1:], q_NHd.shape[1]
    group = heads // groups
    tile = [HALF_TILE, size]
    layout = gl.NVMMASharedLayout.get_default_for(tile, gl.bfloat16)
    shape, strides = [k_pages_PTGd.shape[0] * page, groups * size], [groups * size, 1]
    k_desc, v_desc = (TensorDescriptor(t, shape, strides, tile, layout) for t in (k_pages_PTGd, v_pages_PTGd))
    _attend[(-(-max_count * group // BLOCK_M), groups, table_SB.shape[0])](
        k_desc, v_desc, q_NHd, table_SB, ends_S, starts_S1, o_NHd, scale, groups, table_SB.stride(0),
        GROUP=group, PAGE=page, STAGES=STAGES, ROWS=BLOCK_M // 2, num_warps=4,
    )  # fmt: skip
