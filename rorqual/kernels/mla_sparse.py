"""Absorbed MLA attention of each query to its own chosen cache entries (V3.2 report section 2.1; facts 3.8).

The queries stand in latent space beside their rotary part, and every head reads the one latent of a token: its
first `rank` channels are the value as well. Which tokens a query sees comes as a row of cache slots, in any
order and with gaps, so keys are gathered row by row.

For few queries a row is split over programs, whose parts `_join` adds up in a fixed order.
"""

import math
from typing import Any

import torch
from torch import Tensor

from rorqual.kernels import mla_sparse_gluon
from rorqual.kernels.gpu import tl, triton, usable
from rorqual.kernels.mla_prefill import LOG2_E, decode_pages, split_fp8_pages
from rorqual.kernels.mode import is_invariant


def reference(
    q_NHC: Tensor,
    pages_PTC: Tensor,
    slots_NK: Tensor,
    *,
    rank: int,
    scale: float,
    lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The definition of `mla_sparse`: gather, scores and softmax in fp32 (or fp64 if q is), some queries at a
    time. -> (o, log-sum-exp or None)."""
    compute = torch.float64 if q_NHC.dtype == torch.float64 else torch.float32
    if pages_PTC.dtype == torch.uint8:
        pages_PTC = decode_pages(pages_PTC, rank, q_NHC.shape[-1] - rank)
    items = pages_PTC.flatten(0, 1)
    N, H = q_NHC.shape[:2]
    o_NHc = q_NHC.new_zeros(N, H, rank)
    sums_NH = torch.full((N, H), -math.inf, dtype=compute, device=q_NHC.device)
    step = max(1, 2**26 // max(1, slots_NK.shape[1] * q_NHC.shape[2]))
    for part in range(0, N, step):
        rows = slice(part, part + step)
        there_nK = slots_NK[rows] >= 0
        seen_nKC = items[slots_NK[rows].clamp(min=0).long()].to(compute)
        seen_nKC = torch.where(there_nK[..., None], seen_nKC, 0)  # an empty slot may hold anything, NaN too
        score_nHK = (q_NHC[rows].to(compute) @ seen_nKC.transpose(1, 2)) * scale
        score_nHK = score_nHK.masked_fill(~there_nK[:, None], -math.inf)
        weight_nHK = score_nHK.softmax(-1).nan_to_num(0.0) if there_nK.numel() else score_nHK
        o_NHc[rows] = (weight_nHK @ seen_nKC[..., :rank]).to(o_NHc.dtype)
        if there_nK.numel():
            sums_NH[rows] = score_nHK.logsumexp(-1)
    return o_NHc, sums_NH if lse else None


@triton.jit(do_not_specialize=("sums_s",))
def _sparse(  # type: ignore[no-untyped-def]
    q, pages, scales, rotary, slots, o, sums, factor, heads, head_blocks, keys, share,
    q_n, q_h, p_p, p_t, s_p, s_t, r_p, r_t, slots_n, o_s, o_n, o_h, sums_s,
    RANK: tl.constexpr, ROPE: tl.constexpr, PAGE: tl.constexpr, FLAT: tl.constexpr, SHARE: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, QUANTIZED: tl.constexpr, PRECISION: tl.constexpr, LN_2: tl.constexpr,
):  # fmt: skip
    """BLOCK_H heads of one query against keys `split * share` to `(split + 1) * share` of its row."""
    n = tl.program_id(0) // head_blocks
    split = tl.program_id(1)
    h = tl.program_id(0) % head_blocks * BLOCK_H + tl.arange(0, BLOCK_H)
    real = (h < heads)[:, None]
    channel = tl.arange(0, RANK)
    turn = tl.arange(0, ROPE)
    q_ptr = q + n.to(tl.int64) * q_n + h[:, None] * q_h
    query = tl.load(q_ptr + channel[None, :], mask=real, other=0.0)
    query_rope = tl.load(q_ptr + RANK + turn[None, :], mask=real, other=0.0)

    slots += n.to(tl.int64) * slots_n
    first = split * share
    last = tl.minimum(first + share, keys)
    # Early tokens of a prompt have few entries, and -1 to the end of the row: stop behind the last.
    row = first + tl.arange(0, SHARE)
    chosen = tl.load(slots + row, mask=row < last, other=-1)
    last = tl.max(tl.where(chosen >= 0, row + 1, 0), 0)

    acc = tl.zeros([BLOCK_H, RANK], tl.float32)
    # Lowest finite number, not -inf: a fade of exp2(-inf + inf) would be NaN.
    top = tl.full([BLOCK_H], -1e30, tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    for start in tl.range(first, last, BLOCK_K):
        place = start + tl.arange(0, BLOCK_K)
        slot = tl.load(slots + place, mask=place < last, other=-1)
        there = slot >= 0
        if FLAT:
            at = slot.to(tl.int64) * p_t
        else:
            at = (slot // PAGE).to(tl.int64) * p_p + slot % PAGE * p_t
        key = tl.load(pages + at[:, None] + channel[None, :], mask=there[:, None], other=0.0)
        if QUANTIZED:
            page, token = (slot // PAGE).to(tl.int64), slot % PAGE
            group = page * s_p + token * s_t
            of = tl.load(scales + group[:, None] + channel[None, :] // 128, mask=there[:, None], other=0.0)
            key = (key.to(tl.float32) * of).to(query.dtype)
            by = rotary + (page * r_p + token * r_t)[:, None] + turn[None, :]
            key_rope = tl.load(by, mask=there[:, None], other=0.0).to(query.dtype)
        else:
            key_rope = tl.load(pages + at[:, None] + RANK + turn[None, :], mask=there[:, None], other=0.0)
        score = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        score = tl.dot(query_rope, tl.trans(key_rope), score, input_precision=PRECISION)
        score = tl.where(there[None, :], score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, 1) * factor)
        weight = tl.exp2(score * factor - higher[:, None])
        fade = tl.exp2(top - higher)
        total = total * fade + tl.sum(weight, 1)
        acc = acc * fade[:, None]
        acc = tl.dot(weight.to(key.dtype), key, acc, input_precision=PRECISION)
        top = higher
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    o_ptr = o + split.to(tl.int64) * o_s + n.to(tl.int64) * o_n + h[:, None] * o_h + channel[None, :]
    tl.store(o_ptr, acc.to(o.dtype.element_ty), mask=real)
    sum_ = tl.where(total > 0, top * LN_2 + tl.log(total), float("-inf"))
    tl.store(sums + split * sums_s + n * heads + h, sum_, mask=h < heads)


@triton.jit(do_not_specialize=("rows", "splits"))
def _join(  # type: ignore[no-untyped-def]
    parts, sums, o, sum_all, rows, part_s, o_r, splits,
    RANK: tl.constexpr, SPLITS: tl.constexpr, STRIP: tl.constexpr,
):  # fmt: skip
    """The parts [splits, rows, RANK] of row (query, head) `program_id(0)`, weighted by their sums."""
    row = tl.program_id(0)
    s = tl.arange(0, SPLITS)
    part_sum = tl.load(sums + s * rows + row, mask=s < splits, other=float("-inf"))
    top = tl.max(part_sum, 0)
    top = tl.where(top == float("-inf"), 0.0, top)
    weight = tl.exp(part_sum - top)
    total = tl.sum(weight, 0)
    weight = weight / tl.where(total > 0, total, 1.0)
    for start in tl.static_range(0, RANK, STRIP):
        column = start + tl.arange(0, STRIP)
        at = parts + s.to(tl.int64)[:, None] * part_s + row.to(tl.int64) * RANK + column[None, :]
        part = tl.load(at, mask=(s < splits)[:, None], other=0.0)
        whole = tl.sum(part * weight[:, None], 0)
        tl.store(o + row.to(tl.int64) * o_r + column, whole.to(o.dtype.element_ty))
    tl.store(sum_all + row, tl.where(total > 0, top + tl.log(total), float("-inf")))


def fast(
    q_NHC: Tensor,
    pages_PTC: Tensor,
    slots_NK: Tensor,
    *,
    rank: int,
    scale: float,
    lse: bool = False,
    splits: int | None = None,
    tiles: tuple[int, int, int, int] | None = None,
    hopper: bool | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """`mla_sparse` in Triton. For measuring: `splits` (of a row, over programs), `hopper` (the form for that GPU
    or the plain one), `tiles` (heads and keys of a tile, warps, stages of the plain one), `options`."""
    (N, H, C), K = q_NHC.shape, slots_NK.shape[1]
    fixed, at_once = is_invariant(), max(1, FIXED_ROOM // (H * rank * FIXED_SPLITS))
    if fixed and at_once < N:
        cuts = zip(q_NHC.split(at_once), slots_NK.split(at_once), strict=True)
        done = [fast(q, pages_PTC, slots, rank=rank, scale=scale, lse=lse) for q, slots in cuts]
        sums = [part for _, part in done if part is not None]
        return torch.cat([o for o, _ in done]), torch.cat(sums) if sums else None
    o_NHc = q_NHC.new_empty(N, H, rank)
    sums_NH = torch.empty(N, H, dtype=torch.float32, device=q_NHC.device)
    if not N or not K:
        return o_NHc.zero_(), sums_NH.fill_(-math.inf) if lse else None
    if hopper is None:
        # Few heads leave most of its 64 rows empty: that pays where rows are split or FP8 has to be decoded.
        wanted = H > 16 or fixed or N < MULTIPROCESSORS or pages_PTC.dtype == torch.uint8
        hopper = wanted and mla_sparse_gluon.supported(q_NHC, pages_PTC, slots_NK, rank)
    quantized = pages_PTC.dtype == torch.uint8
    if hopper:
        block_h, block_k = mla_sparse_gluon.BLOCK_H, mla_sparse_gluon.BLOCK_K
    else:
        block_h, block_k, warps, stages = tiles or _tiles(q_NHC.dtype, H, quantized)
    head_blocks = triton.cdiv(H, block_h)
    if fixed:  # by the number of entries alone
        splits = min(FIXED_SPLITS, triton.cdiv(K, 4 * block_k))
    splits = splits or _splits(N * head_blocks, triton.cdiv(K, block_k), 1 if hopper else 2)
    share = triton.cdiv(triton.cdiv(K, splits), block_k) * block_k
    splits = triton.cdiv(K, share)
    if splits == 1:
        parts, part_sums = o_NHc[None], sums_NH[None]
    else:
        parts = torch.empty(splits, N, H, rank, dtype=torch.float32, device=q_NHC.device)
        part_sums = torch.empty(splits, N, H, dtype=torch.float32, device=q_NHC.device)
    held, scales, rotary = pages = (
        split_fp8_pages(pages_PTC, rank, C - rank) if quantized else (pages_PTC, pages_PTC, pages_PTC)
    )
    if hopper:
        mla_sparse_gluon.launch(q_NHC, pages, slots_NK, parts, part_sums, share, scale=scale, **options)
    else:
        page_size = pages_PTC.shape[1]
        _sparse[(N * head_blocks, splits)](
            q_NHC, held, scales, rotary, slots_NK, parts, part_sums, scale * LOG2_E, H, head_blocks, K, share,
            q_NHC.stride(0), q_NHC.stride(1), held.stride(0), held.stride(1), scales.stride(0), scales.stride(1),
            rotary.stride(0), rotary.stride(1), slots_NK.stride(0), parts.stride(0), parts.stride(1),
            parts.stride(2), part_sums.stride(0), RANK=rank, ROPE=C - rank, PAGE=page_size,
            FLAT=held.stride(0) == page_size * held.stride(1), SHARE=triton.next_power_of_2(share),
            BLOCK_H=block_h, BLOCK_K=block_k, QUANTIZED=quantized,
            PRECISION="ieee" if q_NHC.dtype == torch.float32 else "tf32", LN_2=math.log(2),
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
    if splits > 1:
        _join[(N * H,)](
            parts, part_sums, o_NHc, sums_NH, N * H, parts.stride(0), rank, splits, RANK=rank,
            SPLITS=triton.next_power_of_2(splits), STRIP=min(rank, 256), num_warps=4,
        )  # fmt: skip
    return o_NHc, sums_NH if lse else None


def _tiles(dtype: torch.dtype, heads: int, quantized: bool) -> tuple[int, int, int, int]:
    if dtype == torch.float32:  # no tensor cores for exact fp32: what shared memory holds
        return 16, 16, 4, 1
    if quantized:
        return (16, 32, 4, 1) if heads <= 16 else (64, 32, 8, 1)
    if heads <= 16:
        return 16, 64, 4, 2
    if heads <= 32:
        return 32, 64, 4, 2
    return 64, 64, 8, 2


def _splits(programs: int, tiles: int, resident: int) -> int:
    """Over how many programs a row is split: enough to fill the GPU with `resident` on each multiprocessor, each
    with two tiles at least."""
    return max(1, min(resident * MULTIPROCESSORS // programs, tiles // 2))


FIXED_SPLITS = 4
"""Programs that a row is split over in batch-invariant mode, at most."""

FIXED_ROOM = 2**26
"""Numbers of such parts kept at once."""

MULTIPROCESSORS = 132
"""Of the GPU that this is laid out for; results don't depend on how many there are."""


def supported(q_NHC: Tensor, pages_PTC: Tensor, rank: int) -> bool:
    """Whether `fast` takes these: bf16, fp16 or fp32, parts that are powers of two from 16 on, last axes
    contiguous, pages of q's dtype or FP8."""
    rope = q_NHC.shape[-1] - rank
    dtype = q_NHC.dtype
    return (
        dtype in (torch.bfloat16, torch.float16, torch.float32)
        and pages_PTC.dtype in (dtype, torch.uint8)
        and q_NHC.stride(-1) == pages_PTC.stride(-1) == 1
        and all(w >= 16 and w & (w - 1) == 0 for w in (rank, rope))
        and rank <= 512
    )


def mla_sparse(
    q_NHC: Tensor, pages_PTC: Tensor, slots_NK: Tensor, *, rank: int, scale: float, lse: bool = False
) -> Any:
    """Attention of each query to its own chosen cache entries, in latent space.

    q `[N, H, rank + rope]`; pages `[P, T, rank + rope]` in q's dtype, or uint8 `[P, T, rank + rank / 128 * 4 +
    2 * rope]` (`mla_prefill.gather_latents` says how); `slots_NK` int32: page number * T + place in the page, or
    -1, anywhere in the row, for none. Scores are multiplied by `scale`. -> `[N, H, rank]` in q's dtype, zeros for
    a query without entries; with `lse` also the natural log of the sum of the exponentials of its scores, fp32
    `[N, H]` (-inf without entries), with which parts over other entries can be joined.
    Raises ValueError if shapes don't belong together.
    """
    rope = q_NHC.shape[-1] - rank
    width = pages_PTC.shape[-1] if pages_PTC.dtype != torch.uint8 else rank + rope
    if slots_NK.shape[0] != q_NHC.shape[0] or rope < 0 or width != rank + rope:
        raise ValueError(
            f"queries {tuple(q_NHC.shape)} with a latent of {rank} don't fit pages {tuple(pages_PTC.shape)} "
            f"and slots {tuple(slots_NK.shape)}"
        )
    form = reference
    if usable(q_NHC, pages_PTC, slots_NK) and supported(q_NHC, pages_PTC, rank):
        form = fast
    o_NHc, sums_NH = form(q_NHC, pages_PTC, slots_NK, rank=rank, scale=scale, lse=lse)
    return (o_NHc, sums_NH) if lse else o_NHc
