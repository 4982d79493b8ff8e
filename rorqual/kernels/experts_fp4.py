"""Routed experts whose matrices are held as FP4 (V4's released form: two E2M1 codes a byte, one e8m0 scale for every
32 inputs) or as FP8 in blocks that don't divide them: multiplied out a tile at a time, in registers.

Codes are read as they lie, so a matrix costs half a byte a weight in memory and in reading; recasting to FP8 would
double both. An E2M1 code times a power of two is exact in bf16, and the products are those of bf16 matrices. Codes
are read in words of four: the first codes of all words meet the first of every four channels of x in a product of
their own, and so on, so that nothing has to be put in order. Sorting and summing are `experts_triton`'s.
"""

# mypy: disable-error-code="no-untyped-def"

from rorqual.kernels.entries import from_e2m1, from_exponent
from rorqual.kernels.experts_few import slots
from rorqual.kernels.experts_triton import COUNTS, follow
from rorqual.kernels.gpu import tl, triton

# Two words of four codes ($4) to their first, second, third and fourth codes ($0 to $3) as bf16: sign and value bits go
# to the sign and the lowest exponent bits, which stands for 2^-126 times as much; the factors in $5 are 2^63 times the
# scales. What is missing, 2^63, comes last, so that one product does for all scales between 2^-62 and 2^64.
UNPACK = """
{
    .reg .b32 c, d;
    shl.b32 c, $4, 12;
    shl.b32 d, $4, 6;
    and.b32 c, c, 0x80008000;
    and.b32 d, d, 0x01C001C0;
    or.b32 c, c, d;
    mul.bf16x2 $0, c, $5;
    shl.b32 c, $4, 8;
    shl.b32 d, $4, 2;
    and.b32 c, c, 0x80008000;
    and.b32 d, d, 0x01C001C0;
    or.b32 c, c, d;
    mul.bf16x2 $1, c, $5;
    shl.b32 c, $4, 4;
    shr.b32 d, $4, 2;
    and.b32 c, c, 0x80008000;
    and.b32 d, d, 0x01C001C0;
    or.b32 c, c, d;
    mul.bf16x2 $2, c, $5;
    shr.b32 d, $4, 6;
    and.b32 c, $4, 0x80008000;
    and.b32 d, d, 0x01C001C0;
    or.b32 c, c, d;
    mul.bf16x2 $3, c, $5;
}
"""
MISSING = tl.constexpr(2.0**63)


@triton.jit
def widen(word, exponent, KIND: tl.constexpr, ASM: tl.constexpr):
    """Words of four codes, and their e8m0 scales of the same shape (int16): the first to the fourth weights in KIND;
    with ASM they are 2^-63 of that."""
    if ASM is not None:
        factor = (exponent << 7) + 0x1F80
        return tl.inline_asm_elementwise(
            ASM, "=r,=r,=r,=r,r,r", [word, factor],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), is_pure=True, pack=2,
        )  # fmt: skip
    else:
        factor = from_exponent(exponent)
        w_0 = (from_e2m1(word & 15) * factor).to(KIND)
        w_1 = (from_e2m1((word >> 4) & 15) * factor).to(KIND)
        w_2 = (from_e2m1((word >> 8) & 15) * factor).to(KIND)
        w_3 = (from_e2m1((word >> 12) & 15) * factor).to(KIND)
        return w_0, w_1, w_2, w_3


@triton.jit
def quarters(x, at, mask, KIND: tl.constexpr):
    """Numbers 4 `at` to 4 `at` + 3 of rows of x: four tensors. Rows of 16-bit numbers are read as 64-bit integers."""
    if KIND.primitive_bitwidth == 16:
        four = tl.load(x + at, mask=mask, other=0)
        x_0 = four.to(tl.int16).to(KIND, bitcast=True)
        x_1 = (four >> 16).to(tl.int16).to(KIND, bitcast=True)
        x_2 = (four >> 32).to(tl.int16).to(KIND, bitcast=True)
        x_3 = (four >> 48).to(tl.int16).to(KIND, bitcast=True)
    else:
        x_0 = tl.load(x + 4 * at, mask=mask, other=0.0)
        x_1 = tl.load(x + 4 * at + 1, mask=mask, other=0.0)
        x_2 = tl.load(x + 4 * at + 2, mask=mask, other=0.0)
        x_3 = tl.load(x + 4 * at + 3, mask=mask, other=0.0)
    return x_0, x_1, x_2, x_3


