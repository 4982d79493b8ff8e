"""The products of FP8 training on Hopper, in Gluon: see `fp8_train_products`.

Items of 128 rows and 256 columns of one matrix's result, the last of a row perhaps 128 wide; `gluon_rings` has what
feeds the groups, `gluon_scaled` the inner loop of rows by matrices. In that of a weight's gradient both sides have a
scale a row, and the columns' come by the copy engine as the tiles do.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rorqual.kernels.gluon_rings import (
    AVAILABLE,
    TensorDescriptor,
    descriptor,
    gl,
    gluon,
    hand_out,
    make_room,
    mbarrier,
    processors,
    table_room,
    take,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from rorqual.kernels.gluon_scaled import first_scales

STAGES = 4
"""Steps' tiles under way or in use."""

ORDERED = True
"""Whether the two groups take turns at the tensor cores."""

BAND = 16
"""Tiles of outputs of a weight's gradient that are worked side by side: what a wave of programs reads then is a square
of the product rather than a strip."""


# ---------------------------------------------------------------------------------------------- order


@gluon.jit
def order_room():
    """Barriers by which two groups take turns at the tensor cores: left to themselves both multiply at the same time,
    and then both add while the tensor cores wait."""
    bars = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(bars.index(i), count=1)
    return bars


@gluon.jit
def await_turn(order, number, GROUP: gl.constexpr, ORDERED: gl.constexpr):
    """Wait until group GROUP may issue its product number `number`: the first group's first may at once."""
    if ORDERED:
        mbarrier.wait(order.index(GROUP), (number & 1) ^ (1 - GROUP))


@gluon.jit
def pass_on(order, GROUP: gl.constexpr, ORDERED: gl.constexpr):
    """The product is issued: the other group's next one may follow."""
    if ORDERED:
        mbarrier.arrive(order.index(1 - GROUP))


# ---------------------------------------------------------------------------------------------- rows


