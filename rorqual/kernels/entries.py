"""V4's cache entries as bytes, the layout its released kernels serve from (facts 2.3, 3.9).

An entry (compressed or of the window) of d channels, the last `rope` of them rotary: E4M3 codes of the others, one
e8m0 scale (an exponent in a byte) for every 64 codes, these scales padded to a multiple of 8 bytes, the rotary
channels in bf16. V4's 448 + 64 channels take 448 + 8 + 128 = 584 bytes. An index key of d channels is turned by a
Hadamard matrix and kept as E2M1 codes, two a byte, and one e8m0 scale for every 32: 64 + 4 = 68 bytes for 128.

The roundings are those of `kernels.simulate`, to the bit: `unpack_entries(pack_entries(x))` is `fake_fp8` beside
rotary channels rounded to bf16, `unpack_keys(pack_keys(x))` is `fake_fp4(hadamard(x))`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from rorqual.kernels.gpu import tl, triton, usable
from rorqual.kernels.quant import (
    E8M0,
    FP4_BLOCK,
    FP8,
    dequantize_fp4,
    dequantize_fp8,
    quantize_fp4,
    quantize_fp8,
)
from rorqual.kernels.simulate import fake_fp4, hadamard

BLOCK = 64
"""Codes of an entry that share a scale."""


def scale_bytes(plain: int) -> int:
    """Bytes that the scales of an entry with `plain` codes take."""
    return -(-plain // (8 * BLOCK)) * 8


def entry_bytes(dim: int, rope: int) -> int:
    """Bytes of an entry of `dim` channels, the last `rope` of them rotary."""
    return dim - rope + scale_bytes(dim - rope) + 2 * rope


def key_bytes(dim: int) -> int:
    """Bytes of an index key of `dim` channels."""
    return dim // 2 + dim // FP4_BLOCK


def pack_entries(entry: Tensor, rope: int) -> Tensor:
    """Entries `[..., d]` to bytes `[..., entry_bytes(d, rope)]` uint8; d - rope must be a multiple of 64."""
    if usable(entry) and entry.dtype != torch.float64 and entry.dim() == 2 and entry.stride(1) == 1:
        return pack_entries_fast(entry, rope)
    return pack_entries_reference(entry, rope)


def pack_entries_reference(entry: Tensor, rope: int) -> Tensor:
    """The definition of `pack_entries`."""
    plain = entry.shape[-1] - rope
    if plain % BLOCK:
        raise ValueError(f"an entry's codes come in blocks of {BLOCK}: {plain} channels are not a multiple")
    codes, scale = quantize_fp8(entry[..., :plain], (1, BLOCK), ue8m0=True, scale_dtype=E8M0)
    scales = F.pad(scale.view(torch.uint8), (0, scale_bytes(plain) - plain // BLOCK))
    tail = entry[..., plain:].to(torch.bfloat16).contiguous()
    return torch.cat((codes.view(torch.uint8), scales, tail.view(torch.uint8)), -1)


def unpack_entries(packed: Tensor, dim: int, rope: int, dtype: torch.dtype) -> Tensor:
    """The entries `[..., dim]` in `dtype` that bytes `[..., entry_bytes(dim, rope)]` hold."""
    plain = dim - rope
    codes, scales, tail = packed.split((plain, scale_bytes(plain), 2 * rope), -1)
    scale = scales[..., : plain // BLOCK].contiguous().view(E8M0)
    values = dequantize_fp8(codes.contiguous().view(FP8), scale, (1, BLOCK), dtype)
    return torch.cat((values, tail.clone().view(torch.bfloat16).to(dtype)), -1)


def pack_keys(keys: Tensor) -> Tensor:
    """Index keys `[..., d]`, not yet turned, to bytes `[..., key_bytes(d)]` uint8; d a power of two from 32 on."""
    codes, scale = quantize_fp4(hadamard(keys))
    return torch.cat((codes.view(torch.uint8), scale.view(torch.uint8)), -1)


def unpack_keys(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """The turned and rounded keys `[..., d]` in `dtype` that bytes `[..., key_bytes(d)]` hold."""
    dim = packed.shape[-1] * 32 // 17
    codes, scale = packed.split((dim // 2, dim // FP4_BLOCK), -1)
    return dequantize_fp4(codes.contiguous().view(torch.int8), scale.contiguous().view(E8M0), dtype)


def turn_queries(q: Tensor) -> Tensor:
    """Index queries `[..., d]` as keys are turned and rounded: `fake_fp4(hadamard(q), 32)`, d a power of two."""
    if usable(q) and q.dtype != torch.float64 and q.is_contiguous():
        return turn_queries_fast(q)
    return fake_fp4(hadamard(q), FP4_BLOCK)


# ----------------------------------------------------------------------------------------- kernels


@triton.jit
def power_above(x):  # type: ignore[no-untyped-def]
    """2^ceil(log2(x)) of fp32 x > 0: any bit of the fraction carries into the exponent."""
    return ((x.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def from_exponent(byte):  # type: ignore[no-untyped-def]
    """The power of two that an e8m0 byte stands for (0 for byte 0, whose 2^-127 no scale here reaches)."""
    return (byte.to(tl.int32) << 23).to(tl.float32, bitcast=True)


@triton.jit
def from_e2m1(code):  # type: ignore[no-untyped-def]
    """fp32 values of E2M1 codes 0 to 15: their bits, as those of an fp32 number, stand for 2^-126 times as much."""
    bits = ((code.to(tl.int32) & 8) << 28) | ((code.to(tl.int32) & 7) << 22)
    return bits.to(tl.float32, bitcast=True) * 8.507059173023462e37


@triton.jit
def store_entry(  # type: ignore[no-untyped-def]
    x,
    to,
    tail_to,
    keep,
    PLAIN: tl.constexpr,
    ROPE: tl.constexpr,
    SCALES: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """One entry x, fp32 `[CHANNELS]`, as bytes from `to` on. `tail_to`: the same place as a bf16 pointer."""
    blocks = tl.reshape(x, [CHANNELS // 64, 64])
    c = tl.arange(0, CHANNELS // 64)[:, None] * 64 + tl.arange(0, 64)[None, :]
    j = tl.arange(0, CHANNELS // 64)
    scale = power_above(tl.div_rn(tl.maximum(tl.max(tl.abs(blocks), 1), 1e-4), 448.0))
    code = (blocks / scale[:, None]).to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    tl.store(to + c, code, mask=(c < PLAIN) & keep)
    tl.store(
        to + PLAIN + j, (scale.to(tl.int32, bitcast=True) >> 23).to(tl.uint8), mask=(j * 64 < PLAIN) & keep
    )
    tail = (c >= PLAIN) & (c < PLAIN + ROPE) & keep
    tl.store(tail_to + (PLAIN + SCALES) // 2 + c - PLAIN, blocks.to(tl.bfloat16), mask=tail)


@triton.jit
def turned_codes(x, SIZE: tl.constexpr, LOG: tl.constexpr, ROOT: tl.constexpr, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    """fp32 `[SIZE]`, every 2^LOG of them turned by a Hadamard matrix and rounded to KIND: E2M1 codes
    `[SIZE / 32, 32]` and their scales."""
    for s in tl.static_range(LOG):
        a, b = tl.split(tl.permute(tl.reshape(x, [SIZE // (2 << s), 2, 1 << s]), (0, 2, 1)))
        x = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 2, 1)), [SIZE])
    x = tl.reshape((x * ROOT).to(KIND).to(tl.float32), [SIZE // 32, 32])
    scale = power_above(tl.div_rn(tl.maximum(tl.max(tl.abs(x), 1), 6 * 1.1754943508222875e-38), 6.0))
    size = tl.abs(x) / scale[:, None]
    # Halfway cases go to the even code.
    code = (size > 0.25).to(tl.int32) + (size >= 0.75).to(tl.int32) + (size > 1.25).to(tl.int32)
    code += (size >= 1.75).to(tl.int32) + (size > 2.5).to(tl.int32) + (size >= 3.5).to(tl.int32)
    code += (size > 5.0).to(tl.int32)
    code |= (x.to(tl.int32, bitcast=True) >> 28) & 8
    return code, scale


@triton.jit
def store_key(x, to, SIZE: tl.constexpr, LOG: tl.constexpr, ROOT: tl.constexpr, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    """One index key x, fp32 `[SIZE]`, turned (and rounded to KIND), as bytes from `to` on."""
    code, scale = turned_codes(x, SIZE, LOG, ROOT, KIND)
    low, high = tl.split(tl.reshape(code, [SIZE // 2, 2]))
    tl.store(to + tl.arange(0, SIZE // 2), (low | (high << 4)).to(tl.uint8))
    exponent = scale.to(tl.int32, bitcast=True) >> 23
    tl.store(to + SIZE // 2 + tl.arange(0, SIZE // 32), exponent.to(tl.uint8))


@triton.jit
def _pack(  # type: ignore[no-untyped-def]
    x, packed, tails, x_row,
    PLAIN: tl.constexpr, ROPE: tl.constexpr, SCALES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Row n of x to row n of `packed` (`tails`: the same memory as bf16)."""
    n = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, CHANNELS)
    row = tl.load(x + n * x_row + c, mask=c < PLAIN + ROPE, other=0.0).to(tl.float32)
    place = n * (PLAIN + SCALES + 2 * ROPE)
    store_entry(row, packed + place, tails + place // 2, True, PLAIN, ROPE, SCALES, CHANNELS)


def pack_entries_fast(entry_Nd: Tensor, rope: int) -> Tensor:
    """`pack_entries` of rows `[N, d]` in one launch. The bytes that pad the scales hold anything."""
    rows, dim = entry_Nd.shape
    plain = dim - rope
    packed = torch.empty(rows, entry_bytes(dim, rope), dtype=torch.uint8, device=entry_Nd.device)
    if rows:
        _pack[(rows,)](
            entry_Nd, packed, packed.view(torch.bfloat16), entry_Nd.stride(0), PLAIN=plain, ROPE=rope,
            SCALES=scale_bytes(plain), CHANNELS=max(64, triton.next_power_of_2(dim)), num_warps=2,
        )  # fmt: skip
    return packed


@triton.jit
def _turn(  # type: ignore[no-untyped-def]
    q, out, total, SIZE: tl.constexpr, LOG: tl.constexpr, ROOT: tl.constexpr
):
    """SIZE numbers of q, whole rows, turned and rounded."""
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    x = tl.load(q + at, mask=at < total, other=0.0)
    code, scale = turned_codes(x.to(tl.float32), SIZE, LOG, ROOT, q.dtype.element_ty)
    value = tl.reshape(from_e2m1(code) * scale[:, None], [SIZE])
    tl.store(out + at, value.to(q.dtype.element_ty), mask=at < total)


def turn_queries_fast(q: Tensor) -> Tensor:
    """`turn_queries` in one launch."""
    dim, out = q.shape[-1], torch.empty_like(q)
    size = max(dim, 1024)
    if q.numel():
        _turn[(triton.cdiv(q.numel(), size),)](
            q, out, q.numel(), SIZE=size, LOG=dim.bit_length() - 1, ROOT=dim**-0.5, num_warps=4
        )
    return out
