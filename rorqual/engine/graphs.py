"""Decoding passes as CUDA graphs: recorded once a size, replayed in one launch."""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rorqual.engine.packed import FIELDS, Laid, Left, fields, lay, numbers
from rorqual.engine.request import Request
from rorqual.engine.staging import Staging
from rorqual.kernels.ahead import compiled_ahead
from rorqual.kernels.single_ring import Rings
from rorqual.nn.layout import apart
from rorqual.nn.paged import Group, PagedStep
from rorqual.nn.watch import Watch

Forward = Callable[[Tensor, PagedStep], tuple[Tensor, Tensor]]
"""ids [1, N] and step -> what the pass gives: logits [N, V] and states that MTP reads."""

Further = Callable[[Tensor, Tensor, PagedStep, Tensor], Tensor]
"""States, the ids [1, N] after them, step, and the tokens [S] to draft from -> logits [S, V]."""

Kept = tuple[bool, bool]
"""What a pass keeps for those who look inside: experts, and what indexers picked."""

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
class Recorded:
    """A pass with the memory it reads and writes."""

    packed: Tensor
    laid: Laid
    step: PagedStep
    logits: Tensor
    state: Tensor
    replay: Callable[[], None]
    following: Tensor | None = None
    """The ids `[S, width]` after the pass's tokens, and how many of them stand `[S]`: written before MTP runs."""
    counts: Tensor | None = None
    drafting: Tensor | None = None
    """MTP's logits `[S, V]`, once it has run."""
    replay_mtp: Callable[[], None] | None = None


_RECORDING = threading.Lock()
"""One recording at a time: engines share the streams for it."""


@functools.cache
def _aside(device: torch.device) -> torch.cuda.Stream:
    """The stream that passes run on before they are recorded: always the same, since cuBLAS keeps 32 MB for each."""
    return torch.cuda.Stream(device)


