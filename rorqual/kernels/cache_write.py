"""What stands between the attention's projections and its products, in one launch: norms, rotation, pages.

MLA (V2 report section 2.1.2): the latent is normed, the shared key's rotary channels are turned, and both
go to the token's slot; every head's rotary query is turned where it stands. GQA: queries and keys are normed
(if the model does so) and turned, keys and values go to their slots. A token's slot is page * page_size +
offset; a negative slot is a token that nothing is kept of.

Pages of bytes hold the latent as FP8 (V3.2's released layout, 656 bytes for 512 + 64 channels): E4M3 codes,
one fp32 scale for every 128 of them, then the rotary channels in bf16. Rounding is that of `rorqual.nn`:
norm and rotation in fp32, one cast each, without fused multiply-adds. A token is worked in tiles that depend
on the geometry alone, so its bits do not depend on the tokens beside it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from rorqual.kernels.fuse import FLOATS, chained
from rorqual.kernels.gpu import tl, triton, usable

FP8_BLOCK = 128
FP8_MAX = 448.0
FP8_FLOOR = 1e-4
TILE = 2048
"""Numbers of queries or keys a program turns, about."""
WARPS = 4


def mla_bytes(rank: int, rope: int) -> int:
    """Bytes of a token in FP8 pages."""
    return rank + 4 * (rank // FP8_BLOCK) + 2 * rope


# ----------------------------------------------------------------------------------------- references


def turned(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """The last axis of x turned by cos and sin (half as wide, fp32): pairs (2i, 2i+1) if `interleaved`,
    else (i, i + half)."""
    full = x.float()
    if interleaved:
        a, b = full.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2).to(x.dtype)
    a, b = full.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


def fp8_entry(entry_NC: Tensor, rank: int) -> Tensor:
    """Latents and rotary keys `[N, rank + rope]` as the bytes of FP8 pages, `[N, mla_bytes]` uint8."""
    latent = entry_NC[:, :rank].float().unflatten(-1, (-1, FP8_BLOCK))
    scale = latent.abs().amax(-1, keepdim=True).clamp(min=FP8_FLOOR) / FP8_MAX
    codes = (latent / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).flatten(-2)
    rope = entry_NC[:, rank:].bfloat16().contiguous()
    return torch.cat([part.view(torch.uint8) for part in (codes, scale.squeeze(-1), rope)], -1)


def write_rows_reference(x_NW: Tensor, pages_RW: Tensor, slots_N: Tensor) -> None:
    """Row n of x to row `slots_N[n]` of the pages; a negative slot writes nothing."""
    kept = slots_N >= 0
    pages_RW[slots_N[kept].long()] = x_NW[kept].to(pages_RW.dtype)


def _put(x: Tensor, pages: Tensor, slots_N: Tensor) -> None:
    """`write_rows_reference` for pages `[P, T, ...]` of any strides."""
    kept = slots_N >= 0
    slot = slots_N[kept].long()
    pages[slot // pages.shape[1], slot % pages.shape[1]] = x[kept].to(pages.dtype)


def mla_write_reference(
    kv_NC: Tensor, norm_weight: Tensor, eps: float, cos_NR: Tensor, sin_NR: Tensor,
    q_rope_NHR: Tensor | None, pages_PTC: Tensor, slots_N: Tensor, *, rank: int, interleaved: bool,
    q_out_NHC: Tensor | None = None, index: tuple[Tensor, Tensor] | None = None,
) -> None:  # fmt: skip
    """The definition of `mla_write`."""
    latent = F.rms_norm(kv_NC[:, :rank], (rank,), norm_weight.to(kv_NC.dtype), eps)
    rope = turned(kv_NC[:, rank:], cos_NR, sin_NR, interleaved)
    entry_NC = torch.cat((latent, rope), -1)
    _put(fp8_entry(entry_NC, rank) if pages_PTC.dtype == torch.uint8 else entry_NC, pages_PTC, slots_N)
    if index is not None:
        _put(index[0], index[1], slots_N)
    if q_rope_NHR is not None:
        out = q_rope_NHR if q_out_NHC is None else q_out_NHC[..., -q_rope_NHR.shape[-1] :]
        out.copy_(turned(q_rope_NHR, cos_NR[:, None], sin_NR[:, None], interleaved))


def gqa_write_reference(
    q_NHd: Tensor, k_NGd: Tensor, v_NGd: Tensor, cos_NR: Tensor, sin_NR: Tensor, k_pages_PTGd: Tensor,
    v_pages_PTGd: Tensor, slots_N: Tensor, *, interleaved: bool, q_norm: Tensor | None = None,
    k_norm: Tensor | None = None, eps: float = 1e-6,
) -> None:  # fmt: skip
    """The definition of `gqa_write`."""
    rope = 2 * cos_NR.shape[-1]

    def ready(x: Tensor, norm: Tensor | None) -> Tensor:
        if norm is not None:
            x = F.rms_norm(x, norm.shape, norm.to(x.dtype), eps)
        moving = turned(x[..., :rope], cos_NR[:, None], sin_NR[:, None], interleaved)
        return torch.cat((moving, x[..., rope:]), -1)

    _put(ready(k_NGd, k_norm), k_pages_PTGd, slots_N)
    _put(v_NGd, v_pages_PTGd, slots_N)
    q_NHd.copy_(ready(q_NHd, q_norm))


# -------------------------------------------------------------------------------------------- kernels


@triton.jit
def _turn_rows(  # type: ignore[no-untyped-def]
    x_ptr, out_ptr, real, cos_ptr, sin_ptr, scale, weight_ptr,
    R: tl.constexpr, RP: tl.constexpr, INTERLEAVED: tl.constexpr, NORMED: tl.constexpr,
):  # fmt: skip
    """`R` channels of each row of a block turned: x_ptr, out_ptr [HB, 1] are the rows' starts. With `NORMED`
    they are multiplied by `scale` [HB, 1] and the weight first."""
    kind = x_ptr.dtype.element_ty
    half = tl.arange(0, RP // 2)
    inside = half < R // 2
    cos = tl.load(cos_ptr + half, mask=inside, other=0.0)[None, :]
    sin = tl.load(sin_ptr + half, mask=inside, other=0.0)[None, :]
    if INTERLEAVED:
        at = tl.arange(0, RP)
        mask = real & (at < R)[None, :]
        x = tl.load(x_ptr + at[None, :], mask=mask, other=0.0).to(tl.float32)
        if NORMED:
            weight = tl.load(weight_ptr + at, mask=at < R, other=0.0).to(kind).to(tl.float32)
            x = (x * scale * weight[None, :]).to(kind).to(tl.float32)
        a, b = tl.split(tl.reshape(x, [x.shape[0], RP // 2, 2]))
        y = tl.reshape(tl.join(a * cos - b * sin, a * sin + b * cos), [x.shape[0], RP])
        tl.debug_barrier()  # threads that hold the same channels have all read before one writes
        tl.store(out_ptr + at[None, :], y.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        mask = real & inside[None, :]
        a = tl.load(x_ptr + half[None, :], mask=mask, other=0.0).to(tl.float32)
        b = tl.load(x_ptr + (R // 2 + half)[None, :], mask=mask, other=0.0).to(tl.float32)
        if NORMED:
            first = tl.load(weight_ptr + half, mask=inside, other=0.0).to(kind).to(tl.float32)
            second = tl.load(weight_ptr + R // 2 + half, mask=inside, other=0.0).to(kind).to(tl.float32)
            a = (a * scale * first[None, :]).to(kind).to(tl.float32)
            b = (b * scale * second[None, :]).to(kind).to(tl.float32)
        tl.debug_barrier()
        tl.store(out_ptr + half[None, :], (a * cos - b * sin).to(out_ptr.dtype.element_ty), mask=mask)
        tl.store(
            out_ptr + (R // 2 + half)[None, :], (b * cos + a * sin).to(out_ptr.dtype.element_ty), mask=mask
        )


@triton.jit
def _rows_kernel(  # type: ignore[no-untyped-def]
    x_ptr, out_ptr, slots_ptr, x_stride, page_stride, token_stride,
    W: tl.constexpr, WP: tl.constexpr, PAGE: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    if CHAINED:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    n = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + n).to(tl.int64)
    at = tl.program_id(1) * WP + tl.arange(0, WP)
    mask = (at < W) & (slot >= 0)
    place = (slot // PAGE) * page_stride + (slot % PAGE) * token_stride
    x = tl.load(x_ptr + n * x_stride + at, mask=mask, other=0.0)
    tl.store(out_ptr + place + at, x.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def mla_job(  # type: ignore[no-untyped-def]
    n, job, kv_ptr, weight_ptr, cos_ptr, sin_ptr, q_ptr, q_out_ptr, pages_ptr, scales_ptr, ropes_ptr, slots_ptr,
    index_ptr, index_pages_ptr, kv_stride, q_stride, q_head, out_stride, out_head, page_stride, token_stride,
    index_stride, index_page, index_token, H, eps,
    RANK: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
    HB: tl.constexpr, PAGE: tl.constexpr, INDEX: tl.constexpr, INDEX_P: tl.constexpr,
    INTERLEAVED: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """Job (n, 0) writes token n's latent, (n, 1) its rotary key, and (n, 2 + b) turns the queries of `HB` heads.
    Strides of pages are in bytes where they hold FP8."""
    cos_ptr += n * (R // 2)
    sin_ptr += n * (R // 2)
    if job == 0:
        slot = tl.load(slots_ptr + n).to(tl.int64)
        kept = slot >= 0
        place = (slot // PAGE) * page_stride + (slot % PAGE) * token_stride
        at = tl.arange(0, BLOCKS)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        real = at < RANK
        latent = tl.load(kv_ptr + n * kv_stride + at, mask=real, other=0.0)
        full = latent.to(tl.float32)
        weight = tl.load(weight_ptr + at, mask=real, other=0.0).to(latent.dtype).to(tl.float32)
        scale = tl.rsqrt(tl.sum(full * full) / RANK + eps)
        latent = (full * scale * weight).to(latent.dtype)
        if FP8:
            full = latent.to(tl.float32)
            block = tl.arange(0, BLOCKS)
            step = tl.div_rn(tl.maximum(tl.max(tl.abs(full), 1), 1e-4), 448.0)
            ratio = tl.div_rn(full, tl.broadcast_to(step[:, None], full.shape))
            codes = tl.minimum(tl.maximum(ratio, -448.0), 448.0).to(tl.float8e4nv)
            tl.store(pages_ptr + place + at, codes, mask=real & kept)
            tl.store(scales_ptr + (place + RANK) // 4 + block, step, mask=(block < RANK // BLOCK) & kept)
        else:
            tl.store(pages_ptr + place + at, latent.to(pages_ptr.dtype.element_ty), mask=real & kept)
    elif job == 1:
        slot = tl.load(slots_ptr + n).to(tl.int64)
        kept = slot >= 0
        place = (slot // PAGE) * page_stride + (slot % PAGE) * token_stride
        if FP8:
            place = (place + RANK + RANK // BLOCK * 4) // 2
        else:
            place += RANK
        one = tl.arange(0, 1)[:, None]
        _turn_rows(
            kv_ptr + n * kv_stride + RANK + one, ropes_ptr + place + one, (one == 0) & kept, cos_ptr, sin_ptr,
            1.0, weight_ptr, R, RP, INTERLEAVED, False,
        )  # fmt: skip
        if INDEX:
            at = tl.arange(0, INDEX_P)
            mask = (at < INDEX) & kept
            place = (slot // PAGE) * index_page + (slot % PAGE) * index_token
            key = tl.load(index_ptr + n * index_stride + at, mask=mask, other=0.0)
            tl.store(index_pages_ptr + place + at, key.to(index_pages_ptr.dtype.element_ty), mask=mask)
    else:
        head = (job - 2) * HB + tl.arange(0, HB)[:, None]
        _turn_rows(
            q_ptr + n * q_stride + head * q_head, q_out_ptr + n * out_stride + head * out_head, head < H,
            cos_ptr, sin_ptr, 1.0, weight_ptr, R, RP, INTERLEAVED, False,
        )  # fmt: skip


@triton.jit
def _mla_kernel(  # type: ignore[no-untyped-def]
    kv_ptr, weight_ptr, cos_ptr, sin_ptr, q_ptr, q_out_ptr, pages_ptr, scales_ptr, ropes_ptr, slots_ptr,
    index_ptr, index_pages_ptr, kv_stride, q_stride, q_head, out_stride, out_head, page_stride, token_stride,
    index_stride, index_page, index_token, H, eps,
    RANK: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
    HB: tl.constexpr, PAGE: tl.constexpr, INDEX: tl.constexpr, INDEX_P: tl.constexpr,
    INTERLEAVED: tl.constexpr, FP8: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Program (n, job) does `mla_job`."""
    if CHAINED:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    mla_job(
        tl.program_id(0).to(tl.int64), tl.program_id(1), kv_ptr, weight_ptr, cos_ptr, sin_ptr, q_ptr, q_out_ptr,
        pages_ptr, scales_ptr, ropes_ptr, slots_ptr, index_ptr, index_pages_ptr, kv_stride, q_stride, q_head,
        out_stride, out_head, page_stride, token_stride, index_stride, index_page, index_token, H, eps,
        RANK, BLOCK, BLOCKS, R, RP, HB, PAGE, INDEX, INDEX_P, INTERLEAVED, FP8,
    )  # fmt: skip


