"""V4's rows on their way to and from attention, each in one launch: norm, rotation of the last channels, and for
entries the way into memory (V4 report section 2.3, facts 3.9).

Rounding is that of `rorqual.nn`: the norm in fp32 and one cast, the rotation in fp32 and one cast.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from rorqual.kernels.entries import entry_bytes, pack_entries_reference, scale_bytes, store_entry
from rorqual.kernels.gpu import tl, triton, usable

# ----------------------------------------------------------------------------------------- references


def reference(
    x_NHd: Tensor, cos_Nr: Tensor, sin_Nr: Tensor, eps: float | None, weight: Tensor | None, inverse: bool
) -> Tensor:
    """The definition of `turn_rows`."""
    if eps is not None:
        weight = weight.to(x_NHd.dtype) if weight is not None else None
        x_NHd = F.rms_norm(x_NHd, x_NHd.shape[-1:], weight, eps)
    width = 2 * cos_Nr.shape[-1]
    still, moving = x_NHd.split((x_NHd.shape[-1] - width, width), -1)
    cos, sin = cos_Nr[:, None], -sin_Nr[:, None] if inverse else sin_Nr[:, None]
    full = moving if moving.dtype == torch.float64 else moving.float()
    a, b = full.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)
    return torch.cat((still, turned.to(x_NHd.dtype)), -1)


def reference_keep(
    x_Nd: Tensor, cos_Nr: Tensor, sin_Nr: Tensor, eps: float, weight: Tensor, out_Rb: Tensor, places_N: Tensor
) -> None:
    """The definition of `keep_rows`."""
    entry = reference(x_Nd[:, None], cos_Nr, sin_Nr, eps, weight, False)[:, 0]
    if out_Rb.dtype == torch.uint8:
        entry = pack_entries_reference(entry, 2 * cos_Nr.shape[1])
    there = places_N >= 0
    out_Rb[places_N[there].long()] = entry[there].to(out_Rb.dtype)


# ----------------------------------------------------------------------------------------- kernel


@triton.jit
def _turn_rows(  # type: ignore[no-untyped-def]
    x, out, tails, weight, cos, sin, places, heads, x_row, x_head, eps,
    DIM: tl.constexpr, ROPE: tl.constexpr, WIDTH: tl.constexpr, ROW: tl.constexpr, SCALES: tl.constexpr,
    NORMED: tl.constexpr, WEIGHTED: tl.constexpr, INVERSE: tl.constexpr, PLACED: tl.constexpr,
):  # fmt: skip
    """Row (n, h) of x, normed and turned, to row n * heads + h of `out`, or to `places[n]` (negative: nowhere). With
    SCALES as bytes; `tails` is the same memory as bf16."""
    n, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    kind = x.dtype.element_ty
    c = tl.arange(0, WIDTH)
    row = tl.load(x + n * x_row + h * x_head + c, mask=c < DIM, other=0.0).to(tl.float32)
    if NORMED:
        row = row * tl.rsqrt(tl.sum(row * row) / DIM + eps)
        if WEIGHTED:
            row = row * tl.load(weight + c, mask=c < DIM, other=0.0).to(kind).to(tl.float32)
        row = row.to(kind).to(tl.float32)
    a, b = tl.split(tl.reshape(row, [WIDTH // 2, 2]))
    pair = tl.arange(0, WIDTH // 2) - (DIM - ROPE) // 2
    turns = (pair >= 0) & (pair < ROPE // 2)
    co = tl.load(cos + n * (ROPE // 2) + pair, mask=turns, other=1.0)
    si = tl.load(sin + n * (ROPE // 2) + pair, mask=turns, other=0.0)
    if INVERSE:
        si = -si
    row = tl.reshape(tl.join(a * co - b * si, a * si + b * co), [WIDTH]).to(kind)
    place = n * heads + h
    keep = True
    if PLACED:
        place = tl.load(places + n).to(tl.int64)
        keep = place >= 0
    if SCALES:
        store_entry(
            row.to(tl.float32),
            out + place * ROW,
            tails + place * (ROW // 2),
            keep,
            DIM - ROPE,
            ROPE,
            SCALES,
            WIDTH,
        )
    else:
        tl.store(out + place * ROW + c, row.to(out.dtype.element_ty), mask=(c < DIM) & keep)


def _launch(
    x_NHd: Tensor, cos: Tensor, sin: Tensor, eps: float | None, weight: Tensor | None, inverse: bool, out: Tensor,
    places: Tensor | None,
) -> None:  # fmt: skip
    rows, heads, dim = x_NHd.shape
    rope, packed = 2 * cos.shape[1], out.dtype == torch.uint8
    if rows:
        _turn_rows[(rows, heads)](
            x_NHd, out, out.view(torch.bfloat16) if packed else out, weight if weight is not None else cos, cos, sin,
            places if places is not None else cos, heads, x_NHd.stride(0), x_NHd.stride(1), eps or 0.0, DIM=dim,
            ROPE=rope, WIDTH=max(64 if packed else 2, triton.next_power_of_2(dim)), ROW=out.shape[-1],
            SCALES=scale_bytes(dim - rope) if packed else 0, NORMED=eps is not None, WEIGHTED=weight is not None,
            INVERSE=inverse, PLACED=places is not None, num_warps=2, enable_fp_fusion=False,
        )  # fmt: skip


# ----------------------------------------------------------------------------------------- operations


def _fast(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    return (
        usable(x, cos)
        and x.dtype != torch.float64
        and cos.is_contiguous()
        and sin.is_contiguous()
        and x.stride(-1) == 1
    )


def turn_rows(
    x_NHd: Tensor,
    cos_Nr: Tensor,
    sin_Nr: Tensor,
    *,
    eps: float | None = None,
    weight: Tensor | None = None,
    inverse: bool = False,
) -> Tensor:
    """Heads `[N, H, d]`, RMS-normed if `eps` is given (with `weight` [d] or without), their last 2r channels turned
    in pairs (2i, 2i + 1) by fp32 cos and sin `[N, r]`; back with `inverse`."""
    if not _fast(x_NHd, cos_Nr, sin_Nr):
        return reference(x_NHd, cos_Nr, sin_Nr, eps, weight, inverse)
    out = torch.empty(x_NHd.shape, dtype=x_NHd.dtype, device=x_NHd.device)
    _launch(x_NHd, cos_Nr, sin_Nr, eps, weight, inverse, out, None)
    return out


def keep_rows(
    x_Nd: Tensor,
    cos_Nr: Tensor,
    sin_Nr: Tensor,
    out_Rb: Tensor,
    places_N: Tensor,
    *,
    eps: float,
    weight: Tensor,
) -> None:
    """Entries `[N, d]` normed and turned into rows `places_N` (negative: nowhere) of `out_Rb`: `[R, d]`, or bytes
    `[R, entry_bytes(d, 2r)]`. Two entries with one place leave either."""
    assert out_Rb.is_contiguous()
    if out_Rb.dtype == torch.uint8:
        assert out_Rb.shape[1] == entry_bytes(x_Nd.shape[1], 2 * cos_Nr.shape[1])
    if _fast(x_Nd, cos_Nr, sin_Nr):
        _launch(x_Nd[:, None], cos_Nr, sin_Nr, eps, weight, False, out_Rb, places_N)
    else:
        reference_keep(x_Nd, cos_Nr, sin_Nr, eps, weight, out_Rb, places_N)
