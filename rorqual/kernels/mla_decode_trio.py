"""Stage 1 of `mla_decode` for Hopper in Gluon, beyond a few rows: a group of warps for the scores, two for the values.

64 rows' values are 64 x 512 fp32, half of a multiprocessor's registers: two groups of four warps keep half of the
channels each. A third makes the scores and weights of tile after tile, so that the tensor cores have values to add
while it takes a softmax; it keeps half of the queries in registers, which leaves shared memory for more tiles. One
warp fetches tiles by TMA into a ring.
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
RANK, ROPE = 512, 64


@gluon.jit
def _fetch(  # type: ignore[no-untyped-def]
    c_desc, e_desc, _ptr, _raws, parts, bars, table_ptr, first, last, PAGE: gl.constexpr
):
    """The fetching warp."""
    lefts, rights, ropes = parts
    full_left, full_right, free_left, free_right, _p_full, _p_free = bars
    STAGES: gl.constexpr = lefts.shape[0]
    TILE: gl.constexpr = lefts.shape[1]
    HALF: gl.constexpr = lefts.shape[2]
    page = gl.load(table_ptr + first // PAGE, mask=first < last, other=0)
    tile = 0
    for start in range(first, last, TILE):
        stage = tile % STAGES
        parity = ((tile // STAGES) & 1) ^ 1
        row = page * PAGE + (start & (PAGE - 1))
        page = gl.load(table_ptr + gl.minimum(start + TILE, last - 1) // PAGE)
        mbarrier.wait(free_left.index(stage), parity)
        full = full_left.index(stage)
        mbarrier.expect(full, c_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(c_desc, [row, 0], full, lefts.index(stage))
        mbarrier.wait(free_right.index(stage), parity)
        full = full_right.index(stage)
        mbarrier.expect(full, c_desc.block_type.nbytes + e_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(c_desc, [row, HALF], full, rights.index(stage))
        tma.async_copy_global_to_shared(e_desc, [row, 2 * HALF], full, ropes.index(stage))
        tile += 1  # noqa: SIM113


@gluon.jit
def _decode(raw, scale, to, CODES: gl.constexpr):  # type: ignore[no-untyped-def]
    """FP8 codes times their rows' scales, from shared memory into shared memory."""
    to.store((raw.load(CODES).to(gl.float32) * scale[:, None]).to(to.dtype))


