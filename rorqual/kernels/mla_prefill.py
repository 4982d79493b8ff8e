"""Attention of whole prompts, or chunks of them, over expanded MLA keys and values (V2 report section 2.1).

Keys and values of every head are made from the latents beforehand; the rotary key is one for all heads and is
never copied out to them. Sequences lie end to end ("varlen"), each with a prefix that is already in the cache:
its queries are the last of its keys, and see what is not after them. `gather_latents` copies the latents of
such sequences out of cache pages into one tensor, from which keys and values are then made.

Key tiles start at key 0 of a sequence and have one size, and a query meets them one by one: masked ones change
no bit of it. So what a query gets does not depend on how a prompt is cut into chunks, as long as one kernel
with one key tile runs, which `fixed` asks for.
"""

import math
from typing import Any

import torch
from torch import Tensor

from rorqual.kernels import mla_prefill_gluon
from rorqual.kernels.gpu import tl, triton, usable
from rorqual.kernels.quant import FP8

LOG2_E = math.log2(math.e)
FP8_GROUP = 128
"""Latent codes that share one scale in FP8 pages."""


# ------------------------------------------------------------------------------------------- attention


def reference(
    q_NHd: Tensor,
    k_MHn: Tensor,
    rope_Mr: Tensor,
    v_MHv: Tensor,
    starts_q: Tensor,
    starts_k: Tensor,
    *,
    max_q: int,
    max_k: int,
    scale: float,
    fixed: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """The definition of `mla_prefill`, one sequence after the other in fp32 (or fp64 if q is)."""
    compute = torch.float64 if q_NHd.dtype == torch.float64 else torch.float32
    heads = q_NHd.shape[1]
    o_NHv = q_NHd.new_zeros(*q_NHd.shape[:2], v_MHv.shape[-1]) if out is None else out
    queries, keys = starts_q.tolist(), starts_k.tolist()
    for s in range(len(queries) - 1):
        span, seen = slice(queries[s], queries[s + 1]), slice(keys[s], keys[s + 1])
        n, m = span.stop - span.start, seen.stop - seen.start
        if not n:
            continue
        k_mHd = torch.cat((k_MHn[seen], rope_Mr[seen, None].expand(-1, heads, -1)), -1).to(compute)
        score_Hnm = torch.einsum("nhd,mhd->hnm", q_NHd[span].to(compute), k_mHd) * scale
        place = torch.arange(m, device=q_NHd.device)
        hidden_nm = place > place[m - n :, None]
        weight_Hnm = score_Hnm.masked_fill(hidden_nm, float("-inf")).softmax(-1)
        o_NHv[span] = torch.einsum("hnm,mhv->nhv", weight_Hnm, v_MHv[seen].to(compute)).to(o_NHv.dtype)
    return o_NHv


@triton.jit
def _tile(  # type: ignore[no-untyped-def]
    acc, top, total, q, q_rope, k, rope, v, start, limit, place, k_m, r_m, v_m, factor,
    NOPE: tl.constexpr, ROPE: tl.constexpr, V: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Queries meet the BLOCK_N keys from `start` on: the softmax state `acc` [M, V], `top`, `total` [M] moves
    on, `top` in powers of two. Every product is an explicit fma, so that both forms of the loop round alike."""
    n = start + tl.arange(0, BLOCK_N)
    m = n.to(tl.int64)[:, None]
    k_ptr = k + m * k_m + tl.arange(0, NOPE)[None, :]
    r_ptr = rope + m * r_m + tl.arange(0, ROPE)[None, :]
    v_ptr = v + m * v_m + tl.arange(0, V)[None, :]
    if MASKED:
        inside = (n < limit)[:, None]
        key = tl.load(k_ptr, mask=inside, other=0.0)
        key_rope = tl.load(r_ptr, mask=inside, other=0.0)
        value = tl.load(v_ptr, mask=inside, other=0.0)
    else:
        key = tl.load(k_ptr)
        key_rope = tl.load(r_ptr)
        value = tl.load(v_ptr)
    score = tl.dot(q, tl.trans(key), input_precision=PRECISION)
    score = tl.dot(q_rope, tl.trans(key_rope), score, input_precision=PRECISION)
    if MASKED:
        score = tl.where(place[:, None] >= n[None, :], score, float("-inf"))
    higher = tl.maximum(top, tl.max(score, 1) * factor)
    weight = tl.exp2(tl.fma(score, tl.full(score.shape, factor, tl.float32), -higher[:, None]))
    fade = tl.exp2(top - higher)
    total = tl.fma(total, fade, tl.sum(weight, 1))
    acc = acc * fade[:, None]
    acc = tl.dot(weight.to(value.dtype), value, acc, input_precision=PRECISION)
    return acc, higher, total


@triton.jit(do_not_specialize=("blocks",))
def _prefill(  # type: ignore[no-untyped-def]
    q, k, rope, v, o, starts_q, starts_k, factor, q_n, q_h, k_m, k_h, r_m, v_m, v_h, o_n, o_h, heads, blocks,
    NOPE: tl.constexpr, ROPE: tl.constexpr, V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One head of one sequence and BLOCK_M of its queries; the latest queries, which see most, come first."""
    item = tl.program_id(0)
    block = blocks - 1 - item % blocks
    head = (item // blocks) % heads
    s = item // (blocks * heads)
    q0, k0 = tl.load(starts_q + s), tl.load(starts_k + s)
    queries = tl.load(starts_q + s + 1) - q0
    keys = tl.load(starts_k + s + 1) - k0
    first = block * BLOCK_M
    if first >= queries:
        return
    row = first + tl.arange(0, BLOCK_M)
    real = (row < queries)[:, None]
    place = keys - queries + row
    q_ptr = q + (q0 + first).to(tl.int64) * q_n + head * q_h + tl.arange(0, BLOCK_M)[:, None] * q_n
    query = tl.load(q_ptr + tl.arange(0, NOPE)[None, :], mask=real, other=0.0)
    query_rope = tl.load(q_ptr + NOPE + tl.arange(0, ROPE)[None, :], mask=real, other=0.0)
    k += k0.to(tl.int64) * k_m + head * k_h
    v += k0.to(tl.int64) * v_m + head * v_h
    rope += k0.to(tl.int64) * r_m
    end = tl.minimum(keys - queries + first + BLOCK_M, keys)
    whole = (keys - queries + first + 1) // BLOCK_N * BLOCK_N  # every query here sees all of these keys

    acc = tl.zeros([BLOCK_M, V], tl.float32)
    # Lowest finite number, not -inf: a fade of exp2(-inf + inf) would be NaN.
    top = tl.full([BLOCK_M], -1e30, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for start in tl.range(0, whole, BLOCK_N):
        acc, top, total = _tile(
            acc, top, total, query, query_rope, k, rope, v, start, keys, place, k_m, r_m, v_m, factor,
            NOPE, ROPE, V, BLOCK_N, False, PRECISION,
        )  # fmt: skip
    for start in tl.range(whole, end, BLOCK_N):
        acc, top, total = _tile(
            acc, top, total, query, query_rope, k, rope, v, start, keys, place, k_m, r_m, v_m, factor,
            NOPE, ROPE, V, BLOCK_N, True, PRECISION,
        )  # fmt: skip
    acc = acc / total[:, None]
    o_ptr = o + (q0 + first).to(tl.int64) * o_n + head * o_h + tl.arange(0, BLOCK_M)[:, None] * o_n
    tl.store(o_ptr + tl.arange(0, V)[None, :], acc.to(o.dtype.element_ty), mask=real)


def fast(
    q_NHd: Tensor,
    k_MHn: Tensor,
    rope_Mr: Tensor,
    v_MHv: Tensor,
    starts_q: Tensor,
    starts_k: Tensor,
    *,
    max_q: int,
    max_k: int,
    scale: float,
    fixed: bool = False,
    out: Tensor | None = None,
    tiles: tuple[int, int, int, int] | None = None,
) -> Tensor:
    """`mla_prefill` in plain Triton. `tiles`: queries and keys of a tile, warps, stages, for measuring."""
    (N, H, _), nope, rope, width = q_NHd.shape, k_MHn.shape[-1], rope_Mr.shape[-1], v_MHv.shape[-1]
    o_NHv = q_NHd.new_empty(N, H, width) if out is None else out
    S = starts_q.numel() - 1
    if not o_NHv.numel() or S < 1 or max_q < 1:
        return o_NHv
    block_m, block_n, warps, stages = tiles or _tiles(q_NHd.dtype, nope + rope, max_q, fixed)
    blocks = triton.cdiv(max_q, block_m)
    _prefill[(S * H * blocks,)](
        q_NHd, k_MHn, rope_Mr, v_MHv, o_NHv, starts_q, starts_k, scale * LOG2_E,
        q_NHd.stride(0), q_NHd.stride(1), k_MHn.stride(0), k_MHn.stride(1), rope_Mr.stride(0),
        v_MHv.stride(0), v_MHv.stride(1), o_NHv.stride(0), o_NHv.stride(1), H, blocks,
        NOPE=nope, ROPE=rope, V=width, BLOCK_M=block_m, BLOCK_N=block_n,
        PRECISION="ieee" if q_NHd.dtype == torch.float32 else "tf32", num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return o_NHv


def _tiles(dtype: torch.dtype, width: int, max_q: int, fixed: bool) -> tuple[int, int, int, int]:
    if dtype == torch.float32:  # no tensor cores for exact fp32: what shared memory holds
        return 32, 32, 4, 2
    if max_q <= 64 and not fixed:
        return 64, 64, 4, 3
    return 128, 64, 8, 3


def supported(q_NHd: Tensor, k_MHn: Tensor, rope_Mr: Tensor, v_MHv: Tensor) -> bool:
    """Whether `fast` takes these: bf16, fp16 or fp32, head parts powers of two from 16 to 256, last axes
    contiguous."""
    tensors = (q_NHd, k_MHn, rope_Mr, v_MHv)
    return (
        q_NHd.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and all(t.dtype == q_NHd.dtype and t.stride(-1) == 1 for t in tensors)
        and all(16 <= w <= 256 and w & (w - 1) == 0 for w in (t.shape[-1] for t in tensors[1:]))
    )


def mla_prefill(
    q_NHd: Tensor,
    k_MHn: Tensor,
    rope_Mr: Tensor,
    v_MHv: Tensor,
    starts_q: Tensor,
    starts_k: Tensor,
    *,
    max_q: int,
    max_k: int,
    scale: float,
    fixed: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Causal attention of sequences laid end to end, each query among the last of its sequence's keys.

    q `[N, H, nope + rope]`; k `[M, H, nope]` and v `[M, H, v]` may be strided views of one tensor; rope
    `[M, rope]` is the rotary key of all heads. `starts_q`, `starts_k` int32 `[S + 1]` on the device: sequence s
    has queries `starts_q[s]` to `starts_q[s + 1]`, which are the last of keys `starts_k[s]` to
    `starts_k[s + 1]`. `max_q` and `max_k` bound their numbers (rows beyond a `max_q` too small are not written).
    Scores are multiplied by `scale`. Rows of q outside every sequence give rows nobody wrote; all rows of v must be
    finite, those outside too. `fixed`: tiles don't depend on shapes, so a query's bits depend on its own keys and
    values alone. -> `[N, H, v]` in q's dtype, `out` if that is given.
    Raises ValueError if shapes don't belong together.
    """
    H, rope = q_NHd.shape[1], rope_Mr.shape[-1]
    if (
        k_MHn.shape[:2] != v_MHv.shape[:2]
        or k_MHn.shape[:2] != (rope_Mr.shape[0], H)
        or q_NHd.shape[2] != k_MHn.shape[2] + rope
        or starts_q.shape != starts_k.shape
    ):
        raise ValueError(
            f"queries {tuple(q_NHd.shape)} in {tuple(starts_q.shape)} starts don't fit keys {tuple(k_MHn.shape)}, "
            f"rotary keys {tuple(rope_Mr.shape)}, values {tuple(v_MHv.shape)} in {tuple(starts_k.shape)} starts"
        )
    form = reference
    if usable(q_NHd, k_MHn, rope_Mr, v_MHv) and supported(q_NHd, k_MHn, rope_Mr, v_MHv):
        form = fast
        if mla_prefill_gluon.supported(q_NHd, k_MHn, rope_Mr, v_MHv) and (fixed or max_q > 64):
            form = mla_prefill_gluon.fast
    return form(
        q_NHd,
        k_MHn,
        rope_Mr,
        v_MHv,
        starts_q,
        starts_k,
        max_q=max_q,
        max_k=max_k,
        scale=scale,
        fixed=fixed,
        out=out,
    )


# --------------------------------------------------------------------------------- latents out of pages


def split_fp8_pages(pages_PTC: Tensor, rank: int, rope: int) -> tuple[Tensor, Tensor, Tensor]:
    """uint8 pages `[P, T, rank + rank / 128 * 4 + 2 * rope]` -> views of their E4M3 codes `[P, T, rank]`, fp32
    scales `[P, T, rank / 128]` and bf16 rotary keys `[P, T, rope]`."""
    groups = rank // FP8_GROUP
    if rank % FP8_GROUP or pages_PTC.shape[-1] != rank + 4 * groups + 2 * rope:
        raise ValueError(
            f"FP8 pages {tuple(pages_PTC.shape)} don't hold a latent of {rank} and a key of {rope}"
        )
    codes = pages_PTC[..., :rank].view(FP8)
    scales = pages_PTC[..., rank : rank + 4 * groups].view(torch.float32)
    return codes, scales, pages_PTC[..., rank + 4 * groups :].view(torch.bfloat16)


def decode_pages(pages_PTC: Tensor, rank: int, rope: int) -> Tensor:
    """FP8 pages as bf16 `[P, T, rank + rope]`: code times scale in fp32, rounded once."""
    codes, scales, rotary = split_fp8_pages(pages_PTC, rank, rope)
    latent = codes.float().unflatten(-1, (-1, FP8_GROUP)) * scales[..., None]
    return torch.cat((latent.flatten(-2).bfloat16(), rotary), -1)


def gather_reference(
    pages_PTC: Tensor, table_SB: Tensor, starts_k: Tensor, *, total: int, rank: int = 512, rope: int = 64
) -> Tensor:
    """The definition of `gather_latents`."""
    page_size = pages_PTC.shape[1]
    if pages_PTC.dtype == torch.uint8:
        pages_PTC = decode_pages(pages_PTC, rank, rope)
    latent_MC = pages_PTC.new_zeros(total, pages_PTC.shape[-1])
    starts = starts_k.tolist()
    for s in range(len(starts) - 1):
        place = torch.arange(starts[s + 1] - starts[s], device=pages_PTC.device)
        latent_MC[starts[s] : starts[s + 1]] = pages_PTC[
            table_SB[s, place // page_size].long(), place % page_size
        ]
    return latent_MC


@triton.jit(
    do_not_specialize=("total", "sequences", "table_s"), do_not_specialize_on_alignment=("table", "starts")
)
def _gather(  # type: ignore[no-untyped-def]
    pages, scales, rest, table, starts, out, total, sequences, table_s, p_p, p_t, s_p, s_t, r_p, r_t, out_m,
    PAGE: tl.constexpr, FIRST: tl.constexpr, FIRST_P: tl.constexpr, REST: tl.constexpr, REST_P: tl.constexpr,
    ROWS: tl.constexpr, QUANTIZED: tl.constexpr,
):  # fmt: skip
    """Block `program_id(0)` of sequence `program_id(1)`, a page of it at most: FIRST channels, times their scales if
    QUANTIZED, and the REST. The programs of a sequence that is not there write the rows behind the last one."""
    s = tl.program_id(1)
    first = tl.load(starts + s)
    begin = first + tl.program_id(0) * PAGE
    column = tl.arange(0, FIRST_P)[None, :]
    behind = tl.arange(0, REST_P)[None, :]
    if s < sequences:
        end = tl.load(starts + s + 1)
        if begin < end:
            page = tl.load(table + s * table_s + tl.program_id(0)).to(tl.int64)
            for start in tl.static_range(0, PAGE, ROWS):
                place = start + tl.arange(0, ROWS)[:, None]
                real = (place < PAGE) & (begin + place < end)  # pages may be smaller than ROWS
                mask = real & (column < FIRST)
                row = tl.load(pages + page * p_p + place * p_t + column, mask=mask, other=0.0)
                if QUANTIZED:
                    scale = scales + page * s_p + place * s_t + column // 128
                    row = row.to(tl.float32) * tl.load(scale, mask=mask, other=0.0)
                to = out + (begin + place).to(tl.int64) * out_m
                tl.store(to + column, row.to(out.dtype.element_ty), mask=mask)
                if REST > 0:
                    mask = real & (behind < REST)
                    row = tl.load(rest + page * r_p + place * r_t + behind, mask=mask, other=0.0)
                    tl.store(to + FIRST + behind, row, mask=mask)
    else:
        for start in tl.range(begin, total, tl.num_programs(0) * PAGE):
            for part in tl.static_range(0, PAGE, ROWS):
                place = start + part + tl.arange(0, ROWS)[:, None]
                to = out + place.to(tl.int64) * out_m
                nothing = tl.zeros([ROWS, FIRST_P], out.dtype.element_ty)
                tl.store(to + column, nothing, mask=(place < total) & (column < FIRST))
                if REST > 0:
                    nothing = tl.zeros([ROWS, REST_P], out.dtype.element_ty)
                    tl.store(to + FIRST + behind, nothing, mask=(place < total) & (behind < REST))


def gather_fast(
    pages_PTC: Tensor, table_SB: Tensor, starts_k: Tensor, *, total: int, rank: int = 512, rope: int = 64
) -> Tensor:
    """`gather_latents` in Triton."""
    quantized, page_size = pages_PTC.dtype == torch.uint8, pages_PTC.shape[1]
    if quantized:
        held, scales, rest = split_fp8_pages(pages_PTC, rank, rope)
        first, width, dtype = rank, rank + rope, torch.bfloat16
    else:
        width, dtype = pages_PTC.shape[-1], pages_PTC.dtype
        first = 2 ** (width.bit_length() - 1)  # 576 as 512 and 64, so that no lane idles
        held, scales, rest = pages_PTC, pages_PTC, pages_PTC[..., first:]
    latent_MC = torch.empty(total, width, dtype=dtype, device=pages_PTC.device)
    sequences = starts_k.numel() - 1
    blocks = min(table_SB.shape[1], triton.cdiv(total, page_size))
    if not total:
        return latent_MC
    if sequences < 1 or not blocks:
        return latent_MC.zero_()
    _gather[(blocks, sequences + 1)](
        held, scales, rest, table_SB, starts_k, latent_MC, total, sequences, table_SB.stride(0), held.stride(0),
        held.stride(1), scales.stride(0), scales.stride(1), rest.stride(0), rest.stride(1), latent_MC.stride(0),
        PAGE=page_size, FIRST=first, FIRST_P=triton.next_power_of_2(first), REST=width - first,
        REST_P=triton.next_power_of_2(max(1, width - first)), ROWS=16, QUANTIZED=quantized, num_warps=4,
    )  # fmt: skip
    return latent_MC


def gather_latents(
    pages_PTC: Tensor, table_SB: Tensor, starts_k: Tensor, *, total: int, rank: int = 512, rope: int = 64
) -> Tensor:
    """The latents of every sequence, all its positions, out of cache pages into one tensor `[total, C]`.

    Sequence s fills rows `starts_k[s]` to `starts_k[s + 1]` (int32 `[S + 1]`, on the device) from the pages
    `table_SB[s]`; rows past the last are zero. Pages are `[P, T, C]` in a float type, or uint8
    `[P, T, rank + rank / 128 * 4 + 2 * rope]` with E4M3 codes, an fp32 scale for each 128 of them and the
    rotary key in bf16, which come out as bf16 with C = rank + rope. `rank` and `rope` are read for those only.
    Raises ValueError if uint8 pages have another width.
    """
    form: Any = gather_fast if usable(pages_PTC, table_SB, starts_k) else gather_reference
    return form(pages_PTC, table_SB, starts_k, total=total, rank=rank, rope=rope)
