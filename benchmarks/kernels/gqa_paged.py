"""Grouped paged attention on one GPU: `python -m benchmarks.kernels.gqa_paged`.

Checks against fp64, then times decoding and prefill of the Llama 8B geometry (L2 flushed before each run).
SWEEP=1 times the cuts in FORMS beside what is chosen by default.
"""

from __future__ import annotations

import atexit
import itertools
import os
import sys
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.kernels.mla_decode import MATMUL, READ, last_line, median_us, one_at_a_time, race
from rorqual.kernels.gqa_paged import Config, fast, reference

HEADS, GROUPS, SIZE, PAGE = 32, 8, 128, 64

FORMS: dict[str, Config | None] = {
    "chosen": None,
    "fixed": None,
    "16 x 64, 3 stages": Config(16, 64, 4, 3),
    "16 x 64, 4 stages": Config(16, 64, 4, 4),
    "16 x 32, 4 stages": Config(16, 32, 4, 4, resident=4),
    "128 x 64, 8 warps, 3 stages": Config(128, 64, 8, 3),
    "64 x 64, 4 warps, 3 stages": Config(64, 64, 4, 3),
    "gluon": Config(128, 128, 8, 2, gluon=True),
}


def make(counts: list[int], ends: list[int], spare: int = 0) -> tuple[Tensor, ...]:
    """Random queries, keys and values; pages in a random order."""
    blocks = -(-max(ends) // PAGE)
    pages = torch.randn(2, len(ends) * blocks + 1, PAGE, GROUPS, SIZE, device="cuda", dtype=torch.bfloat16)
    table = (torch.randperm(len(ends) * blocks, device="cuda", dtype=torch.int32) + 1).view(len(ends), blocks)
    q = torch.randn(sum(counts) + spare, HEADS, SIZE, device="cuda", dtype=torch.bfloat16)
    starts = torch.tensor([0, *counts], device="cuda", dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return q, pages[0], pages[1], table, torch.tensor(ends, device="cuda", dtype=torch.int32), starts


def check(cut: Config | None, fixed: bool) -> str:
    """Largest difference from the fp32 reference, relative to the largest value."""
    cases = [
        ([1, 1, 0, 1], [1000, 0, 5, 64]),
        ([8, 3, 1], [2000, 65, 130]),
        ([300, 1, 0, 700], [300, 900, 0, 1500]),
    ]
    most, wrong = 0.0, ""
    for counts, ends in cases if cut is None else cases[:1] if cut.block_m == 16 else cases[2:]:
        given = make(counts, ends, 5)
        for s, end in enumerate(ends):  # what is no content must not be read as such
            tail = given[3][s, end // PAGE :].long()
            for pages in given[1:3]:
                pages[tail[1:]] = float("nan")
                if len(tail):
                    pages[tail[0], end % PAGE :] = float("nan")
        right = reference(*given, max_count=max(counts), scale=0.09).float()
        ours = fast(*given, max_count=max(counts), scale=0.09, fixed=fixed, config=cut).float()
        worst = float((ours - right).abs().max() / right.abs().max())
        most = max(most, worst)
        if not worst < 1e-2:
            wrong += f" WRONG {counts}: {worst:.4f}"
    return wrong or f" right ({most:.4f})"


def check_bits() -> str:
    """The fixed form: one pass, chunks and single queries."""
    q, k, v, table, ends, starts = make([1000, 777], [1000, 777])
    whole = fast(q, k, v, table, ends, starts, max_count=1000, scale=0.09, fixed=True)
    same = True
    for begin, end in itertools.pairwise([0, 100, 164, 700, 701, 708, 777]):
        rows = q[1000 + begin : 1000 + end]
        own = torch.tensor([0, end - begin], device="cuda", dtype=torch.int32)
        stop = torch.tensor([end], device="cuda", dtype=torch.int32)
        part = fast(rows, k, v, table[1:], stop, own, max_count=end - begin, scale=0.09, fixed=True)
        same &= torch.equal(part, whole[1000 + begin : 1000 + end])
    return " same bits" if same else " BITS DIFFER"


def measure(cut: Config | None, fixed: bool, decode: bool) -> None:
    counts, tokens = ([1] * 32, 4096) if decode else ([8192] * 2, 8192)
    given = make(counts, [tokens] * len(counts))
    op = partial(fast, *given, max_count=max(counts), scale=SIZE**-0.5, fixed=fixed, config=cut)
    for splits in (None, 1, 2, 8) if cut is not None and decode else (None,):
        us = median_us(partial(op, splits=splits))
        rate = len(counts) * tokens * GROUPS * SIZE * 4 / us / 1e6
        flops = 2 * len(counts) * tokens**2 * HEADS * SIZE / us / 1e6
        if decode:
            print(f"   decode 32 x 4,096 {us:8.1f} us {rate:5.2f} TB/s ({rate / READ:4.0%}) splits {splits}")
        else:
            print(f"   prefill 2 x 8,192 {us:8.1f} us {flops:6.1f} TFLOP/s ({flops / MATMUL:4.0%})")


def child(name: str) -> None:
    """One form, in a process of its own: checks, then, one process at a time, its times."""
    cut, fixed = FORMS[name], name == "fixed"
    torch.manual_seed(0)
    try:
        said = check(cut, fixed) + (check_bits() if fixed else "")
    except Exception as error:
        said = f" FAILED {last_line(error)}"
    torch.cuda.synchronize()
    with one_at_a_time():
        print(f"{name}:{said}")
        if cut is None or cut.block_m == 16:
            measure(cut, fixed, True)
        if cut is None or cut.block_m > 16:
            measure(cut, fixed, False)


def main() -> None:
    if len(sys.argv) > 1:
        atexit.register((Path(os.environ["RACE"]) / f"{os.getpid()}.ready").touch)
        child(sys.argv[1])
    else:
        race("gqa_paged", list(FORMS) if os.environ.get("SWEEP") == "1" else ["chosen", "fixed"])


if __name__ == "__main__":
    main()
