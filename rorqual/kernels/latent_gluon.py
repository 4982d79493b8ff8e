"""What latent attention in Gluon has in common on Hopper: a group of warps for the scores, two for the values.

64 rows' values are 64 x 512 fp32, half of a multiprocessor's registers: two groups of four warps keep half of the
channels each. A third makes the scores and weights of tile after tile, so that the tensor cores have values to add
while it takes a softmax. Tiles of 64 keys come in quarters (128 channels) through a ring that holds more than two of
them; a quarter is given back as soon as its values are added. Piece 4 * tile + place of the ring: the quarters 0, 2,
1 and 3, in the order in which they are given back. A rotary part comes with the last, whose place in the ring says
that the tile before is done with.
"""

from typing import Any

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
        warpgroup_mma,
        warpgroup_mma_wait,
    )
except ImportError:  # Triton too old, or none
    from rorqual.kernels.gpu import tl as gl
    from rorqual.kernels.gpu import triton as gluon

    AVAILABLE = False
else:
    AVAILABLE = INSTALLED

ROWS = 64
"""Queries of a program."""

TILE = 64
"""Keys of a tile."""

SLOTS = 2
"""Tiles' weights that wait for the groups of the values."""

VALUES = 160
"""Registers of a thread of the groups of the values; those of the scores and the fetching warps share 192."""


@gluon.jit
def allocate(  # type: ignore[no-untyped-def]
    dtype: gl.constexpr, HELD: gl.constexpr, PIECES: gl.constexpr, ROWS: gl.constexpr, TILE: gl.constexpr,
    A: gl.constexpr, E: gl.constexpr, SLOTS: gl.constexpr, ARRIVALS: gl.constexpr,
):  # fmt: skip
    """Shared memory: (queries but for the HELD quarters that live in registers, pieces, rotary parts, weights, fades,
    barriers). ARRIVALS at a piece's barrier say that it is there."""
    WIDE: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    BAR: gl.constexpr = mbarrier.MBarrierLayout()
    queries = gl.allocate_shared_memory(dtype, [4 - HELD, ROWS, A], WIDE)
    pieces = gl.allocate_shared_memory(dtype, [PIECES, TILE, A], WIDE)
    ropes = pieces
    if E > 0:
        ropes = gl.allocate_shared_memory(dtype, [2, TILE, E], WIDE)
    weights = gl.allocate_shared_memory(dtype, [SLOTS, ROWS, TILE], WIDE)
    fades = gl.allocate_shared_memory(gl.float32, [SLOTS, ROWS], FLAT)
    full = gl.allocate_shared_memory(gl.int64, [PIECES, 1], BAR)
    free = gl.allocate_shared_memory(gl.int64, [PIECES, 1], BAR)
    p_full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], BAR)
    p_free = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], BAR)
    for i in gl.static_range(PIECES):
        mbarrier.init(full.index(i), count=ARRIVALS)
        mbarrier.init(free.index(i), count=1)
    for i in gl.static_range(SLOTS):
        mbarrier.init(p_full.index(i), count=1)
        mbarrier.init(p_free.index(i), count=2)
    return queries, pieces, ropes, weights, fades, (full, free, p_full, p_free)


@gluon.jit
def take_queries(  # type: ignore[no-untyped-def]
    rows, known, queries, HELD: gl.constexpr, E: gl.constexpr, S: gl.constexpr, Q: gl.constexpr
):
    """The queries of pointers `rows` `[ROWS, 1]` in layout Q as operands: four quarters, the first HELD of them in
    registers, and the rotary part, in registers. What goes there passes through shared memory."""
    A: gl.constexpr = queries.shape[2]
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, S, 2)
    at = rows + gl.arange(0, A, gl.SliceLayout(0, Q))[None, :]
    q_e = queries.index(0)
    if E > 0:
        narrow = queries.index(0).slice(0, E, 1)
        narrow.store(
            gl.load(rows + 4 * A + gl.arange(0, E, gl.SliceLayout(0, Q))[None, :], mask=known, other=0.0)
        )
        q_e = narrow.load(OPERAND)
    if HELD > 0:
        queries.index(0).store(gl.load(at, mask=known, other=0.0))
        q_0 = queries.index(0).load(OPERAND)
    else:
        q_0 = queries.index(0)
        q_0.store(gl.load(at, mask=known, other=0.0))
    if HELD > 1:
        queries.index(1).store(gl.load(at + A, mask=known, other=0.0))
        q_1 = queries.index(1).load(OPERAND)
    else:
        q_1 = queries.index(1 - HELD)
        q_1.store(gl.load(at + A, mask=known, other=0.0))
    q_2 = queries.index(2 - HELD)
    q_2.store(gl.load(at + 2 * A, mask=known, other=0.0))
    q_3 = queries.index(3 - HELD)
    q_3.store(gl.load(at + 3 * A, mask=known, other=0.0))
    fence_async_shared()
    return q_0, q_1, q_2, q_3, q_e


