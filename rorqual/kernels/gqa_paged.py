"""Causal attention of grouped query heads over paged keys and values, for sequences of any mix of lengths.

Multi-head, grouped and multi-query attention alike (V1 report section 2.2): the query heads of a group meet the
same keys, so a group's heads and queries are packed into the rows of one tile. A few queries a sequence (decoding,
drafts) are cut into splits along the keys, put together by `join.combine`; more of them (prefill, whole or in
chunks) run as flash attention. The fixed form computes every query in one way, to the bit, whatever comes with it.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from rorqual.kernels import gqa_paged_gluon
from rorqual.kernels.gpu import tl, triton, usable
from rorqual.kernels.join import combine
from rorqual.kernels.mla_decode import choose_splits, processors

FEW = 8
"""Queries a sequence up to which the keys are split."""


def reference(
    q_NHd: Tensor,
    k_pages_PTGd: Tensor,
    v_pages_PTGd: Tensor,
    table_SB: Tensor,
    ends_S: Tensor,
    starts_S1: Tensor,
    *,
    max_count: int,
    scale: float,
    fixed: bool = False,
) -> Tensor:
    """`gqa_paged`, a sequence at a time."""
    out = torch.zeros_like(q_NHd)
    size, group = k_pages_PTGd.shape[1], q_NHd.shape[1] // k_pages_PTGd.shape[2]
    starts = starts_S1.tolist()
    for s, end in enumerate(ends_S.tolist()):
        pages = table_SB[s, : -(-end // size)].long()
        k = k_pages_PTGd[pages].flatten(0, 1)[:end].float().repeat_interleave(group, 1)
        v = v_pages_PTGd[pages].flatten(0, 1)[:end].float().repeat_interleave(group, 1)
        queries = slice(starts[s], starts[s + 1])
        score = torch.einsum("jhd,khd->hjk", q_NHd[queries].float(), k) * scale
        last_J = torch.arange(end - (starts[s + 1] - starts[s]), end, device=k.device)
        hidden = torch.arange(end, device=k.device) > last_J[:, None]
        weight = score.masked_fill(hidden, float("-inf")).softmax(-1).nan_to_num(0.0)
        out[queries] = torch.einsum("hjk,khd->jhd", weight, v).to(out.dtype)
    return out


# ------------------------------------------------------------------------------------------- kernels


@triton.jit
def _meet(  # type: ignore[no-untyped-def]
    q, acc, peak, total, k_ptr, v_ptr, table_ptr, page, start, last, place, scale, stride,
    SIZE: tl.constexpr, PAGE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The softmax state after the BLOCK_N keys from `start` on, which lie in `page`, and the page of those that
    follow: a load that waits for a load would cost the pipeline a stage. Without MASKED every query sees them all.
    """
    lane = tl.arange(0, BLOCK_N)
    channel = tl.arange(0, BLOCK_D)
    key = start + lane
    if PAGE >= BLOCK_N:
        at = (page.to(tl.int64) * PAGE + start % PAGE) * stride + lane[:, None] * stride + channel[None, :]
        page = tl.load(table_ptr + tl.minimum(start + BLOCK_N, last - 1) // PAGE)
    else:
        pages = tl.load(table_ptr + key // PAGE, mask=key < last, other=0).to(tl.int64)
        # Not key % PAGE: the compiler would take every slot for a multiple of PAGE, and read in too wide steps.
        at = (pages * PAGE + (key & (PAGE - 1)))[:, None] * stride + channel[None, :]
    if MASKED:
        there = (key < last)[:, None] & (channel < SIZE)[None, :]
        k = tl.load(k_ptr + at, mask=there, other=0.0)
        v = tl.load(v_ptr + at, mask=there, other=0.0)
    elif BLOCK_D > SIZE:
        k = tl.load(k_ptr + at, mask=(channel < SIZE)[None, :], other=0.0)
        v = tl.load(v_ptr + at, mask=(channel < SIZE)[None, :], other=0.0)
    else:
        k = tl.load(k_ptr + at)
        v = tl.load(v_ptr + at)
    score = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    if MASKED:
        score = tl.where(key[None, :] <= place[:, None], score, float("-inf"))
    higher = tl.maximum(peak, tl.max(score, 1))
    base = tl.where(higher == float("-inf"), 0.0, higher) if MASKED else higher
    fade = tl.exp2(peak - base)
    weight = tl.exp2(score - base[:, None])
    total = total * fade + tl.sum(weight, 1)
    acc = tl.dot(weight.to(v.dtype), v, acc * fade[:, None], input_precision=PRECISION)
    return acc, higher, total, page


@triton.jit(do_not_specialize=("groups", "table_stride", "splits", "places"))
def _attend(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, table_ptr, ends_ptr, starts_ptr, o_ptr, lse_ptr, scale, groups, table_stride, splits, places,
    GROUP: tl.constexpr, SIZE: tl.constexpr, PAGE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, DIRECT: tl.constexpr, UNIFORM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows (queries times the GROUP heads of one group) of a sequence against one split of its keys.

    UNIFORM takes every tile of keys through the same code: the compiler may round the masked and the unmasked
    form differently, and which tiles need a mask depends on a query's place in its tile.
    """
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest first
    head = tl.program_id(1) % groups
    split = tl.program_id(1) // groups
    s = tl.program_id(2)
    start = tl.load(starts_ptr + s)
    count = tl.load(starts_ptr + s + 1) - start
    end = tl.load(ends_ptr + s)
    share = tl.cdiv(tl.cdiv(end, splits), BLOCK_N) * BLOCK_N
    first = split * share
    if (block * BLOCK_M >= count * GROUP) | (first >= end):
        return

    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    held = row < count * GROUP
    place = end - count + row // GROUP
    channel = tl.arange(0, BLOCK_D)
    known = held[:, None] & (channel < SIZE)[None, :]
    heads = groups * GROUP
    at = (start + row // GROUP).to(tl.int64) * heads + head * GROUP + row % GROUP
    q = tl.load(q_ptr + at[:, None] * SIZE + channel[None, :], mask=known, other=0.0)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    stride = groups * SIZE
    k_ptr += head * SIZE
    v_ptr += head * SIZE
    table_ptr += s * table_stride

    highest = tl.minimum(end, end - count + (block * BLOCK_M + BLOCK_M - 1) // GROUP + 1)
    last = tl.minimum(first + share, highest)
    whole = first
    page = tl.load(table_ptr + first // PAGE)
    if not UNIFORM:
        open_to_all = tl.maximum(end - count + (block * BLOCK_M) // GROUP + 1, 0)
        whole = tl.maximum(first, tl.minimum(last, open_to_all) // BLOCK_N * BLOCK_N)
        for key in tl.range(first, whole, BLOCK_N):
            acc, peak, total, page = _meet(
                q, acc, peak, total, k_ptr, v_ptr, table_ptr, page, key, last, place, scale, stride,
                SIZE, PAGE, BLOCK_D, BLOCK_N, False, PRECISION,
            )  # fmt: skip
    for key in tl.range(whole, last, BLOCK_N):
        acc, peak, total, page = _meet(
            q, acc, peak, total, k_ptr, v_ptr, table_ptr, page, key, last, place, scale, stride,
            SIZE, PAGE, BLOCK_D, BLOCK_N, True, PRECISION,
        )  # fmt: skip

    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    if not DIRECT:
        at = (s * places + row // GROUP).to(tl.int64) * heads + head * GROUP + row % GROUP
        at += split.to(tl.int64) * tl.num_programs(2) * places * heads
        tl.store(
            lse_ptr + at, peak + tl.log2(tl.where(total > 0, total, 1.0)), mask=held
        )  # nothing seen: -inf
    tl.store(o_ptr + at[:, None] * SIZE + channel[None, :], acc.to(o_ptr.dtype.element_ty), mask=known)


# ------------------------------------------------------------------------------------------- launches


class Config(NamedTuple):
    """How the work is cut: rows and keys a program meets at a time, and what Triton makes of it."""

    block_m: int
    block_n: int
    warps: int
    stages: int
    resident: int = 2
    """Programs that run on one multiprocessor at a time."""
    gluon: bool = False
    """Whether `gqa_paged_gluon` runs it. Nothing chooses that form by itself before its speed has been measured."""


def configure(rows: int, max_count: int, fixed: bool, size: int, wide: bool) -> Config:
    """The cut for `max_count` queries of a sequence, `rows` of them with a group's heads. The fixed form looks at
    the head's `size` and type (`wide`: fp32) alone."""
    if wide:
        return Config(16 if fixed else min(64, max(16, triton.next_power_of_2(rows))), 32, 4, 2)
    if fixed:
        return Config(64, 64, 4, 3 if size <= 128 else 2)
    if size > 128:
        return Config(64, 64, 8, 2, resident=1)
    if max_count > FEW:
        return Config(128, 64, 8, 3, resident=1)
    return Config(min(64, max(16, triton.next_power_of_2(rows))), 64, 4, 3)


def fast(
    q_NHd: Tensor,
    k_pages_PTGd: Tensor,
    v_pages_PTGd: Tensor,
    table_SB: Tensor,
    ends_S: Tensor,
    starts_S1: Tensor,
    *,
    max_count: int,
    scale: float,
    fixed: bool = False,
    config: Config | None = None,
    splits: int | None = None,
) -> Tensor:
    """`gqa_paged` in Triton. `config` and `splits` override the cut (benchmarks)."""
    q = q_NHd.contiguous()
    _, heads, size = q.shape
    groups, page = k_pages_PTGd.shape[2], k_pages_PTGd.shape[1]
    sequences, group = table_SB.shape[0], heads // groups
    out = torch.zeros_like(q)
    if max_count == 0 or sequences == 0:
        return out
    base_two = scale * math.log2(math.e)
    if config and config.gluon:
        gqa_paged_gluon.launch(
            q,
            k_pages_PTGd,
            v_pages_PTGd,
            table_SB,
            ends_S,
            starts_S1,
            out,
            max_count=max_count,
            scale=base_two,
        )
        return out
    rows = max_count * group
    cut = config or configure(rows, max_count, fixed, size, q.dtype == torch.float32)
    blocks, capacity = -(-rows // cut.block_m), table_SB.shape[1] * page
    if fixed or max_count > FEW:
        pieces = 1
    else:
        slots = processors(q.device) * cut.resident
        pieces = splits or choose_splits(blocks * groups * sequences, capacity, slots, cut.block_n)
    if pieces == 1:
        part = lse = out
    else:
        shape = (pieces, sequences * max_count * heads)
        part = torch.empty(*shape, size, dtype=torch.float32, device=q.device)
        lse = torch.empty(shape, dtype=torch.float32, device=q.device)
    _attend[(blocks, groups * pieces, sequences)](
        q,
        k_pages_PTGd,
        v_pages_PTGd,
        table_SB,
        ends_S,
        starts_S1,
        part,
        lse,
        base_two,
        groups,
        table_SB.stride(0),
        pieces,
        max_count,
        GROUP=group,
        SIZE=size,
        PAGE=page,
        BLOCK_D=max(16, triton.next_power_of_2(size)),
        BLOCK_M=cut.block_m,
        BLOCK_N=cut.block_n,
        DIRECT=pieces == 1,
        UNIFORM=fixed or max_count <= FEW,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        num_warps=cut.warps,
        num_stages=cut.stages,
    )
    if pieces > 1:
        combine(part, lse, ends_S, starts_S1, out, rows=max_count * heads, heads=heads, tile=cut.block_n)
    return out


def gqa_paged(
    q_NHd: Tensor,
    k_pages_PTGd: Tensor,
    v_pages_PTGd: Tensor,
    table_SB: Tensor,
    ends_S: Tensor,
    starts_S1: Tensor,
    *,
    max_count: int,
    scale: float,
    fixed: bool = False,
) -> Tensor:
    """Attend the queries of each sequence to its keys and values: `[N, H, d]` in q's type.

    q `[N, H, d]`; pages `[P, page_size, G, d]` in q's type, H a multiple of G; table `[S, B]`, ends `[S]` and starts
    `[S + 1]` int32. Sequence s owns the queries `starts[s] .. starts[s + 1]` (at most `max_count`), the last at
    position `ends[s] - 1`; each sees what is not after it. Rows past `starts[S]`, and queries with nothing to see,
    get zeros. With `fixed` a query's result does not depend, to the bit, on how its sequence is cut into calls or
    on what else is in the call. Raises ValueError where shapes do not belong together.
    """
    if k_pages_PTGd.shape != v_pages_PTGd.shape or k_pages_PTGd.shape[3] != q_NHd.shape[2]:
        raise ValueError(
            f"queries {tuple(q_NHd.shape)} do not fit keys {tuple(k_pages_PTGd.shape)} and values "
            f"{tuple(v_pages_PTGd.shape)}"
        )
    if q_NHd.shape[1] % k_pages_PTGd.shape[2]:
        raise ValueError(f"{q_NHd.shape[1]} query heads can't share {k_pages_PTGd.shape[2]} groups evenly")
    run = fast if usable(q_NHd, k_pages_PTGd) and supported(q_NHd, k_pages_PTGd, v_pages_PTGd) else reference
    return run(
        q_NHd,
        k_pages_PTGd,
        v_pages_PTGd,
        table_SB,
        ends_S,
        starts_S1,
        max_count=max_count,
        scale=scale,
        fixed=fixed,
    )


def supported(q_NHd: Tensor, k_pages_PTGd: Tensor, v_pages_PTGd: Tensor) -> bool:
    """Whether `fast` takes these types and sizes."""
    kept = all(pages.dtype == q_NHd.dtype and pages.is_contiguous() for pages in (k_pages_PTGd, v_pages_PTGd))
    page, limit = k_pages_PTGd.shape[1], 128 if q_NHd.dtype == torch.float32 else 256
    return kept and q_NHd.shape[2] <= limit and page & (page - 1) == 0
