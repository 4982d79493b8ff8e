"""The grouped FP8 products of `experts` for large batches on Hopper, in Gluon.

One program is a warp that fetches tiles by the bulk copy engine (TMA) and two groups of four warps, each with 64
of the 128 pairs of a tile. Programs stay and take every so-manieth item, so that the next item's tiles arrive while
results are written. The product of every 128 channels' codes is added up in fp32 times its scales (DeepSeek-V3
section 3.3); while one group does that, the other's product is under way. (Tiles of 256 channels would ask the
cache for less, but their sums don't fit in registers.) `experts_gluon16` is the same for bf16.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rorqual.kernels.gpu import INSTALLED

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import (
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
except ImportError:  # Triton too old, or none
    from rorqual.kernels import gpu

    gl, gluon = gpu.tl, gpu.triton

    AVAILABLE = False
else:
    AVAILABLE = INSTALLED

__all__ = [
    "AVAILABLE",
    "ROWS",
    "Held",
    "descriptor",
    "down",
    "gate_up",
    "gl",
    "gluon",
    "hand_out",
    "processors",
    "reciprocal",
    "supported",
    "table_room",
    "take",
]

ROWS = 128
"""Pairs of a tile."""


@gluon.jit
def table_room(GROUPS: gl.constexpr):
    """Room for two turns of four numbers, which the fetching warp hands to the groups, and its barriers."""
    numbers = gl.allocate_shared_memory(gl.int32, [8, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(free.index(i), count=GROUPS)
    return numbers, full, free


@gluon.jit
def hand_out(turns, turn, column, expert, begin, end):
    """By the fetching warp: what turn number `turn` is about. An expert below 0 says that none follows."""
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    numbers, full, free = turns
    mbarrier.wait(free.index(turn % 2), ((turn // 2) & 1) ^ 1)
    at = turn % 2 * 4
    numbers.index(at).store(gl.full([1], 0, gl.int32, ONE) + column)
    numbers.index(at + 1).store(gl.full([1], 0, gl.int32, ONE) + expert)
    numbers.index(at + 2).store(gl.full([1], 0, gl.int32, ONE) + begin)
    numbers.index(at + 3).store(gl.full([1], 0, gl.int32, ONE) + end)
    mbarrier.arrive(full.index(turn % 2))


@gluon.jit
def take(turns, turn):
    """By a group of four warps: the numbers handed out."""
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    numbers, full, free = turns
    mbarrier.wait(full.index(turn % 2), (turn // 2) & 1)
    at = turn % 2 * 4
    column = gl.max(numbers.index(at).load(ONE), 0)
    expert = gl.max(numbers.index(at + 1).load(ONE), 0)
    begin = gl.max(numbers.index(at + 2).load(ONE), 0)
    end = gl.max(numbers.index(at + 3).load(ONE), 0)
    mbarrier.arrive(free.index(turn % 2))
    return column, expert, begin, end


@gluon.jit
def _add(
    x_tiles, w_tiles, full, free, count, steps, x_scale_ptrs, w_scale_ptr, acc,
    GROUP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """acc plus the product of `steps` tiles from tile number `count` on."""
    zero = gl.zeros_like(acc)
    x_scale = gl.load(x_scale_ptrs)
    w_scale = gl.load(w_scale_ptr)
    for step in range(steps):
        stage = (count + step) % STAGES
        mbarrier.wait(full.index(stage), ((count + step) // STAGES) & 1)
        x = x_tiles.index(2 * stage + GROUP)
        w = w_tiles.index(stage).permute((1, 0))
        part = warpgroup_mma(x, w, zero, use_acc=False, is_async=True)
        scale = x_scale * w_scale
        # The next step's scales arrive while this one's product is under way.
        ahead = gl.minimum(step + 1, steps - 1)
        x_scale = gl.load(x_scale_ptrs + ahead)
        w_scale = gl.load(w_scale_ptr + ahead)
        part = warpgroup_mma_wait(0, deps=[part])
        mbarrier.arrive(free.index(stage))
        acc += part * scale[:, None]
    return acc


@gluon.jit
def _fetch_down(
    x_desc, w_desc, shared_desc, x_tiles, w_tiles, full, free, tiles_ptr, tiles, items, across, experts, width,
    hidden, STAGES: gl.constexpr, OUT: gl.constexpr,
):  # fmt: skip
    """The fetching warp: two tiles of 64 rows of inner and one of `OUT` rows of the expert's matrix a step."""
    DEPTH: gl.constexpr = x_desc.block_type.shape[1]
    count = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        tile = item // across
        row = item % across * OUT
        expert = gl.load(tiles_ptr + tile)
        if expert >= 0:
            begin = gl.load(tiles_ptr + tiles + tile)
            for start in range(0, width, DEPTH):
                stage = count % STAGES
                mbarrier.wait(free.index(stage), ((count // STAGES) & 1) ^ 1)
                bar = full.index(stage)
                mbarrier.expect(bar, 2 * x_desc.block_type.nbytes + w_desc.block_type.nbytes)
                tma.async_copy_global_to_shared(x_desc, [begin, start], bar, x_tiles.index(2 * stage))
                tma.async_copy_global_to_shared(
                    x_desc, [begin + 64, start], bar, x_tiles.index(2 * stage + 1)
                )
                w = w_tiles.index(stage)
                if expert < experts:
                    tma.async_copy_global_to_shared(w_desc, [expert * hidden + row, start], bar, w)
                else:
                    column = (expert - experts) * width + start
                    tma.async_copy_global_to_shared(shared_desc, [row, column], bar, w)
                count += 1


@gluon.jit
def _multiply_down(
    x_tiles, w_tiles, full, free, x_scale_ptr, w_scale_ptr, shared_scale_ptr, order_ptr, y_ptr, tiles_ptr, tiles,
    items, across, experts, width, shared_width, hidden,
    GROUP: gl.constexpr, STAGES: gl.constexpr, OUT: gl.constexpr,
):  # fmt: skip
    """A group of four warps: 64 pairs of every item."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, OUT, 32])
    STORE: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    steps = width // x_tiles.shape[2]
    scales = width // 128
    count = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        tile = item // across
        row = item % across * OUT
        expert = gl.load(tiles_ptr + tile)
        if expert >= 0:
            begin = gl.load(tiles_ptr + tiles + tile) + GROUP * 64
            end = gl.load(tiles_ptr + 2 * tiles + tile)
            place = begin + gl.arange(0, 64, gl.SliceLayout(1, LAYOUT))
            if expert < experts:
                w_scale_at = w_scale_ptr + (expert * (hidden // 128) + row // 128) * scales
            else:
                w_scale_at = (
                    shared_scale_ptr + row // 128 * (shared_width // 128) + (expert - experts) * scales
                )
            acc = _add(
                x_tiles, w_tiles, full, free, count, steps, x_scale_ptr + gl.minimum(place, end - 1) * scales,
                w_scale_at, gl.zeros([64, OUT], gl.float32, LAYOUT), GROUP, STAGES,
            )  # fmt: skip
            count += steps
            y = gl.convert_layout(acc.to(y_ptr.dtype.element_ty), STORE)
            at = begin + gl.arange(0, 64, gl.SliceLayout(1, STORE))
            pair = gl.load(order_ptr + at, at < end, other=0).to(gl.int64)
            channel = row + gl.arange(0, OUT, gl.SliceLayout(0, STORE))
            gl.store(y_ptr + (pair * hidden)[:, None] + channel[None, :], y, (at < end)[:, None])


@gluon.jit
def down_kernel(
    x_desc, w_desc, shared_desc, x_scale_ptr, w_scale_ptr, shared_scale_ptr, order_ptr, tiles_ptr, y_ptr, tiles,
    items, across, experts, width, shared_width, hidden, STAGES: gl.constexpr,
):  # fmt: skip
    """y `[pairs, D]`, by pair number: inner `[P, W]` times the expert's down matrix."""
    OUT: gl.constexpr = w_desc.block_type.shape[0]
    DEPTH: gl.constexpr = w_desc.block_type.shape[1]
    x_tiles = gl.allocate_shared_memory(x_desc.dtype, [2 * STAGES, 64, DEPTH], x_desc.layout)
    w_tiles = gl.allocate_shared_memory(w_desc.dtype, [STAGES, OUT, DEPTH], w_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(free.index(i), count=2)
    gl.warp_specialize(
        [
            (_multiply_down, (x_tiles, w_tiles, full, free, x_scale_ptr, w_scale_ptr, shared_scale_ptr, order_ptr,
                              y_ptr, tiles_ptr, tiles, items, across, experts, width, shared_width, hidden, 0, STAGES,
                              OUT)),
            (_multiply_down, (x_tiles, w_tiles, full, free, x_scale_ptr, w_scale_ptr, shared_scale_ptr, order_ptr,
                              y_ptr, tiles_ptr, tiles, items, across, experts, width, shared_width, hidden, 1, STAGES,
                              OUT)),
            (_fetch_down, (x_desc, w_desc, shared_desc, x_tiles, w_tiles, full, free, tiles_ptr, tiles, items, across,
                           experts, width, hidden, STAGES, OUT)),
        ],
        [4, 1],
        [232, 40],
    )  # fmt: skip


@gluon.jit
def _fetch_up(
    x_desc, gate_desc, up_desc, shared_gate_desc, shared_up_desc, x_tiles, w_tiles, full, free, tiles_ptr, tiles,
    items, across, tokens, experts, width, hidden, STAGES: gl.constexpr,
):  # fmt: skip
    """The fetching warp: two tiles of 64 rows of x and one each of gate and up a step; an item's channels go
    by in two halves."""
    DEPTH: gl.constexpr = x_desc.block_type.shape[1]
    SPAN: gl.constexpr = gate_desc.block_type.shape[0]
    count = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        tile = item // across
        expert = gl.load(tiles_ptr + tile)
        if expert >= 0:
            begin = gl.load(tiles_ptr + tiles + tile)
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
                    mbarrier.expect(bar, 2 * x_desc.block_type.nbytes + 2 * gate_desc.block_type.nbytes)
                    tma.async_copy_global_to_shared(x_desc, [begin, start], bar, x_tiles.index(2 * stage))
                    tma.async_copy_global_to_shared(
                        x_desc, [begin + 64, start], bar, x_tiles.index(2 * stage + 1)
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


@gluon.jit
def reciprocal(x):
    """1 / x to about an ulp, in one instruction where a division takes eight: while results are made ready the
    tensor cores wait."""
    return gl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def _swiglu(gate, up, limit, LIMIT: gl.constexpr):
    if LIMIT:
        gate = gl.minimum(gate, limit)
        up = gl.minimum(gl.maximum(up, -limit), limit)
    return gate * reciprocal(1.0 + gl.exp(-gate)) * up


@gluon.jit
def _half(
    x_tiles, w_tiles, full, free, x_scale_ptrs, gate_scale_ptr, up_scale_ptr, count, steps, limit,
    LIMIT: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """swiglu of half an item's channels for 64 pairs, from codes: fp32 `[64, 64]`."""
    BOTH: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32])
    ONE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 32])
    gate = gl.zeros([64, 64], gl.float32, ONE)
    up = gl.zeros([64, 64], gl.float32, ONE)
    zero = gl.zeros([64, 128], gl.float32, BOTH)
    x_scale = gl.load(x_scale_ptrs)
    gate_scale = gl.load(gate_scale_ptr)
    up_scale = gl.load(up_scale_ptr)
    for step in range(steps):
        stage = (count + step) % STAGES
        mbarrier.wait(full.index(stage), ((count + step) // STAGES) & 1)
        part = warpgroup_mma(
            x_tiles.index(2 * stage + GROUP),
            w_tiles.index(stage).permute((1, 0)),
            zero,
            use_acc=False,
            is_async=True,
        )
        gate_factor = x_scale * gate_scale
        up_factor = x_scale * up_scale
        ahead = gl.minimum(step + 1, steps - 1)
        x_scale = gl.load(x_scale_ptrs + ahead)
        gate_scale = gl.load(gate_scale_ptr + ahead)
        up_scale = gl.load(up_scale_ptr + ahead)
        part = warpgroup_mma_wait(0, deps=[part])
        mbarrier.arrive(free.index(stage))
        gate_part, up_part = gl.split(part.reshape([64, 2, 64]).permute([0, 2, 1]))
        gate += gl.convert_layout(gate_part, ONE, assert_trivial=True) * gate_factor[:, None]
        up += gl.convert_layout(up_part, ONE, assert_trivial=True) * up_factor[:, None]
    return _swiglu(gate, up, limit, LIMIT)


@gluon.jit
def _multiply_up(
    x_tiles, w_tiles, full, free, x_scale_ptr, gate_scale_ptr, up_scale_ptr, shared_gate_scale_ptr,
    shared_up_scale_ptr, weights_ptr, order_ptr, tiles_ptr, inner_ptr, inner_scale_ptr, limit, tiles, items, across,
    pairs, tokens, experts, width, hidden,
    LIMIT: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A group of four warps: 64 pairs of every item."""
    SPAN: gl.constexpr = 64
    ONE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SPAN, 32])
    STORE: gl.constexpr = gl.BlockedLayout([1, 16], [8, 4], [4, 1], [1, 0])
    kind: gl.constexpr = inner_ptr.dtype.element_ty
    count = 0
    steps = hidden // x_tiles.shape[2]
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        tile = item // across
        expert = gl.load(tiles_ptr + tile)
        if expert >= 0:
            block = item % across
            begin = gl.load(tiles_ptr + tiles + tile) + GROUP * 64
            end = gl.load(tiles_ptr + 2 * tiles + tile)
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
                x_tiles, w_tiles, full, free, x_scale_ptrs, gate_scale, up_scale, count, steps, limit, LIMIT,
                GROUP, STAGES,
            )  # fmt: skip
            first = first * weight[:, None]
            second = _half(
                x_tiles, w_tiles, full, free, x_scale_ptrs, gate_scale, up_scale, count + steps, steps, limit,
                LIMIT, GROUP, STAGES,
            )  # fmt: skip
            second = second * weight[:, None]
            count += 2 * steps
            top = gl.maximum(gl.max(gl.abs(first), 1), gl.max(gl.abs(second), 1))
            scale = gl.maximum(top, 1e-4) / 448.0
            gl.store(inner_scale_ptr + place * (width // 128) + block, scale, there)
            shrink = (1.0 / scale)[:, None]
            first = gl.convert_layout((first * shrink).to(kind), STORE)
            second = gl.convert_layout((second * shrink).to(kind), STORE)
            gl.store(to, first, (at_place < end)[:, None])
            gl.store(to + 64, second, (at_place < end)[:, None])


@gluon.jit
def gate_up_kernel(
    x_desc, gate_desc, up_desc, shared_gate_desc, shared_up_desc, x_scale_ptr, gate_scale_ptr, up_scale_ptr,
    shared_gate_scale_ptr, shared_up_scale_ptr, weights_ptr, order_ptr, tiles_ptr, inner_ptr, inner_scale_ptr, limit,
    tiles, items, across, pairs, tokens, experts, width, hidden, LIMIT: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """inner `[P, W]` (codes with scales `[P, W / 128]`): weight * swiglu of rows of x that lie by place already."""
    SPAN: gl.constexpr = gate_desc.block_type.shape[0]
    DEPTH: gl.constexpr = gate_desc.block_type.shape[1]
    x_tiles = gl.allocate_shared_memory(x_desc.dtype, [2 * STAGES, 64, DEPTH], x_desc.layout)
    w_tiles = gl.allocate_shared_memory(gate_desc.dtype, [2 * STAGES, SPAN, DEPTH], gate_desc.layout)
    # The same memory: a tile of gate and one of up are one to the tensor cores.
    both = w_tiles._reinterpret(gate_desc.dtype, [STAGES, 2 * SPAN, DEPTH], gate_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(free.index(i), count=2)
    gl.warp_specialize(
        [
            (_multiply_up, (x_tiles, both, full, free, x_scale_ptr, gate_scale_ptr, up_scale_ptr,
                            shared_gate_scale_ptr, shared_up_scale_ptr, weights_ptr, order_ptr, tiles_ptr, inner_ptr,
                            inner_scale_ptr, limit, tiles, items, across, pairs, tokens, experts, width, hidden,
                            LIMIT, 0, STAGES)),
            (_multiply_up, (x_tiles, both, full, free, x_scale_ptr, gate_scale_ptr, up_scale_ptr,
                            shared_gate_scale_ptr, shared_up_scale_ptr, weights_ptr, order_ptr, tiles_ptr, inner_ptr,
                            inner_scale_ptr, limit, tiles, items, across, pairs, tokens, experts, width, hidden,
                            LIMIT, 1, STAGES)),
            (_fetch_up, (x_desc, gate_desc, up_desc, shared_gate_desc, shared_up_desc, x_tiles, w_tiles, full, free,
                         tiles_ptr, tiles, items, across, tokens, experts, width, hidden, STAGES)),
        ],
        [4, 1],
        [232, 40],
    )  # fmt: skip


Held = tuple[Tensor, Tensor]
"""Matrices, and their scales (any tensor if they have none)."""


def processors(x: Tensor) -> int:
    return torch.cuda.get_device_properties(x.device).multi_processor_count


def supported(x: Tensor, width: int, hidden: int) -> bool:
    """Whether these kernels take experts of such sizes, on the device of x."""
    return (
        AVAILABLE
        and x.is_cuda
        and torch.cuda.get_device_capability(x.device)[0] == 9
        and x.dtype in (torch.bfloat16, torch.float16)
        and width % 128 == 0
        and hidden % 256 == 0
    )


def descriptor(x: Tensor, rows: int) -> Any:
    """Tiles of `rows` rows and 128 bytes of x `[M, C]`."""
    kind = (
        gl.float8e4nv if x.element_size() == 1 else gl.bfloat16 if x.dtype == torch.bfloat16 else gl.float16
    )
    block = [rows, 128 // x.element_size()]
    layout = gl.NVMMASharedLayout.get_default_for(block, kind)
    return TensorDescriptor(x, list(x.shape), [x.stride(0), 1], block, layout)


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
    limit: float | None,
    tokens: int,
    stages: int,
) -> None:
    """inner[p] = weight * swiglu(gate x, up x), by place, as x's rows lie; `routed` `[E, W, D]` and `shared`: gate
    and up. Shapes of the rest: `experts_triton.gate_up_kernel`."""
    (gate, gate_scale), (up, up_scale) = routed
    (shared_gate, shared_gate_scale), (shared_up, shared_up_scale) = shared
    count, width, hidden = gate.shape
    tiles, across = table.shape[1], width // 128
    gate_up_kernel[(min(processors(x), tiles * across),)](
        descriptor(x, 64), descriptor(gate.flatten(0, 1), 64), descriptor(up.flatten(0, 1), 64),
        descriptor(shared_gate, 64), descriptor(shared_up, 64), scales, gate_scale, up_scale,
        shared_gate_scale, shared_up_scale, weights, order, table, inner, inner_scales, limit or 0.0, tiles,
        tiles * across, across, weights.numel(), tokens, count, width, hidden, LIMIT=limit is not None,
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
    stages: int,
) -> None:
    """parts[order[p]] = inner[p] times the matrix `[D, W]` of p's expert."""
    (weight, scale), (shared_weight, shared_scale) = routed, shared
    count, hidden, width = weight.shape
    tiles, across = table.shape[1], hidden // 128
    down_kernel[(min(processors(inner), tiles * across),)](
        descriptor(inner, 64), descriptor(weight.flatten(0, 1), 128), descriptor(shared_weight, 128),
        inner_scales, scale, shared_scale, order, table, parts, tiles, tiles * across, across, count, width,
        shared_weight.shape[1], hidden, STAGES=stages, num_warps=4,
    )  # fmt: skip
