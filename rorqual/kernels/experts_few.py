"""Kernels of the mixture-of-experts feed-forward layer for a few tokens (about 1 to 4): two launches in all.

What counts here is to stream the chosen experts' matrices at the memory's full rate, so there is no sort and no
sum: every program finds the distinct experts of the batch itself (`slots`), columns are all the batch's tokens,
and a program of the second product goes through all experts for its rows of y. Each product is cut into `SPLIT`
pieces along its inner axis, one a warp, added up at the end in a fixed order. FP8 codes are multiplied in fp16,
which holds them exactly, so activations need no quantising.
"""

# mypy: disable-error-code="no-untyped-def"

from rorqual.kernels.experts_triton import COUNTS, follow
from rorqual.kernels.gpu import tl, triton


@triton.jit
def to_half(x):
    """x / 64 in fp16, whose largest number is 65504."""
    x = x.to(tl.float32) * 0.015625
    return tl.minimum(tl.maximum(x, -65504.0), 65504.0).to(tl.float16)


@triton.jit
def slots(ids_ptr, pairs, experts, PAIRS: tl.constexpr):
    """The distinct experts of all pairs, in order of first choice: `[PAIRS]` (-1 past the last), their number."""
    pair = tl.arange(0, PAIRS)
    ids = tl.load(ids_ptr + pair, pair < pairs, other=-1).to(tl.int32)
    ids = tl.where(ids < experts, ids, -1)
    other = tl.load(ids_ptr + pair, pair < pairs, other=-1).to(tl.int32)
    earlier = (ids[:, None] == other[None, :]) & (pair[None, :] < pair[:, None])
    leads = (ids >= 0) & (tl.sum(earlier.to(tl.int32), 1) == 0)
    rank = tl.cumsum(leads.to(tl.int32)) - 1
    mine = leads[:, None] & (rank[:, None] == pair[None, :])
    listed = tl.sum(tl.where(mine, ids[:, None] + 1, 0), 0) - 1
    return listed, tl.sum(leads.to(tl.int32))


