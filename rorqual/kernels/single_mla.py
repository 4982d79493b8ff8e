"""Absorbed latent attention of one token in three launches (V2 report section 2.1, appendix C; facts 3.1).

1. Queries into latent space by W_UK, and beside it what `cache_write.mla_write` does: latent and rotary key to
   their page, rotary queries turned.
2. Attention in splits of the keys (`mla_decode`'s kernel).
3. The splits put together, and through W_UV into value space.

Where it can, `single_core` does all three in one launch.

Weights are asked for before the kernel in front has ended.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import math

import torch
from torch import Tensor

from rorqual.kernels import single_core
from rorqual.kernels.cache_write import FP8_BLOCK, mla_job, mla_write_reference
from rorqual.kernels.gpu import tl, triton
from rorqual.kernels.heads import heads_reference
from rorqual.kernels.mla_decode import SCALED, _attend
from rorqual.kernels.mla_decode import reference as attend_reference
from rorqual.kernels.quant import E8M0, FP8
from rorqual.kernels.single import ask, asking, factor, launch_options
from rorqual.kernels.skinny import await_inputs, release

TILE = 32
"""Keys a program of the attention meets at a time."""

CLUSTERS = True
"""Whether `single_core`'s one launch takes what it can."""

ROWS = 16
"""Value channels a program makes."""

BLOCKS = 32
"""Splits put together at a time."""

SPLITS = 64
"""Splits of the keys at most."""


