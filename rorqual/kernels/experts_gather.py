"""Rows of x into the experts' order, as codes, where one launch has sorted the pairs (`experts_triton.sort_kernel`)."""

# mypy: disable-error-code="no-untyped-def"

from rorqual.kernels.experts_triton import follow, to_fp8
from rorqual.kernels.gpu import tl, triton


@triton.jit(do_not_specialize=["pairs", "tokens"])
def gather_kernel(
    x_ptr, order_ptr, codes_ptr, scales_ptr, taken_ptr, pairs, tokens, hidden, K: tl.constexpr, GROUPS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """codes `[pairs + tokens, D]` and scales `[.., D / 128]` of rows of x `[N, D]`: by place in `order`, then by token.
    A program has a row and `GROUPS` * 128 channels; `taken` `[2]` int32 is zeroed for the products. Places that no
    pair has get some row."""
    if PDL:
        follow()
    row = tl.program_id(0)
    if (row == 0) & (tl.program_id(1) == 0):
        tl.store(taken_ptr + tl.arange(0, 2), tl.zeros((2,), tl.int32))
    token = row - pairs
    if row < pairs:
        pair = tl.load(order_ptr + row)
        token = tl.minimum(tl.maximum(pair, 0), pairs - 1) // K
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    blocks = hidden // 128
    inside = (group < blocks)[:, None]
    channel = group[:, None] * 128 + tl.arange(0, 128)[None, :]
    x = tl.load(x_ptr + token.to(tl.int64) * hidden + channel, inside, other=0.0)
    codes, scale = to_fp8(x.to(tl.float32))
    tl.store(codes_ptr + row.to(tl.int64) * hidden + channel, codes, inside)
    tl.store(scales_ptr + row.to(tl.int64) * blocks + group, scale, group < blocks)
