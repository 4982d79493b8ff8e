"""A decoding pass in one array of numbers, and what a pass makes of it on the device.

The host writes a pass's numbers, one field after the other, and sends them in one copy. It need not know all: a
last token, a draft or a position may still be on its way, and then comes from tables that the passes before
have left on the device, one line for each of the sampler's slots. So a pass can be started before it is known
how many tokens the one before it has brought.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rorqual.engine.request import Request
from rorqual.kernels.gpu import tl, triton, usable

HERE, NONE = -1, -2
"""In place of a number: it is on the device; there is none."""

FIELDS = 5
"""Numbers a sequence beside its line of the page table: last token, draft, start, ring, slot."""


class Left(NamedTuple):
    """What passes leave on the device for each slot, int64 [slots]: the last token drawn, the draft after it, and
    how many tokens the caches hold for good."""

    newest_S: Tensor
    draft_S: Tensor
    held_S: Tensor


class Laid(NamedTuple):
    """A pass of S sequences with W tokens each, laid out on the device: `ids_N`, `positions_N` and `slots_N` (places
    in the caches) int64; `ends_S` and `table_SB` int32; `tries_S` int64: 1 where the second token is a draft."""

    ids_N: Tensor
    positions_N: Tensor
    slots_N: Tensor
    ends_S: Tensor
    table_SB: Tensor
    tries_S: Tensor


def numbers(requests: Sequence[Request], size: int, width: int, blocks: int, idle: int) -> np.ndarray:
    """The array of a pass of `size` sequences: these requests, then idle ones that write to page 0."""
    flat = np.zeros(size * (FIELDS + blocks), dtype=np.int64)
    last, draft, start, ring, slot, table = fields(flat, size)
    draft[:], slot[:] = NONE, idle
    for row, r in enumerate(requests):
        last[row] = r.ids[r.held] if r.held < len(r.ids) and not r.loose else HERE
        if width == 2 and r.width == 2:
            draft[row] = HERE
        start[row] = HERE if r.loose else r.held
        ring[row], slot[row] = r.ring, r.slot
        table[row, : len(r.pages)] = r.pages
    return flat


def fields(flat: Any, size: int) -> list[Any]:
    """Views of an array of `numbers`: last token, draft, start, ring and slot `[size]`, page table `[size, blocks]`."""
    parts = [flat[at * size : (at + 1) * size] for at in range(FIELDS)]
    return [*parts, flat[FIELDS * size :].reshape(size, -1)]


def lay_reference(packed: Tensor, size: int, width: int, page_size: int, left: Left) -> Laid:
    """The layout by plain operations. What lies past the page table is written to page 0."""
    last, draft, start, _, slot, table = fields(packed, size)
    start = torch.where(start == HERE, left.held_S[slot], start)
    ids = [torch.where(last == HERE, left.newest_S[slot], last)]
    if width == 2:
        there = torch.where(draft == HERE, left.draft_S[slot], draft)
        ids.append(torch.where(draft == NONE, 0, there))
    position = start[:, None] + torch.arange(width, device=packed.device)
    block = position // page_size
    page = torch.where(block < table.shape[1], table.gather(1, block.clamp(max=table.shape[1] - 1)), 0)
    return Laid(
        torch.stack(ids, 1).view(-1),
        position.view(-1),
        (page * page_size + position % page_size).view(-1),
        (start + width).int(),
        table.int(),
        (draft != NONE).long(),
    )


@triton.jit
def _lay_kernel(  # type: ignore[no-untyped-def]
    packed, newest, drafts, held, ids, positions, places, ends, table, tries, size,
    WIDTH: tl.constexpr, PAGE: tl.constexpr, BLOCKS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    last = tl.load(packed + row)
    draft = tl.load(packed + size + row)
    start = tl.load(packed + 2 * size + row)
    slot = tl.load(packed + 4 * size + row)
    lines = packed + 5 * size + row * BLOCKS
    if start == -1:
        start = tl.load(held + slot)
    if last == -1:
        last = tl.load(newest + slot)
    for j in tl.static_range(WIDTH):
        position = start + j
        block = position // PAGE
        page = tl.load(lines + block, mask=block < BLOCKS, other=0)
        tl.store(positions + row * WIDTH + j, position)
        tl.store(places + row * WIDTH + j, page * PAGE + position % PAGE)
    tl.store(ids + row * WIDTH, last)
    if WIDTH == 2:
        there = tl.maximum(draft, 0)
        if draft == -1:
            there = tl.load(drafts + slot)
        tl.store(ids + row * WIDTH + 1, there)
    tl.store(tries + row, (draft != -2).to(tl.int64))
    tl.store(ends + row, (start + WIDTH).to(tl.int32))
    for first in tl.range(0, BLOCKS, TILE):
        at = first + tl.arange(0, TILE)
        tl.store(
            table + row * BLOCKS + at,
            tl.load(lines + at, mask=at < BLOCKS, other=0).to(tl.int32),
            mask=at < BLOCKS,
        )


def lay_triton(packed: Tensor, size: int, width: int, page_size: int, left: Left) -> Laid:
    """The layout in one launch."""
    blocks = packed.numel() // size - FIELDS

    def room(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=packed.device)

    ids, positions, places = (room(size * width) for _ in range(3))
    made = Laid(
        ids,
        positions,
        places,
        room(size, dtype=torch.int32),
        room(size, blocks, dtype=torch.int32),
        room(size),
    )
    _lay_kernel[size,](
        packed, *left, *made, size, WIDTH=width, PAGE=page_size, BLOCKS=blocks, TILE=min(1024, blocks), num_warps=1
    )  # fmt: skip
    return made


def lay(packed: Tensor, size: int, width: int, page_size: int, left: Left) -> Laid:
    """A pass's numbers as its layout on the device."""
    return (lay_triton if usable(packed) else lay_reference)(packed, size, width, page_size, left)
