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
from rorqual.kernels.single_ring_lay import lay, lay_all, power, up_scales


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
def _met(product, RUNS: gl.constexpr):
    """Of the products of 8 * RUNS runs with all columns `[8 RUNS, N]` those of a run with its own: `[8, RUNS]`."""
    LAYOUT: gl.constexpr = product.type.layout
    m = gl.arange(0, 8 * RUNS, gl.SliceLayout(1, LAYOUT)) % RUNS
    n = gl.arange(0, product.shape[1], gl.SliceLayout(0, LAYOUT))
    return gl.sum(gl.where(m[:, None] == (n % RUNS)[None, :], product, 0.0), 1).reshape([8, RUNS])


@gluon.jit
def _begin(x, epochs, x_columns, x_steps, start, D: gl.constexpr, PART: gl.constexpr):
    """Once the kernels in front have ended: x as columns, and the number of this launch."""
    tags, begun = start
    CHUNKS: gl.constexpr = x_columns.shape[0]
    CODES: gl.constexpr = x_columns.dtype == gl.float8e4nv
    RUN: gl.constexpr = x_columns.shape[2]
    RUNS: gl.constexpr = x_columns.shape[1] // (2 if CODES else 1)
    FLAT: gl.constexpr = gl.BlockedLayout([1, 4], [128 // RUN, RUN // 4], [8, 1], [1, 0])
    tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()
    mark = gl.load(epochs)
    if PART != 2:
        for chunk in gl.static_range(CHUNKS):
            run = chunk * RUNS + gl.arange(0, RUNS, gl.SliceLayout(1, FLAT))
            lane = gl.arange(0, RUN, gl.SliceLayout(0, FLAT))
            # Runs beyond the row are its last one again, for the box has zeros there. (Zeros here too: four codes
            # known to be equal make ptxas 12.8 pack two of them with a register that was never written.)
            run = gl.minimum(run, D // RUN - 1)
            row = gl.load(x + run[:, None] * RUN + lane[None, :])
            lay(row.to(gl.float32), x_columns.index(chunk), x_steps.index(chunk), 1.0)
        fence_async_shared()
    tag = mark & 0xFFFF
    tags.store(gl.full([1], 0, gl.int32, gl.BlockedLayout([1], [32], [8], [0])) + tag)
    gl.thread_barrier()
    mbarrier.arrive(begun)
    return tag


@gluon.jit
def _multiply(
    runs, full, free, x_columns, x_steps, columns, steps, ready, taken, common_by, up_by, up_ready,
    x, ids, weights, residual, y, words, epochs, start, limit, experts,
    W: gl.constexpr, D: gl.constexpr, K: gl.constexpr, SHARED: gl.constexpr, STAGES: gl.constexpr,
    HELD: gl.constexpr, LIMIT: gl.constexpr, COPIES: gl.constexpr, RESIDUAL: gl.constexpr, PART: gl.constexpr,
    P: gl.constexpr,
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
    tag = _begin(x, epochs, x_columns, x_steps, start, D, PART)
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
            if CODES:
                mbarrier.wait(up_ready, 0, pred=slot >= SHARED)
            for chunk in gl.static_range(UP_CHUNKS):
                number = i * UP_CHUNKS + chunk
                stage = number % STAGES
                mbarrier.wait(full.index(stage), (number // STAGES) & 1)
                right = x_columns.index(chunk).permute((1, 0))
                one = warpgroup_mma(runs.index(2 * stage), right, none, use_acc=False, is_async=True)
                two = warpgroup_mma(runs.index(2 * stage + 1), right, none, use_acc=False, is_async=True)
                one, two = warpgroup_mma_wait(0, deps=[one, two])
                mbarrier.arrive(free.index(stage))
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
            gl.store(to, word, (copy < COPIES)[None, :])
        count = tiles * UP_CHUNKS
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
    LIMIT: gl.constexpr, COPIES: gl.constexpr, RESIDUAL: gl.constexpr, PART: gl.constexpr, P: gl.constexpr,
    LAYERS: gl.constexpr, LAYING: gl.constexpr, FETCHING: gl.constexpr,
):  # fmt: skip
    """y `[D]` = the sum over experts of weight * down (swiglu(gate x, up x)), and the residual. Eight warps multiply,
    LAYERS lay inner down as columns, one fetches.

    HELD: how many of the second product's first items have a place of their own, outside the ring, and are asked
    for ahead. UPS: items of a program in the first product, at most, up to a power of two; COMMON_UPS: those of the
    shared experts. PART: both products (0), the first (1) or the second (2) alone. BUFFERS: items
    whose columns are laid ahead. P: programs. LAYING, FETCHING: registers of those warps.
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
        by = up_scales(
            (gate_scale, up_scale, common_gate_scale, common_up_scale), ids, experts, W, D, K, SHARED, COMMON_UPS, P,
            RUNS, UP_CHUNKS, True, SPREAD,
        )  # fmt: skip
        common_table.store(power(by, POWERS))
    gl.warp_specialize(
        [
            (
                _multiply,
                (
                    runs, full, free, x_columns, x_steps, columns, steps, ready, taken, common_by, up_by, up_ready,
                    x, ids, weights, residual, y, words, epochs, (tags, begun), limit, experts,
                    W, D, K, SHARED, STAGES, HELD, LIMIT, COPIES, RESIDUAL, PART, P,
                ),
            ),
            (
                lay_all,
                (
                    words, (tags, begun), ids, experts, columns, steps, ready, taken, up_table, up_ready, tables,
                    common_s_row, W, D, K, SHARED, UPS, POWERS, COPIES, PART, P, LAYERS,
                ),
            ),
            (
                _bring,
                (descriptors, (boxes, full, free), ids, experts, W, D, K, SHARED, STAGES, HELD, PART, P),
            ),
        ],
        [LAYERS, 1],
        [LAYING, FETCHING],
    )  # fmt: skip
