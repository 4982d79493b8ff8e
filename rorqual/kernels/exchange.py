"""Sums and exchanges of small tensors between the GPUs of one machine, each in one kernel that reads its peers' memory.

What a decoding pass exchanges is small (0.5 MB a rank for 128 tokens of 2,048) and often, so what counts is the time
to begin. A program takes one chunk: it puts its rank's numbers into a slot that all peers can read, raises its flag
at each of them, waits for theirs, and reads their slots. No program waits for another of its own rank, but all must
be on the GPU at once: `LIMIT` sees to that. Sums are taken in fp32 in the order of ranks: the same bits on every rank.

Flags count calls, so nothing is ever reset, and a graph can be replayed. There are two slots in turn: one is
written again two calls later, and who has raised the flag of the call between has read it.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rorqual.kernels.gpu import tl, triton

GATHER, SCATTER, SUM = range(3)
SLOT = 8192
"""Bytes of a slot."""
PROGRAMS = 512
"""Programs at most; of 8 warps each, they fit a Hopper GPU at once twice over."""
LIMIT = SLOT * PROGRAMS
"""Bytes that one call can take."""
FLAGS = 2 * LIMIT
"""Where flags begin, in bytes: int32 [ranks, PROGRAMS], by who raised them."""
TYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def room(ranks: int) -> int:
    """Bytes of memory that each rank shares with its peers, zero at first."""
    return FLAGS + 4 * ranks * PROGRAMS


@triton.jit
def exchange_kernel(
    x_ptr, out_ptr, bases_ptr, epochs_ptr, stop_ptr, part, RANK: tl.constexpr, RANKS: tl.constexpr,
    MODE: tl.constexpr, BLOCK: tl.constexpr, SLOT: tl.constexpr, PROGRAMS: tl.constexpr,
    FLAGS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One chunk of `BLOCK` numbers of each part.

    MODE 0: x `[part]` of all ranks to out `[RANKS, part]`. 1: x `[RANKS, part]`; out `[part]` is the sum of all ranks'
    part number RANK. 2: out `[part]` is the sum of all ranks' x `[part]`.
    """
    kind = x_ptr.dtype.element_ty
    pid = tl.program_id(0)
    epoch = tl.load(epochs_ptr + pid) + 1
    slot = (pid * 2 + (epoch & 1)) * SLOT
    lane = tl.arange(0, BLOCK)
    at = pid * BLOCK + lane
    inside = at < part
    own_base = tl.load(bases_ptr + RANK)
    own = tl.multiple_of((own_base + slot).to(tl.pointer_type(kind)), 16)
    if MODE == 1:
        for p in tl.static_range(RANKS):
            if p != RANK:
                tl.store(own + p * BLOCK + lane, tl.load(x_ptr + p * part + at, inside, other=0.0))
        mine = tl.load(x_ptr + RANK * part + at, inside, other=0.0)
    else:
        mine = tl.load(x_ptr + at, inside, other=0.0)
        tl.store(own + lane, mine)
    tl.debug_barrier()
    for p in tl.static_range(RANKS):
        if p != RANK:
            flags = (tl.load(bases_ptr + p) + FLAGS).to(tl.pointer_type(tl.int32))
            tl.atomic_xchg(flags + RANK * PROGRAMS + pid, epoch, sem="release", scope="sys")
    waiting = (own_base + FLAGS).to(tl.pointer_type(tl.int32))
    for p in tl.static_range(RANKS):
        if p != RANK:
            flag = waiting + p * PROGRAMS + pid
            seen = tl.atomic_or(flag, 0, sem="acquire", scope="sys")
            spins = 0
            stop = 0
            while (epoch - seen > 0) & (stop == 0):  # the count may have gone round
                seen = tl.atomic_or(flag, 0, sem="acquire", scope="sys")
                spins += 1
                if spins % 4096 == 0:
                    stop = tl.load(stop_ptr, volatile=True)
    tl.debug_barrier()
    total = tl.zeros((BLOCK,), WIDE)
    for p in tl.static_range(RANKS):
        theirs = tl.multiple_of((tl.load(bases_ptr + p) + slot).to(tl.pointer_type(kind)), 16)
        if MODE == 1:
            theirs += RANK * BLOCK
        x = mine
        if p != RANK:
            x = tl.load(theirs + lane, cache_modifier=".cg")
        if MODE == 0:
            tl.store(out_ptr + p * part + at, x, inside)
        else:
            total += x.to(WIDE)
    if MODE != 0:
        tl.store(out_ptr + at, total.to(kind), inside)
    tl.store(epochs_ptr + pid, epoch)


class Near:
    """This rank's end: addresses of all ranks' shared memory (`room` bytes each), in the order of ranks."""

    def __init__(self, bases: Sequence[int], rank: int, device: torch.device) -> None:
        self.rank, self.ranks = rank, len(bases)
        self.bases = torch.tensor(bases, dtype=torch.int64, device=device)
        self.epochs = torch.zeros(PROGRAMS, dtype=torch.int32, device=device)
        self.stop = torch.zeros(1, dtype=torch.int32)
        """Set to 1 to have kernels that wait give up (their results are then worth nothing)."""
        self.holds: object = None
        """What keeps the memory alive."""
        if device.type == "cuda":
            self.stop = self.stop.pin_memory()

    def takes(self, x: Tensor) -> bool:
        """Whether `x` is small enough, and of a type it knows."""
        even = self.ranks & (self.ranks - 1) == 0  # else slots are not filled
        return 0 < x.numel() * x.element_size() <= LIMIT // (1 if even else 2) and x.dtype in TYPES

    def gather(self, x: Tensor) -> Tensor:
        """All ranks' `x [N, ...]`: `[ranks * N, ...]`."""
        return self._run(x, x.new_empty(self.ranks * x.shape[0], *x.shape[1:]), x.numel(), GATHER)

    def scatter_sum(self, x: Tensor) -> Tensor:
        """This rank's part `[M / ranks, ...]` of the sum of all ranks' `x [M, ...]`."""
        out = x.new_empty(x.shape[0] // self.ranks, *x.shape[1:])
        return self._run(x, out, out.numel(), SCATTER)

    def sum(self, x: Tensor) -> Tensor:
        """The sum of all ranks' `x`."""
        return self._run(x, torch.empty_like(x), x.numel(), SUM)

    def _run(self, x: Tensor, out: Tensor, part: int, mode: int) -> Tensor:
        wide = tl.float64 if x.dtype == torch.float64 else tl.float32
        block = SLOT // x.element_size() // (triton.next_power_of_2(self.ranks) if mode == SCATTER else 1)
        exchange_kernel[(triton.cdiv(part, block),)](
            x, out, self.bases, self.epochs, self.stop, part, RANK=self.rank, RANKS=self.ranks, MODE=mode,
            BLOCK=block, SLOT=SLOT, PROGRAMS=PROGRAMS, FLAGS=FLAGS, WIDE=wide, num_warps=8,
        )  # fmt: skip
        return out
