"""Exchanges of a decoding pass between GPUs: through peers' memory, and by NCCL, as replays of a CUDA graph.

torchrun --nproc-per-node 2 -m benchmarks.kernels.exchange
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from rorqual.nn.layout import Axis, Layout

REPEAT = 20


def graph_time(work: Callable[[], object], host: dist.ProcessGroup) -> float:
    """Microseconds a call, `REPEAT` of them in a graph, replayed by all ranks at once."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(REPEAT):
            work()
    best = float("inf")
    for _ in range(5):
        dist.barrier(host)
        graph.replay()
        torch.cuda.synchronize()
        begun = time.perf_counter()
        for _ in range(10):
            graph.replay()
        torch.cuda.synchronize()
        best = min(best, (time.perf_counter() - begun) / (10 * REPEAT))
    return best * 1e6


def check(axis: Axis, plain: Axis) -> float:
    """The largest difference from NCCL over many random calls of all kinds and sizes, in a row and in turn."""
    far = 0.0
    generator = torch.Generator().manual_seed(0)
    for turn in range(200):
        rows = int(torch.randint(1, 400, (1,), generator=generator)) * axis.size
        kind = (torch.bfloat16, torch.float32)[turn % 2]
        x = torch.randn(rows, 1024, device="cuda").to(kind)
        for name in ("gather", "scatter_sum", "sum"):
            found, right = getattr(axis, name)(x.clone()), getattr(plain, name)(x.clone())
            far = max(far, float((found.float() - right.float()).abs().max()))
    return far


def main() -> None:
    layout = Layout(direct=True)
    axis = layout.data_axis
    assert axis is not None and axis.near is not None and layout.host is not None
    plain = Axis(axis.group, axis.size, axis.rank)
    far = check(axis, plain)
    if layout.rank == 0:
        print(f"largest difference from NCCL in 600 calls: {far:.1e}", flush=True)
    for rows in (8, 128, 256, 512):
        x: Tensor = torch.randn(rows, 2048, device="cuda", dtype=torch.bfloat16)
        line = [f"{rows:>4} x 2,048 bf16"]
        for name in ("gather", "scatter_sum", "sum"):
            times = []
            for one in (axis, plain):

                def work(one: Axis = one, name: str = name, x: Tensor = x) -> object:
                    return getattr(one, name)(x)

                times.append(graph_time(work, layout.host))
            line.append(f"{name} {times[0]:.1f} / NCCL {times[1]:.1f} us")
        if layout.rank == 0:
            print("; ".join(line), flush=True)


if __name__ == "__main__":
    main()
