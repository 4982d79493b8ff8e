"""A plan as tensors: the flat batch of tokens, its groups of sequences, and which states are drawn from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rorqual.engine.request import Request
from rorqual.engine.scheduler import Plan
from rorqual.nn.paged import Group, PagedStep


@dataclass
class Batch:
    """One pass. `ids_N` of decodes whose token is still on the device hold 0: `late` says where, and in whose
    slots to look. Rows that draw stand in the order of `drawing`: decodes, then chunks that end a sequence."""

    ids_N: Tensor
    step: PagedStep
    drawing: list[Request]
    last: list[int]
    """Column of each drawing row's last token in the flat batch."""
    columns: Tensor
    """Columns that are drawn from: the first of every drawing row, then the second of those with a draft."""
    late: tuple[Tensor, Tensor] | None
    next_N: Tensor
    """The id after each token where it is known, else 0 (what MTP reads)."""
    widths: list[int]
    """Tokens that each decode brings: 1, or 2 with a draft. Chunks that draw bring 1."""


class Staging:
    """Host numbers on their way to the device: many small arrays in one copy, from memory the device can read
    while the host goes on. Two buffers take turns, so that a pass can be prepared while another runs."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._buffers: list[Tensor | None] = [None, None]
        self._events: list[torch.cuda.Event | None] = [None, None]
        self._turn = 0

    def send(self, arrays: Sequence[np.ndarray]) -> list[Tensor]:
        """Each int64 array as a tensor of its shape on the device."""
        if self.device.type != "cuda":
            return [torch.from_numpy(np.ascontiguousarray(a, dtype=np.int64)) for a in arrays]
        total = sum(a.size for a in arrays)
        self._turn ^= 1
        buffer, event = self._buffers[self._turn], self._events[self._turn]
        if event is not None:
            event.synchronize()
        if buffer is None or buffer.numel() < total:
            buffer = self._buffers[self._turn] = torch.empty(2 * total, dtype=torch.int64, pin_memory=True)
        flat = buffer.numpy()
        at = 0
        for a in arrays:
            flat[at : at + a.size] = a.ravel()
            at += a.size
        moved = buffer[:total].to(self.device, non_blocking=True)
        self._events[self._turn] = torch.cuda.Event()
        self._events[self._turn].record()  # type: ignore[union-attr]
        sizes = [a.size for a in arrays]
        return [part.view(a.shape) for part, a in zip(moved.split(sizes), arrays, strict=True)]


def lay_out(plan: Plan, page_size: int, staging: Staging, one_group_of_chunks: bool) -> Batch:
    """The tensors of a plan. Decodes of one width stand together; chunks in one group where kernels take ragged
    rows, else in groups of equal length, so that none is padded."""
    groups: list[list[tuple[Request, int]]] = []
    for width in (1, 2):
        same = [(r, int(width)) for r in plan.decodes if r.width == width]
        if same:
            groups.append(same)
    decoding = len(groups)
    if one_group_of_chunks and plan.chunks:
        groups.append(list(plan.chunks))
    elif plan.chunks:
        by_count: dict[int, list[tuple[Request, int]]] = {}
        for request, count in plan.chunks:
            by_count.setdefault(count, []).append((request, count))
        groups += by_count.values()
    ids: list[int] = []
    positions: list[int] = []
    following: list[int] = []
    slots: list[int] = []
    drawing, last, late_at, late_slot, widths = [], [], [], [], []
    arrays: list[np.ndarray] = []
    spans = []
    for number, group in enumerate(groups):
        first = len(ids)
        offsets, ends = [0], []
        for request, count in group:
            begin, end = request.held, request.held + count
            known = request.ids[begin:end]
            if number < decoding and count == 2:
                known = [*known, request.draft]
            if len(known) < count:  # the last token is still on the device
                late_at.append(len(ids))
                late_slot.append(request.slot)
                known = [0]
            ids += known
            positions += range(begin, end)
            slots += (request.pages[p // page_size] * page_size + p % page_size for p in range(begin, end))
            after = request.ids[begin + 1 : end + 1]
            following += after + [0] * (count - len(after))
            offsets.append(offsets[-1] + count)
            ends.append(end)
            if number < decoding or end == request.length:
                drawing.append(request)
                last.append(len(ids) - 1)
                widths.append(count if number < decoding else 1)
        blocks = max(len(r.pages) for r, _ in group)
        table = np.zeros((len(group), blocks), dtype=np.int64)
        for row, (request, _) in enumerate(group):
            table[row, : len(request.pages)] = request.pages
        rings = [r.ring for r, _ in group]
        arrays += [table, np.array(rings), np.array(ends), np.array(offsets)]
        spans.append((slice(first, len(ids)), group))
    columns = [at - width + 1 for at, width in zip(last, widths, strict=True)]
    columns += [at for at, width in zip(last, widths, strict=True) if width == 2]
    heads = (ids, positions, following, columns, slots, late_at, late_slot)
    sent = staging.send([*(np.array(a, dtype=np.int64) for a in heads), *arrays])
    ids_N, positions_N, next_N, columns_C, slots_N, late_at_L, late_slot_L = sent[:7]
    made = []
    for number, (tokens, group) in enumerate(spans):
        table_SB, ring_S, ends_S, offsets_S1 = sent[7 + 4 * number : 11 + 4 * number]
        made.append(
            Group(
                tokens=tokens,
                starts=[r.held for r, _ in group],
                counts=[count for _, count in group],
                width=max(count for _, count in group),
                end=max(r.held + count for r, count in group),
                table_SB=table_SB.int(),
                ring_S=ring_S,
                ends_S=ends_S.int(),
                offsets_S1=offsets_S1.int(),
                decoding=number < decoding,
            )
        )
    late = (late_at_L, late_slot_L) if late_at else None
    step = PagedStep(positions_N, made, page_size)
    step.shared["slots", 1] = slots_N
    return Batch(ids_N, step, drawing, last, columns_C, late, next_N, widths)
