"""V4's compressor: many tokens pooled into one cache entry (V4 report section 2.3, facts 3.9).

The projections and gates of the newest tokens lie in fp32 rings, one slot a sequence: the item of position p of
slot r at `[r, p % L]`. When a window of `ratio` tokens is complete, a softmax over its gates (with overlap also
over those of the window before), separately for each channel, weighs its projections; the sum is normalised,
its last channels are rotated, and it is written as one entry. Tokens of one sequence stand in consecutive rows
with consecutive positions, so a row's forerunners of this pass are found by counting rows back; older ones are
in the ring. Pages of bytes take entries and index keys in the released layout (`entries`).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rorqual.kernels.entries import (
    entry_bytes,
    key_bytes,
    pack_entries_reference,
    pack_keys,
    scale_bytes,
    store_entry,
    store_key,
)
from rorqual.kernels.gpu import tl, triton, usable
from rorqual.kernels.mode import is_invariant

ROLLBACK = 16
"""Tokens of one sequence that `compress_decode` may bring: a ring holds this many more than a window needs."""

TILE = 2**13
"""Numbers of a window that a program reads at a time."""


def reference(
    kv_NW: Tensor,
    gate_NW: Tensor,
    ape: Tensor,
    ring_kv: Tensor,
    ring_gate: Tensor,
    ring_N: Tensor,
    positions_N: Tensor,
    norm_weight: Tensor,
    eps: float,
    cos_Nr: Tensor,
    sin_Nr: Tensor,
    entry_pages_PEd: Tensor,
    entry_slots_N: Tensor,
    *,
    ratio: int,
    overlap: bool,
    dim: int,
) -> None:
    """The definition, a token at a time: first all of a token's window is read, then its ring place written."""
    entries, length = entry_pages_PEd.flatten(0, 1), ring_kv.shape[1]
    kept = norm_weight.dtype if entries.dtype == torch.uint8 else entries.dtype
    for n, (ring, position) in enumerate(zip(ring_N.tolist(), positions_N.tolist(), strict=True)):
        if ring < 0:
            continue
        ring_kv[ring, position % length] = kv_NW[n].to(ring_kv.dtype)
        ring_gate[ring, position % length] = (gate_NW[n] + ape[position % ratio]).to(ring_gate.dtype)
        slot = int(entry_slots_N[n])
        if (position + 1) % ratio or slot < 0:
            continue
        old = max(0, position + 1 - (2 * ratio if overlap else ratio))
        at = torch.arange(old, position + 1, device=kv_NW.device) % length
        kv, gate = ring_kv[ring, at], ring_gate[ring, at]
        if overlap:  # a token's first half belongs to the next window's entry, its second to its own
            kv, gate = (torch.cat((z[:-ratio, :dim], z[-ratio:, dim:])) for z in (kv, gate))
        pooled = (kv * gate.softmax(0)).sum(0).to(kept)
        entry = F.rms_norm(pooled, (dim,), norm_weight.to(pooled.dtype), eps)
        entry = _rotate_tail(entry, cos_Nr[n], sin_Nr[n])
        if form(entry_pages_PEd, dim, 2 * cos_Nr.shape[1]) == ENTRY:
            entry = pack_entries_reference(entry[None], 2 * cos_Nr.shape[1])[0]
        elif form(entry_pages_PEd, dim, 2 * cos_Nr.shape[1]) == KEY:
            entry = pack_keys(entry[None])[0]
        entries[slot] = entry


PLAIN, ENTRY, KEY = 0, 1, 2
"""What pages hold: entries in the model's type, or the bytes of entries or of index keys."""


def form(pages: Tensor, dim: int, rope: int) -> int:
    """Which of these it is, by the pages' width. Raises ValueError for widths of none."""
    widths = {entry_bytes(dim, rope): ENTRY, key_bytes(dim): KEY}
    if pages.dtype != torch.uint8:
        widths = {dim: PLAIN}
    if pages.shape[2] not in widths:
        raise ValueError(f"pages of {pages.shape[2]} an item hold no entries of {dim} channels")
    return widths[pages.shape[2]]


