"""FP8 products by blocks of 128 channels on Hopper, in Gluon: of one matrix, or of experts' down matrices.

The product of every 128 channels' codes is added up in fp32 times its scales (DeepSeek-V3 section 3.3); while one
group of warps does that, the others' products are under way. (Tiles of 256 outputs would ask the cache for less, but
their sums don't fit in registers.)
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
    table_room,
    take,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)


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
