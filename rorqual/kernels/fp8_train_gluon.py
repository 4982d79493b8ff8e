"""The products of rows and matrices of FP8 training on Hopper, in Gluon: see `fp8_train_products`.

Items of 128 rows and 256 columns of one matrix's result, the last of a row perhaps 128 wide; `gluon_rings` has what
feeds the groups.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
from torch import Tensor

from rorqual.kernels.gluon_rings import (
    AVAILABLE,
    begin_later,
    descriptor,
    gl,
    gluon,
    hand_out,
    make_room,
    mbarrier,
    processors,
    put,
    table_room,
    take,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from rorqual.kernels.gluon_scaled import first_scales

STAGES = 4
"""Steps' tiles under way or in use."""

APART = 0
"""Nanoseconds that the second group begins later: so far apart, one multiplies while the other writes results."""


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
    room, count, many, pointers, scales, jump,
    BOTH: gl.constexpr, GROUP: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The products of a group's 64 rows with both halves of `many` tiles from tile number `count` on, or with the
    first alone: fp32 `[64, 128]` twice. `pointers` and `scales`: those of `first_scales`; x's go on `jump` further.
    """
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
        part = warpgroup_mma(x, w_tiles.index(2 * stage).permute((1, 0)), part, use_acc=False, is_async=True)
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
            part = warpgroup_mma(
                x, w_tiles.index(2 * stage + 1).permute((1, 0)), part, use_acc=False, is_async=True
            )
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
def _group_rows(
    room, turns, pointers, sizes, WHOLE: gl.constexpr, ADD: gl.constexpr,
    GROUP: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr, APART: gl.constexpr,
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
    count = begin_later(APART if GROUP == 1 else 0)
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
                    room, count, steps, at, scales, places, True, GROUP, GROUPS, STAGES
                )
            else:
                if column * 256 + 128 < out_room:
                    first, second = _multiply_rows(
                        room, count, steps, at, scales, places, True, GROUP, GROUPS, STAGES
                    )
                else:
                    first, second = _multiply_rows(
                        room, count, steps, at, scales, places, False, GROUP, GROUPS, STAGES
                    )
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
            put(to, first, STORE, (n >= 0)[:, None] & (channel < out_width)[None, :], ADD)
            put(to + 128, second, STORE, (n >= 0)[:, None] & (channel + 128 < out_width)[None, :], ADD)


@gluon.jit(do_not_specialize=["items", "across", "experts", "out_room"])
def product_of_rows(
    x_desc, w_desc, x_scale_ptr, w_scale_ptr, of_tile_ptr, y_ptr, counter, items, across, experts, out_room,
    out_width, depth, places, WHOLE: gl.constexpr, ADD: gl.constexpr, STAGES: gl.constexpr, APART: gl.constexpr,
):  # fmt: skip
    """y `[N, out_width]`: rows times their own matrix; zeros where they are nobody's."""
    GROUPS: gl.constexpr = 2
    room = make_room(x_desc, w_desc, 2, GROUPS, STAGES)
    turns = table_room(GROUPS)
    pointers = (x_scale_ptr, w_scale_ptr, y_ptr)
    sizes = (experts, out_room, out_width, depth // x_desc.block_type.shape[1], places)
    table = (of_tile_ptr, counter, items, across)
    descriptors = (x_desc, w_desc)
    shape = (experts, out_room, depth)
    gl.warp_specialize(
        [
            (_group_rows, (room, turns, pointers, sizes, WHOLE, ADD, 0, GROUPS, STAGES, APART)),
            (_group_rows, (room, turns, pointers, sizes, WHOLE, ADD, 1, GROUPS, STAGES, APART)),
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
    product_of_rows[(min(processors(x), items),)](
        descriptor(x, 64), descriptor(w_EOD.flatten(0, 1), 128), x_scale, w_scale, of_tile, y,
        of_tile.new_zeros(1), items, across, experts, out_room, y.shape[1], depth, x_scale.stride(1),
        WHOLE=y.shape[1] % 256 == 0, ADD=add, STAGES=STAGES, APART=APART, num_warps=4,
    )  # fmt: skip


def supported(codes: Tensor) -> bool:
    """Whether these kernels run where the codes lie."""
    return AVAILABLE and codes.is_cuda and torch.cuda.get_device_capability(codes.device)[0] == 9
