"""Latent decode attention on one GPU: `python -m benchmarks.kernels.mla_decode`.

Checks against fp64, then times each shape (a CUDA graph's replay, L2 flushed before each) beside FlashMLA
where it is installed.
SWEEP=1 times all FORMS, FORMS="a;b" those named; CHECK_ONLY=1 only checks them.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import itertools
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rorqual.kernels.mla_decode import Config, fast, pack_latents, reference

RANK, ROPE, SIZE = 512, 64, 64
READ, MATMUL = 4.35, 790.0
"""Ceilings: TB/s read and bf16 TFLOP/s."""

SHAPES = {  # heads, batch, tokens, width: FlashMLA's microseconds as measured before
    (16, 128, 4096, 1): 167,
    (64, 128, 4096, 1): 170,
    (128, 128, 4096, 1): 249,
    (128, 8, 32768, 1): None,
    (16, 1, 131072, 1): 80,
    (16, 32, 4096, 1): 56,
    (16, 256, 1024, 1): None,
    (16, 128, 4096, 2): None,
}

FORMS: dict[str, Config | None] = {
    "chosen": None,
    "fixed": None,
    "fp8": None,
    "hopper": Config(64, 64, 12, 1, 1, True),
    "16 x 32, 4 warps, 3 stages": Config(16, 32, 4, 3, 2),
}
"""Cuts to compare; a cut runs the shapes whose rows fill it but for a half."""


def make(heads: int, batch: int, tokens: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random queries and latents; pages in a random order."""
    blocks = -(-tokens // SIZE)
    pages = torch.randn(batch * blocks + 1, SIZE, RANK + ROPE, device="cuda", dtype=torch.bfloat16)
    table = (torch.randperm(batch * blocks, device="cuda", dtype=torch.int32) + 1).view(batch, blocks)
    ends = torch.full((batch,), tokens, device="cuda", dtype=torch.int32)
    q = torch.randn(batch * width, heads, RANK + ROPE, device="cuda", dtype=torch.bfloat16)
    return q, pages, table, ends


@contextlib.contextmanager
def one_at_a_time() -> Iterator[None]:
    """Wait until all processes of a race are ready, then for this one's turn at the GPU."""
    folder = Path(os.environ["RACE"])
    (folder / f"{os.getpid()}.ready").touch()
    give_up = time.time() + 30
    while len(list(folder.glob("*.ready"))) < int(os.environ["RACERS"]) and time.time() < give_up:
        time.sleep(0.1)
    with (folder / "turn").open("w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        yield
        torch.cuda.synchronize()
        sys.stdout.flush()


def race(module: str, names: list[str], seconds: float = 65) -> None:
    """Run `benchmarks.kernels.<module> NAME` for every name: a process each, so that a fault stays alone. They
    compile and check side by side and are timed in turn."""
    started = time.time()
    with tempfile.TemporaryDirectory() as folder:
        env = {**os.environ, "RACE": folder, "RACERS": str(len(names))}
        command = [sys.executable, "-m", f"benchmarks.kernels.{module}"]
        pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        runs = [(name, subprocess.Popen([*command, name], env=env, **pipe)) for name in names]  # type: ignore[call-overload]
        for name, run in runs:
            try:
                said, _ = run.communicate(timeout=max(1, started + seconds - time.time()))
            except subprocess.TimeoutExpired:
                run.kill()
                said = run.communicate()[0] + "\nout of time"
            if run.returncode:
                said = f"{name} DIED: " + " | ".join(said.strip().splitlines()[-2:])[-300:]
            print(said.strip(), flush=True)
    print(f"{time.time() - started:.0f} s")


def graph_of(runs: list[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    runs[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run in runs:
            run()
    return graph


def median_us(run: Callable[[], object]) -> float:
    """Median time of `run` replayed as a CUDA graph, start of the graph included; the L2 is flushed before each."""
    from triton.testing import do_bench

    return 1e3 * do_bench(graph_of([run]).replay, warmup=10, rep=40, return_mode="median")


def launched_us(run: Callable[[], object]) -> float:
    """Median time of `run` launched on a waiting GPU without a graph, L2 flushed: as libraries are often measured."""
    flush = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    times = []
    for _ in range(15):
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        torch.cuda._sleep(1_000_000)
        before.record()
        run()
        after.record()
        torch.cuda.synchronize()
        times.append(before.elapsed_time(after))
    return 1e3 * sorted(times)[len(times) // 2]


def in_a_row_us(runs: list[Callable[[], object]]) -> float:
    """Time of each of `runs`, on different data, one after another in a CUDA graph: as layers in the engine."""
    graph = graph_of([run for _ in range(4) for run in runs])
    events = [torch.cuda.Event(enable_timing=True) for _ in range(8)]
    for event in events:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    times = sorted(a.elapsed_time(b) for a, b in itertools.pairwise(events))
    return 1e3 * times[len(times) // 2] / (4 * len(runs))


def last_line(error: Exception) -> str:
    return " ".join(traceback.format_exception_only(error)[-1].split())[:200]


def check(cut: Config | None, fixed: bool, fp8: bool) -> str:
    """Largest difference from the fp32 reference over awkward batches, relative to the largest value."""
    cases: list[tuple[int, int, int | str | None]]
    if cut is not None:
        cases = [(cut.block_m // 2 + 1, 1, None), (cut.block_m // 2, 3, None), (cut.block_m, 1, 1)]
    else:
        cases = [(heads, width, "fixed" if fixed else None) for heads in (16, 20, 128) for width in (1, 3)]
    most, wrong = 0.0, ""
    for heads, width, splits in cases:
        ends = torch.tensor([1000, 0, 3, 64, 129, 4000], device="cuda", dtype=torch.int32)
        q, pages, table, _ = make(heads, len(ends), 4096, width)
        if fp8:
            pages = pack_latents(pages, RANK)
        for s, end in enumerate(ends.tolist()):  # what is no content must not be read as such
            tail = table[s, end // SIZE :].long()
            pages[tail[1:]] = 255 if fp8 else float("nan")
            pages[tail[0], end % SIZE :] = 255 if fp8 else float("nan")
        given: dict[str, Any] = {"width": width, "rank": RANK, "scale": 0.04}
        right = reference(q, pages, table, ends, **given).float()
        ours = fast(q, pages, table, ends, splits=splits, config=cut, **given).float()
        worst = float((ours - right).abs().max() / right.abs().max())
        most = max(most, worst)
        if not worst < 1e-2:
            wrong += f" WRONG: {heads} heads, width {width}, splits {splits}: {worst:.4f}"
    return wrong or f" right ({most:.4f})"


def check_bits() -> str:
    """The fixed form: a query alone, in its batch, inside a group of 4 and with a longer table."""
    note = ""
    for heads in (16, 128):
        q, pages, table, _ = make(heads, 5, 4096, 4)
        ends = torch.tensor([1000, 4096, 9, 513, 3000], device="cuda", dtype=torch.int32)
        given: dict[str, Any] = {"rank": RANK, "scale": 0.04, "splits": "fixed"}
        group = fast(q, pages, table, ends, width=4, **given)
        longer = torch.cat((table, table), 1)
        same = torch.equal(fast(q, pages, longer, ends, width=4, **given), group)
        for s, j in itertools.product(range(5), range(4)):
            one = fast(q[4 * s + j, None], pages, table[s, None], ends[s, None] - 3 + j, width=1, **given)
            same &= torch.equal(one[0], group[4 * s + j])
        note += f" fixed form, {heads} heads: {'same bits' if same else 'BITS DIFFER'}"
    return note


def flash_mla_us(q: Tensor, pages: Tensor, table: Tensor, ends: Tensor, width: int) -> float | None:
    try:
        import flash_mla  # type: ignore[import-not-found]
    except ImportError:
        return None
    meta, _ = flash_mla.get_mla_metadata()
    grouped = q.view(ends.shape[0], width, *q.shape[1:])

    def run() -> object:
        return flash_mla.flash_mla_with_kvcache(
            grouped, pages[:, :, None], table, ends, RANK, meta, causal=True, use_legacy=True
        )

    from triton.testing import do_bench

    return 1e3 * do_bench(run, return_mode="median")


def line(shape: tuple[int, int, int, int], us: float, note: str) -> str:
    heads, batch, tokens, width = shape
    rate = batch * tokens * (RANK + ROPE) * 2 / us / 1e6
    flops = 2 * batch * width * tokens * heads * (2 * RANK + ROPE) / us / 1e6
    return (
        f"h{heads:<4} B{batch:<4} T{tokens:<7} w{width} {us:8.1f} us {rate:5.2f} TB/s ({rate / READ:4.0%}) "
        f"{flops:6.1f} TFLOP/s ({flops / MATMUL:4.0%}) {note}"
    )


def child(name: str) -> None:
    """One form, in a process of its own: checks, then, one process at a time, its times."""
    cut, fixed, fp8 = FORMS[name], name == "fixed", "fp8" in name
    torch.manual_seed(0)
    try:
        said = check(cut, fixed, fp8) + (check_bits() if fixed else "")
    except Exception as error:
        said = f" FAILED {last_line(error)}"
    torch.cuda.synchronize()
    if os.environ.get("CHECK_ONLY") == "1":
        print(f"{name}:{said}")
        return
    with one_at_a_time():
        print(f"{name}:{said}")
        for shape, peer in SHAPES.items():
            heads, batch, _, width = shape
            rows = width * heads
            fills = cut is None or cut.gluon or cut.block_m // 2 < rows <= cut.block_m
            if not fills:
                continue
            q, pages, table, ends = make(*shape)
            latents = pack_latents(pages, RANK) if fp8 else pages
            op = partial(fast, table_SB=table, ends_S=ends, width=width, rank=RANK, scale=0.04, config=cut)
            one = partial(op, q, latents)
            if cut is None:
                run = partial(op, splits="fixed" if fixed else None)
                us = median_us(partial(run, q, latents))
                copies = [latents, *(latents.clone() for _ in range(2 if fp8 else 1))]
                row = in_a_row_us([partial(run, q, copy) for copy in copies])
                theirs = None if fixed or fp8 else flash_mla_us(q, pages, table, ends, width) or peer
                beside = f"FlashMLA {theirs:.1f} us: {theirs / us:.0%}" if theirs else ""
                plain = launched_us(partial(run, q, latents))
                print(line(shape, us, f"in a row {row:.1f} us, launched {plain:.1f} us {beside}"))
                continue
            tries = (None, 66, 264) if batch == 1 else (None, 2, 4) if batch >= 128 else (None, 8, 16)
            times = ((median_us(partial(one, splits=n)), n) for n in tries)
            row = in_a_row_us([partial(one, splits=None), partial(op, q, latents.clone(), splits=None)])
            plain = launched_us(one)
            beside = f"in a row {row:.1f} us, launched {plain:.1f} us, "
            print(f"   {shape} {beside}" + ", ".join(f"x{n} {us:.1f} us" for us, n in times))


def main() -> None:
    if len(sys.argv) > 1:
        atexit.register((Path(os.environ["RACE"]) / f"{os.getpid()}.ready").touch)
        child(sys.argv[1])
    else:
        asked = os.environ.get("FORMS", "all" if os.environ.get("SWEEP") == "1" else "chosen")
        race("mla_decode", list(FORMS) if asked == "all" else asked.split(";"))


if __name__ == "__main__":
    main()