@triton.jit
def absorb_kernel(
    kv, norm, cos, sin, q, w, scale, out, pages, page_scales, page_ropes, slots, kv_row, q_row, q_head, w_head,
    w_row, s_row, out_row, out_head, page_stride, token_stride, eps,
    asked, asked_size,
    N: tl.constexpr, H: tl.constexpr, NOPE: tl.constexpr, KP: tl.constexpr, HEAD_ROWS: tl.constexpr,
    RANK: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
    HB: tl.constexpr, PAGE: tl.constexpr, BM: tl.constexpr, INTERLEAVED: tl.constexpr, FP8: tl.constexpr,
    CODES: tl.constexpr, POWERS: tl.constexpr, AHEAD: tl.constexpr, SPAN: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """Programs (head, block of BM latent channels), then the jobs of `mla_write`, token by token."""
    release(AHEAD)
    ACROSS: tl.constexpr = (RANK + BM - 1) // BM
    JOBS: tl.constexpr = 2 + (H + HB - 1) // HB
    pid = tl.program_id(0)
    if pid < H * ACROSS:
        head = (pid // ACROSS).to(tl.int64)
        left = pid % ACROSS * BM
        m = left + tl.arange(0, BM)
        k = tl.arange(0, KP)
        tile = tl.load(
            w + head * w_head + k[:, None] * w_row + m[None, :],
            mask=(k < NOPE)[:, None] & (m < RANK)[None, :],
            other=0.0,
        )
        if CODES:
            line = (head * HEAD_ROWS + tl.minimum(k, NOPE - 1)) // 128
            by = factor(scale + line * s_row + left // 128, k < NOPE, POWERS)
        if SPAN:
            ask(asked, asked_size, pid, H * ACROSS, THREADS, SPAN)
        await_inputs(AHEAD)
        for n in tl.static_range(N):
            row = tl.load(q + n * q_row + head * q_head + k, mask=k < NOPE, other=0.0).to(tl.float32)
            if CODES:
                row *= by
            y = tl.sum(tile.to(tl.float32) * row[:, None], 0)
            tl.store(out + n * out_row + head * out_head + m, y.to(out.dtype.element_ty), mask=m < RANK)
    else:
        await_inputs(AHEAD)
        job = pid - H * ACROSS
        mla_job(
            (job // JOBS).to(tl.int64), job % JOBS, kv, norm, cos, sin, q + NOPE, out + RANK, pages, page_scales,
            page_ropes, slots, kv, pages, kv_row, q_row, q_head, out_row, out_head, page_stride, token_stride,
            0, 0, 0, H, eps, RANK, BLOCK, BLOCKS, R, RP, HB, PAGE, 0, 1, INTERLEAVED, FP8,
        )  # fmt: skip


@triton.jit(do_not_specialize=("rows", "heads", "width", "table_stride", "splits"))
def attend_kernel(
    q_ptr, values_ptr, scales_ptr, rope_ptr, table_ptr, ends_ptr, o_ptr, lse_ptr, scale, rows, heads, width,
    table_stride, splits,
    VALUE_STRIDE: tl.constexpr, SCALE_STRIDE: tl.constexpr, ROPE_STRIDE: tl.constexpr, RANK: tl.constexpr,
    ROPE: tl.constexpr, PAGE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    """Stage 1 of `mla_decode`, always in splits, started ahead."""
    release(AHEAD)
    await_inputs(AHEAD)
    _attend(
        q_ptr, values_ptr, scales_ptr, rope_ptr, table_ptr, ends_ptr, o_ptr, lse_ptr, scale, rows, heads, width,
        table_stride, splits, VALUE_STRIDE, SCALE_STRIDE, ROPE_STRIDE, RANK, ROPE, PAGE, BLOCK_C, BLOCK_E, BLOCK_M,
        BLOCK_N, GROUP, 0, False, PRECISION,
    )  # fmt: skip


@triton.jit
def _latents(
    pages, slot, there, RANK: tl.constexpr, QUARTER: tl.constexpr, EP: tl.constexpr, R: tl.constexpr
):
    """A tile of latents in quarters `[T, QUARTER]`, and rotary keys `[T, EP]`; zeros where not `there`."""
    row = pages + slot[:, None] * (RANK + R)
    c = tl.arange(0, QUARTER)[None, :]
    r = tl.arange(0, EP)[None, :]
    c0 = tl.load(row + c, mask=there[:, None] & (c < RANK), other=0.0)
    c1 = tl.load(row + c + QUARTER, mask=there[:, None] & (c + QUARTER < RANK), other=0.0)
    c2 = tl.load(row + c + 2 * QUARTER, mask=there[:, None] & (c + 2 * QUARTER < RANK), other=0.0)
    c3 = tl.load(row + c + 3 * QUARTER, mask=there[:, None] & (c + 3 * QUARTER < RANK), other=0.0)
    return c0, c1, c2, c3, tl.load(row + RANK + r, mask=there[:, None] & (r < R), other=0.0)


@triton.jit
def short_attend_kernel(
    q, pages, table, ends, part, lse, scale, rows, heads, width, table_row, splits,
    RANK: tl.constexpr, QUARTER: tl.constexpr, R: tl.constexpr, EP: tl.constexpr, PAGE: tl.constexpr,
    M: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Stage 1 of `mla_decode` for pages in the queries' type, one tile of keys a split: M of a sequence's `rows` =
    width * heads queries against it. Scores are added up in chains of a quarter of the channels, and keys that
    earlier passes left are read before the kernel in front has ended."""
    release(AHEAD)
    s = tl.program_id(2)
    split = tl.program_id(1)
    end = tl.load(ends + s)
    first = split * TILE
    key = first + tl.arange(0, TILE)
    page = tl.load(table + s * table_row + first // PAGE, mask=first < end, other=0).to(tl.int64)
    slot = page * PAGE + (key & (PAGE - 1))
    old = key < end - width
    c0, c1, c2, c3, e = _latents(pages, slot, old, RANK, QUARTER, EP, R)
    await_inputs(AHEAD)
    if first >= end:
        return
    if first + TILE > end - width:
        new = (key < end) & (key >= end - width)
        n0, n1, n2, n3, ne = _latents(pages, slot, new, RANK, QUARTER, EP, R)
        c0 = tl.where(new[:, None], n0, c0)
        c1 = tl.where(new[:, None], n1, c1)
        c2 = tl.where(new[:, None], n2, c2)
        c3 = tl.where(new[:, None], n3, c3)
        e = tl.where(new[:, None], ne, e)
    row = tl.program_id(0) * M + tl.arange(0, M)
    held = (row < rows)[:, None]
    at = q + (s * rows + row).to(tl.int64)[:, None] * (RANK + R)
    c = tl.arange(0, QUARTER)[None, :]
    r = tl.arange(0, EP)[None, :]
    q0 = tl.load(at + c, mask=held & (c < RANK), other=0.0)
    q1 = tl.load(at + c + QUARTER, mask=held & (c + QUARTER < RANK), other=0.0)
    q2 = tl.load(at + c + 2 * QUARTER, mask=held & (c + 2 * QUARTER < RANK), other=0.0)
    q3 = tl.load(at + c + 3 * QUARTER, mask=held & (c + 3 * QUARTER < RANK), other=0.0)
    qe = tl.load(at + RANK + r, mask=held & (r < R), other=0.0)
    s0 = tl.dot(q0, tl.trans(c0), input_precision=PRECISION)
    s1 = tl.dot(q1, tl.trans(c1), input_precision=PRECISION)
    s2 = tl.dot(q2, tl.trans(c2), input_precision=PRECISION)
    s3 = tl.dot(q3, tl.trans(c3), input_precision=PRECISION)
    score = tl.dot(qe, tl.trans(e), input_precision=PRECISION)
    score = (score + (s0 + s1) + (s2 + s3)) * scale
    seen = (key < end)[None, :] & (key[None, :] <= (end - width + row // heads)[:, None])
    score = tl.where(seen, score, float("-inf"))
    peak = tl.max(score, 1)
    weight = tl.exp2(score - tl.where(peak == float("-inf"), 0.0, peak)[:, None])
    total = tl.sum(weight, 1)
    total = tl.where(total > 0, total, 1.0)
    weight = weight.to(c0.dtype)
    by = 1.0 / total[:, None]
    to = (split * tl.num_programs(2) + s) * rows + row
    tl.store(lse + to, peak + tl.log2(total), mask=row < rows)  # nothing seen: -inf
    out = part + to.to(tl.int64)[:, None] * RANK + c
    tl.store(out, tl.dot(weight, c0, input_precision=PRECISION) * by, mask=held & (c < RANK))
    out += QUARTER
    tl.store(out, tl.dot(weight, c1, input_precision=PRECISION) * by, mask=held & (c + QUARTER < RANK))
    out += QUARTER
    tl.store(out, tl.dot(weight, c2, input_precision=PRECISION) * by, mask=held & (c + 2 * QUARTER < RANK))
    out += QUARTER
    tl.store(out, tl.dot(weight, c3, input_precision=PRECISION) * by, mask=held & (c + 3 * QUARTER < RANK))


@triton.jit
def gather_kernel(
    part, lse, ends, w, scale, y, splits, w_head, w_row, s_row, y_row,
    N: tl.constexpr, WIDTH: tl.constexpr, H: tl.constexpr, V: tl.constexpr, FIRST: tl.constexpr,
    HEAD_ROWS: tl.constexpr, RANK: tl.constexpr, CP: tl.constexpr, BV: tl.constexpr, BS: tl.constexpr,
    TILE: tl.constexpr, CODES: tl.constexpr, POWERS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """y `[N, H * V]`: programs (head, block of BV value channels) put their head's splits together, each for
    itself, and multiply."""
    release(AHEAD)
    ACROSS: tl.constexpr = (V + BV - 1) // BV
    head = (tl.program_id(0) // ACROSS).to(tl.int64)
    v = tl.program_id(0) % ACROSS * BV + tl.arange(0, BV)
    c = tl.arange(0, CP)
    tile = tl.load(
        w + head * w_head + v[:, None] * w_row + c[None, :],
        mask=(v < V)[:, None] & (c < RANK)[None, :],
        other=0.0,
    )
    if CODES:
        # BV divides what comes before the block: all its rows lie in one block of scales.
        line = (head * HEAD_ROWS + FIRST + tl.program_id(0) % ACROSS * BV) // 128
        by = factor(scale + line * s_row + c // 128, c < RANK, POWERS)
    for n in tl.static_range(N):
        end = tl.load(ends + n // WIDTH)
        share = tl.cdiv(tl.cdiv(end, splits), TILE) * TILE
        used = tl.cdiv(end, tl.maximum(share, 1))
        top = -float("inf")
        mass = 0.0
        u = tl.zeros((CP,), tl.float32)
        if n == 0:
            await_inputs(AHEAD)
        for first in tl.range(0, used, BS):
            # Unrolled, a split at a time: no sum goes across threads, and all reads are under way together.
            higher = top
            for i in tl.static_range(BS):
                at = (first + i) * (N * H) + n * H + head
                higher = tl.maximum(higher, tl.load(lse + at, mask=first + i < used, other=-float("inf")))
            base = tl.where(higher == -float("inf"), 0.0, higher)
            fade = tl.exp2(top - base)
            u = u * fade
            mass = mass * fade
            for i in tl.static_range(BS):
                at = (first + i) * (N * H) + n * H + head
                there = first + i < used
                weight = tl.exp2(tl.load(lse + at, mask=there, other=-float("inf")) - base)
                new = tl.load(part + at * RANK + c, mask=there & (c < RANK), other=0.0)
                u += new * weight
                mass += weight
            top = higher
        u = u / tl.where(mass > 0, mass, 1.0)
        u = u.to(y.dtype.element_ty).to(tl.float32)
        if CODES:
            u *= by
        value = tl.sum(tile.to(tl.float32) * u[None, :], 1)
        tl.store(y + n * y_row + head * V + v, value.to(y.dtype.element_ty), mask=v < V)


def reference(
    q_NHd: Tensor, kv_NC: Tensor, norm: tuple[Tensor, float], cos_NR: Tensor, sin_NR: Tensor, w_HrC: Tensor,
    scale: Tensor | None, pages: Tensor, slots_N: Tensor, table_SB: Tensor, ends_S: Tensor, *, width: int,
    nope: int, interleaved: bool, softmax_scale: float,
) -> Tensor:  # fmt: skip
    """The definition of `attention`, by the parts it joins."""
    rank = w_HrC.shape[2]
    q_NHC = q_NHd.new_empty(*q_NHd.shape[:2], kv_NC.shape[1])
    mla_write_reference(
        kv_NC, *norm, cos_NR, sin_NR, q_NHd[..., nope:], pages, slots_N, rank=rank, interleaved=interleaved,
        q_out_NHC=q_NHC,
    )  # fmt: skip
    q_NHC[..., :rank] = heads_reference(q_NHd[..., :nope], w_HrC[:, :nope], True, None, scale)
    u_NHc = attend_reference(q_NHC, pages, table_SB, ends_S, width=width, rank=rank, scale=softmax_scale)
    return heads_reference(u_NHc, w_HrC[:, nope:], False, None, scale, nope).flatten(1)


def attention(
    q_NHd: Tensor, kv_NC: Tensor, norm: tuple[Tensor, float], cos_NR: Tensor, sin_NR: Tensor, w_HrC: Tensor,
    scale: Tensor | None, pages: Tensor, slots_N: Tensor, table_SB: Tensor, ends_S: Tensor, *, width: int,
    nope: int, interleaved: bool, softmax_scale: float, later: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """MLA of one or a few tokens between its first matrices and `o`: `[N, H * v]`.

    q `[N, H, nope + rope]` and kv `[N, rank + rope]` as the matrices leave them; norm (weight, eps) of the
    latent; cos and sin `[N, rope / 2]`; W_UK and W_UV in w `[H, nope + v, rank]`, plain or codes with `scale`;
    the rest as for `mla_write` and `mla_decode`. `later`: a weight that the first launch asks to be
    brought into L2. All must be fit (`fit`).
    """
    if CLUSTERS and single_core.supported(q_NHd, w_HrC, pages, table_SB, nope, width):
        return single_core.launch(
            q_NHd, kv_NC, norm, cos_NR, sin_NR, w_HrC, scale, pages, slots_N, table_SB, ends_S, nope=nope,
            interleaved=interleaved, softmax_scale=softmax_scale, later=later,
        )  # fmt: skip
    (count, heads, channels), (_, head_rows, rank) = q_NHd.shape, w_HrC.shape
    rope, values, options = channels - nope, head_rows - nope, launch_options(q_NHd)
    powers = scale is not None and scale.dtype == E8M0
    by = scale.view(torch.uint8) if powers and scale is not None else scale
    s_row = by.stride(0) if by is not None else 0
    fp8, size = pages.dtype == torch.uint8, pages.shape[1]
    codes = {"CODES": scale is not None, "POWERS": powers}
    page_codes = page_scales = page_ropes = pages
    if fp8:
        page_codes, page_scales = pages.view(torch.float8_e4m3fn), pages.view(torch.float32)
        page_ropes = pages.view(torch.bfloat16)

    q_NHC = q_NHd.new_empty(count, heads, rank + rope)
    block = FP8_BLOCK if rank % FP8_BLOCK == 0 else triton.next_power_of_2(rank)
    at_once = min(16, triton.next_power_of_2(heads))
    columns = 64
    jobs = count * (2 + triton.cdiv(heads, at_once))
    programs = heads * triton.cdiv(rank, columns)
    asked, amount, span = asking(later, programs, 4)
    absorb_kernel[(programs + jobs,)](
        kv_NC, norm[0], cos_NR, sin_NR, q_NHd, w_HrC, by, q_NHC, page_codes, page_scales, page_ropes, slots_N,
        kv_NC.stride(0), q_NHd.stride(0), q_NHd.stride(1), w_HrC.stride(0), w_HrC.stride(1), s_row, q_NHC.stride(0),
        q_NHC.stride(1), pages.stride(0), pages.stride(1), norm[1], asked, amount,
        N=count, H=heads, NOPE=nope, KP=triton.next_power_of_2(nope), HEAD_ROWS=head_rows, RANK=rank, BLOCK=block,
        BLOCKS=triton.next_power_of_2(triton.cdiv(rank, block)), R=rope, RP=triton.next_power_of_2(rope),
        HB=at_once, PAGE=size, BM=columns, INTERLEAVED=interleaved, FP8=fp8, num_warps=4, enable_fp_fusion=False,
        SPAN=span, THREADS=128, **codes, **options,
    )  # fmt: skip

    splits = min(SPLITS, triton.cdiv(table_SB.shape[1] * size, TILE))
    part = torch.empty(splits, count * heads, rank, dtype=torch.float32, device=q_NHd.device)
    lse = torch.empty(splits, count * heads, dtype=torch.float32, device=q_NHd.device)
    grid = (triton.cdiv(width * heads, 16), splits, table_SB.shape[0])
    exponent = softmax_scale * math.log2(math.e)
    if not fp8 and splits * TILE >= table_SB.shape[1] * size:
        quarter = max(16, triton.next_power_of_2(triton.cdiv(rank, 4)))
        short_attend_kernel[grid](
            q_NHC, pages, table_SB, ends_S, part, lse, exponent, width * heads, heads, width, table_SB.stride(0),
            splits, RANK=rank, QUARTER=quarter, R=rope, EP=max(16, triton.next_power_of_2(rope)),
            PAGE=size, M=16, TILE=TILE, PRECISION="tf32", num_warps=4, **options,
        )  # fmt: skip
    else:
        latents, strides = (pages, pages, pages[..., rank:]), [rank + rope, 0, rank + rope]
        if fp8:
            at = rank // 2 + 2 * -(-rank // SCALED)
            latents = (
                pages,
                pages.view(torch.float32)[..., rank // 4 :],
                pages.view(torch.bfloat16)[..., at:],
            )
            strides = [t.stride(1) for t in latents]
        block_c = max(16, triton.next_power_of_2(rank))
        attend_kernel[grid](
            q_NHC, *latents, table_SB, ends_S, part, lse, exponent, width * heads, heads, width, table_SB.stride(0),
            splits,
            VALUE_STRIDE=strides[0], SCALE_STRIDE=strides[1], ROPE_STRIDE=strides[2], RANK=rank, ROPE=rope,
            PAGE=size, BLOCK_C=block_c, BLOCK_E=max(16, triton.next_power_of_2(rope)), BLOCK_M=16, BLOCK_N=TILE,
            GROUP=min(SCALED, block_c), PRECISION="tf32", num_warps=4, num_stages=3, **options,
        )  # fmt: skip

    y = q_NHd.new_empty(count, heads * values)
    programs = heads * triton.cdiv(values, ROWS)
    gather_kernel[(programs,)](
        part, lse, ends_S, w_HrC[:, nope:], by, y, splits, w_HrC.stride(0), w_HrC.stride(1), s_row, y.stride(0),
        N=count, WIDTH=width, H=heads, V=values, FIRST=nope, HEAD_ROWS=head_rows, RANK=rank,
        CP=triton.next_power_of_2(rank), BV=ROWS, BS=BLOCKS, TILE=TILE, num_warps=8, **codes, **options,
    )  # fmt: skip
    return y


def fit(q_NHd: Tensor, w_HrC: Tensor, pages: Tensor, nope: int) -> bool:
    """Whether `attention` takes these: bf16 rows, and pages that `mla_decode`'s kernel reads."""
    rank, size = w_HrC.shape[2], pages.shape[1]
    kept = pages.is_contiguous() and size & (size - 1) == 0 and size >= TILE
    if pages.dtype == torch.uint8:
        kept = kept and rank % FP8_BLOCK == 0 and all(s % 16 == 0 for s in pages.stride()[:2])
    else:
        kept = kept and pages.dtype == q_NHd.dtype
    if w_HrC.dtype == FP8:
        kept = kept and w_HrC.shape[1] % ROWS == 0 and nope % ROWS == 0
    return kept and rank <= 512
