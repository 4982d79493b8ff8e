"""`mla_sparse` for Hopper in Gluon: 64 heads of a query a program, keys gathered by warps of their own
(`latent_gluon` has the rest)."""

import math
from typing import Any

import torch
from torch import Tensor

from rorqual.kernels.gpu import INSTALLED, tl, triton
from rorqual.kernels.latent_gluon import add, allocate, finish, multiply, take_queries, weigh
from rorqual.kernels.mla_sparse_gluon import _ends, _item

gluon: Any
gl: Any
try:
    from triton.experimental import gluon  # type: ignore[no-redef]
    from triton.experimental.gluon import language as gl  # type: ignore[no-redef]
    from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier
except ImportError:  # Triton too old, or none: `supported` says so
    gluon, gl = triton, tl
    AVAILABLE = False
else:
    AVAILABLE = INSTALLED

LOG2_E = math.log2(math.e)
BLOCK_H = 64
BLOCK_K = 64


@gluon.jit
def _fetch(  # type: ignore[no-untyped-def]
    pages, slots, ends, pieces, ropes, bars, items, head_blocks, splits, share, keys, p_t, slots_n,
    ROWS: gl.constexpr, COUNTED: gl.constexpr,
):  # fmt: skip
    """The fetching warps: the chosen rows, tile by tile, item after item."""
    full, free, _p_full, _p_free = bars
    PIECES: gl.constexpr = pieces.shape[0]
    TILE: gl.constexpr = pieces.shape[1]
    A: gl.constexpr = pieces.shape[2]
    E: gl.constexpr = ropes.shape[2]
    # Eight threads a row, so that a thread has few rows; 16 bytes a thread.
    LINES: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    to = gl.arange(0, A, gl.SliceLayout(0, LINES))[None, :]
    to_e = 4 * A + gl.arange(0, E, gl.SliceLayout(0, LINES))[None, :]
    k = gl.arange(0, TILE, gl.SliceLayout(1, LINES))
    n = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        row, _first, _split, start, tiles = _item(
            item, ends, head_blocks, splits, share, keys, ROWS, TILE, COUNTED
        )
        row = slots + row.to(gl.int64) * slots_n + start
        following = gl.load(row + k, mask=start + k < keys, other=-1)
        for j in range(tiles):
            slot = following
            key = (j + 1) * TILE + k
            following = gl.load(row + key, mask=start + key < keys, other=-1)
            there = (slot >= 0)[:, None]
            at = pages + (gl.maximum(slot, 0).to(gl.int64) * p_t)[:, None]
            for place in gl.static_range(4):
                stage = n % PIECES
                mbarrier.wait(free.index(stage), ((n // PIECES) & 1) ^ 1)
                async_copy.async_copy_global_to_shared(
                    pieces.index(stage), at + ((place % 2 * 2 + place // 2) * A + to), mask=there
                )
                if place == 3:
                    async_copy.async_copy_global_to_shared(ropes.index((n // 4) % 2), at + to_e, mask=there)
                async_copy.mbarrier_arrive(full.index(stage), increment_count=False)
                n += 1


@gluon.jit
def _scores(  # type: ignore[no-untyped-def]
    q, sums, slots, ends, queries, pieces, ropes, weights, fades, bars, items, head_blocks, splits, share, heads,
    keys, factor, q_n, q_h, slots_n, sums_s,
    HELD: gl.constexpr, COUNTED: gl.constexpr, LN_2: gl.constexpr,
):  # fmt: skip
    """The group of the scores."""
    full, _free, p_full, p_free = bars
    TILE: gl.constexpr = pieces.shape[1]
    ROWS: gl.constexpr = weights.shape[1]
    E: gl.constexpr = ropes.shape[2]
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    LINE: gl.constexpr = gl.SliceLayout(1, S)
    Q: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    h_q = gl.arange(0, ROWS, gl.SliceLayout(1, Q))
    h = gl.arange(0, ROWS, LINE)
    tile = 0
    turn = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        n, first, split, start, tiles = _item(
            item, ends, head_blocks, splits, share, keys, ROWS, TILE, COUNTED
        )
        of_h = q + n.to(gl.int64) * q_n + ((first + h_q) * q_h)[:, None]
        operands = take_queries(of_h, (first + h_q < heads)[:, None], queries, HELD, E, S, Q)
        row = slots + n.to(gl.int64) * slots_n
        # Lowest finite number, not -inf: a fade of exp2(-inf + inf) would be NaN.
        peak = gl.full([ROWS], -1e30, gl.float32, LINE)
        total = gl.zeros([ROWS], gl.float32, LINE)
        for j in range(tiles):
            place = start + j * TILE + gl.arange(0, TILE, gl.SliceLayout(0, S))
            slot = gl.load(row + place, mask=place < keys, other=-1)
            score = multiply(operands, pieces, ropes, full, tile, E, True, S)
            score = gl.where((slot >= 0)[None, :], score, float("-inf"))
            peak, total = weigh(score, peak, total, factor, weights, fades, p_full, p_free, turn)
            tile += 1  # noqa: SIM113
            turn += 1  # noqa: SIM113
        finish(gl.where(total > 0, 1.0 / total, 0.0), fades, p_full, p_free, turn)
        turn += 1  # noqa: SIM113
        sum_ = gl.where(total > 0, peak * LN_2 + gl.log(total), float("-inf"))
        gl.store(sums + split * sums_s + n * heads + first + h, sum_, mask=first + h < heads)


@gluon.jit
def _values(  # type: ignore[no-untyped-def]
    o, ends, pieces, weights, fades, bars, items, head_blocks, splits, share, heads, keys, o_s, o_n, o_h,
    HALF: gl.constexpr, COUNTED: gl.constexpr,
):  # fmt: skip
    """A group of the values."""
    TILE: gl.constexpr = pieces.shape[1]
    A: gl.constexpr = pieces.shape[2]
    ROWS: gl.constexpr = weights.shape[1]
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, A, 16])  # noqa: E741
    h = gl.arange(0, ROWS, gl.SliceLayout(1, O))
    c = 2 * HALF * A + gl.arange(0, A, gl.SliceLayout(0, O))[None, :]
    tile = 0
    turn = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        n, first, split, _start, tiles = _item(
            item, ends, head_blocks, splits, share, keys, ROWS, TILE, COUNTED
        )
        low, high = add(pieces, weights, fades, bars, tile, turn, tiles, HALF, True)
        tile += tiles
        turn += tiles + 1
        to = o + split.to(gl.int64) * o_s + n.to(gl.int64) * o_n + ((first + h) * o_h)[:, None] + c
        real = (first + h < heads)[:, None]
        gl.store(to, low.to(o.dtype.element_ty), mask=real)
        gl.store(to + A, high.to(o.dtype.element_ty), mask=real)


@gluon.jit(do_not_specialize=("items", "splits", "sums_s"))
def _sparse(  # type: ignore[no-untyped-def]
    q, pages, slots, ends, o, sums, factor, items, head_blocks, splits, share, heads, keys, q_n, q_h, p_t, slots_n,
    o_s, o_n, o_h, sums_s,
    A: gl.constexpr, E: gl.constexpr, ROWS: gl.constexpr, TILE: gl.constexpr, HELD: gl.constexpr,
    PIECES: gl.constexpr, SLOTS: gl.constexpr, VALUES: gl.constexpr, FETCH: gl.constexpr, COUNTED: gl.constexpr,
    LN_2: gl.constexpr,
):  # fmt: skip
    queries, pieces, ropes, weights, fades, bars = allocate(
        q.dtype.element_ty, HELD, PIECES, ROWS, TILE, A, E, SLOTS, 128
    )
    gl.warp_specialize(
        [
            (
                _scores,
                (
                    q, sums, slots, ends, queries, pieces, ropes, weights, fades, bars, items, head_blocks, splits,
                    share, heads, keys, factor, q_n, q_h, slots_n, sums_s, HELD, COUNTED, LN_2,
                ),
            ),
            (
                _values,
                (
                    o, ends, pieces, weights, fades, bars, items, head_blocks, splits, share, heads, keys, o_s, o_n,
                    o_h, 0, COUNTED,
                ),
            ),
            (
                _values,
                (
                    o, ends, pieces, weights, fades, bars, items, head_blocks, splits, share, heads, keys, o_s, o_n,
                    o_h, 1, COUNTED,
                ),
            ),
            (
                _fetch,
                (
                    pages, slots, ends, pieces, ropes, bars, items, head_blocks, splits, share, keys, p_t, slots_n,
                    ROWS, COUNTED,
                ),
            ),
        ],
        [4, 4, 4],
        [VALUES, VALUES, FETCH],
    )  # fmt: skip


def launch(
    q_NHC: Tensor,
    pages: tuple[Tensor, Tensor, Tensor],
    slots_NK: Tensor,
    parts: Tensor,
    sums: Tensor,
    share: int,
    *,
    scale: float,
    programs: int | None = None,
    how: tuple[int, int, int, int] = (1, 9, 160, 64),
) -> None:
    """As `mla_sparse_gluon.launch`."""
    held = pages[0]
    (splits, N, H, rank), K = parts.shape, slots_NK.shape[1]
    head_blocks = triton.cdiv(H, BLOCK_H)
    items = N * head_blocks * splits
    if programs is None:
        programs = torch.cuda.get_device_properties(q_NHC.device).multi_processor_count
    counted = items > programs  # else a row's end is found out while others are at work, and gains nothing
    ends_N = slots_NK
    if counted:
        ends_N = torch.empty(N, dtype=torch.int32, device=q_NHC.device)
        _ends[(N,)](slots_NK, ends_N, K, slots_NK.stride(0), KEYS=triton.next_power_of_2(K), num_warps=4)
    quarters, pieces, values, fetch = how
    _sparse[(min(programs, items),)](
        q_NHC, held, slots_NK, ends_N, parts, sums, scale * LOG2_E, items, head_blocks, splits, share, H, K,
        q_NHC.stride(0), q_NHC.stride(1), held.stride(1), slots_NK.stride(0), parts.stride(0), parts.stride(1),
        parts.stride(2), sums.stride(0), A=rank // 4, E=q_NHC.shape[2] - rank, ROWS=BLOCK_H, TILE=BLOCK_K,
        HELD=quarters, PIECES=pieces, SLOTS=2, VALUES=values, FETCH=fetch, COUNTED=counted, LN_2=math.log(2),
        num_warps=4,
    )  # fmt: skip
