"""What a longer context costs: time of a decoding pass and cache bytes at growing lengths, on one GPU.

A member's own widths with four layers and few experts (a token meets as many as in the whole model), random
weights, caches filled with noise as if the prompt had been read: what they hold doesn't change the work. Beside the
member stands dense MLA of the same width, and each with its cache in the released FP8 layout.
"""

from __future__ import annotations

import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

import rorqual
from benchmarks.lite import wait
from benchmarks.plot import Panel, chart, short
from benchmarks.record import console, where
from rorqual.engine import Engine, Handle, Sampling
from rorqual.family import MLA, CompressedAttention, ModelConfig, MoE, Rope
from rorqual.kernels.entries import pack_entries, pack_keys
from rorqual.kernels.mla_decode import pack_latents
from rorqual.nn import Transformer
from rorqual.nn.paged import page_bytes, ring_bytes

FIGURES = Path(__file__).parents[1] / "docs" / "figures"
ROUTED = 32
"""Routed experts kept of each layer: the figures are about attention, and models are made in seconds."""


@dataclass
class Point:
    """One measurement: tokens held, ms of a pass by its graph alone and of an engine's step, bytes held."""

    tokens: int
    graph: float
    step: float
    held: int


def cut(config: ModelConfig, layers: int, positions: int, attention: MLA | None = None) -> ModelConfig:
    """The last `layers` layers, their routed experts few, with another attention if given."""
    plan = []
    for layer in config.layers[-layers:]:
        ff = replace(layer.ff, routed=min(ROUTED, layer.ff.routed)) if isinstance(layer.ff, MoE) else layer.ff
        plan.append(replace(layer, attention=attention or layer.attention, ff=ff))
    return replace(config, layers=tuple(plan), mtp=(), max_positions=positions, quantization=None)


def dense(config: ModelConfig) -> MLA:
    """Dense MLA for a member: its own, or for V4 one of as many heads with V3's widths."""
    part = config.layers[-1].attention
    if isinstance(part, MLA):
        return replace(part, index=None)
    assert isinstance(part, CompressedAttention)
    return MLA(part.heads, 512, 128, 64, 128, Rope(64, 160000.0, interleaved=True), q_rank=part.q_rank)


def fill(model: Transformer, stores: list[dict[str, torch.Tensor]]) -> None:
    """Noise into caches of either kind: bytes get packed noise."""
    for layer, store in zip(model.layers, stores, strict=True):
        part: Any = layer.attention.part
        for name, memory in store.items():
            if memory.dtype != torch.uint8:
                memory.normal_()
                continue
            if isinstance(part, MLA):
                width = part.kv_rank if name == "latent" else part.index.dim  # type: ignore[union-attr]
                rope = part.rope_dim if name == "latent" else 0
                some = pack_latents(torch.randn(4099, width + rope, device=memory.device), width)
            elif name == "index.entries":
                some = pack_keys(torch.randn(4099, part.compress.index.dim, device=memory.device))
            else:
                some = pack_entries(torch.randn(4099, part.head_dim, device=memory.device), part.rope.dim)
            items = memory.flatten(0, 1)
            for begin in range(0, len(items), len(some)):
                items[begin : begin + len(some)] = some[: len(items) - begin]


def engine_for(model: Transformer, fp8: bool, batch: int = 1) -> Engine:
    """An engine whose caches hold noise."""
    engine = Engine(model, max_requests=batch, prefix_cache=False, fp8_cache=fp8)
    fill(model, engine.runner.stores)
    return engine


def measure(engine: Engine, lengths: list[int], batch: int = 1) -> Iterator[Point]:
    """One point a length, which a request comes to hold within its last page."""
    for length in lengths:
        held = length - engine.pages.page_size
        sampling = Sampling(0.0, max_new_tokens=engine.pages.page_size, ignore_eos=True)
        handles = [engine.submit([1] * held, sampling) for _ in range(batch)]
        for request in engine.scheduler.plan().admitted:
            request.seed = engine.runner.sampler.admit(request.slot, request.sampling, [1], [])
            request.held = held - 1  # as if the prompt had been read
            assert engine.scheduler._reach(request, held)
        yield _point(engine, handles, length)
        for handle in handles:
            handle.cancel()
        while engine.busy:
            engine.step()


def _point(engine: Engine, handles: list[Handle], length: int) -> Point:
    for _ in range(8):
        engine.step()
    for handle in handles:
        if handle.error is not None:
            raise handle.error
    wait(engine)
    begun = time.perf_counter()
    for _ in range(24):
        engine.step()
    wait(engine)
    step = (time.perf_counter() - begun) / 24
    packed = any(memory.dtype == torch.uint8 for memory in engine.runner.stores[0].values())
    lanes = engine.model.lanes(packed)
    pages = sum(len(h.request.pages) for h in handles if h.request is not None)
    held = pages * page_bytes(lanes, engine.pages.page_size) + len(handles) * ring_bytes(lanes)
    return Point(length, _replayed(engine) or step * 1e3, step * 1e3, held)


