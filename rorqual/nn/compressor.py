"""V4's compressor: many tokens pooled into one cache entry (V4 report section 2.3; facts 3.9)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from rorqual.family.parts import Compress, Rope
from rorqual.kernels.compress import compress_decode, compress_prefill
from rorqual.nn.cache import Slots, Tail
from rorqual.nn.linear import Linear, Pinned
from rorqual.nn.norm import RMSNorm, upcast
from rorqual.nn.paged import Group, Lane, Lanes, Packing, PagedSlots, PagedStep, RingTail, Store
from rorqual.nn.rope import rotate_tail, rotation
from rorqual.nn.step import Rows, Step, within


class PoolState:
    """What an unfinished window needs: the projections and gates of the last tokens, fp32, and the
    finished entries. With overlap two windows are kept, else one."""

    def __init__(
        self, kv: Tail | RingTail, gate: Tail | RingTail, entries: Slots | PagedSlots, ratio: int
    ) -> None:
        self.kv, self.gate, self.entries, self.ratio = kv, gate, entries, ratio

    @classmethod
    def new(
        cls, part: Compress, dim: int, batch: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> PoolState:
        """An empty one."""
        lanes = cls.lanes(part, dim, dtype)
        kv, gate = (
            Tail(batch, lane.keep or 0, lane.shape[0], lane.dtype, device, lane.fill)
            for lane in (lanes["kv"], lanes["gate"])
        )
        entries = Slots(batch, -(-capacity // part.ratio), (dim,), dtype, device)
        return cls(kv, gate, entries, part.ratio)

    @staticmethod
    def lanes(part: Compress, dim: int, dtype: torch.dtype, packed: int = 0) -> Lanes:
        """What is kept: with overlap two windows of projections as wide as two entries, else one. `packed`: bytes
        of an entry, where it is kept as such."""
        keep, width = (2 * part.ratio, 2 * dim) if part.overlap else (part.ratio, dim)
        state = torch.float64 if dtype == torch.float64 else torch.float32
        return {
            "kv": Lane((width,), state, keep=keep),
            "gate": Lane((width,), state, keep=keep, fill=float("-inf")),
            "entries": Lane((packed or dim,), torch.uint8 if packed else dtype, every=part.ratio),
        }

    @classmethod
    def view(
        cls, store: Store, prefix: str, lanes: Lanes, group: Group, packed: Packing | None = None
    ) -> PoolState:
        """Over the pages and rings of a group's sequences, stored under names that begin with `prefix`."""
        kv, gate = (RingTail(store[prefix + name], lanes[name], group) for name in ("kv", "gate"))
        return cls(kv, gate, PagedSlots(store[prefix + "entries"], group, packed), lanes["entries"].every)

    @property
    def packed(self) -> bool:
        """Whether entries come back as the released layout rounds them."""
        return isinstance(self.entries, PagedSlots) and self.entries.packed is not None

    def select(self, rows_B: Tensor) -> None:
        for kept in (self.kv, self.gate, self.entries):
            kept.select(rows_B)

    def reaches(self, starts: list[int]) -> bool:
        return self.kv.reaches(starts)

    def growing_bytes(self, length: int) -> int:
        return length // self.ratio * self.entries.bytes_per_item()

    def fixed_bytes(self) -> int:
        return self.kv.bytes_per_row() + self.gate.bytes_per_row()


class Windows(NamedTuple):
    """Projections and gates by window, `[B, N, slots, dim]`, and the entries they finish."""

    kv: Tensor
    gate: Tensor
    rows: Rows


