"""Products of FP8 codes for few rows on Hopper, in Gluon.

A program has 64 outputs and takes pieces of x and of the weight by the bulk copy engine (TMA) into shared memory, all
that it has room for at once. It is launched while the kernel before runs, always, and sets itself up; before it reads
anything it waits for what is before, or, where the caller allows it, asks for its weight first.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rorqual.kernels.gluon_rings import (
    AVAILABLE,
    descriptor,
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from rorqual.kernels.gpu import tl
from rorqual.kernels.skinny import PROCESSORS


@gluon.jit
def _exponents(by, POWERS: gl.constexpr):
    """Scales of a weight as fp32; bytes of float8_e8m0fnu are exponents."""
    if POWERS:
        bits = gl.where(by == 0, 0x00400000, by.to(gl.int32) << 23)
        by = gl.where(by == 255, float("nan"), bits.to(gl.float32, bitcast=True))
    return by


@gluon.jit
def _multiply(x, w, acc, TALL: gl.constexpr):
    """The product of one tile each, under way; the weight is the tall side if TALL."""
    if TALL:
        part = warpgroup_mma(w, x.permute((1, 0)), acc, use_acc=False, is_async=True)
    else:
        part = warpgroup_mma(x, w.permute((1, 0)), acc, use_acc=False, is_async=True)
    return part


@gluon.jit
def _add(acc, part, by, TALL: gl.constexpr):
    return gl.fma(part, gl.zeros_like(part) + gl.expand_dims(by, 0 if TALL else 1), acc)


@gluon.jit
def _fetch(desc, tiles, bar, row, at):
    tma.async_copy_global_to_shared(desc, [row, at * 128], bar, tiles)


@gluon.jit(do_not_specialize=["rows"])
def product_kernel(
    x_desc, w_desc, x_scale_ptr, w_scale_ptr, bias_ptr, y_ptr, rows, out_width,
    s_row, s_group, b_row, y_row, y_split,
    STEPS: gl.constexpr, STAGES: gl.constexpr, TALL: gl.constexpr, POWERS: gl.constexpr, BIAS: gl.constexpr,
    EARLY: gl.constexpr, AHEAD: gl.constexpr,
):  # fmt: skip
    """y = x w^T for a tile of rows and outputs and, split `program_id(1)`, STEPS runs of 128 channels; the split writes
    to y + split * y_split. STAGES pieces are under way or in use. EARLY: the weight may be read before what the
    kernels before wrote."""
    if AHEAD:
        tl.extra.cuda.gdc_launch_dependents()
    BN: gl.constexpr = x_desc.block_type.shape[0]
    BO: gl.constexpr = w_desc.block_type.shape[0]
    WIDE: gl.constexpr = x_desc.block_type.shape[1] // 128
    PIECES: gl.constexpr = (STEPS + WIDE - 1) // WIDE
    HELD: gl.constexpr = min(PIECES, STAGES)
    BYTES: gl.constexpr = x_desc.block_type.nbytes + w_desc.block_type.nbytes
    WARPS: gl.constexpr = gl.num_warps()
    left = gl.program_id(0) * BO
    group = gl.program_id(1) * STEPS
    top = gl.program_id(2) * BN
    x_pieces = gl.allocate_shared_memory(x_desc.dtype, [HELD, BN, 128 * WIDE], x_desc.layout)
    w_pieces = gl.allocate_shared_memory(w_desc.dtype, [HELD, BO, 128 * WIDE], w_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [HELD, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(HELD):
        mbarrier.init(full.index(i), count=1)
    fence_async_shared()
    if AHEAD and not EARLY:
        tl.extra.cuda.gdc_wait()
    for i in gl.static_range(HELD):
        mbarrier.expect(full.index(i), BYTES)
        _fetch(w_desc, w_pieces.index(i), full.index(i), left, group + i * WIDE)
        if not EARLY:
            _fetch(x_desc, x_pieces.index(i), full.index(i), top, group + i * WIDE)
    # Both scales' products, by run and row.
    ROOM: gl.constexpr = 16 if STEPS > 8 else 8
    LANES: gl.constexpr = min(BN, 32)
    TABLE: gl.constexpr = gl.BlockedLayout([1, 1], [32 // LANES, LANES], [WARPS, 1], [1, 0])
    run = gl.arange(0, ROOM, gl.SliceLayout(1, TABLE))
    row = gl.arange(0, BN, gl.SliceLayout(0, TABLE))
    w_scale = gl.load(w_scale_ptr + left // 128 * b_row + group + gl.minimum(run, STEPS - 1))
    if EARLY:
        if AHEAD:
            tl.extra.cuda.gdc_wait()
        for i in gl.static_range(HELD):
            _fetch(x_desc, x_pieces.index(i), full.index(i), top, group + i * WIDE)
    real = (run < STEPS)[:, None] & (top + row < rows)[None, :]
    x_scale = gl.load(
        x_scale_ptr + ((top + row) * s_row)[None, :] + ((group + run) * s_group)[:, None], real, other=0.0
    )
    table = gl.allocate_shared_memory(gl.float32, [ROOM, BN], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    table.store(x_scale * _exponents(w_scale, POWERS)[:, None])
    gl.thread_barrier()
    scales = table._reinterpret(gl.float32, [ROOM, BN], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    # Pieces lie in memory as their runs one after the other.
    ONE_X: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BN, 128], x_desc.dtype)
    ONE_W: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BO, 128], w_desc.dtype)
    x_tiles = x_pieces._reinterpret(x_desc.dtype, [HELD * WIDE, BN, 128], ONE_X)
    w_tiles = w_pieces._reinterpret(w_desc.dtype, [HELD * WIDE, BO, 128], ONE_W)

    SHAPE: gl.constexpr = [BO, BN] if TALL else [BN, BO]
    DOWN: gl.constexpr = WARPS if TALL else min(BN // 16, WARPS)
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [DOWN, WARPS // DOWN], [16, SHAPE[1] * DOWN // WARPS, 32]
    )
    BY: gl.constexpr = gl.SliceLayout(0 if TALL else 1, LAYOUT)
    acc = gl.zeros(SHAPE, gl.float32, LAYOUT)
    zero = gl.zeros(SHAPE, gl.float32, LAYOUT)
    mbarrier.wait(full.index(0), 0)
    part = _multiply(x_tiles.index(0), w_tiles.index(0), zero, TALL)
    for step in gl.static_range(1, STEPS + 1):
        if step < STEPS:
            if step % WIDE == 0:
                mbarrier.wait(full.index(step // WIDE % HELD), step // WIDE // HELD & 1)
            following = _multiply(
                x_tiles.index(step % (HELD * WIDE)), w_tiles.index(step % (HELD * WIDE)), zero, TALL
            )
            # With `acc`, so that what is there is added up while the next product is under way, not at the end.
            part, acc = warpgroup_mma_wait(1, deps=[part, acc])
        else:
            part, acc = warpgroup_mma_wait(0, deps=[part, acc])
        if (
            step % WIDE == 0 and step // WIDE - 1 + HELD < PIECES
        ):  # a piece is done with: another takes its place
            gl.thread_barrier()
            i = (step // WIDE - 1) % HELD
            mbarrier.expect(full.index(i), BYTES)
            _fetch(w_desc, w_pieces.index(i), full.index(i), left, group + step + (HELD - 1) * WIDE)
            _fetch(x_desc, x_pieces.index(i), full.index(i), top, group + step + (HELD - 1) * WIDE)
        acc = _add(acc, part, scales.index(step - 1).load(BY), TALL)
        if step < STEPS:
            part = following
    # Eight outputs a thread side by side.
    STORE: gl.constexpr = (
        gl.BlockedLayout([8, 1], [8, 4], [1, WARPS], [0, 1])
        if TALL
        else gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])
    )
    ALONG: gl.constexpr = 1 if TALL else 0
    o = left + gl.arange(0, BO, gl.SliceLayout(ALONG, STORE))
    n = gl.expand_dims(top + gl.arange(0, BN, gl.SliceLayout(1 - ALONG, STORE)), 1 - ALONG)
    if BIAS:
        bias = gl.load(bias_ptr + o, o < out_width, other=0.0).to(gl.float32)
    o = gl.expand_dims(o, ALONG)
    mask = (n < rows) & (o < out_width)
    to = y_ptr + gl.program_id(1).to(gl.int64) * y_split + n.to(gl.int64) * y_row + o
    if BIAS:
        y = gl.convert_layout(acc, STORE) + gl.expand_dims(bias, ALONG)
        gl.store(to, y.to(y_ptr.dtype.element_ty), mask)
    else:
        gl.store(to, gl.convert_layout(acc.to(y_ptr.dtype.element_ty), STORE), mask)


def plan(rows: int, out_width: int, width: int) -> dict[str, Any] | None:
    """How a product of this shape is cut: rows and outputs of a tile, runs of 128 channels of a program and of a piece,
    pieces at a time. None: other forms are faster. Depends on the shape alone."""
    steps = width // 128
    if not 1 < rows <= 128 or width % 128 or not 4 <= steps <= 16 or out_width > 64 * PROCESSORS:
        return None
    BN, stages = (16, 5) if rows <= 16 else (32, 6) if rows <= 32 else (64, 5) if rows <= 64 else (128, 3)
    return {
        "BN": BN, "BO": 64, "STEPS": steps, "WIDE": 2, "STAGES": stages, "TALL": rows <= 32,
        "num_warps": 4 if rows <= 64 else 8,
    }  # fmt: skip


def supported(x: Tensor, codes_OD: Tensor) -> bool:
    """Whether the kernel takes these codes: on a Hopper GPU, whole runs of 128 channels, rows that TMA can follow."""
    return (
        AVAILABLE
        and x.is_cuda
        and x.dtype == codes_OD.dtype == torch.float8_e4m3fn
        and x.stride(1) == codes_OD.stride(1) == 1
        and torch.cuda.get_device_capability(x.device)[0] == 9
        and codes_OD.shape[1] % 128 == 0
        and all(t.stride(0) % 16 == 0 and t.data_ptr() % 16 == 0 for t in (x, codes_OD))
    )


def product(
    x: Tensor,
    x_scale: Tensor,
    codes_OD: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    y: Tensor,
    how: dict[str, Any],
    early: bool,
) -> None:
    """y `[N, O]`, or fp32 parts of it `[S, N, O]`, from codes `[N, D]` with scales `[N, D / 128]` and a weight `[O, D]`
    with its scales (fp32, or e8m0's bytes). `early`: no kernel before this one that may still run writes the weight."""
    rows, out_width, BN = x.shape[0], codes_OD.shape[0], how["BN"]
    product_kernel[(-(-out_width // how["BO"]), x.shape[1] // 128 // how["STEPS"], -(-rows // BN))](
        descriptor(x, BN, how["WIDE"]), descriptor(codes_OD, how["BO"], how["WIDE"]), x_scale, scale, bias, y, rows,
        out_width, x_scale.stride(0), x_scale.stride(1), scale.stride(0), y.stride(-2),
        y.stride(0) if y.dim() == 3 else 0,
        STEPS=how["STEPS"], STAGES=how["STAGES"], TALL=how["TALL"],
        POWERS=scale.dtype == torch.uint8, BIAS=bias is not None, EARLY=early, AHEAD=True,
        num_warps=how["num_warps"], launch_pdl=True,
    )  # fmt: skip