@gluon.jit
def ask(codes, there, turned, turned_there, raw, rope, A: gl.constexpr):  # type: ignore[no-untyped-def]
    """Begin to copy a tile of FP8 rows as they are: pointers to the codes `[TILE, A]` of a first quarter and to the
    rotary parts `[TILE, E]`. A quarter is a group of copies."""
    for place in gl.static_range(4):
        quarter = codes + (place % 2 * 2 + place // 2) * A
        async_copy.async_copy_global_to_shared(raw.index(place), quarter, mask=there)
        if place == 3:
            async_copy.async_copy_global_to_shared(rope, turned, mask=turned_there)
        async_copy.commit_group()


@gluon.jit
def multiply_out(  # type: ignore[no-untyped-def]
    scales, here, codes, there, turned, turned_there, raw, pieces, ropes, full, free, n, CODES: gl.constexpr
):
    """A tile of FP8 rows asked for before, times its scales (pointers `[TILE]`), into the ring from piece n on; every
    quarter that is done with makes room for that of the next tile, whose pointers are as in `ask`."""
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
def multiply(  # type: ignore[no-untyped-def]
    q, pieces, ropes, full, tile, E: gl.constexpr, COPIED: gl.constexpr, S: gl.constexpr
):
    """Ask for the scores of tile number `tile`. COPIED: ordinary copies brought it, not TMA."""
    q_0, q_1, q_2, q_3, q_e = q
    ROWS: gl.constexpr = q_3.shape[0]
    PIECES: gl.constexpr = pieces.shape[0]
    TILE: gl.constexpr = pieces.shape[1]
    n = 4 * tile
    if COPIED:
        for place in gl.static_range(4):
            mbarrier.wait(full.index((n + place) % PIECES), ((n + place) // PIECES) & 1)
        fence_async_shared()
    score = gl.zeros([ROWS, TILE], gl.float32, S)
    if not COPIED:
        mbarrier.wait(full.index(n % PIECES), (n // PIECES) & 1)
    piece = pieces.index(n % PIECES)
    score = warpgroup_mma(q_0, piece.permute((1, 0)), score, use_acc=False, is_async=True)
    n += 1
    if not COPIED:
        mbarrier.wait(full.index(n % PIECES), (n // PIECES) & 1)
    score = warpgroup_mma(q_2, pieces.index(n % PIECES).permute((1, 0)), score, is_async=True)
    n += 1
    if not COPIED:
        mbarrier.wait(full.index(n % PIECES), (n // PIECES) & 1)
    score = warpgroup_mma(q_1, pieces.index(n % PIECES).permute((1, 0)), score, is_async=True)
    n += 1
    if not COPIED:
        mbarrier.wait(full.index(n % PIECES), (n // PIECES) & 1)
    score = warpgroup_mma(q_3, pieces.index(n % PIECES).permute((1, 0)), score, is_async=True)
    if E > 0:
        score = warpgroup_mma(q_e, ropes.index(tile % 2).permute((1, 0)), score, is_async=True)
    return score


@gluon.jit
def weigh(score, peak, total, scale, weights, fades, p_full, p_free, tile):  # type: ignore[no-untyped-def]
    """Leave a tile's weights, and what fades the sums before it, to the groups of the values: (new peak, new sum of
    the weights), peaks as powers of two."""
    SLOTS: gl.constexpr = weights.shape[0]
    higher = gl.maximum(peak, gl.max(score, 1) * scale)
    weight = gl.exp2(score * scale - higher[:, None])
    fade = gl.exp2(peak - higher)
    slot = tile % SLOTS
    mbarrier.wait(p_free.index(slot), ((tile // SLOTS) & 1) ^ 1)
    weights.index(slot).store(weight.to(weights.dtype))
    fades.index(slot).store(fade)
    fence_async_shared()
    mbarrier.arrive(p_full.index(slot))
    return higher, total * fade + gl.sum(weight, 1)


@gluon.jit
def finish(part, fades, p_full, p_free, turn):  # type: ignore[no-untyped-def]
    """Leave to the groups of the values what their sums are to be multiplied by."""
    SLOTS: gl.constexpr = fades.shape[0]
    mbarrier.wait(p_free.index(turn % SLOTS), ((turn // SLOTS) & 1) ^ 1)
    fades.index(turn % SLOTS).store(part)
    mbarrier.arrive(p_full.index(turn % SLOTS))


@gluon.jit
def add(  # type: ignore[no-untyped-def]
    pieces, weights, fades, bars, tile, turn, tiles, HALF: gl.constexpr, COPIED: gl.constexpr
):
    """A group of the values: half HALF of the channels, of `tiles` tiles from number `tile` of the ring on, whose
    weights are number `turn` and so on: two quarters [ROWS, A], normalised."""
    full, free, p_full, p_free = bars
    PIECES: gl.constexpr = pieces.shape[0]
    A: gl.constexpr = pieces.shape[2]
    SLOTS: gl.constexpr = weights.shape[0]
    ROWS: gl.constexpr = weights.shape[1]
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, A, 16])
    LINE: gl.constexpr = gl.SliceLayout(1, O)
    # Two products of 128 channels: the assembler has no room for 256 with so many warps.
    low = gl.zeros([ROWS, A], gl.float32, O)
    high = gl.zeros([ROWS, A], gl.float32, O)
    for j in range(tiles):
        n = 4 * (tile + j) + HALF
        here = n % PIECES
        after = (n + 2) % PIECES
        slot = (turn + j) % SLOTS
        mbarrier.wait(full.index(here), (n // PIECES) & 1)
        mbarrier.wait(full.index(after), ((n + 2) // PIECES) & 1)
        if COPIED:
            fence_async_shared()
        mbarrier.wait(p_full.index(slot), ((turn + j) // SLOTS) & 1)
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
    turn += tiles
    slot = turn % SLOTS
    mbarrier.wait(p_full.index(slot), (turn // SLOTS) & 1)
    fade = fades.index(slot).load(LINE)[:, None]
    mbarrier.arrive(p_free.index(slot))
    return low * fade, high * fade
