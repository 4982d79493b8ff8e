"""Stage 1 of `mla_decode` for Hopper in Gluon over FP8 pages.

Four warps fetch tiles of 64 rows as they are and multiply them out into a ring of quarter tiles (128 channels). 64
rows' values are 64 x 512 fp32, half of a multiprocessor's registers: two groups of four warps keep half of the channels
each; a third makes the scores and weights of tile after tile. A quarter is given back as soon as its values are added.
Piece 4 * tile + place of the ring: the quarters 0, 2, 1 and 3, in the order in which they are given back. A rotary part
comes with the last, whose place in the ring says that the tile before is done with.
"""

from typing import Any

import torch
from torch import Tensor

from rorqual.kernels.mla_decode_gluon import RANK, ROPE, ROWS, TILE

gluon: Any
gl: Any
try:
    from triton.experimental import gluon  # type: ignore[no-redef]
    from triton.experimental.gluon import language as gl  # type: ignore[no-redef]
    from triton.experimental.gluon.language.nvidia.hopper import (
        async_copy,
        fence_async_shared,
        mbarrier,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
    from triton.language.extra.cuda import gdc_launch_dependents
except ImportError:  # Triton too old, or none: `mla_decode_gluon.supported` says so
    from rorqual.kernels.gpu import tl as gl
    from rorqual.kernels.gpu import triton as gluon

PIECES = 6
SLOTS = 2
"""Tiles' weights that wait for the groups of the values."""

REGISTERS = 160, 80
"""Registers of a thread of the groups of the values, and of the fetching warps; the scores have the rest of 512."""


@gluon.jit
def _ask(codes, there, turned, turned_there, raw, rope, A: gl.constexpr):  # type: ignore[no-untyped-def]
    """Begin to copy a tile of FP8 rows as they are: pointers to the codes `[TILE, A]` of a first quarter and to the
    rotary parts `[TILE, E]`. A quarter is a group of copies."""
    for place in gl.static_range(4):
        quarter = codes + (place % 2 * 2 + place // 2) * A
        async_copy.async_copy_global_to_shared(raw.index(place), quarter, mask=there)
        if place == 3:
            async_copy.async_copy_global_to_shared(rope, turned, mask=turned_there)
        async_copy.commit_group()


@gluon.jit
def _multiply_out(  # type: ignore[no-untyped-def]
    scales, here, codes, there, turned, turned_there, raw, pieces, ropes, full, free, n, CODES: gl.constexpr
):
    """A tile of FP8 rows asked for before, times its scales (pointers `[TILE]`), into the ring from piece n on; every
    quarter that is done with makes room for that of the next tile, whose pointers are as in `_ask`."""
    PIECES: gl.constexpr = pieces.shape[0]
    A: gl.constexpr = pieces.shape[2]
    scale_0 = gl.load(scales, mask=here, other=0.0)
    scale_1 = gl.load(scales + 2, mask=here, other=0.0)
    scale_2 = gl.load(scales + 1, mask=here, other=0.0)
    scale_3 = gl.load(scales + 3, mask=here, other=0.0)
    for place in gl.static_range(4):
        scale = scale_0 if place == 0 else scale_1 if place == 1 else scale_2 if place == 2 else scale_3
        stage = n % PIECES
        async_copy.wait_group(3)
        mbarrier.wait(free.index(stage), ((n // PIECES) & 1) ^ 1)
        value = raw.index(place).load(CODES).to(gl.float32) * scale[:, None]
        pieces.index(stage).store(value.to(pieces.dtype))
        fence_async_shared()
        mbarrier.arrive(full.index(stage))
        quarter = codes + (place % 2 * 2 + place // 2) * A
        async_copy.async_copy_global_to_shared(raw.index(place), quarter, mask=there)
        if place == 3:
            rope = ropes.index((n // 4 + 1) % 2)
            async_copy.async_copy_global_to_shared(rope, turned, mask=turned_there)
        async_copy.commit_group()
        n += 1


@gluon.jit
def _fetch(  # type: ignore[no-untyped-def]
    codes_ptr, scales_ptr, ropes_ptr, raw, pieces, ropes, bars, table_ptr, first, last, PAGE: gl.constexpr
):
    """The fetching warps."""
    full, free, _p_full, _p_free = bars
    TILE: gl.constexpr = pieces.shape[1]
    A: gl.constexpr = pieces.shape[2]
    E: gl.constexpr = ropes.shape[2]
    LINE: gl.constexpr = 4 * A + 16 + 2 * E
    CODES: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [4, 1], [1, 0])
    TURNED: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    r = gl.arange(0, TILE, gl.SliceLayout(1, CODES))
    t = gl.arange(0, TILE, gl.SliceLayout(1, TURNED))
    codes_ptr += r[:, None] * LINE + gl.arange(0, A, gl.SliceLayout(0, CODES))[None, :]
    scales_ptr += r * (LINE // 4)
    ropes_ptr += t[:, None] * (LINE // 2) + gl.arange(0, E, gl.SliceLayout(0, TURNED))[None, :]
    page = gl.load(table_ptr + first // PAGE, mask=first < last, other=0)
    row = (page * PAGE + (first & (PAGE - 1))).to(gl.int64)
    page = gl.load(table_ptr + (first + TILE) // PAGE, mask=first + TILE < last, other=0)
    there = (first + r < last)[:, None]
    turned_there = (first + t < last)[:, None]
    codes = codes_ptr + row * LINE
    _ask(codes, there, ropes_ptr + row * (LINE // 2), turned_there, raw, ropes.index(0), A)
    n = 0
    for start in range(first, last, TILE):
        scales = scales_ptr + row * (LINE // 4)
        key = start + TILE
        row = (page * PAGE + (key & (PAGE - 1))).to(gl.int64)
        page = gl.load(table_ptr + (key + TILE) // PAGE, mask=key + TILE < last, other=0)
        codes = codes_ptr + row * LINE
        there = (key + r < last)[:, None]
        turned = ropes_ptr + row * (LINE // 2)
        _multiply_out(
            scales, start + r < last, codes, there, turned, (key + t < last)[:, None], raw, pieces, ropes, full, free,
            n, CODES,
        )  # fmt: skip
        n += 4
    async_copy.wait_group(0)


@gluon.jit
def _multiply(q, pieces, ropes, full, tile, S: gl.constexpr):  # type: ignore[no-untyped-def]
    """The scores of tile number `tile`."""
    q_0, q_1, q_2, q_3, q_e = q
    ROWS: gl.constexpr = q_3.shape[0]
    PIECES: gl.constexpr = pieces.shape[0]
    TILE: gl.constexpr = pieces.shape[1]
    score = gl.zeros([ROWS, TILE], gl.float32, S)
    n = 4 * tile
    mbarrier.wait(full.index(n % PIECES), (n // PIECES) & 1)
    piece = pieces.index(n % PIECES)
    score = warpgroup_mma(q_0, piece.permute((1, 0)), score, use_acc=False, is_async=True)
    n += 1
    mbarrier.wait(full.index(n % PIECES), (n // PIECES) & 1)
    score = warpgroup_mma(q_2, pieces.index(n % PIECES).permute((1, 0)), score, is_async=True)
    n += 1
    mbarrier.wait(full.index(n % PIECES), (n // PIECES) & 1)
    score = warpgroup_mma(q_1, pieces.index(n % PIECES).permute((1, 0)), score, is_async=True)
    n += 1
    mbarrier.wait(full.index(n % PIECES), (n // PIECES) & 1)
    score = warpgroup_mma(q_3, pieces.index(n % PIECES).permute((1, 0)), score, is_async=True)
    score = warpgroup_mma(q_e, ropes.index(tile % 2).permute((1, 0)), score, is_async=True)
    return warpgroup_mma_wait(0, deps=[score])


@gluon.jit
def _scores(  # type: ignore[no-untyped-def]
    q_ptr, at, queries, pieces, ropes, weights, fades, bars, lse_ptr, first, last, scale, base, block, rows, held,
    heads, end, width,
    DIRECT: gl.constexpr,
):  # fmt: skip
    """The group of the scores: leaves every tile's weights, and what fades the sums before, to the other two."""
    full, _free, p_full, p_free = bars
    TILE: gl.constexpr = pieces.shape[1]
    A: gl.constexpr = pieces.shape[2]
    E: gl.constexpr = ropes.shape[2]
    SLOTS: gl.constexpr = weights.shape[0]
    ROWS: gl.constexpr = weights.shape[1]
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    LINE: gl.constexpr = gl.SliceLayout(1, S)
    Q: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    q_row = block * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, Q))
    from_ = q_ptr + (at + q_row).to(gl.int64)[:, None] * (4 * A + E)
    known = (q_row < held)[:, None]
    # The rotary part passes through the place of another on its way into registers.
    narrow = queries.index(0).slice(0, E, 1)
    turned = from_ + 4 * A + gl.arange(0, E, gl.SliceLayout(0, Q))[None, :]
    narrow.store(gl.load(turned, mask=known, other=0.0))
    q_e = narrow.load(gl.DotOperandLayout(0, S, 2))
    from_ += gl.arange(0, A, gl.SliceLayout(0, Q))[None, :]
    for quarter in gl.static_range(4):
        queries.index(quarter).store(gl.load(from_ + quarter * A, mask=known, other=0.0))
    fence_async_shared()
    operands = (queries.index(0), queries.index(1), queries.index(2), queries.index(3), q_e)

    row = block * ROWS + gl.arange(0, ROWS, LINE)
    open_to = end - width + row // heads
    whole = end - width + 1  # keys that every row sees
    # The lowest finite number, not -inf: a fade of exp2(-inf + inf) would be NaN.
    peak = gl.full([ROWS], -1e30, gl.float32, LINE)
    total = gl.zeros([ROWS], gl.float32, LINE)
    tile = 0
    for start in range(first, last, TILE):
        score = _multiply(operands, pieces, ropes, full, tile, S)
        if start + TILE > whole:
            key = start + gl.arange(0, TILE, gl.SliceLayout(0, S))
            score = gl.where(key[None, :] <= open_to[:, None], score, -float("inf"))
        higher = gl.maximum(peak, gl.max(score, 1) * scale)
        weight = gl.exp2(score * scale - higher[:, None])
        fade = gl.exp2(peak - higher)
        peak = higher
        slot = tile % SLOTS
        mbarrier.wait(p_free.index(slot), ((tile // SLOTS) & 1) ^ 1)
        weights.index(slot).store(weight.to(weights.dtype))
        fades.index(slot).store(fade)
        fence_async_shared()
        mbarrier.arrive(p_full.index(slot))
        total = total * fade + gl.sum(weight, 1)
        tile += 1
    known = gl.where(total > 0, total, 1.0)
    slot = tile % SLOTS
    mbarrier.wait(p_free.index(slot), ((tile // SLOTS) & 1) ^ 1)
    fades.index(slot).store(1.0 / known)
    mbarrier.arrive(p_full.index(slot))
    if not DIRECT:
        to = base.to(gl.int64) + row
        gl.store(lse_ptr + to, gl.where(total > 0, peak + gl.log2(known), -float("inf")), mask=row < held)


@gluon.jit
def _values(  # type: ignore[no-untyped-def]
    pieces, weights, fades, bars, o_ptr, first, last, base, block, rows, HALF: gl.constexpr
):
    """A group of the values: half HALF of the channels."""
    full, free, p_full, p_free = bars
    PIECES: gl.constexpr = pieces.shape[0]
    TILE: gl.constexpr = pieces.shape[1]
    A: gl.constexpr = pieces.shape[2]
    SLOTS: gl.constexpr = weights.shape[0]
    ROWS: gl.constexpr = weights.shape[1]
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, A, 16])
    LINE: gl.constexpr = gl.SliceLayout(1, O)
    # Two products of 128 channels: the assembler has no room for 256 with so many warps.
    low = gl.zeros([ROWS, A], gl.float32, O)
    high = gl.zeros([ROWS, A], gl.float32, O)
    tile = 0
    for _ in range(first, last, TILE):
        n = 4 * tile + HALF
        here = n % PIECES
        after = (n + 2) % PIECES
        slot = tile % SLOTS
        mbarrier.wait(full.index(here), (n // PIECES) & 1)
        mbarrier.wait(full.index(after), ((n + 2) // PIECES) & 1)
        mbarrier.wait(p_full.index(slot), (tile // SLOTS) & 1)
        fade = fades.index(slot).load(LINE)[:, None]
        low = low * fade
        high = high * fade
        low = warpgroup_mma(weights.index(slot), pieces.index(here), low, is_async=True)
        high = warpgroup_mma(weights.index(slot), pieces.index(after), high, is_async=True)
        low, high = warpgroup_mma_wait(1, deps=[low, high])
        mbarrier.arrive(free.index(here))
        low, high = warpgroup_mma_wait(0, deps=[low, high])
        mbarrier.arrive(free.index(after))
        mbarrier.arrive(p_free.index(slot))
        tile += 1
    slot = tile % SLOTS
    mbarrier.wait(p_full.index(slot), (tile // SLOTS) & 1)
    fade = fades.index(slot).load(LINE)[:, None]
    m = block * ROWS + gl.arange(0, ROWS, LINE)
    channel = 2 * HALF * A + gl.arange(0, A, gl.SliceLayout(0, O))
    place = o_ptr + (base.to(gl.int64) + m)[:, None] * (4 * A) + channel[None, :]
    known = (m < rows)[:, None]
    gl.store(place, (low * fade).to(o_ptr.dtype.element_ty), mask=known)
    gl.store(place + A, (high * fade).to(o_ptr.dtype.element_ty), mask=known)


@gluon.jit(do_not_specialize=("rows", "heads", "width", "table_stride", "splits"))
def _attend(  # type: ignore[no-untyped-def]
    codes, scales, turned, q_ptr, table_ptr, ends_ptr, o_ptr, lse_ptr, scale, rows, heads, width, table_stride, splits,
    ROWS: gl.constexpr, TILE: gl.constexpr, A: gl.constexpr, E: gl.constexpr, PAGE: gl.constexpr,
    FIXED: gl.constexpr, DIRECT: gl.constexpr, PIECES: gl.constexpr, SLOTS: gl.constexpr, VALUES: gl.constexpr,
    FETCH: gl.constexpr,
):  # fmt: skip
    """As `mla_decode._attend`: ROWS of a sequence's queries against one split of its keys."""
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    if not DIRECT:
        gdc_launch_dependents()  # `join.combine`
    block = gl.program_id(0)
    split = gl.program_id(1)
    s = gl.program_id(2)
    end = gl.load(ends_ptr + s)
    if FIXED > 0:
        share = FIXED
    else:
        share = gl.cdiv(gl.cdiv(end, splits), TILE) * TILE
    first = split * share
    last = gl.minimum(first + share, end)
    base = s * rows
    if not DIRECT:
        base += split * gl.num_programs(2) * rows
    held = gl.where(first < last, rows, 0)  # a program without keys runs through, touching nothing
    written = rows if DIRECT else held
    WIDE: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    LINES: gl.constexpr = gl.SwizzledSharedLayout(16, 1, 1, [1, 0])
    BAR: gl.constexpr = mbarrier.MBarrierLayout()
    queries = gl.allocate_shared_memory(dtype, [4, ROWS, A], WIDE)
    pieces = gl.allocate_shared_memory(dtype, [PIECES, TILE, A], WIDE)
    ropes = gl.allocate_shared_memory(dtype, [2, TILE, E], WIDE)
    weights = gl.allocate_shared_memory(dtype, [SLOTS, ROWS, TILE], WIDE)
    raw = gl.allocate_shared_memory(codes.dtype.element_ty, [4, TILE, A], LINES)
    fades = gl.allocate_shared_memory(gl.float32, [SLOTS, ROWS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full = gl.allocate_shared_memory(gl.int64, [PIECES, 1], BAR)
    free = gl.allocate_shared_memory(gl.int64, [PIECES, 1], BAR)
    p_full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], BAR)
    p_free = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], BAR)
    for i in gl.static_range(PIECES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(free.index(i), count=1)
    for i in gl.static_range(SLOTS):
        mbarrier.init(p_full.index(i), count=1)
        mbarrier.init(p_free.index(i), count=2)
    bars = (full, free, p_full, p_free)
    table_ptr += s * table_stride
    gl.warp_specialize(
        [
            (
                _scores,
                (
                    q_ptr, s * rows, queries, pieces, ropes, weights, fades, bars, lse_ptr, first, last, scale, base,
                    block, rows, held, heads, end, width, DIRECT,
                ),
            ),
            (_values, (pieces, weights, fades, bars, o_ptr, first, last, base, block, written, 0)),
            (_values, (pieces, weights, fades, bars, o_ptr, first, last, base, block, written, 1)),
            (_fetch, (codes, scales, turned, raw, pieces, ropes, bars, table_ptr, first, last, PAGE)),
        ],
        [4, 4, 4],
        [VALUES, VALUES, FETCH],
    )  # fmt: skip


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
    """As `mla_decode_gluon.launch`."""
    values, fetch = REGISTERS
    _attend[grid](
        pages_PTC.view(torch.float8_e4m3fn), pages_PTC.view(torch.float32)[..., RANK // 4 :],
        pages_PTC.view(torch.bfloat16)[..., RANK // 2 + 8 :], q_NHC, table_SB, ends_S, o, lse, scale, rows,
        q_NHC.shape[1], width, table_SB.stride(0), grid[1], ROWS=ROWS, TILE=TILE, A=RANK // 4, E=ROPE,
        PAGE=pages_PTC.shape[1], FIXED=fixed, DIRECT=direct, PIECES=PIECES, SLOTS=SLOTS, VALUES=values, FETCH=fetch,
        num_warps=4,
    )  # fmt: skip
