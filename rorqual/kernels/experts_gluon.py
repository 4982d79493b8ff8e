"""The gate and up products of FP8 experts for large batches on Hopper, in Gluon.

Items of 128 pairs and 128 channels of both matrices; `gluon_scaled` has the inner loop, `gluon_rings` what feeds it,
`experts_gluon_down` the other product, `experts_gluon16` both of bf16.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from torch import Tensor

from rorqual.kernels.gluon_rings import (
    COUNTS,
    Held,
    described,
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
)
from rorqual.kernels.gluon_scaled import first_scales, multiply


@gluon.jit
def _fetch_up(descriptors, room, turns, table, sizes, GROUPS: gl.constexpr, STAGES: gl.constexpr):
    """The fetching warp: 64 rows of x for each group that has pairs and 128 each of gate and up a step."""
    x_desc, gate_desc, up_desc, shared_gate_desc, shared_up_desc = descriptors
    x_tiles, w_tiles, full, free = room
    tiles_ptr, counter, tiles, items, across = table
    tokens, experts, width, hidden = sizes
    DEPTH: gl.constexpr = x_desc.block_type.shape[1]
    count = 0
    turn = 0
    item = gl.program_id(0)
    while item < items:
        column = item % across
        expert, begin, end = described(tiles_ptr, tiles, item // across)
        following = gl.atomic_add(counter, 1, sem="relaxed") + gl.num_programs(0)
        if expert >= 0:
            hand_out(turns, turn, column, expert, begin, end)
            turn += 1
            busy = (end - begin + 63) // 64
            row = column * 128
            if expert < experts:
                row += expert * width
            else:
                # All shared experts read the same rows.
                begin -= (expert - experts) * tokens
                row += (expert - experts) * width
            for start in range(0, hidden, DEPTH):
                stage = count % STAGES
                mbarrier.wait(free.index(stage), ((count // STAGES) & 1) ^ 1)
                bar = full.index(stage)
                expect(bar, busy, x_desc.block_type.nbytes, 2 * gate_desc.block_type.nbytes, GROUPS)
                for g in gl.static_range(GROUPS):
                    rows = x_tiles.index(GROUPS * stage + g)
                    tma.async_copy_global_to_shared(x_desc, [begin + 64 * g, start], bar, rows, pred=busy > g)
                gate = w_tiles.index(2 * stage)
                up = w_tiles.index(2 * stage + 1)
                if expert < experts:
                    tma.async_copy_global_to_shared(gate_desc, [row, start], bar, gate)
                    tma.async_copy_global_to_shared(up_desc, [row, start], bar, up)
                else:
                    tma.async_copy_global_to_shared(shared_gate_desc, [row, start], bar, gate)
                    tma.async_copy_global_to_shared(shared_up_desc, [row, start], bar, up)
                count += 1
        item = following
    hand_out(turns, turn, 0, -1, 0, 0)


@gluon.jit
def _aim(pointers, shared_pointers, sizes, column, expert, begin, end):
    """An item's pairs, where its scales lie, and the first of them."""
    x_scale_ptr, gate_scale_ptr, up_scale_ptr, _, order_ptr, _, _ = pointers
    shared_gate_scale_ptr, shared_up_scale_ptr = shared_pointers
    _, _, tokens, experts, width, steps = sizes
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32])
    place = begin + gl.arange(0, 64, gl.SliceLayout(1, LAYOUT))
    row = gl.minimum(place, end - 1)
    if expert < experts:
        to = (expert * (width // 128) + column) * steps
        gate_scale = gate_scale_ptr + to
        up_scale = up_scale_ptr + to
    else:
        # All shared experts read the same rows.
        row -= (expert - experts) * tokens
        to = ((expert - experts) * (width // 128) + column) * steps
        gate_scale = shared_gate_scale_ptr + to
        up_scale = shared_up_scale_ptr + to
    pair = gl.load(order_ptr + place, place < end, other=0)
    at = x_scale_ptr + row * steps, gate_scale, up_scale
    return pair, at, first_scales(at[0], at[1], at[2], begin < end)


@gluon.jit
def _multiply_up(
    room, turns, pointers, shared_pointers, sizes,
    LIMIT: gl.constexpr, GROUP: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A group of four warps: 64 pairs of every item."""
    _, _, _, weights_ptr, _, inner_ptr, inner_scale_ptr = pointers
    limit, pairs, _, _, width, steps = sizes
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32])
    # Four threads that have a row exchange what they hold, so that each stores 16 bytes.
    STORE: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4], [0, 8], [8, 0], [0, 64]],
        [[0, 16], [0, 32], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [64, 128],
    )  # fmt: skip
    count = 0
    turn = 1
    column, expert, begin, end = take(turns, 0)
    begin += GROUP * 64
    pair, at, scales = _aim(pointers, shared_pointers, sizes, column, expert, begin, end)
    while expert >= 0:
        place = begin + gl.arange(0, 64, gl.SliceLayout(1, LAYOUT))
        there = place < end
        scale_to = inner_scale_ptr + place * (width // 128) + column
        at_place = begin + gl.arange(0, 64, gl.SliceLayout(1, STORE))
        stored = at_place < end
        channel = column * 128 + gl.arange(0, 128, gl.SliceLayout(0, STORE))
        to = inner_ptr + (at_place.to(gl.int64) * width)[:, None] + channel[None, :]
        weight = gl.load(weights_ptr + pair, there & (pair < pairs), other=1.0)
        gate = gl.zeros([64, 128], gl.float32, LAYOUT)
        up = gl.zeros([64, 128], gl.float32, LAYOUT)
        if begin < end:
            gate, up = multiply(room, count, steps, at, scales, steps, 0, GROUP, GROUPS, STAGES)
        else:
            let_by(room[2], room[3], count, steps, STAGES)
        count += steps
        column, expert, begin, end = take(turns, turn)
        turn += 1
        begin += GROUP * 64
        pair, at, scales = _aim(pointers, shared_pointers, sizes, column, expert, begin, end)
        if LIMIT:
            gate = gl.minimum(gate, limit)
            up = gl.minimum(gl.maximum(up, -limit), limit)
        inner = gate * reciprocal(1.0 + gl.exp(-gate)) * up * weight[:, None]
        scale = gl.maximum(gl.max(gl.abs(inner), 1), 1e-4) / 448.0
        gl.store(scale_to, scale, there)
        codes = (inner * (1.0 / scale)[:, None]).to(inner_ptr.dtype.element_ty)
        gl.store(to, gl.convert_layout(codes, STORE), stored[:, None])


@gluon.jit(do_not_specialize=COUNTS)
def gate_up_kernel(
    x_desc, gate_desc, up_desc, shared_gate_desc, shared_up_desc, x_scale_ptr, gate_scale_ptr, up_scale_ptr,
    shared_gate_scale_ptr, shared_up_scale_ptr, weights_ptr, order_ptr, tiles_ptr, inner_ptr, inner_scale_ptr, counter,
    limit, tiles, items, across, pairs, tokens, experts, width, hidden, LIMIT: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """inner `[P, W]` (codes with scales `[P, W / 128]`): weight * swiglu of rows of x that lie by place already."""
    GROUPS: gl.constexpr = 2
    room = make_room(x_desc, gate_desc, 2, GROUPS, STAGES)
    turns = table_room(GROUPS)
    pointers = (x_scale_ptr, gate_scale_ptr, up_scale_ptr, weights_ptr, order_ptr, inner_ptr, inner_scale_ptr)
    common = (shared_gate_scale_ptr, shared_up_scale_ptr)
    sizes = (limit, pairs, tokens, experts, width, hidden // x_desc.block_type.shape[1])
    table = (tiles_ptr, counter, tiles, items, across)
    descriptors = (x_desc, gate_desc, up_desc, shared_gate_desc, shared_up_desc)
    shape = (tokens, experts, width, hidden)
    gl.warp_specialize(
        [
            (_multiply_up, (room, turns, pointers, common, sizes, LIMIT, 0, GROUPS, STAGES)),
            (_multiply_up, (room, turns, pointers, common, sizes, LIMIT, 1, GROUPS, STAGES)),
            (_fetch_up, (descriptors, room, turns, table, shape, GROUPS, STAGES)),
        ],
        [4, 1],
        [240, 24],
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
    stages: int,
) -> None:
    """inner[p] = weight * swiglu(gate x, up x), by place, as x's rows lie; `routed` `[E, W, D]` and `shared`: gate
    and up. Tiles of 128 pairs; `taken` is an int32 zero. Shapes of the rest: `experts_triton.gate_up_kernel`."""
    (gate, gate_scale), (up, up_scale) = routed
    (shared_gate, shared_gate_scale), (shared_up, shared_up_scale) = shared
    count, width, hidden = gate.shape
    tiles, across = table.shape[1], width // 128
    gate_up_kernel[(min(processors(x), tiles * across),)](
        descriptor(x, 64), descriptor(gate.flatten(0, 1), 128), descriptor(up.flatten(0, 1), 128),
        descriptor(shared_gate, 128), descriptor(shared_up, 128), scales, gate_scale, up_scale,
        shared_gate_scale, shared_up_scale, weights, order, table, inner, inner_scales, taken, limit or 0.0,
        tiles, tiles * across, across, weights.numel(), tokens, count, width, hidden, LIMIT=limit is not None,
        STAGES=stages, num_warps=4,
    )  # fmt: skip
