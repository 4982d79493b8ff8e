"""Stage 1 of `mla_decode` for Hopper in Gluon: two groups of four warps share 64 rows, one warp fetches tiles by TMA.

64 rows' values are 64 x 512 fp32, half of a multiprocessor's registers. The first group makes the scores of a tile of
64 keys, takes the softmax, leaves the weights where the second finds them and adds the first quarter of the channels;
the second adds the rest while the first is at the next tile. Two tiles fit beside the queries; each comes and goes in
parts, as the groups are done with them.
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
    from triton.language.extra.cuda import gdc_launch_dependents
except ImportError:  # Triton too old, or none: `supported` says so
    from rorqual.kernels.gpu import tl as gl
    from rorqual.kernels.gpu import triton as gluon

    AVAILABLE = False
else:
    AVAILABLE = INSTALLED

ROWS = 64
TILE = 64
"""Keys of a tile; a split holds whole tiles, a page too."""

RANK, ROPE = 512, 64
"""The latents of every released model."""

GUESS = 128
"""Tiles of a split up to which the page that it begins in is read beside its sequence's end."""


@gluon.jit
def _fetch(  # type: ignore[no-untyped-def]
    a_desc, c_desc, e_desc, k_parts, bars, table_ptr, page, first, last, PAGE: gl.constexpr
):
    """The fetching warp, from page number `page` on. The second group's parts are free first."""
    k_a, k_b, k_c, k_e = k_parts
    full_a, full_b, full_c, free_a, free_b, _p_full, _p_free = bars
    STAGES: gl.constexpr = k_a.shape[0]
    TILE: gl.constexpr = k_a.shape[1]
    A: gl.constexpr = k_a.shape[2]
    tile = 0
    for start in range(first, last, TILE):
        row = page * PAGE + (start & (PAGE - 1))
        page = gl.load(table_ptr + gl.minimum(start + TILE, last - 1) // PAGE)
        stage = tile % STAGES
        parity = ((tile // STAGES) & 1) ^ 1
        mbarrier.wait(free_b.index(stage), parity)
        bar = full_b.index(stage)
        mbarrier.expect(bar, a_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(a_desc, [row, A], bar, k_b.index(stage))
        bar = full_c.index(stage)
        mbarrier.expect(bar, c_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(c_desc, [row, 2 * A], bar, k_c.index(stage))
        mbarrier.wait(free_a.index(stage), parity)
        bar = full_a.index(stage)
        mbarrier.expect(bar, a_desc.block_type.nbytes + e_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(a_desc, [row, 0], bar, k_a.index(stage))
        tma.async_copy_global_to_shared(e_desc, [row, 4 * A], bar, k_e.index(stage))
        tile += 1  # noqa: SIM113


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
def _lead(  # type: ignore[no-untyped-def]
    q_ptr, at, q_parts, k_parts, p_tile, fades, bars, o_ptr, lse_ptr, first, last, scale, base, block, rows, held,
    heads, end, width,
    DIRECT: gl.constexpr,
):  # fmt: skip
    """The first group: scores, softmax and the first quarter of the values."""
    q_a, q_b, q_c, q_e = q_parts
    k_a, k_b, k_c, k_e = k_parts
    full_a, full_b, full_c, free_a, _free_b, p_full, p_free = bars
    ROWS: gl.constexpr = q_a.shape[0]
    STAGES: gl.constexpr = k_a.shape[0]
    TILE: gl.constexpr = k_a.shape[1]
    A: gl.constexpr = q_a.shape[1]
    C: gl.constexpr = q_c.shape[1]
    E: gl.constexpr = q_e.shape[1]
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, A, 16])
    LINE: gl.constexpr = gl.SliceLayout(1, S)
    Q: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    q_row = block * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, Q))
    from_ = q_ptr + (at + q_row).to(gl.int64)[:, None] * (4 * A + E)
    known = (q_row < held)[:, None]
    to_a = gl.arange(0, A, gl.SliceLayout(0, Q))[None, :]
    to_c = gl.arange(0, C, gl.SliceLayout(0, Q))[None, :]
    to_e = gl.arange(0, E, gl.SliceLayout(0, Q))[None, :]
    q_a.store(gl.load(from_ + to_a, mask=known, other=0.0))
    q_b.store(gl.load(from_ + A + to_a, mask=known, other=0.0))
    q_c.store(gl.load(from_ + 2 * A + to_c, mask=known, other=0.0))
    q_e.store(gl.load(from_ + 4 * A + to_e, mask=known, other=0.0))
    fence_async_shared()
    row = block * ROWS + gl.arange(0, ROWS, LINE)
    open_to = end - width + row // heads
    whole = end - width + 1  # keys that every row sees
    # The lowest finite number, not -inf: a fade of exp2(-inf + inf) would be NaN.
    peak = gl.full([ROWS], -1e30, gl.float32, LINE)
    total = gl.zeros([ROWS], gl.float32, LINE)
    acc = gl.zeros([ROWS, A], gl.float32, O)
    tile = 0
    for start in range(first, last, TILE):
        stage = tile % STAGES
        parity = (tile // STAGES) & 1
        if last - start < TILE:
            mbarrier.wait(full_a.index(stage), parity)
            mbarrier.wait(full_b.index(stage), parity)
            mbarrier.wait(full_c.index(stage), parity)
            _clear(k_a.index(stage), last - start)
            _clear(k_b.index(stage), last - start)
            _clear(k_c.index(stage), last - start)
            _clear(k_e.index(stage), last - start)
            fence_async_shared()
        score = gl.zeros([ROWS, TILE], gl.float32, S)
        mbarrier.wait(full_b.index(stage), parity)
        score = warpgroup_mma(q_b, k_b.index(stage).permute((1, 0)), score, use_acc=False, is_async=True)
        mbarrier.wait(full_c.index(stage), parity)
        score = warpgroup_mma(q_c, k_c.index(stage).permute((1, 0)), score, is_async=True)
        mbarrier.wait(full_a.index(stage), parity)
        score = warpgroup_mma(q_a, k_a.index(stage).permute((1, 0)), score, is_async=True)
        score = warpgroup_mma(q_e, k_e.index(stage).permute((1, 0)), score, is_async=True)
        score = warpgroup_mma_wait(0, deps=[score])
        if start + TILE > whole:
            key = start + gl.arange(0, TILE, gl.SliceLayout(0, S))
            score = gl.where(key[None, :] <= open_to[:, None], score, -float("inf"))
        higher = gl.maximum(peak, gl.max(score, 1) * scale)
        weight = gl.exp2(score * scale - higher[:, None])
        fade = gl.exp2(peak - higher)
        peak = higher
        total = total * fade + gl.sum(weight, 1)
        half_weight = weight.to(p_tile.dtype)
        mbarrier.wait(p_free, (tile & 1) ^ 1)
        p_tile.store(half_weight)
        fades.store(fade)
        fence_async_shared()
        mbarrier.arrive(p_full)
        acc = acc * gl.convert_layout(fade, gl.SliceLayout(1, O))[:, None]
        operand = gl.convert_layout(half_weight, gl.DotOperandLayout(0, O, 2))
        acc = warpgroup_mma(operand, k_a.index(stage), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(free_a.index(stage))
        tile += 1
    known = gl.where(total > 0, total, 1.0)
    part = 1.0 / known
    mbarrier.wait(p_free, (tile & 1) ^ 1)
    fades.store(part)
    mbarrier.arrive(p_full)
    if not DIRECT:
        to = base.to(gl.int64) + row
        gl.store(lse_ptr + to, gl.where(total > 0, peak + gl.log2(known), -float("inf")), mask=row < held)
    _write(o_ptr, acc * gl.convert_layout(part, gl.SliceLayout(1, O))[:, None], base, block,
           rows if DIRECT else held, 0, 4 * A, O)  # fmt: skip


@gluon.jit
def _write(  # type: ignore[no-untyped-def]
    o_ptr, acc, base, block, rows, COLUMN: gl.constexpr, RANK: gl.constexpr, O: gl.constexpr
):
    """The result's channels from COLUMN on to memory."""
    m = block * acc.shape[0] + gl.arange(0, acc.shape[0], gl.SliceLayout(1, O))
    channel = COLUMN + gl.arange(0, acc.shape[1], gl.SliceLayout(0, O))
    place = o_ptr + (base.to(gl.int64) + m)[:, None] * RANK + channel[None, :]
    gl.store(place, acc.to(o_ptr.dtype.element_ty), mask=(m < rows)[:, None])


@gluon.jit
def _follow(k_parts, p_tile, fades, bars, o_ptr, first, last, base, block, rows):  # type: ignore[no-untyped-def]
    """The second group: the other values, by the weights that the first left in `p_tile`."""
    _k_a, k_b, k_c, _k_e = k_parts
    _full_a, full_b, full_c, _free_a, free_b, p_full, p_free = bars
    ROWS: gl.constexpr = p_tile.shape[0]
    STAGES: gl.constexpr = k_b.shape[0]
    TILE: gl.constexpr = k_b.shape[1]
    A: gl.constexpr = k_b.shape[2]
    C: gl.constexpr = k_c.shape[2]
    B_O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, A, 16])
    C_O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C, 16])
    acc_b = gl.zeros([ROWS, A], gl.float32, B_O)
    acc_c = gl.zeros([ROWS, C], gl.float32, C_O)
    tile = 0
    for _ in range(first, last, TILE):
        stage = tile % STAGES
        parity = (tile // STAGES) & 1
        mbarrier.wait(full_b.index(stage), parity)
        mbarrier.wait(full_c.index(stage), parity)
        mbarrier.wait(p_full, tile & 1)
        fade = fades.load(gl.SliceLayout(1, C_O))
        acc_c = acc_c * fade[:, None]
        acc_b = acc_b * gl.convert_layout(fade, gl.SliceLayout(1, B_O))[:, None]
        acc_c = warpgroup_mma(p_tile, k_c.index(stage), acc_c, is_async=True)
        acc_b = warpgroup_mma(p_tile, k_b.index(stage), acc_b, is_async=True)
        acc_b, acc_c = warpgroup_mma_wait(0, deps=[acc_b, acc_c])
        mbarrier.arrive(p_free)
        mbarrier.arrive(free_b.index(stage))
        tile += 1
    mbarrier.wait(p_full, tile & 1)
    part = fades.load(gl.SliceLayout(1, C_O))
    _write(o_ptr, acc_c * part[:, None], base, block, rows, 2 * A, 4 * A, C_O)
    part_b = gl.convert_layout(part, gl.SliceLayout(1, B_O))
    _write(o_ptr, acc_b * part_b[:, None], base, block, rows, A, 4 * A, B_O)


@gluon.jit(do_not_specialize=("rows", "heads", "width", "table_stride", "columns", "splits"))
def _attend(  # type: ignore[no-untyped-def]
    a_desc, c_desc, e_desc, q_ptr, table_ptr, ends_ptr, o_ptr, lse_ptr, scale, rows, heads, width, table_stride,
    columns, splits,
    ROWS: gl.constexpr, TILE: gl.constexpr, A: gl.constexpr, E: gl.constexpr, PAGE: gl.constexpr,
    FIXED: gl.constexpr, DIRECT: gl.constexpr, FOLLOW: gl.constexpr,
    GUESS: gl.constexpr,
):  # fmt: skip
    """As `mla_decode._attend`: ROWS of a sequence's queries against one split of its keys. The descriptors are of a
    tile's quarter, half and rotary part."""
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    if not DIRECT:
        gdc_launch_dependents()  # `join.combine`
    block = gl.program_id(0)
    split = gl.program_id(1)
    s = gl.program_id(2)
    table_ptr += s * table_stride
    # The first page is looked up while the sequence's end is read. If it depends on that, all that it may be are read.
    if FIXED > 0 or DIRECT:
        share = FIXED // TILE
        first = split * share * TILE
        page = gl.load(table_ptr + first // PAGE, mask=first // PAGE < columns, other=0)
        end = gl.load(ends_ptr + s)
        if DIRECT:
            share = gl.cdiv(end, TILE)
    else:
        tiles = 1 + gl.arange(0, GUESS, gl.BlockedLayout([GUESS // 32], [32], [4], [0]))
        column = split * tiles * TILE // PAGE
        pages = gl.load(table_ptr + column, mask=column < columns, other=0)
        end = gl.load(ends_ptr + s)
        share = gl.cdiv(gl.cdiv(end, splits), TILE)
        page = gl.max(gl.where(gl.minimum(share, GUESS) == tiles, pages, 0), 0)
        first = split * share * TILE
        if (share > GUESS) & (first > 0):
            page = gl.load(table_ptr + first // PAGE, mask=first < end, other=0)
    last = gl.minimum(first + share * TILE, end)
    base = s * rows
    if not DIRECT:
        base += split * gl.num_programs(2) * rows
    held = gl.where(first < last, rows, 0)  # a program without keys runs through, touching nothing
    W: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    BAR: gl.constexpr = mbarrier.MBarrierLayout()
    q_a = gl.allocate_shared_memory(dtype, [ROWS, A], W)
    q_b = gl.allocate_shared_memory(dtype, [ROWS, A], W)
    q_c = gl.allocate_shared_memory(dtype, [ROWS, 2 * A], W)
    q_e = gl.allocate_shared_memory(dtype, [ROWS, E], W)
    k_a = gl.allocate_shared_memory(dtype, [2, TILE, A], W)
    k_b = gl.allocate_shared_memory(dtype, [2, TILE, A], W)
    k_c = gl.allocate_shared_memory(dtype, [2, TILE, 2 * A], W)
    k_e = gl.allocate_shared_memory(dtype, [2, TILE, E], W)
    p_tile = gl.allocate_shared_memory(dtype, [ROWS, TILE], W)
    fades = gl.allocate_shared_memory(gl.float32, [ROWS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full_a = gl.allocate_shared_memory(gl.int64, [2, 1], BAR)
    full_b = gl.allocate_shared_memory(gl.int64, [2, 1], BAR)
    full_c = gl.allocate_shared_memory(gl.int64, [2, 1], BAR)
    free_a = gl.allocate_shared_memory(gl.int64, [2, 1], BAR)
    free_b = gl.allocate_shared_memory(gl.int64, [2, 1], BAR)
    p_full = gl.allocate_shared_memory(gl.int64, [1], BAR)
    p_free = gl.allocate_shared_memory(gl.int64, [1], BAR)
    for i in gl.static_range(2):
        mbarrier.init(full_a.index(i), count=1)
        mbarrier.init(full_b.index(i), count=1)
        mbarrier.init(full_c.index(i), count=1)
        mbarrier.init(free_a.index(i), count=1)
        mbarrier.init(free_b.index(i), count=1)
    mbarrier.init(p_full, count=1)
    mbarrier.init(p_free, count=1)
    q_parts = (q_a, q_b, q_c, q_e)
    k_parts = (k_a, k_b, k_c, k_e)
    bars = (full_a, full_b, full_c, free_a, free_b, p_full, p_free)
    gl.warp_specialize(
        [
            (
                _lead,
                (
                    q_ptr, s * rows, q_parts, k_parts, p_tile, fades, bars, o_ptr, lse_ptr, first, last, scale, base,
                    block, rows, held, heads, end, width, DIRECT,
                ),
            ),
            (_follow, (k_parts, p_tile, fades, bars, o_ptr, first, last, base, block, rows if DIRECT else held)),
            (_fetch, (a_desc, c_desc, e_desc, k_parts, bars, table_ptr, page, first, last, PAGE)),
        ],
        [4, 1],
        [FOLLOW, 24],
    )  # fmt: skip


def supported(q_NHC: Tensor, pages_PTC: Tensor, rank: int) -> bool:
    """Whether `launch`, or `mla_decode_gluon_fp8.launch` for FP8 pages, takes these: bf16 queries of the released size
    on a Hopper GPU, pages of whole tiles."""
    return (
        AVAILABLE
        and q_NHC.is_cuda
        and torch.cuda.get_device_capability(q_NHC.device)[0] == 9
        and q_NHC.dtype == torch.bfloat16
        and pages_PTC.dtype in (torch.bfloat16, torch.uint8)
        and pages_PTC.is_contiguous()
        and (rank, q_NHC.shape[2] - rank) == (RANK, ROPE)
        and pages_PTC.shape[1] % TILE == 0
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
    """Stage 1 over `grid` (blocks of rows, splits, sequences) into `o` and `lse`; `scale` for base-2 exponents. Unless
    `direct`, a launch that waits (`gdc_wait`) may begin before this one's end."""
    latents = pages_PTC.view(-1, pages_PTC.shape[2])
    shape, strides = list(latents.shape), list(latents.stride())
    descs = (
        TensorDescriptor(latents, shape, strides, t, gl.NVMMASharedLayout.get_default_for(t, gl.bfloat16))
        for t in ([TILE, RANK // 4], [TILE, RANK // 2], [TILE, ROPE])
    )
    _attend[grid](
        *descs, q_NHC, table_SB, ends_S, o, lse, scale, rows, q_NHC.shape[1], width, table_SB.stride(0),
        table_SB.shape[1], grid[1], ROWS=ROWS, TILE=TILE, A=RANK // 4, E=ROPE, PAGE=pages_PTC.shape[1], FIXED=fixed,
        DIRECT=direct, FOLLOW=240, GUESS=GUESS, num_warps=4,
    )  # fmt: skip
