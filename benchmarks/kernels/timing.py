"""How kernel benchmarks are timed and told: replays of one CUDA graph, over several copies of the inputs where these
would fit the L2, beside the bytes and the arithmetic that are needed."""

import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch

READ, BF16, FP8 = 4.35e12, 735e12, 1.275e15
L2 = 60e6
DEVICE = "cuda"
Call = Callable[[], Any]


def micros(calls: list[Call], least: int = 8, budget: float = 0.05) -> float:
    """Median us of one call, all of `calls` in turn in one graph."""
    torch.cuda.synchronize()
    for call in calls:
        call()
    torch.cuda.synchronize()
    begun = time.perf_counter()
    calls[0]()
    torch.cuda.synchronize()
    slow = time.perf_counter() - begun > 2e-3
    graph, times = torch.cuda.CUDAGraph(), 1 if slow else max(1, least // len(calls))
    with torch.cuda.graph(graph):
        for _ in range(times):
            for call in calls:
                call()
    taken: list[float] = []
    begun = time.perf_counter()
    while len(taken) < 4 or (time.perf_counter() - begun < budget and len(taken) < 40):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        taken.append(start.elapsed_time(end) * 1e3 / (times * len(calls)))
    return statistics.median(taken[1:])


def captured(calls: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """A graph that holds all calls, replayed once."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):  # torch.cuda.graph would collect garbage and empty the cache each time
        calls[0]()
        stream.synchronize()
        graph.capture_begin()
        try:
            for call in calls:
                call()
        finally:
            graph.capture_end()
    graph.replay()
    return graph


def replay_us(graph: torch.cuda.CUDAGraph) -> float:
    """Microseconds of a replay."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3


def replays_us(graph: torch.cuda.CUDAGraph, replays: int) -> float:
    """Microseconds of a replay among others that follow one another: the median."""
    for _ in range(3):
        graph.replay()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(2 * replays)]
    for begin, end in zip(marks[::2], marks[1::2], strict=True):
        begin.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in zip(marks[::2], marks[1::2], strict=True)) * 1e3


def turns_us(
    graphs: dict[Any, torch.cuda.CUDAGraph], rounds: int = 7, pause: float = 0.0
) -> dict[Any, float]:
    """Microseconds of each graph: the median of replays that take turns, for the clock falls under load."""
    found: dict[Any, list[float]] = {name: [] for name in graphs}
    for _ in range(rounds):
        for name, graph in graphs.items():
            time.sleep(pause)
            found[name].append(replay_us(graph))
    return {name: sorted(times)[rounds // 2] for name, times in found.items()}


def line(name: str, us: float, size: float, flops: float = 0.0, peak: float = BF16, note: str = "") -> None:
    floor = max(size / READ, flops / peak) * 1e6
    print(
        f"{name:46s} {us:9.1f} us  {size / us / 1e3:7.0f} GB/s  {flops / us / 1e6:6.0f} TFLOP/s  "
        f"floor {floor:8.1f}  {100 * floor / us:4.0f}% {note}",
        flush=True,
    )


def guarded(what: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    try:
        return what(*args, **kwargs)
    except Exception:
        print(f"FAILED {what.__name__} {args} {kwargs}"[:200])
        print("\n".join(traceback.format_exc().strip().splitlines()[-4:])[:1500], flush=True)
        return None


def report(kind: str, case: Any, found: list[tuple[float, Any]]) -> None:
    best = "; ".join(f"{us:.1f} {what}" for us, what in sorted(found)[:5])
    print(f"sweep {kind} {case}: {best}; worst {max(found)[0]:.1f}", flush=True)
