"""A whole draw in two to four launches: the same tokens as `draws.uniforms`, `filtered` and `pick` would give, but
for the last bits of exp.

A row is cut into parts of the vocabulary, one program each: their peaks (launch 1), the weights of what is
likely enough (launch 2, if any row is drawn at random) and, where rows have filters, a list of the few
tokens that can pass them (launch 3). Then one program a row settles the token and, if asked, tells the
sampler's tables of it. Penalties and grammars' bitmasks are applied wherever logits are read.

Sums are of whole numbers here too (a weight is e^x, x <= 0, in multiples of 2^-44), so a row's token depends
on nothing but the row: not on how many parts it is cut into, nor on other rows.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rorqual.engine.fused_list import _from_list, _goal
from rorqual.engine.fused_parts import _crown, _list, _peaks, _shaped, _weigh, _weight
from rorqual.kernels.fuse import chained
from rorqual.kernels.gpu import tl, triton, usable


class Tables(NamedTuple):
    """The sampler's tables on the device, one line a slot. `knobs_SK`: greedy, temperature, top-k, top-p, min-p,
    filtered, repetition, presence and frequency penalty. `line_S` names the line of `count_LV` (int32) and
    `prompt_LV` (bool) that holds the tokens a slot has seen."""

    knobs_SK: Tensor
    key_S: Tensor
    drawn_S: Tensor
    unsound_S: Tensor
    newest_S: Tensor
    line_S: Tensor
    count_LV: Tensor
    prompt_LV: Tensor


@triton.jit
def _from_parts(  # type: ignore[no-untyped-def]
    logits, stride, row, slot, bits, words, knobs, line_S, count, prompt, sums, key, drawn, stream, most,
    vocab: tl.constexpr, KNOBS: tl.constexpr, MASK: tl.constexpr, PENAL: tl.constexpr, PART: tl.constexpr,
    PARTS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The token of a row without filters: first the part it falls in, then the place."""
    p = tl.arange(0, WIDE)
    part_sums = tl.load(sums + row * PARTS + p, mask=p < PARTS, other=0)
    mass = tl.sum(part_sums, 0)
    goal = _goal(key, drawn, slot, stream, mass)
    part = tl.minimum(tl.sum((tl.cumsum(part_sums, 0) <= goal).to(tl.int32), 0), PARTS - 1)
    goal -= tl.sum(tl.where(p < part, part_sums, 0), 0)
    o = part * PART + tl.arange(0, PART)
    x = _shaped(
        logits, stride, row, o, bits, words, knobs, slot, line_S, count, prompt, vocab, KNOBS, MASK, PENAL
    )
    weight = _weight(tl.exp((x - most) / tl.load(knobs + slot * KNOBS + 1).to(tl.float32)))
    token = part * PART + tl.sum((tl.cumsum(weight, 0) <= goal).to(tl.int32), 0)
    return tl.minimum(token, tl.max(tl.where(weight > 0, o, 0), 0)), mass


