"""The gradients of weights of FP8 training on Hopper, in Gluon: see `fp8_train_products`.

Items of 128 outputs and 256 channels of one gradient, the last of a row perhaps 128 wide; `gluon_rings` has what feeds
the groups. Both sides have a scale a row, and the columns' come by the copy engine as the tiles do.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

from torch import Tensor

from rorqual.kernels.gluon_rings import (
    TensorDescriptor,
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

STAGES = 4
"""Steps' tiles under way or in use."""

APART = 0
"""As `fp8_train_gluon.APART`."""

BAND = 16
"""Tiles of outputs of a weight's gradient that are worked side by side: what a wave of programs reads then is a square
of the product rather than a strip."""


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
    room, columns, count, many, row_ptrs, row_scale, jump,
    BOTH: gl.constexpr, GROUP: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The products of a group's 64 outputs with both halves of `many` tiles from tile number `count` on, or with the
    first alone: fp32 `[64, 128]` twice. `row_scale` is the first of the outputs' scales, the next are `jump` further;
    `columns` has the channels'."""
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
        part = warpgroup_mma(dy, x_tiles.index(2 * stage).permute((1, 0)), part, use_acc=False, is_async=True)
        by = row_scale
        row_scale = gl.load(row_ptrs + at, step + 1 < many)
        at += jump
        part = warpgroup_mma_wait(0, deps=[part])
        first += part * by[:, None] * columns.index(2 * stage).load(ACROSS)[None, :]
        if BOTH:
            # Nothing is waited for here: the compiler is told that all was added before `part` is written again.
            first = warpgroup_mma_wait(0, deps=[first])
            part = warpgroup_mma(
                dy, x_tiles.index(2 * stage + 1).permute((1, 0)), part, use_acc=False, is_async=True
            )
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
    room, columns, turns, pointers, sizes, WHOLE: gl.constexpr, ADD: gl.constexpr,
    GROUP: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr, APART: gl.constexpr,
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
    count = begin_later(APART if GROUP == 1 else 0)
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
                room, columns, count, many, row_ptrs, row_scale, d_group,
                True, GROUP, GROUPS, STAGES,
            )  # fmt: skip
        else:
            if left + 128 < width_room:
                first, second = _multiply_tokens(
                    room, columns, count, many, row_ptrs, row_scale, d_group,
                    True, GROUP, GROUPS, STAGES,
                )  # fmt: skip
            else:
                first, second = _multiply_tokens(
                    room, columns, count, many, row_ptrs, row_scale, d_group,
                    False, GROUP, GROUPS, STAGES,
                )  # fmt: skip
        count += many
        place, expert, begin, end = take(turns, turn)
        turn += 1
        row_ptrs, row_scale = _aim_tokens(dy_scale_ptr, sizes, place, expert, begin, end, GROUP)
        if WHOLE and not ADD:
            gl.store(to, gl.convert_layout(first.to(kind), STORE))
            gl.store(to + 128, gl.convert_layout(second.to(kind), STORE))
        else:
            put(to, first, STORE, (o < out)[:, None] & (channel < width)[None, :], ADD)
            put(to + 128, second, STORE, (o < out)[:, None] & (channel + 128 < width)[None, :], ADD)


@gluon.jit(do_not_specialize=["items", "down", "across", "width_room"])
def product_over_tokens(
    dy_desc, x_desc, s_desc, dy_scale_ptr, ends_ptr, dw_ptr, counter, items, down, across, out, width, width_room,
    d_group, WHOLE: gl.constexpr, ADD: gl.constexpr, STAGES: gl.constexpr,
    BAND: gl.constexpr, APART: gl.constexpr,
):  # fmt: skip
    """dw `[E, out, width]`: transposed rows times transposed rows, over each matrix's tokens."""
    GROUPS: gl.constexpr = 2
    room = make_room(dy_desc, x_desc, 2, GROUPS, STAGES)
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
                (room, columns, turns, pointers, sizes, WHOLE, ADD, 0, GROUPS, STAGES, APART),
            ),
            (
                _group_tokens,
                (room, columns, turns, pointers, sizes, WHOLE, ADD, 1, GROUPS, STAGES, APART),
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
    product_over_tokens[(min(processors(x), items),)](
        descriptor(dy, 64), descriptor(x, 128), _scale_rows(x_scale), dy_scale, ends, dw, ends.new_zeros(1), items,
        down, across, out, width, x.shape[0], dy_scale.stride(1),
        WHOLE=out % 128 == 0 and width % 256 == 0, ADD=add, STAGES=STAGES, BAND=BAND, APART=APART, num_warps=4,
    )  # fmt: skip
