"""The kernel of `single_ring`."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from rorqual.kernels.gluon_rings import (
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
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
def _power(by, POWERS: gl.constexpr):
    """Scales as fp32; bytes of float8_e8m0fnu are exponents."""
    if POWERS:
        bits = gl.where(by == 0, 0x00400000, by.to(gl.int32) << 23)
        return gl.where(by == 255, float("nan"), bits.to(gl.float32, bitcast=True))
    else:
        return by.to(gl.float32)


@gluon.jit
def _fetch(
    item, descriptors, room, ids, experts,
    W: gl.constexpr, D: gl.constexpr, K: gl.constexpr, SHARED: gl.constexpr, STAGES: gl.constexpr,
    HELD: gl.constexpr, PART: gl.constexpr, P: gl.constexpr, WHICH: gl.constexpr,
):  # fmt: skip
    """Ask for this program's item number `item` if it is of shared experts (WHICH 0), of routed ones (1), or always."""
    gate, up, down, common_gate, common_up, common_down = descriptors
    boxes, full = room
    RUNS: gl.constexpr = gate.block_type.shape[1]
    DEPTH: gl.constexpr = RUNS * gate.block_type.shape[2]
    BYTES: gl.constexpr = 2 * gate.block_type.nbytes
    UP_CHUNKS: gl.constexpr = (D + DEPTH - 1) // DEPTH
    COMMON: gl.constexpr = (SHARED * W + DEPTH - 1) // DEPTH
    ROUTED: gl.constexpr = (W + DEPTH - 1) // DEPTH
    p = gl.program_id(0)
    stage = item % STAGES
    bar = full.index(stage)
    first = boxes.index(2 * stage)
    second = boxes.index(2 * stage + 1)
    ups = ((K + SHARED) * (W // 8) - p + P - 1) // P * UP_CHUNKS
    if PART == 2:
        ups = 0
    if item < ups:
        tile = p + item // UP_CHUNKS * P
        run = item % UP_CHUNKS * RUNS
        slot = tile // (W // 8)
        row = tile % (W // 8) * 8
        if slot < SHARED:
            if WHICH != 1:
                mbarrier.expect(bar, BYTES)
                tma.async_copy_global_to_shared(common_gate, [slot * W + row, run, 0], bar, first)
                tma.async_copy_global_to_shared(common_up, [slot * W + row, run, 0], bar, second)
        elif WHICH != 0:
            expert = gl.load(ids + slot - SHARED)
            expert = gl.where((expert >= 0) & (expert < experts), expert, 0)
            mbarrier.expect(bar, BYTES)
            tma.async_copy_global_to_shared(gate, [expert * W + row, run, 0], bar, first)
            tma.async_copy_global_to_shared(up, [expert * W + row, run, 0], bar, second)
    elif PART != 1:
        item -= ups - HELD
        row = (p + item // (COMMON + K * ROUTED) * P) * 16
        item = item % (COMMON + K * ROUTED)
        if row < D:
            if item < COMMON:
                if WHICH != 1:
                    mbarrier.expect(bar, BYTES)
                    run = item * RUNS
                    tma.async_copy_global_to_shared(common_down, [row, run, 0], bar, first)
                    tma.async_copy_global_to_shared(common_down, [row + 8, run, 0], bar, second)
            elif WHICH != 0:
                item -= COMMON
                expert = gl.load(ids + item // ROUTED)
                expert = gl.where((expert >= 0) & (expert < experts), expert, 0)
                row += expert * D
                run = item % ROUTED * RUNS
                mbarrier.expect(bar, BYTES)
                tma.async_copy_global_to_shared(down, [row, run, 0], bar, first)
                tma.async_copy_global_to_shared(down, [row + 8, run, 0], bar, second)


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
def _lay(row, columns, steps, by):
    """Lay a row `[RUNS, RUN]` down as columns `[RUNS, RUN]`; for codes as two digits of each run's own step,
    `[2 RUNS, RUN]`, and the columns' steps `[2 RUNS]` times `by` `[RUNS]`."""
    kind: gl.constexpr = columns.dtype
    RUNS: gl.constexpr = row.shape[0]
    if kind == gl.float8e4nv:
        # A power of two, so that the largest number lies between 128 and 256.
        power = gl.maximum(gl.max(gl.abs(row), 1).to(gl.int32, bitcast=True) >> 23, 16)
        row = row * ((261 - power) << 23).to(gl.float32, bitcast=True)[:, None]
        # The first digit has the four upper bits of bf16's eight, the second one the lower ones: both exact, except
        # below 2^-6, where E4M3 has multiples of 2^-9 only. (Read back from its code, ptxas 12.8 takes half of the first
        # digits from a register that was never written.)
        upper = (row.to(gl.int32, bitcast=True) & -1048576).to(gl.float32, bitcast=True)
        digit = gl.where(gl.abs(row) < 0.015625, (row + 24576.0) - 24576.0, upper)
        digits = gl.join(digit.to(kind), ((row - digit) * 16.0).to(kind))
        columns.store(digits.permute([2, 0, 1]).reshape([2 * RUNS, row.shape[1]]))
        step = ((power - 7) << 23).to(gl.float32, bitcast=True) * by
        steps.store(gl.join(step, step * 0.0625).permute([1, 0]).reshape([2 * RUNS]))
    else:
        columns.store(row.to(kind))


@gluon.jit
def _met(product, RUNS: gl.constexpr):
    """Of the products of 8 * RUNS runs with all columns `[8 RUNS, N]` those of a run with its own: `[8, RUNS]`."""
    LAYOUT: gl.constexpr = product.type.layout
    m = gl.arange(0, 8 * RUNS, gl.SliceLayout(1, LAYOUT)) % RUNS
    n = gl.arange(0, product.shape[1], gl.SliceLayout(0, LAYOUT))
    return gl.sum(gl.where(m[:, None] == (n % RUNS)[None, :], product, 0.0), 1).reshape([8, RUNS])


@gluon.jit
def _up_scales(
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
    block = (gl.program_id(0) + number // PER * P) // 8
    item = number % PER
    start, many = _part(item, W, 128, RUNS, SHARED)
    common = item < COMMON
    expert = gl.load(ids + (item - COMMON) // ROUTED, item >= COMMON, other=0)
    expert = gl.where((expert >= 0) & (expert < experts), expert, 0)
    at = gl.where(common, block * common_row, (expert * (D // 128) + block) * (W // 128)) + start
    table = gl.where(common, common_down, down)
    return gl.load(table + at + gl.minimum(gl.arange(0, RUNS, LAYOUT), many - 1))


@gluon.jit
def _bring(
    descriptors, room, ids, experts,
    W: gl.constexpr, D: gl.constexpr, K: gl.constexpr, SHARED: gl.constexpr, STAGES: gl.constexpr,
    HELD: gl.constexpr, PART: gl.constexpr, P: gl.constexpr,
):  # fmt: skip
    """The fetching warp: items into the ring, each as soon as its place is free."""
    RUNS: gl.constexpr = descriptors[0].block_type.shape[1]
    DEPTH: gl.constexpr = RUNS * descriptors[0].block_type.shape[2]
    UP_CHUNKS: gl.constexpr = (D + DEPTH - 1) // DEPTH
    PER: gl.constexpr = (SHARED * W + DEPTH - 1) // DEPTH + K * ((W + DEPTH - 1) // DEPTH)
    boxes, full, free = room
    p = gl.program_id(0)
    items = 0
    if PART != 2:
        items += ((K + SHARED) * (W // 8) - p + P - 1) // P * UP_CHUNKS
    if PART != 1:
        items += gl.maximum((D // 16 - p + P - 1) // P * PER - HELD, 0)
    tl.extra.cuda.gdc_wait()
    for item in range(gl.minimum(STAGES, items)):
        _fetch(item, descriptors, (boxes, full), ids, experts, W, D, K, SHARED, STAGES, HELD, PART, P, 1)
    for item in range(STAGES, items):
        mbarrier.wait(free.index(item % STAGES), ((item // STAGES) & 1) ^ 1)
        _fetch(item, descriptors, (boxes, full), ids, experts, W, D, K, SHARED, STAGES, HELD, PART, P, 2)


@gluon.jit
def _lay_all(
    words, start, ids, experts, columns, steps, ready, taken, up_table, up_ready, tables, common_row,
    W: gl.constexpr, D: gl.constexpr, K: gl.constexpr, SHARED: gl.constexpr, UPS: gl.constexpr,
    POWERS: gl.constexpr, COPIES: gl.constexpr, PART: gl.constexpr, P: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """WARPS warps: the scales of the routed experts' first product, then inner as columns, item after item, as soon
    as its words are there and a place is free."""
    CODES: gl.constexpr = columns.dtype == gl.float8e4nv
    BUFFERS: gl.constexpr = columns.shape[0]
    RUN: gl.constexpr = columns.shape[2]
    RUNS: gl.constexpr = columns.shape[1] // (2 if CODES else 1)
    DEPTH: gl.constexpr = RUNS * RUN
    PER: gl.constexpr = (SHARED * W + DEPTH - 1) // DEPTH + K * ((W + DEPTH - 1) // DEPTH)
    FLAT: gl.constexpr = gl.BlockedLayout([1, 4], [128 // RUN, RUN // 4], [WARPS, 1], [1, 0])
    LINE: gl.constexpr = gl.SliceLayout(1, FLAT)
    p = gl.program_id(0)
    gate_scale, up_scale, down_scale, common_gate_scale, common_up_scale, common_down_scale = tables
    downs = down_scale, common_down_scale
    tags, begun = start
    tl.extra.cuda.gdc_wait()
    if CODES and PART != 2:
        SPREAD: gl.constexpr = gl.BlockedLayout([1, 1], [32 // RUNS, RUNS], [WARPS, 1], [1, 0])
        by = _up_scales(
            (gate_scale, up_scale, common_gate_scale, common_up_scale), ids, experts, W, D, K, SHARED, UPS, P, RUNS,
            (D + DEPTH - 1) // DEPTH, False, SPREAD,
        )  # fmt: skip
        up_table.store(_power(by, POWERS))
        mbarrier.arrive(up_ready)
    if PART != 1:
        words += p % COPIES * ((K + SHARED) * W)
        items = (D // 16 - p + P - 1) // P * PER
        mbarrier.wait(begun, 0)
        tag = gl.max(tags.load(gl.BlockedLayout([1], [32], [WARPS], [0])), 0)
        # Words are looked up two items ahead.
        one = _words(words, _place(0, W, K, SHARED, RUNS, RUN, FLAT))
        two = _words(words, _place(1 % PER, W, K, SHARED, RUNS, RUN, FLAT))
        one_by = 1.0
        two_by = 1.0
        if CODES:
            one_by = _down_scales(downs, common_row, ids, experts, 0, W, D, K, SHARED, P, RUNS, LINE)
            two_by = _down_scales(downs, common_row, ids, experts, 1 % PER, W, D, K, SHARED, P, RUNS, LINE)
        for number in range(items):
            place = number % BUFFERS
            row = _settled(one, _place(number % PER, W, K, SHARED, RUNS, RUN, FLAT), words, tag)
            factor = _power(one_by, POWERS) if CODES else 1.0
            mbarrier.wait(taken.index(place), ((number // BUFFERS) & 1) ^ 1)
            _lay(row, columns.index(place), steps.index(place), factor)
            fence_async_shared()
            mbarrier.arrive(ready.index(place))
            # Words are asked for behind the fence: it waits for whatever was asked for before.
            after = gl.minimum(number + 2, items - 1)
            one = two
            two = _words(words, _place(after % PER, W, K, SHARED, RUNS, RUN, FLAT))
            if CODES:
                one_by = two_by
                two_by = _down_scales(downs, common_row, ids, experts, after, W, D, K, SHARED, P, RUNS, LINE)


@gluon.jit
def _begin(x, epochs, x_columns, x_steps, start, real, D: gl.constexpr, PART: gl.constexpr):
    """Once the kernels in front have ended (if this is `real`): x as columns, and the number of this launch."""
    tags, begun = start
    CHUNKS: gl.constexpr = x_columns.shape[0]
    CODES: gl.constexpr = x_columns.dtype == gl.float8e4nv
    RUN: gl.constexpr = x_columns.shape[2]
    RUNS: gl.constexpr = x_columns.shape[1] // (2 if CODES else 1)
    FLAT: gl.constexpr = gl.BlockedLayout([1, 4], [128 // RUN, RUN // 4], [8, 1], [1, 0])
    if real:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    # Past the multiprocessor's own cache, where the trial would leave old numbers.
    mark = gl.load(epochs, cache_modifier=".cg")
    if PART != 2:
        for chunk in gl.static_range(CHUNKS):
            run = chunk * RUNS + gl.arange(0, RUNS, gl.SliceLayout(1, FLAT))
            lane = gl.arange(0, RUN, gl.SliceLayout(0, FLAT))
            # Runs beyond the row are its last one again, for the box has zeros there. (Zeros here too: four codes
            # known to be equal make ptxas 12.8 pack two of them with a register that was never written.)
            run = gl.minimum(run, D // RUN - 1)
            row = gl.load(x + run[:, None] * RUN + lane[None, :], cache_modifier=".cg")
            _lay(row.to(gl.float32), x_columns.index(chunk), x_steps.index(chunk), 1.0)
        fence_async_shared()
    tag = mark & 0xFFFF
    tags.store(gl.full([1], 0, gl.int32, gl.BlockedLayout([1], [32], [8], [0])) + tag)
    gl.thread_barrier()
    mbarrier.arrive(begun, pred=real)
    return tag


@gluon.jit
def _multiply(
    runs, full, free, x_columns, x_steps, columns, steps, ready, taken, common_by, up_by, up_ready,
    x, ids, weights, residual, y, words, epochs, start, limit, experts,
    W: gl.constexpr, D: gl.constexpr, K: gl.constexpr, SHARED: gl.constexpr, STAGES: gl.constexpr,
    HELD: gl.constexpr, LIMIT: gl.constexpr, COPIES: gl.constexpr, RESIDUAL: gl.constexpr, PART: gl.constexpr,
    P: gl.constexpr, WARM: gl.constexpr,
):  # fmt: skip
    """Eight warps: both products."""
    CODES: gl.constexpr = runs.dtype == gl.float8e4nv
    RUNS: gl.constexpr = runs.shape[1] // 8
    DEPTH: gl.constexpr = RUNS * runs.shape[2]
    UP_CHUNKS: gl.constexpr = (D + DEPTH - 1) // DEPTH
    COMMON: gl.constexpr = (SHARED * W + DEPTH - 1) // DEPTH
    PER: gl.constexpr = COMMON + K * ((W + DEPTH - 1) // DEPTH)
    BUFFERS: gl.constexpr = columns.shape[0]
    N: gl.constexpr = columns.shape[1]
    # A warp has 16 rows of a product: the runs of one row of a box.
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, N, 32 if CODES else 16])
    p = gl.program_id(0)
    none = gl.zeros([8 * RUNS, N], gl.float32, MMA)
    zero = gl.sum(_met(none, RUNS), 1)
    EIGHT: gl.constexpr = zero.type.layout
    ACROSS: gl.constexpr = gl.SliceLayout(0, EIGHT.parent)
    count = 0
    if PART != 2:
        tag = 0
        tiles = ((K + SHARED) * (W // 8) - p + P - 1) // P
        # The first turn is a trial, before the kernels in front have ended: of what it does nothing is kept but the
        # instructions and constants in the multiprocessor's caches.
        for i in range(-WARM, tiles):
            real = i >= 0
            if i <= 0:
                tag = _begin(x, epochs, x_columns, x_steps, start, real, D, PART)
            tile = p + gl.maximum(i, 0) * P
            slot = tile // (W // 8)
            k = slot - SHARED
            expert = gl.load(ids + k, (slot >= SHARED) & real, other=0)
            weight = gl.load(weights + k, (slot >= SHARED) & real, other=1.0).to(gl.float32)
            gates = zero
            ups = zero
            if CODES:
                mbarrier.wait(up_ready, 0, pred=(slot >= SHARED) & real)
            for chunk in gl.static_range(UP_CHUNKS):
                number = gl.maximum(i, 0) * UP_CHUNKS + chunk
                stage = number % STAGES
                mbarrier.wait(full.index(stage), (number // STAGES) & 1, pred=real)
                right = x_columns.index(chunk).permute((1, 0))
                one = warpgroup_mma(runs.index(2 * stage), right, none, use_acc=False, is_async=True)
                two = warpgroup_mma(runs.index(2 * stage + 1), right, none, use_acc=False, is_async=True)
                one, two = warpgroup_mma_wait(0, deps=[one, two])
                mbarrier.arrive(free.index(stage), pred=real)
                if CODES:
                    step = x_steps.index(chunk).load(gl.SliceLayout(0, MMA))[None, :]
                    one *= step
                    two *= step
                one = _met(one, RUNS)
                two = _met(two, RUNS)
                if CODES:
                    if slot < SHARED:
                        one *= common_by.index(2 * number).load(ACROSS)[None, :]
                        two *= common_by.index(2 * number + 1).load(ACROSS)[None, :]
                    else:
                        one *= up_by.index(2 * number).load(ACROSS)[None, :]
                        two *= up_by.index(2 * number + 1).load(ACROSS)[None, :]
                gates += gl.sum(one, 1)
                ups += gl.sum(two, 1)
            if LIMIT:
                gates = gl.minimum(gates, limit)
                ups = gl.minimum(gl.maximum(ups, -limit), limit)
            inner = gates / (1.0 + gl.exp(-gates)) * ups * weight
            inner = gl.where((slot < SHARED) | ((expert >= 0) & (expert < experts)), inner, 0.0)
            bits = inner.to(gl.bfloat16).to(gl.int16, bitcast=True).to(gl.int32) << 16
            line = gl.where(slot < SHARED, K + slot, k)
            channel = tile % (W // 8) * 8 + gl.arange(0, 8, EIGHT)
            copy = gl.arange(0, RUNS, ACROSS)
            to = words + (line * W + channel)[:, None] + copy[None, :] * ((K + SHARED) * W)
            word, to = gl.broadcast((bits | tag)[:, None], to)
            gl.store(to, word, (copy < COPIES)[None, :] & real)
        count = tiles * UP_CHUNKS
    else:
        _begin(x, epochs, x_columns, x_steps, start, True, D, PART)
    if PART != 1:
        kind: gl.constexpr = y.dtype.element_ty
        number = 0
        for c in range((D // 16 - p + P - 1) // P):
            channel = (p + c * P) * 16 + gl.arange(0, 8, EIGHT)
            if RESIDUAL:
                over = gl.load(residual + channel)
                under = gl.load(residual + channel + 8)
            # Sums stay products of all runs with all columns until the end: what does not count is 15 in 16 of them,
            # but telling it apart takes longer than adding. (Beyond a row, boxes are zeros.)
            upper = none
            lower = none
            for item in range(PER):
                stage = count % STAGES
                phase = (count // STAGES) & 1
                if item < HELD:
                    stage = STAGES + item
                    phase = 0
                place = number % BUFFERS
                mbarrier.wait(ready.index(place), (number // BUFFERS) & 1)
                mbarrier.wait(full.index(stage), phase)
                right = columns.index(place).permute((1, 0))
                if CODES:
                    one = warpgroup_mma(runs.index(2 * stage), right, none, use_acc=False, is_async=True)
                    two = warpgroup_mma(runs.index(2 * stage + 1), right, none, use_acc=False, is_async=True)
                    one, two = warpgroup_mma_wait(0, deps=[one, two])
                    # (Asked for before the wait, ptxas 12.8 ends by SIGSEGV at some shapes.)
                    step = steps.index(place).load(gl.SliceLayout(0, MMA))[None, :]
                else:
                    upper = warpgroup_mma(runs.index(2 * stage), right, upper, is_async=True)
                    lower = warpgroup_mma(runs.index(2 * stage + 1), right, lower, is_async=True)
                    upper, lower = warpgroup_mma_wait(0, deps=[upper, lower])
                mbarrier.arrive(taken.index(place))
                if item >= HELD:
                    mbarrier.arrive(free.index(stage))
                    count += 1
                if CODES:
                    upper += one * step
                    lower += two * step
                number += 1
            total = gl.sum(_met(upper, RUNS), 1)
            other = gl.sum(_met(lower, RUNS), 1)
            if RESIDUAL:
                total = total.to(kind).to(gl.float32) + over.to(gl.float32)
                other = other.to(kind).to(gl.float32) + under.to(gl.float32)
            gl.store(y + channel, total.to(kind))
            gl.store(y + channel + 8, other.to(kind))
        # This program has seen words of all the others, so all of them have read the number.
        gl.thread_barrier()
        if (p == 0) & (PART == 0):
            gl.store(epochs, gl.load(epochs) + 1)


@gluon.jit
def ring_kernel(
    gate, up, down, common_gate, common_up, common_down, x, ids, weights,
    gate_scale, up_scale, down_scale, common_gate_scale, common_up_scale, common_down_scale, common_s_row,
    residual, y, words, epochs, limit, experts,
    W: gl.constexpr, D: gl.constexpr, K: gl.constexpr, SHARED: gl.constexpr, STAGES: gl.constexpr,
    HELD: gl.constexpr, BUFFERS: gl.constexpr, UPS: gl.constexpr, COMMON_UPS: gl.constexpr, POWERS: gl.constexpr,
    LIMIT: gl.constexpr, COPIES: gl.constexpr, RESIDUAL: gl.constexpr, PART: gl.constexpr, P: gl.constexpr, WARM: gl.constexpr,
    WARPS: gl.constexpr, LAYING: gl.constexpr, FETCHING: gl.constexpr,
):  # fmt: skip
    """y `[D]` = the sum over experts of weight * down (swiglu(gate x, up x)), and the residual. Eight warps multiply,
    four lay inner down as columns, one fetches.

    HELD: how many of the second product's first items have a place of their own, outside the ring, and are asked
    for ahead. UPS: items of a program in the first product, at most, up to a power of two; COMMON_UPS: those of the
    shared experts. PART: both products (0), the first (1) or the second (2) alone. LAYING, FETCHING: registers.
    """
    CODES: gl.constexpr = gate.dtype == gl.float8e4nv
    RUNS: gl.constexpr = gate.block_type.shape[1]
    RUN: gl.constexpr = gate.block_type.shape[2]
    UP_CHUNKS: gl.constexpr = (D + RUNS * RUN - 1) // (RUNS * RUN)
    N: gl.constexpr = 2 * RUNS if CODES else RUNS
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    TABLE: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    LINES: gl.constexpr = gl.NVMMASharedLayout(128, gate.dtype.primitive_bitwidth, rank=2)
    BARS: gl.constexpr = mbarrier.MBarrierLayout()
    p = gl.program_id(0)
    boxes = gl.allocate_shared_memory(gate.dtype, [2 * STAGES + 2 * HELD, 8, RUNS, RUN], gate.layout)
    runs = boxes._reinterpret(gate.dtype, [2 * STAGES + 2 * HELD, 8 * RUNS, RUN], LINES)
    x_columns = gl.allocate_shared_memory(gate.dtype, [UP_CHUNKS, N, RUN], LINES)
    columns = gl.allocate_shared_memory(gate.dtype, [BUFFERS, N, RUN], LINES)
    x_steps = gl.allocate_shared_memory(gl.float32, [UP_CHUNKS, N], PLAIN)
    steps = gl.allocate_shared_memory(gl.float32, [BUFFERS, N], PLAIN)
    common_table = gl.allocate_shared_memory(gl.float32, [2 * COMMON_UPS, RUNS], TABLE)
    up_table = gl.allocate_shared_memory(gl.float32, [2 * UPS, RUNS], TABLE)
    common_by = common_table._reinterpret(gl.float32, [2 * COMMON_UPS, RUNS], PLAIN)
    up_by = up_table._reinterpret(gl.float32, [2 * UPS, RUNS], PLAIN)
    full = gl.allocate_shared_memory(gl.int64, [STAGES + HELD, 1], BARS)
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARS)
    ready = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], BARS)
    taken = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], BARS)
    up_ready = gl.allocate_shared_memory(gl.int64, [1], BARS)
    begun = gl.allocate_shared_memory(gl.int64, [1], BARS)
    tags = gl.allocate_shared_memory(gl.int32, [1], PLAIN)
    for i in gl.static_range(STAGES + HELD):
        mbarrier.init(full.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(free.index(i), count=1)
    for i in gl.static_range(BUFFERS):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(taken.index(i), count=1)
    mbarrier.init(up_ready, count=1)
    mbarrier.init(begun, count=1)
    descriptors = gate, up, down, common_gate, common_up, common_down
    for item in range(STAGES):
        _fetch(item, descriptors, (boxes, full), ids, experts, W, D, K, SHARED, STAGES, HELD, PART, P, 0)
    if PART != 1:
        for i in gl.static_range(HELD):
            if p * 16 < D:
                bar = full.index(STAGES + i)
                mbarrier.expect(bar, 2 * gate.block_type.nbytes)
                for half in gl.static_range(2):
                    box = boxes.index(2 * (STAGES + i) + half)
                    tma.async_copy_global_to_shared(common_down, [p * 16 + 8 * half, i * RUNS, 0], bar, box)
    tables = gate_scale, up_scale, down_scale, common_gate_scale, common_up_scale, common_down_scale
    if CODES and PART != 2 and SHARED > 0:
        SPREAD: gl.constexpr = gl.BlockedLayout([1, 1], [32 // RUNS, RUNS], [8, 1], [1, 0])
        by = _up_scales(
            (gate_scale, up_scale, common_gate_scale, common_up_scale), ids, experts, W, D, K, SHARED, COMMON_UPS, P,
            RUNS, UP_CHUNKS, True, SPREAD,
        )  # fmt: skip
        common_table.store(_power(by, POWERS))
    gl.warp_specialize(
        [
            (
                _multiply,
                (
                    runs, full, free, x_columns, x_steps, columns, steps, ready, taken, common_by, up_by, up_ready,
                    x, ids, weights, residual, y, words, epochs, (tags, begun), limit, experts,
                    W, D, K, SHARED, STAGES, HELD, LIMIT, COPIES, RESIDUAL, PART, P, WARM,
                ),
            ),
            (
                _lay_all,
                (
                    words, (tags, begun), ids, experts, columns, steps, ready, taken, up_table, up_ready, tables, common_s_row,
                    W, D, K, SHARED, UPS, POWERS, COPIES, PART, P, WARPS,
                ),
            ),
            (
                _bring,
                (descriptors, (boxes, full, free), ids, experts, W, D, K, SHARED, STAGES, HELD, PART, P),
            ),
        ],
        [WARPS, 1],
        [LAYING, FETCHING],
    )  # fmt: skip