class Graphs:
    """Decoding passes of a model, each recorded when first needed.

    A pass of S sequences with `width` tokens each runs in a graph of the next size in `SIZES`; what is too
    many holds page 0 and is dropped. The page table's width counts in powers of two. `forward` and `further` (MTP's
    part of a pass, if there is to be one) are methods, whose owner is not kept alive by this. On a CPU, for tests,
    passes run as they are, without a graph.
    """

    def __init__(
        self,
        page_size: int,
        forward: Forward,
        further: Further | None,
        left: Left,
        staging: Staging,
        rings: Rings | None = None,
    ) -> None:
        # Their methods' owner has these graphs. Were it held here too, its caches would outlive it until the garbage
        # collector comes, and that knows nothing of a GPU's memory.
        self._forward = weakref.WeakMethod(forward)
        self._further = None if further is None else weakref.WeakMethod(further)
        self.page_size = page_size
        self.left, self.staging = left, staging
        self._rings = rings
        self._made: dict[tuple[int, int, int, Kept], Recorded] = {}
        self._pool: Any = None

    def fits(self, count: int) -> bool:
        """Whether there is a graph for so many sequences."""
        return count <= SIZES[-1]

    @property
    def newest(self) -> Recorded | None:
        """The pass recorded last, for those who measure."""
        return next(reversed(self._made.values()), None)

    def run(
        self,
        requests: Sequence[Request],
        width: int,
        least: tuple[int, int] = (1, 1),
        kept: Kept = (False, False),
    ) -> Recorded:
        """The pass of these requests, each bringing its last token (and, if `width` is 2, its draft or a token in
        its place). `least`: sequences and page-table columns that the graph has room for at least (the same on all
        ranks that meet in it). `kept`: choices to keep, for which there are graphs of their own: the same kernels, but
        what bricks chose stays in memory until the next replay."""
        size = SIZES[bisect_left(SIZES, max(len(requests), least[0]))]
        blocks = max([least[1], *(len(r.pages) for r in requests)])
        blocks = max(8, 1 << (blocks - 1).bit_length())
        idle = self.left.newest_S.shape[0] - 1
        array = numbers(requests, size, width, blocks, idle)
        key = (size, width, blocks, kept)
        if key not in self._made:
            packed = torch.zeros(
                size * (FIELDS + blocks), dtype=torch.int64, device=self.left.newest_S.device
            )
            fields(packed, size)[4].fill_(idle)
            record = self._record if packed.is_cuda else self._plainly
            self._made[key] = record(packed, size, width, kept)
        made = self._made[key]
        self.staging.fill(array, made.packed)
        made.replay()
        return made

    def draft(self, made: Recorded, ids_RW: Tensor, counts_R: Tensor) -> Tensor:
        """MTP over the pass just run, given the ids after its tokens and how many of each row stand: logits
        `[R, V]` of the tokens after those."""
        assert made.following is not None and made.counts is not None and made.replay_mtp is not None
        rows = len(counts_R)
        made.following[:rows] = ids_RW
        made.counts[:rows] = counts_R
        made.replay_mtp()
        assert made.drafting is not None
        return made.drafting[:rows]

    def _pass(
        self, packed: Tensor, size: int, width: int, offsets: Tensor, kept: Kept
    ) -> tuple[Laid, PagedStep, Tensor, Tensor]:
        """What a graph holds."""
        laid = lay(packed, size, width, self.page_size, self.left)
        blocks = laid.table_SB.shape[1]
        group = Group(
            tokens=slice(0, size * width),
            starts=[],
            counts=[],
            width=width,
            end=blocks * self.page_size,
            table_SB=laid.table_SB,
            ring_S=fields(packed, size)[3],
            ends_S=laid.ends_S,
            offsets_S1=offsets,
            decoding=True,
        )
        if not packed.is_cuda:
            group.starts, group.counts = (laid.ends_S - width).tolist(), [width] * size
            group.end = int(laid.ends_S.max())
        step = PagedStep(laid.positions_N, [group], self.page_size)
        step.shared["slots", 1] = laid.slots_N
        step.shared["rings"] = self._rings
        if any(kept):
            step.watch = Watch(*kept)
        forward = self._forward()
        assert forward is not None
        return laid, step, *forward(laid.ids_N[None], step)

    def _after(self, made: Recorded, offsets: Tensor) -> Tensor:
        """MTP's part of it."""
        further = self._further() if self._further is not None else None
        assert further is not None and made.following is not None and made.counts is not None
        columns = offsets[:-1] + (made.counts - 1)
        return further(made.state, made.following.view(1, -1), made.step, columns)

    def _prepared(self, packed: Tensor, size: int, width: int, kept: Kept) -> tuple[Tensor, Recorded]:
        """Memory that a pass is given from outside, and the pass run once."""
        offsets = torch.arange(0, size * width + 1, width, device=packed.device, dtype=torch.int32)
        made = Recorded(packed, *self._pass(packed, size, width, offsets, kept), lambda: None)
        if self._further is not None:
            made.following = torch.zeros(size, width, dtype=torch.int64, device=packed.device)
            made.counts = torch.ones(size, dtype=torch.int64, device=packed.device)
        return offsets, made

    def _plainly(self, packed: Tensor, size: int, width: int, kept: Kept) -> Recorded:
        offsets, made = self._prepared(packed, size, width, kept)

        def again() -> None:
            made.laid, made.step, made.logits, made.state = self._pass(packed, size, width, offsets, kept)

        def mtp() -> None:
            made.drafting = self._after(made, offsets)

        made.replay, made.replay_mtp = again, mtp
        return made

    def _record(self, packed: Tensor, size: int, width: int, kept: Kept) -> Recorded:
        with _RECORDING:
            return self._recorded(packed, size, width, kept)

    def _recorded(self, packed: Tensor, size: int, width: int, kept: Kept) -> Recorded:
        # What runs before recording compiles kernels and makes what they keep; `packed` is blank, so that no
        # live page is written to.
        side = _aside(packed.device)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            with contextlib.suppress(Exception), apart(), compiled_ahead():
                self._prepared(packed, size, width, kept)
            offsets, made = self._prepared(packed, size, width, kept)
            if self._further is not None:
                self._after(made, offsets)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Other threads (a communicator's watchdog) may look at events meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            made.laid, made.step, made.logits, made.state = self._pass(packed, size, width, offsets, kept)
        self._pool = graph.pool()
        made.replay = graph.replay
        if self._further is not None:
            mtp = torch.cuda.CUDAGraph()
            with torch.cuda.graph(mtp, pool=self._pool, capture_error_mode="thread_local"):
                made.drafting = self._after(made, offsets)
            made.replay_mtp = mtp.replay
        return made
