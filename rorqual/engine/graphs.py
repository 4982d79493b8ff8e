"""Decoding passes as CUDA graphs: recorded once a size, replayed in one launch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rorqual.engine.request import Request
from rorqual.nn.paged import Group, PagedStep

Forward = Callable[[Tensor, PagedStep], tuple[Tensor, Tensor]]
"""ids [1, N] and step -> what the pass gives: logits [N, V] and states."""

SIZES = (
    1,
    2,
    3,
    4,
    5,
    6,
    7,
    8,
    12,
    16,
    20,
    24,
    28,
    32,
    *range(40, 129, 8),
    *range(144, 257, 16),
    *range(288, 1025, 32),
)
"""Numbers of sequences that graphs are made for; a pass takes the next larger one."""


@dataclass
class _Recorded:
    """A graph with the memory it reads and writes."""

    graph: torch.cuda.CUDAGraph
    packed: Tensor
    out: tuple[Tensor, Tensor]


class Graphs:
    """Graphs of decoding passes of a model, made when first needed.

    A pass of S sequences with `width` tokens each runs in a graph of the next size in `SIZES`; what is too
    many holds page 0 and is dropped. The page table's width counts in powers of two.
    """

    def __init__(self, page_size: int, forward: Forward) -> None:
        self.page_size, self.forward = page_size, forward
        self._made: dict[tuple[int, int, int], _Recorded] = {}
        self._pool: Any = None
        self._host: list[Tensor] = []
        self._read: list[torch.cuda.Event] = []
        self._turn = 0

    def run(
        self, requests: Sequence[Request], width: int, newest: Tensor, least: tuple[int, int] = (1, 1)
    ) -> tuple[Tensor, Tensor] | None:
        """The pass of these requests, each bringing its last token (and its draft if `width` is 2): what
        `forward` gives, for their tokens alone. None if there are too many for any graph. `least`: sequences and
        page-table columns that the graph has room for at least (the same on all ranks that meet in it)."""
        count = len(requests)
        size = next((s for s in SIZES if s >= max(count, least[0])), None)
        if size is None:
            return None
        blocks = max((len(r.pages) for r in requests), default=1)
        blocks = max(blocks, least[1])
        blocks = max(8, 1 << (blocks - 1).bit_length())
        key = (size, width, blocks)
        numbers = self._numbers(requests, size, width, blocks, newest.shape[0] - 1)
        if key not in self._made:
            self._made[key] = self._record(size, width, blocks, newest, numbers)
        made = self._made[key]
        self._send(numbers, made.packed)
        made.graph.replay()
        return made.out[0][: count * width], made.out[1][:, : count * width]

    def _numbers(
        self, requests: Sequence[Request], size: int, width: int, blocks: int, idle: int
    ) -> np.ndarray:
        """All a pass needs, one field after the other: see `_fields`."""
        flat = np.zeros(size * (3 * width + 3 + blocks), dtype=np.int64)
        ids, positions, slots, ring, ends, slot, table = _fields(flat, size, width)
        slot[:] = idle
        for row, r in enumerate(requests):
            known = r.ids[r.held :] or [-1]
            for j, token in enumerate(known if width == 1 else [*known, r.draft]):
                position = r.held + j
                page = r.pages[position // self.page_size]
                ids[row, j], positions[row, j] = token, position
                slots[row, j] = page * self.page_size + position % self.page_size
            ring[row], ends[row], slot[row] = r.ring, r.held + width, r.slot
            table[row, : len(r.pages)] = r.pages
        return flat

    def _send(self, numbers: np.ndarray, packed: Tensor) -> None:
        """To the device through memory of two turns, so that one can be filled while the other is read."""
        self._turn ^= 1
        while len(self._host) < 2:
            self._host.append(torch.empty(0, dtype=torch.int64))
            self._read.append(torch.cuda.Event())
        if self._host[self._turn].numel() < numbers.size:
            self._host[self._turn] = torch.empty(numbers.size, dtype=torch.int64, pin_memory=True)
        self._read[self._turn].synchronize()
        host = self._host[self._turn][: numbers.size]
        host.numpy()[:] = numbers
        packed.copy_(host, non_blocking=True)
        self._read[self._turn].record()

    def _record(self, size: int, width: int, blocks: int, newest: Tensor, numbers: np.ndarray) -> _Recorded:
        packed = torch.from_numpy(numbers).to(newest.device)

        def once() -> tuple[Tensor, Tensor]:
            ids, positions, slots, ring, ends, slot, table = _fields(packed, size, width)
            ids, positions, slots = ids.view(-1), positions.view(-1), slots.view(-1)
            if width == 1:
                ids = torch.where(ids < 0, newest[slot], ids)
            offsets = torch.arange(0, size * width + 1, width, device=newest.device, dtype=torch.int32)
            group = Group(
                tokens=slice(0, size * width),
                starts=[],
                counts=[],
                width=width,
                end=blocks * self.page_size,
                table_SB=table.int(),
                ring_S=ring,
                ends_S=ends.int(),
                offsets_S1=offsets,
                decoding=True,
            )
            step = PagedStep(positions, [group], self.page_size)
            step.shared["slots", 1] = slots
            return self.forward(ids[None], step)

        # What runs before recording compiles kernels and makes what they keep; it must not write to live pages.
        blank = torch.zeros_like(packed)
        kept = packed.clone()
        packed.copy_(blank)
        _fields(packed, size, width)[5][:] = newest.shape[0] - 1
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            once()
            once()
        torch.cuda.current_stream().wait_stream(side)
        packed.copy_(kept)
        graph = torch.cuda.CUDAGraph()
        # Other threads (a communicator's watchdog) may look at events meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            out = once()
        self._pool = graph.pool()
        return _Recorded(graph, packed, out)


def _fields(flat: Any, size: int, width: int) -> list[Any]:
    """Views of a pass's numbers: ids, positions and slots `[size, width]` each, ring, end and the sampler's slot
    `[size]` each, page table `[size, blocks]`."""
    cuts = [size * width] * 3 + [size] * 3
    parts, at = [], 0
    for cut in cuts:
        parts.append(flat[at : at + cut])
        at += cut
    return [p.reshape(size, width) for p in parts[:3]] + parts[3:] + [flat[at:].reshape(size, -1)]
