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
@p trap;
ld.relaxed.gpu.global.v4.b32 {$0, $1, $2, $3}, [at];
bra AGAIN;
READY:
}
""")
"""Four words as read before, read again until all are of this launch; each thread for itself. What has not come after
seconds never will: an error then is better than a GPU that hangs."""
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
    HELD: gl.constexpr, PART: gl.constexpr, WHICH: gl.constexpr,
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
    P = gl.num_programs(0)
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
def _words(
    words, item, W: gl.constexpr, K: gl.constexpr, SHARED: gl.constexpr, RUNS: gl.constexpr, RUN: gl.constexpr,
    LAYOUT: gl.constexpr,
):  # fmt: skip
    """Where an item of the second product finds its part of inner `[RUNS, RUN]`, and what lies there now. Runs beyond
    the row are its last one again: what the box has there is zeros."""
    COMMON: gl.constexpr = (SHARED * W + RUNS * RUN - 1) // (RUNS * RUN)
    ROUTED: gl.constexpr = (W + RUNS * RUN - 1) // (RUNS * RUN)
    begin = gl.where(item < COMMON, K * W, (item - COMMON) // ROUTED * W)
    start, many = _part(item, W, RUN, RUNS, SHARED)
    run = gl.arange(0, RUNS, gl.SliceLayout(1, LAYOUT))[:, None]
    lane = gl.arange(0, RUN, gl.SliceLayout(0, LAYOUT))[None, :]
    at = 4 * (begin + (start + gl.minimum(run, many - 1)) * RUN + lane)
    found = gl.inline_asm_elementwise(
        PEEK, PEEK_OPERANDS, [at, words.to(gl.int64)], gl.int32, is_pure=False, pack=4
    )
    return found, at


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
        # The first digit by arithmetic: read back from its code, ptxas 12.8 takes half of them from a register that
        # was never written. Four bits, or multiples of 2^-9 where E4M3 has no more.
        bits = row.to(gl.int32, bitcast=True)
        whole = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -1048576).to(gl.float32, bitcast=True)
        digit = gl.where(gl.abs(row) < 0.015625, (row + 24576.0) - 24576.0, whole)
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
    RUNS: gl.constexpr, CHUNKS: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Scales of the runs of this program's items of the first product, gate's and up's in turn `[2 UPS, RUNS]`."""
    gate, up, common_gate, common_up = tables
    number = gl.arange(0, 2 * UPS, gl.SliceLayout(1, LAYOUT))[:, None]
    second = number % 2 == 1
    tile = gl.program_id(0) + number // 2 // CHUNKS * gl.num_programs(0)
    slot = tile // (W // 8)
    run = number // 2 % CHUNKS * RUNS + gl.arange(0, RUNS, gl.SliceLayout(0, LAYOUT))[None, :]
    there = (slot < K + SHARED) & (run < D // 128)
    common = slot < SHARED
    expert = gl.load(ids + slot - SHARED, (slot < K + SHARED) & (slot >= SHARED), other=0)
    expert = gl.where((expert >= 0) & (expert < experts), expert, 0)
    at = (gl.where(common, slot, expert) * (W // 128) + tile % (W // 8) // 16) * (D // 128) + run
    table = gl.where(common, gl.where(second, common_up, common_gate), gl.where(second, up, gate))
    return gl.load(table + at, there, other=0)


@gluon.jit
def _down_scales(
    down, common_down, common_row, ids, experts, W: gl.constexpr, D: gl.constexpr, K: gl.constexpr,
    SHARED: gl.constexpr, DOWNS: gl.constexpr, RUNS: gl.constexpr, COMMON: gl.constexpr, ROUTED: gl.constexpr,
    LAYOUT: gl.constexpr,
):  # fmt: skip
    """Scales of the runs of this program's items of the second product `[DOWNS, RUNS]`."""
    PER: gl.constexpr = COMMON + K * ROUTED
    number = gl.arange(0, DOWNS, gl.SliceLayout(1, LAYOUT))[:, None]
    block = (gl.program_id(0) + number // PER * gl.num_programs(0)) // 8
    item = number % PER
    common = item < COMMON
    k = (item - COMMON) // ROUTED
    start = gl.where(common, item, (item - COMMON) % ROUTED) * RUNS
    run = start + gl.arange(0, RUNS, gl.SliceLayout(0, LAYOUT))[None, :]
    there = (block < D // 128) & (run < gl.where(common, SHARED * W // 128, W // 128))
    expert = gl.load(ids + k, (block < D // 128) & (item >= COMMON), other=0)
    expert = gl.where((expert >= 0) & (expert < experts), expert, 0)
    at = gl.where(common, block * common_row, (expert * (D // 128) + block) * (W // 128)) + run
    return gl.load(gl.where(common, common_down, down) + at, there, other=0)


@gluon.jit
def ring_kernel(
    gate, up, down, common_gate, common_up, common_down, x, ids, weights,
    gate_scale, up_scale, down_scale, common_gate_scale, common_up_scale, common_down_scale, common_s_row,
    residual, y, words, epochs, limit, experts,
    W: gl.constexpr, D: gl.constexpr, K: gl.constexpr, SHARED: gl.constexpr, STAGES: gl.constexpr,
    HELD: gl.constexpr, UPS: gl.constexpr, DOWNS: gl.constexpr, POWERS: gl.constexpr, LIMIT: gl.constexpr,
    COPIES: gl.constexpr, RESIDUAL: gl.constexpr, PART: gl.constexpr,
):  # fmt: skip
    """y `[D]` = the sum over experts of weight * down (swiglu(gate x, up x)), and the residual; by 8 warps.

    HELD: how many of the second product's first items have a place of their own, outside the ring, and are asked
    for ahead. UPS and DOWNS: items of a program in both products, at most, up to a power of two. PART: both
    products (0), the first (1) or the second (2) alone.
    """
    CODES: gl.constexpr = gate.dtype == gl.float8e4nv
    RUNS: gl.constexpr = gate.block_type.shape[1]
    RUN: gl.constexpr = gate.block_type.shape[2]
    DEPTH: gl.constexpr = RUNS * RUN
    UP_CHUNKS: gl.constexpr = (D + DEPTH - 1) // DEPTH
    COMMON: gl.constexpr = (SHARED * W + DEPTH - 1) // DEPTH
    ROUTED: gl.constexpr = (W + DEPTH - 1) // DEPTH
    PER: gl.constexpr = COMMON + K * ROUTED
    N: gl.constexpr = 2 * RUNS if CODES else RUNS
    # A warp has 16 rows of a product: the runs of one row of a box.
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, N, 32 if CODES else 16])
    FLAT: gl.constexpr = gl.BlockedLayout([1, 4], [128 // RUN, RUN // 4], [8, 1], [1, 0])
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    LINES: gl.constexpr = gl.NVMMASharedLayout(128, gate.dtype.primitive_bitwidth, rank=2)
    p = gl.program_id(0)
    P = gl.num_programs(0)
    boxes = gl.allocate_shared_memory(gate.dtype, [2 * STAGES + 2 * HELD, 8, RUNS, RUN], gate.layout)
    runs = boxes._reinterpret(gate.dtype, [2 * STAGES + 2 * HELD, 8 * RUNS, RUN], LINES)
    x_columns = gl.allocate_shared_memory(gate.dtype, [UP_CHUNKS, N, RUN], LINES)
    x_steps = gl.allocate_shared_memory(gl.float32, [UP_CHUNKS, N], PLAIN)
    columns = gl.allocate_shared_memory(gate.dtype, [2, N, RUN], LINES)
    steps = gl.allocate_shared_memory(gl.float32, [2, N], PLAIN)
    full = gl.allocate_shared_memory(gl.int64, [STAGES + HELD, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES + HELD):
        mbarrier.init(full.index(i), count=1)
    descriptors = gate, up, down, common_gate, common_up, common_down
    room = boxes, full
    for item in range(STAGES):
        _fetch(item, descriptors, room, ids, experts, W, D, K, SHARED, STAGES, HELD, PART, 0)
    if PART != 1:
        for i in gl.static_range(HELD):
            if p * 16 < D:
                bar = full.index(STAGES + i)
                mbarrier.expect(bar, 2 * gate.block_type.nbytes)
                for half in gl.static_range(2):
                    box = boxes.index(2 * (STAGES + i) + half)
                    tma.async_copy_global_to_shared(common_down, [p * 16 + 8 * half, i * RUNS, 0], bar, box)
    tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()
    for item in range(STAGES):
        _fetch(item, descriptors, room, ids, experts, W, D, K, SHARED, STAGES, HELD, PART, 1)
    tag = gl.load(epochs) & 0xFFFF
    if PART != 2:
        for chunk in gl.static_range(UP_CHUNKS):
            run = chunk * RUNS + gl.arange(0, RUNS, gl.SliceLayout(1, FLAT))
            lane = gl.arange(0, RUN, gl.SliceLayout(0, FLAT))
            # Runs beyond the row are its last one again, for the box has zeros there. (Zeros here too: four codes
            # known to be equal make ptxas 12.8 pack two of them with a register that was never written.)
            run = gl.minimum(run, D // RUN - 1)
            row = gl.load(x + run[:, None] * RUN + lane[None, :])
            _lay(row.to(gl.float32), x_columns.index(chunk), x_steps.index(chunk), 1.0)
    if CODES:
        TABLE: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
        SPREAD: gl.constexpr = gl.BlockedLayout([1, 1], [32 // RUNS, RUNS], [8, 1], [1, 0])
        if PART != 2:
            by = _up_scales(
                (gate_scale, up_scale, common_gate_scale, common_up_scale), ids, experts, W, D, K, SHARED, UPS, RUNS,
                UP_CHUNKS, SPREAD,
            )  # fmt: skip
            up_table = gl.allocate_shared_memory(gl.float32, [2 * UPS, RUNS], TABLE)
            up_table.store(_power(by, POWERS))
            up_by = up_table._reinterpret(gl.float32, [2 * UPS, RUNS], PLAIN)
        if PART != 1:
            by = _down_scales(
                down_scale, common_down_scale, common_s_row, ids, experts, W, D, K, SHARED, DOWNS, RUNS, COMMON,
                ROUTED, SPREAD,
            )  # fmt: skip
            down_table = gl.allocate_shared_memory(gl.float32, [DOWNS, RUNS], TABLE)
            down_table.store(_power(by, POWERS))
            down_by = down_table._reinterpret(gl.float32, [DOWNS, RUNS], PLAIN)
    fence_async_shared()
    gl.thread_barrier()
    none = gl.zeros([8 * RUNS, N], gl.float32, MMA)
    zero = gl.sum(_met(none, RUNS), 1)
    EIGHT: gl.constexpr = zero.type.layout
    ACROSS: gl.constexpr = gl.SliceLayout(0, EIGHT.parent)
    count = 0
    if PART != 2:
        tiles = ((K + SHARED) * (W // 8) - p + P - 1) // P
        for i in range(tiles):
            tile = p + i * P
            slot = tile // (W // 8)
            k = slot - SHARED
            expert = gl.load(ids + k, slot >= SHARED, other=0)
            weight = gl.load(weights + k, slot >= SHARED, other=1.0).to(gl.float32)
            gates = zero
            ups = zero
            for chunk in gl.static_range(UP_CHUNKS):
                stage = count % STAGES
                mbarrier.wait(full.index(stage), (count // STAGES) & 1)
                right = x_columns.index(chunk).permute((1, 0))
                one = warpgroup_mma(runs.index(2 * stage), right, none, use_acc=False, is_async=True)
                two = warpgroup_mma(runs.index(2 * stage + 1), right, none, use_acc=False, is_async=True)
                one, two = warpgroup_mma_wait(0, deps=[one, two])
                gl.thread_barrier()
                _fetch(
                    count + STAGES, descriptors, room, ids, experts, W, D, K, SHARED, STAGES, HELD, PART, 2
                )  # fmt: skip
                if CODES:
                    step = x_steps.index(chunk).load(gl.SliceLayout(0, MMA))[None, :]
                    one *= step
                    two *= step
                one = _met(one, RUNS)
                two = _met(two, RUNS)
                if CODES:
                    one *= up_by.index(2 * count).load(ACROSS)[None, :]
                    two *= up_by.index(2 * count + 1).load(ACROSS)[None, :]
                gates += gl.sum(one, 1)
                ups += gl.sum(two, 1)
                count += 1
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
            gl.store(to, word, (copy < COPIES)[None, :])
    if PART != 1:
        kind: gl.constexpr = y.dtype.element_ty
        words += p % COPIES * ((K + SHARED) * W)
        for c in range((D // 16 - p + P - 1) // P):
            # Sums stay products of all runs with all columns until the end: what does not count is 15 in 16 of them,
            # but telling it apart takes longer than adding. (Beyond a row, boxes are zeros.)
            upper = none
            lower = none
            # Words are looked up two items ahead, by turns into two sets of registers.
            found, at = _words(words, 0, W, K, SHARED, RUNS, RUN, FLAT)
            even, even_at = _words(words, gl.minimum(1, PER - 1), W, K, SHARED, RUNS, RUN, FLAT)
            odd, odd_at = _words(words, gl.minimum(2, PER - 1), W, K, SHARED, RUNS, RUN, FLAT)
            begun = _settled(found, at, words, tag)
            weighted = down_by.index(c * PER).load(gl.SliceLayout(1, FLAT)) if CODES else 1.0
            _lay(begun, columns.index(0), steps.index(0), weighted)
            fence_async_shared()
            gl.thread_barrier()
            for pair in range((PER + 1) // 2):
                for turn in gl.static_range(2):
                    item = 2 * pair + turn
                    if item < PER:
                        stage = count % STAGES
                        phase = (count // STAGES) & 1
                        if item < HELD:
                            stage = STAGES + item
                            phase = 0
                        mbarrier.wait(full.index(stage), phase)
                        right = columns.index(turn).permute((1, 0))
                        if CODES:
                            one = warpgroup_mma(
                                runs.index(2 * stage), right, none, use_acc=False, is_async=True
                            )
                            two = warpgroup_mma(
                                runs.index(2 * stage + 1), right, none, use_acc=False, is_async=True
                            )
                        else:
                            upper = warpgroup_mma(runs.index(2 * stage), right, upper, is_async=True)
                            lower = warpgroup_mma(runs.index(2 * stage + 1), right, lower, is_async=True)
                        after = gl.minimum(item + 3, PER - 1)
                        if CODES:
                            weighted = down_by.index(c * PER + gl.minimum(item + 1, PER - 1)).load(
                                gl.SliceLayout(1, FLAT)
                            )
                        else:
                            weighted = 1.0
                        if item + 1 < PER:  # the row of the next item
                            if turn == 0:
                                _lay(
                                    _settled(even, even_at, words, tag),
                                    columns.index(1),
                                    steps.index(1),
                                    weighted,
                                )
                                fence_async_shared()
                            else:
                                _lay(
                                    _settled(odd, odd_at, words, tag),
                                    columns.index(0),
                                    steps.index(0),
                                    weighted,
                                )
                                fence_async_shared()
                        if CODES:
                            one, two = warpgroup_mma_wait(0, deps=[one, two])
                            # (Asked for before the wait, ptxas 12.8 ends by SIGSEGV at some shapes.)
                            taken = steps.index(turn).load(gl.SliceLayout(0, MMA))[None, :]
                        else:
                            upper, lower = warpgroup_mma_wait(0, deps=[upper, lower])
                        gl.thread_barrier()
                        # Words are asked for behind the barrier: the fence waits for whatever was asked for before.
                        if turn == 0:
                            even, even_at = _words(words, after, W, K, SHARED, RUNS, RUN, FLAT)
                        else:
                            odd, odd_at = _words(words, after, W, K, SHARED, RUNS, RUN, FLAT)
                        if item >= HELD:
                            _fetch(
                                count + STAGES, descriptors, room, ids, experts, W, D, K, SHARED, STAGES, HELD, PART, 2
                            )  # fmt: skip
                            count += 1
                        if CODES:
                            upper += one * taken
                            lower += two * taken
            for half in gl.static_range(2):
                total = gl.sum(_met(lower if half else upper, RUNS), 1)
                channel = (p + c * P) * 16 + 8 * half + gl.arange(0, 8, EIGHT)
                if RESIDUAL:
                    total = total.to(kind).to(gl.float32) + gl.load(residual + channel).to(gl.float32)
                gl.store(y + channel, total.to(kind))
        # This program has seen words of all the others, so all of them have read the number.
        gl.thread_barrier()
        if (p == 0) & (PART == 0):
            gl.store(epochs, gl.load(epochs) + 1)
