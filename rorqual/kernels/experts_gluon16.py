"""The grouped bf16 products of `experts` for large batches on Hopper, in Gluon.

`gluon_rings` says how. Each group multiplies 64 of a tile's pairs with 256 output channels: gate and up of the same
128, or 256 of down. What the cache delivers bounds these products, so tiles are as large as registers allow.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from torch import Tensor

from rorqual.kernels.gluon_rings import (
    COUNTS,
    Held,
    descriptor,
    expect,
    gl,
    gluon,
    hand_out,
    let_by,
    make_room,
    mbarrier,
    processors,
    reciprocal,
    table_room,
    take,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)


@gluon.jit
def _multiply(room, count, steps, GROUP: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr):
    """Products of a group's 64 rows with both halves of `steps` tiles, from tile number `count` on: fp32 `[64, 128]`
    twice. (As one product of `[64, 256]` it would ask for less of shared memory, but three groups can't have the
    registers.)"""
    HALF: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    WHOLE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16])
    x_tiles, w_tiles, full, free = room
    if GROUPS == 2:
        acc = gl.zeros([64, 256], gl.float32, WHOLE)
        for step in range(steps):
            stage = (count + step) % STAGES
            mbarrier.wait(full.index(stage), ((count + step) // STAGES) & 1)
            x = x_tiles.index(GROUPS * stage + GROUP)
            acc = warpgroup_mma(x, w_tiles.index(stage).permute((1, 0)), acc, is_async=True)
            # The step before is done with its tiles.
            acc = warpgroup_mma_wait(1, deps=[acc])
            mbarrier.arrive(free.index((count + step + STAGES - 1) % STAGES), pred=step > 0)
        acc = warpgroup_mma_wait(0, deps=[acc])
        one, two = gl.split(acc.reshape([64, 2, 128]).permute([0, 2, 1]))
        first = gl.convert_layout(one, HALF, assert_trivial=True)
        second = gl.convert_layout(two, HALF, assert_trivial=True)
    else:
        first = gl.zeros([64, 128], gl.float32, HALF)
        second = gl.zeros([64, 128], gl.float32, HALF)
        for step in range(steps):
            stage = (count + step) % STAGES
            mbarrier.wait(full.index(stage), ((count + step) // STAGES) & 1)
            x = x_tiles.index(GROUPS * stage + GROUP)
            first = warpgroup_mma(x, w_tiles.index(2 * stage).permute((1, 0)), first, is_async=True)
            second = warpgroup_mma(x, w_tiles.index(2 * stage + 1).permute((1, 0)), second, is_async=True)
            first, second = warpgroup_mma_wait(2, deps=[first, second])
            mbarrier.arrive(free.index((count + step + STAGES - 1) % STAGES), pred=step > 0)
        first, second = warpgroup_mma_wait(0, deps=[first, second])
    mbarrier.arrive(free.index((count + steps - 1) % STAGES))
    return first, second


@gluon.jit
def _fetch(
    descriptors, room, turns, table, sizes, UP: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr
):
    """The fetching warp: 64 rows of x or inner for each group that has pairs, and 128 rows each of gate and up, or
    256 of down."""
    x_desc, shared_x_desc, one_desc, two_desc, shared_one_desc, shared_two_desc = descriptors
    x_tiles, w_tiles, full, free = room
    tiles_ptr, counter, tiles, items, across = table
    pairs, tokens, experts, shared, width, hidden = sizes
    DEPTH: gl.constexpr = x_desc.block_type.shape[1]
    X_BYTES: gl.constexpr = x_desc.block_type.nbytes
    W_BYTES: gl.constexpr = 2 * one_desc.block_type.nbytes
    steps = (hidden if UP else width) // DEPTH
    count = 0
    turn = 0
    item = gl.program_id(0)
    while item < items:
        tile = item // across
        expert = gl.load(tiles_ptr + tile)
        begin = gl.load(tiles_ptr + tiles + tile)
        end = gl.load(tiles_ptr + 2 * tiles + tile)
        following = gl.atomic_add(counter, 1) + gl.num_programs(0)
        if (expert >= 0) & (expert <= experts + (shared if UP else 0)):
            hand_out(turns, turn, item % across, expert, begin, end)
            turn += 1
            busy = (end - begin + 63) // 64
            many = steps
            if UP:
                one = item % across * 128
                if expert < experts:
                    one += expert * width
                else:
                    # All shared experts read x as it is.
                    begin -= pairs + (expert - experts) * tokens
                    one += (expert - experts) * width
                two = one
            else:
                one = item % across * 256
                if expert < experts:
                    one += expert * hidden
                else:
                    # All of them at once: their matrices lie side by side, their rows of inner behind one another.
                    many = steps * shared
                two = one + 128
            for step in range(many):
                stage = count % STAGES
                mbarrier.wait(free.index(stage), ((count // STAGES) & 1) ^ 1)
                bar = full.index(stage)
                expect(bar, busy, X_BYTES, W_BYTES, GROUPS)
                row = begin
                start = step * DEPTH
                if not UP:
                    row += step // steps * tokens
                    start = step % steps * DEPTH
                for g in gl.static_range(GROUPS):
                    rows = x_tiles.index(GROUPS * stage + g)
                    there = busy > g
                    if UP:
                        by_token = there & (expert >= experts)
                        there = there & (expert < experts)
                        tma.async_copy_global_to_shared(
                            shared_x_desc, [row + 64 * g, start], bar, rows, pred=by_token
                        )
                    tma.async_copy_global_to_shared(x_desc, [row + 64 * g, start], bar, rows, pred=there)
                start = step * DEPTH
                upper = w_tiles.index(2 * stage)
                lower = w_tiles.index(2 * stage + 1)
                if expert < experts:
                    tma.async_copy_global_to_shared(one_desc, [one, start], bar, upper)
                    tma.async_copy_global_to_shared(two_desc, [two, start], bar, lower)
                else:
                    tma.async_copy_global_to_shared(shared_one_desc, [one, start], bar, upper)
                    tma.async_copy_global_to_shared(shared_two_desc, [two, start], bar, lower)
                count += 1
        item = following
    hand_out(turns, turn, 0, -1, 0, 0)


@gluon.jit
def _up_group(
    room, turns, pointers, sizes,
    LIMIT: gl.constexpr, GROUP: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Four warps: 64 pairs of every item."""
    weights_ptr, order_ptr, inner_ptr = pointers
    limit, pairs, width, steps = sizes
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    STORE: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4], [8, 0], [0, 32], [0, 64]],
        [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [64, 128],
    )  # fmt: skip
    count = 0
    turn = 0
    column, expert, begin, end = take(turns, turn)
    while expert >= 0:
        turn += 1
        begin += GROUP * 64
        if begin < end:
            place = begin + gl.arange(0, 64, gl.SliceLayout(1, LAYOUT))
            there = place < end
            pair = gl.load(order_ptr + place, there, other=0)
            weight = gl.load(weights_ptr + pair, there & (pair < pairs), other=1.0)
            gate, up = _multiply(room, count, steps, GROUP, GROUPS, STAGES)
            if LIMIT:
                gate = gl.minimum(gate, limit)
                up = gl.minimum(gl.maximum(up, -limit), limit)
            inner = gate * reciprocal(1.0 + gl.exp(-gate)) * up * weight[:, None]
            at = begin + gl.arange(0, 64, gl.SliceLayout(1, STORE))
            channel = column * 128 + gl.arange(0, 128, gl.SliceLayout(0, STORE))
            to = inner_ptr + (at.to(gl.int64) * width)[:, None] + channel[None, :]
            gl.store(to, gl.convert_layout(inner.to(inner_ptr.dtype.element_ty), STORE), (at < end)[:, None])
        else:
            let_by(room[2], room[3], count, steps, STAGES)
        count += steps
        column, expert, begin, end = take(turns, turn)