@triton.jit
def _gqa_heads(  # type: ignore[no-untyped-def]
    x_ptr, out_ptr, real, cos_ptr, sin_ptr, norm_ptr, eps,
    WIDTH: tl.constexpr, DP: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, INTERLEAVED: tl.constexpr,
    NORMED: tl.constexpr, MOVED: tl.constexpr,
):  # fmt: skip
    """Heads normed and turned. Channels that do not turn are written only where they change or move."""
    at = tl.arange(0, DP)[None, :]
    scale = 1.0
    if NORMED:
        full = tl.load(x_ptr + at, mask=real & (at < WIDTH), other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(full * full, 1) / WIDTH + eps)[:, None]
    if R < WIDTH and (NORMED or MOVED):
        still = real & (at >= R) & (at < WIDTH)
        x = tl.load(x_ptr + at, mask=still, other=0.0)
        if NORMED:
            weight = tl.load(norm_ptr + at, mask=at < WIDTH, other=0.0).to(x.dtype).to(tl.float32)
            x = (x.to(tl.float32) * scale * weight).to(x.dtype)
        tl.debug_barrier()
        tl.store(out_ptr + at, x.to(out_ptr.dtype.element_ty), mask=still)
    _turn_rows(x_ptr, out_ptr, real, cos_ptr, sin_ptr, scale, norm_ptr, R, RP, INTERLEAVED, NORMED)


