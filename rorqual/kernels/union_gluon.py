"""`union` for Hopper in Gluon: a program takes 64 heads of a query against one run of its keys.

Four warps gather the run's rows, 64 at a time, into a ring of two tiles: from the query's window, from the pass's
own entries or from pages. A first group of four warps makes the scores of a tile, takes the softmax, leaves the
weights where a second group finds them, and adds the first quarter of the channels; the second group adds the
rest while the first is at the scores of the next tile. Rows of bytes (`entries`) are read into registers while the
tiles before them are in use, and multiplied out into the ring.
"""

from typing import Any

import torch
from torch import Tensor

from rorqual.kernels.entries import entry_bytes
from rorqual.kernels.gpu import INSTALLED, tl, triton

gluon: Any
gl: Any
try:
    import triton.experimental.gluon as gluon  # type: ignore[no-redef]
    import triton.experimental.gluon.language as gl  # type: ignore[no-redef]
    from triton.experimental.gluon.language.nvidia.hopper import (
        async_copy,
        fence_async_shared,
        mbarrier,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
except ImportError:  # Triton too old, or none: `supported` says so
    gluon, gl = triton, tl
    AVAILABLE = False
else:
    AVAILABLE = INSTALLED

HEADS, KEYS, STAGES, DIM = 64, 64, 2, 512
ROPE = 64
"""Rotary channels that rows of bytes must have."""
REGISTERS = {False: (184, 240), True: (168, 232)}
"""Registers of a thread of the first and the second group, by whether rows are bytes; the gathering warps have the
rest of 512."""


@gluon.jit
def _run(  # type: ignore[no-untyped-def]
    rings, positions, seqs, starts,
    WINDOW: gl.constexpr, RATIO: gl.constexpr, CHOSEN: gl.constexpr, NEW: gl.constexpr, ENTRIES: gl.constexpr,
    KEYS: gl.constexpr,
):  # fmt: skip
    """Row n's ring, position, keys in the window, those of this pass among them, all keys; and the first and last
    tile of this run. A padding row has no tiles."""
    n, split, splits = gl.program_id(0), gl.program_id(2), gl.num_programs(2)
    ring = gl.load(rings + n)
    position = gl.load(positions + n).to(gl.int32)
    near = gl.minimum(position + 1, WINDOW)
    fresh = 0
    if NEW:
        fresh = gl.minimum(n - gl.load(starts + gl.load(seqs + n)) + 1, near)
    count = near
    if ENTRIES:
        finished = (position + 1) // RATIO
        if CHOSEN > 0:
            count += gl.minimum(finished, CHOSEN)
        else:
            count += finished
    tiles = (count + KEYS - 1) // KEYS
    tiles = gl.where(ring < 0, 0, tiles)
    return ring, position, near, fresh, count, tiles * split // splits, tiles * (split + 1) // splits


@gluon.jit
def _rows(  # type: ignore[no-untyped-def]
    i, new, ring_items, entries, table, seqs, chosen, ring, position, near, fresh, columns, new_row,
    LENGTH: gl.constexpr, ROW: gl.constexpr, BYTES: gl.constexpr, PAGE: gl.constexpr, CHOSEN: gl.constexpr,
    NEW: gl.constexpr, ENTRIES: gl.constexpr,
):  # fmt: skip
    """Where keys `i` of this query's list begin."""
    n = gl.program_id(0)
    place = ring.to(gl.int64) * LENGTH + (position - near + 1 + i) % LENGTH
    at = ring_items + place * ROW
    if NEW:
        # The stride of bytes, 584, is no multiple of 16: as an argument it would count as one of 1.
        step = ROW if BYTES else new_row
        at = gl.where(i >= near - fresh, new + (n - near + 1 + i).to(gl.int64) * step, at)
    if ENTRIES:
        far = i >= near
        entry = gl.maximum(i - near, 0)
        if CHOSEN > 0:
            entry = gl.maximum(gl.load(chosen + n.to(gl.int64) * CHOSEN + entry, mask=far, other=0), 0)
        of = gl.load(seqs + n).to(gl.int64) * columns
        page = gl.load(table + of + entry // PAGE, mask=far, other=0)
        at = gl.where(far, entries + (page.to(gl.int64) * PAGE + entry % PAGE) * ROW, at)
    return at


@gluon.jit
def _put(part, stage, COLUMN: gl.constexpr, code, scales, BLOCK: gl.constexpr):  # type: ignore[no-untyped-def]
    """64 channels of a tile, multiplied out by block BLOCK's scale, into a part of the ring."""
    exponent = ((scales >> (8 * BLOCK)) & 255).to(gl.int32) << 23
    scale = exponent.to(gl.float32, bitcast=True)
    wide = code.to(gl.float8e4nv, bitcast=True).to(gl.float32) * scale[:, None]
    part.index(stage).slice(COLUMN, 64, dim=1).store(wide.to(part.dtype))


@gluon.jit
def _decode(at, k_parts, full, free, stage, parity, ROWS: gl.constexpr):  # type: ignore[no-untyped-def]
    """A tile of rows of bytes: read, then, when its place in the ring is free, multiplied out into it."""
    k_a, k_b, k_c = k_parts
    byte = at[:, None] + gl.arange(0, 64, gl.SliceLayout(0, ROWS))[None, :]
    code_0 = gl.load(byte)
    code_1 = gl.load(byte + 64)
    code_2 = gl.load(byte + 128)
    code_3 = gl.load(byte + 192)
    code_4 = gl.load(byte + 256)
    code_5 = gl.load(byte + 320)
    code_6 = gl.load(byte + 384)
    scales = gl.load((at + 448).to(gl.pointer_type(gl.int64)))
    tail = (at + 456).to(gl.pointer_type(gl.bfloat16))
    turned = gl.load(tail[:, None] + gl.arange(0, 64, gl.SliceLayout(0, ROWS))[None, :])
    mbarrier.wait(free, parity)
    _put(k_a, stage, 0, code_0, scales, 0)
    _put(k_a, stage, 64, code_1, scales, 1)
    _put(k_b, stage, 0, code_2, scales, 2)
    _put(k_b, stage, 64, code_3, scales, 3)
    _put(k_c, stage, 0, code_4, scales, 4)
    _put(k_c, stage, 64, code_5, scales, 5)
    _put(k_c, stage, 128, code_6, scales, 6)
    k_c.index(stage).slice(192, 64, dim=1).store(turned.to(k_c.dtype))
    fence_async_shared()
    mbarrier.arrive(full)


@gluon.jit
def _fetch(  # type: ignore[no-untyped-def]
    q, new, ring_items, rings, positions, entries, table, seqs, starts, chosen, q_parts, k_parts, bars, heads,
    columns, q_row, q_head, new_row,
    LENGTH: gl.constexpr, DIM: gl.constexpr, WINDOW: gl.constexpr, RATIO: gl.constexpr, PAGE: gl.constexpr,
    CHOSEN: gl.constexpr, NEW: gl.constexpr, ENTRIES: gl.constexpr, ROW: gl.constexpr,
):  # fmt: skip
    """The gathering warps: the queries, then the keys tile by tile."""
    q_full, k_full, k_free, _p_full, _p_free = bars
    q_a, q_b, q_c = q_parts
    k_a, k_b, k_c = k_parts
    HEADS: gl.constexpr = q_a.shape[0]
    STAGES: gl.constexpr = k_a.shape[0]
    KEYS: gl.constexpr = k_a.shape[1]
    A: gl.constexpr = q_a.shape[1]
    C: gl.constexpr = q_c.shape[1]
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    to_a = gl.arange(0, A, gl.SliceLayout(0, ROWS))[None, :]
    to_c = gl.arange(0, C, gl.SliceLayout(0, ROWS))[None, :] + 2 * A
    ring, position, near, fresh, count, first, last = _run(
        rings, positions, seqs, starts, WINDOW, RATIO, CHOSEN, NEW, ENTRIES, KEYS
    )
    n = gl.program_id(0)
    h = gl.program_id(1) * HEADS + gl.arange(0, HEADS, gl.SliceLayout(1, ROWS))
    h = gl.minimum(h, heads - 1)  # heads that don't exist: any that does, never stored
    row = q + n.to(gl.int64) * q_row + (h * q_head)[:, None]
    async_copy.async_copy_global_to_shared(q_a, row + to_a)
    async_copy.async_copy_global_to_shared(q_b, row + A + to_a)
    async_copy.async_copy_global_to_shared(q_c, row + to_c)
    async_copy.mbarrier_arrive(q_full, increment_count=False)
    key = gl.arange(0, KEYS, gl.SliceLayout(1, ROWS))
    for t in range(first, last):
        i = gl.minimum(t * KEYS + key, count - 1)  # keys that don't exist: one that does, with no weight
        at = _rows(
            i, new, ring_items, entries, table, seqs, chosen, ring, position, near, fresh, columns, new_row,
            LENGTH, ROW, ROW != DIM, PAGE, CHOSEN, NEW, ENTRIES,
        )  # fmt: skip
        done = t - first
        stage = done % STAGES
        parity = ((done // STAGES) & 1) ^ 1
        if ROW != DIM:
            _decode(at, k_parts, k_full.index(stage), k_free.index(stage), stage, parity, ROWS)
        else:
            at = at[:, None]
            mbarrier.wait(k_free.index(stage), parity)
            async_copy.async_copy_global_to_shared(k_a.index(stage), at + to_a)
            async_copy.async_copy_global_to_shared(k_b.index(stage), at + A + to_a)
            async_copy.async_copy_global_to_shared(k_c.index(stage), at + to_c)
            async_copy.mbarrier_arrive(k_full.index(stage), increment_count=False)


@gluon.jit
def _store(o, acc, heads, COLUMN: gl.constexpr, DIM: gl.constexpr, LAYOUT: gl.constexpr):  # type: ignore[no-untyped-def]
    """Channels of the result from COLUMN on, to memory [N, H, splits, DIM]."""
    h = gl.program_id(1) * acc.shape[0] + gl.arange(0, acc.shape[0], gl.SliceLayout(1, LAYOUT))
    c = COLUMN + gl.arange(0, acc.shape[1], gl.SliceLayout(0, LAYOUT))
    to = (gl.program_id(0).to(gl.int64) * heads + h) * gl.num_programs(2) + gl.program_id(2)
    gl.store(o + to[:, None] * DIM + c[None, :], acc.to(o.dtype.element_ty), mask=(h < heads)[:, None])


@gluon.jit
def _lead(  # type: ignore[no-untyped-def]
    rings, positions, seqs, starts, chosen, sink, o, lse, q_parts, k_parts, p_tile, fades, bars, heads, scale,
    DIM: gl.constexpr, WINDOW: gl.constexpr, RATIO: gl.constexpr, CHOSEN: gl.constexpr, NEW: gl.constexpr,
    ENTRIES: gl.constexpr, SINGLE: gl.constexpr,
):  # fmt: skip
    """The first group: scores, softmax and the first channels."""
    q_full, k_full, k_free, p_full, p_free = bars
    q_a, q_b, q_c = q_parts
    k_a, k_b, k_c = k_parts
    HEADS: gl.constexpr = q_a.shape[0]
    STAGES: gl.constexpr = k_a.shape[0]
    KEYS: gl.constexpr = k_a.shape[1]
    A: gl.constexpr = q_a.shape[1]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    VALUES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, A, 16])
    _ring, _position, near, _fresh, count, first, last = _run(
        rings, positions, seqs, starts, WINDOW, RATIO, CHOSEN, NEW, ENTRIES, KEYS
    )
    n = gl.program_id(0)
    mbarrier.wait(q_full, 0)
    # The lowest finite number, not -inf: a fade of exp2(-inf + inf) would be NaN.
    top = gl.full([HEADS], -1e30, gl.float32, gl.SliceLayout(1, SCORES))
    total = gl.zeros([HEADS], gl.float32, gl.SliceLayout(1, SCORES))
    acc = gl.zeros([HEADS, A], gl.float32, VALUES)
    for t in range(first, last):
        done = t - first
        stage = done % STAGES
        i = t * KEYS + gl.arange(0, KEYS, gl.SliceLayout(0, SCORES))
        live = i < count
        if CHOSEN > 0:
            far = live & (i >= near)
            live = live & (gl.load(chosen + n.to(gl.int64) * CHOSEN + i - near, mask=far, other=0) >= 0)
        mbarrier.wait(k_full.index(stage), (done // STAGES) & 1)
        fence_async_shared()  # ordinary copies wrote what the tensor cores read
        score = gl.zeros([HEADS, KEYS], gl.float32, SCORES)
        score = warpgroup_mma(q_a, k_a.index(stage).permute((1, 0)), score, use_acc=False, is_async=True)
        score = warpgroup_mma(q_b, k_b.index(stage).permute((1, 0)), score, is_async=True)
        score = warpgroup_mma(q_c, k_c.index(stage).permute((1, 0)), score, is_async=True)
        score = warpgroup_mma_wait(0, deps=[score])
        score = gl.where(live[None, :], score * scale, float("-inf"))
        higher = gl.maximum(top, gl.max(score, 1))
        weight = gl.exp2(score - higher[:, None])
        fade = gl.exp2(top - higher)
        total = total * fade + gl.sum(weight, 1)
        top = higher
        rounded = weight.to(p_tile.dtype)
        mbarrier.wait(p_free, (done & 1) ^ 1)
        p_tile.store(rounded)
        fades.store(fade)
        fence_async_shared()
        mbarrier.arrive(p_full)
        acc = acc * gl.convert_layout(fade, gl.SliceLayout(1, VALUES))[:, None]
        operand = gl.convert_layout(rounded, gl.DotOperandLayout(0, VALUES, 2))
        acc = warpgroup_mma(operand, k_a.index(stage), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(k_free.index(stage))
    h = gl.program_id(1) * HEADS + gl.arange(0, HEADS, gl.SliceLayout(1, SCORES))
    if SINGLE:
        logit = gl.load(sink + h, mask=h < heads, other=0.0) * 1.4426950408889634
        higher = gl.maximum(top, logit)
        fade = gl.exp2(top - higher)
        part = fade / (total * fade + gl.exp2(logit - higher))
    else:
        part = gl.where(total > 0, 1.0 / total, 0.0)
        to = (n.to(gl.int64) * heads + h) * gl.num_programs(2) + gl.program_id(2)
        sums = gl.where(total > 0, top + gl.log2(total), float("-inf"))
        gl.store(lse + to, sums, mask=h < heads)
    mbarrier.wait(p_free, ((last - first) & 1) ^ 1)
    fades.store(part)
    mbarrier.arrive(p_full)
    acc = acc * gl.convert_layout(part, gl.SliceLayout(1, VALUES))[:, None]
    _store(o, acc, heads, 0, DIM, VALUES)


@gluon.jit
def _follow(  # type: ignore[no-untyped-def]
    rings, positions, seqs, starts, o, k_parts, p_tile, fades, bars, heads,
    DIM: gl.constexpr, WINDOW: gl.constexpr, RATIO: gl.constexpr, CHOSEN: gl.constexpr, NEW: gl.constexpr,
    ENTRIES: gl.constexpr,
):  # fmt: skip
    """The second group: the other channels, by weights that the first left in `p_tile`."""
    _q_full, k_full, k_free, p_full, p_free = bars
    _k_a, k_b, k_c = k_parts
    HEADS: gl.constexpr = p_tile.shape[0]
    STAGES: gl.constexpr = k_b.shape[0]
    KEYS: gl.constexpr = k_b.shape[1]
    A: gl.constexpr = k_b.shape[2]
    C: gl.constexpr = k_c.shape[2]
    B_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, A, 16])
    C_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C, 16])
    _ring, _position, _near, _fresh, _count, first, last = _run(
        rings, positions, seqs, starts, WINDOW, RATIO, CHOSEN, NEW, ENTRIES, KEYS
    )
    acc_b = gl.zeros([HEADS, A], gl.float32, B_LAYOUT)
    acc_c = gl.zeros([HEADS, C], gl.float32, C_LAYOUT)
    for t in range(first, last):
        done = t - first
        stage = done % STAGES
        mbarrier.wait(k_full.index(stage), (done // STAGES) & 1)
        fence_async_shared()
        mbarrier.wait(p_full, done & 1)
        fade = fades.load(gl.SliceLayout(1, C_LAYOUT))
        acc_c = acc_c * fade[:, None]
        acc_b = acc_b * gl.convert_layout(fade, gl.SliceLayout(1, B_LAYOUT))[:, None]
        acc_c = warpgroup_mma(p_tile, k_c.index(stage), acc_c, is_async=True)
        acc_b = warpgroup_mma(p_tile, k_b.index(stage), acc_b, is_async=True)
        acc_b, acc_c = warpgroup_mma_wait(0, deps=[acc_b, acc_c])
        mbarrier.arrive(p_free)
        mbarrier.arrive(k_free.index(stage))
    mbarrier.wait(p_full, (last - first) & 1)
    part = fades.load(gl.SliceLayout(1, C_LAYOUT))
    acc_c = acc_c * part[:, None]
    acc_b = acc_b * gl.convert_layout(part, gl.SliceLayout(1, B_LAYOUT))[:, None]
    _store(o, acc_b, heads, A, DIM, B_LAYOUT)
    _store(o, acc_c, heads, 2 * A, DIM, C_LAYOUT)


@gluon.jit(do_not_specialize=("columns",))
def _attend(  # type: ignore[no-untyped-def]
    q, new, ring_items, rings, positions, entries, table, seqs, starts, chosen, sink, o, lse, heads, columns, q_row,
    q_head, new_row, scale,
    LENGTH: gl.constexpr, DIM: gl.constexpr, WINDOW: gl.constexpr, RATIO: gl.constexpr, PAGE: gl.constexpr,
    CHOSEN: gl.constexpr, NEW: gl.constexpr, ENTRIES: gl.constexpr, SINGLE: gl.constexpr, ROPE: gl.constexpr,
    SCALES: gl.constexpr, HEADS: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr, LEAD: gl.constexpr,
    FOLLOW: gl.constexpr,
):  # fmt: skip
    """As `union._attend`."""
    dtype: gl.constexpr = q.dtype.element_ty
    SWIZZLED: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    BAR: gl.constexpr = mbarrier.MBarrierLayout()
    A: gl.constexpr = DIM // 4
    C: gl.constexpr = DIM // 2
    ROW: gl.constexpr = DIM + SCALES + ROPE if SCALES > 0 else DIM
    q_a = gl.allocate_shared_memory(dtype, [HEADS, A], SWIZZLED)
    q_b = gl.allocate_shared_memory(dtype, [HEADS, A], SWIZZLED)
    q_c = gl.allocate_shared_memory(dtype, [HEADS, C], SWIZZLED)
    k_a = gl.allocate_shared_memory(dtype, [STAGES, KEYS, A], SWIZZLED)
    k_b = gl.allocate_shared_memory(dtype, [STAGES, KEYS, A], SWIZZLED)
    k_c = gl.allocate_shared_memory(dtype, [STAGES, KEYS, C], SWIZZLED)
    p_tile = gl.allocate_shared_memory(dtype, [HEADS, KEYS], SWIZZLED)
    fades = gl.allocate_shared_memory(gl.float32, [HEADS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    q_full = gl.allocate_shared_memory(gl.int64, [1], BAR)
    p_full = gl.allocate_shared_memory(gl.int64, [1], BAR)
    p_free = gl.allocate_shared_memory(gl.int64, [1], BAR)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    mbarrier.init(q_full, count=128)  # every gathering thread, when its copies are there
    mbarrier.init(p_full, count=1)
    mbarrier.init(p_free, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1 if SCALES > 0 else 128)
        mbarrier.init(k_free.index(i), count=2)
    q_parts = (q_a, q_b, q_c)
    k_parts = (k_a, k_b, k_c)
    bars = (q_full, k_full, k_free, p_full, p_free)
    gl.warp_specialize(
        [
            (
                _lead,
                (
                    rings, positions, seqs, starts, chosen, sink, o, lse, q_parts, k_parts, p_tile, fades, bars,
                    heads, scale, DIM, WINDOW, RATIO, CHOSEN, NEW, ENTRIES, SINGLE,
                ),
            ),
            (
                _follow,
                (
                    rings, positions, seqs, starts, o, k_parts, p_tile, fades, bars, heads, DIM, WINDOW, RATIO,
                    CHOSEN, NEW, ENTRIES,
                ),
            ),
            (
                _fetch,
                (
                    q, new, ring_items, rings, positions, entries, table, seqs, starts, chosen, q_parts, k_parts,
                    bars, heads, columns, q_row, q_head, new_row, LENGTH, DIM, WINDOW, RATIO, PAGE, CHOSEN, NEW,
                    ENTRIES, ROW,
                ),
            ),
        ],
        [4, 4],
        [FOLLOW, 512 - LEAD - FOLLOW],
    )  # fmt: skip


def supported(q_NHd: Tensor, *rows: Tensor | None, rope: int = 0) -> bool:
    """Whether `attend` takes these: 512 channels of bf16 or fp16 on a Hopper GPU, in rows that 16-byte copies can
    read, or bytes of them with 64 rotary channels. `rows`: everything that keys are read from."""
    there = [t for t in rows if t is not None]
    packed = bool(there) and there[0].dtype == torch.uint8
    if packed and (rope != ROPE or any(t.shape[-1] != entry_bytes(DIM, ROPE) for t in there)):
        return False
    return (
        AVAILABLE
        and q_NHd.is_cuda
        and torch.cuda.get_device_capability(q_NHd.device)[0] == 9
        and q_NHd.dtype in (torch.bfloat16, torch.float16)
        and q_NHd.shape[2] == DIM
        and all(t.dtype == (torch.uint8 if packed else q_NHd.dtype) and t.stride(-1) == 1 for t in there)
        and all(t.data_ptr() % 16 == 0 and all(s % 8 == 0 for s in t.stride()[:-1]) for t in [q_NHd, *there])
        and q_NHd.stride(-1) == 1
    )


def attend(grid: tuple[int, int, int], *args: Any, **constants: Any) -> None:
    """Launch with the arguments of `union._attend`, less its tile sizes."""
    lead, follow = REGISTERS[constants["SCALES"] > 0]
    _attend[grid](
        *args, **constants, HEADS=HEADS, KEYS=KEYS, STAGES=STAGES, LEAD=lead, FOLLOW=follow, num_warps=4
    )
