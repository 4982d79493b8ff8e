"""Time of a decoding pass against the length of the context, sparse attention beside dense (claim 27): V3 and V3.2
from 4K to 128K, V4-Flash to 1M. A member's own widths with four layers, random weights, caches filled with noise: what
they hold does not change the work. Also what the caches take a token (claim 28)."""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

import rorqual
from benchmarks.record import console, where
from rorqual.engine import Engine, Sampling
from rorqual.family.canvas import INK, SOFT, Canvas
from rorqual.nn import InputError, Transformer

K = 1024
LENGTHS = {
    "deepseek-v3": [4 * K, 16 * K, 32 * K, 64 * K, 128 * K],
    "deepseek-v3.2": [4 * K, 16 * K, 32 * K, 64 * K, 128 * K],
    "deepseek-v4-flash": [4 * K, 16 * K, 64 * K, 128 * K, 256 * K, 1024 * K],
}


def growing_bytes(member: str) -> float:
    """Cache bytes a token of the whole member, in its FP8 layout where there is one."""
    model = Transformer(rorqual.config(member).replace(quantization=None, mtp=()), device="meta")
    try:
        lanes = model.lanes(True)
    except InputError:
        lanes = model.lanes()
    growing = (lane for kinds in lanes for lane in kinds.values() if lane.keep is None)
    return sum(lane.bytes_per_item() / lane.every for lane in growing)


def curve(member: str, lengths: Sequence[int], layers: int = 4, device: str = "cuda") -> dict[int, float]:
    """Milliseconds of a pass of one sequence at each length."""
    whole = rorqual.config(member)
    config = replace(
        whole, layers=whole.layers[-layers:], mtp=(), max_positions=max(lengths) + 256, quantization=None
    )
    model = Transformer(config, dtype=torch.bfloat16, device=device, seed=0)
    engine = Engine(model, max_requests=1, prefix_cache=False)
    for store in engine.runner.stores:
        for memory in store.values():
            # Bytes of packed entries: codes, and scales below one, whatever their format.
            memory.normal_() if memory.is_floating_point() else memory.random_(0, 60)
    return {length: decode_ms(engine, length) for length in lengths}


def decode_ms(engine: Engine, length: int, steps: int = 32) -> float:
    """Milliseconds a pass, as if a prompt of `length` tokens had been read."""
    handle = engine.submit([1] * length, Sampling(0.0, max_new_tokens=steps + 24, ignore_eos=True))
    request = handle.request
    assert request is not None
    engine.scheduler.plan()
    engine.runner.sampler.admit(request.slot, request.sampling)
    request.held = length - 1
    assert engine.scheduler._reach(request, length)
    for _ in range(12):
        engine.step()
    _wait(engine)
    begun = time.perf_counter()
    for _ in range(steps):
        engine.step()
    _wait(engine)
    took = time.perf_counter() - begun
    if handle.error is not None:
        raise handle.error
    handle.cancel()
    while engine.busy:
        engine.step()
    return took / steps * 1e3


def _wait(engine: Engine) -> None:
    if engine.model.device.type == "cuda":
        torch.cuda.synchronize()


def draw(curves: dict[str, dict[int, float]], file: Path) -> None:
    """The curves as an SVG: length by powers of two, time from zero."""
    width, height, left, top, right, bottom = 760, 420, 64, 56, 150, 48
    canvas = Canvas(width, height, "Decoding time against context", "One sequence, four layers, one H200.")
    most = max(ms for points in curves.values() for ms in points.values()) * 1.08
    low = math.log2(min(min(points) for points in curves.values()))
    high = math.log2(max(max(points) for points in curves.values()))

    def place(length: int, ms: float) -> tuple[float, float]:
        x = left + (math.log2(length) - low) / (high - low) * (width - left - right)
        return x, height - bottom - ms / most * (height - top - bottom)

    canvas.text(24, 34, "ms a pass of four layers, one sequence, against tokens of context", 14, weight=600)
    for power in range(int(low), int(high) + 1):
        x, y = place(1 << power, 0)
        canvas.rect(x, top, 0.6, y - top, SOFT, opacity=0.25)
        canvas.text(x, y + 20, f"{2**power / K:g}K", 11.5, SOFT, anchor="middle")
    for part in range(5):
        ms = most / 1.08 * part / 4
        canvas.text(left - 8, place(1 << int(low), ms)[1] + 4, f"{ms:.2f}", 11.5, SOFT, anchor="end")
    for (member, points), colour in zip(curves.items(), ("#b4462a", "#2a6fb4", "#2f8f5b"), strict=False):
        at = [place(length, ms) for length, ms in points.items()]
        for (x0, y0), (x1, y1) in itertools.pairwise(at):
            canvas.line(x0, y0, x1, y1, colour, 2)
        for x, y in at:
            canvas.rect(x - 3.5, y - 3.5, 7, 7, colour, 3.5)
        canvas.text(at[-1][0] + 10, at[-1][1] + 4, member.removeprefix("deepseek-"), 13, INK, weight=600)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(canvas.document())


def context() -> None:
    """The table, build/benchmarks/context.json and context.svg."""
    curves: dict[str, dict[int, float]] = {}
    lengths = sorted({length for some in LENGTHS.values() for length in some})
    print("| ms a pass | " + " | ".join(f"{n // K}K" for n in lengths) + " | cache, whole member |")
    print("|---|" + "---|" * (len(lengths) + 1))
    for member, some in LENGTHS.items():
        try:
            curves[member] = curve(member, some)
        except Exception as error:
            print(f"| {member} | failed: {error!r:.200} |", flush=True)
            continue
        torch.cuda.empty_cache()
        cells = [f"{curves[member][n]:.2f}" if n in curves[member] else "" for n in lengths]
        print(
            f"| {member} | " + " | ".join(cells) + f" | {growing_bytes(member):,.0f} bytes a token |",
            flush=True,
        )
    place = Path("build/benchmarks")
    place.mkdir(parents=True, exist_ok=True)
    (place / "context.json").write_text(json.dumps({**where(), "ms": curves}, indent=1))
    if curves:
        draw(curves, place / "context.svg")
    console.print(", ".join(f"{k} {v}" for k, v in where().items()), style="dim")
