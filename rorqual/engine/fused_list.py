"""What top-k, top-p and min-p leave of a row, and the draw from it: one program works on the list of tokens that
can pass (see `fused`)."""

from rorqual.engine.fused_parts import _uniform, _weight
from rorqual.kernels.gpu import tl, triton


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
