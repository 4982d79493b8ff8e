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
def _uniform(key, place):  # type: ignore[no-untyped-def]
    x = key.to(tl.uint64) + place.to(tl.uint64) * 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return ((x ^ (x >> 31)) >> 11).to(tl.int64).to(tl.float64) * 1.1102230246251565e-16


@triton.jit
def _weight(e):  # type: ignore[no-untyped-def]
    return (e * 17592186044416.0).to(tl.int64)


@triton.jit
def _shaped(  # type: ignore[no-untyped-def]
    logits, stride, row, o, bits, words, knobs, slot, line_S, count, prompt,
    vocab: tl.constexpr, KNOBS: tl.constexpr, MASK: tl.constexpr, PENAL: tl.constexpr,
):  # fmt: skip
    """Logits of tokens `o` with penalties and mask, -inf past the vocabulary."""
    real = o < vocab
    x = tl.load(logits + row * stride + o, mask=real, other=-float("inf")).to(tl.float32)
    if PENAL:
        line = tl.load(line_S + slot) * vocab
        times = tl.load(count + line + o, mask=real, other=0).to(tl.float32)
        old = tl.load(prompt + line + o, mask=real, other=0).to(tl.int32)
        repeat = tl.load(knobs + slot * KNOBS + 6).to(tl.float32)
        presence = tl.load(knobs + slot * KNOBS + 7).to(tl.float32)
        frequency = tl.load(knobs + slot * KNOBS + 8).to(tl.float32)
        x = tl.where((old != 0) | (times > 0), tl.where(x > 0, x / repeat, x * repeat), x)
        x = x - tl.where(times > 0, presence, 0.0) - frequency * times
    if MASK:
        word = tl.load(bits + row * words + o // 32, mask=real & (o // 32 < words), other=0)
        x = tl.where(((word >> (o % 32)) & 1) != 0, x, -float("inf"))
    return x


@triton.jit(do_not_specialize=["words"])
def _peaks(  # type: ignore[no-untyped-def]
    logits, stride, slots, bits, words, knobs, line_S, count, prompt, peak, place, peaks,
    vocab: tl.constexpr, KNOBS: tl.constexpr, PART: tl.constexpr, MASK: tl.constexpr, PENAL: tl.constexpr,
    SUB: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Each part's greatest logit and its first token, -1 for that if there is NaN; and `SUB` lesser peaks of it."""
    if CHAINED:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o = part * PART + tl.arange(0, PART)
    slot = tl.load(slots + row)
    x = _shaped(
        logits, stride, row, o, bits, words, knobs, slot, line_S, count, prompt, vocab, KNOBS, MASK, PENAL
    )
    bad = tl.sum((x != x).to(tl.int32), 0) > 0
    x = tl.where(x != x, -float("inf"), x)
    best = tl.max(x, 0)
    first = tl.min(tl.where(x == best, o, vocab), 0)
    here = row * tl.num_programs(1) + part
    tl.store(peak + here, best)
    tl.store(place + here, tl.where(bad, -1, first))
    if SUB:
        tl.store(peaks + here * SUB + tl.arange(0, SUB), tl.max(tl.reshape(x, [SUB, PART // SUB]), 1))


@triton.jit
def _crown(peak, place, row, PARTS: tl.constexpr, WIDE: tl.constexpr):  # type: ignore[no-untyped-def]
    """A row's greatest logit, its first token, and whether nothing can be drawn from the row."""
    p = tl.arange(0, WIDE)
    best = tl.load(peak + row * PARTS + p, mask=p < PARTS, other=-float("inf"))
    where = tl.load(place + row * PARTS + p, mask=p < PARTS, other=1 << 30)
    most = tl.max(best, 0)
    first = tl.min(tl.where(best == most, where, 1 << 30), 0)
    spoilt = (tl.min(where, 0) < 0) | (most == -float("inf")) | (most == float("inf"))
    return most, tl.maximum(first, 0), spoilt


@triton.jit
def _cut(  # type: ignore[no-untyped-def]
    knobs, slot, peaks, row, most, heat,
    vocab: tl.constexpr, KNOBS: tl.constexpr, COUNT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """What e^x must be to pass the filters, or less than that: min-p; the k-th of the lesser peaks, which are k
    tokens at least as likely; so little that all such tokens together weigh less than top-p leaves out."""
    top_k = tl.load(knobs + slot * KNOBS + 2).to(tl.int32)
    top_p = tl.load(knobs + slot * KNOBS + 3)
    cut = tl.load(knobs + slot * KNOBS + 4).to(tl.float32)
    if (top_k > 0) & (top_k < vocab):
        if top_k <= COUNT:
            s = tl.arange(0, WIDE)
            x = tl.load(peaks + row * COUNT + s, mask=s < COUNT, other=-float("inf"))
            bits = tl.exp((x - most) / heat).to(tl.int32, bitcast=True)
            low = top_k * 0
            for step in tl.range(30):
                unit = (low * 0 + 1) << (29 - step)
                enough = tl.sum((bits >= low + unit).to(tl.int32), 0) >= top_k
                low += unit * enough.to(tl.int32)
            cut = tl.maximum(cut, low.to(tl.float32, bitcast=True))
    elif top_p < 1 - 1e-6:
        cut = tl.maximum(cut, (0.999 * (1 - top_p) / vocab).to(tl.float32))
    return cut


@triton.jit(do_not_specialize=["words"])
def _weigh(  # type: ignore[no-untyped-def]
    logits, stride, slots, bits, words, knobs, line_S, count, prompt, peak, place, peaks, sums, found, rough,
    vocab: tl.constexpr, KNOBS: tl.constexpr, MASK: tl.constexpr, PENAL: tl.constexpr, PART: tl.constexpr,
    SUB: tl.constexpr, PARTS: tl.constexpr, WIDE: tl.constexpr, FILTER: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Each part's weight; of rows with filters also e^x of the tokens that may pass (others -1) and their number."""
    if CHAINED:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slots + row)
    most, _, spoilt = _crown(peak, place, row, PARTS, WIDE)
    here = row * PARTS + part
    passed = part * 0
    if (tl.load(knobs + slot * KNOBS) == 0) & (spoilt == 0):
        heat = tl.load(knobs + slot * KNOBS + 1).to(tl.float32)
        o = part * PART + tl.arange(0, PART)
        x = _shaped(
            logits, stride, row, o, bits, words, knobs, slot, line_S, count, prompt, vocab, KNOBS, MASK, PENAL
        )
        e = tl.exp((x - most) / heat)
        tl.store(sums + here, tl.sum(_weight(e), 0))
        if FILTER:  # noqa: SIM102 (one is known when compiled, the other is not)
            if tl.load(knobs + slot * KNOBS + 5) > 0:
                cut = _cut(knobs, slot, peaks, row, most, heat, vocab, KNOBS, PARTS * SUB, WIDE * SUB)
                passes = (e >= cut) & (o < vocab)
                tl.store(rough + row * vocab + o, tl.where(passes, e, -1.0), mask=o < vocab)
                passed = tl.sum(passes.to(tl.int32), 0)
    if FILTER:
        tl.store(found + here, passed)


@triton.jit
def _list(  # type: ignore[no-untyped-def]
    found, rough, list_e, list_id,
    vocab: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr, WIDE: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """What `_weigh` let pass, without holes, in order of the ids."""
    if CHAINED:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if tl.load(found + row * PARTS + part) > 0:
        p = tl.arange(0, WIDE)
        before = tl.sum(tl.load(found + row * PARTS + p, mask=p < part, other=0), 0)
        o = part * PART + tl.arange(0, PART)
        e = tl.load(rough + row * vocab + o, mask=o < vocab, other=-1.0)
        passes = e >= 0
        at = row * vocab + before + tl.cumsum(passes.to(tl.int32), 0) - 1
        tl.store(list_e + at, e, mask=passes)
        tl.store(list_id + at, o, mask=passes)


@triton.jit
def _kept(e, least, few, ties):  # type: ignore[no-untyped-def]
    """Weights of those that stay: all above `least` and the first `few` of those equal to it; how many are equal
    to it, and how many of these stay."""
    bits = e.to(tl.int32, bitcast=True)
    tie = (bits == least).to(tl.int32)
    among = (tie > 0) & (ties + tl.cumsum(tie, 0) <= few)
    weight = tl.where((bits > least) | among, _weight(e), 0)
    return weight, tl.sum(tie, 0), among


@triton.jit
def _leading(list_e, n, need, MASS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The least of the fewest list entries, from the greatest down, that are `need` many or weigh as much; and
    the number and weight of those above it. Two bits a pass."""
    at = tl.arange(0, BLOCK)
    least = need.to(tl.int32) * 0
    one = least + 1
    for step in tl.range(15):
        unit = one << (28 - 2 * step)
        sum1 = tl.zeros([BLOCK], tl.int64)
        sum2 = tl.zeros([BLOCK], tl.int64)
        sum3 = tl.zeros([BLOCK], tl.int64)
        start = least * 0
        while start < n:
            e = tl.load(list_e + start + at, mask=start + at < n, other=0.0)
            bits = e.to(tl.int32, bitcast=True)
            worth = _weight(e) if MASS else tl.full([BLOCK], 1, tl.int64)
            sum1 += tl.where(bits >= least + unit, worth, 0)
            sum2 += tl.where(bits >= least + 2 * unit, worth, 0)
            sum3 += tl.where(bits >= least + 3 * unit, worth, 0)
            start += BLOCK
        steps = (tl.sum(sum1, 0) >= need).to(tl.int32) + (tl.sum(sum2, 0) >= need).to(tl.int32)
        least += unit * (steps + (tl.sum(sum3, 0) >= need).to(tl.int32))
    count = tl.zeros([BLOCK], tl.int64)
    mass = tl.zeros([BLOCK], tl.int64)
    start = least * 0
    while start < n:
        e = tl.load(list_e + start + at, mask=start + at < n, other=0.0)
        above = e.to(tl.int32, bitcast=True) > least
        count += tl.where(above, 1, 0)
        mass += tl.where(above, _weight(e), 0)
        start += BLOCK
    return least, tl.sum(count, 0), tl.sum(mass, 0)


@triton.jit
def _goal(key, drawn, slot, stream, mass):  # type: ignore[no-untyped-def]
    """Where in the row's weight the draw falls."""
    place = tl.load(drawn + slot) * 4 + stream
    goal = (_uniform(tl.load(key + slot), place) * mass.to(tl.float64)).to(tl.int64)
    return tl.maximum(tl.minimum(goal, mass - 1), 0)


@triton.jit
def _from_list(  # type: ignore[no-untyped-def]
    knobs, key, drawn, slot, stream, mass, end, list_e, list_id,
    vocab: tl.constexpr, KNOBS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The token of a row with filters, and what stays of the row: all above `least`, and of those equal to it the
    ids up to `last`; their weight. `mass`: the weight of all its tokens."""
    at = tl.arange(0, BLOCK)
    top_k = tl.load(knobs + slot * KNOBS + 2).to(tl.int64)
    top_p = tl.load(knobs + slot * KNOBS + 3)
    least = end * 0 - 1
    few = mass * 0
    if (top_k > 0) & (top_k < vocab):
        least, count, mass = _leading(list_e, end, top_k, False, BLOCK)
        few = top_k - count
        mass += few * _weight(least.to(tl.float32, bitcast=True))
    if top_p < 1:
        need = tl.ceil(top_p * mass.to(tl.float64)).to(tl.int64)
        least, count, above = _leading(list_e, end, need, True, BLOCK)
        each = tl.maximum(_weight(least.to(tl.float32, bitcast=True)), 1)
        few = (need - above + each - 1) // each
    bound = tl.load(knobs + slot * KNOBS + 4).to(tl.float32).to(tl.int32, bitcast=True)
    few = tl.where(bound > least, 0, few)
    least = tl.maximum(least, bound - 1)
    sums = tl.zeros([BLOCK], tl.int64)
    ties = few * 0
    start = end * 0
    last = end * 0 - 1
    while start < end:
        e = tl.load(list_e + start + at, mask=start + at < end, other=0.0)
        weight, new, among = _kept(e, least, few, ties)
        sums += weight
        ties += new
        last = tl.maximum(last, tl.max(tl.where(among & (start + at < end), start + at, -1), 0))
        start += BLOCK
    mass = tl.sum(sums, 0)
    goal = _goal(key, drawn, slot, stream, mass)
    run = goal * 0
    before = goal * 0
    ties = few * 0
    ties_there = few * 0
    chunk = end * 0
    start = end * 0
    while start < end:
        e = tl.load(list_e + start + at, mask=start + at < end, other=0.0)
        weight, new, among = _kept(e, least, few, ties)
        run += tl.sum(weight, 0)
        ties += new
        if run <= goal:
            before, ties_there, chunk = run, ties, start + BLOCK
        start += BLOCK
    e = tl.load(list_e + chunk + at, mask=chunk + at < end, other=0.0)
    weight, new, among = _kept(e, least, few, ties_there)
    found = chunk + tl.sum((before + tl.cumsum(weight, 0) <= goal).to(tl.int32), 0)
    token = tl.load(list_id + tl.maximum(tl.minimum(found, end - 1), 0))
    if last >= 0:
        last = tl.load(list_id + last)
    return token, least, last, mass


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
