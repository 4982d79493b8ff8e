"""The grouped FP8 products of `experts` for large batches on Hopper, in Gluon.

One program is a warp that fetches tiles by the bulk copy engine (TMA) and two groups of four warps, each with 64
of the 128 pairs of a tile. Programs stay and take every so-manieth item, so that the next item's tiles arrive while
results are written. The product of every 128 channels' codes is added up in fp32 times its scales (DeepSeek-V3
section 3.3); while one group does that, the other's product is under way. (Tiles of 256 channels would ask the
cache for less, but their sums don't fit in registers.) `experts_gluon16` is the same for bf16.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rorqual.kernels.gpu import INSTALLED

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import (
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
except ImportError:  # Triton too old, or none
    from rorqual.kernels import gpu

    gl, gluon = gpu.tl, gpu.triton

    AVAILABLE = False
else:
    AVAILABLE = INSTALLED

__all__ = [
    "AVAILABLE",
    "COUNTS",
    "Held",
    "dense",
    "descriptor",
    "down",
    "expect",
    "gate_up",
    "gl",
    "gluon",
    "hand_out",
    "let_by",
    "make_room",
    "processors",
    "reciprocal",
    "supported",
    "table_room",
    "take",
]

COUNTS = ("tiles", "items", "across", "pairs", "tokens", "experts", "shared", "x_row", "x_step")
"""Arguments whose values make no variant of a kernel: batches of every size run the same code."""


@gluon.jit
def table_room(GROUPS: gl.constexpr):
    """Room for two turns of four numbers, which the fetching warp hands to the groups, and its barriers."""
    numbers = gl.allocate_shared_memory(gl.int32, [8, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(free.index(i), count=GROUPS)
    return numbers, full, free


@gluon.jit
def hand_out(turns, turn, column, expert, begin, end):
    """By the fetching warp: what turn number `turn` is about. An expert below 0 says that none follows."""
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    numbers, full, free = turns
    mbarrier.wait(free.index(turn % 2), ((turn // 2) & 1) ^ 1)
    at = turn % 2 * 4
    numbers.index(at).store(gl.full([1], 0, gl.int32, ONE) + column)
    numbers.index(at + 1).store(gl.full([1], 0, gl.int32, ONE) + expert)
    numbers.index(at + 2).store(gl.full([1], 0, gl.int32, ONE) + begin)
    numbers.index(at + 3).store(gl.full([1], 0, gl.int32, ONE) + end)
    mbarrier.arrive(full.index(turn % 2))


@gluon.jit
def take(turns, turn):
    """By a group of four warps: the numbers handed out."""
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    numbers, full, free = turns
    mbarrier.wait(full.index(turn % 2), (turn // 2) & 1)
    at = turn % 2 * 4
    column = gl.max(numbers.index(at).load(ONE), 0)
    expert = gl.max(numbers.index(at + 1).load(ONE), 0)
    begin = gl.max(numbers.index(at + 2).load(ONE), 0)
    end = gl.max(numbers.index(at + 3).load(ONE), 0)
    mbarrier.arrive(free.index(turn % 2))
    return column, expert, begin, end


@gluon.jit
def expect(bar, busy, X_BYTES: gl.constexpr, W_BYTES: gl.constexpr, GROUPS: gl.constexpr):
    """Say how many bytes come for `busy` groups and for the matrix."""
    mbarrier.expect(bar, W_BYTES + X_BYTES, pred=busy == 1)
    mbarrier.expect(bar, W_BYTES + 2 * X_BYTES, pred=busy == 2)
    if GROUPS == 3:
        mbarrier.expect(bar, W_BYTES + 3 * X_BYTES, pred=busy == 3)


@gluon.jit
def let_by(full, free, count, steps, STAGES: gl.constexpr):
    """Let `steps` tiles go by, by a group that has nothing to multiply."""
    for step in range(steps):
        stage = (count + step) % STAGES
        mbarrier.wait(full.index(stage), ((count + step) // STAGES) & 1)
        mbarrier.arrive(free.index(stage))


@gluon.jit
def _add(
    room, count, many, x_scale_ptrs, w_scale_ptr, x_step, steps, jump, acc,
    GROUP: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """acc plus the product of `many` tiles from tile number `count` on. x's scales lie `x_step` apart, and
    after every `steps` of them go on `jump` further."""
    x_tiles, w_tiles, full, free = room
    zero = gl.zeros_like(acc)
    # The scales of two steps ahead arrive while products are under way.
    x_scale = gl.load(x_scale_ptrs)
    w_scale = gl.load(w_scale_ptr)
    ahead = gl.minimum(1, many - 1)
    next_x = gl.load(x_scale_ptrs + ahead * x_step + ahead // steps * jump)
    next_w = gl.load(w_scale_ptr + ahead)
    for step in range(many):
        stage = (count + step) % STAGES
        mbarrier.wait(full.index(stage), ((count + step) // STAGES) & 1)
        x = x_tiles.index(GROUPS * stage + GROUP)
        w = w_tiles.index(stage).permute((1, 0))
        part = warpgroup_mma(x, w, zero, use_acc=False, is_async=True)
        scale = x_scale * w_scale
        ahead = gl.minimum(step + 2, many - 1)
        x_scale = next_x
        w_scale = next_w
        next_x = gl.load(x_scale_ptrs + ahead * x_step + ahead // steps * jump)
        next_w = gl.load(w_scale_ptr + ahead)
        part = warpgroup_mma_wait(0, deps=[part])
        mbarrier.arrive(free.index(stage))
        acc += part * scale[:, None]
    return acc


@gluon.jit
def _fetch_down(
    descriptors, room, turns, table, sizes,
    OUT: gl.constexpr, DENSE: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The fetching warp: 64 rows of inner for each group that has pairs and `OUT` rows of the expert's matrix."""
    x_desc, w_desc, shared_desc = descriptors
    x_tiles, w_tiles, full, free = room
    tiles_ptr, counter, tiles, items, across = table
    tokens, experts, shared, width, hidden = sizes
    DEPTH: gl.constexpr = x_desc.block_type.shape[1]
    steps = width // DEPTH
    count = 0
    turn = 0
    item = gl.program_id(0)
    while item < items:
        tile = item // across
        if DENSE:
            expert = item * 0
            begin = tile * (64 * GROUPS)
            end = gl.minimum(begin + 64 * GROUPS, tokens)
            following = item + gl.num_programs(0)
        else:
            expert = gl.load(tiles_ptr + tile)
            begin = gl.load(tiles_ptr + tiles + tile)
            end = gl.load(tiles_ptr + 2 * tiles + tile)
            following = gl.atomic_add(counter, 1) + gl.num_programs(0)
        if (expert >= 0) & (expert <= experts):
            hand_out(turns, turn, item % across, expert, begin, end)
            turn += 1
            busy = (end - begin + 63) // 64
            out = item % across * OUT
            many = steps
            if expert < experts:
                out += expert * hidden
            else:
                # All shared ones at once: their matrices lie side by side, their rows of inner behind one another.
                many = steps * shared
            for step in range(many):
                stage = count % STAGES
                mbarrier.wait(free.index(stage), ((count // STAGES) & 1) ^ 1)
                bar = full.index(stage)
                expect(bar, busy, x_desc.block_type.nbytes, w_desc.block_type.nbytes, GROUPS)
                row = begin + step // steps * tokens
                start = step % steps * DEPTH
                for g in gl.static_range(GROUPS):
                    rows = x_tiles.index(GROUPS * stage + g)
                    tma.async_copy_global_to_shared(x_desc, [row + 64 * g, start], bar, rows, pred=busy > g)
                w = w_tiles.index(stage)
                if expert < experts:
                    tma.async_copy_global_to_shared(w_desc, [out, step * DEPTH], bar, w)
                else:
                    tma.async_copy_global_to_shared(shared_desc, [out, step * DEPTH], bar, w)
                count += 1
        item = following
    hand_out(turns, turn, 0, -1, 0, 0)


@gluon.jit
def _multiply_down(
    room, turns, pointers, sizes,
    OUT: gl.constexpr, DENSE: gl.constexpr, GROUP: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A group of four warps: 64 pairs of every item."""
    x_scale_ptr, w_scale_ptr, shared_scale_ptr, order_ptr, y_ptr = pointers
    tokens, experts, shared, width, hidden, x_row, x_step = sizes
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, OUT, 32])
    STORE: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    steps = width // room[0].shape[2]
    scales = width // 128
    count = 0
    turn = 0
    column, expert, begin, end = take(turns, turn)
    while expert >= 0:
        turn += 1
        begin += GROUP * 64
        many = gl.where(expert < experts, steps, steps * shared)
        if begin < end:
            row = column * OUT
            place = begin + gl.arange(0, 64, gl.SliceLayout(1, LAYOUT))
            at = begin + gl.arange(0, 64, gl.SliceLayout(1, STORE))
            if DENSE:
                pair = at.to(gl.int64)
            else:
                pair = gl.load(order_ptr + at, at < end, other=0).to(gl.int64)
            w_scale_at = w_scale_ptr + (expert * (hidden // 128) + row // 128) * scales
            if expert >= experts:
                w_scale_at = shared_scale_ptr + row // 128 * (scales * shared)
            acc = _add(
                room, count, many, x_scale_ptr + gl.minimum(place, end - 1) * x_row, w_scale_at, x_step, steps,
                tokens * x_row - steps * x_step, gl.zeros([64, OUT], gl.float32, LAYOUT), GROUP, GROUPS, STAGES,
            )  # fmt: skip
            y = gl.convert_layout(acc.to(y_ptr.dtype.element_ty), STORE)
            channel = row + gl.arange(0, OUT, gl.SliceLayout(0, STORE))
            there = (at < end)[:, None]
            if DENSE:
                there = there & (channel < hidden)[None, :]
            gl.store(y_ptr + (pair * hidden)[:, None] + channel[None, :], y, there)
        else:
            let_by(room[2], room[3], count, many, STAGES)
        count += many
        column, expert, begin, end = take(turns, turn)


@gluon.jit
def make_room(x_desc, w_desc, MATRICES: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr):
    """Room for STAGES steps' tiles of x and of `MATRICES` matrices, and barriers that say when a stage is full and
    when it is free again."""
    OUT: gl.constexpr = w_desc.block_type.shape[0]
    DEPTH: gl.constexpr = w_desc.block_type.shape[1]
    x_tiles = gl.allocate_shared_memory(x_desc.dtype, [GROUPS * STAGES, 64, DEPTH], x_desc.layout)
    w_tiles = gl.allocate_shared_memory(w_desc.dtype, [MATRICES * STAGES, OUT, DEPTH], w_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(free.index(i), count=GROUPS)
    return x_tiles, w_tiles, full, free


@gluon.jit(do_not_specialize=COUNTS)
def down_kernel(
    x_desc, w_desc, shared_desc, x_scale_ptr, w_scale_ptr, shared_scale_ptr, order_ptr, tiles_ptr, y_ptr, counter,
    tiles, items, across, tokens, experts, shared, width, hidden, x_row, x_step,
    DENSE: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """y `[.., D]`, by pair number: inner `[P, W]` times the expert's down matrix. The shared experts' sum is the first
    one's. `DENSE`: of one matrix, rows as they are."""
    OUT: gl.constexpr = w_desc.block_type.shape[0]
    room = make_room(x_desc, w_desc, 1, GROUPS, STAGES)
    turns = table_room(GROUPS)
    pointers = (x_scale_ptr, w_scale_ptr, shared_scale_ptr, order_ptr, y_ptr)
    sizes = (tokens, experts, shared, width, hidden, x_row, x_step)
    table = (tiles_ptr, counter, tiles, items, across)
    descriptors = (x_desc, w_desc, shared_desc)
    shape = (tokens, experts, shared, width, hidden)
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (_multiply_down, (room, turns, pointers, sizes, OUT, DENSE, 0, GROUPS, STAGES)),
                (_multiply_down, (room, turns, pointers, sizes, OUT, DENSE, 1, GROUPS, STAGES)),
                (_fetch_down, (descriptors, room, turns, table, shape, OUT, DENSE, GROUPS, STAGES)),
            ],
            [4, 1],
            [232, 40],
        )
    else:
        gl.warp_specialize(
            [
                (_multiply_down, (room, turns, pointers, sizes, OUT, DENSE, 0, GROUPS, STAGES)),
                (_multiply_down, (room, turns, pointers, sizes, OUT, DENSE, 1, GROUPS, STAGES)),
                (_multiply_down, (room, turns, pointers, sizes, OUT, DENSE, 2, GROUPS, STAGES)),
                (_fetch_down, (descriptors, room, turns, table, shape, OUT, DENSE, GROUPS, STAGES)),
            ],
            [4, 4, 1],
            [160, 160, 24],
        )


@gluon.jit
def _fetch_up(descriptors, room, turns, table, sizes, GROUPS: gl.constexpr, STAGES: gl.constexpr):
    """The fetching warp: 64 rows of x for each group that has pairs and one tile each of gate and up a step; an
    item's channels go by in two halves."""
    x_desc, gate_desc, up_desc, shared_gate_desc, shared_up_desc = descriptors
    x_tiles, w_tiles, full, free = room
    tiles_ptr, counter, tiles, items, across = table
    tokens, experts, width, hidden = sizes
    DEPTH: gl.constexpr = x_desc.block_type.shape[1]
    SPAN: gl.constexpr = gate_desc.block_type.shape[0]
    count = 0
    turn = 0
    item = gl.program_id(0)
    while item < items:
        tile = item // across
        expert = gl.load(tiles_ptr + tile)
        begin = gl.load(tiles_ptr + tiles + tile)
        end = gl.load(tiles_ptr + 2 * tiles + tile)
        following = gl.atomic_add(counter, 1) + gl.num_programs(0)
        if expert >= 0:
            hand_out(turns, turn, item % across, expert, begin, end)
            turn += 1
            busy = (end - begin + 63) // 64
            row = item % across * 128
            if expert < experts:
                row += expert * width
            else:
                # All shared experts read the same rows.
                begin -= (expert - experts) * tokens
                row += (expert - experts) * width
            for half in gl.static_range(128 // SPAN):
                for start in range(0, hidden, DEPTH):
                    stage = count % STAGES
                    mbarrier.wait(free.index(stage), ((count // STAGES) & 1) ^ 1)
                    bar = full.index(stage)
                    expect(bar, busy, x_desc.block_type.nbytes, 2 * gate_desc.block_type.nbytes, GROUPS)
                    for g in gl.static_range(GROUPS):
                        rows = x_tiles.index(GROUPS * stage + g)
                        tma.async_copy_global_to_shared(
                            x_desc, [begin + 64 * g, start], bar, rows, pred=busy > g
                        )
                    at = row + half * SPAN
                    gate = w_tiles.index(2 * stage)
                    up = w_tiles.index(2 * stage + 1)
                    if expert < experts:
                        tma.async_copy_global_to_shared(gate_desc, [at, start], bar, gate)
                        tma.async_copy_global_to_shared(up_desc, [at, start], bar, up)
                    else:
                        tma.async_copy_global_to_shared(shared_gate_desc, [at, start], bar, gate)
                        tma.async_copy_global_to_shared(shared_up_desc, [at, start], bar, up)
                    count += 1
        item = following
    hand_out(turns, turn, 0, -1, 0, 0)


@gluon.jit
def reciprocal(x):
    """1 / x to about an ulp, in one instruction where a division takes eight: while results are made ready the
    tensor cores wait."""
    return gl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def _swiglu(gate, up, limit, LIMIT: gl.constexpr):
    if LIMIT:
        gate = gl.minimum(gate, limit)
        up = gl.minimum(gl.maximum(up, -limit), limit)
    return gate * reciprocal(1.0 + gl.exp(-gate)) * up


@gluon.jit
def _half(
    room, x_scale_ptrs, gate_scale_ptr, up_scale_ptr, count, steps, limit,
    LIMIT: gl.constexpr, GROUP: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """swiglu of half an item's channels for 64 pairs, from codes: fp32 `[64, 64]`."""
    BOTH: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32])
    ONE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 32])
    x_tiles, w_tiles, full, free = room
    gate = gl.zeros([64, 64], gl.float32, ONE)
    up = gl.zeros([64, 64], gl.float32, ONE)
    zero = gl.zeros([64, 128], gl.float32, BOTH)
    x_scale = gl.load(x_scale_ptrs)
    gate_scale = gl.load(gate_scale_ptr)
    up_scale = gl.load(up_scale_ptr)
    next_x = gl.load(x_scale_ptrs + gl.minimum(1, steps - 1))
    next_gate = gl.load(gate_scale_ptr + gl.minimum(1, steps - 1))
    next_up = gl.load(up_scale_ptr + gl.minimum(1, steps - 1))
    for step in range(steps):
        stage = (count + step) % STAGES
        mbarrier.wait(full.index(stage), ((count + step) // STAGES) & 1)
        part = warpgroup_mma(
            x_tiles.index(GROUPS * stage + GROUP),
            w_tiles.index(stage).permute((1, 0)),
            zero,
            use_acc=False,
            is_async=True,
        )
        gate_factor = x_scale * gate_scale
        up_factor = x_scale * up_scale
        ahead = gl.minimum(step + 2, steps - 1)
        x_scale = next_x
        gate_scale = next_gate
        up_scale = next_up
        next_x = gl.load(x_scale_ptrs + ahead)
        next_gate = gl.load(gate_scale_ptr + ahead)
        next_up = gl.load(up_scale_ptr + ahead)
        part = warpgroup_mma_wait(0, deps=[part])
        mbarrier.arrive(free.index(stage))
        gate_part, up_part = gl.split(part.reshape([64, 2, 64]).permute([0, 2, 1]))
        gate += gl.convert_layout(gate_part, ONE, assert_trivial=True) * gate_factor[:, None]
        up += gl.convert_layout(up_part, ONE, assert_trivial=True) * up_factor[:, None]
    return _swiglu(gate, up, limit, LIMIT)


@gluon.jit
def _multiply_up(
    room, turns, pointers, shared_pointers, sizes,
    LIMIT: gl.constexpr, GROUP: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A group of four warps: 64 pairs of every item."""
    x_scale_ptr, gate_scale_ptr, up_scale_ptr, weights_ptr, order_ptr, inner_ptr, inner_scale_ptr = pointers
    shared_gate_scale_ptr, shared_up_scale_ptr = shared_pointers
    limit, pairs, tokens, experts, width, steps = sizes
    SPAN: gl.constexpr = 64
    ONE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SPAN, 32])
    STORE: gl.constexpr = gl.BlockedLayout([1, 16], [8, 4], [4, 1], [1, 0])
    kind: gl.constexpr = inner_ptr.dtype.element_ty
    count = 0
    turn = 0
    block, expert, begin, end = take(turns, turn)
    while expert >= 0:
        turn += 1
        begin += GROUP * 64
        if begin < end:
            place = begin + gl.arange(0, 64, gl.SliceLayout(1, ONE))
            there = place < end
            pair = gl.load(order_ptr + place, there, other=0)
            weight = gl.load(weights_ptr + pair, there & (pair < pairs), other=1.0)
            at_place = begin + gl.arange(0, 64, gl.SliceLayout(1, STORE))
            channel = block * 128 + gl.arange(0, SPAN, gl.SliceLayout(0, STORE))
            to = inner_ptr + (at_place.to(gl.int64) * width)[:, None] + channel[None, :]
            row = gl.minimum(place, end - 1)
            if expert < experts:
                at = (expert * (width // 128) + block) * steps
                gate_scale = gate_scale_ptr + at
                up_scale = up_scale_ptr + at
            else:
                row -= (expert - experts) * tokens
                at = ((expert - experts) * (width // 128) + block) * steps
                gate_scale = shared_gate_scale_ptr + at
                up_scale = shared_up_scale_ptr + at
            x_scale_ptrs = x_scale_ptr + row * steps
            first = _half(
                room, x_scale_ptrs, gate_scale, up_scale, count, steps, limit, LIMIT, GROUP, GROUPS, STAGES
            )
            first = first * weight[:, None]
            second = _half(
                room, x_scale_ptrs, gate_scale, up_scale, count + steps, steps, limit, LIMIT, GROUP, GROUPS,
                STAGES,
            )  # fmt: skip
            second = second * weight[:, None]
            top = gl.maximum(gl.max(gl.abs(first), 1), gl.max(gl.abs(second), 1))
            scale = gl.maximum(top, 1e-4) / 448.0
            gl.store(inner_scale_ptr + place * (width // 128) + block, scale, there)
            shrink = (1.0 / scale)[:, None]
            first = gl.convert_layout((first * shrink).to(kind), STORE)
            second = gl.convert_layout((second * shrink).to(kind), STORE)
            gl.store(to, first, (at_place < end)[:, None])
            gl.store(to + 64, second, (at_place < end)[:, None])
        else:
            let_by(room[2], room[3], count, 2 * steps, STAGES)
        count += 2 * steps
        block, expert, begin, end = take(turns, turn)


@gluon.jit(do_not_specialize=COUNTS)
def gate_up_kernel(
    x_desc, gate_desc, up_desc, shared_gate_desc, shared_up_desc, x_scale_ptr, gate_scale_ptr, up_scale_ptr,
    shared_gate_scale_ptr, shared_up_scale_ptr, weights_ptr, order_ptr, tiles_ptr, inner_ptr, inner_scale_ptr, counter,
    limit, tiles, items, across, pairs, tokens, experts, width, hidden,
    LIMIT: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """inner `[P, W]` (codes with scales `[P, W / 128]`): weight * swiglu of rows of x that lie by place already."""
    SPAN: gl.constexpr = gate_desc.block_type.shape[0]
    DEPTH: gl.constexpr = gate_desc.block_type.shape[1]
    fetched = make_room(x_desc, gate_desc, 2, GROUPS, STAGES)
    # The same memory: a tile of gate and one of up are one to the tensor cores.
    both = fetched[1]._reinterpret(gate_desc.dtype, [STAGES, 2 * SPAN, DEPTH], gate_desc.layout)
    room = (fetched[0], both, fetched[2], fetched[3])
    turns = table_room(GROUPS)
    pointers = (x_scale_ptr, gate_scale_ptr, up_scale_ptr, weights_ptr, order_ptr, inner_ptr, inner_scale_ptr)
    common = (shared_gate_scale_ptr, shared_up_scale_ptr)
    sizes = (limit, pairs, tokens, experts, width, hidden // DEPTH)
    table = (tiles_ptr, counter, tiles, items, across)
    descriptors = (x_desc, gate_desc, up_desc, shared_gate_desc, shared_up_desc)
    shape = (tokens, experts, width, hidden)
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (_multiply_up, (room, turns, pointers, common, sizes, LIMIT, 0, GROUPS, STAGES)),
                (_multiply_up, (room, turns, pointers, common, sizes, LIMIT, 1, GROUPS, STAGES)),
                (_fetch_up, (descriptors, fetched, turns, table, shape, GROUPS, STAGES)),
            ],
            [4, 1],
            [232, 40],
        )
    else:
        gl.warp_specialize(
            [
                (_multiply_up, (room, turns, pointers, common, sizes, LIMIT, 0, GROUPS, STAGES)),
                (_multiply_up, (room, turns, pointers, common, sizes, LIMIT, 1, GROUPS, STAGES)),
                (_multiply_up, (room, turns, pointers, common, sizes, LIMIT, 2, GROUPS, STAGES)),
                (_fetch_up, (descriptors, fetched, turns, table, shape, GROUPS, STAGES)),
            ],
            [4, 4, 1],
            [160, 160, 24],
        )


Held = tuple[Tensor, Tensor]
"""Matrices, and their scales (any tensor if they have none)."""


def processors(x: Tensor) -> int:
    return torch.cuda.get_device_properties(x.device).multi_processor_count


def supported(x: Tensor, width: int, hidden: int) -> bool:
    """Whether these kernels take experts of such sizes, on the device of x."""
    return (
        AVAILABLE
        and x.is_cuda
        and torch.cuda.get_device_capability(x.device)[0] == 9
        and x.dtype in (torch.bfloat16, torch.float16)
        and width % 128 == 0
        and hidden % 256 == 0
    )


def descriptor(x: Tensor, rows: int) -> Any:
    """Tiles of `rows` rows and 128 bytes of x `[M, C]`."""
    kind = (
        gl.float8e4nv if x.element_size() == 1 else gl.bfloat16 if x.dtype == torch.bfloat16 else gl.float16
    )
    block = [rows, 128 // x.element_size()]
    layout = gl.NVMMASharedLayout.get_default_for(block, kind)
    return TensorDescriptor(x, list(x.shape), [x.stride(0), 1], block, layout)


def gate_up(
    x: Tensor,
    scales: Tensor,
    weights: Tensor,
    order: Tensor,
    table: Tensor,
    routed: tuple[Held, Held],
    shared: tuple[Held, Held],
    inner: Tensor,
    inner_scales: Tensor,
    taken: Tensor,
    limit: float | None,
    tokens: int,
    groups: int,
    stages: int,
) -> None:
    """inner[p] = weight * swiglu(gate x, up x), by place, as x's rows lie; `routed` `[E, W, D]` and `shared`: gate
    and up. Tiles of 64 * `groups` pairs; `taken` is an int32 zero. Shapes of the rest:
    `experts_triton.gate_up_kernel`."""
    (gate, gate_scale), (up, up_scale) = routed
    (shared_gate, shared_gate_scale), (shared_up, shared_up_scale) = shared
    count, width, hidden = gate.shape
    tiles, across = table.shape[1], width // 128
    gate_up_kernel[(min(processors(x), tiles * across),)](
        descriptor(x, 64), descriptor(gate.flatten(0, 1), 64), descriptor(up.flatten(0, 1), 64),
        descriptor(shared_gate, 64), descriptor(shared_up, 64), scales, gate_scale, up_scale,
        shared_gate_scale, shared_up_scale, weights, order, table, inner, inner_scales, taken, limit or 0.0,
        tiles, tiles * across, across, weights.numel(), tokens, count, width, hidden, LIMIT=limit is not None,
        GROUPS=groups, STAGES=stages, num_warps=4,
    )  # fmt: skip


def down(
    inner: Tensor,
    inner_scales: Tensor,
    order: Tensor,
    table: Tensor,
    routed: Held,
    shared: Held,
    parts: Tensor,
    taken: Tensor,
    tokens: int,
    extra: int,
    groups: int,
    stages: int,
) -> None:
    """parts[order[p]] = inner[p] times the matrix `[D, W]` of p's expert; the sum over all `extra` shared experts for
    a token is in the first one's row. `taken` is an int32 zero."""
    (weight, scale), (shared_weight, shared_scale) = routed, shared
    count, hidden, width = weight.shape
    tiles, across = table.shape[1], hidden // 128
    down_kernel[(min(processors(inner), tiles * across),)](
        descriptor(inner, 64), descriptor(weight.flatten(0, 1), 128), descriptor(shared_weight, 128),
        inner_scales, scale, shared_scale, order, table, parts, taken, tiles, tiles * across, across, tokens, count,
        extra, width, hidden, width // 128, 1, DENSE=False, GROUPS=groups, STAGES=stages, num_warps=4,
    )  # fmt: skip


def dense(
    x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, y: Tensor, groups: int, stages: int
) -> None:
    """y `[N, O]` = codes x `[N, D]` with scales `[N, D / 128]` times a matrix `[O, D]`, scales by blocks of 128x128."""
    (rows, width), out = x.shape, weight.shape[0]
    tiles, across = -(-rows // (64 * groups)), -(-out // 128)
    down_kernel[(min(processors(x), tiles * across),)](
        descriptor(x, 64), descriptor(weight, 128), descriptor(weight, 128), x_scale, scale, scale, y, y, y, y, tiles,
        tiles * across, across, rows, 1, 0, width, out, x_scale.stride(0), x_scale.stride(1), DENSE=True,
        GROUPS=groups, STAGES=stages, num_warps=4,
    )  # fmt: skip
