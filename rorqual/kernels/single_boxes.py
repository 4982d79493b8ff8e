"""One or two rows through FP8 weights on Hopper, by tensor cores on the codes as they lie, in Gluon.

To multiply plainly, E4M3 codes have to become fp32 first, which takes longer than reading them. Here the copy engine
(TMA) brings boxes of 8 weight rows x 16 runs of 128 codes into shared memory, asked for before the kernels in front
have ended. Once the row is there it is normed and quantised, by each program for itself; its 16 runs of codes are the
columns of one product, the 128 runs of a box its rows. Of all places only those count where a run met its like (one in
16): they are multiplied by both scales and added up in fp32.
"""

# mypy: disable-error-code="no-untyped-def,assignment,misc,var-annotated"
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

ROOM = 215 * 1024
"""Bytes of shared memory that a program's boxes and codes take at most."""


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
def _lay(rows, weight, squares, codes, steps, eps, D: gl.constexpr):
    """Lay rows `[ROOM, RUN]` of fp32 down, normed if there is a weight, as codes and steps of their runs."""
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
        codes.index(n).store(code)
        steps.index(n).store(step)
    fence_async_shared()
    gl.thread_barrier()


@gluon.jit
def boxes_kernel(
    w0, w1, x, up, norm, scale0, scale1, residual, y0, y1, limit, out0, out1,
    x_row, up_row, s0_row, s1_row, r_row, y0_row, y1_row, eps,
    D: gl.constexpr, N: gl.constexpr, BOXES: gl.constexpr, TWO: gl.constexpr, NORM: gl.constexpr,
    GATED: gl.constexpr, LIMIT: gl.constexpr, RESIDUAL: gl.constexpr, POWERS: gl.constexpr, ROOM: gl.constexpr,
):  # fmt: skip
    """y0 = norm(x) w0^T (and y1 with w1) plus the residual, BOXES boxes a program. GATED: silu(x) * up in x's place.
    ROOM: runs of a row, up to a power of two, at least a box's."""
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
    # Not before: what follows would ask for its matrices while the experts in front still read theirs.
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
        _lay(rows, weight, squares, codes, steps, eps, D)
    else:
        _lay(rows, None, None, codes, steps, eps, D)
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
        and x_ND.dtype == torch.bfloat16
        and x_ND.shape[1] % RUN == 0
        and all(s is not None for s in scales)
        and all(w.dtype == FP8 and w.data_ptr() % 16 == 0 and w.stride(0) % 16 == 0 for w in weights)
    )


def plan(count: int, width: int, outputs: int) -> dict[str, int]:
    """Boxes of a program and its warps, by the shape alone: one where two such programs find room beside the experts'
    kernel in front and the weight fills a few rounds of them, else two."""
    row = -(-width // (RUNS * RUN)) * RUNS * RUN
    room = ROOM - count * max(RUNS, 1 << (width // RUN - 1).bit_length()) * RUN
    one = width <= RUNS * RUN and 2048 < outputs <= 8192
    return {"BOXES": 1 if one or 2 * ROWS * row > room else 2, "num_warps": 8}


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
    how = how or plan(count, width, sum(outs))
    powers = scales[0].dtype == E8M0
    by = [s.view(torch.uint8) if powers else s for s in scales]
    two = len(weights) == 2
    total = sum(-(-o // ROWS) for o in outs)
    runs = max(RUNS, 1 << (width // RUN - 1).bit_length())
    held = [boxes(w) for w in weights]
    boxes_kernel[(-(-total // how["BOXES"]),)](
        held[0], held[-1], x_ND, up_ND, norm[0] if norm is not None else x_ND, by[0], by[-1], residual_NO, ys[0],
        ys[-1], limit or 0.0, outs[0], outs[1] if two else 0, x_ND.stride(0),
        up_ND.stride(0) if up_ND is not None else 0, by[0].stride(0), by[-1].stride(0),
        residual_NO.stride(0) if residual_NO is not None else 0, ys[0].stride(0), ys[-1].stride(0),
        norm[1] if norm is not None else 0.0, D=width, N=count, TWO=two, NORM=norm is not None, GATED=up_ND is not None,
        LIMIT=limit is not None, RESIDUAL=residual_NO is not None, POWERS=powers, ROOM=runs, launch_pdl=True, **how,
    )  # fmt: skip
