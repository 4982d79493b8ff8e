"""One token through its experts in one launch on Hopper, by programs that stay, in Gluon.

Every program brings its share of all matrices into a ring of boxes in shared memory by the bulk copy engine (TMA), in
one order from the first product's first row to the second's last: 190 KB are under way from each multiprocessor at
any time, whatever is being multiplied. A box is 8 rows of 16 runs of 128 bytes; an item is two of them: 8 channels of
gate and of up, or 16 channels of down.

The first product's results reach the other programs inside the launch: each is a word of 32 bits, bf16 and 16 bits that
tell this launch from the one before, so a program that reads a word sees whether it is there already. No
barrier stands between the products. The shared experts come first: their matrices are asked for before the
kernels in front have ended. The routed ones follow in the same order in both products, so that what the second one
begins with was ready long ago.

All programs must be on the GPU at once, one a multiprocessor: `supported` and `State` see to that.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from rorqual.kernels.gluon_rings import (
    AVAILABLE,
    TensorDescriptor,
    gl,
    gluon,
    mbarrier,
    processors,
    tma,
)
from rorqual.kernels.gpu import tl

PROGRAMS = 128
"""Programs: they divide the widths of DeepSeek's models, which 132 does not."""

WAIT = gl.constexpr("""
{
.reg .pred p;
.reg .b32 a, b, n;
.reg .b64 at;
mov.b32 $0, $4;
mov.b32 $1, $5;
mov.b32 $2, $6;
mov.b32 $3, $7;
cvt.s64.s32 at, $8;
add.s64 at, at, $12;
mov.b32 n, 0;
AGAIN:
xor.b32 a, $0, $16;
xor.b32 b, $1, $16;
or.b32 a, a, b;
xor.b32 b, $2, $16;
or.b32 a, a, b;
xor.b32 b, $3, $16;
or.b32 a, a, b;
and.b32 a, a, 0xffff;
setp.eq.b32 p, a, 0;
@p bra READY;
add.u32 n, n, 1;
setp.gt.u32 p, n, 0x800000;
@p trap;
ld.relaxed.gpu.global.v4.b32 {$0, $1, $2, $3}, [at];
bra AGAIN;
READY:
}
""")
"""Four words as read before, read again until all are of this launch; each thread for itself. What has not come after
seconds never will: an error then is better than a GPU that hangs."""
WAIT_OPERANDS = gl.constexpr("=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,l,l,l,l,r,r,r,r")


@gluon.jit
def _power(by, POWERS: gl.constexpr):
    """Scales as fp32; bytes of float8_e8m0fnu are exponents."""
    if POWERS:
        bits = gl.where(by == 0, 0x00400000, by.to(gl.int32) << 23)
        return gl.where(by == 255, float("nan"), bits.to(gl.float32, bitcast=True))
    else:
        return by.to(gl.float32)


