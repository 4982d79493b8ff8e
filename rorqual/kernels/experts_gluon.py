"""The gate and up products of FP8 experts for large batches on Hopper, in Gluon (`gluon_rings` says how; `fp8_gluon`
has the down products, `experts_gluon16` all of bf16)."""

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