class Compressor(Pinned):
    """One entry for every `ratio` tokens: a softmax over the window's slots, separately for each channel.

    With overlap (CSA) a token has two halves: the first goes into the next window's entry, the second
    into its own. Entry i stands at position ratio * i and is complete after token ratio * (i + 1) - 1.
    """

    def __init__(self, hidden: int, dim: int, part: Compress, rope: Rope, eps: float) -> None:
        super().__init__()
        self.dim, self.part, self.rope = dim, part, rope
        width = 2 * dim if part.overlap else dim
        self.kv = Linear(hidden, width)
        self.gate = Linear(hidden, width)
        self.ape = nn.Parameter(torch.empty(part.ratio, width, dtype=torch.float32))
        self.norm = RMSNorm(dim, eps)

    def forward(self, x_BTD: Tensor, step: Step, state: PoolState | None) -> Tensor:
        """All finished entries up to the longest row, `[B, E, dim]` (E may be 0)."""
        full = upcast(x_BTD)
        kv_BTW = nn.functional.linear(full, self.kv.matrix(full.dtype))
        gate_BTW = nn.functional.linear(full, self.gate.matrix(full.dtype))
        if step.documents_BT is not None:
            return self._apart(kv_BTW, gate_BTW, step, x_BTD.dtype)
        gate_BTW = gate_BTW + self.ape[step.rows.positions_BT % self.part.ratio]
        windows = self._windows(kv_BTW, gate_BTW, step.rows, state)
        entries = self._pooled(windows.kv, windows.gate, windows.rows.positions_BT, x_BTD.dtype)
        if state is None:
            return entries
        return state.entries.append(entries, windows.rows)

    def _pooled(self, kv: Tensor, gate: Tensor, number_BE: Tensor, dtype: torch.dtype) -> Tensor:
        """Entries of windows `[B, E, slots, dim]`, the n-th of its sequence at position n * ratio."""
        pooled = (kv * gate.softmax(2)).sum(2)
        return rotate_tail(self.norm(pooled.to(dtype)), rotation(self.rope, number_BE * self.part.ratio))

    def paged(self, x_1ND: Tensor, step: PagedStep, store: Store, prefix: str) -> None:
        """The same over pages and rings, by kernels: finished entries are written, and nothing returned."""
        ratio = self.part.ratio
        kv_NW, gate_NW = self.kv.in_full(x_1ND[0]), self.gate.in_full(x_1ND[0])
        begin_N = step.positions_N // ratio * ratio
        cos, sin = step.once(("entry", self.rope, ratio), lambda: rotation(self.rope, begin_N))
        slots_N = step.slots(ratio)
        for g in step.groups:
            at, n = g.tokens, step.numbers(g)
            take_in = compress_decode if g.decoding else compress_prefill
            take_in(
                kv_NW[at], gate_NW[at], self.ape, store[prefix + "kv"], store[prefix + "gate"], n.ring_N,
                n.position_N, self.norm.weight, self.norm.eps, cos[at], sin[at], store[prefix + "entries"], slots_N[at],
                ratio=ratio, overlap=self.part.overlap, dim=self.dim,
            )  # fmt: skip

    def _apart(self, kv_BTW: Tensor, gate_BTW: Tensor, step: Step, dtype: torch.dtype) -> Tensor:
        """Entries of whole rows whose documents each have windows of their own (`Step.pools`)."""
        ratio, dim = self.part.ratio, self.dim
        assert step.documents_BT is not None
        at_BT, begin_BE = within(step.documents_BT), step.pools(ratio).begin
        gate_BTW = gate_BTW + self.ape[at_BT % ratio]
        number_BE = at_BT.gather(1, begin_BE) // ratio

        def cut(z_BTW: Tensor, back: int) -> Tensor:
            """The windows that begin `back` tokens before, `[B, E, ratio, W]`."""
            column = begin_BE[..., None] - back + torch.arange(ratio, device=begin_BE.device)
            column = column.clamp(0, z_BTW.shape[1] - 1)
            flat = column.flatten(1)[..., None].expand(-1, -1, z_BTW.shape[2])
            return z_BTW.gather(1, flat).unflatten(1, column.shape[1:])

        kv, gate = cut(kv_BTW, 0), cut(gate_BTW, 0)
        if self.part.overlap:
            none = (number_BE == 0)[..., None, None]
            before = cut(gate_BTW, ratio)[..., :dim].masked_fill(none, float("-inf"))
            kv = torch.cat((cut(kv_BTW, ratio)[..., :dim], kv[..., dim:]), 2)
            gate = torch.cat((before, gate[..., dim:]), 2)
        return self._pooled(kv, gate, number_BE, dtype)

    def _windows(self, kv_BTW: Tensor, gate_BTW: Tensor, rows: Rows, state: PoolState | None) -> Windows:
        """Tokens of this pass, behind those kept from earlier ones, cut at window borders."""
        ratio, overlap = self.part.ratio, self.part.overlap
        kept = 2 * ratio if overlap else ratio
        if state is not None:
            kv, gate = state.kv.extend(kv_BTW, rows), state.gate.extend(gate_BTW, rows)
        else:
            batch, _, width = kv_BTW.shape
            kv = torch.cat((kv_BTW.new_zeros(batch, kept, width), kv_BTW), 1)
            gate = torch.cat((gate_BTW.new_full((batch, kept, width), float("-inf")), gate_BTW), 1)
        first = [start // ratio for start in rows.starts]
        finished = [end // ratio - f for end, f in zip(rows.ends, first, strict=True)]
        count = max(finished)
        entry_rows = Rows(first, finished, count, rows.device)
        # Column `kept + t` holds position start + t, so window `first` begins `start % ratio` before it.
        begin = [kept - start % ratio for start in rows.starts]
        kv, gate = (_cut(z, begin, ratio, count, overlap) for z in (kv, gate))
        if overlap:
            kv = torch.cat((kv[:, :-1, :, : self.dim], kv[:, 1:, :, self.dim :]), 2)
            gate = torch.cat((gate[:, :-1, :, : self.dim], gate[:, 1:, :, self.dim :]), 2)
        return Windows(kv, gate, entry_rows)


def _cut(z_BXW: Tensor, begin: list[int], ratio: int, count: int, overlap: bool) -> Tensor:
    """`count` windows of `ratio` columns from `begin[b]` on, and the one before them if `overlap`:
    `[B, count (+ 1), ratio, W]`. Rows with fewer finished windows are padded by repeating columns."""
    if overlap:
        begin, count = [b - ratio for b in begin], count + 1
    columns = count * ratio
    if len(set(begin)) == 1 and begin[0] + columns <= z_BXW.shape[1]:
        cut = z_BXW[:, begin[0] : begin[0] + columns]
    else:
        index = torch.tensor(begin, device=z_BXW.device)[:, None] + torch.arange(columns, device=z_BXW.device)
        index = index.clamp(max=z_BXW.shape[1] - 1)
        cut = z_BXW.gather(1, index[..., None].expand(-1, -1, z_BXW.shape[2]))
    return cut.unflatten(1, (count, ratio))
