"""Absorbed multi-head latent attention of a few queries a sequence over a paged cache (V2 report section 2.1,
V3 report section 2.1.1; the FP8 pages are V3.2's).

Every head reads one latent a token: keys are the whole of it, values its first `rank` channels, so a tile of
latents is read once and multiplied twice. Long sequences are cut into splits that run side by side (stage 1)
and are put together by their log-sum-exp (stage 2, `combine`). Which form runs depends on shapes alone.
"""

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rorqual.kernels import mla_decode_gluon, mla_decode_gluon_fp8, peers
from rorqual.kernels.gpu import tl, triton, usable
from rorqual.kernels.join import combine
from rorqual.kernels.quant import FP8, dequantize_fp8, quantize_fp8

SCALED = 128
"""Codes that share a scale in FP8 pages."""

FIXED_KEYS = 1024
"""Keys a split of the invariant form holds."""

FIXED_ROOM = 2**26
"""Numbers of splits' results that it keeps at once."""


# ------------------------------------------------------------------------------------------ FP8 pages


def packed_bytes(rank: int, rope: int) -> int:
    """Bytes of one packed token: `rank` codes, an fp32 scale for every 128 of them, `rope` bf16 channels."""
    return rank + 4 * -(-rank // SCALED) + 2 * rope


def pack_latents(latent_NC: Tensor, rank: int) -> Tensor:
    """Latents `[..., rank + rope]` to bytes `[..., packed_bytes]` uint8; a scale is amax / 448 (amax at least
    1e-4). Raises ValueError if `rank` is not a multiple of 4 (the scales lie on 4-byte boundaries)."""
    if rank % 4:
        raise ValueError(f"packed latents need a rank that is a multiple of 4, got {rank}")
    codes, scale = quantize_fp8(latent_NC[..., :rank], (1, SCALED))
    rope = latent_NC[..., rank:].to(torch.bfloat16).contiguous()
    return torch.cat(
        (codes.view(torch.uint8), scale.contiguous().view(torch.uint8), rope.view(torch.uint8)), -1
    )


def unpack_latents(packed_NC: Tensor, rank: int, rope: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The latents `[..., rank + rope]` in `dtype` that `pack_latents` kept in `[..., packed_bytes]` bytes."""
    scales = 4 * -(-rank // SCALED)
    codes, scale, tail = packed_NC.split((rank, scales, 2 * rope), -1)
    values = dequantize_fp8(
        codes.contiguous().view(FP8), scale.clone().view(torch.float32), (1, SCALED), dtype
    )
    return torch.cat((values, tail.clone().view(torch.bfloat16).to(dtype)), -1)


# ------------------------------------------------------------------------------------------ reference


def reference(
    q_NHC: Tensor,
    pages_PTC: Tensor,
    table_SB: Tensor,
    ends_S: Tensor,
    *,
    width: int,
    rank: int,
    scale: float,
    splits: int | str | None = None,
) -> Tensor:
    """`mla_decode`, a sequence at a time."""
    out = torch.zeros(*q_NHC.shape[:2], rank, dtype=q_NHC.dtype, device=q_NHC.device)
    for s, end in enumerate(ends_S.tolist()):
        size = pages_PTC.shape[1]
        latent_KC = pages_PTC[table_SB[s, : -(-end // size)].long()].flatten(0, 1)[:end]
        if pages_PTC.dtype == torch.uint8:
            latent_KC = unpack_latents(latent_KC, rank, q_NHC.shape[-1] - rank, q_NHC.dtype)
        latent_KC = latent_KC.float()
        queries = slice(s * width, (s + 1) * width)
        score = torch.einsum("jhc,kc->jhk", q_NHC[queries].float(), latent_KC) * scale
        last_J = torch.arange(end - width, end, device=q_NHC.device)
        hidden = torch.arange(end, device=q_NHC.device) > last_J[:, None]
        weight = score.masked_fill(hidden[:, None], float("-inf")).softmax(-1).nan_to_num(0.0)
        out[queries] = (weight @ latent_KC[:, :rank]).to(out.dtype)
    return out


# ------------------------------------------------------------------------------------------- kernels


@triton.jit(do_not_specialize=("rows", "heads", "width", "table_stride", "splits"))
def _attend(  # type: ignore[no-untyped-def]
    q_ptr, values_ptr, scales_ptr, rope_ptr, table_ptr, ends_ptr, o_ptr, lse_ptr, scale, rows, heads, width,
    table_stride, splits,
    VALUE_STRIDE: tl.constexpr, SCALE_STRIDE: tl.constexpr, ROPE_STRIDE: tl.constexpr, RANK: tl.constexpr,
    ROPE: tl.constexpr, PAGE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr, FIXED: tl.constexpr,
    DIRECT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of a sequence's `rows` = width * heads queries against one split of its keys."""
    block = tl.program_id(0)
    split = tl.program_id(1)
    s = tl.program_id(2)
    end = tl.load(ends_ptr + s)
    if FIXED > 0:
        share = FIXED
    else:
        share = tl.cdiv(tl.cdiv(end, splits), BLOCK_N) * BLOCK_N
    first = split * share
    last = tl.minimum(first + share, end)
    if (not DIRECT) & (first >= last):
        return

    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = tl.arange(0, BLOCK_C)
    turned = tl.arange(0, BLOCK_E)
    held = row < rows
    at = (s * rows + row).to(tl.int64)[:, None] * (RANK + ROPE)
    q_c = tl.load(q_ptr + at + channel[None, :], mask=held[:, None] & (channel < RANK)[None, :], other=0.0)
    q_e = tl.load(
        q_ptr + at + RANK + turned[None, :], mask=held[:, None] & (turned < ROPE)[None, :], other=0.0
    )
    acc = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    visible = end - width + row // heads

    # The page of the next tile is read a tile ahead: a load that waits for a load would cost the pipeline a stage.
    table_ptr += s * table_stride
    upcoming = tl.load(table_ptr + first // PAGE, mask=first < last, other=0)
    for start in tl.range(first, last, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        there = key < last
        if PAGE >= BLOCK_N:
            page = upcoming.to(tl.int64)
            upcoming = tl.load(table_ptr + tl.minimum(start + BLOCK_N, last - 1) // PAGE)
            slot = page * PAGE + start % PAGE
            values = values_ptr + slot * VALUE_STRIDE + tl.arange(0, BLOCK_N)[:, None] * VALUE_STRIDE
            ropes = rope_ptr + slot * ROPE_STRIDE + tl.arange(0, BLOCK_N)[:, None] * ROPE_STRIDE
            scales = scales_ptr + slot * SCALE_STRIDE + tl.arange(0, BLOCK_N)[:, None] * SCALE_STRIDE
        else:
            page = tl.load(table_ptr + key // PAGE, mask=there, other=0).to(tl.int64)
            # Not key % PAGE: the compiler would take every slot for a multiple of PAGE, and read in too wide steps.
            slot = (page * PAGE + (key & (PAGE - 1)))[:, None]
            values = values_ptr + slot * VALUE_STRIDE
            ropes = rope_ptr + slot * ROPE_STRIDE
            scales = scales_ptr + slot * SCALE_STRIDE
        c = tl.load(values + channel[None, :], mask=there[:, None] & (channel < RANK)[None, :], other=0.0)
        e = tl.load(ropes + turned[None, :], mask=there[:, None] & (turned < ROPE)[None, :], other=0.0)
        if SCALE_STRIDE > 0:
            part = tl.arange(0, BLOCK_C // GROUP)
            known = there[:, None] & (part * GROUP < RANK)[None, :]
            factor = tl.load(scales + part[None, :], mask=known, other=0.0)
            wide = c.to(tl.float8e4nv, bitcast=True).to(tl.float32)
            wide = tl.reshape(wide, [BLOCK_N, BLOCK_C // GROUP, GROUP]) * factor[:, :, None]
            c = tl.reshape(wide, [BLOCK_N, BLOCK_C]).to(q_c.dtype)
            e = e.to(q_c.dtype)
        score = tl.dot(q_c, tl.trans(c), input_precision=PRECISION)
        score = tl.dot(q_e, tl.trans(e), score, input_precision=PRECISION) * scale
        score = tl.where(key[None, :] <= visible[:, None], score, float("-inf"))
        higher = tl.maximum(peak, tl.max(score, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        fade = tl.exp2(peak - base)
        weight = tl.exp2(score - base[:, None])
        total = total * fade + tl.sum(weight, 1)
        peak = higher
        acc = tl.dot(weight.to(c.dtype), c, acc * fade[:, None], input_precision=PRECISION)

    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    to = s * rows + row
    if not DIRECT:
        to = to + split * tl.num_programs(2) * rows
        tl.store(
            lse_ptr + to, peak + tl.log2(tl.where(total > 0, total, 1.0)), mask=held
        )  # nothing seen: -inf
    place = to.to(tl.int64)[:, None] * RANK + channel[None, :]
    tl.store(o_ptr + place, acc.to(o_ptr.dtype.element_ty), mask=held[:, None] & (channel < RANK)[None, :])


# ------------------------------------------------------------------------------------------- launches


class Config(NamedTuple):
    """How stage 1 is cut: queries and keys a program meets at a time, and what Triton makes of it."""

    block_m: int
    block_n: int
    warps: int
    stages: int
    resident: int
    """Programs that run on one multiprocessor at a time."""
    gluon: bool = False
    """Whether `mla_decode_gluon`, or `mla_decode_gluon_fp8`, runs it."""


WIDE = Config(16, 16, 8, 1, 1)
"""For fp32 latents of more than 128 channels: what shared memory holds."""


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; a small stand-in for the CPU's interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@functools.cache
def choose_splits(units: int, capacity: int, slots: int, tile: int) -> int:
    """Splits of `capacity` keys that let `units` programs a split fill `slots` evenly.

    The cost of a choice is its waves times the tiles of one split, each with the price of its own start and of
    its place in the second stage counted as 3 tiles.
    """

    def cost(splits: int) -> float:
        tiles = -(-capacity // (splits * tile))
        return -(-units * splits // slots) * (tiles + (3 if splits > 1 else 1))

    most = max(1, min(-(-capacity // (2 * tile)), 4 * slots // units + 1))
    return min(range(1, most + 1), key=lambda splits: (cost(splits), splits))


def configure(rows: int, heads: int, crowded: bool, fixed: bool, fp8: bool, hopper: bool) -> Config:
    """The cut for `rows` = width * heads queries a sequence, in Gluon where it is `hopper`'s case; `crowded`: more
    sequences than multiprocessors. The fixed form may look at `heads` alone."""
    gluon = Config(mla_decode_gluon.ROWS, mla_decode_gluon.TILE, 12, 1, 1, True)
    rows = heads if fixed else rows
    if rows <= 16:
        # Most of Gluon's 64 rows are empty, which costs nothing unless bf16 programs come in more than one turn.
        return gluon if hopper and not fixed and (fp8 or not crowded) else Config(16, 32, 4, 3, 2)
    if hopper and not (fixed and rows <= 32 and not fp8):
        return gluon
    if rows <= 32 and not fp8:
        return Config(32, 32, 4, 3, 2)
    return Config(64, 32, 8, 3, 1) if fp8 else Config(64, 64, 8, 2, 1)


def _launch(
    q: Tensor,
    pages_PTC: Tensor,
    table_SB: Tensor,
    ends_S: Tensor,
    o: Tensor,
    lse: Tensor,
    cut: Config,
    grid: tuple[int, int, int],
    scale: float,
    width: int,
    rank: int,
    fixed: int,
    direct: bool,
) -> None:
    """Stage 1 in Triton."""
    heads, channels = q.shape[1:]
    rope, size = channels - rank, pages_PTC.shape[1]
    if pages_PTC.dtype == torch.uint8:
        at = rank // 2 + 2 * -(-rank // SCALED)
        wide = pages_PTC.view(torch.float32)[..., rank // 4 :]
        latents = (pages_PTC, wide, pages_PTC.view(torch.bfloat16)[..., at:])
        strides = [t.stride(1) for t in latents]
    else:
        latents = (pages_PTC, pages_PTC, pages_PTC[..., rank:])
        strides = [channels, 0, channels]
    block_c = max(16, triton.next_power_of_2(rank))
    _attend[grid](
        q,
        *latents,
        table_SB,
        ends_S,
        o,
        lse,
        scale,
        width * heads,
        heads,
        width,
        table_SB.stride(0),
        grid[1],
        VALUE_STRIDE=strides[0],
        SCALE_STRIDE=strides[1],
        ROPE_STRIDE=strides[2],
        RANK=rank,
        ROPE=rope,
        PAGE=size,
        BLOCK_C=block_c,
        BLOCK_E=max(16, triton.next_power_of_2(rope)),
        BLOCK_M=cut.block_m,
        BLOCK_N=cut.block_n,
        GROUP=min(SCALED, block_c),
        FIXED=fixed,
        DIRECT=direct,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        num_warps=cut.warps,
        num_stages=cut.stages,
    )


def fast(
    q_NHC: Tensor,
    pages_PTC: Tensor,
    table_SB: Tensor,
    ends_S: Tensor,
    *,
    width: int,
    rank: int,
    scale: float,
    splits: int | str | None = None,
    config: Config | None = None,
) -> Tensor:
    """`mla_decode` in Triton. `config` overrides the cut (benchmarks)."""
    q = q_NHC.contiguous()
    tokens, heads, _ = q.shape
    sequences = table_SB.shape[0]
    rows, size = width * heads, pages_PTC.shape[1]
    if splits == "fixed":
        most = max(1, FIXED_ROOM // max(1, -(-table_SB.shape[1] * size // FIXED_KEYS) * rows * rank))
        if sequences > most:  # the splits' results would take too much memory at once
            cuts = [slice(s, s + most) for s in range(0, sequences, most)]
            common: Any = {"width": width, "rank": rank, "scale": scale, "splits": splits, "config": config}
            return torch.cat(
                [
                    fast(q[c.start * width : c.stop * width], pages_PTC, table_SB[c], ends_S[c], **common)
                    for c in cuts
                ]
            )
    fp8 = pages_PTC.dtype == torch.uint8
    out = q.new_empty(tokens, heads, rank)
    if tokens == 0:
        return out
    fixed = FIXED_KEYS if splits == "fixed" else 0
    form = mla_decode_gluon_fp8 if fp8 else mla_decode_gluon
    crowded, hopper = sequences > processors(q.device), mla_decode_gluon.supported(q, pages_PTC, rank)
    cut = config or configure(rows, heads, crowded, bool(fixed), fp8, hopper)
    if config is None and q.dtype == torch.float32 and rank > 128:
        cut = WIDE
    blocks, capacity = -(-rows // cut.block_m), table_SB.shape[1] * size
    if fixed:
        pieces = max(1, -(-capacity // fixed))
    elif isinstance(splits, int):
        pieces = splits
    else:
        slots = processors(q.device) * cut.resident
        pieces = choose_splits(blocks * sequences, capacity, slots, cut.block_n)
    direct = pieces == 1 and not fixed
    if direct:
        part, lse = out, out
    else:
        part = torch.empty(pieces, tokens * heads, rank, dtype=torch.float32, device=q.device)
        lse = torch.empty(pieces, tokens * heads, dtype=torch.float32, device=q.device)
    exponent = scale * math.log2(math.e)
    grid = (blocks, pieces, sequences)
    if cut.gluon:
        form.launch(
            q,
            pages_PTC,
            table_SB,
            ends_S,
            part,
            lse,
            grid=grid,
            scale=exponent,
            rows=rows,
            width=width,
            fixed=fixed,
            direct=direct,
        )
    else:
        _launch(q, pages_PTC, table_SB, ends_S, part, lse, cut, grid, exponent, width, rank, fixed, direct)
    if not direct:
        combine(
            part, lse, ends_S, None, out, rows=rows, heads=heads, tile=cut.block_n, fixed=fixed, ahead=cut.gluon
        )  # fmt: skip
    return out


def mla_decode(
    q_NHC: Tensor,
    pages_PTC: Tensor,
    table_SB: Tensor,
    ends_S: Tensor,
    *,
    width: int,
    rank: int,
    scale: float,
    splits: int | str | None = None,
) -> Tensor:
    """Attend `width` queries of each sequence to the sequence's latents: `[N, H, rank]` in q's type.

    q `[S * width, H, rank + rope]`, in latent space; pages `[P, page_size, rank + rope]` in q's type, or uint8
    `[P, page_size, packed_bytes]`; table `[S, B]` and ends `[S]` int32. Query j of sequence s stands at position
    `ends - width + j` and sees what is not after it; without anything to see (a padding sequence ends at 0) it
    gets zeros. `splits`: a number, None to choose one by the shapes, or "fixed" for the form whose results do
    not depend, to the bit, on what else is in the call. Raises ValueError where shapes do not belong together.
    """
    if q_NHC.shape[0] != table_SB.shape[0] * width:
        raise ValueError(
            f"{q_NHC.shape[0]} queries are not {width} for each of {table_SB.shape[0]} sequences"
        )
    rope = q_NHC.shape[2] - rank
    channels = packed_bytes(rank, rope) if pages_PTC.dtype == torch.uint8 else rank + rope
    if pages_PTC.shape[2] != channels:
        raise ValueError(f"pages hold {pages_PTC.shape[2]} a token, the queries' shape asks for {channels}")
    given: dict[str, Any] = {"width": width, "rank": rank, "scale": scale}
    peer = peers.mla_decode(q_NHC, pages_PTC, table_SB, ends_S, **given) if splits is None else None
    if peer is not None:
        return peer
    run = fast if usable(q_NHC, pages_PTC) and supported(q_NHC, pages_PTC, rank) else reference
    return run(q_NHC, pages_PTC, table_SB, ends_S, splits=splits, **given)


def supported(q_NHC: Tensor, pages_PTC: Tensor, rank: int) -> bool:
    """Whether `fast` takes these types and sizes."""
    rope, size = q_NHC.shape[2] - rank, pages_PTC.shape[1]
    kept = pages_PTC.dtype in (q_NHC.dtype, torch.uint8) and pages_PTC.is_contiguous()
    if pages_PTC.dtype == torch.uint8:
        kept = kept and pages_PTC.shape[2] % 4 == 0  # its scales are read as whole fp32
    fits = rank <= 512 and 0 < rope <= 128
    return kept and fits and size & (size - 1) == 0
