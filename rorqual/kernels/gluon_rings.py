"""What the Gluon products of Hopper share: one warp fetches tiles by the bulk copy engine (TMA) into a ring of stages,
groups of four warps, each with 64 rows of a tile, multiply what lies there.

Programs stay and take item after item: the fetching warp draws an item's number from a counter, so that short ones
leave nobody waiting, hands its description to the groups and begins to fetch the next item while the results of this
one are written. A group none of whose rows is there fetches and multiplies nothing.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from rorqual.kernels.gpu import INSTALLED

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.ampere import async_copy
    from triton.experimental.gluon.language.nvidia.hopper import (
        fence_async_shared,
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
except ImportError:  # Triton too old, or none
    from rorqual.kernels import gpu

    gl, gluon = gpu.tl, gpu.triton
    async_copy = fence_async_shared = mbarrier = tma = warpgroup_mma = warpgroup_mma_wait = (
        TensorDescriptor
    ) = None

    AVAILABLE = False
else:
    AVAILABLE = INSTALLED

__all__ = [
    "AVAILABLE",
    "COUNTS",
    "Held",
    "TensorDescriptor",
    "async_copy",
    "begin_later",
    "described",
    "descriptor",
    "expect",
    "fence_async_shared",
    "gl",
    "gluon",
    "hand_out",
    "let_by",
    "make_room",
    "mbarrier",
    "processors",
    "put",
    "reciprocal",
    "supported",
    "table_room",
    "take",
    "tma",
    "warpgroup_mma",
    "warpgroup_mma_wait",
]

COUNTS = ("tiles", "items", "across", "pairs", "tokens", "experts", "shared")
"""Arguments whose values make no variant of a kernel: batches of every size run the same code."""


@gluon.jit
def described(tiles_ptr, tiles, tile):
    """A tile's expert, below 0 for none, and where its pairs begin and end."""
    return gl.load(tiles_ptr + tile), gl.load(tiles_ptr + tiles + tile), gl.load(tiles_ptr + 2 * tiles + tile)


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
def expect(bar, busy, X_BYTES: gl.constexpr, W_BYTES: gl.constexpr, GROUPS: gl.constexpr):
    """Say how many bytes come for `busy` groups and for the matrix."""
    mbarrier.expect(bar, W_BYTES + X_BYTES, pred=busy == 1)
    mbarrier.expect(bar, W_BYTES + 2 * X_BYTES, pred=busy == 2)
    if GROUPS == 3:
        mbarrier.expect(bar, W_BYTES + 3 * X_BYTES, pred=busy == 3)


@gluon.jit
def let_by(full, free, count, steps, STAGES: gl.constexpr):
    """Let `steps` tiles go by, by a group that has nothing to multiply."""
    for step in range(steps):
        stage = (count + step) % STAGES
        mbarrier.wait(full.index(stage), ((count + step) // STAGES) & 1)
        mbarrier.arrive(free.index(stage))


@gluon.jit
def make_room(x_desc, w_desc, MATRICES: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr):
    """Room for STAGES steps' tiles of x and of `MATRICES` matrices, and barriers that say when a stage is full and
    when it is free again."""
    OUT: gl.constexpr = w_desc.block_type.shape[0]
    DEPTH: gl.constexpr = w_desc.block_type.shape[1]
    ROWS: gl.constexpr = x_desc.block_type.shape[0]
    x_tiles = gl.allocate_shared_memory(x_desc.dtype, [GROUPS * STAGES, ROWS, DEPTH], x_desc.layout)
    w_tiles = gl.allocate_shared_memory(w_desc.dtype, [MATRICES * STAGES, OUT, DEPTH], w_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(free.index(i), count=GROUPS)
    return x_tiles, w_tiles, full, free


@gluon.jit
def reciprocal(x):
    """1 / x to about an ulp, in one instruction where a division takes eight: while results are made ready the
    tensor cores wait."""
    return gl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def begin_later(APART: gl.constexpr):
    """0, after about APART nanoseconds."""
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    count = 0
    if APART > 0:
        slept = gl.inline_asm_elementwise(
            "nanosleep.u32 $1; mov.u32 $0, 0;", "=r,r", [gl.full([1], APART, gl.int32, ONE)],
            dtype=gl.int32, is_pure=False, pack=1,
        )  # fmt: skip
        count = gl.max(slept, 0)
    return count


@gluon.jit
def put(to, values, STORE: gl.constexpr, there, ADD: gl.constexpr):
    """Store fp32 sums as what `to` points at, added to what is there if ADD: fp32 by the cache, which nobody waits
    for."""
    values = gl.convert_layout(values, STORE)
    if ADD and to.dtype.element_ty == gl.float32:
        gl.atomic_add(to, values, there, sem="relaxed")
    else:
        if ADD:
            values += gl.load(to, there, other=0.0).to(gl.float32)
        gl.store(to, values.to(to.dtype.element_ty), there)


Held = tuple[Tensor, Tensor]
"""Matrices, and their scales (any tensor if they have none)."""


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def processors(x: Tensor) -> int:
    """Multiprocessors of x's device."""
    return _processors(x.device)


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


def descriptor(x: Tensor, rows: int, wide: int = 1) -> Any:
    """Tiles of `rows` rows and 128 bytes of x `[M, C]`, `wide` of them side by side in a piece."""
    block, layout = _tile(rows, x.dtype, wide)
    return TensorDescriptor(x, list(x.shape), [x.stride(0), 1], block, layout)


@functools.cache
def _tile(rows: int, dtype: torch.dtype, wide: int) -> tuple[list[int], Any]:
    kind = {torch.float8_e4m3fn: gl.float8e4nv, torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}[dtype]
    block = [rows, 128 * wide // dtype.itemsize]
    return block, gl.NVMMASharedLayout.get_default_for(block, kind)
