"""A plan as tensors: the flat batch of tokens, its groups of sequences, and which states are drawn from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from rorqual.engine.request import Request
from rorqual.engine.scheduler import Plan
from rorqual.engine.staging import Staging
from rorqual.nn.paged import Group, PagedStep


@dataclass
class Batch:
    """One pass. `ids_N` of decodes whose token or draft is still on the device hold 0: `late` and `drafts` say
    where, and in whose slots to look. Rows that draw stand in the order of `drawing`: decodes, then chunks that
    end a sequence."""

    ids_N: Tensor
    step: PagedStep
    drawing: list[Request]
    at: list[int]
    """Columns that are drawn from: the first of every drawing row, then the second of those with a draft."""
    columns: Tensor
    """The same on the device."""
    late: tuple[Tensor, Tensor] | None
    drafts: tuple[Tensor, Tensor] | None
    next_N: Tensor
    """The id after each token where it is known, else 0 (what MTP reads)."""
    widths: list[int]
    """Tokens that each decode brings: 1, or 2 with a draft. Chunks that draw bring 1."""


def slots_of(pages: list[int], begin: int, end: int, page_size: int) -> list[int]:
    """Where positions `begin` to `end` lie, counted over all pages."""
    if end - begin < 32:
        return [pages[p // page_size] * page_size + p % page_size for p in range(begin, end)]
    position = np.arange(begin, end)
    found: list[int] = (np.array(pages)[position // page_size] * page_size + position % page_size).tolist()
    return found


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
    drawing, last, widths = [], [], []
    late_at, late_slot, draft_at, draft_slot = [], [], [], []
    arrays: list[np.ndarray] = []
    spans = []
    for number, group in enumerate(groups):
        first = len(ids)
        offsets, ends = [0], []
        for request, count in group:
            begin, end = request.held, request.held + count
            known = request.ids[begin:end]
            drafted = number < decoding and count == 2
            if len(known) + drafted < count:  # the last token is still on the device
                late_at.append(len(ids))
                late_slot.append(request.slot)
                known = [0]
            ids += known
            if drafted:
                draft_at.append(len(ids))
                draft_slot.append(request.slot)
                ids.append(0)
            positions += range(begin, end)
            slots += slots_of(request.pages, begin, end, page_size)
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
    heads = (ids, positions, following, columns, slots, late_at, late_slot, draft_at, draft_slot)
    sent = staging.send([*(np.array(a, dtype=np.int64) for a in heads), *arrays])
    ids_N, positions_N, next_N, columns_C, slots_N = sent[:5]
    made = []
    for number, (tokens, group) in enumerate(spans):
        table_SB, ring_S, ends_S, offsets_S1 = sent[9 + 4 * number : 13 + 4 * number]
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
    late = (sent[5], sent[6]) if late_at else None
    drafts = (sent[7], sent[8]) if draft_at else None
    step = PagedStep(positions_N, made, page_size)
    step.shared["slots", 1] = slots_N
    return Batch(ids_N, step, drawing, columns, columns_C, late, drafts, next_N, widths)
