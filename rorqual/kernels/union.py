"""V4's attention (report section 2.3, facts 3.9): one softmax over the last `window` raw entries, over compressed
entries (the chosen ones, CSA; all finished ones, HCA; none, SWA) and over a sink logit a head that has no value.

An entry is key and value of every head. Raw entries lie in rings, that of position p of slot r at `[r, p % L]`,
compressed ones in pages. A query's keys are one list, first its window, then its entries; a program takes a run
of that list for up to 64 heads, and where a list is cut into several runs a second kernel joins them.

Rings, pages and the pass's own entries may all be bytes in the released layout (`entries`), whose rotary channels
are the last `rope`.
"""

import torch
from torch import Tensor

from rorqual.kernels import union_gluon
from rorqual.kernels.entries import from_exponent, scale_bytes, unpack_entries
from rorqual.kernels.gpu import tl, triton, usable
from rorqual.kernels.mode import is_invariant

MULTIPROCESSORS = 132
"""Programs that an H100 or H200 runs at once at these tile sizes: what a pass of few queries is cut up for."""


def reference(
    q_NHd: Tensor,
    new_Nd: Tensor | None,
    ring_RLd: Tensor,
    ring_N: Tensor,
    positions_N: Tensor,
    entries_PEd: Tensor | None,
    table_SB: Tensor | None,
    seq_N: Tensor | None,
    chosen_NK: Tensor | None,
    sink_H: Tensor,
    *,
    window: int,
    ratio: int,
    scale: float,
    rope: int = 0,
) -> Tensor:
    """The definition, a query at a time, fp32 inside. `new_Nd`: the pass's own raw entries, where the ring
    does not hold them yet (`union_prefill`)."""
    if ring_RLd.dtype == torch.uint8:
        dim, kind = q_NHd.shape[2], torch.promote_types(q_NHd.dtype, torch.float32)
        ring_RLd = unpack_entries(ring_RLd, dim, rope, kind)
        new_Nd = unpack_entries(new_Nd, dim, rope, kind) if new_Nd is not None else None
        entries_PEd = unpack_entries(entries_PEd, dim, rope, kind) if entries_PEd is not None else None
    o_NHd, length = torch.zeros_like(q_NHd), ring_RLd.shape[1]
    rings, positions = ring_N.tolist(), positions_N.tolist()
    for n, (ring, position) in enumerate(zip(rings, positions, strict=True)):
        if ring < 0:
            continue
        first = max(0, position - window + 1)
        keys = ring_RLd[ring, torch.arange(first, position + 1, device=q_NHd.device) % length]
        if new_Nd is not None:
            row = n
            while row >= 0 and rings[row] == ring and first <= positions[row] == position - (n - row):
                keys[positions[row] - first] = new_Nd[row]
                row -= 1
        if entries_PEd is not None:
            assert table_SB is not None and seq_N is not None
            entry = torch.arange((position + 1) // ratio, device=q_NHd.device)
            if chosen_NK is not None:
                entry = chosen_NK[n][chosen_NK[n] >= 0].long()
            page = table_SB[seq_N[n]][entry // entries_PEd.shape[1]].long()
            keys = torch.cat((keys, entries_PEd[page, entry % entries_PEd.shape[1]]))
        keys = keys.to(torch.float64 if keys.dtype == torch.float64 else torch.float32)
        logits = torch.cat((q_NHd[n].to(keys.dtype) @ keys.T * scale, sink_H.to(keys.dtype)[:, None]), 1)
        o_NHd[n] = (logits.softmax(1)[:, :-1] @ keys).to(q_NHd.dtype)
    return o_NHd


# ----------------------------------------------------------------------------------------- kernels


@triton.jit
def _values(  # type: ignore[no-untyped-def]
    row, live, d, DIM: tl.constexpr, ROPE: tl.constexpr, SCALES: tl.constexpr, WIDTH: tl.constexpr,
    KEYS: tl.constexpr,
):  # fmt: skip
    """The entries `[KEYS, WIDTH]` in fp32 whose bytes begin at `row` [KEYS]."""
    PLAIN: tl.constexpr = DIM - ROPE
    code = tl.load(row[:, None] + d[None, :], mask=live[:, None] & (d < PLAIN)[None, :], other=0)
    tail = (row + (PLAIN + SCALES)).to(tl.pointer_type(tl.bfloat16))[:, None] + (d - PLAIN)[None, :]
    turned = tl.load(tail, mask=live[:, None] & ((d >= PLAIN) & (d < DIM))[None, :], other=0.0)
    j = tl.arange(0, WIDTH // 64)
    exponent = tl.load(
        row[:, None] + PLAIN + j[None, :], mask=live[:, None] & (j * 64 < PLAIN)[None, :], other=0
    )
    wide = code.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    wide = tl.reshape(wide, [KEYS, WIDTH // 64, 64]) * from_exponent(exponent)[:, :, None]
    return tl.where((d < PLAIN)[None, :], tl.reshape(wide, [KEYS, WIDTH]), turned.to(tl.float32))


@triton.jit(do_not_specialize=["columns"])
def _attend(  # type: ignore[no-untyped-def]
    q,
    new,
    ring_items,
    rings,
    positions,
    entries,
    table,
    seqs,
    starts,
    chosen,
    sink,
    o,
    lse,
    heads,
    columns,
    q_row,
    q_head,
    new_row,
    scale,
    LENGTH: tl.constexpr,
    DIM: tl.constexpr,
    WINDOW: tl.constexpr,
    RATIO: tl.constexpr,
    PAGE: tl.constexpr,
    CHOSEN: tl.constexpr,
    NEW: tl.constexpr,
    ENTRIES: tl.constexpr,
    SINGLE: tl.constexpr,
    ROPE: tl.constexpr,
    SCALES: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Run `program_id(2)` of row n's keys, for HEADS heads. `scale` has log2(e) in it. A single run
    is finished here; of several, `o` [N, H, splits, d] and `lse` (base 2) are joined later. With SCALES rows are
    bytes."""
    n, split, splits = tl.program_id(0), tl.program_id(2), tl.num_programs(2)
    ring = tl.load(rings + n)
    h = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    d = tl.arange(0, WIDTH)
    inside = (h < heads)[:, None] & (d < DIM)[None, :]
    to = (n.to(tl.int64) * heads + h) * splits + split
    if ring < 0:
        if SINGLE:
            zero = tl.zeros([HEADS, WIDTH], o.dtype.element_ty)
            tl.store(o + to[:, None] * DIM + d[None, :], zero, mask=inside)
        return
    position = tl.load(positions + n).to(tl.int32)
    near = tl.minimum(position + 1, WINDOW)
    fresh = 0
    if NEW:
        fresh = tl.minimum(n - tl.load(starts + tl.load(seqs + n)) + 1, near)
    count = near
    if ENTRIES:
        finished = (position + 1) // RATIO
        count += tl.minimum(finished, CHOSEN) if CHOSEN else finished
        table += tl.load(seqs + n).to(tl.int64) * columns
    tiles = tl.cdiv(count, KEYS)
    first, last = tiles * split // splits, tiles * (split + 1) // splits
    ROW: tl.constexpr = DIM + SCALES + ROPE if SCALES else DIM
    queries = tl.load(q + n.to(tl.int64) * q_row + h[:, None] * q_head + d[None, :], mask=inside, other=0.0)
    most = tl.full([HEADS], float("-inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    acc = tl.zeros([HEADS, WIDTH], tl.float32)
    for t in tl.range(first, last, num_stages=STAGES):
        i = t * KEYS + tl.arange(0, KEYS)
        live = i < count
        place = ring.to(tl.int64) * LENGTH + (position - near + 1 + i) % LENGTH
        row = ring_items + place * ROW
        if NEW:
            # The stride of bytes, 584, is no multiple of 16: as an argument it would count as one of 1.
            step = ROW if SCALES else new_row
            row = tl.where(i >= near - fresh, new + (n - near + 1 + i).to(tl.int64) * step, row)
        if ENTRIES:
            far = (i >= near) & live
            entry = i - near
            if CHOSEN:
                entry = tl.load(chosen + n.to(tl.int64) * CHOSEN + entry, mask=far, other=0)
                live = live & (entry >= 0)
                far = far & live
            page = tl.load(table + entry // PAGE, mask=far, other=0)
            row = tl.where(i >= near, entries + (page.to(tl.int64) * PAGE + entry % PAGE) * ROW, row)
        if SCALES:
            kv = _values(row, live, d, DIM, ROPE, SCALES, WIDTH, KEYS).to(queries.dtype)
        else:
            kv = tl.load(row[:, None] + d[None, :], mask=live[:, None] & (d < DIM)[None, :], other=0.0)
        logits = tl.dot(queries, tl.trans(kv), input_precision="ieee") * scale
        logits = tl.where(live[None, :], logits, float("-inf"))
        higher = tl.maximum(most, tl.max(logits, axis=1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weight = tl.exp2(logits - base[:, None])
        shrink = tl.exp2(most - base)
        total = total * shrink + tl.sum(weight, axis=1)
        acc = tl.dot(weight.to(kv.dtype), kv, acc * shrink[:, None], input_precision="ieee")
        most = higher
    if SINGLE:
        logit = tl.load(sink + h, mask=h < heads, other=0.0) * 1.4426950408889634
        top = tl.maximum(most, logit)
        shrink = tl.exp2(most - top)
        acc = acc * (shrink / (total * shrink + tl.exp2(logit - top)))[:, None]
    else:
        acc = acc / tl.where(total > 0, total, 1.0)[:, None]
        tl.store(lse + to, most + tl.log2(tl.where(total > 0, total, 1.0)), mask=h < heads)
    tl.store(o + to[:, None] * DIM + d[None, :], acc.to(o.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["splits"])
def _join(  # type: ignore[no-untyped-def]
    part,
    lse,
    rings,
    sink,
    o,
    heads,
    splits,
    DIM: tl.constexpr,
    POWER: tl.constexpr,
    RUNS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Row n, head h: its runs and the sink in one softmax, for WIDTH channels. RUNS of them at a time."""
    n, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    s, d = tl.arange(0, POWER), tl.program_id(2) * WIDTH + tl.arange(0, WIDTH)
    row = n * heads + h
    there = tl.load(rings + n) >= 0
    reach = tl.load(lse + row * splits + s, mask=(s < splits) & there, other=float("-inf"))
    logit = tl.load(sink + h) * 1.4426950408889634
    top = tl.maximum(tl.max(reach), logit)
    total = tl.sum(tl.exp2(reach - top)) + tl.exp2(logit - top)
    mixed = tl.zeros([WIDTH], tl.float32)
    for start in tl.range(0, splits, RUNS):
        run = start + tl.arange(0, RUNS)
        reached = tl.load(lse + row * splits + run, mask=(run < splits) & there, other=float("-inf"))
        mask = (reached > float("-inf"))[:, None] & (d < DIM)[None, :]
        runs = tl.load(part + (row * splits + run)[:, None] * DIM + d[None, :], mask=mask, other=0.0)
        mixed += tl.sum(runs * (tl.exp2(reached - top) / total)[:, None], axis=0)
    tl.store(o + row * DIM + d, mixed.to(o.dtype.element_ty), mask=d < DIM)


# ------------------------------------------------------------------------------------------ launch


def runs(rows: int, head_blocks: int, keys: int, tile: int) -> int:
    """How many runs a list of at most `keys` keys is cut into: enough programs for the chip, a tile each."""
    return max(1, min(MULTIPROCESSORS // max(1, rows * head_blocks), -(-keys // tile), 64))


def fast(
    q_NHd: Tensor,
    new_Nd: Tensor | None,
    ring_RLd: Tensor,
    ring_N: Tensor,
    positions_N: Tensor,
    entries_PEd: Tensor | None,
    table_SB: Tensor | None,
    seq_N: Tensor | None,
    starts_S1: Tensor | None,
    chosen_NK: Tensor | None,
    sink_H: Tensor,
    *,
    window: int,
    ratio: int,
    scale: float,
    rope: int = 0,
    hopper: bool | None = None,
    splits: int | None = None,
    most_heads: int = 64,
    keys: int | None = None,
    warps: int | None = None,
    stages: int | None = None,
) -> Tensor:
    """The kernels; see `union_decode` and `union_prefill`. `hopper`: the form for Hopper GPUs, or not; the other
    options are those of the plain form, but for `splits`."""
    rows, heads, dim = q_NHd.shape
    o_NHd = torch.empty(rows, heads, dim, dtype=q_NHd.dtype, device=q_NHd.device)
    if not rows:
        return o_NHd
    assert q_NHd.stride(2) == 1 and ring_RLd.is_contiguous()
    if new_Nd is not None and ring_RLd.dtype == torch.uint8:
        assert new_Nd.is_contiguous()
        if new_Nd.data_ptr() % 16:  # as a slice of rows: then they would be read a byte at a time
            new_Nd = new_Nd.clone()
    longest, page = window, 16
    if entries_PEd is not None:
        assert entries_PEd.is_contiguous() and table_SB is not None and seq_N is not None
        assert table_SB.stride(1) == 1
        page = entries_PEd.shape[1]
        longest += table_SB.shape[1] * page if chosen_NK is None else chosen_NK.shape[1]
    if chosen_NK is not None:
        chosen_NK = chosen_NK.contiguous()
    if hopper is None:
        hopper = union_gluon.supported(q_NHd, ring_RLd, new_Nd, entries_PEd, rope=rope)
    block = min(most_heads, max(16, triton.next_power_of_2(heads)))
    block, tile = (union_gluon.HEADS, union_gluon.KEYS) if hopper else (block, keys or 64)
    head_blocks = -(-heads // block)
    whole = (
        new_Nd is not None or is_invariant()
    )  # one run of keys: the order of a sum is then that of the keys
    cut = splits or (1 if whole else runs(rows, head_blocks, longest, tile))
    part, lse = o_NHd, sink_H
    if cut > 1:
        part = torch.empty(rows, heads, cut, dim, dtype=torch.float32, device=q_NHd.device)
        lse = torch.empty(rows, heads, cut, dtype=torch.float32, device=q_NHd.device)
    packed = ring_RLd.dtype == torch.uint8
    width = max(64 if packed else 16, triton.next_power_of_2(dim))
    args = (
        q_NHd, new_Nd, ring_RLd, ring_N, positions_N, entries_PEd, table_SB, seq_N, starts_S1, chosen_NK, sink_H,
        part, lse, heads, table_SB.stride(0) if table_SB is not None else 0, q_NHd.stride(0), q_NHd.stride(1),
        new_Nd.stride(0) if new_Nd is not None else 0, scale * 1.4426950408889634,
    )  # fmt: skip
    constants = {
        "LENGTH": ring_RLd.shape[1], "DIM": dim, "WINDOW": window, "RATIO": max(1, ratio), "PAGE": page,
        "CHOSEN": chosen_NK.shape[1] if chosen_NK is not None else 0, "NEW": new_Nd is not None,
        "ENTRIES": entries_PEd is not None, "SINGLE": cut == 1, "ROPE": rope,
        "SCALES": scale_bytes(dim - rope) if packed else 0,
    }  # fmt: skip
    grid = rows, head_blocks, cut
    if hopper:
        union_gluon.attend(grid, *args, **constants)
    else:
        _attend[grid](
            *args, **constants, HEADS=block, WIDTH=width, KEYS=tile, STAGES=stages or 2, num_warps=warps or 8
        )
    if cut > 1:
        _join[(rows, heads, -(-dim // 128))](
            part, lse, ring_N, sink_H, o_NHd, heads, cut, DIM=dim, POWER=triton.next_power_of_2(cut),
            RUNS=min(16, triton.next_power_of_2(cut)), WIDTH=min(128, width), num_warps=4,
        )  # fmt: skip
    return o_NHd


def _usable(*tensors: Tensor | None) -> bool:
    there = [t for t in tensors if t is not None]
    return usable(*there) and all(t.dtype != torch.float64 for t in there) and there[0].shape[-1] <= 512


def union_decode(
    q_NHd: Tensor,
    ring_RLd: Tensor,
    ring_N: Tensor,
    positions_N: Tensor,
    entries_PEd: Tensor | None,
    table_SB: Tensor | None,
    seq_N: Tensor | None,
    chosen_NK: Tensor | None,
    sink_H: Tensor,
    *,
    window: int,
    ratio: int,
    scale: float,
    rope: int = 0,
) -> Tensor:
    """Attention `[N, H, d]` of queries whose own entries are in their rings already.

    Query n stands at `positions_N[n]` of ring slot `ring_N[n]` (negative: padding, gives zeros) and sees the
    last `window` positions, its own among them. Compressed entries: none (`entries_PEd` None); those of index
    below (position + 1) // ratio in the pages of row `seq_N[n]` of `table_SB`; or of these the ones in `chosen_NK`
    (int32, no index twice, -1 only behind them). `sink_H` fp32. A ring has L >= window + the tokens of one
    sequence in a pass - 1 places. Rings and pages are of q's type, or both bytes (uint8, `entries.entry_bytes` an
    entry) with `rope` rotary channels.
    """
    if _usable(q_NHd, ring_RLd, ring_N, positions_N, entries_PEd, table_SB, seq_N, chosen_NK, sink_H):
        return fast(
            q_NHd, None, ring_RLd, ring_N, positions_N, entries_PEd, table_SB, seq_N, None, chosen_NK, sink_H,
            window=window, ratio=ratio, scale=scale, rope=rope,
        )  # fmt: skip
    return reference(
        q_NHd, None, ring_RLd, ring_N, positions_N, entries_PEd, table_SB, seq_N, chosen_NK, sink_H,
        window=window, ratio=ratio, scale=scale, rope=rope,
    )  # fmt: skip


def union_prefill(
    q_NHd: Tensor,
    new_Nd: Tensor,
    ring_RLd: Tensor,
    ring_N: Tensor,
    positions_N: Tensor,
    entries_PEd: Tensor | None,
    table_SB: Tensor | None,
    seq_N: Tensor,
    starts_S1: Tensor,
    chosen_NK: Tensor | None,
    sink_H: Tensor,
    *,
    window: int,
    ratio: int,
    scale: float,
    rope: int = 0,
) -> Tensor:
    """The same for chunks: the rows of sequence s are `starts_S1[s]` to `starts_S1[s + 1]`, at consecutive
    positions; their raw entries are `new_Nd` (of the ring's type), and the ring still holds those before the chunk."""
    if _usable(q_NHd, new_Nd, ring_RLd, ring_N, positions_N, entries_PEd, table_SB, chosen_NK, sink_H):
        return fast(
            q_NHd, new_Nd, ring_RLd, ring_N, positions_N, entries_PEd, table_SB, seq_N, starts_S1, chosen_NK, sink_H,
            window=window, ratio=ratio, scale=scale, rope=rope,
        )  # fmt: skip
    return reference(
        q_NHd, new_Nd, ring_RLd, ring_N, positions_N, entries_PEd, table_SB, seq_N, chosen_NK, sink_H,
        window=window, ratio=ratio, scale=scale, rope=rope,
    )  # fmt: skip
