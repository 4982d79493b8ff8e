"""The lightning indexer on paged index keys: which positions a query attends (V3.2 report section 2.1, facts 3.8;
V4's CSA, facts 3.9).

Scores I[n, s] = sum_h w[n, h] relu(q[n, h] . key[s]) in fp32 for the positions below a query's limit, then the k
best of them exactly; equal scores go to the lowest position, so a choice never depends on what lies behind the
limit. One kernel writes scores and, for long contexts, the best score of every residue class of positions: the
k-th best of those is at most the k-th best score, so few positions reach it. A second kernel gathers these, a
third chooses among them.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from rorqual.kernels.entries import from_e2m1, from_exponent, key_bytes, unpack_keys
from rorqual.kernels.gpu import tl, triton, usable
from rorqual.kernels.mode import is_invariant

CODES = 128
"""Channels of a key kept as FP8: 128 E4M3 codes and one fp32 scale, 132 bytes."""

SCORE_BYTES = 256 * 2**20
"""Queries are worked in blocks whose scores stay near this size."""

MOST_KEYS = 2**21
"""Counts are packed three to 63 bits: longer contexts than this take the reference."""


def reference(
    q_NHd: Tensor,
    w_NH: Tensor,
    k_pages_PTd: Tensor,
    table_SB: Tensor,
    seq_N: Tensor,
    limits_N: Tensor,
    *,
    k: int,
    max_keys: int,
) -> Tensor:
    """The definition, a sequence at a time. See `index_choose`."""
    chosen_NK = torch.full((q_NHd.shape[0], k), -1, dtype=torch.int32, device=q_NHd.device)
    for seq in seq_N.unique().tolist():
        (rows,) = (seq_N == seq).nonzero(as_tuple=True)
        keys = _values(k_pages_PTd[table_SB[seq].long()].flatten(0, 1)[:max_keys], q_NHd.shape[2])
        position = torch.arange(keys.shape[0], device=keys.device)
        for block in rows.split(max(1, 2**24 // (q_NHd.shape[1] * max(1, keys.shape[0])))):
            dots = (q_NHd[block].to(keys.dtype) @ keys.T).relu()
            scores = (w_NH[block].to(keys.dtype)[:, None] @ dots).squeeze(1)
            limit = limits_N[block, None]
            scores = scores.masked_fill(position >= limit, float("-inf"))
            best = scores.sort(dim=-1, descending=True, stable=True).indices[:, :k]
            best = best.masked_fill(best >= limit, max_keys).sort(-1).values
            chosen_NK[block, : best.shape[1]] = best.masked_fill(best == max_keys, -1).int()
    return chosen_NK


def _values(keys: Tensor, dim: int = CODES) -> Tensor:
    """Index keys as fp32 (fp64 stays): from bf16, from 128 codes and a scale in 132 bytes, or V4's FP4 bytes."""
    if keys.dtype == torch.uint8 and keys.shape[-1] == key_bytes(dim):
        return unpack_keys(keys, torch.float32)
    if keys.dtype == torch.uint8:
        codes = keys[..., :CODES].contiguous().view(torch.float8_e4m3fn).float()
        return codes * keys[..., CODES:].contiguous().view(torch.float32)
    return keys if keys.dtype == torch.float64 else keys.float()


# ----------------------------------------------------------------------------------------- kernels