@torch.inference_mode()
def _replayed(engine: Engine) -> float | None:
    """Median ms of the newest graph alone; None where passes are not recorded."""
    graphs = engine.runner.graphs
    if graphs is None or graphs.newest is None:
        return None
    return statistics.median([_alone(engine, graphs.newest.replay) for _ in range(12)][2:])


def _alone(engine: Engine, work: Callable[[], None]) -> float:
    """Milliseconds of `work` on the model's device."""
    if engine.model.device.type != "cuda":
        begun = time.perf_counter()
        work()
        return (time.perf_counter() - begun) * 1e3
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def growth(config: ModelConfig, fp8: bool) -> float:
    """Cache bytes that one more token of the whole member takes, by the size of the engine's pages."""
    model = Transformer(config, device="meta")
    return page_bytes(model.lanes(fp8)[: len(model.layers)], 128) / 128


def context(
    name: str,
    member: str,
    lengths: list[int],
    layers: int = 4,
    device: str = "cuda",
    figures: Path = FIGURES,
    seconds: float = 62.0,
    config: ModelConfig | None = None,
) -> None:
    """Measure `member` and dense MLA in both layouts, print the table and draw `figures`/context-NAME.svg. What
    doesn't fit into `seconds` is left out. `config`: a smaller model in the member's place, for a trial."""
    begun = time.perf_counter()
    curves: dict[str, list[Point]] = {}
    whole = config or rorqual.config(member)
    positions = max(lengths) + 256
    variants: list[tuple[str, MLA | None]] = [(member, None)]
    if dense(whole) != whole.layers[-1].attention:
        variants.append(("dense MLA", dense(whole)))
    for label, attention in variants:
        part = cut(whole, layers, positions, attention)
        model = Transformer(part, dtype=torch.bfloat16, device=device, seed=0)
        for fp8 in (False, True):
            points: list[Point] = []
            try:
                with engine_for(model, fp8) as engine:
                    for point in measure(engine, lengths):
                        points.append(point)
                        console.print(f"{label} {'FP8' if fp8 else 'bf16'}", point, style="dim")
                        if time.perf_counter() - begun > seconds:
                            break
            except Exception:
                console.print(f"{label} failed after {len(points)} points:")
                console.print(traceback.format_exc(limit=-3), markup=False)
            if points:
                curves[f"{label}, {'FP8' if fp8 else 'bf16'} cache"] = points
            if device == "cuda":
                torch.cuda.empty_cache()
            if time.perf_counter() - begun > seconds:
                console.print(f"out of time after {label}, fp8={fp8}")
                break
        del model
    if not curves:
        raise SystemExit(f"{member}: nothing was measured, so there is nothing to draw; the errors are above")
    table = Table(title=f"{member}: decoding one token, {layers} layers", title_justify="left")
    for column in ("cache", "tokens", "pass, ms", "engine step, ms", "cache, MB"):
        table.add_column(column)
    for label, found in curves.items():
        for p in found:
            table.add_row(label, short(p.tokens), f"{p.graph:.3f}", f"{p.step:.3f}", f"{p.held / 1e6:.1f}")
    console.print(table)
    for fp8 in (False, True):
        kind = "FP8" if fp8 else "bf16"
        console.print(f"{member}, all layers: {growth(whole, fp8):,.2f} bytes of cache a token, {kind}")
    console.print(str(where()), style="dim")
    time_of, size_of = Panel("one decoding pass", "ms"), Panel("cache", "MB")
    for label, found in curves.items():
        time_of.curves[label] = [(p.tokens, p.graph) for p in found]
        size_of.curves[label] = [(p.tokens, p.held / 1e6) for p in found]
    figures.mkdir(parents=True, exist_ok=True)
    note = f"{layers} layers of its width, batch 1, {where()['hardware']}, {where()['date']}"
    svg = chart(f"{member}: cost of a longer context", note, [time_of, size_of], "tokens of context")
    (figures / f"context-{name}.svg").write_text(svg)


def profile(member: str, length: int, layers: int = 4, fp8: bool = True) -> None:
    """Which kernels a decoding pass of `member` spends its time in."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    config = cut(rorqual.config(member), layers, length + 256)
    model = Transformer(config, dtype=torch.bfloat16, device="cuda", seed=0)
    engine = engine_for(model, fp8)
    for _ in measure(engine, [length]):
        graphs = engine.runner.graphs
        assert graphs is not None and graphs.newest is not None
        with record(activities=[ProfilerActivity.CUDA]) as found:
            for _ in range(5):
                graphs.newest.replay()
            torch.cuda.synchronize()
    events = sorted(found.key_averages(), key=lambda e: -e.device_time_total)
    console.print(
        f"{sum(e.device_time_total for e in events) / 5e3:.3f} ms, {sum(e.count for e in events) / 5:.0f} kernels"
    )
    for e in events[:40]:
        each = e.device_time_total / max(1, e.count)
        console.print(f"{e.device_time_total / 5:8.1f} us {e.count / 5:5.0f} x {each:7.1f}  {e.key[:100]}")
