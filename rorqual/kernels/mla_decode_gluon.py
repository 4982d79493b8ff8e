"""Stage 1 of `mla_decode` for Hopper in Gluon; `latent_gluon` says how it works.

bf16 pages are fetched by one warp by TMA, and half of the queries live in registers, which leaves shared memory for
more of the ring; FP8 pages are fetched as they are and multiplied out by four warps.
"""

from typing import Any

import torch
from torch import Tensor

from rorqual.kernels.gpu import INSTALLED
from rorqual.kernels.latent_gluon import (
    ROWS,
    SLOTS,
    TILE,
    VALUES,
    add,
    allocate,
    ask,
    finish,
    multiply,
    multiply_out,
    take_queries,
    weigh,
)

gluon: Any
gl: Any
try:
    from triton.experimental import gluon  # type: ignore[no-redef]
    from triton.experimental.gluon import language as gl  # type: ignore[no-redef]
    from triton.experimental.gluon.language.nvidia.hopper import (
        async_copy,
        fence_async_shared,
        mbarrier,
        tma,
        warpgroup_mma_wait,
    )
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
except ImportError:  # Triton too old, or none: `supported` says so
    from rorqual.kernels.gpu import tl as gl
    from rorqual.kernels.gpu import triton as gluon

    AVAILABLE = False
else:
    AVAILABLE = INSTALLED

RANK, ROPE = 512, 64
"""The latents of every released model."""


