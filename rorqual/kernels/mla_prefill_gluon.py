"""`mla_prefill` for Hopper in Gluon, where the programmer places what Triton otherwise decides.

One program is a warp that fetches tiles by the bulk copy engine (TMA) and two groups of four warps, each with
64 of the 128 queries. A group asks for the scores of tile j together with the values of tile j - 1, and takes
the softmax of the one while the other is under way; the groups take turns at the tensor cores, so that one's
softmax lies under the other's products (the order of FlashAttention-3, Shah et al. 2024, section 3).

Key tiles, their order and the rounding are those of `mla_prefill`'s contract: fixed, from key 0 on. The last tile
of a sequence reaches into the rows of the next, whose weights are zero: values there must be finite.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from rorqual.kernels.gluon_rings import processors
from rorqual.kernels.gpu import INSTALLED, tl, triton

gluon: Any
gl: Any
try:
    import triton.experimental.gluon as gluon  # type: ignore[no-redef]
    import triton.experimental.gluon.language as gl  # type: ignore[no-redef]
    from triton.experimental.gluon.language.nvidia.hopper import (
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
except ImportError:  # Triton too old, or none: `supported` says so
    gluon, gl = triton, tl

    AVAILABLE = False
else:
    AVAILABLE = INSTALLED

LOG2_E = 1.4426950408889634
BLOCK_M = 128
BLOCK_N = 128
STAGES = 2
CACHE_BYTES = 2**25


@gluon.jit
def _item(  # type: ignore[no-untyped-def]
    item, starts_q, starts_k, heads, sequences, blocks, group, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr
):
    """Which queries work item `item` has: first row of q, head, first key, keys before the first query's own,
    queries left, key tiles all of them see whole, key tiles in all (0: no such queries).

    Each sequence has `blocks` blocks of queries. If that is 0, sequence s has those from `starts_q[s] // BLOCK_M + s`
    on, which is one too many at most, so that the number of items is known without its length. `group` heads at a
    time, so that their keys stay in the cache, take their blocks from the last, which see most, to the first.
    """
    s = item // (heads * gl.maximum(blocks, 1))
    rest = item - s * heads * blocks
    if blocks == 0:
        block = item // heads
        s = 0
        high = sequences - 1
        while s < high:  # the last sequence whose first block is not behind this one
            middle = (s + high + 1) // 2
            starts = gl.load(starts_q + middle) // BLOCK_M + middle <= block
            s = gl.where(starts, middle, s)
            high = gl.where(starts, high, middle - 1)
    q0 = gl.load(starts_q + s)
    k0 = gl.load(starts_k + s)
    queries = gl.load(starts_q + s + 1) - q0
    keys = gl.load(starts_k + s + 1) - k0
    if blocks == 0:
        blocks = (q0 + queries) // BLOCK_M - q0 // BLOCK_M + 1
        rest = item - (q0 // BLOCK_M + s) * heads
    base = rest // (group * blocks) * group
    abreast = gl.maximum(gl.minimum(group, heads - base), 1)  # rows behind the last sequence: no head is left
    rest -= base * blocks
    first = (blocks - 1 - rest // abreast) * BLOCK_M
    before = keys - queries + first
    whole = (before + 1) // BLOCK_N
    tiles = (gl.minimum(before + BLOCK_M, keys) + BLOCK_N - 1) // BLOCK_N
    tiles = gl.where((base < heads) & (first >= 0) & (first < queries), tiles, 0)
    return q0 + first, base + rest % abreast, k0, before, queries - first, whole, tiles


@gluon.jit
def _hand_out(plan, bars, turn, row, head, before, left, whole, tiles):  # type: ignore[no-untyped-def]
    """By the fetching warp: what the groups need to know of an item. No tiles: there is none any more."""
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    plan_full, plan_free = bars[5], bars[6]
    mbarrier.wait(plan_free.index(turn % 2), ((turn // 2) & 1) ^ 1)
    at = turn % 2 * 6
    none = gl.full([1], 0, gl.int32, ONE)
    plan.index(at).store(none + row)
    plan.index(at + 1).store(none + head)
    plan.index(at + 2).store(none + before)
    plan.index(at + 3).store(none + left)
    plan.index(at + 4).store(none + whole)
    plan.index(at + 5).store(none + tiles)
    mbarrier.arrive(plan_full.index(turn % 2))


@gluon.jit
def _take(plan, bars, turn):  # type: ignore[no-untyped-def]
    """By a group: what was handed out."""
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    plan_full, plan_free = bars[5], bars[6]
    mbarrier.wait(plan_full.index(turn % 2), (turn // 2) & 1)
    at = turn % 2 * 6
    row = gl.max(plan.index(at).load(ONE), 0)
    head = gl.max(plan.index(at + 1).load(ONE), 0)
    before = gl.max(plan.index(at + 2).load(ONE), 0)
    left = gl.max(plan.index(at + 3).load(ONE), 0)
    whole = gl.max(plan.index(at + 4).load(ONE), 0)
    tiles = gl.max(plan.index(at + 5).load(ONE), 0)
    mbarrier.arrive(plan_free.index(turn % 2))
    return row, head, before, left, whole, tiles


@gluon.jit
def _fetch(  # type: ignore[no-untyped-def]
    q_desc, qr_desc, k_desc, r_desc, v_desc, q_tile, qr_tile, k_tiles, r_tiles, v_tiles, plan, bars, counter,
    starts_q, starts_k, heads, sequences, items, blocks, group, q_h, k_h, v_h,
    NOPE: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The fetching warp: picks items, hands them out, fetches the queries of each, then its tiles. A tile's values
    may follow the keys of the next tile, which are wanted first. The next item is drawn two tiles before the end: drawn
    at the start, a long one would wait for this one to end, whoever is free."""
    q_full, q_free, k_full, v_full, free, _plan_full, _plan_free = bars
    turn = 0
    tile = 0
    item = gl.program_id(0)
    while item < items:
        following = item
        row, head, k0, before, left, whole, tiles = _item(
            item, starts_q, starts_k, heads, sequences, blocks, group, BLOCK_M, BLOCK_N
        )
        if tiles == 0:
            following = gl.atomic_add(counter, 1, sem="relaxed") + gl.num_programs(0)
        if tiles > 0:
            _hand_out(plan, bars, turn, row, head, before, left, whole, tiles)
            # Free since the wait for the values before.
            full = k_full.index(tile % STAGES)
            mbarrier.expect(full, k_desc.block_type.nbytes + r_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(k_desc, [k0, head * k_h], full, k_tiles.index(tile % STAGES))
            tma.async_copy_global_to_shared(r_desc, [k0, 0], full, r_tiles.index(tile % STAGES))
            mbarrier.wait(q_free, (turn & 1) ^ 1)
            mbarrier.expect(q_full, 2 * q_desc.block_type.nbytes + 2 * qr_desc.block_type.nbytes)
            for half in gl.static_range(2):
                top = row + half * (BLOCK_M // 2)
                tma.async_copy_global_to_shared(q_desc, [top, head * q_h], q_full, q_tile.index(half))
                tma.async_copy_global_to_shared(
                    qr_desc, [top, head * q_h + NOPE], q_full, qr_tile.index(half)
                )
            turn += 1
        for j in range(tiles):
            if j == gl.maximum(tiles - 2, 0):
                following = gl.atomic_add(counter, 1, sem="relaxed") + gl.num_programs(0)
            # Tile `tile - 1` is done with: its keys, and the values of the one before.
            mbarrier.wait(free.index((tile + STAGES - 1) % STAGES), (((tile + STAGES - 1) // STAGES) & 1) ^ 1)
            key = k0 + j * BLOCK_N
            full = v_full.index(tile % STAGES)
            mbarrier.expect(full, v_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(v_desc, [key, head * v_h], full, v_tiles.index(tile % STAGES))
            tile += 1
            more = j + 1 < tiles
            full = k_full.index(tile % STAGES)
            mbarrier.expect(full, k_desc.block_type.nbytes + r_desc.block_type.nbytes, pred=more)
            key += BLOCK_N
            tma.async_copy_global_to_shared(
                k_desc, [key, head * k_h], full, k_tiles.index(tile % STAGES), pred=more
            )
            tma.async_copy_global_to_shared(r_desc, [key, 0], full, r_tiles.index(tile % STAGES), pred=more)
        item = following
    _hand_out(plan, bars, turn, 0, 0, 0, 0, 0, 0)


@gluon.jit
def _soften(  # type: ignore[no-untyped-def]
    score, top, total, factor, place, start, MASKED: gl.constexpr, S_LAYOUT: gl.constexpr
):
    """Scores to weights: (weights, fade of what was summed before, new top, in powers of two, new total).
    Explicit fmas, so that masked and unmasked tiles round alike."""
    if MASKED:
        BLOCK_N: gl.constexpr = score.shape[1]
        key = start + gl.arange(0, BLOCK_N, gl.SliceLayout(0, S_LAYOUT))
        score = gl.where(place[:, None] >= key[None, :], score, float("-inf"))
    higher = gl.maximum(top, gl.max(score, 1) * factor)
    weight = gl.exp2(gl.fma(score, gl.full_like(score, 0.0) + factor, gl.zeros_like(score) - higher[:, None]))
    fade = gl.exp2(top - higher)
    total = gl.fma(total, fade, gl.sum(weight, 1))
    return weight, fade, higher, total


@gluon.jit
def _hold(total):  # type: ignore[no-untyped-def]
    """`total`, computed before whatever follows: the assembler would otherwise put a softmax behind the wait
    that it was to fill. (The mask is all lanes, since a total is not negative; the assembler can't know.)"""
    return gl.inline_asm_elementwise(
        "{ .reg .b32 m; shr.u32 m, $2, 31; sub.u32 m, m, 1; bar.warp.sync m; mov.b32 $0, $2; mov.b32 $1, $3; }",
        "=f,=f,f,f", [total], dtype=gl.float32, is_pure=False, pack=2,
    )  # fmt: skip


@gluon.jit
def _step(  # type: ignore[no-untyped-def]
    q, qr, k_tiles, r_tiles, v_tiles, bars, mine, others, acc, weight, top, total, factor, place, j, tile, rounds, done,
    MASKED: gl.constexpr, S_LAYOUT: gl.constexpr, O_LAYOUT: gl.constexpr, TURNS: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Scores of tile j with the values of tile j - 1 beside them, then the softmax of tile j. `done`: the last tile,
    and room for other queries."""
    _q_full, q_free, k_full, v_full, free, _plan_full, _plan_free = bars
    HALF: gl.constexpr = q.shape[0]
    stage = tile % STAGES
    last = (tile - 1) % STAGES
    mbarrier.wait(k_full.index(stage), (tile // STAGES) & 1)
    mbarrier.wait(v_full.index(last), ((tile - 1) // STAGES) & 1)
    if TURNS:
        mbarrier.wait(mine, rounds & 1)
    score = gl.zeros([HALF, BLOCK_N], gl.float32, S_LAYOUT)
    score = warpgroup_mma(q, k_tiles.index(stage).permute((1, 0)), score, use_acc=False, is_async=True)
    score = warpgroup_mma(qr, r_tiles.index(stage).permute((1, 0)), score, is_async=True)
    acc = warpgroup_mma(weight, v_tiles.index(last), acc, is_async=True)
    if TURNS:
        mbarrier.arrive(others)
    score = warpgroup_mma_wait(1, deps=[score])
    mbarrier.arrive(q_free, pred=done)
    new, fade, top, total = _soften(score, top, total, factor, place, j * BLOCK_N, MASKED, S_LAYOUT)
    new = gl.convert_layout(new.to(v_tiles.dtype), gl.DotOperandLayout(0, O_LAYOUT, 2))
    total = _hold(total)
    acc, weight, new, fade, total = warpgroup_mma_wait(0, deps=[acc, weight, new, fade, total])
    mbarrier.arrive(free.index(stage))
    acc = acc * gl.convert_layout(fade, gl.SliceLayout(1, O_LAYOUT))[:, None]
    return acc, new, top, total


@gluon.jit
def _attend(  # type: ignore[no-untyped-def]
    o, q_tile, qr_tile, k_tiles, r_tiles, v_tiles, plan, bars, mine, others, factor, o_n, o_h,
    GROUP: gl.constexpr, TURNS: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    V: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A group of four warps: its half of every item's queries."""
    HALF: gl.constexpr = BLOCK_M // 2
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, V, 16])
    q_full, q_free, k_full, v_full, free, _plan_full, _plan_free = bars
    q = q_tile.index(GROUP)
    qr = qr_tile.index(GROUP)
    rows = gl.arange(0, HALF, gl.SliceLayout(1, S_LAYOUT)) + GROUP * HALF
    tile = 0
    turn = 0
    rounds = 1 - GROUP  # the first group goes first: its first wait is for the phase before any
    row, head, before, left, whole, tiles = _take(plan, bars, turn)
    while tiles > 0:
        place = before + rows
        stage = tile % STAGES
        mbarrier.wait(q_full, turn & 1)
        mbarrier.wait(k_full.index(stage), (tile // STAGES) & 1)
        score = gl.zeros([HALF, BLOCK_N], gl.float32, S_LAYOUT)
        score = warpgroup_mma(q, k_tiles.index(stage).permute((1, 0)), score, use_acc=False, is_async=True)
        score = warpgroup_mma(qr, r_tiles.index(stage).permute((1, 0)), score, is_async=True)
        score = warpgroup_mma_wait(0, deps=[score])
        mbarrier.arrive(q_free, pred=tiles == 1)
        mbarrier.arrive(free.index(stage))
        # Lowest finite number, not -inf: a fade of exp2(-inf + inf) would be NaN.
        top = gl.full([HALF], -1e30, gl.float32, gl.SliceLayout(1, S_LAYOUT))
        total = gl.zeros([HALF], gl.float32, gl.SliceLayout(1, S_LAYOUT))
        new, _fade, top, total = _soften(score, top, total, factor, place, 0, True, S_LAYOUT)
        acc = gl.zeros([HALF, V], gl.float32, O_LAYOUT)
        weight = gl.convert_layout(new.to(v_tiles.dtype), gl.DotOperandLayout(0, O_LAYOUT, 2))
        tile += 1
        for j in range(1, gl.minimum(whole, tiles)):
            acc, weight, top, total = _step(
                q, qr, k_tiles, r_tiles, v_tiles, bars, mine, others, acc, weight, top, total, factor, place,
                j, tile, rounds, j + 1 == tiles, False, S_LAYOUT, O_LAYOUT, TURNS, BLOCK_N, STAGES,
            )  # fmt: skip
            tile += 1
            rounds += 1
        for j in range(gl.maximum(whole, 1), tiles):
            acc, weight, top, total = _step(
                q, qr, k_tiles, r_tiles, v_tiles, bars, mine, others, acc, weight, top, total, factor, place,
                j, tile, rounds, j + 1 == tiles, True, S_LAYOUT, O_LAYOUT, TURNS, BLOCK_N, STAGES,
            )  # fmt: skip
            tile += 1
            rounds += 1
        # The next item's first arrival at `free` says that these values are done with.
        last = (tile - 1) % STAGES
        mbarrier.wait(v_full.index(last), ((tile - 1) // STAGES) & 1)
        acc = warpgroup_mma(weight, v_tiles.index(last), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
        acc = acc / gl.convert_layout(total, gl.SliceLayout(1, O_LAYOUT))[:, None]
        m = gl.arange(0, HALF, gl.SliceLayout(1, O_LAYOUT)) + GROUP * HALF
        n = gl.arange(0, V, gl.SliceLayout(0, O_LAYOUT))
        to = o + row.to(gl.int64) * o_n + head * o_h + m[:, None] * o_n + n[None, :]
        gl.store(to, acc.to(o.dtype.element_ty), mask=(m < left)[:, None])
        turn += 1
        row, head, before, left, whole, tiles = _take(plan, bars, turn)


@gluon.jit(do_not_specialize=("sequences", "items", "blocks", "group"))
def _prefill(  # type: ignore[no-untyped-def]
    q_desc, qr_desc, k_desc, r_desc, v_desc, o, counter, starts_q, starts_k, factor, q_h, k_h, v_h, o_n, o_h,
    heads, sequences, items, blocks, group,
    NOPE: gl.constexpr, V: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    TURNS: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = q_desc.dtype
    BAR: gl.constexpr = mbarrier.MBarrierLayout()
    # The compiler knows no unpacking here.
    q_tile = gl.allocate_shared_memory(dtype, [2] + q_desc.block_type.shape, q_desc.layout)  # noqa: RUF005
    qr_tile = gl.allocate_shared_memory(dtype, [2] + qr_desc.block_type.shape, qr_desc.layout)  # noqa: RUF005
    k_tiles = gl.allocate_shared_memory(dtype, [STAGES] + k_desc.block_type.shape, k_desc.layout)  # noqa: RUF005
    r_tiles = gl.allocate_shared_memory(dtype, [STAGES] + r_desc.block_type.shape, r_desc.layout)  # noqa: RUF005
    V_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, V], dtype)
    v_tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, V], V_LAYOUT)
    plan = gl.allocate_shared_memory(gl.int32, [12, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    q_full = gl.allocate_shared_memory(gl.int64, [1], BAR)
    q_free = gl.allocate_shared_memory(gl.int64, [1], BAR)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    plan_full = gl.allocate_shared_memory(gl.int64, [2, 1], BAR)
    plan_free = gl.allocate_shared_memory(gl.int64, [2, 1], BAR)
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], BAR)
    mbarrier.init(q_full, count=1)
    mbarrier.init(q_free, count=2)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(free.index(i), count=2)
    for i in gl.static_range(2):
        mbarrier.init(plan_full.index(i), count=1)
        mbarrier.init(plan_free.index(i), count=2)
        mbarrier.init(turns.index(i), count=1)
    bars = (q_full, q_free, k_full, v_full, free, plan_full, plan_free)
    gl.warp_specialize(
        [
            (
                _attend,
                (
                    o, q_tile, qr_tile, k_tiles, r_tiles, v_tiles, plan, bars, turns.index(0), turns.index(1),
                    factor, o_n, o_h, 0, TURNS, BLOCK_M, BLOCK_N, V, STAGES,
                ),
            ),
            (
                _attend,
                (
                    o, q_tile, qr_tile, k_tiles, r_tiles, v_tiles, plan, bars, turns.index(1), turns.index(0),
                    factor, o_n, o_h, 1, TURNS, BLOCK_M, BLOCK_N, V, STAGES,
                ),
            ),
            (
                _fetch,
                (
                    q_desc, qr_desc, k_desc, r_desc, v_desc, q_tile, qr_tile, k_tiles, r_tiles, v_tiles, plan, bars,
                    counter, starts_q, starts_k, heads, sequences, items, blocks, group, q_h, k_h, v_h, NOPE, BLOCK_M,
                    BLOCK_N, STAGES,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def supported(q_NHd: Tensor, k_MHn: Tensor, rope_Mr: Tensor, v_MHv: Tensor) -> bool:
    """Whether `fast` takes these: bf16 or fp16 on a Hopper GPU, head parts powers of two that fit in shared
    memory, and strides that TMA can follow, heads side by side in a row."""
    tensors = (q_NHd, k_MHn, rope_Mr, v_MHv)
    return (
        AVAILABLE
        and all(t.is_cuda for t in tensors)
        and torch.cuda.get_device_capability(q_NHd.device)[0] == 9
        and q_NHd.dtype in (torch.bfloat16, torch.float16)
        and all(t.dtype == q_NHd.dtype and t.stride(-1) == 1 and t.data_ptr() % 16 == 0 for t in tensors)
        and all(s % 8 == 0 for t in tensors for s in t.stride()[:-1])
        and all(t.stride(1) * t.shape[1] <= t.stride(0) for t in (q_NHd, k_MHn, v_MHv))
        and all(16 <= w <= 128 and w & (w - 1) == 0 for w in (t.shape[-1] for t in tensors[1:]))
        and rope_Mr.shape[-1] <= 64
    )


def _descriptor(x: Tensor, rows: int, columns: int) -> Any:
    """Tiles `[rows, columns]` of x `[M, C]` or, its heads side by side, `[M, H, C]`."""
    width = x.shape[-1] if x.dim() == 2 else (x.shape[1] - 1) * x.stride(1) + x.shape[2]
    return TensorDescriptor(
        x, [x.shape[0], width], [x.stride(0), 1], [rows, columns], _layout(rows, columns, x.dtype)
    )


@functools.cache
def _layout(rows: int, columns: int, dtype: torch.dtype) -> Any:
    """Kept: making it takes the host 20 us, and short prompts wait for the host."""
    return gl.NVMMASharedLayout.get_default_for([rows, columns], getattr(gl, str(dtype).split(".")[-1]))


def fast(
    q_NHd: Tensor,
    k_MHn: Tensor,
    rope_Mr: Tensor,
    v_MHv: Tensor,
    starts_q: Tensor,
    starts_k: Tensor,
    *,
    max_q: int,
    max_k: int,
    scale: float,
    fixed: bool = False,
    out: Tensor | None = None,
    block_n: int = BLOCK_N,
    stages: int = STAGES,
    turns: bool = True,
    programs: int | None = None,
    group: int | None = None,
) -> Tensor:
    """`mla_prefill`, whose tiles depend on no shape whether `fixed` or not. The rest is for measuring."""
    (N, H, _), nope, rope, width = q_NHd.shape, k_MHn.shape[-1], rope_Mr.shape[-1], v_MHv.shape[-1]
    o_NHv = q_NHd.new_empty(N, H, width) if out is None else out
    sequences = starts_q.numel() - 1
    if not o_NHv.numel() or sequences < 1:
        return o_NHv
    if group is None:  # what a lane's keys and values take of the cache
        group = max(1, CACHE_BYTES // (max_k * (nope + width) * q_NHd.element_size() or 1))
    if programs is None:
        programs = processors(q_NHd)
    counter = torch.zeros(1, dtype=torch.int32, device=q_NHd.device)
    items, blocks = (N // BLOCK_M + sequences) * H, 0  # see `_item`
    if 0 < -(-max_q // BLOCK_M) * sequences * H <= items:
        blocks = -(-max_q // BLOCK_M)
        items = blocks * sequences * H
    _prefill[(min(programs, items),)](
        _descriptor(q_NHd, BLOCK_M // 2, nope), _descriptor(q_NHd, BLOCK_M // 2, rope),
        _descriptor(k_MHn, block_n, nope), _descriptor(rope_Mr, block_n, rope),
        _descriptor(v_MHv, block_n, width),
        o_NHv, counter, starts_q, starts_k, scale * LOG2_E, q_NHd.stride(1), k_MHn.stride(1), v_MHv.stride(1),
        o_NHv.stride(0), o_NHv.stride(1), H, sequences, items, blocks, min(group, H), NOPE=nope, V=width,
        BLOCK_M=BLOCK_M, BLOCK_N=block_n, STAGES=stages, TURNS=turns, num_warps=4,
    )  # fmt: skip
    return o_NHv
