"""The third kernel of `mla_sparse_backward` for Hopper in Gluon: the gradients of the rows.

q and do of 128 heads stay in shared memory, half the channels of each (136 KB), while the copy engine (TMA) brings P
and dS in tiles of 64 keys. Two groups of four warps take turns at the tiles, so that one adds its rows to memory while
the other multiplies. Additions take longer than all the rest: 2,304 bytes a row, where 128 * 1,088 products stand
against them. They go out as whole lines of 128 bytes (1.87 us a query on an H200), not as the tensor cores leave them
(32 bytes of eight rows: 2.31 us).
"""

# mypy: disable-error-code="no-untyped-def"

import functools
from typing import Any

from torch import Tensor

from rorqual.kernels.gluon_rings import (
    gl,
    gluon,
    mbarrier,
    processors,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from rorqual.kernels.mla_sparse_backward_gluon import BLOCK_K, PARTS, descriptor

STAGES = 2


@gluon.jit
def _fetch_entries(
    p_desc, ds_desc, q_desc, e_desc, do_desc, ends, q_tile, e_tile, do_tile, p_tiles, s_tiles, bars, items, parts,
    heads, RANK: gl.constexpr,
):  # fmt: skip
    """A warp that has the copy engine fetch an item's q and do, then P and dS tile by tile."""
    q_full, q_free, full, free = bars
    STAGES: gl.constexpr = p_tiles.shape[0]
    BLOCK_K: gl.constexpr = p_tiles.shape[2]
    WIDE: gl.constexpr = q_tile.shape[1]
    NARROW: gl.constexpr = e_tile.shape[1]
    tile = 0
    done = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        n = item // parts
        part = item % parts
        end = gl.load(ends + n)
        mbarrier.wait(q_free, (done & 1) ^ 1)
        mbarrier.expect(
            q_full, q_desc.block_type.nbytes + e_desc.block_type.nbytes + do_desc.block_type.nbytes
        )
        tma.async_copy_global_to_shared(q_desc, [n * heads, part * WIDE], q_full, q_tile)
        tma.async_copy_global_to_shared(e_desc, [n * heads, RANK + part * NARROW], q_full, e_tile)
        tma.async_copy_global_to_shared(do_desc, [n * heads, part * WIDE], q_full, do_tile)
        for start in range(0, end, BLOCK_K):
            stage = tile % STAGES
            mbarrier.wait(free.index(stage), ((tile // STAGES) & 1) ^ 1)
            mbarrier.expect(full.index(stage), p_desc.block_type.nbytes + ds_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(
                p_desc, [n * heads, start], full.index(stage), p_tiles.index(stage)
            )
            tma.async_copy_global_to_shared(
                ds_desc, [n * heads, start], full.index(stage), s_tiles.index(stage)
            )
            tile += 1
        done += 1  # noqa: SIM113


@gluon.jit
def _entry_group(
    dlatent, slots, ends, q_tile, e_tile, do_tile, p_tiles, s_tiles, bars, items, parts, slots_n, l_m,
    RANK: gl.constexpr, GROUP: gl.constexpr, ADD: gl.constexpr, ADD_E: gl.constexpr, TURNS: gl.constexpr,
):  # fmt: skip
    """Every second tile's dK + dV, added to memory in layout ADD."""
    q_full, q_free, full, free = bars
    STAGES: gl.constexpr = p_tiles.shape[0]
    BLOCK_K: gl.constexpr = p_tiles.shape[2]
    WIDE: gl.constexpr = q_tile.shape[1]
    NARROW: gl.constexpr = e_tile.shape[1]
    K_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDE, 16])
    E_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, NARROW, 16])
    key = gl.arange(0, BLOCK_K, gl.SliceLayout(1, ADD))
    key_e = gl.arange(0, BLOCK_K, gl.SliceLayout(1, ADD_E))
    c = gl.arange(0, WIDE, gl.SliceLayout(0, ADD))[None, :]
    e = gl.arange(0, NARROW, gl.SliceLayout(0, ADD_E))[None, :]
    tile = 0
    done = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        n = item // parts
        part = item % parts
        end = gl.load(ends + n)
        row = slots + n.to(gl.int64) * slots_n
        tiles = (end + BLOCK_K - 1) // BLOCK_K
        mbarrier.wait(q_full, done & 1)
        for j in range((tile + GROUP) % 2, tiles, 2):
            stage = (tile + j) % STAGES
            start = j * BLOCK_K
            slot = gl.load(row + start + key, mask=start + key < end, other=-1)
            slot_e = gl.load(row + start + key_e, mask=start + key_e < end, other=-1)
            mbarrier.wait(full.index(stage), ((tile + j) // STAGES) & 1)
            if (
                TURNS
            ):  # both would multiply at once, and then add at once: the other has to be done with its tile
                before = tile + j + STAGES - 1
                mbarrier.wait(free.index(before % STAGES), ((before // STAGES) & 1) ^ 1)
            weight = p_tiles.index(stage).permute((1, 0))
            slope = s_tiles.index(stage).permute((1, 0))
            acc = gl.zeros([BLOCK_K, WIDE], gl.float32, K_LAYOUT)
            acc_e = gl.zeros([BLOCK_K, NARROW], gl.float32, E_LAYOUT)
            acc = warpgroup_mma(weight, do_tile, acc, use_acc=False, is_async=True)
            acc = warpgroup_mma(slope, q_tile, acc, is_async=True)
            acc_e = warpgroup_mma(slope, e_tile, acc_e, use_acc=False, is_async=True)
            acc, acc_e = warpgroup_mma_wait(0, deps=[acc, acc_e])
            mbarrier.arrive(free.index(stage))
            to = dlatent + (gl.maximum(slot, 0).to(gl.int64) * l_m + part * WIDE)[:, None]
            gl.atomic_add(to + c, gl.convert_layout(acc, ADD), mask=(slot >= 0)[:, None], sem="relaxed")
            to = dlatent + (gl.maximum(slot_e, 0).to(gl.int64) * l_m + RANK + part * NARROW)[:, None]
            gl.atomic_add(to + e, gl.convert_layout(acc_e, ADD_E), mask=(slot_e >= 0)[:, None], sem="relaxed")
        tile += tiles
        mbarrier.arrive(q_free)
        done += 1  # noqa: SIM113


@gluon.jit(do_not_specialize=("items",))
def _entries(
    p_desc, ds_desc, q_desc, e_desc, do_desc, dlatent, slots, ends, items, heads, slots_n, l_m,
    RANK: gl.constexpr, PARTS: gl.constexpr, STAGES: gl.constexpr, ADD: gl.constexpr, ADD_E: gl.constexpr,
    TURNS: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = q_desc.dtype
    BAR: gl.constexpr = mbarrier.MBarrierLayout()
    BLOCK_H: gl.constexpr = p_desc.block_type.shape[0]
    BLOCK_K: gl.constexpr = p_desc.block_type.shape[1]
    q_tile = gl.allocate_shared_memory(dtype, q_desc.block_type.shape, q_desc.layout)
    e_tile = gl.allocate_shared_memory(dtype, e_desc.block_type.shape, e_desc.layout)
    do_tile = gl.allocate_shared_memory(dtype, do_desc.block_type.shape, do_desc.layout)
    p_tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_H, BLOCK_K], p_desc.layout)
    s_tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_H, BLOCK_K], ds_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [1], BAR)
    q_free = gl.allocate_shared_memory(gl.int64, [1], BAR)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    mbarrier.init(q_full, count=1)
    mbarrier.init(q_free, count=2)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(free.index(i), count=1)
    bars = (q_full, q_free, full, free)
    gl.warp_specialize(
        [
            (
                _entry_group,
                (
                    dlatent, slots, ends, q_tile, e_tile, do_tile, p_tiles, s_tiles, bars, items, PARTS, slots_n, l_m,
                    RANK, 0, ADD, ADD_E, TURNS,
                ),
            ),
            (
                _entry_group,
                (
                    dlatent, slots, ends, q_tile, e_tile, do_tile, p_tiles, s_tiles, bars, items, PARTS, slots_n, l_m,
                    RANK, 1, ADD, ADD_E, TURNS,
                ),
            ),
            (
                _fetch_entries,
                (
                    p_desc, ds_desc, q_desc, e_desc, do_desc, ends, q_tile, e_tile, do_tile, p_tiles, s_tiles, bars,
                    items, PARTS, heads, RANK,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def entries(
    p_NHK: Tensor, ds_NHK: Tensor, q_NHC: Tensor, slots_NK: Tensor, ends_N: Tensor, do_NHc: Tensor,
    dlatent_MC: Tensor, *, turns: bool = True,
) -> None:  # fmt: skip
    """dK + dV, added to `dlatent_MC`. For measuring: whether the groups multiply in `turns`."""
    N, H, C = q_NHC.shape
    rank = do_NHc.shape[2]
    items, wide, narrow = N * PARTS, rank // PARTS, (C - rank) // PARTS
    _entries[(min(processors(q_NHC), items),)](
        descriptor(p_NHK, H, BLOCK_K), descriptor(ds_NHK, H, BLOCK_K), descriptor(q_NHC, H, wide),
        descriptor(q_NHC, H, narrow), descriptor(do_NHc, H, wide), dlatent_MC, slots_NK, ends_N, items, H,
        slots_NK.stride(0), dlatent_MC.stride(0), RANK=rank, PARTS=PARTS, STAGES=STAGES, ADD=_lines(wide),
        ADD_E=_lines(narrow), TURNS=turns, num_warps=4,
    )  # fmt: skip


@functools.cache
def _lines(width: int) -> Any:
    """Who of four warps adds what of [64, width], each its own 16 rows: a thread four numbers, eight threads a line."""
    columns = [[0, 4 << i] for i in range((width // 4).bit_length() - 1)]
    rows = [[1 << i, 0] for i in range(4)]
    own = [[0, 1], [0, 2], *rows[2:], *columns[3:]]
    return gl.DistributedLinearLayout(own, columns[:3] + rows[:2], [[16, 0], [32, 0]], [], [64, width])
