"""Factors of `single_ring` as tensor cores want them: rows laid down as columns, and scales of matrices."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from rorqual.kernels.gluon_rings import fence_async_shared, gl, gluon, mbarrier
from rorqual.kernels.gpu import tl

WAIT = gl.constexpr("""
{
.reg .pred p;
.reg .b32 a, b, n;
.reg .b64 at;
mov.b32 $0, $4;
mov.b32 $1, $5;
mov.b32 $2, $6;
mov.b32 $3, $7;
cvt.s64.s32 at, $8;
add.s64 at, at, $12;
mov.b32 n, 0;
AGAIN:
xor.b32 a, $0, $16;
xor.b32 b, $1, $16;
or.b32 a, a, b;
xor.b32 b, $2, $16;
or.b32 a, a, b;
xor.b32 b, $3, $16;
or.b32 a, a, b;
and.b32 a, a, 0xffff;
setp.eq.b32 p, a, 0;
@p bra READY;
add.u32 n, n, 1;
setp.gt.u32 p, n, 0x800000;
@p mov.b64 at, 0;
ld.relaxed.gpu.global.v4.b32 {$0, $1, $2, $3}, [at];
bra AGAIN;
READY:
}
""")
"""Four words as read before, read again until all are of this launch; each thread for itself. What has not come after
seconds never will: an error then is better than a GPU that hangs. (By an address that is none: with a trap here ptxas
12.8 gives the whole partition 24 registers.)"""
PEEK = gl.constexpr("""
{
.reg .b64 at;
cvt.s64.s32 at, $4;
add.s64 at, at, $8;
ld.relaxed.gpu.global.v4.b32 {$0, $1, $2, $3}, [at];
}
""")
"""Four words as they are now."""
PEEK_OPERANDS = gl.constexpr("=&r,=&r,=&r,=&r,r,r,r,r,l,l,l,l")
WAIT_OPERANDS = gl.constexpr("=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,l,l,l,l,r,r,r,r")


@gluon.jit
def power(by, POWERS: gl.constexpr):
    """Scales as fp32; bytes of float8_e8m0fnu are exponents."""
    if POWERS:
        bits = gl.where(by == 0, 0x00400000, by.to(gl.int32) << 23)
        return gl.where(by == 255, float("nan"), bits.to(gl.float32, bitcast=True))
    else:
        return by.to(gl.float32)


@gluon.jit
def _part(item, W: gl.constexpr, RUN: gl.constexpr, RUNS: gl.constexpr, SHARED: gl.constexpr):
    """The first run of an item of the second product, in its experts' row, and how many runs of it there are."""
    COMMON: gl.constexpr = (SHARED * W + RUNS * RUN - 1) // (RUNS * RUN)
    ROUTED: gl.constexpr = (W + RUNS * RUN - 1) // (RUNS * RUN)
    common = item < COMMON
    start = gl.where(common, item, (item - COMMON) % ROUTED) * RUNS
    return start, gl.where(common, SHARED * W // RUN, W // RUN) - start


@gluon.jit
def _place(
    item, W: gl.constexpr, K: gl.constexpr, SHARED: gl.constexpr, RUNS: gl.constexpr, RUN: gl.constexpr,
    LAYOUT: gl.constexpr,
):  # fmt: skip
    """Where, in bytes, an item of the second product finds its part of inner `[RUNS, RUN]`. Runs beyond the row are its
    last one again: what the box has there is zeros."""
    COMMON: gl.constexpr = (SHARED * W + RUNS * RUN - 1) // (RUNS * RUN)
    ROUTED: gl.constexpr = (W + RUNS * RUN - 1) // (RUNS * RUN)
    begin = gl.where(item < COMMON, K * W, (item - COMMON) // ROUTED * W)
    start, many = _part(item, W, RUN, RUNS, SHARED)
    run = gl.arange(0, RUNS, gl.SliceLayout(1, LAYOUT))[:, None]
    lane = gl.arange(0, RUN, gl.SliceLayout(0, LAYOUT))[None, :]
    return 4 * (begin + (start + gl.minimum(run, many - 1)) * RUN + lane)


@gluon.jit
def _words(words, at):
    """What lies there now."""
    return gl.inline_asm_elementwise(
        PEEK, PEEK_OPERANDS, [at, words.to(gl.int64)], gl.int32, is_pure=False, pack=4
    )


@gluon.jit
def _settled(found, at, words, tag):
    """The words as fp32, once they are there."""
    found = gl.inline_asm_elementwise(
        WAIT, WAIT_OPERANDS, [found, at, words.to(gl.int64), tag], gl.int32, is_pure=False, pack=4
    )
    return (found & -65536).to(gl.float32, bitcast=True)


@gluon.jit
def lay(row, columns, steps, by):
    """Lay a row `[RUNS, RUN]` down as columns `[RUNS, RUN]`; for codes as two digits of each run's own step,
    `[2 RUNS, RUN]`, and the columns' steps `[2 RUNS]` times `by` `[RUNS]`."""
    kind: gl.constexpr = columns.dtype
    RUNS: gl.constexpr = row.shape[0]
    if kind == gl.float8e4nv:
        # A power of two, so that the largest number lies between 128 and 256.
        power = gl.maximum(gl.max(gl.abs(row), 1).to(gl.int32, bitcast=True) >> 23, 16)
        row = row * ((261 - power) << 23).to(gl.float32, bitcast=True)[:, None]
        # The first digit has the four upper bits of bf16's eight, the second one the lower ones: both exact, except
        # below 2^-6, where E4M3 has multiples of 2^-9 only. (Read back from its code, ptxas 12.8 takes half of the
        # first digits from a register that was never written.)
        upper = (row.to(gl.int32, bitcast=True) & -1048576).to(gl.float32, bitcast=True)
        digit = gl.where(gl.abs(row) < 0.015625, (row + 24576.0) - 24576.0, upper)
        digits = gl.join(digit.to(kind), ((row - digit) * 16.0).to(kind))
        columns.store(digits.permute([2, 0, 1]).reshape([2 * RUNS, row.shape[1]]))
        step = ((power - 7) << 23).to(gl.float32, bitcast=True) * by
        steps.store(gl.join(step, step * 0.0625).permute([1, 0]).reshape([2 * RUNS]))
    else:
        columns.store(row.to(kind))


@gluon.jit
def up_scales(
    tables, ids, experts, W: gl.constexpr, D: gl.constexpr, K: gl.constexpr, SHARED: gl.constexpr, UPS: gl.constexpr,
    P: gl.constexpr, RUNS: gl.constexpr, CHUNKS: gl.constexpr, COMMON: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Scales of the runs of this program's first UPS items of the first product, gate's and up's in turn
    `[2 UPS, RUNS]`; COMMON: of the shared experts alone, which nobody chose."""
    gate, up, common_gate, common_up = tables
    number = gl.arange(0, 2 * UPS, gl.SliceLayout(1, LAYOUT))[:, None]
    second = number % 2 == 1
    tile = gl.program_id(0) + number // 2 // CHUNKS * P
    slot = tile // (W // 8)
    run = number // 2 % CHUNKS * RUNS + gl.arange(0, RUNS, gl.SliceLayout(0, LAYOUT))[None, :]
    common = slot < SHARED
    if COMMON:
        at = (slot * (W // 128) + tile % (W // 8) // 16) * (D // 128) + run
        return gl.load(gl.where(second, common_up, common_gate) + at, common & (run < D // 128), other=0)
    else:
        there = (slot >= SHARED) & (slot < K + SHARED)
        expert = gl.load(ids + slot - SHARED, there, other=0)
        expert = gl.where((expert >= 0) & (expert < experts), expert, 0)
        at = (expert * (W // 128) + tile % (W // 8) // 16) * (D // 128) + run
        return gl.load(gl.where(second, up, gate) + at, there & (run < D // 128), other=0)


@gluon.jit
def _down_scales(
    tables, common_row, ids, experts, number, W: gl.constexpr, D: gl.constexpr, K: gl.constexpr, SHARED: gl.constexpr,
    P: gl.constexpr, RUNS: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Scales of the runs of this program's item `number` of the second product `[RUNS]`."""
    down, common_down = tables
    COMMON: gl.constexpr = (SHARED * W + RUNS * 128 - 1) // (RUNS * 128)
    ROUTED: gl.constexpr = (W + RUNS * 128 - 1) // (RUNS * 128)
    PER: gl.constexpr = COMMON + K * ROUTED
    block = gl.minimum((gl.program_id(0) + number // PER * P) // 8, D // 128 - 1)
    item = number % PER
    start, many = _part(item, W, 128, RUNS, SHARED)
    common = item < COMMON
    expert = gl.load(ids + (item - COMMON) // ROUTED, item >= COMMON, other=0)
    expert = gl.where((expert >= 0) & (expert < experts), expert, 0)
    at = gl.where(common, block * common_row, (expert * (D // 128) + block) * (W // 128)) + start
    table = gl.where(common, common_down, down)
    return gl.load(table + at + gl.minimum(gl.arange(0, RUNS, LAYOUT), many - 1))


@gluon.jit
def _lay_next(row, number, by, columns, steps, ready, taken, POWERS: gl.constexpr):
    """Lay a row down where number `number` belongs, once there is room."""
    BUFFERS: gl.constexpr = columns.shape[0]
    place = number % BUFFERS
    mbarrier.wait(taken.index(place), ((number // BUFFERS) & 1) ^ 1)
    if columns.dtype == gl.float8e4nv:
        by = power(by, POWERS)
    lay(row, columns.index(place), steps.index(place), by)
    fence_async_shared()
    mbarrier.arrive(ready.index(place))


@gluon.jit
def lay_all(
    words, start, ids, experts, columns, steps, ready, taken, up_table, up_ready, tables, common_row,
    W: gl.constexpr, D: gl.constexpr, K: gl.constexpr, SHARED: gl.constexpr, UPS: gl.constexpr,
    POWERS: gl.constexpr, COPIES: gl.constexpr, PART: gl.constexpr, P: gl.constexpr, LAYERS: gl.constexpr,
):  # fmt: skip
    """LAYERS warps: the scales of the routed experts' first product, then inner as columns, item after item, as soon
    as its words are there and a place is free."""
    CODES: gl.constexpr = columns.dtype == gl.float8e4nv
    RUN: gl.constexpr = columns.shape[2]
    RUNS: gl.constexpr = columns.shape[1] // (2 if CODES else 1)
    DEPTH: gl.constexpr = RUNS * RUN
    PER: gl.constexpr = (SHARED * W + DEPTH - 1) // DEPTH + K * ((W + DEPTH - 1) // DEPTH)
    FLAT: gl.constexpr = gl.BlockedLayout([1, 4], [128 // RUN, RUN // 4], [LAYERS, 1], [1, 0])
    LINE: gl.constexpr = gl.SliceLayout(1, FLAT)
    p = gl.program_id(0)
    gate_scale, up_scale, down_scale, common_gate_scale, common_up_scale, common_down_scale = tables
    downs = down_scale, common_down_scale
    tags, begun = start
    tl.extra.cuda.gdc_wait()
    if CODES and PART != 2:
        SPREAD: gl.constexpr = gl.BlockedLayout([1, 1], [32 // RUNS, RUNS], [LAYERS, 1], [1, 0])
        by = up_scales(
            (gate_scale, up_scale, common_gate_scale, common_up_scale), ids, experts, W, D, K, SHARED, UPS, P, RUNS,
            (D + DEPTH - 1) // DEPTH, False, SPREAD,
        )  # fmt: skip
        up_table.store(power(by, POWERS))
        mbarrier.arrive(up_ready)
    if PART != 1:
        words += p % COPIES * ((K + SHARED) * W)
        items = (D // 16 - p + P - 1) // P * PER
        mbarrier.wait(begun, 0)
        tag = gl.max(tags.load(gl.BlockedLayout([1], [32], [LAYERS], [0])), 0)
        # Words are looked up two items ahead.
        one = _words(words, _place(0, W, K, SHARED, RUNS, RUN, FLAT))
        two = _words(words, _place(1 % PER, W, K, SHARED, RUNS, RUN, FLAT))
        one_by = 1.0
        two_by = 1.0
        if CODES:
            one_by = _down_scales(downs, common_row, ids, experts, 0, W, D, K, SHARED, P, RUNS, LINE)
            two_by = _down_scales(downs, common_row, ids, experts, 1 % PER, W, D, K, SHARED, P, RUNS, LINE)
        # By turns into two sets of registers: copying one into the other would wait for it. If the last item has no
        # other beside it, one more is laid for nobody.
        for pair in range((items + 1) // 2):
            number = 2 * pair
            row = _settled(one, _place(number % PER, W, K, SHARED, RUNS, RUN, FLAT), words, tag)
            _lay_next(row, number, one_by, columns, steps, ready, taken, POWERS)
            # Words are asked for behind the fence: it waits for whatever was asked for before.
            one = _words(words, _place((number + 2) % PER, W, K, SHARED, RUNS, RUN, FLAT))
            if CODES:
                one_by = _down_scales(
                    downs, common_row, ids, experts, number + 2, W, D, K, SHARED, P, RUNS, LINE
                )
            number += 1
            row = _settled(two, _place(number % PER, W, K, SHARED, RUNS, RUN, FLAT), words, tag)
            _lay_next(row, number, two_by, columns, steps, ready, taken, POWERS)
            two = _words(words, _place((number + 2) % PER, W, K, SHARED, RUNS, RUN, FLAT))
            if CODES:
                two_by = _down_scales(
                    downs, common_row, ids, experts, number + 2, W, D, K, SHARED, P, RUNS, LINE
                )
