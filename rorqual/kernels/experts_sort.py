"""Token-expert pairs in the order of their experts, for training: where each stands, and rows there and back.

A pair is (token, choice), numbered token * K + choice; its place is where it stands once pairs are sorted by expert.
Nothing here waits for the GPU.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rorqual.kernels.gpu import tl, triton, usable

BLOCK = 2048
"""Channels that a program sums at a time."""

ROWS = 4
"""Tokens that a program copies to their places."""


class Places(NamedTuple):
    """`pair_P` [P]: the pair at each place. `place_NK` [N, K]: the place of each pair, -1 where it has no expert here.
    `ends_E` int32 [E]: where each expert's places end; those after the last belong to none."""

    pair_P: Tensor
    place_NK: Tensor
    ends_E: Tensor


def by_expert(ids_NK: Tensor, experts: int) -> Places:
    """Sort pairs by expert; ids outside 0 .. `experts` - 1 come last. An expert's pairs keep their order."""
    flat = ids_NK.flatten()
    kind = torch.uint8 if experts < 256 else torch.int16
    key_P = torch.where((flat >= 0) & (flat < experts), flat, experts).to(kind)
    sorted_P, pair_P = key_P.sort(stable=True)
    bounds = torch.arange(experts, device=flat.device, dtype=torch.int32)
    ends_E = torch.searchsorted(sorted_P.int(), bounds, right=True, out_int32=True)
    place_P = torch.empty_like(pair_P)
    place_P[pair_P] = torch.arange(len(flat), device=flat.device)
    place_P = torch.where(key_P == experts, -1, place_P)
    return Places(pair_P, place_P.view(ids_NK.shape), ends_E)


# ------------------------------------------------------------------------------------------- counts


def counts_reference(ids_BM: Tensor, experts: int) -> Tensor:
    """How often each expert stands in each row: int64 `[B, E]`."""
    rows = ids_BM.shape[0]
    count_BE = torch.zeros(rows, experts + 1, dtype=torch.int64, device=ids_BM.device)
    known = torch.where((ids_BM >= 0) & (ids_BM < experts), ids_BM, experts).long()
    return count_BE.scatter_add_(1, known, torch.ones_like(known))[:, :experts]


@triton.jit
def _count(ids, counts, M, E: tl.constexpr, EP: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    e = tl.arange(0, EP)
    found = tl.load(ids + row * M + at, mask=at < M, other=-1)
    mine = tl.sum((found[:, None] == e[None, :]).to(tl.int64), 0)
    tl.atomic_add(counts + row * E + e, mine, mask=e < E, sem="relaxed")


def counts_fast(ids_BM: Tensor, experts: int) -> Tensor:
    """`counts_reference` of contiguous ids."""
    rows, many = ids_BM.shape
    count_BE = torch.zeros(rows, experts, dtype=torch.int64, device=ids_BM.device)
    wide = triton.next_power_of_2(experts)
    block = max(16, 8192 // wide)
    if ids_BM.numel():
        # Rows second: a GPU takes 65,535 there, and one row of a long step's pairs is more blocks than that.
        _count[(triton.cdiv(many, block), rows)](
            ids_BM, count_BE, many, E=experts, EP=wide, BLOCK=block, num_warps=4
        )
    return count_BE


def counts(ids_BM: Tensor, experts: int) -> Tensor:
    """`counts_reference`, by a kernel on a GPU, which nothing waits for."""
    return counts_fast(ids_BM.contiguous(), experts) if usable(ids_BM) else counts_reference(ids_BM, experts)


# ------------------------------------------------------------------------------------------- rows


def spread_reference(x_ND: Tensor, places: Places) -> Tensor:
    """Each place's token: `[P, D]`; places without an expert hold anything."""
    return x_ND.index_select(0, places.pair_P // places.place_NK.shape[1])


def gather_reference(x_PD: Tensor, places: Places, add_ND: Tensor | None = None) -> Tensor:
    """The sum over each token's places, and of `add_ND`, in at least fp32: `[N, D]`."""
    wide = torch.promote_types(x_PD.dtype, torch.float32)
    at_NK = places.place_NK
    rows_NKD = x_PD.index_select(0, at_NK.clamp(min=0).flatten()).unflatten(0, at_NK.shape).to(wide)
    total_ND = rows_NKD.masked_fill_((at_NK < 0)[..., None], 0).sum(1)
    return (total_ND if add_ND is None else total_ND + add_ND.to(wide)).to(x_PD.dtype)


@triton.jit
def _spread(x, place, out, tokens, x_row, D, K: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """By token, not by place: an expert's tokens lie all over x, which would be read K times."""
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (at < D)[None, :]
    rows = tl.load(x + token[:, None] * x_row + at[None, :], mask=(token < tokens)[:, None] & inside)
    for k in tl.static_range(K):
        to = tl.load(place + token * K + k, mask=token < tokens, other=-1)
        tl.store(out + to[:, None] * D + at[None, :], rows, mask=(to >= 0)[:, None] & inside)


@triton.jit
def _gather(x, place, add, out, D, K: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(K):
        row = tl.load(place + token * K + k)
        total += tl.load(x + row * D + at, mask=(at < D) & (row >= 0), other=0.0).to(tl.float32)
    if ADD:
        total += tl.load(add + token * D + at, mask=at < D, other=0.0).to(tl.float32)
    tl.store(out + token * D + at, total.to(out.dtype.element_ty), mask=at < D)


def _block(width: int) -> tuple[int, int]:
    block = min(BLOCK, triton.next_power_of_2(width))
    return block, 4 if block >= 1024 else 1


def spread_fast(x_ND: Tensor, places: Places) -> Tensor:
    """`spread_reference` for rows of any stride."""
    (tokens, chosen), width = places.place_NK.shape, x_ND.shape[1]
    out_PD = torch.empty(tokens * chosen, width, dtype=x_ND.dtype, device=x_ND.device)
    block = 512 if width % 512 == 0 else min(1024, triton.next_power_of_2(width))
    if out_PD.numel():
        _spread[(triton.cdiv(tokens, ROWS), triton.cdiv(width, block))](
            x_ND, places.place_NK, out_PD, tokens, x_ND.stride(0), width, K=chosen, ROWS=ROWS, BLOCK=block,
            num_warps=2,
        )  # fmt: skip
    return out_PD


def gather_fast(x_PD: Tensor, places: Places, add_ND: Tensor | None = None) -> Tensor:
    """`gather_reference` for contiguous rows."""
    (tokens, chosen), width = places.place_NK.shape, x_PD.shape[1]
    block, warps = _block(width)
    out_ND = torch.empty(tokens, width, dtype=x_PD.dtype, device=x_PD.device)
    if out_ND.numel():
        _gather[(tokens, triton.cdiv(width, block))](
            x_PD, places.place_NK, x_PD if add_ND is None else add_ND, out_ND, width, K=chosen,
            ADD=add_ND is not None, BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return out_ND


def spread(x_ND: Tensor, places: Places) -> Tensor:
    """`spread_reference`, by a kernel on a GPU."""
    return (
        spread_fast(x_ND, places) if usable(x_ND) and x_ND.stride(1) == 1 else spread_reference(x_ND, places)
    )


def gather(x_PD: Tensor, places: Places, add_ND: Tensor | None = None) -> Tensor:
    """`gather_reference`, by a kernel on a GPU."""
    if usable(x_PD) and x_PD.dtype != torch.float64:
        return gather_fast(x_PD.contiguous(), places, None if add_ND is None else add_ND.contiguous())
    return gather_reference(x_PD, places, add_ND)