@triton.jit(do_not_specialize=["words", "stream", "rows"])
def _settle(  # type: ignore[no-untyped-def]
    logits, stride, slots, bits, words, knobs, line_S, count, prompt, peak, place, sums, found, list_e, list_id,
    key, drawn, unsound, newest, told, out, bounds, stream, rows,
    vocab: tl.constexpr, KNOBS: tl.constexpr, MASK: tl.constexpr, PENAL: tl.constexpr, PART: tl.constexpr,
    PARTS: tl.constexpr, WIDE: tl.constexpr, RANDOM: tl.constexpr, FILTER: tl.constexpr, SAW: tl.constexpr,
    TOLD: tl.constexpr, COUNT: tl.constexpr, BOUNDS: tl.constexpr, BLOCK: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Each row's token, and what the tables are to know of it; with `BOUNDS` also what `_spread` needs."""
    if CHAINED:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    most, token, spoilt = _crown(peak, place, row, PARTS, WIDE)
    least, last, mass = token * 0 - 1, token * 0 - 1, row * 0
    if RANDOM:  # noqa: SIM102
        if (tl.load(knobs + slot * KNOBS) == 0) & (spoilt == 0):
            listed = tl.load(knobs + slot * KNOBS + 5) > 0
            if FILTER and listed:
                p = tl.arange(0, WIDE)
                mass = tl.sum(tl.load(sums + row * PARTS + p, mask=p < PARTS, other=0), 0)
                end = tl.sum(tl.load(found + row * PARTS + p, mask=p < PARTS, other=0), 0)
                token, least, last, mass = _from_list(
                    knobs, key, drawn, slot, stream, mass, end, list_e + row * vocab, list_id + row * vocab,
                    vocab, KNOBS, BLOCK,
                )  # fmt: skip
            else:
                token, mass = _from_parts(
                    logits, stride, row, slot, bits, words, knobs, line_S, count, prompt, sums, key, drawn, stream,
                    most, vocab, KNOBS, MASK, PENAL, PART, PARTS, WIDE,
                )  # fmt: skip
    if BOUNDS:  # where all is on one token, the mass is 0 and that token stands in place of the last
        last = tl.where(mass > 0, last, token)
        tl.store(bounds + row * 4 + 0, least.to(tl.int64))
        tl.store(bounds + row * 4 + 1, last.to(tl.int64))
        tl.store(bounds + row * 4 + 2, mass)
    new = spoilt.to(tl.int64)
    tl.store(out + row, token.to(tl.int64))
    tl.store(out + rows + row, tl.atomic_add(unsound + slot, new) + new)
    if SAW:
        one = tl.load(told + row).to(tl.int64) if TOLD else row * 0 + 1
        tl.atomic_add(drawn + slot, one)
        if one > 0:
            tl.store(newest + slot, token.to(tl.int64))
        if COUNT:
            line = tl.load(line_S + slot)
            if line > 0:
                tl.atomic_add(count + line * vocab + token, one.to(tl.int32))


@triton.jit(do_not_specialize=["words"])
def _spread(  # type: ignore[no-untyped-def]
    logits, stride, slots, bits, words, knobs, line_S, count, prompt, peak, place, bounds, p_out,
    vocab: tl.constexpr, KNOBS: tl.constexpr, MASK: tl.constexpr, PENAL: tl.constexpr, PART: tl.constexpr,
    PARTS: tl.constexpr, WIDE: tl.constexpr, BY_SLOT: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """The distribution that each row was drawn from, summing to one."""
    if CHAINED:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slots + row)
    most, _, _ = _crown(peak, place, row, PARTS, WIDE)
    least, last = tl.load(bounds + row * 4), tl.load(bounds + row * 4 + 1)
    mass = tl.load(bounds + row * 4 + 2)
    o = part * PART + tl.arange(0, PART)
    x = _shaped(
        logits, stride, row, o, bits, words, knobs, slot, line_S, count, prompt, vocab, KNOBS, MASK, PENAL
    )
    e = tl.exp((x - most) / tl.load(knobs + slot * KNOBS + 1).to(tl.float32))
    level = e.to(tl.int32, bitcast=True)
    stays = (level > least) | ((level == least) & (o <= last))
    p = tl.where(stays, _weight(e).to(tl.float32) / tl.maximum(mass, 1).to(tl.float32), 0.0)
    p = tl.where(mass > 0, p, (o == last).to(tl.float32))
    line = slot if BY_SLOT else row
    tl.store(p_out + line * vocab + o, p, mask=o < vocab)


def draw(
    logits_RV: Tensor,
    slots_R: Tensor,
    tables: Tables,
    *,
    random: bool = True,
    filters: bool = True,
    bits_RW: Tensor | None = None,
    penalties: bool = False,
    counts: bool = False,
    stream: int = 0,
    saw: bool = False,
    told_R: Tensor | None = None,
    p_RV: Tensor | None = None,
    p_SV: Tensor | None = None,
    part: int = 4096,
    block: int = 2048,
    warps: int = 8,
) -> Tensor:
    """One token of each row, and how often its slot has had unsound logits: int64 [2, R].

    Without `random` every row is greedy; without `filters` none has top-k, top-p or min-p; without `penalties`
    none has any. `bits_RW`: a grammar's bitmask, as of `draws.apply_bitmask`. `saw`: the tables are told of
    the tokens (`drawn_S`, `newest_S`, `count_LV`), of those alone where `told_R` is true if it is given; slots
    must then differ. `p_RV`, or `p_SV` by slots: gets the distribution that each row was drawn from. `part`:
    tokens a program, and `block` of its list at a time; neither changes a token.
    """
    rows, vocab = logits_RV.shape
    if logits_RV.stride(1) != 1:
        logits_RV = logits_RV.contiguous()
    parts = triton.cdiv(vocab, part)
    sub = max(1, part // 256) if filters and random else 0

    def room(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=logits_RV.device)

    peak, place = room(rows, parts), room(rows, parts, dtype=torch.int32)
    peaks = found = rough = list_e = list_id = place
    out = sums = room(2, rows, dtype=torch.int64)
    if random:
        sums = room(rows, parts, dtype=torch.int64)
    if random and filters:
        peaks, found = room(rows, parts, sub), room(rows, parts, dtype=torch.int32)
        rough, list_e = room(rows, vocab), room(rows, vocab)
        list_id = room(rows, vocab, dtype=torch.int32)
    bits, words = (bits_RW, bits_RW.shape[1]) if bits_RW is not None else (place, 0)
    head = (
        logits_RV, logits_RV.stride(0), slots_R, bits, words, tables.knobs_SK, tables.line_S, tables.count_LV,
        tables.prompt_LV.view(torch.uint8), peak, place,
    )  # fmt: skip
    like: dict[str, Any] = {"vocab": vocab, "KNOBS": tables.knobs_SK.shape[1], "PART": part}
    like |= {"MASK": bits_RW is not None, "PENAL": penalties}
    spread = {"num_warps": max(1, min(8, part // 256)), **chained(logits_RV, rows * parts)}
    _peaks[rows, parts](*head, peaks, **like, SUB=sub, **spread)
    shape = {"PARTS": parts, "WIDE": triton.next_power_of_2(parts)}
    filters = filters and random
    if random:
        _weigh[rows, parts](
            *head, peaks, sums, found, rough, **like, **shape, SUB=sub, FILTER=filters, **spread
        )
    if filters:
        _list[rows, parts](found, rough, list_e, list_id, vocab=vocab, PART=part, **shape, **spread)
    spreads = p_RV if p_RV is not None else p_SV
    bounds = room(rows, 4, dtype=torch.int64) if spreads is not None else None
    _settle[rows,](
        *head, sums, found, list_e, list_id, tables.key_S, tables.drawn_S, tables.unsound_S, tables.newest_S,
        told_R.view(torch.uint8) if told_R is not None else out, out, bounds, stream, rows,
        **like, **shape, RANDOM=random, FILTER=filters, SAW=saw, TOLD=told_R is not None,
        COUNT=penalties or counts, BOUNDS=bounds is not None, BLOCK=block,
        num_warps=warps if random else 4, **chained(logits_RV, rows),
    )  # fmt: skip
    if spreads is not None:
        _spread[rows, parts](*head, bounds, spreads, **like, **shape, BY_SLOT=p_RV is None, **spread)
    return out


def supported(logits_RV: Tensor) -> bool:
    """Whether `draw` can run here: weights of more than 2^18 tokens could overflow."""
    return usable(logits_RV) and 0 < logits_RV.shape[1] <= 2**18 and len(logits_RV) > 0
