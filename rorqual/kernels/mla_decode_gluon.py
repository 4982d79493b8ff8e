"""Stage 1 of `mla_decode` for Hopper in Gluon, where the programmer places what Triton otherwise decides.

One program is a warp that fetches tiles of 64 latents by the bulk copy engine (TMA) into a ring, and four or eight
warps that compute. Few queries go keys first (scores [keys, rows]), so that the tensor cores' 64 rows are keys;
many go rows first, eight warps on one tile, and the scores of a tile are asked for while the values of the one
before are still being added. Key tiles, their order and the grid are those of `mla_decode`.
"""

from typing import Any

import torch
from torch import Tensor

from rorqual.kernels.gpu import INSTALLED

gluon: Any
gl: Any
try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import (
        fence_async_shared,
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_init,
        warpgroup_mma_wait,
    )
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
except ImportError:  # Triton too old, or none: `supported` says so
    from rorqual.kernels.gpu import tl as gl
    from rorqual.kernels.gpu import triton as gluon

    AVAILABLE = False
else:
    AVAILABLE = INSTALLED

TILE = 64
"""Keys of a tile. A page holds one or more whole tiles."""

RANK, ROPE = 512, 64
"""The latents of every released model."""


@gluon.jit
def _fetch(
    c_desc,
    e_desc,
    c_ring,
    e_ring,
    full,
    free,
    table_ptr,
    first,
    last,
    PAGE: gl.constexpr,
    STAGES: gl.constexpr,
):
    """The fetching warp: tiles of the keys first .. last, in order, into the ring."""
    TILE: gl.constexpr = c_desc.block_type.shape[0]
    page = gl.load(table_ptr + first // PAGE, mask=first < last, other=0)
    turn = 0
    for start in range(first, last, TILE):
        row = page * PAGE + start % PAGE
        page = gl.load(table_ptr + gl.minimum(start + TILE, last - 1) // PAGE)
        stage = turn % STAGES
        mbarrier.wait(free.index(stage), ((turn // STAGES) & 1) ^ 1)
        bar = full.index(stage)
        mbarrier.expect(bar, c_desc.block_type.nbytes + e_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(c_desc, [row, 0], bar, c_ring.index(stage))
        tma.async_copy_global_to_shared(e_desc, [row, c_desc.block_type.shape[1]], bar, e_ring.index(stage))
        turn += 1


@gluon.jit
def _clear(c, e, there, WARPS: gl.constexpr):
    """Zero the last tile's latents from number `there` on: what lies in a page past its content may be NaN."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])
    WIDTH: gl.constexpr = e.shape[1]
    kept = gl.arange(0, e.shape[0], gl.SliceLayout(1, LAYOUT)) < there
    for part in gl.static_range(c.shape[1] // WIDTH):
        piece = c.slice(part * WIDTH, WIDTH, 1)
        value = piece.load(LAYOUT)
        piece.store(gl.where(kept[:, None], value, gl.zeros_like(value)))
    value = e.load(LAYOUT)
    e.store(gl.where(kept[:, None], value, gl.zeros_like(value)))
    fence_async_shared()


@gluon.jit
def _compute(
    q_c, q_e, p, c_ring, e_ring, full, free, o_ptr, lse_ptr, first, last, scale, base, block, rows, heads, open_to,
    KEYS_FIRST: gl.constexpr, DIRECT: gl.constexpr, STAGES: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """The computing warps: every tile's scores, softmax and values; then the result."""
    TILE: gl.constexpr = c_ring.shape[1]
    RANK: gl.constexpr = c_ring.shape[2]
    BLOCK_M: gl.constexpr = q_c.shape[0]
    ACROSS: gl.constexpr = 0 if KEYS_FIRST else 1
    if KEYS_FIRST:
        S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_M, 16])
        A: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_M, 16])
        acc = gl.zeros([RANK, BLOCK_M], gl.float32, A)
        mass = gl.zeros([TILE, BLOCK_M], gl.float32, S)
    else:
        S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, WARPS // 4], [16, TILE // (WARPS // 4), 16])
        A: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, WARPS // 4], [16, 256, 16])
        acc = gl.zeros([BLOCK_M, RANK], gl.float32, A)
        mass = gl.zeros([BLOCK_M, TILE], gl.float32, S)
    row = block * BLOCK_M + gl.arange(0, BLOCK_M, gl.SliceLayout(ACROSS, S))
    visible = open_to + row // heads
    lane = gl.arange(0, TILE, gl.SliceLayout(1 - ACROSS, S))
    # The lowest finite number, not -inf: a fade of exp2(-inf + inf) would be NaN.
    peak = gl.full([BLOCK_M], -1e30, gl.float32, gl.SliceLayout(ACROSS, S))
    acc = warpgroup_mma_init(acc)
    turn = 0
    for start in range(first, last, TILE):
        stage = turn % STAGES
        c = c_ring.index(stage)
        e = e_ring.index(stage)
        mbarrier.wait(full.index(stage), (turn // STAGES) & 1)
        if start + TILE > last:
            _clear(c, e, last - start, WARPS)
        if KEYS_FIRST:
            score = gl.zeros([TILE, BLOCK_M], gl.float32, S)
            score = warpgroup_mma(c, q_c.permute((1, 0)), score, use_acc=False, is_async=True)
            score = warpgroup_mma(e, q_e.permute((1, 0)), score, is_async=True)
        else:
            score = gl.zeros([BLOCK_M, TILE], gl.float32, S)
            score = warpgroup_mma(q_c, c.permute((1, 0)), score, use_acc=False, is_async=True)
            score = warpgroup_mma(q_e, e.permute((1, 0)), score, is_async=True)
        acc = warpgroup_mma_wait(2, deps=[acc])
        mbarrier.arrive(free.index((turn + STAGES - 1) % STAGES), pred=turn > 0)
        score = warpgroup_mma_wait(0, deps=[score])
        seen = gl.expand_dims(start + lane, 1 - ACROSS) <= gl.expand_dims(visible, ACROSS)
        score = gl.where(seen, score * scale, -float("inf"))
        higher = gl.maximum(peak, gl.max(score, ACROSS))
        fade = gl.exp2(peak - higher)
        peak = higher
        weight = gl.exp2(score - gl.expand_dims(higher, ACROSS))
        p.store(weight.to(p.dtype))
        fence_async_shared()
        mass = mass * gl.expand_dims(fade, ACROSS) + weight
        acc = acc * gl.expand_dims(gl.convert_layout(fade, gl.SliceLayout(ACROSS, A)), ACROSS)
        if KEYS_FIRST:
            acc = warpgroup_mma(c.permute((1, 0)), p, acc, is_async=True)
        else:
            acc = warpgroup_mma(p, c, acc, is_async=True)
        turn += 1
    acc = warpgroup_mma_wait(0, deps=[acc])

    total = gl.sum(mass, ACROSS)
    known = gl.where(total > 0, total, 1.0)
    share = gl.convert_layout(known, gl.SliceLayout(ACROSS, A))
    acc = acc / gl.expand_dims(share, ACROSS)
    to = base.to(gl.int64) + row
    if not DIRECT:
        gl.store(lse_ptr + to, gl.where(total > 0, peak + gl.log2(known), -float("inf")), mask=row < rows)
    m = block * BLOCK_M + gl.arange(0, BLOCK_M, gl.SliceLayout(ACROSS, A))
    channel = gl.arange(0, RANK, gl.SliceLayout(1 - ACROSS, A))
    place = gl.expand_dims((base.to(gl.int64) + m) * RANK, ACROSS) + gl.expand_dims(channel, 1 - ACROSS)
    held = gl.expand_dims(m < rows, ACROSS) & gl.expand_dims(channel < RANK, 1 - ACROSS)
    gl.store(o_ptr + place, acc.to(o_ptr.dtype.element_ty), mask=held)


@gluon.jit(do_not_specialize=("rows", "heads", "width", "table_stride", "splits"))
def _attend(
    c_desc, e_desc, q_ptr, table_ptr, ends_ptr, o_ptr, lse_ptr, scale, rows, heads, width, table_stride, splits,
    BLOCK_M: gl.constexpr, PAGE: gl.constexpr, FIXED: gl.constexpr, KEYS_FIRST: gl.constexpr, DIRECT: gl.constexpr,
    STAGES: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """As `mla_decode._attend`: one block of a sequence's queries against one split of its keys."""
    TILE: gl.constexpr = c_desc.block_type.shape[0]
    RANK: gl.constexpr = c_desc.block_type.shape[1]
    ROPE: gl.constexpr = e_desc.block_type.shape[1]
    dtype: gl.constexpr = c_desc.dtype
    block = gl.program_id(0)
    split = gl.program_id(1)
    s = gl.program_id(2)
    end = gl.load(ends_ptr + s)
    if FIXED > 0:
        share = FIXED
    else:
        share = gl.cdiv(gl.cdiv(end, splits), TILE) * TILE
    first = split * share
    last = gl.minimum(first + share, end)
    base = s * rows
    if not DIRECT:
        base += split * gl.num_programs(2) * rows
    if first < last:  # a program without keys runs through, touching nothing
        held = rows
    else:
        held = 0

    Q: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [WARPS, 1], [1, 0])
    E: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])
    q_c = gl.allocate_shared_memory(
        dtype, [BLOCK_M, RANK], gl.NVMMASharedLayout.get_default_for([BLOCK_M, RANK], dtype)
    )
    q_e = gl.allocate_shared_memory(
        dtype, [BLOCK_M, ROPE], gl.NVMMASharedLayout.get_default_for([BLOCK_M, ROPE], dtype)
    )
    row = block * BLOCK_M + gl.arange(0, BLOCK_M, gl.SliceLayout(1, Q))
    at = (s * rows + row).to(gl.int64)[:, None] * (RANK + ROPE) + gl.arange(0, RANK, gl.SliceLayout(0, Q))[
        None, :
    ]
    q_c.store(gl.load(q_ptr + at, mask=(row < held)[:, None], other=0.0))
    row = block * BLOCK_M + gl.arange(0, BLOCK_M, gl.SliceLayout(1, E))
    at = (s * rows + row).to(gl.int64)[:, None] * (RANK + ROPE) + gl.arange(0, ROPE, gl.SliceLayout(0, E))[
        None, :
    ]
    q_e.store(gl.load(q_ptr + RANK + at, mask=(row < held)[:, None], other=0.0))
    P: gl.constexpr = [TILE, BLOCK_M] if KEYS_FIRST else [BLOCK_M, TILE]
    p = gl.allocate_shared_memory(dtype, P, gl.NVMMASharedLayout.get_default_for(P, dtype))
    c_ring = gl.allocate_shared_memory(dtype, [STAGES, TILE, RANK], c_desc.layout)
    e_ring = gl.allocate_shared_memory(dtype, [STAGES, TILE, ROPE], e_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(free.index(i), count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                _compute,
                (
                    q_c, q_e, p, c_ring, e_ring, full, free, o_ptr, lse_ptr, first, last, scale, base, block,
                    rows if DIRECT else held, heads, end - width, KEYS_FIRST, DIRECT, STAGES, WARPS,
                ),
            ),
            (_fetch, (c_desc, e_desc, c_ring, e_ring, full, free, table_ptr + s * table_stride, first, last, PAGE, STAGES)),
        ],
        [1],
        [24],
    )  # fmt: skip


def supported(q_NHC: Tensor, pages_PTC: Tensor, rank: int) -> bool:
    """Whether `launch` takes these: bf16 latents of the released size on a Hopper GPU, in pages of whole tiles."""
    return (
        AVAILABLE
        and q_NHC.is_cuda
        and torch.cuda.get_device_capability(q_NHC.device)[0] == 9
        and q_NHC.dtype == pages_PTC.dtype == torch.bfloat16
        and pages_PTC.is_contiguous()
        and (rank, q_NHC.shape[2] - rank) == (RANK, ROPE)
        and pages_PTC.shape[1] % TILE == 0
    )


def launch(
    q_NHC: Tensor,
    pages_PTC: Tensor,
    table_SB: Tensor,
    ends_S: Tensor,
    o: Tensor,
    lse: Tensor,
    *,
    grid: tuple[int, int, int],
    scale: float,
    rows: int,
    width: int,
    block_m: int,
    keys_first: bool,
    fixed: int,
    direct: bool,
    stages: int,
) -> None:
    """Stage 1 over `grid` (blocks of rows, splits, sequences) into `o` and `lse`; `scale` for base-2 exponents."""
    latents = pages_PTC.view(-1, RANK + ROPE)
    c_desc, e_desc = (
        TensorDescriptor(
            latents,
            list(latents.shape),
            list(latents.stride()),
            [TILE, wide],
            gl.NVMMASharedLayout.get_default_for([TILE, wide], gl.bfloat16),
        )
        for wide in (RANK, ROPE)
    )
    warps = 4 if keys_first else 8
    _attend[grid](
        c_desc,
        e_desc,
        q_NHC,
        table_SB,
        ends_S,
        o,
        lse,
        scale,
        rows,
        q_NHC.shape[1],
        width,
        table_SB.stride(0),
        grid[1],
        BLOCK_M=block_m,
        PAGE=pages_PTC.shape[1],
        FIXED=fixed,
        KEYS_FIRST=keys_first,
        DIRECT=direct,
        STAGES=stages,
        WARPS=warps,
        num_warps=warps,
    )
