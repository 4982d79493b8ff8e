"""Stage 1 of `mla_decode` for Hopper in Gluon: a group of warps for the scores, two for the values.

64 rows' values are 64 x 512 fp32, half of a multiprocessor's registers: two groups of four warps keep half of the
channels each. A third makes the scores and weights of tile after tile, so that the tensor cores have values to add
while it takes a softmax. Tiles of 64 keys come in quarters (128 channels) through a ring that holds more than two of
them; a quarter is given back as soon as its values are added. bf16 pages are fetched by one warp by TMA, and half of
the queries live in registers, which leaves shared memory for more of the ring; FP8 pages are fetched as they are and
multiplied out by four warps.
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
        async_copy,
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
TILE = 64
"""Keys of a tile; a split holds whole tiles, a page too."""

RANK, ROPE = 512, 64
"""The latents of every released model."""


@gluon.jit
def _fetch(  # type: ignore[no-untyped-def]
    c_desc, e_desc, _ptr, _raw, pieces, ropes, full, free, table_ptr, first, last, PAGE: gl.constexpr
):
    """The fetching warp. A tile's quarters come in the order in which they are given back: the first of either
    half, then the second. The rotary part comes with the last, whose place says that the tile before is done with."""
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
            tma.async_copy_global_to_shared(c_desc, [row, (place % 2 * 2 + place // 2) * A], bar, pieces.index(stage))
            n += 1


@gluon.jit
def _fetch_packed(  # type: ignore[no-untyped-def]
    codes_ptr, scales_ptr, ropes_ptr, raw, pieces, ropes, full, free, table_ptr, first, last, PAGE: gl.constexpr
):
    """The fetching warps of FP8 pages: rows come as they are a tile ahead, and are multiplied out into the ring."""
    PIECES: gl.constexpr = pieces.shape[0]
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
    for place in gl.static_range(4):
        there = (first + r < last)[:, None]
        async_copy.async_copy_global_to_shared(
            raw.index(place), codes_ptr + (row * LINE + (place % 2 * 2 + place // 2) * A), mask=there
        )
        if place == 3:
            async_copy.async_copy_global_to_shared(
                ropes.index(0), ropes_ptr + row * (LINE // 2), mask=(first + t < last)[:, None]
            )
        async_copy.commit_group()
    n = 0
    for start in range(first, last, TILE):
        near = scales_ptr + row * (LINE // 4)
        here = start + r < last
        key = start + TILE
        there = (key + r < last)[:, None]
        row = (page * PAGE + (key & (PAGE - 1))).to(gl.int64)
        page = gl.load(table_ptr + (key + TILE) // PAGE, mask=key + TILE < last, other=0)
        scale_0 = gl.load(near, mask=here, other=0.0)
        scale_1 = gl.load(near + 2, mask=here, other=0.0)
        scale_2 = gl.load(near + 1, mask=here, other=0.0)
        scale_3 = gl.load(near + 3, mask=here, other=0.0)
        for place in gl.static_range(4):
            stage = n % PIECES
            async_copy.wait_group(3)
            scale = scale_0 if place == 0 else scale_1 if place == 1 else scale_2 if place == 2 else scale_3
            mbarrier.wait(free.index(stage), ((n // PIECES) & 1) ^ 1)
            value = raw.index(place).load(CODES).to(gl.float32) * scale[:, None]
            pieces.index(stage).store(value.to(pieces.dtype))
            fence_async_shared()
            mbarrier.arrive(full.index(stage))
            async_copy.async_copy_global_to_shared(
                raw.index(place), codes_ptr + (row * LINE + (place % 2 * 2 + place // 2) * A), mask=there
            )
            if place == 3:
                async_copy.async_copy_global_to_shared(
                    ropes.index((n // 4 + 1) % 2), ropes_ptr + row * (LINE // 2),
                    mask=(key + t < last)[:, None],
                )  # fmt: skip
            async_copy.commit_group()
            n += 1
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
def _scores(  # type: ignore[no-untyped-def]
    q_ptr, at, queries, pieces, ropes, weights, fades, full, p_full, p_free, lse_ptr, first, last, scale, base, block,
    rows, held, heads, end, width,
    DIRECT: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """The group of the scores: for every tile its weights, and what fades the sums before it."""
    PIECES: gl.constexpr = pieces.shape[0]
    TILE: gl.constexpr = pieces.shape[1]
    A: gl.constexpr = pieces.shape[2]
    E: gl.constexpr = ropes.shape[2]
    ROWS: gl.constexpr = weights.shape[1]
    SLOTS: gl.constexpr = weights.shape[0]
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    LINE: gl.constexpr = gl.SliceLayout(1, S)
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, S, 2)
    Q: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    q_row = block * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, Q))
    known = (q_row < held)[:, None]
    q_ptr += (at + q_row).to(gl.int64)[:, None] * (4 * A + E)
    turned = q_ptr + 4 * A + gl.arange(0, E, gl.SliceLayout(0, Q))[None, :]
    q_ptr += gl.arange(0, A, gl.SliceLayout(0, Q))[None, :]
    # Parts of the queries pass through the place of another on their way into registers.
    narrow = queries.index(0).slice(0, E, 1)
    narrow.store(gl.load(turned, mask=known, other=0.0))
    q_e = narrow.load(OPERAND)
    if PACKED:
        q_0 = queries.index(2)
        q_1 = queries.index(3)
        q_0.store(gl.load(q_ptr, mask=known, other=0.0))
        q_1.store(gl.load(q_ptr + A, mask=known, other=0.0))
    else:
        queries.index(1).store(gl.load(q_ptr, mask=known, other=0.0))
        q_0 = queries.index(1).load(OPERAND)
        queries.index(0).store(gl.load(q_ptr + A, mask=known, other=0.0))
        q_1 = queries.index(0).load(OPERAND)
    q_2 = queries.index(0)
    q_3 = queries.index(1)
    q_2.store(gl.load(q_ptr + 2 * A, mask=known, other=0.0))
    q_3.store(gl.load(q_ptr + 3 * A, mask=known, other=0.0))
    fence_async_shared()

    row = block * ROWS + gl.arange(0, ROWS, LINE)
    open_to = end - width + row // heads
    whole = end - width + 1  # keys that every row sees
    # The lowest finite number, not -inf: a fade of exp2(-inf + inf) would be NaN.
    peak = gl.full([ROWS], -1e30, gl.float32, LINE)
    total = gl.zeros([ROWS], gl.float32, LINE)
    tile = 0
    for start in range(first, last, TILE):
        n = 4 * tile
        if not PACKED:
            if last - start < TILE:
                for place in gl.static_range(4):
                    mbarrier.wait(full.index((n + place) % PIECES), ((n + place) // PIECES) & 1)
                    _clear(pieces.index((n + place) % PIECES), last - start)
                _clear(ropes.index(tile % 2), last - start)
                fence_async_shared()
        score = gl.zeros([ROWS, TILE], gl.float32, S)
        piece = pieces.index(n % PIECES)
        mbarrier.wait(full.index(n % PIECES), (n // PIECES) & 1)
        score = warpgroup_mma(q_0, piece.permute((1, 0)), score, use_acc=False, is_async=True)
        piece = pieces.index((n + 1) % PIECES)
        mbarrier.wait(full.index((n + 1) % PIECES), ((n + 1) // PIECES) & 1)
        score = warpgroup_mma(q_2, piece.permute((1, 0)), score, is_async=True)
        piece = pieces.index((n + 2) % PIECES)
        mbarrier.wait(full.index((n + 2) % PIECES), ((n + 2) // PIECES) & 1)
        score = warpgroup_mma(q_1, piece.permute((1, 0)), score, is_async=True)
        piece = pieces.index((n + 3) % PIECES)
        mbarrier.wait(full.index((n + 3) % PIECES), ((n + 3) // PIECES) & 1)
        score = warpgroup_mma(q_3, piece.permute((1, 0)), score, is_async=True)
        score = warpgroup_mma(q_e, ropes.index(tile % 2).permute((1, 0)), score, is_async=True)
        score = warpgroup_mma_wait(0, deps=[score])

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
        tile += 1  # noqa: SIM113
    known = gl.where(total > 0, total, 1.0)
    slot = tile % SLOTS
    mbarrier.wait(p_free.index(slot), ((tile // SLOTS) & 1) ^ 1)
    fades.index(slot).store(1.0 / known)
    mbarrier.arrive(p_full.index(slot))
    if not DIRECT:
        to = base.to(gl.int64) + row
        gl.store(lse_ptr + to, gl.where(total > 0, peak + gl.log2(known), -float("inf")), mask=row < rows)


@gluon.jit
def _values(  # type: ignore[no-untyped-def]
    pieces, weights, fades, full, free, p_full, p_free, o_ptr, first, last, base, block, rows, HALF: gl.constexpr
):
    """A group of the values: half HALF of the channels, by the weights of the first group."""
    PIECES: gl.constexpr = pieces.shape[0]
    TILE: gl.constexpr = pieces.shape[1]
    A: gl.constexpr = pieces.shape[2]
    SLOTS: gl.constexpr = weights.shape[0]
    ROWS: gl.constexpr = weights.shape[1]
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, A, 16])  # noqa: E741
    LINE: gl.constexpr = gl.SliceLayout(1, O)
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
        weight = weights.index(slot)
        low = low * fade
        high = high * fade
        low = warpgroup_mma(weight, pieces.index(here), low, is_async=True)
        high = warpgroup_mma(weight, pieces.index(after), high, is_async=True)
        low, high = warpgroup_mma_wait(1, deps=[low, high])
        mbarrier.arrive(free.index(here))
        low, high = warpgroup_mma_wait(0, deps=[low, high])
        mbarrier.arrive(free.index(after))
        mbarrier.arrive(p_free.index(slot))
        tile += 1  # noqa: SIM113
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
    a, b, c, q_ptr, table_ptr, ends_ptr, o_ptr, lse_ptr, scale, rows, heads, width, table_stride, splits,
    ROWS: gl.constexpr, TILE: gl.constexpr, A: gl.constexpr, E: gl.constexpr, PAGE: gl.constexpr,
    FIXED: gl.constexpr, DIRECT: gl.constexpr, PIECES: gl.constexpr, SLOTS: gl.constexpr, VALUES: gl.constexpr,
    FETCH: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """As `mla_decode._attend`: ROWS of a sequence's queries against one split of its keys. PACKED pages come as
    pointers to codes, scales and rotary parts, others as descriptors of a tile's quarter and of its rotary part."""
    dtype: gl.constexpr = q_ptr.dtype.element_ty
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

    WIDE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TILE, A], dtype)
    NARROW: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TILE, E], dtype)
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    LINES: gl.constexpr = gl.SwizzledSharedLayout(16, 1, 1, [1, 0])
    BAR: gl.constexpr = mbarrier.MBarrierLayout()
    queries = gl.allocate_shared_memory(dtype, [4 if PACKED else 2, ROWS, A], WIDE)
    pieces = gl.allocate_shared_memory(dtype, [PIECES, TILE, A], WIDE)
    ropes = gl.allocate_shared_memory(dtype, [2, TILE, E], NARROW)
    weights = gl.allocate_shared_memory(dtype, [SLOTS, ROWS, TILE], NARROW)
    raw = weights
    if PACKED:
        raw = gl.allocate_shared_memory(a.dtype.element_ty, [4, TILE, A], LINES)
    fades = gl.allocate_shared_memory(gl.float32, [SLOTS, ROWS], FLAT)
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
    table_ptr += s * table_stride
    gl.warp_specialize(
        [
            (
                _scores,
                (
                    q_ptr, s * rows, queries, pieces, ropes, weights, fades, full, p_full, p_free, lse_ptr, first,
                    last, scale, base, block, rows, held, heads, end, width, DIRECT, PACKED,
                ),
            ),
            (
                _values,
                (pieces, weights, fades, full, free, p_full, p_free, o_ptr, first, last, base, block, written, 0),
            ),
            (
                _values,
                (pieces, weights, fades, full, free, p_full, p_free, o_ptr, first, last, base, block, written, 1),
            ),
            (
                _fetch_packed if PACKED else _fetch,
                (a, b, c, raw, pieces, ropes, full, free, table_ptr, first, last, PAGE),
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
    how: tuple[int, int, int, int] | None = None,
) -> None:
    """Stage 1 over `grid` (blocks of rows, splits, sequences) into `o` and `lse`; `scale` for base-2 exponents."""
    quarter, packed = RANK // 4, pages_PTC.dtype == torch.uint8
    pieces, slots, values, fetch = how or ((6, 2, 160, 72) if packed else (10, 2, 160, 24))
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
            TensorDescriptor(
                latents, shape, strides, t, gl.NVMMASharedLayout.get_default_for(t, gl.bfloat16)
            )
            for t in ([TILE, quarter], [TILE, ROPE])
        )
        source = (*descs, None)
    _attend[grid](
        *source, q_NHC, table_SB, ends_S, o, lse, scale, rows, q_NHC.shape[1], width, table_SB.stride(0), grid[1],
        ROWS=ROWS, TILE=TILE, A=quarter, E=ROPE, PAGE=pages_PTC.shape[1], FIXED=fixed, DIRECT=direct, PIECES=pieces,
        SLOTS=slots, VALUES=values, FETCH=fetch, PACKED=packed, num_warps=4,
    )  # fmt: skip