@gluon.jit
def _fetch_packed(  # type: ignore[no-untyped-def]
    codes_ptr, scales_ptr, ropes_ptr, raws, parts, bars, table_ptr, first, last, PAGE: gl.constexpr
):
    """The fetching warps of FP8 pages: rows come as they are two tiles ahead, and are multiplied out into the ring."""
    lefts, rights, ropes = parts
    codes, turned = raws
    full_left, full_right, free_left, free_right, _p_full, _p_free = bars
    STAGES: gl.constexpr = lefts.shape[0]
    TILE: gl.constexpr = lefts.shape[1]
    A: gl.constexpr = lefts.shape[2] // 2
    E: gl.constexpr = ropes.shape[2]
    LINE: gl.constexpr = 4 * A + 16 + 2 * E
    CODES: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [4, 1], [1, 0])
    TURNED: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    r = gl.arange(0, TILE, gl.SliceLayout(1, CODES))
    t = gl.arange(0, TILE, gl.SliceLayout(1, TURNED))
    codes_ptr += r[:, None] * LINE + gl.arange(0, 4 * A, gl.SliceLayout(0, CODES))[None, :]
    scales_ptr += r * (LINE // 4)
    ropes_ptr += t[:, None] * (LINE // 2) + gl.arange(0, E, gl.SliceLayout(0, TURNED))[None, :]
    for ahead in gl.static_range(2):
        key = first + ahead * TILE
        page = gl.load(table_ptr + key // PAGE, mask=key < last, other=0)
        row = (page * PAGE + (key & (PAGE - 1))).to(gl.int64)
        to = codes.index(ahead), turned.index(ahead)
        async_copy.async_copy_global_to_shared(to[0], codes_ptr + row * LINE, mask=(key + r < last)[:, None])
        async_copy.async_copy_global_to_shared(
            to[1], ropes_ptr + row * (LINE // 2), mask=(key + t < last)[:, None]
        )
        async_copy.commit_group()
    page = gl.load(table_ptr + first // PAGE, mask=first < last, other=0)
    near = scales_ptr + (page * PAGE + (first & (PAGE - 1))).to(gl.int64) * (LINE // 4)
    there = first + r < last
    a = gl.load(near, mask=there, other=0.0)
    b = gl.load(near + 1, mask=there, other=0.0)
    c = gl.load(near + 2, mask=there, other=0.0)
    d = gl.load(near + 3, mask=there, other=0.0)
    page = gl.load(table_ptr + (first + TILE) // PAGE, mask=first + TILE < last, other=0)
    tile = 0
    for start in range(first, last, TILE):
        stage = tile % STAGES
        parity = ((tile // STAGES) & 1) ^ 1
        raw = codes.index(tile % 2)
        key = start + TILE
        near = scales_ptr + (page * PAGE + (key & (PAGE - 1))).to(gl.int64) * (LINE // 4)
        there = key + r < last
        key += TILE
        page = gl.load(table_ptr + key // PAGE, mask=key < last, other=0)
        async_copy.wait_group(1)
        mbarrier.wait(free_left.index(stage), parity)
        left = lefts.index(stage)
        _decode(raw.slice(0, A, 1), a, left.slice(0, A, 1), CODES)
        _decode(raw.slice(A, A, 1), b, left.slice(A, A, 1), CODES)
        fence_async_shared()
        mbarrier.arrive(full_left.index(stage))
        a = gl.load(near, mask=there, other=0.0)
        b = gl.load(near + 1, mask=there, other=0.0)
        mbarrier.wait(free_right.index(stage), parity)
        right = rights.index(stage)
        _decode(raw.slice(2 * A, A, 1), c, right.slice(0, A, 1), CODES)
        _decode(raw.slice(3 * A, A, 1), d, right.slice(A, A, 1), CODES)
        ropes.index(stage).store(turned.index(tile % 2).load(TURNED))
        fence_async_shared()
        mbarrier.arrive(full_right.index(stage))
        c = gl.load(near + 2, mask=there, other=0.0)
        d = gl.load(near + 3, mask=there, other=0.0)
        row = (page * PAGE + (key & (PAGE - 1))).to(gl.int64)
        async_copy.async_copy_global_to_shared(raw, codes_ptr + row * LINE, mask=(key + r < last)[:, None])
        async_copy.async_copy_global_to_shared(
            turned.index(tile % 2), ropes_ptr + row * (LINE // 2), mask=(key + t < last)[:, None]
        )
        async_copy.commit_group()
        tile += 1  # noqa: SIM113
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
def _multiply(  # type: ignore[no-untyped-def]
    q_left, q_right, q_rope, parts, bars, tile, there, CLEAN: gl.constexpr, S: gl.constexpr
):
    """Ask for the scores of tile number `tile`, of which `there` keys exist."""
    lefts, rights, ropes = parts
    full_left, full_right, _free_left, _free_right, _p_full, _p_free = bars
    STAGES: gl.constexpr = lefts.shape[0]
    TILE: gl.constexpr = lefts.shape[1]
    HALF: gl.constexpr = lefts.shape[2]
    ROWS: gl.constexpr = q_rope.shape[0]
    stage = tile % STAGES
    parity = (tile // STAGES) & 1
    left = lefts.index(stage)
    right = rights.index(stage)
    rope = ropes.index(stage)
    if not CLEAN:
        if there < TILE:
            mbarrier.wait(full_left.index(stage), parity)
            mbarrier.wait(full_right.index(stage), parity)
            _clear(left, there)
            _clear(right, there)
            _clear(rope, there)
            fence_async_shared()
    score = gl.zeros([ROWS, TILE], gl.float32, S)
    mbarrier.wait(full_left.index(stage), parity)
    score = warpgroup_mma(q_left, left.permute((1, 0)), score, use_acc=False, is_async=True)
    mbarrier.wait(full_right.index(stage), parity)
    score = warpgroup_mma(q_right, right.permute((1, 0)), score, is_async=True)
    return warpgroup_mma(q_rope, rope.permute((1, 0)), score, is_async=True)


@gluon.jit
def _weigh(  # type: ignore[no-untyped-def]
    score, peak, total, scale, open_to, whole, start, tile, weights, fades, bars, S: gl.constexpr
):
    """Softmax of a tile's scores: its weights and what fades the sums before, for the groups of the values."""
    _full_left, _full_right, _free_left, _free_right, p_full, p_free = bars
    TILE: gl.constexpr = score.shape[1]
    SLOTS: gl.constexpr = weights.shape[0]
    if start + TILE > whole:
        key = start + gl.arange(0, TILE, gl.SliceLayout(0, S))
        score = gl.where(key[None, :] <= open_to[:, None], score, -float("inf"))
    higher = gl.maximum(peak, gl.max(score, 1) * scale)
    weight = gl.exp2(score * scale - higher[:, None])
    fade = gl.exp2(peak - higher)
    slot = tile % SLOTS
    mbarrier.wait(p_free.index(slot), ((tile // SLOTS) & 1) ^ 1)
    weights.index(slot).store(weight.to(weights.dtype))
    fades.index(slot).store(fade)
    fence_async_shared()
    mbarrier.arrive(p_full.index(slot))
    total = total * fade + gl.sum(weight, 1)
    return higher, total


@gluon.jit
def _scores(  # type: ignore[no-untyped-def]
    q_ptr, at, q_parts, parts, weights, fades, bars, lse_ptr, first, last, scale, base, block, rows, held, heads, end,
    width,
    DIRECT: gl.constexpr, AHEAD: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """The group of the scores."""
    lefts, _rights, ropes = parts
    _full_left, _full_right, _free_left, _free_right, p_full, p_free = bars
    ROWS: gl.constexpr = weights.shape[1]
    TILE: gl.constexpr = lefts.shape[1]
    HALF: gl.constexpr = lefts.shape[2]
    ROPE: gl.constexpr = ropes.shape[2]
    SLOTS: gl.constexpr = weights.shape[0]
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    LINE: gl.constexpr = gl.SliceLayout(1, S)
    Q: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    q_row = block * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, Q))
    from_ = q_ptr + (at + q_row).to(gl.int64)[:, None] * (2 * HALF + ROPE)
    known = (q_row < held)[:, None]
    channel = gl.arange(0, HALF, gl.SliceLayout(0, Q))[None, :]
    turned = gl.arange(0, ROPE, gl.SliceLayout(0, Q))[None, :]
    # Parts of the queries pass through the place of another on their way into registers.
    q_right = q_parts[1]
    if PACKED:
        q_left = q_parts[0]
        q_left.store(gl.load(from_ + channel, mask=known, other=0.0))
    else:
        q_right.store(gl.load(from_ + channel, mask=known, other=0.0))
        q_left = q_right.load(gl.DotOperandLayout(0, S, 2))
    narrow = q_right.slice(0, ROPE, 1)
    narrow.store(gl.load(from_ + 2 * HALF + turned, mask=known, other=0.0))
    q_rope = narrow.load(gl.DotOperandLayout(0, S, 2))
    q_right.store(gl.load(from_ + HALF + channel, mask=known, other=0.0))
    fence_async_shared()

    row = block * ROWS + gl.arange(0, ROWS, LINE)
    open_to = end - width + row // heads
    whole = end - width + 1  # keys that every row sees
    # The lowest finite number, not -inf: a fade of exp2(-inf + inf) would be NaN.
    peak = gl.full([ROWS], -1e30, gl.float32, LINE)
    total = gl.zeros([ROWS], gl.float32, LINE)
    tile = 0
    if AHEAD:
        if first < last:
            score = _multiply(q_left, q_right, q_rope, parts, bars, 0, last - first, PACKED, S)
            score = warpgroup_mma_wait(0, deps=[score])
            for start in range(first, last - TILE, TILE):
                following = _multiply(
                    q_left, q_right, q_rope, parts, bars, tile + 1, last - start - TILE, PACKED, S
                )
                peak, total = _weigh(
                    score, peak, total, scale, open_to, whole, start, tile, weights, fades, bars, S
                )
                score = warpgroup_mma_wait(0, deps=[following])
                tile += 1  # noqa: SIM113
            peak, total = _weigh(
                score, peak, total, scale, open_to, whole, first + tile * TILE, tile, weights, fades, bars, S
            )
            tile += 1
    else:
        for start in range(first, last, TILE):
            score = _multiply(q_left, q_right, q_rope, parts, bars, tile, last - start, PACKED, S)
            score = warpgroup_mma_wait(0, deps=[score])
            peak, total = _weigh(
                score, peak, total, scale, open_to, whole, start, tile, weights, fades, bars, S
            )
            tile += 1  # noqa: SIM113
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
    pieces, weights, fades, full, free, p_full, p_free, o_ptr, first, last, base, block, rows,
    COLUMN: gl.constexpr,
):  # fmt: skip
    """A group of the values: the channels from COLUMN on, by the weights of the first group."""
    STAGES: gl.constexpr = pieces.shape[0]
    TILE: gl.constexpr = pieces.shape[1]
    HALF: gl.constexpr = pieces.shape[2]
    SLOTS: gl.constexpr = weights.shape[0]
    ROWS: gl.constexpr = weights.shape[1]
    QUARTER: gl.constexpr = HALF // 2
    A: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, QUARTER, 16])
    LINE: gl.constexpr = gl.SliceLayout(1, A)
    # Two products of 128 channels: the assembler has no room for 256 with so many warps.
    low = gl.zeros([ROWS, QUARTER], gl.float32, A)
    high = gl.zeros([ROWS, QUARTER], gl.float32, A)
    tile = 0
    for _ in range(first, last, TILE):
        stage = tile % STAGES
        slot = tile % SLOTS
        mbarrier.wait(full.index(stage), (tile // STAGES) & 1)
        mbarrier.wait(p_full.index(slot), (tile // SLOTS) & 1)
        fade = fades.index(slot).load(LINE)[:, None]
        weight = weights.index(slot)
        piece = pieces.index(stage)
        low = warpgroup_mma(weight, piece.slice(0, QUARTER, 1), low * fade, is_async=True)
        high = warpgroup_mma(weight, piece.slice(QUARTER, QUARTER, 1), high * fade, is_async=True)
        low, high = warpgroup_mma_wait(0, deps=[low, high])
        mbarrier.arrive(free.index(stage))
        mbarrier.arrive(p_free.index(slot))
        tile += 1  # noqa: SIM113
    slot = tile % SLOTS
    mbarrier.wait(p_full.index(slot), (tile // SLOTS) & 1)
    fade = fades.index(slot).load(LINE)[:, None]
    m = block * ROWS + gl.arange(0, ROWS, LINE)
    channel = COLUMN + gl.arange(0, QUARTER, gl.SliceLayout(0, A))
    place = o_ptr + (base.to(gl.int64) + m)[:, None] * (2 * HALF) + channel[None, :]
    known = (m < rows)[:, None]
    gl.store(place, (low * fade).to(o_ptr.dtype.element_ty), mask=known)
    gl.store(place + QUARTER, (high * fade).to(o_ptr.dtype.element_ty), mask=known)


@gluon.jit(do_not_specialize=("rows", "heads", "width", "table_stride", "splits"))
def _attend(  # type: ignore[no-untyped-def]
    a, b, c, q_ptr, table_ptr, ends_ptr, o_ptr, lse_ptr, scale, rows, heads, width, table_stride, splits,
    ROWS: gl.constexpr, TILE: gl.constexpr, HALF: gl.constexpr, ROPE: gl.constexpr, PAGE: gl.constexpr, FIXED: gl.constexpr, DIRECT: gl.constexpr, CUT: gl.constexpr,
    STAGES: gl.constexpr, SLOTS: gl.constexpr, AHEAD: gl.constexpr, VALUES: gl.constexpr,
    FETCH: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """As `mla_decode._attend`: ROWS of a sequence's queries against one split of its keys. PACKED pages come as
    pointers to codes, scales and rotary parts, others as descriptors of tiles of half the channels and of the rest."""
    if not DIRECT:  # the second stage may get ready
        gl.inline_asm_elementwise(
            "griddepcontrol.launch_dependents; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
        )
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    block = gl.program_id(0)
    split = gl.program_id(1)
    s = gl.program_id(2)
    end = gl.load(ends_ptr + s)
    if FIXED > 0:
        share = FIXED
    else:
        share = gl.cdiv(gl.cdiv(end, splits), CUT) * CUT
    first = split * share
    last = gl.minimum(first + share, end)
    base = s * rows
    if not DIRECT:
        base += split * gl.num_programs(2) * rows
    held = gl.where(first < last, rows, 0)  # a program without keys runs through, touching nothing
    written = rows if DIRECT else held

    SHARED: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, HALF], dtype)
    P: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, TILE], dtype)
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    BAR: gl.constexpr = mbarrier.MBarrierLayout()
    WIDE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TILE, HALF], dtype)
    NARROW: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TILE, ROPE], dtype)
    q_right = gl.allocate_shared_memory(dtype, [ROWS, HALF], SHARED)
    q_left = q_right
    raws = (q_right, q_right)
    if PACKED:
        q_left = gl.allocate_shared_memory(dtype, [ROWS, HALF], SHARED)
        LINES: gl.constexpr = gl.SwizzledSharedLayout(16, 2, 8, [1, 0])
        codes = gl.allocate_shared_memory(a.dtype.element_ty, [2, TILE, 2 * HALF], LINES)
        raws = (codes, gl.allocate_shared_memory(dtype, [2, TILE, ROPE], LINES))
    q_parts = (q_left, q_right)
    lefts = gl.allocate_shared_memory(dtype, [STAGES, TILE, HALF], WIDE)
    rights = gl.allocate_shared_memory(dtype, [STAGES, TILE, HALF], WIDE)
    ropes = gl.allocate_shared_memory(dtype, [STAGES, TILE, ROPE], NARROW)
    weights = gl.allocate_shared_memory(dtype, [SLOTS, ROWS, TILE], P)
    fades = gl.allocate_shared_memory(gl.float32, [SLOTS, ROWS], FLAT)
    full_left = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    full_right = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    free_left = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    free_right = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    p_full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], BAR)
    p_free = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], BAR)
    for i in gl.static_range(STAGES):
        mbarrier.init(full_left.index(i), count=1)
        mbarrier.init(full_right.index(i), count=1)
        mbarrier.init(free_left.index(i), count=1)
        mbarrier.init(free_right.index(i), count=1)
    for i in gl.static_range(SLOTS):
        mbarrier.init(p_full.index(i), count=1)
        mbarrier.init(p_free.index(i), count=2)
    parts = (lefts, rights, ropes)
    bars = (full_left, full_right, free_left, free_right, p_full, p_free)
    table_ptr += s * table_stride
    gl.warp_specialize(
        [
            (
                _scores,
                (
                    q_ptr, s * rows, q_parts, parts, weights, fades, bars, lse_ptr, first, last, scale, base, block,
                    rows, held, heads, end, width, DIRECT, AHEAD, PACKED,
                ),
            ),
            (
                _values,
                (
                    lefts, weights, fades, full_left, free_left, p_full, p_free, o_ptr, first, last, base, block,
                    written, 0,
                ),
            ),
            (
                _values,
                (
                    rights, weights, fades, full_right, free_right, p_full, p_free, o_ptr, first, last, base, block,
                    written, HALF,
                ),
            ),
            (_fetch_packed if PACKED else _fetch, (a, b, c, raws, parts, bars, table_ptr, first, last, PAGE)),
        ],
        [4, 4, 4 if PACKED else 1],
        [VALUES, VALUES, FETCH],
    )  # fmt: skip


CUT = 64
"""Keys that a split holds a multiple of; a page holds whole cuts."""


def supported(q_NHC: Tensor, pages_PTC: Tensor, rank: int) -> bool:
    """Whether `launch` takes these: bf16 latents of the released size on a Hopper GPU, in pages of whole tiles."""
    return (
        AVAILABLE
        and q_NHC.is_cuda
        and torch.cuda.get_device_capability(q_NHC.device)[0] == 9
        and q_NHC.dtype == torch.bfloat16
        and pages_PTC.dtype in (torch.bfloat16, torch.uint8)
        and pages_PTC.is_contiguous()
        and (rank, q_NHC.shape[2] - rank) == (RANK, ROPE)
        and pages_PTC.shape[1] % CUT == 0
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
    how: tuple[int, int, int, bool, int] = (32, 5, 2, False, 160),
) -> None:
    """Stage 1 over `grid` (blocks of rows, splits, sequences) into `o` and `lse`; `scale` for base-2 exponents."""
    tile, stages, slots, ahead, values = how
    packed = pages_PTC.dtype == torch.uint8
    if packed:
        parts: Any = (
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
            for t in ([tile, RANK // 2], [tile, ROPE])
        )
        parts = (*descs, None)
    _attend[grid](
        *parts, q_NHC, table_SB, ends_S, o, lse, scale, rows, q_NHC.shape[1], width, table_SB.stride(0), grid[1],
        ROWS=ROWS, TILE=tile, HALF=RANK // 2, ROPE=ROPE, PAGE=pages_PTC.shape[1], FIXED=fixed, DIRECT=direct,
        CUT=CUT, STAGES=stages, SLOTS=slots, AHEAD=ahead, VALUES=values, FETCH=72 if packed else 24, PACKED=packed,
        num_warps=4,
    )  # fmt: skip
