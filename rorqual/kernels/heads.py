"""The two products by head of absorbed attention (V2 report section 2.1, appendix C; facts 3.1): queries into latent
space (W_UK) and attended latents into value space (W_UV), on views of the one kv_b weight, bf16 or FP8 codes with
128x128 scales.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
from torch import Tensor

from rorqual.kernels.gpu import tl, triton, usable
from rorqual.kernels.mode import by_fixed_kernels
from rorqual.kernels.quant import E8M0, FP8
from rorqual.kernels.skinny import await_inputs, launching, release

BLOCK = 128
"""Rows and columns of weight codes that share a scale."""


@triton.jit(do_not_specialize=["rows"])
def by_head(
    x, w, scale, y, rows, outer, x_row, x_head, w_head, w_inner, w_outer, y_row, y_head,
    head_rows, first, s_row,
    INNER: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, UP: tl.constexpr,
    CODES: tl.constexpr, POWERS: tl.constexpr, STAGES: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """y[n, h, m] = sum over k of x[n, h, k] w[h, k, m]. CODES: w holds E4M3, multiplied out as it is read;
    columns of scale blocks lie along m if UP (a tile is in one), else along k."""
    release(AHEAD)
    head = tl.program_id(1).to(tl.int64)
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(2) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    x_at = x + head * x_head + n.to(tl.int64)[:, None] * x_row + k[None, :]
    w_at = w + head * w_head + k[:, None] * w_inner + m[None, :] * w_outer
    acc = tl.zeros((BN, BM), tl.float32)
    if INNER > BK:
        await_inputs(AHEAD)
    for step in tl.range(0, (INNER + BK - 1) // BK, num_stages=STAGES):
        start = step * BK
        live = start + k < INNER
        tile = tl.load(w_at, mask=live[:, None] & (m < outer)[None, :], other=0.0)
        if INNER <= BK:
            await_inputs(AHEAD)
        part = tl.load(x_at, mask=(n < rows)[:, None] & live[None, :], other=0.0)
        if CODES:
            if UP:
                line = tl.minimum(start + k, INNER - 1)[:, None]
                column = tl.program_id(0) * BM // 128
            else:
                line = tl.minimum(m, outer - 1)[None, :]
                column = tl.minimum(start + k, INNER - 1)[:, None] // 128 if BK > 128 else start // 128
            by = tl.load(scale + (head * head_rows + first + line) // 128 * s_row + column)
            if POWERS:
                bits = tl.where(by == 0, 0x00400000, by.to(tl.int32) << 23)
                by = tl.where(by == 255, float("nan"), bits.to(tl.float32, bitcast=True))
            tile = (tile.to(tl.float32) * by).to(x.dtype.element_ty)
        acc = tl.dot(part, tile, acc, input_precision="ieee")
        x_at += BK
        w_at += BK * w_inner
    inside = (n < rows)[:, None] & (m < outer)[None, :]
    y_at = y + head * y_head + n.to(tl.int64)[:, None] * y_row + m[None, :]
    tl.store(y_at, acc.to(y.dtype.element_ty), mask=inside)


def heads_reference(
    x_NHK: Tensor,
    w_HRC: Tensor,
    up: bool,
    out: Tensor | None = None,
    scale: Tensor | None = None,
    first: int = 0,
) -> Tensor:
    """`heads_up` (`up`) or `heads_down` in PyTorch; FP8 codes are multiplied out to x's type first."""
    if scale is not None:
        heads, rows, columns = w_HRC.shape
        line = torch.arange(heads, device=scale.device)[:, None] * (w_HRC.stride(0) // w_HRC.stride(1))
        line = (line + first + torch.arange(rows, device=scale.device)) // BLOCK
        column = torch.arange(columns, device=scale.device) // BLOCK
        w_HRC = (w_HRC.float() * scale.float()[line][..., column]).to(x_NHK.dtype)
    w_HKM = w_HRC if up else w_HRC.transpose(1, 2)
    if out is None:
        return torch.bmm(x_NHK.transpose(0, 1), w_HKM).transpose(0, 1)
    torch.bmm(x_NHK.transpose(0, 1), w_HKM, out=out.transpose(0, 1))
    return out


def heads_plan(rows: int, heads: int, up: bool, codes: bool) -> dict[str, int]:
    """How a product by head is cut. Depends on the shape alone."""
    many = heads >= 64
    if rows <= 16 and codes:
        return {"BN": 16, "BM": 64, "BK": 128, "STAGES": 3, "num_warps": 4}
    if rows <= 16 and (up or many):
        return {"BN": 16, "BM": 64 if many else 32, "BK": 128, "STAGES": 3, "num_warps": 2 if many else 1}
    if rows <= 16:
        return {"BN": 16, "BM": 32, "BK": 256, "STAGES": 3, "num_warps": 1}
    if rows <= 64:
        return {"BN": 64, "BM": 64, "BK": 128, "STAGES": 3, "num_warps": 4}
    return {"BN": 128, "BM": 128, "BK": 128, "STAGES": 3, "num_warps": 8}


def heads_fast(
    x_NHK: Tensor,
    w_HRC: Tensor,
    up: bool,
    out: Tensor | None = None,
    scale: Tensor | None = None,
    first: int = 0,
    ahead: bool = False,
    how: dict[str, int] | None = None,
) -> Tensor:
    """`heads_reference` by the kernel above. `how` replaces `heads_plan`."""
    (rows, heads, inner), outer = x_NHK.shape, w_HRC.shape[2 if up else 1]
    if out is None:
        out = x_NHK.new_empty(rows, heads, outer)
    how = dict(how or heads_plan(rows, heads, up, scale is not None))
    how["BK"] = min(how["BK"], max(16, triton.next_power_of_2(inner)))
    powers = scale is not None and scale.dtype == E8M0
    by_head[(triton.cdiv(outer, how["BM"]), heads, triton.cdiv(rows, how["BN"]))](
        x_NHK, w_HRC, scale.view(torch.uint8) if powers and scale is not None else scale, out,
        rows, outer, x_NHK.stride(0), x_NHK.stride(1),
        w_HRC.stride(0), w_HRC.stride(1 if up else 2), w_HRC.stride(2 if up else 1),
        out.stride(0), out.stride(1), w_HRC.stride(0) // w_HRC.stride(1), first,
        scale.stride(0) if scale is not None else 0,
        INNER=inner, UP=up, CODES=scale is not None, POWERS=powers, **how,
        **launching(ahead and x_NHK.is_cuda),
    )  # fmt: skip
    return out


def heads_fixed(
    x_NHK: Tensor,
    w_HRC: Tensor,
    up: bool,
    out: Tensor | None = None,
    scale: Tensor | None = None,
    first: int = 0,
) -> Tensor:
    """`heads_reference` so that a row's bits depend on that row alone. bf16 tiles may differ by the number of rows,
    as in `rorqual.kernels.fixed`; codes and fp32 have one tile each."""
    half = x_NHK.dtype in (torch.bfloat16, torch.float16)
    kept = x_NHK.dtype if scale is None else FP8
    if (half or x_NHK.dtype == torch.float32) and w_HRC.dtype == kept and w_HRC.stride(-1) == 1:
        if not len(x_NHK):
            return x_NHK.new_empty(0, x_NHK.shape[1], w_HRC.shape[2 if up else 1]) if out is None else out
        x_NHK = x_NHK if x_NHK.stride(-1) == 1 else x_NHK.contiguous()
        how = None if half else {"BN": 16, "BM": 32, "BK": 32, "STAGES": 2, "num_warps": 4}
        if (
            half and scale is not None
        ):  # tiles of 16 rows meet codes in another order of channels than larger ones
            how = {"BN": 64, "BM": 64, "BK": 128, "STAGES": 3, "num_warps": 4}
        return heads_fast(x_NHK, w_HRC, up, out, scale, first, how=how)
    rows = [heads_reference(x, w_HRC, up, None, scale, first) for x in x_NHK.split(1)]
    y = torch.cat(rows) if rows else x_NHK.new_empty(0, x_NHK.shape[1], w_HRC.shape[2 if up else 1])
    return y if out is None else out.copy_(y)


def heads_up(
    q_NHd: Tensor,
    w_HdC: Tensor,
    out: Tensor | None = None,
    scale: Tensor | None = None,
    first: int = 0,
    ahead: bool = False,
) -> Tensor:
    """Each head's queries `[N, H, d]` times its W_UK `[H, d, C]`: `[N, H, C]`, into `out` if given.

    All three may be views with any row and head strides. With `scale` `[ceil(H R / 128), ceil(C / 128)]`
    (fp32 or float8_e8m0fnu) the weight is a view of E4M3 codes `[H, R, C]` beginning `first` rows into each
    head's R. `ahead` as for `skinny`.
    """
    if by_fixed_kernels(q_NHd, w_HdC):
        return heads_fixed(q_NHd, w_HdC, True, out, scale, first)
    if _heads_fit(q_NHd, w_HdC, scale, ahead):
        return heads_fast(q_NHd, w_HdC, True, out, scale, first, ahead)
    return heads_reference(q_NHd, w_HdC, True, out, scale, first)


def heads_down(
    u_NHC: Tensor,
    w_HvC: Tensor,
    out: Tensor | None = None,
    scale: Tensor | None = None,
    first: int = 0,
    ahead: bool = False,
) -> Tensor:
    """Each head's attended latents `[N, H, C]` times its W_UV `[H, v, C]`: `[N, H, v]`. As `heads_up`; for a
    kv_b weight of codes, `first` is the width of the keys before the values."""
    if by_fixed_kernels(u_NHC, w_HvC):
        return heads_fixed(u_NHC, w_HvC, False, out, scale, first)
    if _heads_fit(u_NHC, w_HvC, scale, ahead):
        return heads_fast(u_NHC, w_HvC, False, out, scale, first, ahead)
    return heads_reference(u_NHC, w_HvC, False, out, scale, first)


def _heads_fit(x: Tensor, w: Tensor, scale: Tensor | None, ahead: bool) -> bool:
    """Whether the kernel takes these, and is not behind PyTorch's batched product: that wins from some rows on,
    and can't run ahead nor read codes."""
    return (
        usable(x, w)
        and not torch.is_grad_enabled()
        and x.shape[0] > 0
        and x.dtype == torch.bfloat16
        and w.dtype == (x.dtype if scale is None else FP8)
        and x.stride(-1) == w.stride(-1) == 1
        and (scale is not None or x.shape[0] <= (64 if ahead else 4))
    )
