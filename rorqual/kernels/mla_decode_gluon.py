"""Stage 1 of `mla_decode` for Hopper in Gluon, beyond a few rows: two groups of four warps share pairs of tiles.

64 rows' values are 64 x 512 fp32, half of a multiprocessor's registers, so a group keeps one half of the channels.
For the scores a group takes one tile of the pair for itself (64 keys at once: fewer would starve the tensor cores of
operands). The groups exchange their rows' maxima and then their weights through shared memory, and each adds both
tiles' values to its half. Tiles come and go as four pieces (tile x half), each given back by the one group that reads
its values, so that the next pair arrives while this one is still being added. (The division of labour is that of
FlashMLA, DeepSeek 2025; its schedule is another.)
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

ROWS = 64
PAIR = 128
"""Keys of a pair of tiles; a split holds whole pairs, a page whole tiles."""

RANK, ROPE = 512, 64
"""The latents of every released model."""


@gluon.jit
def _fetch(  # type: ignore[no-untyped-def]
    c_desc, e_desc, pieces, ropes, full, free, table_ptr, first, last, PAGE: gl.constexpr,
):  # fmt: skip
    """The fetching warp. Piece 2 * tile + half; in the order in which they are given back. Past the last key the last
    page comes again."""
    TILE: gl.constexpr = c_desc.block_type.shape[0]
    HALF: gl.constexpr = c_desc.block_type.shape[1]
    here = first < last
    left = gl.load(table_ptr + first // PAGE, mask=here, other=0)
    right = gl.load(table_ptr + gl.minimum(first + TILE, last - 1) // PAGE, mask=here, other=0)
    for start in range(first, last, 2 * TILE):
        parity = ((start - first) // (2 * TILE) & 1) ^ 1
        row = left * PAGE + start % PAGE
        beside = right * PAGE + (start + TILE) % PAGE
        left = gl.load(table_ptr + gl.minimum(start + 2 * TILE, last - 1) // PAGE)
        right = gl.load(table_ptr + gl.minimum(start + 3 * TILE, last - 1) // PAGE)
        mbarrier.wait(free.index(0), parity)
        mbarrier.expect(full.index(0), c_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(c_desc, [row, 0], full.index(0), pieces.index(0))
        mbarrier.wait(free.index(3), parity)
        mbarrier.expect(full.index(3), c_desc.block_type.nbytes + e_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(c_desc, [beside, HALF], full.index(3), pieces.index(3))
        tma.async_copy_global_to_shared(e_desc, [beside, 2 * HALF], full.index(3), ropes.index(1))
        mbarrier.wait(free.index(1), parity)
        mbarrier.expect(full.index(1), c_desc.block_type.nbytes + e_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(c_desc, [row, HALF], full.index(1), pieces.index(1))
        tma.async_copy_global_to_shared(e_desc, [row, 2 * HALF], full.index(1), ropes.index(0))
        mbarrier.wait(free.index(2), parity)
        mbarrier.expect(full.index(2), c_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(c_desc, [beside, 0], full.index(2), pieces.index(2))


@gluon.jit
def _clear(piece, there):  # type: ignore[no-untyped-def]
    """Zero a piece's latents from number `there` on: what lies in a page past its content may be NaN."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    TILE: gl.constexpr = piece.shape[0]
    WIDTH: gl.constexpr = 64
    kept = gl.arange(0, TILE, gl.SliceLayout(1, LAYOUT)) < there
    for part in gl.static_range(piece.shape[1] // WIDTH):
        cut = piece.slice(part * WIDTH, WIDTH, 1)
        held = cut.load(LAYOUT)
        cut.store(gl.where(kept[:, None], held, gl.zeros_like(held)))


@gluon.jit
def _compute(  # type: ignore[no-untyped-def]
    q_left, q_right, weights, pieces, ropes, full, free, peaks, said, given, o_ptr, lse_ptr, first, last, scale, base,
    block, rows, heads, open_to,
    MINE: gl.constexpr, DIRECT: gl.constexpr,
):  # fmt: skip
    """Group MINE: the scores of the pair's tile MINE, the values of channel half MINE of both tiles."""
    OTHER: gl.constexpr = 1 - MINE
    ROWS: gl.constexpr = q_left.shape[0]
    HALF: gl.constexpr = q_left.shape[1]
    TILE: gl.constexpr = pieces.shape[1]
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    A: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    LINE: gl.constexpr = gl.SliceLayout(1, S)
    # The queries' rotary part lies where group 1's weights will: it moves into registers.
    q_rope = weights.index(1).load(gl.DotOperandLayout(0, S, 2))
    row = block * ROWS + gl.arange(0, ROWS, LINE)
    visible = open_to + row // heads
    lane = MINE * TILE + gl.arange(0, TILE, gl.SliceLayout(0, S))
    # The lowest finite number, not -inf: a fade of exp2(-inf + inf) would be NaN.
    peak = gl.full([ROWS], -1e30, gl.float32, LINE)
    total = gl.zeros([ROWS], gl.float32, LINE)
    acc = gl.zeros([ROWS, HALF], gl.float32, A)
    turn = 0
    for start in range(first, last, 2 * TILE):
        parity = turn & 1
        score = gl.zeros([ROWS, TILE], gl.float32, S)
        there = last - start - MINE * TILE
        if there < TILE:
            mbarrier.wait(full.index(2 * MINE), parity)
            mbarrier.wait(full.index(2 * MINE + 1), parity)
            _clear(pieces.index(2 * MINE), there)
            _clear(pieces.index(2 * MINE + 1), there)
            _clear(ropes.index(MINE), there)
            fence_async_shared()
        if MINE == 0:
            mbarrier.wait(full.index(0), parity)
            score = warpgroup_mma(
                q_left, pieces.index(0).permute((1, 0)), score, use_acc=False, is_async=True
            )
            mbarrier.wait(full.index(1), parity)
            score = warpgroup_mma(q_right, pieces.index(1).permute((1, 0)), score, is_async=True)
        else:
            mbarrier.wait(full.index(3), parity)
            score = warpgroup_mma(
                q_right, pieces.index(3).permute((1, 0)), score, use_acc=False, is_async=True
            )
            mbarrier.wait(full.index(2), parity)
            score = warpgroup_mma(q_left, pieces.index(2).permute((1, 0)), score, is_async=True)
        score = warpgroup_mma(q_rope, ropes.index(MINE).permute((1, 0)), score, is_async=True)
        score = warpgroup_mma_wait(0, deps=[score])

        score = gl.where((start + lane)[None, :] <= visible[:, None], score * scale, -float("inf"))
        higher = gl.maximum(peak, gl.max(score, 1))
        peaks.index(MINE).store(higher)
        mbarrier.arrive(said.index(MINE))
        mbarrier.wait(said.index(OTHER), parity)
        higher = gl.maximum(higher, peaks.index(OTHER).load(LINE))
        fade = gl.exp2(peak - higher)
        peak = higher
        weight = gl.exp2(score - higher[:, None])
        total = total * fade + gl.sum(weight, 1)
        weight = weight.to(weights.dtype)
        weights.index(MINE).store(weight)
        fence_async_shared()
        mbarrier.arrive(given.index(MINE))
        acc = acc * gl.convert_layout(fade, gl.SliceLayout(1, A))[:, None]
        own = gl.convert_layout(weight, gl.DotOperandLayout(0, A, 2))
        acc = warpgroup_mma(own, pieces.index(3 * MINE), acc, is_async=True)
        mbarrier.wait(given.index(OTHER), parity)
        acc = warpgroup_mma(weights.index(OTHER), pieces.index(2 * OTHER + MINE), acc, is_async=True)
        acc, own = warpgroup_mma_wait(1, deps=[acc, own])
        mbarrier.arrive(free.index(3 * MINE))
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(free.index(2 * OTHER + MINE))
        turn += 1

    peaks.index(MINE).store(total)
    mbarrier.arrive(said.index(MINE))
    mbarrier.wait(said.index(OTHER), turn & 1)
    total += peaks.index(OTHER).load(LINE)
    known = gl.where(total > 0, total, 1.0)
    if not DIRECT and MINE == 0:
        to = base.to(gl.int64) + row
        gl.store(lse_ptr + to, gl.where(total > 0, peak + gl.log2(known), -float("inf")), mask=row < rows)
    acc = acc / gl.convert_layout(known, gl.SliceLayout(1, A))[:, None]
    m = block * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, A))
    channel = MINE * HALF + gl.arange(0, HALF, gl.SliceLayout(0, A))
    place = (base.to(gl.int64) + m)[:, None] * (2 * HALF) + channel[None, :]
    gl.store(o_ptr + place, acc.to(o_ptr.dtype.element_ty), mask=(m < rows)[:, None])