@triton.jit(do_not_specialize=["first", "rows", "columns"])
def _score(  # type: ignore[no-untyped-def]
    q,
    w,
    keys,
    key_scales,
    table,
    seqs,
    limits,
    scores,
    peaks,
    first,
    rows,
    columns,
    q_row,
    q_head,
    score_row,
    heads,
    dim,
    PAGE_STRIDE: tl.constexpr,
    ITEM_STRIDE: tl.constexpr,
    SCALE_PAGE: tl.constexpr,
    SCALE_ITEM: tl.constexpr,
    PAGE: tl.constexpr,
    QUERIES: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    KEYS: tl.constexpr,
    SCALED: tl.constexpr,
    FP4: tl.constexpr,
    PEAKS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Scores of QUERIES queries for key tiles `part`, `part` + `parts`, ...; and the best score each query has
    at positions equal to `part` * KEYS + i modulo `parts` * KEYS."""
    part, parts = tl.program_id(0), tl.num_programs(0)
    local = tl.program_id(1) * QUERIES + tl.arange(0, QUERIES)
    n = first + local
    seq_of = tl.load(seqs + n, mask=local < rows, other=-1)
    limit_of = tl.load(limits + n, mask=local < rows, other=0)
    if part * KEYS >= tl.max(limit_of):
        return
    c = tl.arange(0, QUERIES * HEADS)
    c_head, c_local = c % HEADS, tl.program_id(1) * QUERIES + c // HEADS
    c_live = (c_head < heads) & (c_local < rows)
    q_rows = (first + c_local).to(tl.int64) * q_row + c_head * q_head
    if FP4:  # a byte holds an even and an odd channel: these meet the queries' in two products
        d = tl.arange(0, DIM // 2)
        q_tile = tl.load(q + q_rows[:, None] + 2 * d[None, :], mask=c_live[:, None], other=0.0)
        q_odd = tl.load(q + q_rows[:, None] + 2 * d[None, :] + 1, mask=c_live[:, None], other=0.0)
    else:
        d = tl.arange(0, DIM)
        q_tile = tl.load(
            q + q_rows[:, None] + d[None, :], mask=c_live[:, None] & (d < dim)[None, :], other=0.0
        )
    weight = tl.load(w + (first + c_local).to(tl.int64) * heads + c_head, mask=c_live, other=0.0)
    weight = weight.to(tl.float32)
    item = tl.arange(0, KEYS)
    column = tl.arange(0, QUERIES)
    done = 0
    while done < QUERIES:  # queries of one sequence share its keys; a group is of one sequence as a rule
        seq = tl.max(tl.where(column == done, seq_of, -1))
        mine = (seq_of == seq) & (column >= done)
        limit = tl.max(tl.where(mine, limit_of, 0))
        peak = tl.full([KEYS, QUERIES], float("-inf"), tl.float32)
        of_seq = table + seq.to(tl.int64) * columns
        upcoming = tl.load(of_seq + tl.minimum(part * KEYS, tl.maximum(limit, 1) - 1) // PAGE)
        for t in tl.range(part, tl.cdiv(limit, KEYS), parts, num_stages=STAGES):
            s = t * KEYS + item
            if PAGE >= KEYS:  # of one page, whose number was read a tile ahead: no load waits for another
                page = upcoming.to(tl.int64)
                upcoming = tl.load(of_seq + tl.minimum((t + parts) * KEYS, limit - 1) // PAGE)
                at = page * PAGE_STRIDE + (t * KEYS % PAGE) * ITEM_STRIDE + item * ITEM_STRIDE
            else:
                page = tl.load(of_seq + s // PAGE, mask=s < limit, other=0).to(tl.int64)
                at = page * PAGE_STRIDE + (s % PAGE) * ITEM_STRIDE
            if FP4:
                byte = tl.load(keys + at[:, None] + d[None, :])
                exponent = tl.load(keys + at[:, None] + DIM // 2 + tl.arange(0, DIM // 32)[None, :])
                factor = from_exponent(exponent)[:, :, None]
                even = tl.reshape(from_e2m1(byte & 15), [KEYS, DIM // 32, 16]) * factor
                odd = tl.reshape(from_e2m1(byte >> 4), [KEYS, DIM // 32, 16]) * factor
                even = tl.reshape(even, [KEYS, DIM // 2]).to(q_tile.dtype)
                odd = tl.reshape(odd, [KEYS, DIM // 2]).to(q_tile.dtype)
                dots = tl.dot(even, tl.trans(q_tile), input_precision="ieee")
                dots = tl.dot(odd, tl.trans(q_odd), dots, input_precision="ieee")
            else:
                key = tl.load(keys + at[:, None] + d[None, :], mask=(d < dim)[None, :], other=0.0)
                if key.dtype != q_tile.dtype:
                    key = key.to(q_tile.dtype)
                dots = tl.dot(key, tl.trans(q_tile), input_precision="ieee")
            worth = tl.maximum(dots, 0.0) * weight[None, :]
            if QUERIES == 1:
                score = tl.sum(worth, axis=1)[:, None]
            else:
                score = tl.sum(tl.reshape(worth, [KEYS, QUERIES, HEADS]), axis=2)
            if SCALED:
                at = page * SCALE_PAGE + (s % PAGE) * SCALE_ITEM
                score = score * tl.load(key_scales + at)[:, None]
            seen = mine[None, :] & (s[:, None] < limit_of[None, :])
            tl.store(scores + local.to(tl.int64)[None, :] * score_row + s[:, None], score, mask=seen)
            if PEAKS:
                peak = tl.maximum(peak, tl.where(seen, score, float("-inf")))
        if PEAKS:
            to = local.to(tl.int64)[None, :] * (parts * KEYS) + (part * KEYS + item)[:, None]
            tl.store(peaks + to, peak, mask=mine[None, :] & (local < rows)[None, :])
        done = tl.min(tl.where((column > done) & (seq_of != seq), column, QUERIES))


@triton.jit
def _ordered(x):  # type: ignore[no-untyped-def]
    """fp32 to int32 in the same order; -0 equals 0."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _count(values, a, b, c):  # type: ignore[no-untyped-def]
    """How many of `values` [n, 4] reach a, b and c, packed 21 bits each."""
    few = (values >= a).to(tl.int32) + ((values >= b).to(tl.int32) << 8) + ((values >= c).to(tl.int32) << 16)
    few = tl.sum(few, axis=1).to(tl.int64)
    return tl.sum((few & 0xFF) + ((few & 0xFF00) << 13) + ((few & 0xFF0000) << 26))


@triton.jit
def _narrow(low, high, m_a, m_b, m_c, at_low, at_high, packed, k):  # type: ignore[no-untyped-def]
    """The quarter of [low, high) in which the k-th best lies, and how many reach its two ends."""
    a, b, c = packed & 0x1FFFFF, (packed >> 21) & 0x1FFFFF, packed >> 42
    new_low = tl.where(c >= k, m_c, tl.where(b >= k, m_b, tl.where(a >= k, m_a, low)))
    new_at_low = tl.where(c >= k, c, tl.where(b >= k, b, tl.where(a >= k, a, at_low)))
    new_high = tl.where(c >= k, high, tl.where(b >= k, m_c, tl.where(a >= k, m_b, m_a)))
    new_at_high = tl.where(c >= k, at_high, tl.where(b >= k, c, tl.where(a >= k, b, a)))
    return new_low, new_high, new_at_low, new_at_high


@triton.jit
def _approach(score, live, count, k, slack, ROUNDS: tl.constexpr):  # type: ignore[no-untyped-def]
    """[low, high) around the k-th best of `count` scores [n, 4], after at most ROUNDS quarterings: at least k
    reach low, fewer than k reach high (or high is the best). Returns low, high and how many reach them."""
    low = tl.min(tl.where(live, score, float("inf")))
    score = tl.where(live, score, float("-inf"))
    high = tl.max(score)
    at_low, at_high = count.to(tl.int64), tl.zeros([], tl.int64)
    left = tl.where(high - low < 1e38, ROUNDS, 0)  # infinite scores have no quarters
    while (left > 0) & (at_low > k + slack):
        step = (high - low) * 0.25
        m_a, m_b, m_c = low + step, low + 2 * step, low + 3 * step
        packed = _count(score, m_a, m_b, m_c)
        low, high, at_low, at_high = _narrow(low, high, m_a, m_b, m_c, at_low, at_high, packed, k)
        left -= 1
    return low, high, at_low, at_high


@triton.jit
def _quarters(low, high):  # type: ignore[no-untyped-def]
    """Where the second to fourth quarter of [low, high) begin."""
    step = high - low
    return low + (step >> 2), low + (step >> 1), low + step - (step >> 2)


@triton.jit(do_not_specialize=["first", "parts", "k"])
def _gather(  # type: ignore[no-untyped-def]
    scores,
    peaks,
    limits,
    near,
    counts,
    first,
    score_row,
    near_row,
    parts,
    k,
    GROUPS: tl.constexpr,
    CHUNK: tl.constexpr,
    CAP: tl.constexpr,
):
    """Offsets in chunk `part` of row n whose score may be among the k best, in ascending order."""
    part, n = tl.program_id(0), tl.program_id(1).to(tl.int64)
    limit = tl.load(limits + first + n)
    if (limit <= CAP) | (part * CHUNK >= limit):
        return
    group = tl.arange(0, GROUPS // 4)[:, None] * 4 + tl.arange(0, 4)[None, :]
    best = tl.load(peaks + n * GROUPS + group, mask=group < limit, other=0.0)
    low, _, _, _ = _approach(best, group < limit, tl.minimum(limit, GROUPS), k, k // 16, 8)
    i = tl.arange(0, CHUNK)
    s = part * CHUNK + i
    score = tl.load(scores + n * score_row + s, mask=s < limit, other=0.0)
    keep = ((score >= low) & (s < limit)).to(tl.int32)
    to = tl.cumsum(keep, 0) - 1
    tl.store(near + n * near_row + part * CHUNK + to, i.to(tl.int16), mask=keep > 0)
    tl.store(counts + n * parts + part, tl.sum(keep))


@triton.jit(do_not_specialize=["first", "parts", "k"])
def _choose(  # type: ignore[no-untyped-def]
    scores,
    near,
    counts,
    limits,
    chosen,
    first,
    score_row,
    near_row,
    parts,
    k,
    K: tl.constexpr,
    CHUNK: tl.constexpr,
    CAP: tl.constexpr,
    GATHERED: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """The k best of row n among its gathered positions (all positions, if no more than CAP), ascending."""
    n = tl.program_id(0).to(tl.int64)
    limit = tl.load(limits + first + n)
    scores += n * score_row
    chosen += n * k
    out = tl.arange(0, K)
    tl.store(chosen + out, tl.where(out < limit, out, -1), mask=(out < k) & ((out >= limit) | (limit <= k)))
    if limit <= k:
        return
    i = tl.arange(0, CAP)
    s = i
    count = limit
    if GATHERED and limit > CAP:
        count = limit * 0
        chunk, begin = tl.zeros([CAP], tl.int32), tl.zeros([CAP], tl.int32)
        for part in range(tl.cdiv(limit, CHUNK)):
            chunk, begin = tl.where(i >= count, part, chunk), tl.where(i >= count, count, begin)
            count += tl.load(counts + n * parts + part)
        offset = tl.load(near + n * near_row + chunk * CHUNK + i - begin, mask=i < count, other=0)
        s = chunk * CHUNK + offset.to(tl.int32)
    if count <= CAP:
        live = i < count
        score = tl.load(scores + s, mask=live, other=0.0)
        few, fours = tl.reshape(score, [CAP // 4, 4]), tl.reshape(live, [CAP // 4, 4])
        soft_low, soft_high, at_low, sure = _approach(few, fours, count, k, 0, 4)
        low = _ordered(soft_low).to(tl.int64)
        high = _ordered(soft_high).to(tl.int64) + (sure == 0).to(tl.int64)
        rank = tl.where(live, _ordered(score), -0x80000000)
        fours = tl.reshape(rank, [CAP // 4, 4])
        while (high - low > 1) & (at_low > k):
            a, b, c = _quarters(low, high)
            packed = _count(fours, a.to(tl.int32), b.to(tl.int32), c.to(tl.int32))
            low, high, at_low, sure = _narrow(low, high, a, b, c, at_low, sure, packed, k)
        above = rank.to(tl.int64) >= high
        tied = ((rank >= low.to(tl.int32)) & live & (above == 0)).to(tl.int32)
        take = above | ((tied > 0) & (tl.cumsum(tied, 0) <= k - sure))
        to = tl.cumsum(take.to(tl.int32), 0) - 1
        tl.store(chosen + to, s, mask=take)
    else:  # many equal scores, or a row longer than CAP with nothing gathered: pass over the row again and again
        low, high = tl.full([], -0x7FFFFFFF, tl.int64), tl.full([], 0x7FFFFFFF, tl.int64)
        at_low, sure = limit.to(tl.int64), tl.zeros([], tl.int64)
        while (high - low > 1) & (at_low > k):
            a, b, c = _quarters(low, high)
            packed = tl.zeros([], tl.int64)
            for start in range(0, limit, WHOLE):
                s = start + tl.arange(0, WHOLE)
                rank = _ordered(tl.load(scores + s, mask=s < limit, other=0.0))
                fours = tl.reshape(tl.where(s < limit, rank, -0x80000000), [WHOLE // 4, 4])
                packed += _count(fours, a.to(tl.int32), b.to(tl.int32), c.to(tl.int32))
            low, high, at_low, sure = _narrow(low, high, a, b, c, at_low, sure, packed, k)
        ties, before = limit * 0, limit * 0
        for start in range(0, limit, WHOLE):
            s = start + tl.arange(0, WHOLE)
            rank = _ordered(tl.load(scores + s, mask=s < limit, other=0.0)).to(tl.int64)
            above = (rank >= high) & (s < limit)
            tied = ((rank >= low) & (rank < high) & (s < limit)).to(tl.int32)
            take = above | ((tied > 0) & (ties + tl.cumsum(tied, 0) <= k - sure))
            to = before + tl.cumsum(take.to(tl.int32), 0) - 1
            tl.store(chosen + to, s, mask=take)
            ties += tl.sum(tied)
            before += tl.sum(take.to(tl.int32))


# ------------------------------------------------------------------------------------------ launch


class Plan(NamedTuple):
    """Tile sizes, a function of shapes alone."""

    queries: int = 1
    keys: int = 64
    parts: int = 128
    warps: int = 4
    stages: int = 6
    cap: int = 4096
    chunk: int = 8192
    gather_warps: int = 16
    choose_warps: int = 16


def plan(
    rows: int, sequences: int, max_keys: int, k: int, page: int, dtype: torch.dtype, fp4: bool = False
) -> Plan:
    """Chunks of one sequence take two queries a program; short contexts skip the gathering, and there a program
    takes up to four tiles of keys where there are enough programs. Where a tile is of several pages, the pipeline
    gives half its stages to reading their numbers."""
    cap = max(4096, triton.next_power_of_2(2 * k))
    groups = 2 * cap
    p = Plan(cap=cap, parts=groups // 64)
    if dtype == torch.float32:  # no tensor cores: tiles that fit the registers
        p = p._replace(keys=32, parts=groups // 32, stages=2)
    elif fp4:  # multiplied out in registers: small tiles, of many programs
        p = p._replace(queries=2 if rows >= 4 * sequences and not is_invariant() else 1, stages=4)
    elif (
        rows >= 4 * sequences and not is_invariant()
    ):  # there heads are added up in one order, that of one query
        p = p._replace(queries=2, keys=128, parts=groups // 128, stages=3)
    elif dtype == torch.uint8:
        p = p._replace(keys=128, parts=groups // 128, stages=3)
    else:
        p = p._replace(stages=(5 if rows == 1 else 3) if page >= 64 else (9 if rows == 1 else 6))
    if max_keys <= cap:
        tiles, groups_of_rows = -(-max_keys // p.keys), -(-rows // p.queries)
        p = p._replace(parts=-(-tiles // max(1, min(4, tiles * groups_of_rows // 264))))
    return p


def fast(
    q_NHd: Tensor,
    w_NH: Tensor,
    k_pages_PTd: Tensor,
    table_SB: Tensor,
    seq_N: Tensor,
    limits_N: Tensor,
    *,
    k: int,
    max_keys: int,
    tiles: Plan | None = None,
) -> Tensor:
    """The kernels; see `index_choose`."""
    rows, heads, dim = q_NHd.shape
    device, q_NHd = q_NHd.device, q_NHd if q_NHd.stride(2) == 1 else q_NHd.contiguous()
    chosen_NK = torch.empty(rows, k, dtype=torch.int32, device=device)
    if not rows:
        return chosen_NK
    fp4 = k_pages_PTd.dtype == torch.uint8 and k_pages_PTd.shape[2] == key_bytes(dim)
    page, kind = k_pages_PTd.shape[1], k_pages_PTd.dtype
    p = tiles or plan(rows, table_SB.shape[0], max_keys, k, page, kind, fp4)
    assert k_pages_PTd.stride(2) == 1 and table_SB.stride(1) == 1 and max_keys <= MOST_KEYS and p.cap >= k
    assert p.chunk <= 2**15
    scaled = k_pages_PTd.dtype == torch.uint8 and not fp4
    assert not fp4 or dim == triton.next_power_of_2(dim) >= 32
    codes, key_scales = k_pages_PTd, k_pages_PTd
    if scaled:
        codes = k_pages_PTd.view(torch.float8_e4m3fn)
        key_scales = k_pages_PTd.view(torch.float32)[..., CODES // 4]
    gathered = max_keys > p.cap
    width = -(-max_keys // 128) * 128
    groups, chunks = p.parts * p.keys, -(-max_keys // p.chunk)
    assert not gathered or groups >= k
    block = max(p.queries, SCORE_BYTES // (4 * max(1, width)) // p.queries * p.queries)
    block = min(block, rows)
    scores = torch.empty(block, width, dtype=torch.float32, device=device)
    peaks = torch.empty(block, groups, dtype=torch.float32, device=device) if gathered else scores
    near = torch.empty(block, chunks * p.chunk, dtype=torch.int16, device=device) if gathered else scores
    counts = torch.empty(block, chunks, dtype=torch.int32, device=device) if gathered else scores
    w_NH = w_NH.contiguous()
    for first in range(0, rows, block):
        here = min(block, rows - first)
        _score[(p.parts, -(-here // p.queries))](
            q_NHd, w_NH, codes, key_scales, table_SB, seq_N, limits_N, scores, peaks,
            first, here, table_SB.stride(0), q_NHd.stride(0), q_NHd.stride(1),
            width, heads, dim, PAGE_STRIDE=codes.stride(0), ITEM_STRIDE=codes.stride(1),
            SCALE_PAGE=key_scales.stride(0), SCALE_ITEM=key_scales.stride(1), PAGE=k_pages_PTd.shape[1],
            QUERIES=p.queries,
            HEADS=max(triton.next_power_of_2(heads), -(-16 // p.queries)),
            DIM=max(16, triton.next_power_of_2(dim)), KEYS=p.keys, SCALED=scaled, FP4=fp4,
            PEAKS=gathered,
            STAGES=p.stages, num_warps=p.warps,
        )  # fmt: skip
        if gathered:
            _gather[(chunks, here)](
                scores, peaks, limits_N, near, counts, first, width, chunks * p.chunk, chunks, k,
                GROUPS=groups, CHUNK=p.chunk, CAP=p.cap, num_warps=p.gather_warps,
            )  # fmt: skip
        _choose[(here,)](
            scores, near, counts, limits_N, chosen_NK[first:], first, width, chunks * p.chunk, chunks, k,
            K=triton.next_power_of_2(k), CHUNK=p.chunk, CAP=p.cap, GATHERED=gathered, WHOLE=p.cap,
            num_warps=p.choose_warps,
        )  # fmt: skip
    return chosen_NK


def index_choose(
    q_NHd: Tensor,
    w_NH: Tensor,
    k_pages_PTd: Tensor,
    table_SB: Tensor,
    seq_N: Tensor,
    limits_N: Tensor,
    *,
    k: int,
    max_keys: int,
) -> Tensor:
    """The k best-scored positions of each query, int32 `[N, k]`, ascending; -1 behind them where fewer exist.

    Index queries `q_NHd` (bf16, fp32, or E4M3 with their scale folded into `w_NH`), fp32 head weights `w_NH`,
    index keys in pages `[P, page_size, d]` of bf16 or fp32, or uint8 of 132 a key (128 E4M3 codes, then one fp32
    scale) or of `entries.key_bytes(d)` (V4's FP4, for queries turned as its keys are). Query n belongs to sequence
    `seq_N[n]` of `table_SB` and sees the positions below `limits_N[n]` (0 gives all -1), never more than `max_keys`.
    Queries of one sequence are best kept next to each other.
    """
    supported = max_keys <= MOST_KEYS and q_NHd.dtype != torch.float64 and k_pages_PTd.dtype != torch.float64
    if usable(q_NHd, w_NH, k_pages_PTd, table_SB, seq_N, limits_N) and supported:
        return fast(q_NHd, w_NH, k_pages_PTd, table_SB, seq_N, limits_N, k=k, max_keys=max_keys)
    return reference(q_NHd, w_NH, k_pages_PTd, table_SB, seq_N, limits_N, k=k, max_keys=max_keys)