@triton.jit
def _gqa_kernel(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, k_pages_ptr, v_pages_ptr, slots_ptr, q_norm_ptr, k_norm_ptr,
    q_stride, q_head, k_stride, k_head, v_stride, v_head, page_stride, token_stride, page_head,
    H, G, q_blocks, eps,
    WIDTH: tl.constexpr, DP: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, HB: tl.constexpr,
    PAGE: tl.constexpr, INTERLEAVED: tl.constexpr, NORMED: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Program (n, b) works `HB` query heads of token n in place; past `q_blocks`, key and value heads."""
    if CHAINED:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    n = tl.program_id(0).to(tl.int64)
    job = tl.program_id(1)
    cos_ptr += n * (R // 2)
    sin_ptr += n * (R // 2)
    if job < q_blocks:
        head = job * HB + tl.arange(0, HB)[:, None]
        q = q_ptr + n * q_stride + head * q_head
        _gqa_heads(
            q, q, head < H, cos_ptr, sin_ptr, q_norm_ptr, eps, WIDTH, DP, R, RP, INTERLEAVED, NORMED, False
        )
    else:
        slot = tl.load(slots_ptr + n).to(tl.int64)
        head = (job - q_blocks) * HB + tl.arange(0, HB)[:, None]
        real = (head < G) & (slot >= 0)
        place = (slot // PAGE) * page_stride + (slot % PAGE) * token_stride + head * page_head
        _gqa_heads(
            k_ptr + n * k_stride + head * k_head, k_pages_ptr + place, real, cos_ptr, sin_ptr, k_norm_ptr, eps,
            WIDTH, DP, R, RP, INTERLEAVED, NORMED, True,
        )  # fmt: skip
        at = tl.arange(0, DP)[None, :]
        mask = real & (at < WIDTH)
        v = tl.load(v_ptr + n * v_stride + head * v_head + at, mask=mask, other=0.0)
        tl.store(v_pages_ptr + place + at, v.to(v_pages_ptr.dtype.element_ty), mask=mask)


# ------------------------------------------------------------------------------------------- launches


def _heads_at_once(heads: int, width: int) -> int:
    return min(triton.next_power_of_2(heads), max(1, TILE // triton.next_power_of_2(width)))


def write_rows_fast(x_NW: Tensor, pages_RW: Tensor, slots_N: Tensor) -> None:
    """`write_rows_reference` in one launch."""
    tokens, width = x_NW.shape
    tile = min(1024, triton.next_power_of_2(width))
    blocks = triton.cdiv(width, tile)
    if tokens:
        _rows_kernel[(tokens, blocks)](
            x_NW, pages_RW, slots_N, x_NW.stride(0), pages_RW.stride(0), 0,
            W=width, WP=tile, PAGE=1, num_warps=1 if tile <= 256 else 4, **chained(x_NW, tokens * blocks),
        )  # fmt: skip


def mla_write_fast(
    kv_NC: Tensor, norm_weight: Tensor, eps: float, cos_NR: Tensor, sin_NR: Tensor,
    q_rope_NHR: Tensor | None, pages_PTC: Tensor, slots_N: Tensor, *, rank: int, interleaved: bool,
    q_out_NHC: Tensor | None = None, index: tuple[Tensor, Tensor] | None = None,
) -> None:  # fmt: skip
    """`mla_write_reference` in one launch."""
    tokens, rope, fp8 = kv_NC.shape[0], kv_NC.shape[1] - rank, pages_PTC.dtype == torch.uint8
    if not tokens:
        return
    pages = scales = ropes = pages_PTC
    if fp8:
        pages, scales = pages_PTC.view(torch.float8_e4m3fn), pages_PTC.view(torch.float32)
        ropes = pages_PTC.view(torch.bfloat16)
    heads = 0 if q_rope_NHR is None else q_rope_NHR.shape[1]
    q = kv_NC[:, None] if q_rope_NHR is None else q_rope_NHR
    out = q if q_out_NHC is None else q_out_NHC[..., -rope:]
    keys, key_pages = index if index is not None else (kv_NC, pages_PTC)
    width = keys.shape[1] if index is not None else 0
    block = FP8_BLOCK if rank % FP8_BLOCK == 0 else triton.next_power_of_2(rank)
    at_once = _heads_at_once(max(heads, 1), rope)
    jobs = 2 + triton.cdiv(heads, at_once)
    _mla_kernel[(tokens, jobs)](
        kv_NC, norm_weight, cos_NR, sin_NR, q, out, pages, scales, ropes, slots_N, keys, key_pages,
        kv_NC.stride(0), q.stride(0), q.stride(1), out.stride(0), out.stride(1),
        pages_PTC.stride(0), pages_PTC.stride(1), keys.stride(0), key_pages.stride(0), key_pages.stride(1),
        heads, eps,
        RANK=rank, BLOCK=block, BLOCKS=triton.next_power_of_2(triton.cdiv(rank, block)), R=rope,
        RP=triton.next_power_of_2(rope), HB=at_once, PAGE=pages_PTC.shape[1], INDEX=width,
        INDEX_P=triton.next_power_of_2(max(width, 1)), INTERLEAVED=interleaved, FP8=fp8, num_warps=WARPS,
        enable_fp_fusion=False, **chained(kv_NC, tokens * jobs),
    )  # fmt: skip


def gqa_write_fast(
    q_NHd: Tensor, k_NGd: Tensor, v_NGd: Tensor, cos_NR: Tensor, sin_NR: Tensor, k_pages_PTGd: Tensor,
    v_pages_PTGd: Tensor, slots_N: Tensor, *, interleaved: bool, q_norm: Tensor | None = None,
    k_norm: Tensor | None = None, eps: float = 1e-6,
) -> None:  # fmt: skip
    """`gqa_write_reference` in one launch."""
    (tokens, heads, width), groups, rope = q_NHd.shape, k_NGd.shape[1], 2 * cos_NR.shape[-1]
    at_once = _heads_at_once(heads, width)
    q_blocks = triton.cdiv(heads, at_once)
    jobs = q_blocks + triton.cdiv(groups, at_once)
    if tokens:
        _gqa_kernel[(tokens, jobs)](
            q_NHd, k_NGd, v_NGd, cos_NR, sin_NR, k_pages_PTGd, v_pages_PTGd, slots_N,
            q_norm if q_norm is not None else cos_NR, k_norm if k_norm is not None else cos_NR,
            *q_NHd.stride()[:2], *k_NGd.stride()[:2], *v_NGd.stride()[:2], *k_pages_PTGd.stride()[:3],
            heads, groups, q_blocks, eps,
            WIDTH=width, DP=triton.next_power_of_2(width), R=rope, RP=triton.next_power_of_2(rope), HB=at_once,
            PAGE=k_pages_PTGd.shape[1], INTERLEAVED=interleaved, NORMED=q_norm is not None, num_warps=WARPS,
            enable_fp_fusion=False, **chained(q_NHd, tokens * jobs),
        )  # fmt: skip


# ------------------------------------------------------------------------------------------ operations


def _plain(*tensors: Tensor | None) -> bool:
    """Whether the last axes of these tensors lie without gaps and all can be read by a kernel."""
    return all(t is None or (t.is_cuda and t.stride(-1) == 1) for t in tensors)


def write_rows(x_NW: Tensor, pages_RW: Tensor, slots_N: Tensor) -> None:
    """Row n of x to row `slots_N[n]` of flat pages `[P * page_size, W]`, cast to their type; a negative slot
    writes nothing. Two rows with one slot leave either."""
    fits = x_NW.dtype == pages_RW.dtype or (x_NW.dtype in FLOATS and pages_RW.dtype in FLOATS)
    if usable(x_NW, slots_N) and fits and _plain(x_NW, pages_RW):
        write_rows_fast(x_NW, pages_RW, slots_N)
    else:
        write_rows_reference(x_NW, pages_RW, slots_N)


def mla_write(
    kv_NC: Tensor, norm_weight: Tensor, eps: float, cos_NR: Tensor, sin_NR: Tensor,
    q_rope_NHR: Tensor | None, pages_PTC: Tensor, slots_N: Tensor, *, rank: int, interleaved: bool,
    q_out_NHC: Tensor | None = None, index: tuple[Tensor, Tensor] | None = None,
) -> None:  # fmt: skip
    """The step of MLA between `kv_a` and the products with the cache.

    kv `[N, rank + rope]` as the matrix leaves it; cos and sin `[N, rope / 2]` fp32 of each token's position;
    slots `[N]` int32 or int64. The entry goes to `pages_PTC` `[P, T, rank + rope]`, or `[P, T, mla_bytes]`
    uint8. The queries' rotary part q `[N, H, rope]`, a view of any strides, is turned in place, or into the
    last channels of `q_out_NHC`. `index`: rows `[N, W]` and pages `[P, T, W]` that take them at the same slots
    (the sparse indexer's finished keys).
    """
    out = q_rope_NHR if q_out_NHC is None else q_out_NHC
    keys, key_pages = index if index is not None else (None, None)
    fp8 = pages_PTC.dtype == torch.uint8
    fast = (
        usable(kv_NC, slots_N)
        and kv_NC.dtype in FLOATS
        and _plain(kv_NC, norm_weight, q_rope_NHR, out, pages_PTC, keys, key_pages)
        and cos_NR.is_contiguous()
        and sin_NR.is_contiguous()
        and (not fp8 or (rank % FP8_BLOCK == 0 and all(s % 16 == 0 for s in pages_PTC.stride()[:2])))
    )
    operation = mla_write_fast if fast else mla_write_reference
    operation(
        kv_NC, norm_weight, eps, cos_NR, sin_NR, q_rope_NHR, pages_PTC, slots_N,
        rank=rank, interleaved=interleaved, q_out_NHC=q_out_NHC, index=index,
    )  # fmt: skip


def gqa_write(
    q_NHd: Tensor, k_NGd: Tensor, v_NGd: Tensor, cos_NR: Tensor, sin_NR: Tensor, k_pages_PTGd: Tensor,
    v_pages_PTGd: Tensor, slots_N: Tensor, *, interleaved: bool, q_norm: Tensor | None = None,
    k_norm: Tensor | None = None, eps: float = 1e-6,
) -> None:  # fmt: skip
    """The step of grouped-query attention between its projections and the product.

    q `[N, H, d]` is turned in place; k and v `[N, G, d]` go to their pages `[P, T, G, d]`, k turned. The first
    `2 * cos.shape[-1]` channels of a head turn. With `q_norm` and `k_norm` `[d]` every head is normed first.
    """
    fast = (
        usable(q_NHd, slots_N)
        and q_NHd.dtype in FLOATS
        and q_NHd.dtype == k_NGd.dtype
        and _plain(q_NHd, k_NGd, v_NGd, k_pages_PTGd, v_pages_PTGd, q_norm, k_norm)
        and k_pages_PTGd.stride() == v_pages_PTGd.stride()
        and cos_NR.is_contiguous()
        and sin_NR.is_contiguous()
        and (q_norm is None) == (k_norm is None)
    )
    operation = gqa_write_fast if fast else gqa_write_reference
    operation(
        q_NHd, k_NGd, v_NGd, cos_NR, sin_NR, k_pages_PTGd, v_pages_PTGd, slots_N,
        interleaved=interleaved, q_norm=q_norm, k_norm=k_norm, eps=eps,
    )  # fmt: skip