@gluon.jit
def _down_group(
    room, turns, pointers, sizes, GROUP: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr
):
    """Four warps: 64 pairs of every item."""
    order_ptr, y_ptr = pointers
    experts, shared, hidden, steps = sizes
    STORE: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4], [8, 0], [0, 32], [0, 64]],
        [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [64, 128],
    )  # fmt: skip
    kind: gl.constexpr = y_ptr.dtype.element_ty
    count = 0
    turn = 0
    column, expert, begin, end = take(turns, turn)
    while expert >= 0:
        turn += 1
        begin += GROUP * 64
        many = gl.where(expert < experts, steps, steps * shared)
        if begin < end:
            at = begin + gl.arange(0, 64, gl.SliceLayout(1, STORE))
            pair = gl.load(order_ptr + at, at < end, other=0).to(gl.int64)
            first, second = _multiply(room, count, many, GROUP, GROUPS, STAGES)
            channel = column * 256 + gl.arange(0, 128, gl.SliceLayout(0, STORE))
            to = y_ptr + (pair * hidden)[:, None] + channel[None, :]
            there = (at < end)[:, None]
            gl.store(to, gl.convert_layout(first.to(kind), STORE), there)
            gl.store(to + 128, gl.convert_layout(second.to(kind), STORE), there)
        else:
            let_by(room[2], room[3], count, many, STAGES)
        count += many
        column, expert, begin, end = take(turns, turn)


@gluon.jit
def _room(x_desc, w_desc, GROUPS: gl.constexpr, STAGES: gl.constexpr):
    """Room for the tiles as they are fetched, and as they are multiplied."""
    x_tiles, w_tiles, full, free = make_room(x_desc, w_desc, 2, GROUPS, STAGES)
    multiplied = w_tiles
    if GROUPS == 2:
        DEPTH: gl.constexpr = x_desc.block_type.shape[1]
        multiplied = w_tiles._reinterpret(w_desc.dtype, [STAGES, 256, DEPTH], w_desc.layout)
    return (x_tiles, w_tiles, full, free), (x_tiles, multiplied, full, free)