@gluon.jit
def _fetch_rows(descriptors, room, turns, table, sizes, GROUPS: gl.constexpr, STAGES: gl.constexpr):
    """The fetching warp: 64 rows of x for each group and 256, or the last 128, rows of the matrix a step."""
    x_desc, w_desc = descriptors
    x_tiles, w_tiles, full, free = room
    of_tile_ptr, counter, items, across = table
    experts, out_room, depth = sizes
    DEPTH: gl.constexpr = x_desc.block_type.shape[1]
    X_BYTES: gl.constexpr = GROUPS * x_desc.block_type.nbytes
    W_BYTES: gl.constexpr = w_desc.block_type.nbytes
    count = 0
    turn = 0
    item = gl.program_id(0)
    while item < items:
        column = item % across
        begin = item // across * 128
        expert = gl.load(of_tile_ptr + item // across)
        following = gl.atomic_add(counter, 1, sem="relaxed") + gl.num_programs(0)
        hand_out(turns, turn, column, expert, begin, begin + 128)
        turn += 1
        if expert < experts:
            both = column * 256 + 128 < out_room
            out = column * 256 + expert * out_room
            for start in range(0, depth, DEPTH):
                stage = count % STAGES
                mbarrier.wait(free.index(stage), ((count // STAGES) & 1) ^ 1)
                bar = full.index(stage)
                mbarrier.expect(bar, X_BYTES + 2 * W_BYTES, pred=both)
                mbarrier.expect(bar, X_BYTES + W_BYTES, pred=both == 0)
                for g in gl.static_range(GROUPS):
                    rows = x_tiles.index(GROUPS * stage + g)
                    tma.async_copy_global_to_shared(x_desc, [begin + 64 * g, start], bar, rows)
                tma.async_copy_global_to_shared(w_desc, [out, start], bar, w_tiles.index(2 * stage))
                tma.async_copy_global_to_shared(
                    w_desc, [out + 128, start], bar, w_tiles.index(2 * stage + 1), pred=both
                )
                count += 1
        item = following
    hand_out(turns, turn, 0, -1, 0, 0)


@gluon.jit
def _multiply_rows(
    room, order, number, count, many, pointers, scales, jump,
    BOTH: gl.constexpr, GROUP: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr, ORDERED: gl.constexpr,
):  # fmt: skip
    """The products of a group's 64 rows with both halves of `many` tiles from tile number `count` on, or with the
    first alone: fp32 `[64, 128]` twice. `pointers` and `scales`: those of `first_scales`; x's go on `jump` further.
    `number`: products of this group so far."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32])
    x_tiles, w_tiles, full, free = room
    x_scale_ptrs, one_scale_ptr, two_scale_ptr = pointers
    x_scale, one, two = scales
    first = gl.zeros([64, 128], gl.float32, LAYOUT)
    second = gl.zeros([64, 128], gl.float32, LAYOUT)
    part = gl.zeros([64, 128], gl.float32, LAYOUT)
    at = jump
    for step in range(many):
        stage = (count + step) % STAGES
        mbarrier.wait(full.index(stage), ((count + step) // STAGES) & 1)
        x = x_tiles.index(GROUPS * stage + GROUP)
        await_turn(order, number, GROUP, ORDERED)
        part = warpgroup_mma(x, w_tiles.index(2 * stage).permute((1, 0)), part, use_acc=False, is_async=True)
        pass_on(order, GROUP, ORDERED)
        number += 1
        one_factor = x_scale * one
        two_factor = x_scale * two
        more = step + 1 < many  # the next step's arrive while this one's products are under way
        x_scale = gl.load(x_scale_ptrs + at, more)
        one = gl.load(one_scale_ptr + step + 1, more)
        if BOTH:
            two = gl.load(two_scale_ptr + step + 1, more)
        at += jump
        part = warpgroup_mma_wait(0, deps=[part])
        if not BOTH:
            mbarrier.arrive(free.index(stage))
        first += part * one_factor[:, None]
        if BOTH:
            # Nothing is waited for here: the compiler is told that all was added before `part` is written again.
            first = warpgroup_mma_wait(0, deps=[first])
            await_turn(order, number, GROUP, ORDERED)
            part = warpgroup_mma(
                x, w_tiles.index(2 * stage + 1).permute((1, 0)), part, use_acc=False, is_async=True
            )
            pass_on(order, GROUP, ORDERED)
            number += 1
            part = warpgroup_mma_wait(0, deps=[part])
            mbarrier.arrive(free.index(stage))
            second += part * two_factor[:, None]
    return first, second


@gluon.jit
def _aim_rows(pointers, sizes, column, expert, begin):
    """Where an item's scales lie, and the first of them."""
    x_scale_ptr, w_scale_ptr, _ = pointers
    experts, out_room, _, steps, _ = sizes
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32])
    place = begin + gl.arange(0, 64, gl.SliceLayout(1, LAYOUT))
    blocks = out_room // 128
    one_scale = w_scale_ptr + (expert * blocks + 2 * column) * steps
    two_scale = one_scale + gl.where(2 * column + 1 < blocks, steps, 0)
    there = (expert >= 0) & (expert < experts)
    at = x_scale_ptr + place, one_scale, two_scale
    return at, first_scales(at[0], at[1], at[2], there)


@gluon.jit
def _put(to, values, STORE: gl.constexpr, there, ADD: gl.constexpr):
    """Store fp32 sums as what `to` points at, added to what is there if ADD: fp32 by the cache, which nobody waits
    for."""
    values = gl.convert_layout(values, STORE)
    if ADD and to.dtype.element_ty == gl.float32:
        gl.atomic_add(to, values, there, sem="relaxed")
    else:
        if ADD:
            values += gl.load(to, there, other=0.0).to(gl.float32)
        gl.store(to, values.to(to.dtype.element_ty), there)


@gluon.jit
def _group_rows(
    room, order, turns, pointers, sizes, WHOLE: gl.constexpr, ADD: gl.constexpr,
    GROUP: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr, ORDERED: gl.constexpr,
):  # fmt: skip
    """A group of four warps: 64 rows of every item. WHOLE: every item has 256 columns."""
    _, _, y_ptr = pointers
    experts, out_room, out_width, steps, places = sizes
    # Four threads that have a row exchange what they hold, so that each stores 16 bytes.
    STORE: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4], [8, 0], [0, 32], [0, 64]],
        [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [64, 128],
    )  # fmt: skip
    kind: gl.constexpr = y_ptr.dtype.element_ty
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32])
    count = 0
    number = 0
    turn = 1
    column, expert, begin, _ = take(turns, 0)
    begin += GROUP * 64
    at, scales = _aim_rows(pointers, sizes, column, expert, begin)
    while expert >= 0:
        first = gl.zeros([64, 128], gl.float32, LAYOUT)
        second = gl.zeros([64, 128], gl.float32, LAYOUT)
        n = begin + gl.arange(0, 64, gl.SliceLayout(1, STORE))
        channel = column * 256 + gl.arange(0, 128, gl.SliceLayout(0, STORE))
        if expert < experts:
            # The scales of x's runs of channels lie `places` apart.
            if WHOLE:
                first, second = _multiply_rows(
                    room,
                    order,
                    number,
                    count,
                    steps,
                    at,
                    scales,
                    places,
                    True,
                    GROUP,
                    GROUPS,
                    STAGES,
                    ORDERED,
                )
                number += 2 * steps
            else:
                if column * 256 + 128 < out_room:
                    first, second = _multiply_rows(
                        room,
                        order,
                        number,
                        count,
                        steps,
                        at,
                        scales,
                        places,
                        True,
                        GROUP,
                        GROUPS,
                        STAGES,
                        ORDERED,
                    )
                    number += 2 * steps
                else:
                    first, second = _multiply_rows(
                        room,
                        order,
                        number,
                        count,
                        steps,
                        at,
                        scales,
                        places,
                        False,
                        GROUP,
                        GROUPS,
                        STAGES,
                        ORDERED,
                    )
                    number += steps
            count += steps
        column, expert, begin, _ = take(turns, turn)
        turn += 1
        begin += GROUP * 64
        at, scales = _aim_rows(pointers, sizes, column, expert, begin)
        to = y_ptr + (n.to(gl.int64) * out_width)[:, None] + channel[None, :]
        if WHOLE and not ADD:
            gl.store(to, gl.convert_layout(first.to(kind), STORE))
            gl.store(to + 128, gl.convert_layout(second.to(kind), STORE))
        else:
            _put(to, first, STORE, (n >= 0)[:, None] & (channel < out_width)[None, :], ADD)
            _put(to + 128, second, STORE, (n >= 0)[:, None] & (channel + 128 < out_width)[None, :], ADD)