@gluon.jit
def _fetch(
    item, descriptors, room, ids, experts,
    W: gl.constexpr, D: gl.constexpr, K: gl.constexpr, SHARED: gl.constexpr, STAGES: gl.constexpr,
    TALL: gl.constexpr, PART: gl.constexpr, WHICH: gl.constexpr,
):  # fmt: skip
    """Ask for this program's item number `item` if it is of shared experts (WHICH 0), of routed ones (1), or always."""
    gate, up, down, common_gate, common_up, common_down = descriptors
    boxes, full = room
    RUNS: gl.constexpr = gate.block_type.shape[1]
    DEPTH: gl.constexpr = RUNS * gate.block_type.shape[2]
    BYTES: gl.constexpr = 2 * gate.block_type.nbytes
    UP_CHUNKS: gl.constexpr = (D + DEPTH - 1) // DEPTH
    ROWS: gl.constexpr = 16 if TALL else 8
    LONG: gl.constexpr = DEPTH if TALL else 2 * DEPTH
    COMMON: gl.constexpr = (SHARED * W + LONG - 1) // LONG
    ROUTED: gl.constexpr = (W + LONG - 1) // LONG
    p = gl.program_id(0)
    P = gl.num_programs(0)
    stage = item % STAGES
    bar = full.index(stage)
    first = boxes.index(2 * stage)
    second = boxes.index(2 * stage + 1)
    ups = ((K + SHARED) * (W // 8) - p + P - 1) // P * UP_CHUNKS
    if PART == 2:
        ups = 0
    if item < ups:
        tile = p + item // UP_CHUNKS * P
        run = item % UP_CHUNKS * RUNS
        slot = tile // (W // 8)
        row = tile % (W // 8) * 8
        if slot < SHARED:
            if WHICH != 1:
                mbarrier.expect(bar, BYTES)
                tma.async_copy_global_to_shared(common_gate, [slot * W + row, run, 0], bar, first)
                tma.async_copy_global_to_shared(common_up, [slot * W + row, run, 0], bar, second)
        elif WHICH != 0:
            expert = gl.load(ids + slot - SHARED)
            expert = gl.where((expert >= 0) & (expert < experts), expert, 0)
            mbarrier.expect(bar, BYTES)
            tma.async_copy_global_to_shared(gate, [expert * W + row, run, 0], bar, first)
            tma.async_copy_global_to_shared(up, [expert * W + row, run, 0], bar, second)
    elif PART != 1:
        item -= ups
        row = (p + item // (COMMON + K * ROUTED) * P) * ROWS
        item = item % (COMMON + K * ROUTED)
        if row < D:
            if item < COMMON:
                if WHICH != 1:
                    mbarrier.expect(bar, BYTES)
                    run = item * (LONG // DEPTH * RUNS)
                    tma.async_copy_global_to_shared(common_down, [row, run, 0], bar, first)
                    if TALL:
                        tma.async_copy_global_to_shared(common_down, [row + 8, run, 0], bar, second)
                    else:
                        tma.async_copy_global_to_shared(common_down, [row, run + RUNS, 0], bar, second)
            elif WHICH != 0:
                item -= COMMON
                expert = gl.load(ids + item // ROUTED)
                expert = gl.where((expert >= 0) & (expert < experts), expert, 0)
                row += expert * D
                run = item % ROUTED * (LONG // DEPTH * RUNS)
                mbarrier.expect(bar, BYTES)
                tma.async_copy_global_to_shared(down, [row, run, 0], bar, first)
                if TALL:
                    tma.async_copy_global_to_shared(down, [row + 8, run, 0], bar, second)
                else:
                    tma.async_copy_global_to_shared(down, [row, run + RUNS, 0], bar, second)


@gluon.jit
def _words(
    words, item, half, tag, W: gl.constexpr, K: gl.constexpr, SHARED: gl.constexpr, RUNS: gl.constexpr,
    RUN: gl.constexpr, COMMON: gl.constexpr, ROUTED: gl.constexpr, TALL: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Where an item of the second product finds the part of inner `[RUNS, RUN]` for its first box or its second, and
    what lies there now."""
    common = item < COMMON
    begin = gl.where(common, K * W, (item - COMMON) // ROUTED * W)
    start = gl.where(common, item, (item - COMMON) % ROUTED) * (RUNS if TALL else 2 * RUNS) + half * RUNS
    run = start + gl.arange(0, RUNS, gl.SliceLayout(1, LAYOUT))
    lane = gl.arange(0, RUN, gl.SliceLayout(0, LAYOUT))
    at = begin + run[:, None] * RUN + lane[None, :]
    inside = run < gl.where(common, SHARED * W // RUN, W // RUN)
    found = gl.load(words + at, inside[:, None], other=tag, volatile=True)
    return found, at * 4


@gluon.jit
def _settled(found, at, words, tag):
    """The words as fp32, once they are there."""
    found = gl.inline_asm_elementwise(
        WAIT, WAIT_OPERANDS, [found, at, words.to(gl.int64), tag], gl.int32, is_pure=False, pack=4
    )
    return (found & -65536).to(gl.float32, bitcast=True)


@gluon.jit
def _up_scales(
    tables, ids, experts, W: gl.constexpr, D: gl.constexpr, K: gl.constexpr, SHARED: gl.constexpr, UPS: gl.constexpr,
    RUNS: gl.constexpr, CHUNKS: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Scales of the runs of this program's items of the first product, gate's and up's in turn `[2 UPS, RUNS]`."""
    gate, up, common_gate, common_up = tables
    number = gl.arange(0, 2 * UPS, gl.SliceLayout(1, LAYOUT))[:, None]
    second = number % 2 == 1
    tile = gl.program_id(0) + number // 2 // CHUNKS * gl.num_programs(0)
    slot = tile // (W // 8)
    run = number // 2 % CHUNKS * RUNS + gl.arange(0, RUNS, gl.SliceLayout(0, LAYOUT))[None, :]
    there = (slot < K + SHARED) & (run < D // 128)
    common = slot < SHARED
    expert = gl.load(ids + slot - SHARED, (slot < K + SHARED) & (slot >= SHARED), other=0)
    expert = gl.where((expert >= 0) & (expert < experts), expert, 0)
    at = (gl.where(common, slot, expert) * (W // 128) + tile % (W // 8) // 16) * (D // 128) + run
    table = gl.where(common, gl.where(second, common_up, common_gate), gl.where(second, up, gate))
    return gl.load(table + at, there, other=0)


@gluon.jit
def _down_scales(
    down, common_down, common_row, ids, experts, W: gl.constexpr, D: gl.constexpr, K: gl.constexpr,
    SHARED: gl.constexpr, DOWNS: gl.constexpr, RUNS: gl.constexpr, COMMON: gl.constexpr, ROUTED: gl.constexpr,
    TALL: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Scales of the runs of this program's items of the second product, of both boxes in turn `[2 DOWNS, RUNS]`."""
    PER: gl.constexpr = COMMON + K * ROUTED
    number = gl.arange(0, 2 * DOWNS, gl.SliceLayout(1, LAYOUT))[:, None]
    column = gl.program_id(0) + number // 2 // PER * gl.num_programs(0)
    block = column // (8 if TALL else 16)
    item = number // 2 % PER
    common = item < COMMON
    k = (item - COMMON) // ROUTED
    start = gl.where(common, item, (item - COMMON) % ROUTED) * (RUNS if TALL else 2 * RUNS)
    if not TALL:
        start += number % 2 * RUNS
    run = start + gl.arange(0, RUNS, gl.SliceLayout(0, LAYOUT))[None, :]
    there = (block < D // 128) & (run < gl.where(common, SHARED * W // 128, W // 128))
    expert = gl.load(ids + k, (block < D // 128) & (item >= COMMON), other=0)
    expert = gl.where((expert >= 0) & (expert < experts), expert, 0)
    at = gl.where(common, block * common_row, (expert * (D // 128) + block) * (W // 128)) + run
    return gl.load(gl.where(common, common_down, down) + at, there, other=0)


@gluon.jit
def ring_kernel(
    gate, up, down, common_gate, common_up, common_down, x, ids, weights,
    gate_scale, up_scale, down_scale, common_gate_scale, common_up_scale, common_down_scale, common_s_row,
    residual, y, words, epochs, limit, experts,
    W: gl.constexpr, D: gl.constexpr, K: gl.constexpr, SHARED: gl.constexpr, STAGES: gl.constexpr,
    UPS: gl.constexpr, DOWNS: gl.constexpr, POWERS: gl.constexpr, LIMIT: gl.constexpr, RESIDUAL: gl.constexpr,
    TALL: gl.constexpr, STAGED: gl.constexpr, PART: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """y `[D]` = the sum over experts of weight * down (swiglu(gate x, up x)), and the residual.

    UPS and DOWNS: items of a program in both products, at most, up to a power of two. TALL: the second product's
    items are 16 rows of RUNS runs, not 8 of twice as many. PART: both products (0),
    the first (1) or the second (2) alone.
    """
    CODES: gl.constexpr = gate.dtype == gl.float8e4nv
    RUNS: gl.constexpr = gate.block_type.shape[1]
    RUN: gl.constexpr = gate.block_type.shape[2]
    DEPTH: gl.constexpr = RUNS * RUN
    UP_CHUNKS: gl.constexpr = (D + DEPTH - 1) // DEPTH
    ROWS: gl.constexpr = 16 if TALL else 8
    LONG: gl.constexpr = DEPTH if TALL else 2 * DEPTH
    COMMON: gl.constexpr = (SHARED * W + LONG - 1) // LONG
    ROUTED: gl.constexpr = (W + LONG - 1) // LONG
    PER: gl.constexpr = COMMON + K * ROUTED
    # A warp has a row of a box of the first product, and runs of all rows of the second's.
    UP: gl.constexpr = gl.BlockedLayout([1, 1, RUN // 8], [1, 4, 8], [WARPS, 1, 1], [2, 1, 0])
    DOWN: gl.constexpr = gl.BlockedLayout([1, RUNS // WARPS, RUN // 8], [4, 1, 8], [1, WARPS, 1], [2, 1, 0])
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    p = gl.program_id(0)
    P = gl.num_programs(0)
    boxes = gl.allocate_shared_memory(gate.dtype, [2 * STAGES, 8, RUNS, RUN], gate.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
    descriptors = gate, up, down, common_gate, common_up, common_down
    room = boxes, full
    for item in range(STAGES):
        _fetch(item, descriptors, room, ids, experts, W, D, K, SHARED, STAGES, TALL, PART, 0)
    tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()
    for item in range(STAGES):
        _fetch(item, descriptors, room, ids, experts, W, D, K, SHARED, STAGES, TALL, PART, 1)
    tag = gl.load(epochs) & 0xFFFF
    if CODES:
        TABLE: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
        SPREAD: gl.constexpr = gl.BlockedLayout([1, 1], [32 // RUNS, RUNS], [WARPS, 1], [1, 0])
        if PART != 2:
            by = _up_scales(
                (gate_scale, up_scale, common_gate_scale, common_up_scale), ids, experts, W, D, K, SHARED, UPS, RUNS,
                UP_CHUNKS, SPREAD,
            )  # fmt: skip
            up_table = gl.allocate_shared_memory(gl.float32, [2 * UPS, RUNS], TABLE)
            up_table.store(_power(by, POWERS))
            up_by = up_table._reinterpret(gl.float32, [2 * UPS, RUNS], PLAIN)
        if PART != 1:
            by = _down_scales(
                down_scale, common_down_scale, common_s_row, ids, experts, W, D, K, SHARED, DOWNS, RUNS, COMMON,
                ROUTED, TALL, SPREAD,
            )  # fmt: skip
            down_table = gl.allocate_shared_memory(gl.float32, [2 * DOWNS, RUNS], TABLE)
            down_table.store(_power(by, POWERS))
            down_by = down_table._reinterpret(gl.float32, [2 * DOWNS, RUNS], PLAIN)
    count = 0
    if PART != 2:
        rows = ((K + SHARED) * (W // 8) - p + P - 1) // P
        for i in range(rows):
            tile = p + i * P
            slot = tile // (W // 8)
            k = slot - SHARED
            expert = gl.load(ids + k, slot >= SHARED, other=0)
            weight = gl.load(weights + k, slot >= SHARED, other=1.0).to(gl.float32)
            gates = gl.zeros([8], gl.float32, gl.SliceLayout(1, gl.SliceLayout(2, UP)))
            ups = gl.zeros([8], gl.float32, gl.SliceLayout(1, gl.SliceLayout(2, UP)))
            for chunk in gl.static_range(UP_CHUNKS):
                run = chunk * RUNS + gl.arange(0, RUNS, gl.SliceLayout(1, gl.SliceLayout(0, UP)))
                lane = gl.arange(0, RUN, gl.SliceLayout(0, gl.SliceLayout(0, UP)))
                row = gl.load(x + run[:, None] * RUN + lane[None, :], (run * RUN < D)[:, None], other=0.0)
                stage = count % STAGES
                mbarrier.wait(full.index(stage), (count // STAGES) & 1)
                one = boxes.index(2 * stage).load(UP)
                two = boxes.index(2 * stage + 1).load(UP)
                gl.thread_barrier()
                _fetch(
                    count + STAGES, descriptors, room, ids, experts, W, D, K, SHARED, STAGES, TALL, PART, 2
                )
                row = row.to(gl.float32)
                one = gl.sum(one.to(gl.float32) * row[None, :, :], 2)
                two = gl.sum(two.to(gl.float32) * row[None, :, :], 2)
                if CODES:
                    one *= up_by.index(2 * count).load(gl.SliceLayout(0, gl.SliceLayout(2, UP)))[None, :]
                    two *= up_by.index(2 * count + 1).load(gl.SliceLayout(0, gl.SliceLayout(2, UP)))[None, :]
                gates += gl.sum(one, 1)
                ups += gl.sum(two, 1)
                count += 1
            if LIMIT:
                gates = gl.minimum(gates, limit)
                ups = gl.minimum(gl.maximum(ups, -limit), limit)
            inner = gates / (1.0 + gl.exp(-gates)) * ups * weight
            inner = gl.where((slot < SHARED) | ((expert >= 0) & (expert < experts)), inner, 0.0)
            bits = inner.to(gl.bfloat16).to(gl.int16, bitcast=True).to(gl.int32) << 16
            line = gl.where(slot < SHARED, K + slot, k)
            channel = tile % (W // 8) * 8 + gl.arange(0, 8, gl.SliceLayout(1, gl.SliceLayout(2, UP)))
            gl.store(words + line * W + channel, bits | tag)
    if PART != 1:
        kind: gl.constexpr = y.dtype.element_ty
        HALF: gl.constexpr = gl.SliceLayout(2, DOWN)
        FLAT: gl.constexpr = gl.BlockedLayout([1, 4], [128 // RUN, RUN // 4], [WARPS, 1], [1, 0])
        ROW: gl.constexpr = FLAT if STAGED else gl.SliceLayout(0, DOWN)
        if STAGED:
            rows_now = gl.allocate_shared_memory(
                gl.float32, [2 if TALL else 4, RUNS, RUN], gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
            )
        columns = (D // ROWS - p + P - 1) // P
        begun = count
        for c in range(columns):
            upper = gl.zeros([8, RUNS], gl.float32, HALF)
            lower = gl.zeros([8, RUNS], gl.float32, HALF)
            found, at = _words(words, 0, 0, tag, W, K, SHARED, RUNS, RUN, COMMON, ROUTED, TALL, ROW)
            if not TALL:
                found2, at2 = _words(words, 0, 1, tag, W, K, SHARED, RUNS, RUN, COMMON, ROUTED, TALL, ROW)
            for item in range(PER):
                now, place = found, at
                after = gl.minimum(item + 1, PER - 1)
                found, at = _words(words, after, 0, tag, W, K, SHARED, RUNS, RUN, COMMON, ROUTED, TALL, ROW)
                if not TALL:
                    now2, place2 = found2, at2
                    found2, at2 = _words(
                        words, after, 1, tag, W, K, SHARED, RUNS, RUN, COMMON, ROUTED, TALL, ROW
                    )
                if STAGED:
                    row = _settled(now, place, words, tag)
                    rows_now.index(item % 2 * (1 if TALL else 2)).store(row)
                    if not TALL:
                        row = _settled(now2, place2, words, tag)
                        rows_now.index(item % 2 * 2 + 1).store(row)
                stage = count % STAGES
                mbarrier.wait(full.index(stage), (count // STAGES) & 1)
                one = boxes.index(2 * stage).load(DOWN)
                two = boxes.index(2 * stage + 1).load(DOWN)
                gl.thread_barrier()
                _fetch(
                    count + STAGES, descriptors, room, ids, experts, W, D, K, SHARED, STAGES, TALL, PART, 2
                )
                if STAGED:
                    row1 = rows_now.index(item % 2 * (1 if TALL else 2)).load(gl.SliceLayout(0, DOWN))
                    row2 = row1
                    if not TALL:
                        row2 = rows_now.index(item % 2 * 2 + 1).load(gl.SliceLayout(0, DOWN))
                else:
                    row1 = _settled(now, place, words, tag)
                    row2 = row1
                    if not TALL:
                        row2 = _settled(now2, place2, words, tag)
                one = gl.sum(one.to(gl.float32) * row1[None, :, :], 2)
                two = gl.sum(two.to(gl.float32) * row2[None, :, :], 2)
                if CODES:
                    one *= down_by.index(2 * (count - begun)).load(gl.SliceLayout(0, HALF))[None, :]
                    two *= down_by.index(2 * (count - begun) + 1).load(gl.SliceLayout(0, HALF))[None, :]
                upper += one
                lower += two
                count += 1
            if TALL:
                total = gl.sum(gl.join(upper, lower), 1)
                OUT: gl.constexpr = total.type.layout
                channel = gl.arange(0, 8, gl.SliceLayout(1, OUT))[:, None]
                channel += 8 * gl.arange(0, 2, gl.SliceLayout(0, OUT))[None, :]
            else:
                total = gl.sum(upper + lower, 1)
                channel = gl.arange(0, 8, total.type.layout)
            channel += (p + c * P) * ROWS
            if RESIDUAL:
                total = total.to(kind).to(gl.float32) + gl.load(residual + channel).to(gl.float32)
            gl.store(y + channel, total.to(kind))
        # This program has seen words of all the others, so all of them have read the number.
        gl.thread_barrier()
        if (p == 0) & (PART == 0):
            gl.store(epochs, gl.load(epochs) + 1)


State = tuple[Tensor, Tensor]
"""What launches keep between them: words of inner, and the number of the launch to come (1 at first)."""


def new_state(slots: int, width: int, device: torch.device) -> State:
    """For experts of `width` channels, `slots` of them a token. Launches that may run at the same time, in two streams,
    must not share one."""
    words = torch.zeros(slots * width, dtype=torch.int32, device=device)
    return words, torch.ones(1, dtype=torch.int32, device=device)


def supported(x: Tensor, slots: int, width: int, hidden: int) -> bool:
    """Whether the kernel takes `slots` experts of such sizes, on the device of x."""
    return (
        AVAILABLE
        and x.is_cuda
        and torch.cuda.get_device_capability(x.device)[0] == 9
        and processors(x) >= PROGRAMS
        and width % 128 == 0
        and hidden % 128 == 0
        # Every program must have a word for the first: it ends the launch.
        and slots * width // 8 >= PROGRAMS
    )


def launch(
    x_1D: Tensor,
    choice: tuple[Tensor, Tensor],
    matrices: tuple[Tensor, ...],
    scales: tuple[Tensor, ...],
    residual_1D: Tensor | None,
    y_1D: Tensor,
    state: State,
    *,
    sizes: tuple[int, int, int],
    limit: float | None,
    powers: bool,
    runs: int = 16,
    stages: int = 6,
    warps: int = 8,
    programs: int = PROGRAMS,
    staged: bool = True,
    part: int = 0,
) -> None:
    """y: the sum over experts, and the residual. `matrices`: gate, up `[E, W, D]`, down `[E, D, W]`, then the same of
    the shared experts `[F W, D]`, `[D, F W]`; `scales` likewise. `sizes`: experts in all, W, and F shared ones.
    """
    count, width, shared = sizes
    hidden, chosen = x_1D.shape[1], choice[0].shape[1]
    depth = runs * 128 // matrices[0].element_size()
    tall = programs == PROGRAMS
    rows, long = (16, depth) if tall else (8, 2 * depth)
    ups = -(-(chosen + shared) * width // 8 // programs) * -(-hidden // depth)
    downs = -(-hidden // rows // programs) * (-(-shared * width // long) + chosen * -(-width // long))
    ring_kernel[(programs,)](
        *(boxes(m, runs) for m in matrices), x_1D, *choice, *scales, scales[5].stride(-2), residual_1D, y_1D, *state,
        limit or 0.0, count, W=width, D=hidden, K=chosen, SHARED=shared, STAGES=stages, UPS=_power_of_two(ups),
        DOWNS=_power_of_two(downs), POWERS=powers, LIMIT=limit is not None, RESIDUAL=residual_1D is not None,
        TALL=tall, STAGED=staged, PART=part, WARPS=warps, num_warps=warps, launch_pdl=True,
        maxnreg=None if tall else 128,
    )  # fmt: skip


def boxes(matrix: Tensor, runs: int) -> Any:
    """A matrix as rows of runs of 128 bytes, 8 rows and `runs` runs a box."""
    run = 128 // matrix.element_size()
    rows = matrix.numel() // matrix.shape[-1]
    shape = [rows, matrix.shape[-1] // run, run]
    return TensorDescriptor(
        matrix, shape, [matrix.stride(-2), run, 1], [8, runs, run], _layout(8 * matrix.element_size())
    )


@functools.cache
def _layout(bits: int) -> Any:
    return gl.NVMMASharedLayout(128, bits, rank=3)


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()
