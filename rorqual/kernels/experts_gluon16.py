"""The grouped bf16 products of `experts` for large batches on Hopper, in Gluon.

As in `experts_gluon` a warp fetches and groups of four warps multiply: here three groups, each with 64 of a tile's
192 pairs and twice 128 output channels, which are gate and up of the same 128, or 256 of down. What bounds these
products is what the cache delivers, so tiles are as large as registers allow. Right on an H200, but not timed there
yet: `experts.plan` does not choose it, a plan given by hand can.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from torch import Tensor

from rorqual.kernels.experts_gluon import (
    AVAILABLE,
    Held,
    descriptor,
    gl,
    gluon,
    processors,
    reciprocal,
)

if AVAILABLE:
    from triton.experimental.gluon.language.nvidia.hopper import (
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_wait,
    )

ROWS = 192
"""Pairs of a tile."""


@gluon.jit
def _multiply(room, count, steps, GROUP: gl.constexpr, STAGES: gl.constexpr, LAYOUT: gl.constexpr):
    """Products of 64 rows with both halves of `steps` tiles, from tile number `count` on: fp32 `[64, 128]` twice."""
    x_tiles, w_tiles, full, free = room
    first = gl.zeros([64, 128], gl.float32, LAYOUT)
    second = gl.zeros([64, 128], gl.float32, LAYOUT)
    for step in range(steps):
        stage = (count + step) % STAGES
        mbarrier.wait(full.index(stage), ((count + step) // STAGES) & 1)
        x = x_tiles.index(3 * stage + GROUP)
        first = warpgroup_mma(x, w_tiles.index(2 * stage).permute((1, 0)), first, is_async=True)
        second = warpgroup_mma(x, w_tiles.index(2 * stage + 1).permute((1, 0)), second, is_async=True)
        # The step before is done with its tiles.
        first, second = warpgroup_mma_wait(2, deps=[first, second])
        mbarrier.arrive(free.index((count + step + STAGES - 1) % STAGES), pred=step > 0)
    first, second = warpgroup_mma_wait(0, deps=[first, second])
    mbarrier.arrive(free.index((count + steps - 1) % STAGES))
    return first, second


@gluon.jit
def _fetch(
    descriptors, room, tiles_ptr, tiles, items, across, tokens, experts, width, hidden,
    UP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The fetching warp: 64 rows of x or inner for each group, and 128 rows of two matrices, or of one twice."""
    x_desc, first_desc, second_desc, shared_first_desc, shared_second_desc = descriptors
    x_tiles, w_tiles, full, free = room
    DEPTH: gl.constexpr = x_desc.block_type.shape[1]
    steps = (hidden if UP else width) // DEPTH
    count = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        tile = item // across
        expert = gl.load(tiles_ptr + tile)
        if expert >= 0:
            begin = gl.load(tiles_ptr + tiles + tile)
            extra = gl.maximum(expert - experts, 0)
            column = 0
            if UP:
                row = item % across * 128
                other = row
                if expert < experts:
                    row += expert * width
                    other += expert * width
                else:
                    # All shared experts read the same rows of x.
                    begin -= extra * tokens
                    row += extra * width
                    other += extra * width
            else:
                row = item % across * 256
                if expert < experts:
                    row += expert * hidden
                column = extra * width
                other = row + 128
            for step in range(steps):
                stage = count % STAGES
                mbarrier.wait(free.index(stage), ((count // STAGES) & 1) ^ 1)
                bar = full.index(stage)
                mbarrier.expect(bar, 3 * x_desc.block_type.nbytes + 2 * first_desc.block_type.nbytes)
                start = step * DEPTH
                for g in gl.static_range(3):
                    rows = x_tiles.index(3 * stage + g)
                    tma.async_copy_global_to_shared(x_desc, [begin + 64 * g, start], bar, rows)
                start += column
                one = w_tiles.index(2 * stage)
                two = w_tiles.index(2 * stage + 1)
                if expert < experts:
                    tma.async_copy_global_to_shared(first_desc, [row, start], bar, one)
                    tma.async_copy_global_to_shared(second_desc, [other, start], bar, two)
                else:
                    tma.async_copy_global_to_shared(shared_first_desc, [row, start], bar, one)
                    tma.async_copy_global_to_shared(shared_second_desc, [other, start], bar, two)
                count += 1


@gluon.jit
def _up_group(room, pointers, sizes, LIMIT: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr):
    """Four warps: 64 pairs of every item."""
    weights_ptr, order_ptr, tiles_ptr, inner_ptr = pointers
    limit, tiles, items, across, pairs, width, hidden = sizes
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    STORE: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    count = 0
    steps = hidden // room[0].shape[2]
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        tile = item // across
        if gl.load(tiles_ptr + tile) >= 0:
            gate, up = _multiply(room, count, steps, GROUP, STAGES, LAYOUT)
            count += steps
            begin = gl.load(tiles_ptr + tiles + tile) + GROUP * 64
            end = gl.load(tiles_ptr + 2 * tiles + tile)
            if LIMIT:
                gate = gl.minimum(gate, limit)
                up = gl.minimum(gl.maximum(up, -limit), limit)
            place = begin + gl.arange(0, 64, gl.SliceLayout(1, LAYOUT))
            there = place < end
            pair = gl.load(order_ptr + place, there, other=0)
            weight = gl.load(weights_ptr + pair, there & (pair < pairs), other=1.0)
            inner = gate * reciprocal(1.0 + gl.exp(-gate)) * up * weight[:, None]
            at = begin + gl.arange(0, 64, gl.SliceLayout(1, STORE))
            channel = item % across * 128 + gl.arange(0, 128, gl.SliceLayout(0, STORE))
            to = inner_ptr + (at.to(gl.int64) * width)[:, None] + channel[None, :]
            gl.store(to, gl.convert_layout(inner.to(inner_ptr.dtype.element_ty), STORE), (at < end)[:, None])


@gluon.jit
def _down_group(room, pointers, sizes, GROUP: gl.constexpr, STAGES: gl.constexpr):
    """Four warps: 64 pairs of every item."""
    order_ptr, tiles_ptr, y_ptr = pointers
    tiles, items, across, width, hidden = sizes
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    STORE: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    kind: gl.constexpr = y_ptr.dtype.element_ty
    steps = width // room[0].shape[2]
    count = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        tile = item // across
        if gl.load(tiles_ptr + tile) >= 0:
            first, second = _multiply(room, count, steps, GROUP, STAGES, LAYOUT)
            count += steps
            at = gl.load(tiles_ptr + tiles + tile) + GROUP * 64 + gl.arange(0, 64, gl.SliceLayout(1, STORE))
            there = (at < gl.load(tiles_ptr + 2 * tiles + tile))[:, None]
            pair = gl.load(order_ptr + at, at < gl.load(tiles_ptr + 2 * tiles + tile), other=0).to(gl.int64)
            channel = item % across * 256 + gl.arange(0, 128, gl.SliceLayout(0, STORE))
            to = y_ptr + (pair * hidden)[:, None] + channel[None, :]
            gl.store(to, gl.convert_layout(first.to(kind), STORE), there)
            gl.store(to + 128, gl.convert_layout(second.to(kind), STORE), there)


@gluon.jit
def _room(x_desc, w_desc, STAGES: gl.constexpr):
    """Room for STAGES steps' tiles, and barriers that say when a stage is full and when it is free again."""
    DEPTH: gl.constexpr = x_desc.block_type.shape[1]
    x_tiles = gl.allocate_shared_memory(x_desc.dtype, [3 * STAGES, 64, DEPTH], x_desc.layout)
    w_tiles = gl.allocate_shared_memory(w_desc.dtype, [2 * STAGES, 128, DEPTH], w_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(free.index(i), count=3)
    return x_tiles, w_tiles, full, free


@gluon.jit
def gate_up_kernel(
    x_desc, gate_desc, up_desc, shared_gate_desc, shared_up_desc, weights_ptr, order_ptr, tiles_ptr, inner_ptr, limit,
    tiles, items, across, pairs, tokens, experts, width, hidden, LIMIT: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """inner `[P, W]`: weight * swiglu of rows of x that lie by place already."""
    room = _room(x_desc, gate_desc, STAGES)
    pointers = (weights_ptr, order_ptr, tiles_ptr, inner_ptr)
    sizes = (limit, tiles, items, across, pairs, width, hidden)
    descriptors = (x_desc, gate_desc, up_desc, shared_gate_desc, shared_up_desc)
    gl.warp_specialize(
        [
            (_up_group, (room, pointers, sizes, LIMIT, 0, STAGES)),
            (_up_group, (room, pointers, sizes, LIMIT, 1, STAGES)),
            (_up_group, (room, pointers, sizes, LIMIT, 2, STAGES)),
            (_fetch, (descriptors, room, tiles_ptr, tiles, items, across, tokens, experts, width, hidden, True,
                      STAGES)),
        ],
        [4, 4, 1],
        [160, 160, 24],
    )  # fmt: skip


@gluon.jit
def down_kernel(
    x_desc, w_desc, shared_desc, order_ptr, tiles_ptr, y_ptr, tiles, items, across, experts, width, hidden,
    STAGES: gl.constexpr,
):  # fmt: skip
    """y `[pairs, D]`, by pair number: inner `[P, W]` times the expert's down matrix."""
    room = _room(x_desc, w_desc, STAGES)
    pointers = (order_ptr, tiles_ptr, y_ptr)
    sizes = (tiles, items, across, width, hidden)
    descriptors = (x_desc, w_desc, w_desc, shared_desc, shared_desc)
    gl.warp_specialize(
        [
            (_down_group, (room, pointers, sizes, 0, STAGES)),
            (_down_group, (room, pointers, sizes, 1, STAGES)),
            (_down_group, (room, pointers, sizes, 2, STAGES)),
            (_fetch, (descriptors, room, tiles_ptr, tiles, items, across, experts, experts, width, hidden, False,
                      STAGES)),
        ],
        [4, 4, 1],
        [160, 160, 24],
    )  # fmt: skip


def gate_up(
    x: Tensor,
    weights: Tensor,
    order: Tensor,
    table: Tensor,
    routed: tuple[Held, Held],
    shared: tuple[Held, Held],
    inner: Tensor,
    limit: float | None,
    tokens: int,
    stages: int,
) -> None:
    """See `experts_gluon.gate_up`."""
    gate, up = routed[0][0], routed[1][0]
    count, width, hidden = gate.shape
    tiles, across = table.shape[1], width // 128
    gate_up_kernel[(min(processors(x), tiles * across),)](
        descriptor(x, 64), descriptor(gate.flatten(0, 1), 128), descriptor(up.flatten(0, 1), 128),
        descriptor(shared[0][0], 128), descriptor(shared[1][0], 128), weights, order, table, inner, limit or 0.0,
        tiles, tiles * across, across, weights.numel(), tokens, count, width, hidden, LIMIT=limit is not None,
        STAGES=stages, num_warps=4,
    )  # fmt: skip


def down(
    inner: Tensor, order: Tensor, table: Tensor, routed: Held, shared: Held, parts: Tensor, stages: int
) -> None:
    """See `experts_gluon.down`."""
    weight = routed[0]
    count, hidden, width = weight.shape
    tiles, across = table.shape[1], hidden // 256
    down_kernel[(min(processors(inner), tiles * across),)](
        descriptor(inner, 64), descriptor(weight.flatten(0, 1), 128), descriptor(shared[0], 128), order, table,
        parts, tiles, tiles * across, across, count, width, hidden, STAGES=stages, num_warps=4,
    )  # fmt: skip