@gluon.jit(do_not_specialize=["items", "across", "experts", "out_room"])
def rows_kernel(
    x_desc, w_desc, x_scale_ptr, w_scale_ptr, of_tile_ptr, y_ptr, counter, items, across, experts, out_room,
    out_width, depth, places, WHOLE: gl.constexpr, ADD: gl.constexpr, STAGES: gl.constexpr, ORDERED: gl.constexpr,
):  # fmt: skip
    """y `[N, out_width]`: rows times their own matrix; zeros where they are nobody's."""
    GROUPS: gl.constexpr = 2
    room = make_room(x_desc, w_desc, 2, GROUPS, STAGES)
    order = order_room()
    turns = table_room(GROUPS)
    pointers = (x_scale_ptr, w_scale_ptr, y_ptr)
    sizes = (experts, out_room, out_width, depth // x_desc.block_type.shape[1], places)
    table = (of_tile_ptr, counter, items, across)
    descriptors = (x_desc, w_desc)
    shape = (experts, out_room, depth)
    gl.warp_specialize(
        [
            (_group_rows, (room, order, turns, pointers, sizes, WHOLE, ADD, 0, GROUPS, STAGES, ORDERED)),
            (_group_rows, (room, order, turns, pointers, sizes, WHOLE, ADD, 1, GROUPS, STAGES, ORDERED)),
            (_fetch_rows, (descriptors, room, turns, table, shape, GROUPS, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )


def rows_product(
    x: Tensor, x_scale: Tensor, w_EOD: Tensor, w_scale: Tensor, of_tile: Tensor, y: Tensor, add: bool
) -> None:
    """`fp8_train_products.rows_product` of codes and scales, into y `[N, O]`."""
    experts, out_room, depth = w_EOD.shape
    across = -(-out_room // 256)
    items = x.shape[0] // 128 * across
    rows_kernel[(min(processors(x), items),)](
        descriptor(x, 64), descriptor(w_EOD.flatten(0, 1), 128), x_scale, w_scale, of_tile, y,
        of_tile.new_zeros(1), items, across, experts, out_room, y.shape[1], depth, x_scale.stride(1),
        WHOLE=y.shape[1] % 256 == 0, ADD=add, STAGES=STAGES, ORDERED=ORDERED, num_warps=4,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------- matrices


@gluon.jit
def _fetch_tokens(
    descriptors, room, columns, turns, table, sizes,
    GROUPS: gl.constexpr, STAGES: gl.constexpr, BAND: gl.constexpr,
):  # fmt: skip
    """The fetching warp: 128 tokens a step of 64 outputs for each group and of 256, or the last 128, channels, with
    the channels' scales."""
    dy_desc, x_desc, s_desc = descriptors
    dy_tiles, x_tiles, full, free = room
    ends_ptr, counter, items = table
    down, across, width_room = sizes
    BYTES: gl.constexpr = (
        GROUPS * dy_desc.block_type.nbytes + x_desc.block_type.nbytes + s_desc.block_type.nbytes
    )
    MORE: gl.constexpr = x_desc.block_type.nbytes
    count = 0
    turn = 0
    item = gl.program_id(0)
    while item < items:
        expert = item // (down * across)
        place = item % (down * across)
        begin = gl.load(ends_ptr + expert - 1, expert > 0, other=0)
        end = gl.load(ends_ptr + expert)
        following = gl.atomic_add(counter, 1, sem="relaxed") + gl.num_programs(0)
        top = place // (BAND * across) * BAND
        high = gl.minimum(BAND, down - top)
        row = (top + place % (BAND * across) % high) * 128
        column = place % (BAND * across) // high * 256
        hand_out(turns, turn, row // 128 * across + column // 256, expert, begin, end)
        turn += 1
        both = column + 128 < width_room
        for start in range(begin, end, 128):
            stage = count % STAGES
            mbarrier.wait(free.index(stage), ((count // STAGES) & 1) ^ 1)
            bar = full.index(stage)
            mbarrier.expect(bar, BYTES + MORE, pred=both)
            mbarrier.expect(bar, BYTES, pred=both == 0)
            for g in gl.static_range(GROUPS):
                rows = dy_tiles.index(GROUPS * stage + g)
                tma.async_copy_global_to_shared(dy_desc, [row + 64 * g, start], bar, rows)
            tma.async_copy_global_to_shared(x_desc, [column, start], bar, x_tiles.index(2 * stage))
            tma.async_copy_global_to_shared(
                x_desc, [column + 128, start], bar, x_tiles.index(2 * stage + 1), pred=both
            )
            tma.async_copy_global_to_shared(s_desc, [start // 128, column], bar, columns.index(stage))
            count += 1
        item = following
    hand_out(turns, turn, 0, -1, 0, 0)


@gluon.jit
def _multiply_tokens(
    room, order, number, columns, count, many, row_ptrs, row_scale, jump,
    BOTH: gl.constexpr, GROUP: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr, ORDERED: gl.constexpr,
):  # fmt: skip
    """The products of a group's 64 outputs with both halves of `many` tiles from tile number `count` on, or with the
    first alone: fp32 `[64, 128]` twice. `row_scale` is the first of the outputs' scales, the next are `jump` further;
    `columns` has the channels'. `number`: products of this group so far."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32])
    ACROSS: gl.constexpr = gl.SliceLayout(0, LAYOUT)
    dy_tiles, x_tiles, full, free = room
    first = gl.zeros([64, 128], gl.float32, LAYOUT)
    second = gl.zeros([64, 128], gl.float32, LAYOUT)
    part = gl.zeros([64, 128], gl.float32, LAYOUT)
    at = jump
    for step in range(many):
        stage = (count + step) % STAGES
        mbarrier.wait(full.index(stage), ((count + step) // STAGES) & 1)
        dy = dy_tiles.index(GROUPS * stage + GROUP)
        await_turn(order, number, GROUP, ORDERED)
        part = warpgroup_mma(dy, x_tiles.index(2 * stage).permute((1, 0)), part, use_acc=False, is_async=True)
        pass_on(order, GROUP, ORDERED)
        number += 1
        by = row_scale
        row_scale = gl.load(row_ptrs + at, step + 1 < many)
        at += jump
        part = warpgroup_mma_wait(0, deps=[part])
        first += part * by[:, None] * columns.index(2 * stage).load(ACROSS)[None, :]
        if BOTH:
            # Nothing is waited for here: the compiler is told that all was added before `part` is written again.
            first = warpgroup_mma_wait(0, deps=[first])
            await_turn(order, number, GROUP, ORDERED)
            part = warpgroup_mma(
                dy, x_tiles.index(2 * stage + 1).permute((1, 0)), part, use_acc=False, is_async=True
            )
            pass_on(order, GROUP, ORDERED)
            number += 1
            part = warpgroup_mma_wait(0, deps=[part])
            second += part * by[:, None] * columns.index(2 * stage + 1).load(ACROSS)[None, :]
        mbarrier.arrive(free.index(stage))
    return first, second


@gluon.jit
def _aim_tokens(dy_scale_ptr, sizes, place, expert, begin, end, GROUP: gl.constexpr):
    """Where the scales of an item's outputs lie, and the first of them."""
    _, _, across, _, d_group = sizes
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32])
    row = place // across * 128 + GROUP * 64 + gl.arange(0, 64, gl.SliceLayout(1, LAYOUT))
    row_ptrs = dy_scale_ptr + begin // 128 * d_group + row
    return row_ptrs, gl.load(row_ptrs, begin < end, other=0.0)


@gluon.jit
def _group_tokens(
    room, order, columns, turns, pointers, sizes, WHOLE: gl.constexpr, ADD: gl.constexpr,
    GROUP: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr, ORDERED: gl.constexpr,
):  # fmt: skip
    """A group of four warps: 64 outputs of every item. WHOLE: every item lies inside the matrix."""
    dy_scale_ptr, dw_ptr = pointers
    out, width, across, width_room, d_group = sizes
    # Four threads that have a row exchange what they hold, so that each stores 16 bytes.
    FOUR: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [8, 0], [0, 16], [0, 32], [0, 64]],
        [[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [64, 128],
    )  # fmt: skip
    EIGHT: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4], [8, 0], [0, 32], [0, 64]],
        [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [64, 128],
    )  # fmt: skip
    STORE: gl.constexpr = FOUR if dw_ptr.dtype.element_ty == gl.float32 else EIGHT
    kind: gl.constexpr = dw_ptr.dtype.element_ty
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32])
    count = 0
    number = 0
    turn = 1
    place, expert, begin, end = take(turns, 0)
    row_ptrs, row_scale = _aim_tokens(dy_scale_ptr, sizes, place, expert, begin, end, GROUP)
    while expert >= 0:
        first = gl.zeros([64, 128], gl.float32, LAYOUT)
        second = gl.zeros([64, 128], gl.float32, LAYOUT)
        o = place // across * 128 + GROUP * 64 + gl.arange(0, 64, gl.SliceLayout(1, STORE))
        left = place % across * 256
        channel = left + gl.arange(0, 128, gl.SliceLayout(0, STORE))
        to = dw_ptr + (
            expert.to(gl.int64) * out * width + (o.to(gl.int64) * width)[:, None] + channel[None, :]
        )
        many = (end - begin) // 128
        if WHOLE:
            first, second = _multiply_tokens(
                room, order, number, columns, count, many, row_ptrs, row_scale, d_group,
                True, GROUP, GROUPS, STAGES, ORDERED,
            )  # fmt: skip
            number += 2 * many
        else:
            if left + 128 < width_room:
                first, second = _multiply_tokens(
                    room, order, number, columns, count, many, row_ptrs, row_scale, d_group,
                    True, GROUP, GROUPS, STAGES, ORDERED,
                )  # fmt: skip
                number += 2 * many
            else:
                first, second = _multiply_tokens(
                    room, order, number, columns, count, many, row_ptrs, row_scale, d_group,
                    False, GROUP, GROUPS, STAGES, ORDERED,
                )  # fmt: skip
                number += many
        count += many
        place, expert, begin, end = take(turns, turn)
        turn += 1
        row_ptrs, row_scale = _aim_tokens(dy_scale_ptr, sizes, place, expert, begin, end, GROUP)
        if WHOLE and not ADD:
            gl.store(to, gl.convert_layout(first.to(kind), STORE))
            gl.store(to + 128, gl.convert_layout(second.to(kind), STORE))
        else:
            _put(to, first, STORE, (o < out)[:, None] & (channel < width)[None, :], ADD)
            _put(to + 128, second, STORE, (o < out)[:, None] & (channel + 128 < width)[None, :], ADD)


@gluon.jit(do_not_specialize=["items", "down", "across", "width_room"])
def matrix_kernel(
    dy_desc, x_desc, s_desc, dy_scale_ptr, ends_ptr, dw_ptr, counter, items, down, across, out, width, width_room,
    d_group, WHOLE: gl.constexpr, ADD: gl.constexpr, STAGES: gl.constexpr, ORDERED: gl.constexpr,
    BAND: gl.constexpr,
):  # fmt: skip
    """dw `[E, out, width]`: transposed rows times transposed rows, over each matrix's tokens."""
    GROUPS: gl.constexpr = 2
    room = make_room(dy_desc, x_desc, 2, GROUPS, STAGES)
    order = order_room()
    fetched = gl.allocate_shared_memory(s_desc.dtype, [STAGES, 1, 256], s_desc.layout)
    columns = fetched._reinterpret(gl.float32, [2 * STAGES, 128], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    turns = table_room(GROUPS)
    pointers = (dy_scale_ptr, dw_ptr)
    sizes = (out, width, across, width_room, d_group)
    table = (ends_ptr, counter, items)
    descriptors = (dy_desc, x_desc, s_desc)
    shape = (down, across, width_room)
    gl.warp_specialize(
        [
            (
                _group_tokens,
                (room, order, columns, turns, pointers, sizes, WHOLE, ADD, 0, GROUPS, STAGES, ORDERED),
            ),
            (
                _group_tokens,
                (room, order, columns, turns, pointers, sizes, WHOLE, ADD, 1, GROUPS, STAGES, ORDERED),
            ),
            (_fetch_tokens, (descriptors, room, fetched, turns, table, shape, GROUPS, STAGES, BAND)),
        ],
        [4, 1],
        [240, 24],
    )


def _scale_rows(scale: Tensor) -> Any:
    """256 scales of one run of tokens at a time, of scales `[D, N / 128]` that lie rows side by side."""
    layout = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
    return TensorDescriptor(scale.t(), list(scale.t().shape), [scale.stride(1), 1], [1, 256], layout)


def matrix_product(
    dy: Tensor, dy_scale: Tensor, x: Tensor, x_scale: Tensor, ends: Tensor, dw: Tensor, add: bool
) -> None:
    """`fp8_train_products.matrix_product` of codes and scales, into dw `[E, O, D]`, contiguous."""
    experts, out, width = dw.shape
    down, across = dy.shape[0] // 128, -(-x.shape[0] // 256)
    items = experts * down * across
    matrix_kernel[(min(processors(x), items),)](
        descriptor(dy, 64), descriptor(x, 128), _scale_rows(x_scale), dy_scale, ends, dw, ends.new_zeros(1), items,
        down, across, out, width, x.shape[0], dy_scale.stride(1),
        WHOLE=out % 128 == 0 and width % 256 == 0, ADD=add, STAGES=STAGES, ORDERED=ORDERED, BAND=BAND, num_warps=4,
    )  # fmt: skip


def supported(codes: Tensor) -> bool:
    """Whether these kernels run where the codes lie."""
    return AVAILABLE and codes.is_cuda and torch.cuda.get_device_capability(codes.device)[0] == 9
