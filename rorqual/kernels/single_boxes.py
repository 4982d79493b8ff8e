"""One or two rows through FP8 weights on Hopper, by tensor cores on the codes as they lie, in Gluon.

To multiply plainly, E4M3 codes have to become fp32 first, which takes longer than reading them. Here the copy engine
(TMA) brings boxes of 8 weight rows x 16 runs of 128 codes into shared memory, asked for before the kernels in front
have ended. Once the row is there it is normed and quantised, by each program for itself; its 16 runs of codes are the
columns of one product, the 128 runs of a box its rows. Of all places only those count where a run met its like (one in
16): they are multiplied by both scales and added up in fp32.
"""

# mypy: disable-error-code="no-untyped-def,assignment,misc,no-redef,var-annotated"
# ruff: noqa: RUF005 (unpacking is not among what Gluon compiles)

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rorqual.kernels.gluon_rings import (
    AVAILABLE,
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from rorqual.kernels.gpu import tl
from rorqual.kernels.quant import E8M0, FP8
from rorqual.kernels.single_ring import RUNS, boxes

ROWS = 8
"""Weight rows of a box."""

RUN = 128
"""Codes of a run."""

ROOM = 104 * 1024
"""Bytes of boxes that a program takes at most: one of this kernel and one of the next fit a multiprocessor."""


@gluon.jit
def _scales(at, there, POWERS: gl.constexpr):
    """Scales of a weight as fp32; bytes of float8_e8m0fnu are exponents."""
    by = gl.load(at, there, other=0)
    if POWERS:
        bits = gl.where(by == 0, 0x00400000, by.to(gl.int32) << 23)
        return gl.where(by == 255, float("nan"), bits.to(gl.float32, bitcast=True))
    else:
        return by.to(gl.float32)


@gluon.jit
def _short(values):
    """fp32 rounded to bf16, by pairs: one by one they take the slow units, eight times as long."""
    return gl.inline_asm_elementwise(
        "{ .reg .b32 t; cvt.rn.bf16x2.f32 t, $3, $2; shl.b32 $0, t, 16; and.b32 $1, t, 0xffff0000; }",
        "=r,=r,r,r",
        [values],
        dtype=gl.float32,
        is_pure=True,
        pack=2,
    )


@gluon.jit
def _met(product, RUNS: gl.constexpr):
    """Of the products of M runs with RUNS columns `[M, RUNS]` those of a run with its like: `[M / RUNS, RUNS]`."""
    LAYOUT: gl.constexpr = product.type.layout
    m = gl.arange(0, product.shape[0], gl.SliceLayout(1, LAYOUT)) % RUNS
    n = gl.arange(0, RUNS, gl.SliceLayout(0, LAYOUT))
    return gl.sum(gl.where(m[:, None] == n[None, :], product, 0.0), 1).reshape(
        [product.shape[0] // RUNS, RUNS]
    )


@gluon.jit
def _lay(rows, weight, squares, turned, plain, steps, eps, D: gl.constexpr):
    """Rows `[ROOM, RUN]` of fp32, normed if there is a weight, as codes and steps of their runs: in the order of
    `_turned`, as they are, or both."""
    ROOM: gl.constexpr = rows[0].shape[0]
    RUN: gl.constexpr = rows[0].shape[1]
    FLAT: gl.constexpr = rows[0].type.layout
    EACH: gl.constexpr = gl.BlockedLayout([ROOM], [32], [gl.num_warps()], [0])
    if weight is not None:
        run = gl.arange(0, ROOM, gl.SliceLayout(1, FLAT))
        for n in gl.static_range(len(rows)):
            square = gl.sum(rows[n] * rows[n], 1)
            if ROOM * RUN != D:
                square = gl.where(run < D // RUN, square, 0.0)
            squares.index(n).store(square)
        gl.thread_barrier()
    for n in gl.static_range(len(rows)):
        values = rows[n]
        if weight is not None:
            # Every thread adds all runs' sums: one barrier, where a reduction across warps has two.
            mean = gl.sum(squares.index(n).load(EACH), 0) / D
            values = _short(values * gl.rsqrt(mean + eps) * weight)
        step = gl.div_rn(gl.maximum(gl.max(gl.abs(values), 1), 1e-4), 448.0)
        # values / step, rounded correctly: a quotient by the reciprocal, and once what is left over.
        by, values = gl.broadcast(step[:, None], values)
        over, values = gl.broadcast(gl.div_rn(1.0, step)[:, None], values)
        ratio = values * over
        ratio = gl.fma(gl.fma(-ratio, by, values), over, ratio)
        code = gl.minimum(gl.maximum(ratio, -448.0), 448.0).to(gl.float8e4nv)
        if plain is not None:
            plain.index(n).store(code)
        if turned is not None:
            turned.index(n).store(_turned(code))
        steps.index(n).store(step)
    fence_async_shared()
    gl.thread_barrier()


@gluon.jit
def _turned(codes):
    """Runs of 128 codes in the order in which a thread that has 16 codes side by side of a run, and 16 that lie 64
    further on, holds them as an operand of the tensor cores: those want 4 of each 16."""
    ROWS: gl.constexpr = codes.shape[0]
    return codes.reshape([ROWS, 2, 4, 4, 4]).permute([0, 1, 3, 2, 4]).reshape([ROWS, 128])


@gluon.jit
def held_kernel(
    w0, w1, d0, d1, x, norm, scale0, scale1, residual, y0, y1, out0, out1,
    w0_row, w1_row, x_row, s0_row, s1_row, r_row, y0_row, y1_row, eps,
    D: gl.constexpr, N: gl.constexpr, BOXES: gl.constexpr, TWO: gl.constexpr, NORM: gl.constexpr,
    RESIDUAL: gl.constexpr, POWERS: gl.constexpr, HELD: gl.constexpr, LATE: gl.constexpr = False,
):  # fmt: skip
    """`boxes_kernel` with the first HELD boxes in registers, for rows of at most 16 runs."""
    if not LATE:
        tl.extra.cuda.gdc_launch_dependents()
    WARPS: gl.constexpr = gl.num_warps()
    RUNS: gl.constexpr = 16
    RUN: gl.constexpr = 128
    code: gl.constexpr = w0.dtype.element_ty
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, RUNS, 32])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, MMA, 4)
    FLAT: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [WARPS, 1], [1, 0])
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    LINES: gl.constexpr = gl.NVMMASharedLayout(128, 8, rank=2)
    if WARPS == 8:
        WIDE: gl.constexpr = gl.DistributedLinearLayout(
            [[0, 1], [0, 2], [0, 4], [0, 8], [8, 0], [0, 64]], [[0, 16], [0, 32], [1, 0], [2, 0], [4, 0]],
            [[16, 0], [32, 0], [64, 0]], [], [128, 128],
        )  # fmt: skip
    else:
        WIDE: gl.constexpr = gl.DistributedLinearLayout(
            [[0, 1], [0, 2], [0, 4], [0, 8], [8, 0], [0, 64], [64, 0]],
            [[0, 16], [0, 32], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [128, 128],
        )  # fmt: skip
    kind: gl.constexpr = y0.dtype.element_ty
    codes = gl.allocate_shared_memory(code, [N, RUNS, RUN], LINES)
    steps = gl.allocate_shared_memory(gl.float32, [N, RUNS], PLAIN)
    if NORM:
        squares = gl.allocate_shared_memory(gl.float32, [N, RUNS], PLAIN)
    begin = gl.program_id(0) * BOXES
    first = gl.cdiv(out0, 8)
    m = gl.arange(0, 8 * RUNS, gl.SliceLayout(1, WIDE))
    k = gl.arange(0, RUN, gl.SliceLayout(0, WIDE))
    if BOXES > HELD:
        room = gl.allocate_shared_memory(code, [BOXES - HELD, 8, RUNS, RUN], d0.layout)
        lines = room._reinterpret(code, [BOXES - HELD, 8 * RUNS, RUN], LINES)
        plain = gl.allocate_shared_memory(code, [N, RUNS, RUN], LINES)
        full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        mbarrier.init(full, count=1)
        mbarrier.expect(full, (BOXES - HELD) * d0.block_type.nbytes)
        for i in gl.static_range(HELD, BOXES):
            if begin + i < first:
                tma.async_copy_global_to_shared(d0, [(begin + i) * 8, 0, 0], full, room.index(i - HELD))
            else:
                tma.async_copy_global_to_shared(
                    d1, [(begin + i - first) * 8, 0, 0], full, room.index(i - HELD)
                )
    else:
        plain: gl.constexpr = None
    lefts = ()
    for i in gl.static_range(HELD):
        other = begin + i >= first
        o = (begin + i) * 8 - gl.where(other, first * 8, 0) + m // RUNS
        # Beyond the weight: its last row and run again.
        o = gl.maximum(gl.minimum(o, gl.where(other, out1, out0) - 1), 0)
        at = o.to(gl.int64) * gl.where(other, w1_row, w0_row) + gl.minimum(m % RUNS, D // RUN - 1) * RUN
        tile = gl.load(gl.where(other, w1, w0) + at[:, None] + k[None, :], eviction_policy="evict_first")
        lefts = lefts + (gl.convert_layout(_turned(tile), LEFT, assert_trivial=True),)
    none = gl.zeros([8 * RUNS, RUNS], gl.float32, MMA)
    zero = gl.sum(_met(none, RUNS), 1)
    OUT: gl.constexpr = zero.type.layout
    ACROSS: gl.constexpr = gl.SliceLayout(0, OUT.parent)
    row = gl.arange(0, 8, OUT)
    # Scales lie in shared memory meanwhile: registers are short.
    SPREAD: gl.constexpr = gl.BlockedLayout([1, 1], [2, 16], [WARPS, 1], [1, 0])
    box = begin + gl.arange(0, BOXES, gl.SliceLayout(1, SPREAD))
    across = gl.arange(0, RUNS, gl.SliceLayout(0, SPREAD))
    other = box >= first
    o = (box - gl.where(other, first, 0)) * 8
    table = gl.where(other, scale1, scale0) + o // 128 * gl.where(other, s1_row, s0_row)
    there = (o < gl.where(other, out1, out0))[:, None] & (across < D // RUN)[None, :]
    scales = gl.allocate_shared_memory(gl.float32, [BOXES, RUNS], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    scales.store(_scales(table[:, None] + across[None, :], there, POWERS))
    scale_rows = scales._reinterpret(gl.float32, [BOXES, RUNS], PLAIN)
    flat_run = gl.arange(0, RUNS, gl.SliceLayout(1, FLAT))
    lane = gl.arange(0, RUN, gl.SliceLayout(0, FLAT))
    # Never zeros: four codes known to be equal make ptxas 12.8 pack two of them with a register never written.
    d = gl.minimum(flat_run, D // RUN - 1)[:, None] * RUN + lane[None, :]
    if NORM:
        weight = gl.load(norm + d).to(x.dtype.element_ty).to(gl.float32)
    tl.extra.cuda.gdc_wait()
    if LATE:
        tl.extra.cuda.gdc_launch_dependents()
    rows = ()
    for n in gl.static_range(N):
        rows = rows + (gl.load(x + n * x_row + d).to(gl.float32),)
    if NORM:
        _lay(rows, weight, squares, codes, plain, steps, eps, D)
    else:
        _lay(rows, None, None, codes, plain, steps, eps, D)
    for n in gl.static_range(N):
        products = ()
        for i in gl.static_range(BOXES):
            if i < HELD:
                right = codes.index(n).permute((1, 0))
                product = warpgroup_mma(lefts[i], right, none, use_acc=False, is_async=True)
            else:
                if i == HELD and n == 0:
                    mbarrier.wait(full, 0)
                right = plain.index(n).permute((1, 0))
                product = warpgroup_mma(lines.index(i - HELD), right, none, use_acc=False, is_async=True)
            products = products + (product,)
        if BOXES == 1:
            products = (warpgroup_mma_wait(0, deps=products),)
        else:
            products = warpgroup_mma_wait(0, deps=products)
        step = steps.index(n).load(gl.SliceLayout(0, MMA))
        for i in gl.static_range(BOXES):
            value = gl.sum(
                _met(products[i] * step[None, :], RUNS) * scale_rows.index(i).load(ACROSS)[None, :], 1
            )
            other = begin + i >= first
            o = (begin + i) * 8 - gl.where(other, first * 8, 0) + row
            inside = o < gl.where(other, out1, out0)
            if RESIDUAL:
                before = gl.load(residual + n * r_row + o, inside, other=0.0)
                value = value.to(kind).to(gl.float32) + before.to(gl.float32)
            y = gl.where(other, y1, y0) + n * gl.where(other, y1_row, y0_row)
            gl.store(y + o, value.to(kind), inside)


@gluon.jit
def boxes_kernel(
    w0, w1, x, up, norm, scale0, scale1, residual, y0, y1, limit, out0, out1,
    x_row, up_row, s0_row, s1_row, r_row, y0_row, y1_row, eps,
    D: gl.constexpr, N: gl.constexpr, BOXES: gl.constexpr, TWO: gl.constexpr, NORM: gl.constexpr,
    GATED: gl.constexpr, LIMIT: gl.constexpr, RESIDUAL: gl.constexpr, POWERS: gl.constexpr, ROOM: gl.constexpr, LATE: gl.constexpr = False,
    trace=None,
):  # fmt: skip
    """y0 = norm(x) w0^T (and y1 with w1) plus the residual, BOXES boxes a program. GATED: silu(x) * up in x's place.
    ROOM: runs of a row, up to a power of two, at least a box's."""
    if not LATE:
        tl.extra.cuda.gdc_launch_dependents()
    WARPS: gl.constexpr = gl.num_warps()
    EIGHT: gl.constexpr = w0.block_type.shape[0]
    RUNS: gl.constexpr = w0.block_type.shape[1]
    RUN: gl.constexpr = w0.block_type.shape[2]
    CHUNKS: gl.constexpr = (D + RUNS * RUN - 1) // (RUNS * RUN)
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, RUNS, 32])
    FLAT: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [WARPS, 1], [1, 0])
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    LINES: gl.constexpr = gl.NVMMASharedLayout(128, 8, rank=2)
    kind: gl.constexpr = y0.dtype.element_ty
    room = gl.allocate_shared_memory(w0.dtype, [CHUNKS * BOXES, EIGHT, RUNS, RUN], w0.layout)
    lines = room._reinterpret(w0.dtype, [CHUNKS, BOXES * EIGHT * RUNS, RUN], LINES)
    codes = gl.allocate_shared_memory(w0.dtype, [N, ROOM, RUN], LINES)
    columns = codes._reinterpret(w0.dtype, [N * (ROOM // RUNS), RUNS, RUN], LINES)
    steps = gl.allocate_shared_memory(gl.float32, [N, ROOM], PLAIN)
    if NORM:
        squares = gl.allocate_shared_memory(gl.float32, [N, ROOM], PLAIN)
    column_steps = steps._reinterpret(gl.float32, [N * (ROOM // RUNS), RUNS], PLAIN)
    full = gl.allocate_shared_memory(gl.int64, [CHUNKS, 1], mbarrier.MBarrierLayout())
    for chunk in gl.static_range(CHUNKS):
        mbarrier.init(full.index(chunk), count=1)
    begin = gl.program_id(0) * BOXES
    first = gl.cdiv(out0, EIGHT)
    for chunk in gl.static_range(CHUNKS):
        bar = full.index(chunk)
        mbarrier.expect(bar, BOXES * w0.block_type.nbytes)
        for i in gl.static_range(BOXES):
            box = room.index(chunk * BOXES + i)
            # Boxes beyond the last row come as zeros.
            if TWO:
                if begin + i < first:
                    tma.async_copy_global_to_shared(w0, [(begin + i) * EIGHT, chunk * RUNS, 0], bar, box)
                else:
                    tma.async_copy_global_to_shared(
                        w1, [(begin + i - first) * EIGHT, chunk * RUNS, 0], bar, box
                    )
            else:
                tma.async_copy_global_to_shared(w0, [(begin + i) * EIGHT, chunk * RUNS, 0], bar, box)
    none = gl.zeros([BOXES * EIGHT * RUNS, RUNS], gl.float32, MMA)
    zero = gl.sum(_met(none, RUNS), 1)
    OUT: gl.constexpr = zero.type.layout
    ACROSS: gl.constexpr = gl.SliceLayout(0, OUT.parent)
    row = gl.arange(0, BOXES * EIGHT, OUT)
    other = begin + row // EIGHT >= first
    o = begin * EIGHT + row - gl.where(other, first * EIGHT, 0)
    inside = o < gl.where(other, out1, out0)
    table = gl.where(other, scale1, scale0) + o // 128 * gl.where(other, s1_row, s0_row)
    scales = ()
    for chunk in gl.static_range(CHUNKS):
        run = chunk * RUNS + gl.arange(0, RUNS, ACROSS)
        there = inside[:, None] & (run < D // RUN)[None, :]
        scales = scales + (_scales(table[:, None] + run[None, :], there, POWERS),)
    run = gl.arange(0, ROOM, gl.SliceLayout(1, FLAT))
    lane = gl.arange(0, RUN, gl.SliceLayout(0, FLAT))
    # Runs beyond the row are its last one again, for the boxes have zeros there. (Zeros here too: four codes known to
    # be equal make ptxas 12.8 pack two of them with a register that was never written.)
    d = gl.minimum(run, D // RUN - 1)[:, None] * RUN + lane[None, :]
    if NORM:
        weight = gl.load(norm + d).to(x.dtype.element_ty).to(gl.float32)
    tl.extra.cuda.gdc_wait()
    if LATE:
        tl.extra.cuda.gdc_launch_dependents()
    rows = ()
    before = ()
    for n in gl.static_range(N):
        values = gl.load(x + n * x_row + d).to(gl.float32)
        if GATED:
            by = gl.load(up + n * up_row + d).to(gl.float32)
            if LIMIT:
                values = gl.minimum(values, limit)
                by = gl.minimum(gl.maximum(by, -limit), limit)
            values = values / (1.0 + gl.exp(-values))
            if not LIMIT:
                values = _short(values)
            values = _short(values * by)
        rows = rows + (values,)
        if RESIDUAL:
            before = before + (gl.load(residual + n * r_row + o, inside, other=0.0),)
    if NORM:
        _lay(rows, weight, squares, None, codes, steps, eps, D)
    else:
        _lay(rows, None, None, None, codes, steps, eps, D)
    y = gl.where(other, y1, y0)
    y_row = gl.where(other, y1_row, y0_row)
    for n in gl.static_range(N):
        total = gl.zeros_like(scales[0])
        for chunk in gl.static_range(CHUNKS):
            at = n * (ROOM // RUNS) + chunk
            if n == 0:
                mbarrier.wait(full.index(chunk), 0)
            right = columns.index(at).permute((1, 0))
            product = warpgroup_mma(lines.index(chunk), right, none, use_acc=False, is_async=True)
            product = warpgroup_mma_wait(0, deps=[product])
            step = column_steps.index(at).load(gl.SliceLayout(0, MMA))
            total += _met(product * step[None, :], RUNS) * scales[chunk]
        value = gl.sum(total, 1)
        if RESIDUAL:
            value = value.to(kind).to(gl.float32) + before[n].to(gl.float32)
        gl.store(y + n * y_row + o, value.to(kind), inside)


def supported(x_ND: Tensor, weights: Sequence[Tensor], scales: Sequence[Tensor | None]) -> bool:
    """Whether the kernel takes these weights, which `single.rows` takes: FP8 on Hopper, in whole runs."""
    return (
        AVAILABLE
        and x_ND.is_cuda
        and torch.cuda.get_device_capability(x_ND.device)[0] == 9
        and x_ND.shape[1] % RUN == 0
        and all(s is not None for s in scales)
        and all(w.dtype == FP8 and w.data_ptr() % 16 == 0 and w.stride(0) % 16 == 0 for w in weights)
    )


def plan(width: int, outputs: int) -> dict[str, int]:
    """Boxes of a program and its warps, by the shape alone."""
    chunks = -(-width // (RUNS * RUN))
    count = 4 if outputs > 2048 else 2
    while count > 1 and count * chunks * ROWS * RUNS * RUN > ROOM:
        count //= 2
    return {"BOXES": count, "num_warps": 8}


def launch(
    x_ND: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    norm: tuple[Tensor, float] | None,
    residual_NO: Tensor | None,
    ys: Sequence[Tensor],
    up_ND: Tensor | None = None,
    limit: float | None = None,
    how: dict[str, int] | None = None,
) -> None:
    """`single.rows` into `ys`, by this kernel."""
    (count, width), outs = x_ND.shape, [w.shape[0] for w in weights]
    how = how or plan(width, sum(outs))
    powers = scales[0].dtype == E8M0
    by = [s.view(torch.uint8) if powers else s for s in scales]
    two = len(weights) == 2
    total = sum(-(-o // ROWS) for o in outs)
    runs = max(RUNS, 1 << (width // RUN - 1).bit_length())
    if how.get("HELD"):
        held = [boxes(w) for w in weights]
        held_kernel[(-(-total // how["BOXES"]),)](
            weights[0], weights[-1], held[0], held[-1], x_ND, norm[0] if norm is not None else x_ND, by[0], by[-1],
            residual_NO, ys[0], ys[-1], outs[0], outs[1] if two else 0, weights[0].stride(0), weights[-1].stride(0),
            x_ND.stride(0), by[0].stride(0), by[-1].stride(0), residual_NO.stride(0) if residual_NO is not None else 0,
            ys[0].stride(0), ys[-1].stride(0), norm[1] if norm is not None else 0.0, D=width, N=count, TWO=two,
            NORM=norm is not None, RESIDUAL=residual_NO is not None, POWERS=powers, launch_pdl=True, **how,
        )  # fmt: skip
        return
    how = {k: v for k, v in how.items() if k != "HELD"}
    held = [boxes(w) for w in weights]
    boxes_kernel[(-(-total // how["BOXES"]),)](
        held[0], held[-1], x_ND, up_ND, norm[0] if norm is not None else x_ND, by[0], by[-1], residual_NO, ys[0],
        ys[-1], limit or 0.0, outs[0], outs[1] if two else 0, x_ND.stride(0),
        up_ND.stride(0) if up_ND is not None else 0, by[0].stride(0), by[-1].stride(0),
        residual_NO.stride(0) if residual_NO is not None else 0, ys[0].stride(0), ys[-1].stride(0),
        norm[1] if norm is not None else 0.0, D=width, N=count, TWO=two, NORM=norm is not None, GATED=up_ND is not None,
        LIMIT=limit is not None, RESIDUAL=residual_NO is not None, POWERS=powers, ROOM=runs, launch_pdl=True, **how,
    )  # fmt: skip
