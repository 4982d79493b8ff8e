"""A draw's work on parts of the vocabulary, one program each (see `fused`): logits with penalties and masks, peaks,
weights, and the list of tokens that can pass a row's filters."""

from rorqual.kernels.gpu import tl, triton


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