@gluon.jit(do_not_specialize=COUNTS)
def gate_up_kernel(
    x_desc, shared_x_desc, gate_desc, up_desc, shared_gate_desc, shared_up_desc, weights_ptr, order_ptr, tiles_ptr,
    inner_ptr, counter, limit, tiles, items, across, pairs, tokens, experts, shared, width, hidden,
    LIMIT: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """inner `[P, W]`: weight * swiglu of rows of x that lie by place already, for shared experts by token."""
    fetched, room = _room(x_desc, gate_desc, GROUPS, STAGES)
    turns = table_room(GROUPS)
    pointers = (weights_ptr, order_ptr, inner_ptr)
    sizes = (limit, pairs, width, hidden // x_desc.block_type.shape[1])
    descriptors = (x_desc, shared_x_desc, gate_desc, up_desc, shared_gate_desc, shared_up_desc)
    table = (tiles_ptr, counter, tiles, items, across)
    shape = (pairs, tokens, experts, shared, width, hidden)
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (_up_group, (room, turns, pointers, sizes, LIMIT, 0, GROUPS, STAGES)),
                (_up_group, (room, turns, pointers, sizes, LIMIT, 1, GROUPS, STAGES)),
                (_fetch, (descriptors, fetched, turns, table, shape, True, GROUPS, STAGES)),
            ],
            [4, 1],
            [232, 40],
        )
    else:
        gl.warp_specialize(
            [
                (_up_group, (room, turns, pointers, sizes, LIMIT, 0, GROUPS, STAGES)),
                (_up_group, (room, turns, pointers, sizes, LIMIT, 1, GROUPS, STAGES)),
                (_up_group, (room, turns, pointers, sizes, LIMIT, 2, GROUPS, STAGES)),
                (_fetch, (descriptors, fetched, turns, table, shape, True, GROUPS, STAGES)),
            ],
            [4, 4, 1],
            [160, 160, 24],
        )


@gluon.jit(do_not_specialize=COUNTS)
def down_kernel(
    x_desc, w_desc, shared_desc, order_ptr, tiles_ptr, y_ptr, counter, tiles, items, across, tokens, experts, shared,
    width, hidden, GROUPS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """y `[.., D]`, by pair number: inner `[P, W]` times the expert's down matrix. The shared experts' sum is the first
    one's."""
    fetched, room = _room(x_desc, w_desc, GROUPS, STAGES)
    turns = table_room(GROUPS)
    pointers = (order_ptr, y_ptr)
    sizes = (experts, shared, hidden, width // x_desc.block_type.shape[1])
    descriptors = (x_desc, x_desc, w_desc, w_desc, shared_desc, shared_desc)
    table = (tiles_ptr, counter, tiles, items, across)
    shape = (0, tokens, experts, shared, width, hidden)
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (_down_group, (room, turns, pointers, sizes, 0, GROUPS, STAGES)),
                (_down_group, (room, turns, pointers, sizes, 1, GROUPS, STAGES)),
                (_fetch, (descriptors, fetched, turns, table, shape, False, GROUPS, STAGES)),
            ],
            [4, 1],
            [232, 40],
        )
    else:
        gl.warp_specialize(
            [
                (_down_group, (room, turns, pointers, sizes, 0, GROUPS, STAGES)),
                (_down_group, (room, turns, pointers, sizes, 1, GROUPS, STAGES)),
                (_down_group, (room, turns, pointers, sizes, 2, GROUPS, STAGES)),
                (_fetch, (descriptors, fetched, turns, table, shape, False, GROUPS, STAGES)),
            ],
            [4, 4, 1],
            [160, 160, 24],
        )


def gate_up(
    x: Tensor,
    shared_x: Tensor,
    weights: Tensor,
    order: Tensor,
    table: Tensor,
    routed: tuple[Held, Held],
    shared: tuple[Held, Held],
    inner: Tensor,
    taken: Tensor,
    limit: float | None,
    extra: int,
    groups: int,
    stages: int,
) -> None:
    """See `experts_gluon.gate_up`; the shared experts read `shared_x` `[N, D]`."""
    gate, up = routed[0][0], routed[1][0]
    count, width, hidden = gate.shape
    tiles, across = table.shape[1], width // 128
    gate_up_kernel[(min(processors(x), tiles * across),)](
        descriptor(x, 64), descriptor(shared_x, 64), descriptor(gate.flatten(0, 1), 128),
        descriptor(up.flatten(0, 1), 128), descriptor(shared[0][0], 128), descriptor(shared[1][0], 128), weights,
        order, table, inner, taken, limit or 0.0, tiles, tiles * across, across, weights.numel(),
        shared_x.shape[0], count, extra, width, hidden, LIMIT=limit is not None, GROUPS=groups, STAGES=stages,
        num_warps=4,
    )  # fmt: skip


def down(
    inner: Tensor,
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
    """See `experts_gluon.down`."""
    weight = routed[0]
    count, hidden, width = weight.shape
    tiles, across = table.shape[1], hidden // 256
    down_kernel[(min(processors(inner), tiles * across),)](
        descriptor(inner, 64), descriptor(weight.flatten(0, 1), 128), descriptor(shared[0], 128), order, table,
        parts, taken, tiles, tiles * across, across, tokens, count, extra, width, hidden, GROUPS=groups,
        STAGES=stages, num_warps=4,
    )  # fmt: skip
