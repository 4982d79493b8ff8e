"""The down products of FP8 experts for large batches on Hopper, in Gluon.

Items of 128 pairs and 256 outputs; `gluon_scaled` has the inner loop, `gluon_rings` what feeds it.
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
    table_room,
    take,
    tma,
)
from rorqual.kernels.gluon_scaled import first_scales, multiply


@gluon.jit
def _fetch_down(descriptors, room, turns, table, sizes, GROUPS: gl.constexpr, STAGES: gl.constexpr):
    """The fetching warp: 64 rows of inner for each group that has pairs and 256 rows of the expert's matrix."""
    x_desc, w_desc, shared_desc = descriptors
    x_tiles, w_tiles, full, free = room
    tiles_ptr, counter, tiles, items, across = table
    tokens, experts, shared, width, hidden = sizes
    DEPTH: gl.constexpr = x_desc.block_type.shape[1]
    count = 0
    turn = 0
    item = gl.program_id(0)
    while item < items:
        column = item % across
        expert, begin, end = described(tiles_ptr, tiles, item // across)
        following = gl.atomic_add(counter, 1, sem="relaxed") + gl.num_programs(0)
        if (expert >= 0) & (expert <= experts):
            hand_out(turns, turn, column, expert, begin, end)
            turn += 1
            busy = (end - begin + 63) // 64
            out = column * 256 + gl.where(expert < experts, expert, 0) * hidden
            # All shared ones at once: their matrices lie side by side, their rows of inner behind one another.
            for one in range(gl.where(expert < experts, 1, shared)):
                for start in range(0, width, DEPTH):
                    stage = count % STAGES
                    mbarrier.wait(free.index(stage), ((count // STAGES) & 1) ^ 1)
                    bar = full.index(stage)
                    expect(bar, busy, x_desc.block_type.nbytes, 2 * w_desc.block_type.nbytes, GROUPS)
                    row = begin + one * tokens
                    for g in gl.static_range(GROUPS):
                        rows = x_tiles.index(GROUPS * stage + g)
                        tma.async_copy_global_to_shared(
                            x_desc, [row + 64 * g, start], bar, rows, pred=busy > g
                        )
                    for half in gl.static_range(2):
                        w = w_tiles.index(2 * stage + half)
                        at = out + 128 * half
                        if expert < experts:
                            tma.async_copy_global_to_shared(w_desc, [at, start], bar, w)
                        else:
                            tma.async_copy_global_to_shared(shared_desc, [at, one * width + start], bar, w)
                    count += 1
        item = following
    hand_out(turns, turn, 0, -1, 0, 0)


@gluon.jit
def _aim(pointers, sizes, steps, column, expert, begin, end):
    """Where an item's scales lie, and the first of them."""
    x_scale_ptr, w_scale_ptr, shared_scale_ptr, _, _ = pointers
    _, experts, shared, _, hidden = sizes
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32])
    place = begin + gl.arange(0, 64, gl.SliceLayout(1, LAYOUT))
    one_scale = w_scale_ptr + (expert * (hidden // 128) + 2 * column) * steps
    across = steps
    if expert >= experts:
        across = steps * shared
        one_scale = shared_scale_ptr + 2 * column * across
    at = x_scale_ptr + gl.minimum(place, end - 1) * steps, one_scale, one_scale + across
    return at, first_scales(at[0], at[1], at[2], begin < end)


@gluon.jit
def _multiply_down(
    room, turns, pointers, sizes, GROUP: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr
):
    """A group of four warps: 64 pairs of every item."""
    _, _, _, order_ptr, y_ptr = pointers
    tokens, experts, shared, width, hidden = sizes
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32])
    # Four threads that have a row exchange what they hold, so that each stores 16 bytes.
    STORE: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4], [8, 0], [0, 32], [0, 64]],
        [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [64, 128],
    )  # fmt: skip
    kind: gl.constexpr = y_ptr.dtype.element_ty
    steps = width // 128
    count = 0
    turn = 1
    column, expert, begin, end = take(turns, 0)
    begin += GROUP * 64
    at, scales = _aim(pointers, sizes, steps, column, expert, begin, end)
    while expert >= 0:
        many = gl.where(expert < experts, steps, steps * shared)
        first = gl.zeros([64, 128], gl.float32, LAYOUT)
        second = gl.zeros([64, 128], gl.float32, LAYOUT)
        place = begin + gl.arange(0, 64, gl.SliceLayout(1, STORE))
        there = place < end
        pair = gl.load(order_ptr + place, there, other=0).to(gl.int64)
        if begin < end:
            first, second = multiply(
                room, count, many, at, scales, steps, (tokens - 1) * steps, GROUP, GROUPS, STAGES
            )
        else:
            let_by(room[2], room[3], count, many, STAGES)
        count += many
        channel = column * 256 + gl.arange(0, 128, gl.SliceLayout(0, STORE))
        column, expert, begin, end = take(turns, turn)
        turn += 1
        begin += GROUP * 64
        at, scales = _aim(pointers, sizes, steps, column, expert, begin, end)
        to = y_ptr + (pair * hidden)[:, None] + channel[None, :]
        gl.store(to, gl.convert_layout(first.to(kind), STORE), there[:, None])
        gl.store(to + 128, gl.convert_layout(second.to(kind), STORE), there[:, None])


@gluon.jit(do_not_specialize=COUNTS)
def down_kernel(
    x_desc, w_desc, shared_desc, x_scale_ptr, w_scale_ptr, shared_scale_ptr, order_ptr, tiles_ptr, y_ptr, counter,
    tiles, items, across, tokens, experts, shared, width, hidden, STAGES: gl.constexpr,
):  # fmt: skip
    """y `[.., D]`, by pair number: inner `[P, W]` times the expert's down matrix. The shared experts' sum is the first
    one's."""
    GROUPS: gl.constexpr = 2
    room = make_room(x_desc, w_desc, 2, GROUPS, STAGES)
    turns = table_room(GROUPS)
    pointers = (x_scale_ptr, w_scale_ptr, shared_scale_ptr, order_ptr, y_ptr)
    sizes = (tokens, experts, shared, width, hidden)
    table = (tiles_ptr, counter, tiles, items, across)
    descriptors = (x_desc, w_desc, shared_desc)
    shape = (tokens, experts, shared, width, hidden)
    gl.warp_specialize(
        [
            (_multiply_down, (room, turns, pointers, sizes, 0, GROUPS, STAGES)),
            (_multiply_down, (room, turns, pointers, sizes, 1, GROUPS, STAGES)),
            (_fetch_down, (descriptors, room, turns, table, shape, GROUPS, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )


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
    stages: int,
) -> None:
    """parts[order[p]] = inner[p] times the matrix `[D, W]` of p's expert; the sum over all `extra` shared experts for
    a token is in the first one's row. `taken` is an int32 zero; the table's tiles have up to 128 pairs."""
    (weight, scale), (shared_weight, shared_scale) = routed, shared
    count, hidden, width = weight.shape
    tiles, across = table.shape[1], hidden // 256
    down_kernel[(min(processors(inner), tiles * across),)](
        descriptor(inner, 64), descriptor(weight.flatten(0, 1), 128), descriptor(shared_weight, 128),
        inner_scales, scale, shared_scale, order, table, parts, taken, tiles, tiles * across, across, tokens,
        count, extra, width, hidden, STAGES=stages, num_warps=4,
    )  # fmt: skip