@gluon.jit
def _fetch(  # type: ignore[no-untyped-def]
    c_desc, e_desc, _ptr, _raw, pieces, ropes, bars, table_ptr, first, last, PAGE: gl.constexpr
):
    """The fetching warp."""
    full, free, _p_full, _p_free = bars
    PIECES: gl.constexpr = pieces.shape[0]
    TILE: gl.constexpr = pieces.shape[1]
    A: gl.constexpr = pieces.shape[2]
    page = gl.load(table_ptr + first // PAGE, mask=first < last, other=0)
    n = 0
    for start in range(first, last, TILE):
        row = page * PAGE + (start & (PAGE - 1))
        page = gl.load(table_ptr + gl.minimum(start + TILE, last - 1) // PAGE)
        for place in gl.static_range(4):
            stage = n % PIECES
            mbarrier.wait(free.index(stage), ((n // PIECES) & 1) ^ 1)
            bar = full.index(stage)
            if place == 3:
                mbarrier.expect(bar, c_desc.block_type.nbytes + e_desc.block_type.nbytes)
                tma.async_copy_global_to_shared(e_desc, [row, 4 * A], bar, ropes.index((n // 4) % 2))
            else:
                mbarrier.expect(bar, c_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(
                c_desc, [row, (place % 2 * 2 + place // 2) * A], bar, pieces.index(stage)
            )
            n += 1


@gluon.jit
def _fetch_packed(  # type: ignore[no-untyped-def]
    codes_ptr, scales_ptr, ropes_ptr, raw, pieces, ropes, bars, table_ptr, first, last, PAGE: gl.constexpr
):
    """The fetching warps of FP8 pages."""
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
    ask(codes, there, ropes_ptr + row * (LINE // 2), turned_there, raw, ropes.index(0), A)
    n = 0
    for start in range(first, last, TILE):
        scales = scales_ptr + row * (LINE // 4)
        key = start + TILE
        row = (page * PAGE + (key & (PAGE - 1))).to(gl.int64)
        page = gl.load(table_ptr + (key + TILE) // PAGE, mask=key + TILE < last, other=0)
        codes = codes_ptr + row * LINE
        there = (key + r < last)[:, None]
        turned = ropes_ptr + row * (LINE // 2)
        multiply_out(
            scales, start + r < last, codes, there, turned, (key + t < last)[:, None], raw, pieces, ropes, full, free,
            n, CODES,
        )  # fmt: skip
        n += 4
    async_copy.wait_group(0)


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
def _tidy(pieces, ropes, full, tile, there, CLEAN: gl.constexpr):  # type: ignore[no-untyped-def]
    """Zero what lies in the last tile past its `there` keys, once it is there."""
    PIECES: gl.constexpr = pieces.shape[0]
    TILE: gl.constexpr = pieces.shape[1]
    if not CLEAN:  # noqa: SIM102 (what is known to the compiler stands alone)
        if there < TILE:
            for place in gl.static_range(4):
                n = 4 * tile + place
                mbarrier.wait(full.index(n % PIECES), (n // PIECES) & 1)
                _clear(pieces.index(n % PIECES), there)
            _clear(ropes.index(tile % 2), there)
            fence_async_shared()


@gluon.jit
def _hide(score, start, whole, open_to, S: gl.constexpr):  # type: ignore[no-untyped-def]
    """Scores of keys from `start` on, those past a row's own position -inf; the first `whole` keys all rows see."""
    TILE: gl.constexpr = score.shape[1]
    if start + TILE > whole:
        key = start + gl.arange(0, TILE, gl.SliceLayout(0, S))
        score = gl.where(key[None, :] <= open_to[:, None], score, -float("inf"))
    return score


@gluon.jit
def _scores(  # type: ignore[no-untyped-def]
    q_ptr, at, queries, pieces, ropes, weights, fades, bars, lse_ptr, first, last, tiles, scale, base, block, rows,
    held, heads, end, width,
    HELD: gl.constexpr, AHEAD: gl.constexpr, DIRECT: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """The group of the scores."""
    full, _free, p_full, p_free = bars
    TILE: gl.constexpr = pieces.shape[1]
    A: gl.constexpr = pieces.shape[2]
    E: gl.constexpr = ropes.shape[2]
    ROWS: gl.constexpr = weights.shape[1]
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    LINE: gl.constexpr = gl.SliceLayout(1, S)
    Q: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    q_row = block * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, Q))
    from_ = q_ptr + (at + q_row).to(gl.int64)[:, None] * (4 * A + E)
    operands = take_queries(from_, (q_row < held)[:, None], queries, HELD, E, S, Q)
    row = block * ROWS + gl.arange(0, ROWS, LINE)
    open_to = end - width + row // heads
    whole = end - width + 1  # keys that every row sees
    # The lowest finite number, not -inf: a fade of exp2(-inf + inf) would be NaN.
    peak = gl.full([ROWS], -1e30, gl.float32, LINE)
    total = gl.zeros([ROWS], gl.float32, LINE)
    if AHEAD:
        if tiles > 0:
            _tidy(pieces, ropes, full, 0, last - first, PACKED)
            score = multiply(operands, pieces, ropes, full, 0, E, False, S)
            score = warpgroup_mma_wait(0, deps=[score])
            for tile in range(tiles - 1):
                start = first + tile * TILE
                _tidy(pieces, ropes, full, tile + 1, last - start - TILE, PACKED)
                following = multiply(operands, pieces, ropes, full, tile + 1, E, False, S)
                score = _hide(score, start, whole, open_to, S)
                peak, total = weigh(score, peak, total, scale, weights, fades, p_full, p_free, tile)
                score = warpgroup_mma_wait(0, deps=[following])
            score = _hide(score, first + tiles * TILE - TILE, whole, open_to, S)
            peak, total = weigh(score, peak, total, scale, weights, fades, p_full, p_free, tiles - 1)
    else:
        for tile in range(tiles):
            start = first + tile * TILE
            _tidy(pieces, ropes, full, tile, last - start, PACKED)
            score = multiply(operands, pieces, ropes, full, tile, E, False, S)
            score = _hide(warpgroup_mma_wait(0, deps=[score]), start, whole, open_to, S)
            peak, total = weigh(score, peak, total, scale, weights, fades, p_full, p_free, tile)
    known = gl.where(total > 0, total, 1.0)
    finish(1.0 / known, fades, p_full, p_free, tiles)
    if not DIRECT:
        to = base.to(gl.int64) + row
        gl.store(lse_ptr + to, gl.where(total > 0, peak + gl.log2(known), -float("inf")), mask=row < held)


@gluon.jit
def _values(  # type: ignore[no-untyped-def]
    pieces, weights, fades, bars, o_ptr, tiles, base, block, rows, HALF: gl.constexpr
):
    """A group of the values: half HALF of the channels."""
    A: gl.constexpr = pieces.shape[2]
    ROWS: gl.constexpr = weights.shape[1]
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, A, 16])
    low, high = add(pieces, weights, fades, bars, 0, 0, tiles, HALF, False)
    m = block * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, O))
    channel = 2 * HALF * A + gl.arange(0, A, gl.SliceLayout(0, O))
    place = o_ptr + (base.to(gl.int64) + m)[:, None] * (4 * A) + channel[None, :]
    known = (m < rows)[:, None]
    gl.store(place, low.to(o_ptr.dtype.element_ty), mask=known)
    gl.store(place + A, high.to(o_ptr.dtype.element_ty), mask=known)


@gluon.jit(do_not_specialize=("rows", "heads", "width", "table_stride", "splits"))
def _attend(  # type: ignore[no-untyped-def]
    a, b, c, q_ptr, table_ptr, ends_ptr, o_ptr, lse_ptr, scale, rows, heads, width, table_stride, splits,
    ROWS: gl.constexpr, TILE: gl.constexpr, A: gl.constexpr, E: gl.constexpr, PAGE: gl.constexpr,
    FIXED: gl.constexpr, DIRECT: gl.constexpr, HELD: gl.constexpr, PIECES: gl.constexpr, SLOTS: gl.constexpr,
    VALUES: gl.constexpr, FETCH: gl.constexpr, AHEAD: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """As `mla_decode._attend`: ROWS of a sequence's queries against one split of its keys. PACKED pages come as
    pointers to codes, scales and rotary parts, others as descriptors of a tile's quarter and of its rotary part."""
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

    queries, pieces, ropes, weights, fades, bars = allocate(
        q_ptr.dtype.element_ty, HELD, PIECES, ROWS, TILE, A, E, SLOTS, 1
    )
    raw = pieces
    if PACKED:
        LINES: gl.constexpr = gl.SwizzledSharedLayout(16, 1, 1, [1, 0])
        raw = gl.allocate_shared_memory(a.dtype.element_ty, [4, TILE, A], LINES)
    tiles = gl.maximum(gl.cdiv(last - first, TILE), 0)
    table_ptr += s * table_stride
    gl.warp_specialize(
        [
            (
                _scores,
                (
                    q_ptr, s * rows, queries, pieces, ropes, weights, fades, bars, lse_ptr, first, last, tiles, scale,
                    base, block, rows, held, heads, end, width, HELD, AHEAD, DIRECT, PACKED,
                ),
            ),
            (_values, (pieces, weights, fades, bars, o_ptr, tiles, base, block, written, 0)),
            (_values, (pieces, weights, fades, bars, o_ptr, tiles, base, block, written, 1)),
            (
                _fetch_packed if PACKED else _fetch,
                (a, b, c, raw, pieces, ropes, bars, table_ptr, first, last, PAGE),
            ),
        ],
        [4, 4, 4 if PACKED else 1],
        [VALUES, VALUES, FETCH],
    )  # fmt: skip


def supported(q_NHC: Tensor, pages_PTC: Tensor, rank: int) -> bool:
    """Whether `launch` takes these: bf16 queries of the released size on a Hopper GPU, bf16 or FP8 pages of whole
    tiles."""
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
    how: tuple[int, int, bool] | None = None,
) -> None:
    """Stage 1 over `grid` (blocks of rows, splits, sequences) into `o` and `lse`; `scale` for base-2 exponents."""
    quarter, packed = RANK // 4, pages_PTC.dtype == torch.uint8
    held, pieces, ahead = how or ((0, 6, False) if packed else (2, 10, False))
    if packed:
        source: Any = (
            pages_PTC.view(torch.float8_e4m3fn),
            pages_PTC.view(torch.float32)[..., RANK // 4 :],
            pages_PTC.view(torch.bfloat16)[..., RANK // 2 + 8 :],
        )
    else:
        latents = pages_PTC.view(-1, pages_PTC.shape[2])
        shape, strides = list(latents.shape), list(latents.stride())
        descs = (
            TensorDescriptor(latents, shape, strides, t, gl.NVMMASharedLayout.get_default_for(t, gl.bfloat16))
            for t in ([TILE, quarter], [TILE, ROPE])
        )
        source = (*descs, None)
    _attend[grid](
        *source, q_NHC, table_SB, ends_S, o, lse, scale, rows, q_NHC.shape[1], width, table_SB.stride(0), grid[1],
        ROWS=ROWS, TILE=TILE, A=quarter, E=ROPE, PAGE=pages_PTC.shape[1], FIXED=fixed, DIRECT=direct, HELD=held,
        PIECES=pieces, SLOTS=SLOTS, VALUES=VALUES, FETCH=80 if packed else 24, AHEAD=ahead, PACKED=packed, num_warps=4,
    )  # fmt: skip