@triton.jit(do_not_specialize=COUNTS)
def few_up_kernel(
    x_ptr, ids_ptr, weights_ptr, gate_ptr, up_ptr, gate_scale_ptr, up_scale_ptr, shared_gate_ptr,
    shared_up_ptr, shared_gate_scale_ptr, shared_up_scale_ptr, inner_ptr, limit, pairs, tokens, experts,
    shared, width, hidden, K: tl.constexpr, PAIRS: tl.constexpr, ROWS: tl.constexpr, OUT: tl.constexpr,
    SPLIT: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr, FP8: tl.constexpr, LIMIT: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """inner `[slots, N, W]`: routing weight (0 where not chosen) * swiglu(gate x, up x); shared experts last."""
    if PDL:
        follow()
    across = tl.cdiv(width, OUT)
    slot = tl.program_id(0) // across
    column = tl.program_id(0) % across * OUT
    listed, count = slots(ids_ptr, pairs, experts, PAIRS)
    if slot >= count + shared:
        return
    expert = tl.sum(tl.where(tl.arange(0, PAIRS) == slot, listed, 0))
    token = tl.arange(0, ROWS)
    scales = tl.cdiv(hidden, 128)
    if slot < count:
        weight = tl.zeros((ROWS,), tl.float32)
        for k in tl.static_range(K):
            chosen = tl.load(ids_ptr + token * K + k, token < tokens, other=-1) == expert
            weight += tl.load(weights_ptr + token * K + k, (token < tokens) & chosen, other=0.0).to(
                tl.float32
            )
        at = expert.to(tl.int64) * width * hidden
        gate = gate_ptr + at
        up = up_ptr + at
        scale_at = expert * tl.cdiv(width, 128) * scales + column // 128 * scales
        gate_scale = gate_scale_ptr + scale_at
        up_scale = up_scale_ptr + scale_at
    else:
        weight = tl.full((ROWS,), 1.0, tl.float32)
        at = (slot - count).to(tl.int64) * width * hidden
        gate = shared_gate_ptr + at
        up = shared_up_ptr + at
        scale_at = (slot - count) * tl.cdiv(width, 128) * scales + column // 128 * scales
        gate_scale = shared_gate_scale_ptr + scale_at
        up_scale = shared_up_scale_ptr + scale_at
    both = tl.arange(0, 2 * OUT)
    row = tl.minimum(column + both % OUT, width - 1)
    split = tl.arange(0, SPLIT)
    depth = split[:, None] * DEPTH + tl.arange(0, DEPTH)[None, :]
    w_ptrs = tl.where((both < OUT)[None, :, None], gate, up) + row[None, :, None] * hidden + depth[:, None, :]
    x_ptrs = x_ptr + token[None, :, None] * hidden + depth[:, None, :]
    acc = tl.zeros((SPLIT, 2 * OUT, ROWS), tl.float32)
    for start in tl.range(0, hidden, SPLIT * DEPTH, num_stages=STAGES):
        there = start + depth < hidden
        w = tl.load(w_ptrs + start, there[:, None, :], other=0.0)
        x = tl.load(x_ptrs + start, there[:, None, :] & (token < tokens)[None, :, None], other=0.0)
        if FP8:
            block = start // 128 + split
            inside = block < scales
            g = tl.load(gate_scale + block, inside, other=0.0)
            u = tl.load(up_scale + block, inside, other=0.0)
            w_scale = tl.where((both < OUT)[None, :], g[:, None], u[:, None])
            part = tl.dot(w.to(tl.float16), tl.permute(to_half(x), (0, 2, 1)))
            acc += part * w_scale[:, :, None]
        else:
            acc = tl.dot(w, tl.permute(x, (0, 2, 1)), acc, input_precision="ieee")
    y = tl.sum(acc, 0)
    if FP8:
        y *= 64.0
    gate_y, up_y = tl.split(tl.permute(tl.reshape(y, (2, OUT, ROWS)), (2, 1, 0)))
    if LIMIT:
        gate_y = tl.minimum(gate_y, limit)
        up_y = tl.minimum(tl.maximum(up_y, -limit), limit)
    inner = gate_y * tl.sigmoid(gate_y) * up_y * weight[:, None]
    channel = column + tl.arange(0, OUT)[None, :]
    place = (slot * tokens + token)[:, None] * width + channel
    tl.store(
        inner_ptr + place, inner.to(inner_ptr.dtype.element_ty), (token < tokens)[:, None] & (channel < width)
    )


@triton.jit(do_not_specialize=COUNTS)
def few_down_kernel(
    inner_ptr, ids_ptr, down_ptr, down_scale_ptr, shared_ptr, shared_scale_ptr, add_ptr, y_ptr, pairs,
    tokens, experts, shared, width, shared_width, hidden, PAIRS: tl.constexpr, ROWS: tl.constexpr,
    OUT: tl.constexpr, SPLIT: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr, FP8: tl.constexpr,
    ADD: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """y `[N, D]`: the sum over all slots of inner `[slots, N, W]` times the slot's down matrix, and `add`."""
    column = tl.program_id(0) * OUT
    # Before the wait: ids are older than the kernel that this one follows.
    listed, count = slots(ids_ptr, pairs, experts, PAIRS)
    token = tl.arange(0, ROWS)
    row = tl.minimum(column + tl.arange(0, OUT), hidden - 1)
    if PDL:
        follow()
    split = tl.arange(0, SPLIT)
    depth = split[:, None] * DEPTH + tl.arange(0, DEPTH)[None, :]
    steps = tl.cdiv(width, SPLIT * DEPTH)
    acc = tl.zeros((SPLIT, OUT, ROWS), tl.float32)
    for step in tl.range(0, (count + shared) * steps, num_stages=STAGES):
        slot = step // steps
        start = step % steps * (SPLIT * DEPTH)
        expert = tl.sum(tl.where(tl.arange(0, PAIRS) == slot, listed, 0))
        routed = slot < count
        stride = tl.where(routed, width, shared_width)
        own = expert.to(tl.int64) * hidden * width
        w_ptr = tl.where(routed, down_ptr + own, shared_ptr + (slot - count) * width)
        there = start + depth < width
        w_ptrs = w_ptr + row[None, :, None] * stride + (start + depth)[:, None, :]
        w = tl.load(w_ptrs, there[:, None, :], other=0.0)
        x_ptrs = inner_ptr + (slot * tokens + token)[None, :, None] * width + (start + depth)[:, None, :]
        x = tl.load(x_ptrs, there[:, None, :] & (token < tokens)[None, :, None], other=0.0)
        if FP8:
            scales = tl.cdiv(stride, 128)
            own_scale = (expert * tl.cdiv(hidden, 128) + column // 128) * scales
            common = column // 128 * scales + (slot - count) * (width // 128)
            scale_ptr = tl.where(routed, down_scale_ptr + own_scale, shared_scale_ptr + common)
            block = start // 128 + split
            w_scale = tl.load(scale_ptr + block, block * 128 < width, other=0.0)
            part = tl.dot(w.to(tl.float16), tl.permute(to_half(x), (0, 2, 1)))
            acc += part * w_scale[:, None, None]
        else:
            acc = tl.dot(w, tl.permute(x, (0, 2, 1)), acc, input_precision="ieee")
    y = tl.sum(acc, 0).T
    if FP8:
        y *= 64.0
    channel = column + tl.arange(0, OUT)[None, :]
    place = token[:, None] * hidden + channel
    there = (token < tokens)[:, None] & (channel < hidden)
    if ADD:
        y += tl.load(add_ptr + place, there, other=0.0).to(tl.float32)
    tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), there)