def _rotate_tail(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The last channels turned in pairs (2i, 2i + 1)."""
    still, moving = x.split((x.shape[-1] - 2 * cos.shape[-1], 2 * cos.shape[-1]), -1)
    a, b = moving.to(cos.dtype).unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)
    return torch.cat((still, turned.to(x.dtype)), -1)


# ----------------------------------------------------------------------------------------- kernels


@triton.jit
def _add(g, x, most, total, pooled):  # type: ignore[no-untyped-def]
    """A few more slots into a running softmax over slots, by channel."""
    higher = tl.maximum(most, tl.max(g, axis=0))
    base = tl.where(higher == float("-inf"), 0.0, higher)  # nothing there yet, or channels of padding
    weight = tl.exp(g - base[None, :])
    shrink = tl.exp(most - base)
    return higher, total * shrink + tl.sum(weight, axis=0), pooled * shrink + tl.sum(weight * x, axis=0)


@triton.jit
def _pool(  # type: ignore[no-untyped-def]
    kv,
    gate,
    ape,
    ring_kv,
    ring_gate,
    rings,
    positions,
    norm_weight,
    cos,
    sin,
    entries,
    tails,
    slots,
    turned,
    eps,
    kv_row,
    gate_row,
    LENGTH: tl.constexpr,
    RATIO: tl.constexpr,
    OVERLAP: tl.constexpr,
    DIM: tl.constexpr,
    CHANNELS: tl.constexpr,
    SLOTS: tl.constexpr,
    POWER: tl.constexpr,
    STAGES: tl.constexpr,
    WRITE: tl.constexpr,
    FORM: tl.constexpr,
    ROW: tl.constexpr,
    ROPE: tl.constexpr,
    SCALES: tl.constexpr,
    LOG: tl.constexpr,
    ROOT: tl.constexpr,
    FIXED: tl.constexpr,
):
    """Row n's token into its ring (if WRITE), and the entry of the window that it completes. With FIXED the slots are
    added up in the same groups whichever of them this pass brings."""
    n = tl.program_id(0)
    ring = tl.load(rings + n)
    if ring < 0:
        return
    position = tl.load(positions + n).to(tl.int32)
    c = tl.arange(0, CHANNELS)
    WIDTH: tl.constexpr = 2 * DIM if OVERLAP else DIM
    if WRITE:
        to = (ring.to(tl.int64) * LENGTH + position % LENGTH) * WIDTH
        for part in tl.static_range(WIDTH // DIM):
            own = part * DIM + c
            new = tl.load(kv + n.to(tl.int64) * kv_row + own, mask=c < DIM)
            tl.store(ring_kv + to + own, new, mask=c < DIM)
            new = tl.load(gate + n.to(tl.int64) * gate_row + own, mask=c < DIM)
            new += tl.load(ape + (position % RATIO) * WIDTH + own, mask=c < DIM)
            tl.store(ring_gate + to + own, new, mask=c < DIM)
    slot = tl.load(slots + n).to(tl.int64)
    if ((position + 1) % RATIO != 0) | (slot < 0):
        return
    WINDOW: tl.constexpr = 2 * RATIO if OVERLAP else RATIO
    back = tl.arange(0, POWER)  # rows before this one, and tokens before this one
    mask = (back < WINDOW) & (back <= n) & (back <= position)
    mine = tl.load(rings + n - back, mask=mask, other=-1) == ring
    mine = mine & (tl.load(positions + n - back, mask=mask, other=-1) == position - back)
    fresh = tl.sum(mine.to(tl.int32))
    present = tl.minimum(WINDOW, position + 1)
    most = tl.full([CHANNELS], float("-inf"), tl.float32)
    total, pooled = tl.zeros([CHANNELS], tl.float32), tl.zeros([CHANNELS], tl.float32)
    live = (c < DIM)[None, :]
    begin, between = WINDOW - present, WINDOW - fresh
    if FIXED:
        begin, between = WINDOW, WINDOW
        for start in tl.range(0, WINDOW, SLOTS):
            slot_of = start + tl.arange(0, SLOTS)
            half = slot_of * 0
            if OVERLAP:
                half = tl.where(slot_of < RATIO, 0, DIM)
            held = (slot_of >= WINDOW - present) & (slot_of < WINDOW)
            brought = held & (slot_of >= WINDOW - fresh)
            held = held & (slot_of < WINDOW - fresh)
            old = tl.maximum(position - WINDOW + 1 + slot_of, 0) % LENGTH
            at = (ring.to(tl.int64) * LENGTH + old) * WIDTH + half
            row = (n - WINDOW + 1 + slot_of).to(tl.int64)
            bias = (slot_of % RATIO) * WIDTH + half
            there, fits = live & held[:, None], live & brought[:, None]
            g = tl.load(gate + (row * gate_row + half)[:, None] + c[None, :], mask=fits, other=float("-inf"))
            g += tl.load(ape + bias[:, None] + c[None, :], mask=fits, other=0.0)
            x = tl.load(kv + (row * kv_row + half)[:, None] + c[None, :], mask=fits, other=0.0)
            kept = tl.load(ring_gate + at[:, None] + c[None, :], mask=there, other=float("-inf"))
            g = tl.where(there, kept, g)
            x = tl.where(there, tl.load(ring_kv + at[:, None] + c[None, :], mask=there, other=0.0), x)
            most, total, pooled = _add(g, x, most, total, pooled)
    for start in tl.range(begin, between, SLOTS, num_stages=STAGES):  # tokens of earlier passes
        slot_of = start + tl.arange(0, SLOTS)
        old = position - WINDOW + 1 + slot_of
        at = (ring.to(tl.int64) * LENGTH + old % LENGTH) * WIDTH
        if OVERLAP:
            at += tl.where(slot_of < RATIO, 0, DIM)
        there = live & (slot_of < WINDOW - fresh)[:, None]
        g = tl.load(ring_gate + at[:, None] + c[None, :], mask=there, other=float("-inf"))
        x = tl.load(ring_kv + at[:, None] + c[None, :], mask=there, other=0.0)
        most, total, pooled = _add(g, x, most, total, pooled)
    for start in tl.range(between, WINDOW, SLOTS):  # and of this one
        slot_of = start + tl.arange(0, SLOTS)
        row = (n - WINDOW + 1 + slot_of).to(tl.int64)
        half = slot_of * 0
        if OVERLAP:
            half = tl.where(slot_of < RATIO, 0, DIM)
        there = live & (slot_of < WINDOW)[:, None]
        g = tl.load(gate + (row * gate_row + half)[:, None] + c[None, :], mask=there, other=float("-inf"))
        bias = (slot_of % RATIO) * WIDTH + half  # a window begins at a multiple of the ratio
        g += tl.load(ape + bias[:, None] + c[None, :], mask=there, other=0.0)
        x = tl.load(kv + (row * kv_row + half)[:, None] + c[None, :], mask=there, other=0.0)
        most, total, pooled = _add(g, x, most, total, pooled)
    entry = tl.where(c < DIM, pooled / tl.where(total > 0, total, 1.0), 0.0)
    kind = norm_weight.dtype.element_ty if FORM else entries.dtype.element_ty
    entry = entry.to(kind).to(tl.float32)
    scale = tl.load(norm_weight + c, mask=c < DIM, other=0.0).to(kind).to(tl.float32)
    entry = entry * tl.rsqrt(tl.sum(entry * entry) / DIM + eps) * scale
    entry = entry.to(kind).to(tl.float32)
    a, b = tl.split(tl.reshape(entry, [CHANNELS // 2, 2]))
    pair = tl.arange(0, CHANNELS // 2) - (DIM // 2 - turned)
    turns = (pair >= 0) & (pair < turned)
    co = tl.load(cos + n * turned + pair, mask=turns, other=1.0)
    si = tl.load(sin + n * turned + pair, mask=turns, other=0.0)
    entry = tl.reshape(tl.join(a * co - b * si, a * si + b * co), [CHANNELS])
    place = slot * ROW
    if FORM == 1:
        entry = entry.to(kind).to(tl.float32)
        store_entry(entry, entries + place, tails + place // 2, True, DIM - ROPE, ROPE, SCALES, CHANNELS)
    elif FORM == 2:
        store_key(entry.to(kind).to(tl.float32), entries + place, CHANNELS, LOG, ROOT, kind)
    else:
        tl.store(entries + place + c, entry.to(kind), mask=c < DIM)


@triton.jit(do_not_specialize=["rows"])
def _keep(  # type: ignore[no-untyped-def]
    kv,
    gate,
    ape,
    ring_kv,
    ring_gate,
    rings,
    positions,
    rows,
    kv_row,
    gate_row,
    LENGTH: tl.constexpr,
    RATIO: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Row n's token into its ring, unless a later row of this pass belongs in the same place."""
    n = tl.program_id(0)
    ring = tl.load(rings + n)
    if ring < 0:
        return
    position = tl.load(positions + n).to(tl.int32)
    later = n + LENGTH
    if tl.load(rings + later, mask=later < rows, other=-1) == ring:
        return
    c = tl.arange(0, CHANNELS)
    to = (ring.to(tl.int64) * LENGTH + position % LENGTH) * WIDTH + c
    new = tl.load(kv + n.to(tl.int64) * kv_row + c, mask=c < WIDTH)
    tl.store(ring_kv + to, new, mask=c < WIDTH)
    new = tl.load(gate + n.to(tl.int64) * gate_row + c, mask=c < WIDTH)
    new += tl.load(ape + (position % RATIO) * WIDTH + c, mask=c < WIDTH)
    tl.store(ring_gate + to, new, mask=c < WIDTH)


# ------------------------------------------------------------------------------------------ launch


def fast(
    kv_NW: Tensor,
    gate_NW: Tensor,
    ape: Tensor,
    ring_kv: Tensor,
    ring_gate: Tensor,
    ring_N: Tensor,
    positions_N: Tensor,
    norm_weight: Tensor,
    eps: float,
    cos_Nr: Tensor,
    sin_Nr: Tensor,
    entry_pages_PEd: Tensor,
    entry_slots_N: Tensor,
    *,
    ratio: int,
    overlap: bool,
    dim: int,
    long: bool = False,
) -> None:
    """The kernels: one launch, or two where a sequence may bring more than `ROLLBACK` tokens (`long`)."""
    rows, width = kv_NW.shape
    if not rows:
        return
    length, window = ring_kv.shape[1], 2 * ratio if overlap else ratio
    assert length >= window + ROLLBACK and width == (2 * dim if overlap else dim)
    assert ring_kv.is_contiguous() and ring_gate.is_contiguous() and entry_pages_PEd.is_contiguous()
    assert (
        kv_NW.stride(1) == 1 and gate_NW.stride(1) == 1 and cos_Nr.is_contiguous() and sin_Nr.is_contiguous()
    )
    channels = triton.next_power_of_2(dim)
    power = triton.next_power_of_2(window)
    slots = min(power, max(1, TILE // channels))
    rope = 2 * cos_Nr.shape[1]
    what = form(entry_pages_PEd, dim, rope)
    assert what != KEY or channels == dim
    if what == ENTRY:
        channels = max(64, channels)
    fixed = is_invariant()
    _pool[(rows,)](
        kv_NW, gate_NW, ape, ring_kv, ring_gate, ring_N, positions_N, norm_weight, cos_Nr, sin_Nr,
        entry_pages_PEd, entry_pages_PEd.view(torch.bfloat16) if what == ENTRY else entry_pages_PEd, entry_slots_N,
        cos_Nr.shape[1], eps, kv_NW.stride(0), gate_NW.stride(0),
        LENGTH=length, RATIO=ratio, OVERLAP=overlap, DIM=dim, CHANNELS=channels, SLOTS=slots, POWER=power,
        STAGES=1 if long or fixed or power <= slots else 3, WRITE=not long, FIXED=fixed, FORM=what,
        ROW=entry_pages_PEd.shape[2], ROPE=rope, SCALES=scale_bytes(dim - rope), LOG=channels.bit_length() - 1,
        ROOT=dim**-0.5,
        num_warps=8 if power > slots else 4,
    )  # fmt: skip
    if long:
        _keep[(rows,)](
            kv_NW, gate_NW, ape, ring_kv, ring_gate, ring_N, positions_N, rows,
            kv_NW.stride(0), gate_NW.stride(0), LENGTH=length, RATIO=ratio, WIDTH=width,
            CHANNELS=triton.next_power_of_2(width), num_warps=4,
        )  # fmt: skip


def _op(*args: Any, long: bool, **kwargs: Any) -> None:
    tensors = [a for a in args if isinstance(a, Tensor)]
    if usable(*tensors) and all(a.dtype != torch.float64 for a in tensors):
        fast(*args, long=long, **kwargs)
    else:
        reference(*args, **kwargs)


def compress_decode(
    kv_NW: Tensor,
    gate_NW: Tensor,
    ape: Tensor,
    ring_kv: Tensor,
    ring_gate: Tensor,
    ring_N: Tensor,
    positions_N: Tensor,
    norm_weight: Tensor,
    eps: float,
    cos_Nr: Tensor,
    sin_Nr: Tensor,
    entry_pages_PEd: Tensor,
    entry_slots_N: Tensor,
    *,
    ratio: int,
    overlap: bool,
    dim: int,
) -> None:
    """Take in a few tokens a sequence (at most `ROLLBACK`) and write the entries that they complete.

    fp32 projections and gates `[N, W]` (W = 2 * dim with overlap, else dim), `ape` `[ratio, W]`, rings
    `[R, L, W]` with L >= kept tokens + `ROLLBACK`. Row n is the token at `positions_N[n]` of ring slot
    `ring_N[n]` (negative: padding, nothing happens); rows of one sequence are consecutive, ascending. If
    (position + 1) % ratio == 0, the entry goes to flat slot `entry_slots_N[n]` of `entry_pages_PEd` (negative:
    nowhere), rotated by `cos_Nr[n]`, `sin_Nr[n]`, those of position ratio * (position // ratio). Pages are in the
    model's type, or bytes `[P, E, entry_bytes]` or (index keys) `[P, E, key_bytes]`: see `entries`.
    """
    _op(
        kv_NW, gate_NW, ape, ring_kv, ring_gate, ring_N, positions_N, norm_weight, eps, cos_Nr, sin_Nr,
        entry_pages_PEd, entry_slots_N, ratio=ratio, overlap=overlap, dim=dim, long=False,
    )  # fmt: skip


def compress_prefill(
    kv_NW: Tensor,
    gate_NW: Tensor,
    ape: Tensor,
    ring_kv: Tensor,
    ring_gate: Tensor,
    ring_N: Tensor,
    positions_N: Tensor,
    norm_weight: Tensor,
    eps: float,
    cos_Nr: Tensor,
    sin_Nr: Tensor,
    entry_pages_PEd: Tensor,
    entry_slots_N: Tensor,
    *,
    ratio: int,
    overlap: bool,
    dim: int,
) -> None:
    """The same for chunks of any length: all windows that complete are pooled, reading older tokens from the
    rings, before the rings take in the chunk's last L tokens."""
    _op(
        kv_NW, gate_NW, ape, ring_kv, ring_gate, ring_N, positions_N, norm_weight, eps, cos_Nr, sin_Nr,
        entry_pages_PEd, entry_slots_N, ratio=ratio, overlap=overlap, dim=dim, long=True,
    )  # fmt: skip
