"""The routed feed-forward layer on a GPU: `python -m benchmarks.kernels.experts` (SWEEP=1 tries other tiles).

Times are those of CUDA-graph replay of whole calls, each call of a graph with its own tokens and ids.
"""

from __future__ import annotations

import dataclasses
import itertools
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from triton.testing import do_bench

from rorqual.kernels import experts_run
from rorqual.kernels.experts import Plan, Shared, Tiles, Weights, fast, plan, reference
from rorqual.kernels.quant import FP8

READ, BF16_PEAK, FP8_PEAK = 4.35e12, 740e12, 1275e12
Case = tuple[Tensor, Tensor, Tensor, Weights, Weights, Weights]


@dataclasses.dataclass(frozen=True)
class Shape:
    experts: int
    hidden: int
    width: int
    chosen: int
    shared: int


LITE, V3 = Shape(64, 2048, 1408, 6, 2), Shape(32, 7168, 2048, 8, 1)


def matrices(count: int, rows: int, columns: int, fp8: bool) -> Weights:
    """Random matrices `[count, rows, columns]`; codes with scales that differ from block to block."""
    if not fp8:
        w = torch.empty(count, rows, columns, device="cuda", dtype=torch.bfloat16)
        return Weights(w.normal_(std=columns**-0.5))
    codes = torch.empty(count, rows, columns, device="cuda", dtype=FP8)
    for one in codes:
        one.copy_(torch.randn(rows, columns, device="cuda").clamp_(-4, 4) * 64)
    scale = torch.rand(count, -(-rows // 128), -(-columns // 128), device="cuda") + 0.5
    return Weights(codes, scale * columns**-0.5 / 64, (128, 128))


class Layer:
    def __init__(self, shape: Shape, fp8: bool) -> None:
        self.shape, self.fp8 = shape, fp8
        e, d, w = shape.experts, shape.hidden, shape.width
        self.stacks = matrices(e, w, d, fp8), matrices(e, w, d, fp8), matrices(e, d, w, fp8)
        wide = shape.shared * w
        ws = matrices(1, wide, d, fp8), matrices(1, wide, d, fp8), matrices(1, d, wide, fp8)
        drop = lambda t: None if t is None else t[0]  # noqa: E731
        self.shared: Shared | None = tuple(Weights(drop(m.codes), drop(m.scale), m.block) for m in ws)  # type: ignore

    def batch(self, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        x = torch.randn(tokens, self.shape.hidden, device="cuda", dtype=torch.bfloat16)
        ids = torch.rand(tokens, self.shape.experts, device="cuda").topk(self.shape.chosen, 1).indices
        return x, ids, torch.rand(tokens, self.shape.chosen, device="cuda")

    def bytes(self, ids: list[Tensor]) -> float:
        """Of the matrices read, on average."""
        each = 3 * self.shape.hidden * self.shape.width * (1 if self.fp8 else 2)
        hit = sum(float(i.unique().numel()) for i in ids) / len(ids)
        return (hit + self.shape.shared) * each

    def flops(self, tokens: int) -> float:
        return 6.0 * tokens * (self.shape.chosen + self.shape.shared) * self.shape.hidden * self.shape.width


def replay(calls: list[Callable[[], Any]], budget: float = 0.02) -> float:
    """Seconds a call in a CUDA graph of all `calls`."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    torch.cuda.synchronize()
    t = time.perf_counter()
    graph.replay()
    torch.cuda.synchronize()
    once = time.perf_counter() - t
    times = []
    for _ in range(max(3, min(15, int(budget / once)))):
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record()
        graph.replay()
        b.record()
        torch.cuda.synchronize()
        times.append(a.elapsed_time(b))
    return sorted(times)[len(times) // 2] / 1e3 / len(calls)


def calls_for(tokens: int) -> int:
    return 12 if tokens <= 64 else 4 if tokens <= 512 else 2


def timed(layer: Layer, tokens: int, **options: Any) -> tuple[float, list[Tensor]]:
    torch.manual_seed(tokens)
    batches = [layer.batch(tokens) for _ in range(calls_for(tokens))]
    run = lambda b: lambda: fast(*b, *layer.stacks, shared=layer.shared, **options)  # noqa: E731
    return replay([run(b) for b in batches]), [b[1] for b in batches]


def line(layer: Layer, tokens: int, seconds: float, ids: list[Tensor]) -> str:
    rate, flops = layer.bytes(ids) / seconds, layer.flops(tokens) / seconds
    peak = FP8_PEAK if layer.fp8 else BF16_PEAK
    return (
        f"{seconds * 1e6:9.1f} us  {layer.bytes(ids) / 1e6:7.0f} MB {rate / 1e12:5.2f} TB/s {rate / READ:4.0%}"
        f"  {flops / 1e12:6.0f} TF {flops / peak:4.0%}"
    )


def guarded(name: str, fn: Callable[[], Any]) -> Any:
    try:
        return fn()
    except Exception:
        print(f"FAILED {name}: " + " | ".join(traceback.format_exc().splitlines()[-3:])[:500], flush=True)
        return None


# -------------------------------------------------------------------------------------------- checks


def poison() -> None:
    """Leave NaN in the memory that torch.empty hands out next."""
    held = [torch.full((size,), float("nan"), device="cuda") for size in (2**10, 2**14, 2**18, 2**22, 2**26)]
    del held


def check(layer: Layer, tokens: int, **options: Any) -> None:
    shape, fp8 = layer.shape, layer.fp8
    x, ids, weights = layer.batch(tokens)
    if tokens > 2:
        ids[1, 0], ids[2] = -1, shape.experts
    poison()
    limit = options.get("limit")
    add = torch.randn_like(x)
    y = fast(x, ids, weights, *layer.stacks, shared=layer.shared, add_ND=add, **options)
    some = torch.randperm(tokens, device="cuda")[:24]
    wide = [Weights(w.matrix(torch.float32)) for w in layer.stacks]
    common = tuple(Weights(w.matrix(torch.float32)) for w in layer.shared or ())
    expected = reference(
        x[some].float(),
        ids[some],
        weights[some],
        *wide,
        limit=limit,
        shared=common,
        add_ND=add[some],  # type: ignore
    )
    error = ((y[some].float() - expected).norm() / expected.norm()).item()
    bound = 0.06 if fp8 else 0.006
    state = "ok" if error < bound and bool(y.isfinite().all()) else "WRONG"
    note = {k: v for k, v in options.items() if k != "how"}
    print(
        f"check {state} D{shape.hidden} N{tokens} {'fp8' if fp8 else 'bf16'} {note}: {error:.4f}", flush=True
    )


def check_fixed(layer: Layer) -> None:
    x, ids, weights = layer.batch(700)
    whole = fast(x, ids, weights, *layer.stacks, shared=layer.shared, fixed=True)
    same = True
    for size in (1, 3, 64, 300):
        part = fast(x[:size], ids[:size], weights[:size], *layer.stacks, shared=layer.shared, fixed=True)
        same &= torch.equal(part, whole[:size])
    print(f"fixed form {'fp8' if layer.fp8 else 'bf16'}: bits {'the same' if same else 'DIFFER'}")


# --------------------------------------------------------------------------------------------- sweep


def few(*options: tuple[int, int, int, int, int]) -> list[Tiles]:
    return [Tiles(*o, True) for o in options]


def families() -> Iterable[tuple[str, bool, list[int], Plan, list[Tiles], list[Tiles]]]:
    """Name, FP8, batch sizes, the plan to start from, and tiles to try for each product."""
    ups = few((2, 16, 128, 2, 6), (2, 16, 128, 2, 4), (1, 16, 128, 1, 8), (4, 16, 128, 4, 5), (4, 32, 128, 4, 3),
              (4, 16, 128, 4, 3))  # fmt: skip
    downs = few(
        (8, 16, 128, 8, 3), (8, 16, 128, 8, 5), (4, 16, 128, 4, 6), (8, 16, 128, 4, 4), (4, 16, 128, 4, 8)
    )
    yield "few", True, [1, 2, 4], plan(1, 6, 64, True, False), ups, downs
    ups = few((2, 16, 128, 2, 4), (4, 16, 128, 4, 3))
    downs = few((4, 16, 128, 4, 6), (8, 16, 128, 8, 4), (4, 16, 128, 4, 7))
    yield "few", False, [1, 4], plan(1, 6, 64, False, False), ups, downs
    ups = [
        Tiles(32, *t, True)
        for t in (
            (64, 128, 4, 4),
            (128, 128, 8, 3),
            (128, 128, 8, 4),
            (128, 128, 4, 3),
            (64, 128, 4, 5),
            (64, 128, 4, 3),
        )
    ]
    downs = [
        Tiles(32, *t, True)
        for t in (
            (128, 128, 4, 3),
            (128, 128, 4, 4),
            (128, 128, 8, 4),
            (64, 128, 4, 5),
            (128, 128, 4, 5),
            (128, 128, 8, 5),
        )
    ]
    yield "thin32", True, [256], Plan(ups[0], downs[0], codes=True), ups, downs
    ups = [Tiles(64, up.out, 128, up.warps, up.stages, True) for up in ups[:4]]
    downs = [Tiles(64, down.out, 128, down.warps, down.stages, True) for down in downs[:4]]
    yield "thin64", True, [512], Plan(ups[0], downs[0], codes=True), ups, downs


def variants(start: Plan, ups: list[Tiles], downs: list[Tiles]) -> list[Plan]:
    """The plans to compile: both products keep the same rows, so a tile of other rows goes with its like."""
    made = []
    for i in range(max(len(ups), len(downs))):
        up, down = ups[i % len(ups)], downs[i % len(downs)]
        if start.few:
            made.append(dataclasses.replace(start, up=up, down=down))
            continue
        made.append(dataclasses.replace(start, up=up, down=dataclasses.replace(down, rows=up.rows)))
        if up.rows != down.rows:
            made.append(dataclasses.replace(start, up=dataclasses.replace(up, rows=down.rows), down=down))
    return made


def compile_some(jobs: list[tuple[bool, list[int], Plan, bool]]) -> None:
    """In a process of its own: fill Triton's cache. Small matrices compile to the same kernels."""
    layers = {fp8: Layer(Shape(2, 2048, 1408, 2, 2), fp8) for fp8 in (False, True)}
    for fp8, sizes, how, experts_run.PDL in jobs:
        for tokens in sizes if how.few else sizes[:1]:
            layer = layers[fp8]
            x, _, _ = layer.batch(tokens)
            ids = torch.zeros(tokens, 6, device="cuda", dtype=torch.int64)
            try:
                fast(
                    x, ids, torch.rand(tokens, 6, device="cuda"), *layer.stacks, shared=layer.shared, how=how
                )
            except Exception:
                continue


def precompile() -> None:
    jobs = [
        (fp8, sizes, how, True)
        for _, fp8, sizes, start, ups, downs in families()
        for how in variants(start, ups, downs)
    ]
    jobs += [(fp8, [700], gluon_plan(fp8, rows, stages), True) for fp8, rows, stages in CUTS]
    sizes = (1, 3, 4, 8, 64, 256, 512, 8192)
    jobs += [
        (fp8, [n], plan(n, 6, 64, fp8, f, True), True)
        for fp8 in (False, True)
        for f in (False, True)
        for n in sizes
    ]
    jobs += [(fp8, [n], plan(n, 6, 64, fp8, False), False) for fp8 in (False, True) for n in (1, 8)]
    in_parallel(jobs)


def in_parallel(jobs: list[tuple[bool, list[int], Plan, bool]]) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=compile_some, args=(jobs[i::14],)) for i in range(14)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
        worker.kill()


def sweep(layers: dict[bool, Layer], until: float) -> None:
    for name, fp8, sizes, start, ups, downs in families():
        layer = layers[fp8]
        for tokens in sizes:
            if time.monotonic() > until:
                print("sweep: out of time")
                return
            results: list[tuple[float, Plan]] = []
            for how in variants(start, ups, downs):
                try:
                    results.append((timed(layer, tokens, how=how)[0], how))
                except Exception as error:
                    results.append((float("inf"), how))
                    if "out of resource" not in str(error):
                        print("  ", str(error)[:200])
            results.sort(key=lambda r: r[0])
            # From the best pair each product's tile is then varied alone.
            best = results[0][1]
            for up, down in itertools.chain(((u, best.down) for u in ups), ((best.up, d) for d in downs)):
                if up.rows != down.rows and not start.few:
                    continue
                how = dataclasses.replace(start, up=up, down=down)
                if all(how != seen for _, seen in results):
                    try:
                        results.append((timed(layer, tokens, how=how)[0], how))
                    except Exception:
                        continue
            results.sort(key=lambda r: r[0])
            form = lambda t: f"{t.rows}/{t.out}/{t.depth}/{t.warps}w{t.stages}s{'' if t.thin else 'W'}"  # noqa: E731
            tops = "; ".join(f"{s * 1e6:.1f} {form(p.up)} {form(p.down)}" for s, p in results[:6])
            print(f"sweep {name} {'fp8' if fp8 else 'bf16'} N{tokens}: {tops}", flush=True)


# ------------------------------------------------------------------------------------- Gluon's forms


CUTS = [(False, 128, 4), (False, 192, 3), (True, 128, 4)]


def gluon_plan(fp8: bool, rows: int, stages: int) -> Plan:
    tile = Tiles(rows, 128, 64, 4, stages, False)
    return Plan(tile, tile, codes=fp8, gluon=True)


def in_gluon() -> None:
    """In a process of its own: a barrier that is waited for in vain can then be ended from outside."""
    for fp8, rows, stages in CUTS:
        layer = Layer(LITE, fp8)
        how = gluon_plan(fp8, rows, stages)
        for tokens in (701, 3000):
            guarded("gluon", lambda: check(layer, tokens, how=how))  # noqa: B023
        show(layer, (1024, 2048, 8192, 16384), f"gluon {rows}/{stages}", how=how)
        experts_run.PDL = False
        guarded("breakdown", lambda: breakdown(layer, 8192, how=how))  # noqa: B023
        experts_run.PDL = True


def bounded(target: Callable[[], None], seconds: float) -> None:
    child = multiprocessing.get_context("spawn").Process(target=target)
    child.start()
    child.join(seconds)
    if child.is_alive():
        print(f"{target.__name__}: ended after {seconds} s", flush=True)
        child.kill()
        child.join()


def torch_grouped(layer: Layer, tokens: int) -> None:
    """The three products of the layer by torch's grouped product, and nothing else."""
    pairs = tokens * layer.shape.chosen
    x = torch.randn(pairs, layer.shape.hidden, device="cuda", dtype=torch.bfloat16)
    inner = torch.randn(pairs, layer.shape.width, device="cuda", dtype=torch.bfloat16)
    ends = (torch.arange(1, layer.shape.experts + 1, device="cuda") * pairs // layer.shape.experts).int()
    gate, up, down = (w.codes.transpose(1, 2) for w in layer.stacks)
    run = lambda: [torch._grouped_mm(x, gate, offs=ends), torch._grouped_mm(x, up, offs=ends),  # noqa: E731
                   torch._grouped_mm(inner, down, offs=ends)]  # fmt: skip
    run()
    seconds = do_bench(run, warmup=5, rep=30, return_mode="median") / 1e3
    work = 6.0 * pairs * layer.shape.hidden * layer.shape.width
    print(
        f"torch grouped_mm bf16, products only, N{tokens}: {seconds * 1e6:.0f} us {work / seconds / 1e12:.0f} TF"
    )


def breakdown(layer: Layer, tokens: int, **options: Any) -> None:
    """Microseconds of each kernel of a call."""
    from torch.profiler import ProfilerActivity, profile

    batch = layer.batch(tokens)
    run = lambda: fast(*batch, *layer.stacks, shared=layer.shared, **options)  # noqa: E731
    run()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(5):
            run()
        torch.cuda.synchronize()
    parts = [
        f"{e.key[:24]} {e.device_time_total / 5:.1f}" for e in profiled.key_averages() if e.device_time_total
    ]
    print(f"parts {'fp8' if layer.fp8 else 'bf16'} N{tokens}: " + "; ".join(parts), flush=True)


def show(layer: Layer, sizes: Iterable[int], note: str = "", **options: Any) -> None:
    """A line for each batch size."""
    for tokens in sizes:
        name = f"{note or 'D' + str(layer.shape.hidden)} {'fp8' if layer.fp8 else 'bf16'} N{tokens}"
        got = guarded(name, lambda: timed(layer, tokens, **options))  # noqa: B023
        if got:
            print(f"{name:22}", line(layer, tokens, *got), flush=True)


def main() -> None:
    began = time.monotonic()
    sweeping = os.environ.get("SWEEP") == "1"
    if sweeping:
        guarded("precompile", precompile)
        print(f"compiled in {time.monotonic() - began:.0f} s", flush=True)
    torch.backends.cuda.matmul.allow_tf32 = False
    layers = {fp8: Layer(LITE, fp8) for fp8 in (False, True)}
    for layer in layers.values():
        for tokens, options in ((1, {}), (3, {}), (33, {}), (700, {}), (3000, {}), (70, {"fixed": True})):
            guarded(f"check {tokens}", lambda: check(layer, tokens, **options))  # noqa: B023
        guarded("fixed", lambda: check_fixed(layer))  # noqa: B023
    if sweeping:
        for experts_run.PDL in (False, True):
            times = [timed(layers[fp8], n)[0] * 1e6 for fp8 in (False, True) for n in (1, 8)]
            print(
                f"pdl {experts_run.PDL}: bf16, fp8 N1, 8 us", " ".join(f"{t:.1f}" for t in times), flush=True
            )
        sweep(layers, began + 40)
        show(layers[True], (1, 2, 4), "sorted", how=plan(8, 6, 64, True, False))
        print(f"swept in {time.monotonic() - began:.0f} s", flush=True)
    for layer in layers.values():
        show(layer, (1, 2, 4, 8, 32, 64, 256, 512, 1024, 2048, 8192, 32768))
        show(layer, (8, 64, 8192), "fixed", fixed=True)
    experts_run.PDL = False  # a kernel that waits for the one before would count its time too
    guarded("breakdown", lambda: breakdown(layers[True], 8192))
    experts_run.PDL = True
    print(f"{time.monotonic() - began:.0f} s", flush=True)
    layers.clear()
    bounded(in_gluon, 25)
    print(f"{time.monotonic() - began:.0f} s", flush=True)
    if not sweeping:
        guarded("torch grouped", lambda: torch_grouped(Layer(LITE, False), 8192))
    for fp8 in (True, False):
        show(Layer(V3, fp8), (1, 64, 4096))
    print(f"{time.monotonic() - began:.0f} s in all")


if __name__ == "__main__":
    main()
