"""The products of FP8 experts with some tens of pairs each on Hopper, in Gluon: what counts is that matrices are read
without a pause.

`gluon_rings` says how programs share the items. One group of four warps multiplies: the matrix stands on the rows of
the tensor core's tile, the pairs on its columns. Items are 128 channels of gate and up, or 256 of down. Sums are
those of `experts_triton`: every 128 channels' product is added up in fp32 times its scales.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from torch import Tensor

from rorqual.kernels.experts_triton import follow, to_fp8
from rorqual.kernels.gluon_rings import (
    COUNTS,
    Held,
    described,
    descriptor,
    gl,
    gluon,
    hand_out,
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
from rorqual.kernels.gpu import tl, triton


@triton.jit(do_not_specialize=["pairs", "tokens"])
def gather_kernel(
    x_ptr, order_ptr, codes_ptr, scales_ptr, taken_ptr, pairs, tokens, hidden, K: tl.constexpr, GROUPS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """codes `[pairs + tokens, D]` and scales `[.., D / 128]` of rows of x `[N, D]`: by place in `order`, then by token.
    A program has a row and `GROUPS` * 128 channels; `taken` `[2]` int32 is zeroed for the products. Places that no
    pair has get some row."""
    if PDL:
        follow()
    row = tl.program_id(0)
    if (row == 0) & (tl.program_id(1) == 0):
        tl.store(taken_ptr + tl.arange(0, 2), tl.zeros((2,), tl.int32))
    token = row - pairs
    if row < pairs:
        pair = tl.load(order_ptr + row)
        token = tl.minimum(tl.maximum(pair, 0), pairs - 1) // K
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    blocks = hidden // 128
    inside = (group < blocks)[:, None]
    channel = group[:, None] * 128 + tl.arange(0, 128)[None, :]
    x = tl.load(x_ptr + token.to(tl.int64) * hidden + channel, inside, other=0.0)
    codes, scale = to_fp8(x.to(tl.float32))
    tl.store(codes_ptr + row.to(tl.int64) * hidden + channel, codes, inside)
    tl.store(scales_ptr + row.to(tl.int64) * blocks + group, scale, group < blocks)


@gluon.jit
def _multiply(
    room, count, steps, x_scale_ptrs, one_scale_ptr, two_scale_ptr, ROWS: gl.constexpr, STAGES: gl.constexpr
):
    """The products of both matrices' tiles with `ROWS` rows, `steps` tiles from tile number `count` on: fp32
    `[128, ROWS]` twice."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 32])
    x_tiles, w_tiles, full, free = room
    first = gl.zeros([128, ROWS], gl.float32, LAYOUT)
    second = gl.zeros([128, ROWS], gl.float32, LAYOUT)
    part = gl.zeros([128, ROWS], gl.float32, LAYOUT)
    # The scales of the next step arrive while this one's products are under way.
    x_scale = gl.load(x_scale_ptrs)
    one = gl.load(one_scale_ptr)
    two = gl.load(two_scale_ptr)
    for step in range(steps):
        stage = (count + step) % STAGES
        mbarrier.wait(full.index(stage), ((count + step) // STAGES) & 1)
        x = x_tiles.index(stage).permute((1, 0))
        part = warpgroup_mma(w_tiles.index(2 * stage), x, part, use_acc=False, is_async=True)
        one_factor = x_scale * one
        two_factor = x_scale * two
        more = step + 1 < steps
        x_scale = gl.load(x_scale_ptrs + step + 1, more)
        one = gl.load(one_scale_ptr + step + 1, more)
        two = gl.load(two_scale_ptr + step + 1, more)
        part = warpgroup_mma_wait(0, deps=[part])
        first += part * one_factor[None, :]
        # Nothing is waited for here: the compiler is told that all was added before `part` is written again.
        first = warpgroup_mma_wait(0, deps=[first])
        part = warpgroup_mma(w_tiles.index(2 * stage + 1), x, part, use_acc=False, is_async=True)
        part = warpgroup_mma_wait(0, deps=[part])
        mbarrier.arrive(free.index(stage))
        second += part * two_factor[None, :]
    return first, second


@gluon.jit
def _fetch(descriptors, room, turns, table, sizes, UP: gl.constexpr, STAGES: gl.constexpr):
    """The fetching warp: the rows of a tile, and 128 rows each of gate and up, or 256 of down."""
    x_desc, one_desc, two_desc, shared_one_desc, shared_two_desc = descriptors
    x_tiles, w_tiles, full, free = room
    tiles_ptr, counter, tiles, items, across = table
    tokens, experts, width, hidden = sizes
    DEPTH: gl.constexpr = x_desc.block_type.shape[1]
    BYTES: gl.constexpr = x_desc.block_type.nbytes + 2 * one_desc.block_type.nbytes
    steps = (hidden if UP else width) // DEPTH
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
            extra = gl.maximum(expert - experts, 0)
            start = 0
            if UP:
                # All shared experts read the same rows, and their matrices lie below one another.
                begin -= extra * tokens
                one = column * 128 + gl.where(expert < experts, expert, extra) * width
                two = one
            else:
                # Those of down lie side by side.
                start = extra * width
                one = column * 256 + gl.where(expert < experts, expert, 0) * hidden
                two = one + 128
            for step in range(steps):
                stage = count % STAGES
                mbarrier.wait(free.index(stage), ((count // STAGES) & 1) ^ 1)
                bar = full.index(stage)
                mbarrier.expect(bar, BYTES)
                at = step * DEPTH
                tma.async_copy_global_to_shared(x_desc, [begin, at], bar, x_tiles.index(stage))
                upper = w_tiles.index(2 * stage)
                lower = w_tiles.index(2 * stage + 1)
                if expert < experts:
                    tma.async_copy_global_to_shared(one_desc, [one, at], bar, upper)
                    tma.async_copy_global_to_shared(two_desc, [two, at], bar, lower)
                else:
                    tma.async_copy_global_to_shared(shared_one_desc, [one, start + at], bar, upper)
                    tma.async_copy_global_to_shared(shared_two_desc, [two, start + at], bar, lower)
                count += 1
        item = following
    hand_out(turns, turn, 0, -1, 0, 0)


@gluon.jit
def _up_group(
    room,
    turns,
    pointers,
    shared_pointers,
    sizes,
    LIMIT: gl.constexpr,
    ROWS: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Four warps: swiglu of an item's channels, as codes."""
    x_scale_ptr, gate_scale_ptr, up_scale_ptr, weights_ptr, order_ptr, inner_ptr, inner_scale_ptr = pointers
    shared_gate_scale_ptr, shared_up_scale_ptr = shared_pointers
    limit, pairs, tokens, experts, width, steps = sizes
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 32])
    STORE: gl.constexpr = gl.BlockedLayout([16, 1], [8, 4], [1, 4], [0, 1])
    count = 0
    turn = 0
    column, expert, begin, end = take(turns, turn)
    while expert >= 0:
        turn += 1
        place = begin + gl.arange(0, ROWS, gl.SliceLayout(0, LAYOUT))
        there = place < end
        row = gl.minimum(place, end - 1)
        if expert < experts:
            at = (expert * (width // 128) + column) * steps
            gate_scale = gate_scale_ptr + at
            up_scale = up_scale_ptr + at
        else:
            row -= (expert - experts) * tokens
            at = ((expert - experts) * (width // 128) + column) * steps
            gate_scale = shared_gate_scale_ptr + at
            up_scale = shared_up_scale_ptr + at
        pair = gl.load(order_ptr + place, there, other=0)
        weight = gl.load(weights_ptr + pair, there & (pair < pairs), other=1.0)
        gate, up = _multiply(
            room, count, steps, x_scale_ptr + row * steps, gate_scale, up_scale, ROWS, STAGES
        )
        if LIMIT:
            gate = gl.minimum(gate, limit)
            up = gl.minimum(gl.maximum(up, -limit), limit)
        inner = gate * reciprocal(1.0 + gl.exp(-gate)) * up * weight[None, :]
        scale = gl.maximum(gl.max(gl.abs(inner), 0), 1e-4) / 448.0
        gl.store(inner_scale_ptr + place * (width // 128) + column, scale, there)
        codes = gl.convert_layout((inner * (1.0 / scale)[None, :]).to(inner_ptr.dtype.element_ty), STORE)
        at_place = begin + gl.arange(0, ROWS, gl.SliceLayout(0, STORE))
        channel = column * 128 + gl.arange(0, 128, gl.SliceLayout(1, STORE))
        to = inner_ptr + (at_place.to(gl.int64) * width)[None, :] + channel[:, None]
        gl.store(to, codes, (at_place < end)[None, :])
        count += steps
        column, expert, begin, end = take(turns, turn)


@gluon.jit
def _down_group(room, turns, pointers, sizes, ROWS: gl.constexpr, STAGES: gl.constexpr):
    """Four warps: 256 outputs of a tile's pairs."""
    x_scale_ptr, w_scale_ptr, shared_scale_ptr, order_ptr, y_ptr = pointers
    experts, shared, hidden, steps = sizes
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 32])
    STORE: gl.constexpr = gl.BlockedLayout([8, 1], [16, 2], [1, 4], [0, 1])
    kind: gl.constexpr = y_ptr.dtype.element_ty
    count = 0
    turn = 0
    column, expert, begin, end = take(turns, turn)
    while expert >= 0:
        turn += 1
        place = begin + gl.arange(0, ROWS, gl.SliceLayout(0, LAYOUT))
        at = begin + gl.arange(0, ROWS, gl.SliceLayout(0, STORE))
        pair = gl.load(order_ptr + at, at < end, other=0).to(gl.int64)
        one_scale = w_scale_ptr + (expert * (hidden // 128) + 2 * column) * steps
        two_scale = one_scale + steps
        if expert >= experts:
            one_scale = shared_scale_ptr + (2 * column * shared + expert - experts) * steps
            two_scale = one_scale + shared * steps
        x_scales = x_scale_ptr + gl.minimum(place, end - 1) * steps
        first, second = _multiply(room, count, steps, x_scales, one_scale, two_scale, ROWS, STAGES)
        channel = column * 256 + gl.arange(0, 128, gl.SliceLayout(1, STORE))
        to = y_ptr + (pair * hidden)[None, :] + channel[:, None]
        there = (at < end)[None, :]
        gl.store(to, gl.convert_layout(first.to(kind), STORE), there)
        gl.store(to + 128, gl.convert_layout(second.to(kind), STORE), there)
        count += steps
        column, expert, begin, end = take(turns, turn)


@gluon.jit(do_not_specialize=COUNTS)
def gate_up_kernel(
    x_desc, gate_desc, up_desc, shared_gate_desc, shared_up_desc, x_scale_ptr, gate_scale_ptr, up_scale_ptr,
    shared_gate_scale_ptr, shared_up_scale_ptr, weights_ptr, order_ptr, tiles_ptr, inner_ptr, inner_scale_ptr, counter,
    limit, tiles, items, across, pairs, tokens, experts, width, hidden, LIMIT: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """inner `[P, W]` (codes with scales `[P, W / 128]`): weight * swiglu of rows of x that lie by place already."""
    ROWS: gl.constexpr = x_desc.block_type.shape[0]
    room = make_room(x_desc, gate_desc, 2, 1, STAGES)
    turns = table_room(1)
    pointers = (x_scale_ptr, gate_scale_ptr, up_scale_ptr, weights_ptr, order_ptr, inner_ptr, inner_scale_ptr)
    common = (shared_gate_scale_ptr, shared_up_scale_ptr)
    sizes = (limit, pairs, tokens, experts, width, hidden // x_desc.block_type.shape[1])
    table = (tiles_ptr, counter, tiles, items, across)
    descriptors = (x_desc, gate_desc, up_desc, shared_gate_desc, shared_up_desc)
    shape = (tokens, experts, width, hidden)
    gl.warp_specialize(
        [
            (_up_group, (room, turns, pointers, common, sizes, LIMIT, ROWS, STAGES)),
            (_fetch, (descriptors, room, turns, table, shape, True, STAGES)),
        ],
        [1],
        [40],
    )


@gluon.jit(do_not_specialize=COUNTS)
def down_kernel(
    x_desc, w_desc, shared_desc, x_scale_ptr, w_scale_ptr, shared_scale_ptr, order_ptr, tiles_ptr, y_ptr, counter,
    tiles, items, across, tokens, experts, shared, width, hidden, STAGES: gl.constexpr,
):  # fmt: skip
    """y `[.., D]`, by pair number: inner `[P, W]` times the expert's down matrix."""
    ROWS: gl.constexpr = x_desc.block_type.shape[0]
    room = make_room(x_desc, w_desc, 2, 1, STAGES)
    turns = table_room(1)
    pointers = (x_scale_ptr, w_scale_ptr, shared_scale_ptr, order_ptr, y_ptr)
    sizes = (experts, shared, hidden, width // x_desc.block_type.shape[1])
    table = (tiles_ptr, counter, tiles, items, across)
    descriptors = (x_desc, w_desc, w_desc, shared_desc, shared_desc)
    shape = (tokens, experts, width, hidden)
    gl.warp_specialize(
        [
            (_down_group, (room, turns, pointers, sizes, ROWS, STAGES)),
            (_fetch, (descriptors, room, turns, table, shape, False, STAGES)),
        ],
        [1],
        [40],
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
    rows: int,
    stages: int,
) -> None:
    """See `experts_gluon.gate_up`, with tiles of `rows` pairs."""
    (gate, gate_scale), (up, up_scale) = routed
    (shared_gate, shared_gate_scale), (shared_up, shared_up_scale) = shared
    count, width, hidden = gate.shape
    tiles, across = table.shape[1], width // 128
    gate_up_kernel[(min(processors(x), tiles * across),)](
        descriptor(x, rows), descriptor(gate.flatten(0, 1), 128), descriptor(up.flatten(0, 1), 128),
        descriptor(shared_gate, 128), descriptor(shared_up, 128), scales, gate_scale, up_scale,
        shared_gate_scale, shared_up_scale, weights, order, table, inner, inner_scales, taken, limit or 0.0,
        tiles, tiles * across, across, weights.numel(), tokens, count, width, hidden, LIMIT=limit is not None,
        STAGES=stages, num_warps=4,
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
    rows: int,
    stages: int,
) -> None:
    """parts[order[p]] = inner[p] times the matrix `[D, W]` of p's expert, shared ones too. `taken` is an int32 zero;
    the table's tiles have up to `rows` pairs."""
    (weight, scale), (shared_weight, shared_scale) = routed, shared
    count, hidden, width = weight.shape
    tiles, across = table.shape[1], hidden // 256
    down_kernel[(min(processors(inner), tiles * across),)](
        descriptor(inner, rows), descriptor(weight.flatten(0, 1), 128), descriptor(shared_weight, 128),
        inner_scales, scale, shared_scale, order, table, parts, taken, tiles, tiles * across, across, tokens,
        count, extra, width, hidden, STAGES=stages, num_warps=4,
    )  # fmt: skip
