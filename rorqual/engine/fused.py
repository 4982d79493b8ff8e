"""A whole draw in one launch: the same tokens as `draws.uniforms`, `filtered` and `pick` would give, but for
the last bits of exp. A program has a row to itself: it reads the logits three times and, where the row has
filters, copies the few tokens that can pass them to a list that all the rest of its work is done on.

Sums are of whole numbers here too (a weight is e^x, x <= 0, in multiples of 2^-44), so a row's token depends
on nothing but the row.
"""

import torch
from torch import Tensor

from rorqual.kernels.gpu import tl, triton, usable


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
def _load(line, list_e, o, end, most, heat, LIST: tl.constexpr):  # type: ignore[no-untyped-def]
    """e^x of tokens, 0 past the end."""
    if LIST:
        return tl.load(list_e + o, mask=o < end, other=0.0)
    x = tl.load(line + o, mask=o < end, other=-float("inf")).to(tl.float32)
    return tl.exp((x - most) / heat)


@triton.jit
def _kept(e, least, few, ties):  # type: ignore[no-untyped-def]
    """Weights of those that stay: all above `least` and the first `few` of those equal to it."""
    bits = e.to(tl.int32, bitcast=True)
    tie = (bits == least).to(tl.int32)
    stays = (bits > least) | ((tie > 0) & (ties + tl.cumsum(tie, 0) <= few))
    return tl.where(stays, _weight(e), 0), tl.sum(tie, 0)


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
def _draw(  # type: ignore[no-untyped-def]
    logits, stride, slots, knobs, key, drawn, unsound, out, list_e, list_id, stream,
    vocab: tl.constexpr, KNOBS: tl.constexpr, FILTER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    at = tl.arange(0, BLOCK)
    line = logits + row * stride
    heat = tl.load(knobs + slot * KNOBS + 1).to(tl.float32)

    best = tl.full([BLOCK], -float("inf"), tl.float32)
    which = tl.zeros([BLOCK], tl.int32)
    bad = tl.zeros([BLOCK], tl.int32)
    for start in tl.range(0, vocab, BLOCK):
        x = tl.load(line + start + at, mask=start + at < vocab, other=-float("inf")).to(tl.float32)
        bad += (x != x).to(tl.int32)
        which = tl.where(x > best, start + at, which)
        best = tl.where(x > best, x, best)
    most = tl.max(best, 0)
    first = tl.min(tl.where(best == most, which, vocab - 1), 0)
    spoilt = (tl.sum(bad, 0) > 0) | (most == -float("inf")) | (most == float("inf"))
    if (tl.load(knobs + slot * KNOBS) > 0) | spoilt:
        tl.store(out + row, first.to(tl.int64))
        if spoilt:
            tl.atomic_add(unsound + slot, 1)
    else:
        sums = tl.zeros([BLOCK], tl.int64)
        for start in tl.range(0, vocab, BLOCK):
            sums += _weight(_load(line, list_e, start + at, vocab, most, heat, False))
        mass = tl.sum(sums, 0)
        end = vocab
        least = first * 0 - 1
        few = mass * 0
        list_e += row * vocab
        list_id += row * vocab
        if FILTER:
            top_k = tl.load(knobs + slot * KNOBS + 2).to(tl.int64)
            top_p = tl.load(knobs + slot * KNOBS + 3)
            min_p = tl.load(knobs + slot * KNOBS + 4).to(tl.float32)
            # What can't pass: those below min_p; those below the k-th of the lanes' best, which are k tokens at
            # least as likely; those so unlikely that all such together weigh less than top-p leaves out.
            cut = min_p
            if (top_k > 0) & (top_k < vocab):
                if top_k <= BLOCK:
                    bits = tl.exp((best - most) / heat).to(tl.int32, bitcast=True)
                    low = first * 0
                    for step in tl.range(30):
                        unit = (low * 0 + 1) << (29 - step)
                        enough = tl.sum((bits >= low + unit).to(tl.int32), 0) >= top_k
                        low += unit * enough.to(tl.int32)
                    cut = tl.maximum(cut, low.to(tl.float32, bitcast=True))
            elif top_p < 1 - 1e-6:
                spare = 0.999 * (1 - top_p) * mass.to(tl.float64) / 17592186044416.0 / vocab
                cut = tl.maximum(cut, spare.to(tl.float32))
            end = first * 0
            for start in tl.range(0, vocab, BLOCK):
                e = _load(line, list_e, start + at, vocab, most, heat, False)
                passes = ((e >= cut) & (start + at < vocab)).to(tl.int32)
                place = end + tl.cumsum(passes, 0) - 1
                tl.store(list_e + place, e, mask=passes > 0)
                tl.store(list_id + place, start + at, mask=passes > 0)
                end += tl.sum(passes, 0)
            tl.debug_barrier()
            if (top_k > 0) & (top_k < vocab):
                least, count, mass = _leading(list_e, end, top_k, False, BLOCK)
                few = top_k - count
                mass += few * _weight(least.to(tl.float32, bitcast=True))
            if top_p < 1:
                need = tl.ceil(top_p * mass.to(tl.float64)).to(tl.int64)
                least, count, above = _leading(list_e, end, need, True, BLOCK)
                each = tl.maximum(_weight(least.to(tl.float32, bitcast=True)), 1)
                few = (need - above + each - 1) // each
            bound = min_p.to(tl.int32, bitcast=True)
            few = tl.where(bound > least, 0, few)
            least = tl.maximum(least, bound - 1)
            sums = tl.zeros([BLOCK], tl.int64)
            ties = few * 0
            start = first * 0
            while start < end:
                e = _load(line, list_e, start + at, end, most, heat, True)
                weight, new = _kept(e, least, few, ties)
                sums += weight
                ties += new
                start += BLOCK
            mass = tl.sum(sums, 0)
        place = tl.load(drawn + slot) * 4 + stream
        goal = (_uniform(tl.load(key + slot), place) * mass.to(tl.float64)).to(tl.int64)
        goal = tl.maximum(tl.minimum(goal, mass - 1), 0)
        run = mass * 0
        before = mass * 0
        ties = mass * 0
        ties_there = mass * 0
        chunk = first * 0
        start = first * 0
        while start < end:
            e = _load(line, list_e, start + at, end, most, heat, FILTER)
            weight, new = _kept(e, least, few, ties)
            run += tl.sum(weight, 0)
            ties += new
            if run <= goal:
                before, ties_there, chunk = run, ties, start + BLOCK
            start += BLOCK
        e = _load(line, list_e, chunk + at, end, most, heat, FILTER)
        weight, new = _kept(e, least, few, ties_there)
        found = chunk + tl.sum((before + tl.cumsum(weight, 0) <= goal).to(tl.int32), 0)
        found = tl.minimum(found, end - 1)
        if FILTER:
            found = tl.load(list_id + found)
        tl.store(out + row, found.to(tl.int64))


def draw(
    logits_RV: Tensor,
    slots_R: Tensor,
    knobs_SK: Tensor,
    key_S: Tensor,
    drawn_S: Tensor,
    unsound_S: Tensor,
    *,
    filters: bool,
    stream: int = 0,
    block: int = 4096,
    warps: int = 16,
) -> Tensor:
    """One token of each row, int64 [R]; counts unsound rows in `unsound_S`. `knobs_SK` as of `Sampler`: greedy,
    temperature, top-k, top-p, min-p; without `filters` the last three are taken for off."""
    rows, vocab = logits_RV.shape
    out = torch.empty(rows, dtype=torch.int64, device=logits_RV.device)
    listed = (rows, vocab) if filters else (1, 1)
    list_e = torch.empty(listed, dtype=torch.float32, device=logits_RV.device)
    list_id = torch.empty(listed, dtype=torch.int32, device=logits_RV.device)
    if logits_RV.stride(1) != 1:
        logits_RV = logits_RV.contiguous()
    _draw[(rows,)](
        logits_RV, logits_RV.stride(0), slots_R, knobs_SK, key_S, drawn_S, unsound_S, out, list_e, list_id, stream,
        vocab=vocab, KNOBS=knobs_SK.shape[1], FILTER=filters, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return out


ON = False
"""Not yet measured on a GPU."""


def supported(logits_RV: Tensor) -> bool:
    """Whether `draw` can run here: weights of more than 2^18 tokens could overflow."""
    return ON and usable(logits_RV) and 0 < logits_RV.shape[1] <= 2**18 and len(logits_RV) > 0