@triton.jit
def _exponents(s_rows, start, inner, DEPTH: tl.constexpr, FP4: tl.constexpr):
    """e8m0 scales `[M, DEPTH / 32]` of the inputs from `start` on: read a step before they are used."""
    if FP4:
        block = start // 32 + tl.arange(0, DEPTH // 32)
        byte = tl.load(s_rows[:, None] + block[None, :], mask=(block < inner // 32)[None, :], other=0)
        return byte.to(tl.int16)
    else:
        return 0


@triton.jit
def _step(
    acc, exponent, w_rows, s_rows, x_rows, there_R, start, inner, block_in,
    M: tl.constexpr, DEPTH: tl.constexpr, FP4: tl.constexpr, KIND: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """acc `[M, ROWS]` plus DEPTH inputs' worth of a tile of M matrix rows times the rows of x.

    `w_rows`, `s_rows`, `x_rows`: where each row's codes, scales and numbers (FP4: pairs) begin; `exponent`: FP4's
    scales of these inputs.
    """
    if FP4:
        at = start // 4 + tl.arange(0, DEPTH // 4)
        inside = (at < inner // 4)[None, :]
        word = tl.load(w_rows[:, None] + at[None, :], mask=inside, other=0)
        x_0, x_1, x_2, x_3 = quarters(x_rows[:, None], at[None, :], inside & there_R[:, None], KIND)
        exponent = tl.broadcast_to(exponent[:, :, None], [M, DEPTH // 32, 8])
        w_0, w_1, w_2, w_3 = widen(word, tl.reshape(exponent, [M, DEPTH // 4]), KIND, ASM)
        acc = tl.dot(w_0, tl.trans(x_0), acc, input_precision="ieee")
        acc = tl.dot(w_1, tl.trans(x_1), acc, input_precision="ieee")
        acc = tl.dot(w_2, tl.trans(x_2), acc, input_precision="ieee")
        acc = tl.dot(w_3, tl.trans(x_3), acc, input_precision="ieee")
    else:
        at = start + tl.arange(0, DEPTH)
        inside = (at < inner)[None, :]
        code = tl.load(w_rows[:, None] + at[None, :], mask=inside, other=0.0)
        scale = tl.load(s_rows[:, None] + (at // block_in)[None, :], mask=inside, other=0.0)
        x = tl.load(x_rows[:, None] + at[None, :], mask=inside & there_R[:, None], other=0.0)
        w = (code.to(tl.float32) * scale.to(tl.float32)).to(KIND)
        acc = tl.dot(w, tl.trans(x), acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=COUNTS)
def gate_up_kernel(
    x_ptr, weights_ptr, order_ptr, tiles_ptr, gate_ptr, up_ptr, gate_scale_ptr, up_scale_ptr, inner_ptr, limit,
    pairs, tokens, tiles, width, hidden, line, x_line, blocks_out, blocks_in, block_out, block_in, K: tl.constexpr,
    ROWS: tl.constexpr, OUT: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr, FP4: tl.constexpr,
    ASM: tl.constexpr, LIMIT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """inner `[P, W]`, by place in `order`: routing weight * swiglu(gate x, up x)."""
    if PDL:
        follow()
    across = tl.cdiv(width, OUT)
    tile = tl.program_id(0) // across
    column = tl.program_id(0) % across * OUT
    expert = tl.load(tiles_ptr + tile)
    if expert < 0:
        return
    begin = tl.load(tiles_ptr + tiles + tile)
    end = tl.load(tiles_ptr + 2 * tiles + tile)
    place_R = begin + tl.arange(0, ROWS)
    there_R = place_R < end
    pair_R = tl.load(order_ptr + place_R, there_R, other=0)
    weight_R = tl.load(weights_ptr + pair_R, there_R, other=0.0).to(tl.float32)
    KIND: tl.constexpr = inner_ptr.dtype.element_ty
    both = tl.arange(0, 2 * OUT)
    row = tl.minimum(column + both % OUT, width - 1)
    matrix = expert.to(tl.int64) * width * line
    scales = expert.to(tl.int64) * blocks_out * blocks_in
    w_rows = tl.where(both < OUT, gate_ptr, up_ptr) + matrix + row * line
    s_rows = tl.where(both < OUT, gate_scale_ptr, up_scale_ptr) + scales + row // block_out * blocks_in
    x_rows = x_ptr + (pair_R // K).to(tl.int64) * x_line
    acc = tl.zeros((2 * OUT, ROWS), tl.float32)
    exponent = _exponents(s_rows, 0, hidden, DEPTH, FP4)
    for start in tl.range(0, hidden, DEPTH, num_stages=STAGES):
        ahead = _exponents(s_rows, start + DEPTH, hidden, DEPTH, FP4)
        acc = _step(
            acc,
            exponent,
            w_rows,
            s_rows,
            x_rows,
            there_R,
            start,
            hidden,
            block_in,
            2 * OUT,
            DEPTH,
            FP4,
            KIND,
            ASM,
        )
        exponent = ahead
    if ASM is not None:
        acc *= MISSING
    gate, up = tl.split(tl.permute(tl.reshape(acc, (2, OUT, ROWS)), (2, 1, 0)))
    if LIMIT:
        gate = tl.minimum(gate, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit)
    inner = gate * tl.sigmoid(gate) * up * weight_R[:, None]
    channel = column + tl.arange(0, OUT)[None, :]
    place = place_R.to(tl.int64)[:, None] * width + channel
    tl.store(inner_ptr + place, inner.to(KIND), there_R[:, None] & (channel < width))


@triton.jit(do_not_specialize=COUNTS)
def down_kernel(
    inner_ptr, order_ptr, tiles_ptr, down_ptr, down_scale_ptr, y_ptr, tiles, width, hidden, line, x_line, blocks_out,
    blocks_in, block_out, block_in, ROWS: tl.constexpr, OUT: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr,
    FP4: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y `[pairs, D]`, by pair number: inner `[P, W]` times the expert's down matrix."""
    if PDL:
        follow()
    across = tl.cdiv(hidden, OUT)
    tile = tl.program_id(0) // across
    column = tl.program_id(0) % across * OUT
    expert = tl.load(tiles_ptr + tile)
    if expert < 0:
        return
    begin = tl.load(tiles_ptr + tiles + tile)
    end = tl.load(tiles_ptr + 2 * tiles + tile)
    place_R = begin + tl.arange(0, ROWS)
    there_R = place_R < end
    KIND: tl.constexpr = y_ptr.dtype.element_ty
    row = tl.minimum(column + tl.arange(0, OUT), hidden - 1)
    w_rows = down_ptr + expert.to(tl.int64) * hidden * line + row * line
    s_rows = down_scale_ptr + expert.to(tl.int64) * blocks_out * blocks_in + row // block_out * blocks_in
    x_rows = inner_ptr + place_R.to(tl.int64) * x_line
    acc = tl.zeros((OUT, ROWS), tl.float32)
    exponent = _exponents(s_rows, 0, width, DEPTH, FP4)
    for start in tl.range(0, width, DEPTH, num_stages=STAGES):
        ahead = _exponents(s_rows, start + DEPTH, width, DEPTH, FP4)
        acc = _step(
            acc, exponent, w_rows, s_rows, x_rows, there_R, start, width, block_in, OUT, DEPTH, FP4, KIND, ASM
        )
        exponent = ahead
    if ASM is not None:
        acc *= MISSING
    pair_R = tl.load(order_ptr + place_R, there_R, other=0)
    channel = column + tl.arange(0, OUT)[None, :]
    y_ptrs = y_ptr + (pair_R.to(tl.int64) * hidden)[:, None] + channel
    tl.store(y_ptrs, acc.T.to(KIND), there_R[:, None] & (channel < hidden))


@triton.jit
def _few_exponents(s_rows, start, inner, SPLIT: tl.constexpr, DEPTH: tl.constexpr):
    """e8m0 scales `[SPLIT, M, DEPTH / 32]` of the inputs from `start` on."""
    block = start // 32 + tl.arange(0, SPLIT)[:, None] * (DEPTH // 32) + tl.arange(0, DEPTH // 32)[None, :]
    known = (block < inner // 32)[:, None, :]
    return tl.load(s_rows[None, :, None] + block[:, None, :], mask=known, other=0).to(tl.int16)


@triton.jit
def _few_step(
    acc, exponent, w_rows, x_rows, there_R, start, inner, SPLIT: tl.constexpr, M: tl.constexpr, DEPTH: tl.constexpr,
    KIND: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """acc `[SPLIT, M, ROWS]` plus DEPTH inputs' worth a split, of M rows of FP4."""
    at = start // 4 + tl.arange(0, SPLIT)[:, None] * (DEPTH // 4) + tl.arange(0, DEPTH // 4)[None, :]
    inside = (at < inner // 4)[:, None, :]
    word = tl.load(w_rows[None, :, None] + at[:, None, :], mask=inside, other=0)
    x_0, x_1, x_2, x_3 = quarters(
        x_rows[None, :, None], at[:, None, :], inside & there_R[None, :, None], KIND
    )
    exponent = tl.broadcast_to(exponent[:, :, :, None], [SPLIT, M, DEPTH // 32, 8])
    w_0, w_1, w_2, w_3 = widen(word, tl.reshape(exponent, [SPLIT, M, DEPTH // 4]), KIND, ASM)
    acc = tl.dot(w_0, tl.permute(x_0, (0, 2, 1)), acc, input_precision="ieee")
    acc = tl.dot(w_1, tl.permute(x_1, (0, 2, 1)), acc, input_precision="ieee")
    acc = tl.dot(w_2, tl.permute(x_2, (0, 2, 1)), acc, input_precision="ieee")
    return tl.dot(w_3, tl.permute(x_3, (0, 2, 1)), acc, input_precision="ieee")


@triton.jit(do_not_specialize=COUNTS)
def few_up_kernel(
    x_ptr, ids_ptr, weights_ptr, gate_ptr, up_ptr, gate_scale_ptr, up_scale_ptr, inner_ptr, limit, pairs, tokens,
    experts, width, hidden, line, x_line, blocks, K: tl.constexpr, PAIRS: tl.constexpr, ROWS: tl.constexpr,
    OUT: tl.constexpr, SPLIT: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr, ASM: tl.constexpr,
    LIMIT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """inner `[slots, N, W]`: routing weight (0 where not chosen) * swiglu(gate x, up x)."""
    if PDL:
        follow()
    across = tl.cdiv(width, OUT)
    slot = tl.program_id(0) // across
    column = tl.program_id(0) % across * OUT
    listed, count = slots(ids_ptr, pairs, experts, PAIRS)
    if slot >= count:
        return
    expert = tl.sum(tl.where(tl.arange(0, PAIRS) == slot, listed, 0))
    token = tl.arange(0, ROWS)
    weight = tl.zeros((ROWS,), tl.float32)
    for k in tl.static_range(K):
        chosen = tl.load(ids_ptr + token * K + k, token < tokens, other=-1) == expert
        weight += tl.load(weights_ptr + token * K + k, (token < tokens) & chosen, other=0.0).to(tl.float32)
    KIND: tl.constexpr = inner_ptr.dtype.element_ty
    both = tl.arange(0, 2 * OUT)
    row = expert.to(tl.int64) * width + tl.minimum(column + both % OUT, width - 1)
    w_rows = tl.where(both < OUT, gate_ptr, up_ptr) + row * line
    s_rows = tl.where(both < OUT, gate_scale_ptr, up_scale_ptr) + row * blocks
    x_rows = x_ptr + token * x_line
    acc = tl.zeros((SPLIT, 2 * OUT, ROWS), tl.float32)
    exponent = _few_exponents(s_rows, 0, hidden, SPLIT, DEPTH)
    for start in tl.range(0, hidden, SPLIT * DEPTH, num_stages=STAGES):
        ahead = _few_exponents(s_rows, start + SPLIT * DEPTH, hidden, SPLIT, DEPTH)
        acc = _few_step(
            acc, exponent, w_rows, x_rows, token < tokens, start, hidden, SPLIT, 2 * OUT, DEPTH, KIND, ASM
        )
        exponent = ahead
    if ASM is not None:
        acc *= MISSING
    gate_y, up_y = tl.split(tl.permute(tl.reshape(tl.sum(acc, 0), (2, OUT, ROWS)), (2, 1, 0)))
    if LIMIT:
        gate_y = tl.minimum(gate_y, limit)
        up_y = tl.minimum(tl.maximum(up_y, -limit), limit)
    inner = gate_y * tl.sigmoid(gate_y) * up_y * weight[:, None]
    channel = column + tl.arange(0, OUT)[None, :]
    place = (slot * tokens + token)[:, None] * width + channel
    tl.store(inner_ptr + place, inner.to(KIND), (token < tokens)[:, None] & (channel < width))


@triton.jit
def _slot_exponents(
    scale_ptr, listed, step, steps, count, row, width, hidden, blocks, PAIRS: tl.constexpr, SPLIT: tl.constexpr,
    DEPTH: tl.constexpr,
):  # fmt: skip
    """`_few_exponents` of step `step` through all slots; past the last, those of any expert there is."""
    slot = tl.minimum(step // steps, tl.maximum(count, 1) - 1)
    expert = tl.maximum(tl.sum(tl.where(tl.arange(0, PAIRS) == slot, listed, 0)), 0).to(tl.int64)
    s_rows = scale_ptr + (expert * hidden + row) * blocks
    return _few_exponents(s_rows, step % steps * (SPLIT * DEPTH), width, SPLIT, DEPTH)


@triton.jit(do_not_specialize=COUNTS)
def few_down_kernel(
    inner_ptr, ids_ptr, down_ptr, down_scale_ptr, add_ptr, y_ptr, pairs, tokens, experts, width, hidden,
    line, x_line, blocks, PAIRS: tl.constexpr, ROWS: tl.constexpr, OUT: tl.constexpr, SPLIT: tl.constexpr,
    DEPTH: tl.constexpr, STAGES: tl.constexpr, ASM: tl.constexpr, ADD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y `[N, D]`: the sum over all slots of inner `[slots, N, W]` times the slot's down matrix, and `add`."""
    column = tl.program_id(0) * OUT
    # Before the wait: ids are older than the kernel that this one follows.
    listed, count = slots(ids_ptr, pairs, experts, PAIRS)
    token = tl.arange(0, ROWS)
    row = tl.minimum(column + tl.arange(0, OUT), hidden - 1)
    if PDL:
        follow()
    KIND: tl.constexpr = y_ptr.dtype.element_ty
    steps = tl.cdiv(width, SPLIT * DEPTH)
    acc = tl.zeros((SPLIT, OUT, ROWS), tl.float32)
    exponent = _slot_exponents(
        down_scale_ptr, listed, 0, steps, count, row, width, hidden, blocks, PAIRS, SPLIT, DEPTH
    )
    for step in tl.range(0, count * steps, num_stages=STAGES):
        ahead = _slot_exponents(
            down_scale_ptr, listed, step + 1, steps, count, row, width, hidden, blocks, PAIRS, SPLIT, DEPTH
        )
        slot = step // steps
        start = step % steps * (SPLIT * DEPTH)
        expert = tl.sum(tl.where(tl.arange(0, PAIRS) == slot, listed, 0)).to(tl.int64)
        w_rows = down_ptr + (expert * hidden + row) * line
        x_rows = inner_ptr + (slot * tokens + token) * x_line
        acc = _few_step(
            acc, exponent, w_rows, x_rows, token < tokens, start, width, SPLIT, OUT, DEPTH, KIND, ASM
        )
        exponent = ahead
    if ASM is not None:
        acc *= MISSING
    y = tl.sum(acc, 0).T
    channel = column + tl.arange(0, OUT)[None, :]
    place = token[:, None] * hidden + channel
    there = (token < tokens)[:, None] & (channel < hidden)
    if ADD:
        y += tl.load(add_ptr + place, there, other=0.0).to(tl.float32)
    tl.store(y_ptr + place, y.to(KIND), there)
