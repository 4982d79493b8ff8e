"""The FP8 grouped product of the experts, in turns with DeepGEMM's: `python -m benchmarks.kernels.grouped`.

Three times for each shape: the product alone, from codes that lie by expert and scales as the kernel reads them to
bf16 rows, in a row (CUDA graphs; the GPU then draws all the power it may and clocks lower) and one by one (the L2
flushed before each); and in a row with its plan, which is the table of tiles on our side and x's scales in columns
on theirs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from triton.testing import do_bench

from benchmarks.kernels.experts import guarded, matrices
from rorqual.kernels import experts_gluon_down
from rorqual.kernels.experts import Tiles, plan
from rorqual.kernels.experts_run import Batch, place
from rorqual.kernels.quant import FP8

SHAPES = ((8, 4096, 4096, 7168), (64, 1024, 2816, 2048), (64, 1024, 2048, 1408))
"""Experts, rows each, out, in."""
CALLS = 3
"""Products in a graph."""


class Case:
    """Rows of random codes, each expert's behind one another, and its matrices."""

    def __init__(self, count: int, rows: int, out: int, depth: int) -> None:
        self.count, self.rows, self.out, self.depth = count, rows, out, depth
        self.places = count * rows
        self.matrices = matrices(count, out, depth, True)
        self.codes = torch.randn(self.places, depth, device="cuda").to(FP8)
        self.scales = torch.rand(self.places, depth // 128, device="cuda")
        self.ids = torch.arange(count, device="cuda", dtype=torch.int32).repeat_interleave(rows)
        self.work = 2.0 * self.places * out * depth
        self.taken = torch.zeros(CALLS, device="cuda", dtype=torch.int32)
        self.tile: Tiles = plan(8192, 6, 64, True, False, True).down
        self.order = torch.empty(self.places, device="cuda", dtype=torch.int32)
        self.table = torch.empty(3, self.places // self.tile.rows + count, device="cuda", dtype=torch.int32)

    def sort(self) -> None:
        w = self.matrices
        stacks = w, w, w
        batch = Batch(self.codes, self.ids[:, None], self.scales, stacks, stacks, 0, None, None)
        place(batch, self.tile.rows, self.order, self.table, self.codes, self.scales[:0], self.taken)

    def ours(self, y: Tensor, call: int) -> None:
        scale = self.matrices.scale
        assert scale is not None
        experts_gluon_down.down(
            self.codes, self.scales, self.order, self.table, (self.matrices.codes, scale),
            (self.matrices.codes[0], scale[0]), y, self.taken[call:], 0, 0, self.tile.stages,
        )  # fmt: skip

    def apart(self, y: Tensor) -> float:
        """Of some rows of y from fp32: norm of the difference over the norm."""
        some = torch.randint(self.places, (256,), device="cuda").tolist()
        some += [0, self.places - 1, 127, 128, self.rows - 1, self.rows]
        x = (self.codes[some].float().unflatten(1, (-1, 128)) * self.scales[some][..., None]).flatten(1)
        expected = torch.empty(len(some), self.out, device="cuda")
        for expert in {p // self.rows for p in some}:
            mine = [i for i, p in enumerate(some) if p // self.rows == expert]
            expected[mine] = x[mine] @ self.matrices.matrix(torch.float32, expert).T
        return float((y[some].float() - expected).norm() / expected.norm())


def graph_of(call: Callable[[int], Any], before: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    """A graph of `before` and then CALLS calls."""
    before()
    call(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        before()
        for number in range(CALLS):
            call(number)
    graph.replay()
    torch.cuda.synchronize()
    return graph


def in_turns(graphs: list[torch.cuda.CUDAGraph], budget: float = 0.25) -> list[float]:
    """Median seconds a call of each graph, replayed one after the other."""
    taken: list[list[float]] = [[] for _ in graphs]
    begun = time.perf_counter()
    while len(taken[0]) < 5 or time.perf_counter() - begun < budget:
        for graph, times in zip(graphs, taken, strict=True):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) / 1e3 / CALLS)
    return [statistics.median(times) for times in taken]


def compare(count: int, rows: int, out: int, depth: int) -> None:
    """A line for the product alone and with its plan."""
    case = Case(count, rows, out, depth)
    y = torch.full((case.places, out), float("nan"), device="cuda", dtype=torch.bfloat16)
    case.sort()
    graphs = [graph_of(lambda call: case.ours(y, call), case.taken.zero_)]

    def planned(_: int) -> None:
        case.sort()
        case.ours(y, 0)

    def single() -> None:
        case.taken.zero_()
        case.ours(y, 0)

    one_by_one: list[Callable[[], None]] = [single]
    off = case.apart(y)
    graphs.append(graph_of(planned, lambda: None))
    other = float("nan")
    try:
        import deep_gemm
        from deep_gemm.utils.layout import get_mn_major_tma_aligned_tensor
    except ImportError:
        pass
    else:
        y2 = torch.empty_like(y)
        columns = get_mn_major_tma_aligned_tensor(case.scales)
        w = case.matrices.codes, case.matrices.scale

        def theirs(scales: Tensor) -> Callable[[int], None]:
            return lambda _: deep_gemm.m_grouped_fp8_gemm_nt_contiguous(
                (case.codes, scales), w, y2, case.ids, disable_ue8m0_cast=True
            )

        graphs += [graph_of(theirs(s), lambda: None) for s in (columns, case.scales)]
        one_by_one.append(lambda: theirs(columns)(0))
        other = case.apart(y2)
    rates = [case.work / s / 1e12 for s in in_turns(graphs)]
    singles = [case.work / do_bench(run, warmup=5, rep=40, return_mode="median") / 1e9 for run in one_by_one]
    text = f"grouped FP8 {count} x {rows} x {out} x {depth} ({off:.1e}, {other:.1e} from fp32)"
    for name, found in (("in a row", rates[0::2]), ("with its plan", rates[1::2]), ("one by one", singles)):
        text += f"; {name}: {found[0]:.0f} TFLOP/s"
        if len(found) > 1:
            text += f", DeepGEMM {found[1]:.0f}, {found[0] / found[1]:.0%}"
    print(text, flush=True)


def main() -> None:
    torch.manual_seed(int(time.time()))
    for shape in SHAPES:
        guarded(f"grouped {shape}", lambda: compare(*shape))  # noqa: B023
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