@gluon.jit(do_not_specialize=("rows", "heads", "width", "table_stride", "splits"))
def _attend(  # type: ignore[no-untyped-def]
    c_desc, e_desc, q_ptr, table_ptr, ends_ptr, o_ptr, lse_ptr, scale, rows, heads, width, table_stride, splits,
    ROWS: gl.constexpr, PAGE: gl.constexpr, FIXED: gl.constexpr, DIRECT: gl.constexpr,
):  # fmt: skip
    """As `mla_decode._attend`: ROWS of a sequence's queries against one split of its keys."""
    TILE: gl.constexpr = c_desc.block_type.shape[0]
    HALF: gl.constexpr = c_desc.block_type.shape[1]
    ROPE: gl.constexpr = e_desc.block_type.shape[1]
    dtype: gl.constexpr = c_desc.dtype
    block = gl.program_id(0)
    split = gl.program_id(1)
    s = gl.program_id(2)
    end = gl.load(ends_ptr + s)
    if FIXED > 0:
        share = FIXED
    else:
        share = gl.cdiv(gl.cdiv(end, splits), 2 * TILE) * 2 * TILE
    first = split * share
    last = gl.minimum(first + share, end)
    base = s * rows
    if not DIRECT:
        base += split * gl.num_programs(2) * rows
    held = gl.where(first < last, rows, 0)  # a program without keys runs through, touching nothing

    SHARED: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, HALF], dtype)
    NARROW: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, ROPE], dtype)
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q_left = gl.allocate_shared_memory(dtype, [ROWS, HALF], SHARED)
    q_right = gl.allocate_shared_memory(dtype, [ROWS, HALF], SHARED)
    weights = gl.allocate_shared_memory(dtype, [2, ROWS, ROPE], NARROW)
    pieces = gl.allocate_shared_memory(dtype, [4, TILE, HALF], c_desc.layout)
    ropes = gl.allocate_shared_memory(dtype, [2, TILE, ROPE], e_desc.layout)
    peaks = gl.allocate_shared_memory(gl.float32, [2, ROWS], FLAT)
    full = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
    said = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    given = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(4):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(free.index(i), count=1)
    for i in gl.static_range(2):
        mbarrier.init(said.index(i), count=1)
        mbarrier.init(given.index(i), count=1)

    Q: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    row = block * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, Q))
    at = (s * rows + row).to(gl.int64)[:, None] * (2 * HALF + ROPE)
    known = (row < held)[:, None]
    channel = gl.arange(0, HALF, gl.SliceLayout(0, Q))[None, :]
    q_left.store(gl.load(q_ptr + at + channel, mask=known, other=0.0))
    q_right.store(gl.load(q_ptr + at + HALF + channel, mask=known, other=0.0))
    channel = gl.arange(0, ROPE, gl.SliceLayout(0, Q))[None, :]
    weights.index(1).store(gl.load(q_ptr + at + 2 * HALF + channel, mask=known, other=0.0))
    fence_async_shared()
    table_ptr += s * table_stride
    open_to = end - width
    gl.warp_specialize(
        [
            (
                _compute,
                (
                    q_left, q_right, weights, pieces, ropes, full, free, peaks, said, given, o_ptr, lse_ptr, first,
                    last, scale, base, block, rows if DIRECT else held, heads, open_to, 0, DIRECT,
                ),
            ),
            (
                _compute,
                (
                    q_left, q_right, weights, pieces, ropes, full, free, peaks, said, given, o_ptr, lse_ptr, first,
                    last, scale, base, block, rows if DIRECT else held, heads, open_to, 1, DIRECT,
                ),
            ),
            (_fetch, (c_desc, e_desc, pieces, ropes, full, free, table_ptr, first, last, PAGE)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def supported(q_NHC: Tensor, pages_PTC: Tensor, rank: int) -> bool:
    """Whether `launch` takes these: bf16 latents of the released size on a Hopper GPU, in pages of whole tiles."""
    return (
        AVAILABLE
        and q_NHC.is_cuda
        and torch.cuda.get_device_capability(q_NHC.device)[0] == 9
        and q_NHC.dtype == pages_PTC.dtype == torch.bfloat16
        and pages_PTC.is_contiguous()
        and (rank, q_NHC.shape[2] - rank) == (RANK, ROPE)
        and pages_PTC.shape[1] % (PAIR // 2) == 0
    )


def launch(
    q_NHC: Tensor,
    pages_PTC: Tensor,
    table_SB: Tensor,
    ends_S: Tensor,
    o: Tensor,
    lse: Tensor,
    *,
    grid: tuple[int, int, int],
    scale: float,
    rows: int,
    width: int,
    fixed: int,
    direct: bool,
) -> None:
    """Stage 1 over `grid` (blocks of rows, splits, sequences) into `o` and `lse`; `scale` for base-2 exponents."""
    latents = pages_PTC.view(-1, pages_PTC.shape[2])
    shape, strides = list(latents.shape), list(latents.stride())
    tiles = [PAIR // 2, RANK // 2], [PAIR // 2, ROPE]
    c_desc, e_desc = (
        TensorDescriptor(
            latents, shape, strides, tile, gl.NVMMASharedLayout.get_default_for(tile, gl.bfloat16)
        )
        for tile in tiles
    )
    _attend[grid](
        c_desc, e_desc, q_NHC, table_SB, ends_S, o, lse, scale, rows, q_NHC.shape[1], width,
        table_SB.stride(0), grid[1], ROWS=ROWS, PAGE=pages_PTC.shape[1], FIXED=fixed, DIRECT=direct,
        num_warps=4,
    )  # fmt: skip
