"""A server's load on one GPU: 256 requests at once, prompts of 100 to 2,000 tokens, answers of 50 to 500."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from benchmarks.lite import decode, lite
from benchmarks.record import console, where
from rorqual.engine import Engine, Handle, Sampling
from rorqual.family import ModelConfig
from rorqual.nn import Transformer


@dataclass
class Request:
    """One request and when its tokens came, in seconds from the beginning."""

    handle: Handle
    times: list[float] = field(default_factory=list)

    def look(self, now: float) -> None:
        """Note what has come since the last look."""
        missing = len(self.handle.completion.ids) - len(self.times)
        self.times += [now] * missing


def serve(engine: Engine, jobs: Sequence[tuple[int, int]], seed: int) -> tuple[float, list[Request]]:
    """All jobs (prompt and answer lengths) submitted at once: seconds until the last is done, and each request."""
    generator = torch.Generator().manual_seed(seed)
    vocab = engine.model.config.vocab
    prompts = [torch.randint(0, vocab, (prompt,), generator=generator).tolist() for prompt, _ in jobs]
    begun = time.perf_counter()
    requests = [
        Request(engine.submit(ids, Sampling(0.0, max_new_tokens=answer, ignore_eos=True)))
        for ids, (_, answer) in zip(prompts, jobs, strict=True)
    ]
    while engine.busy:
        engine.step()
        now = time.perf_counter() - begun
        for request in requests:
            request.look(now)
    took = time.perf_counter() - begun
    for request in requests:
        if request.handle.error is not None:
            raise request.handle.error
    return took, requests


def percentiles(values: list[float]) -> str:
    """50th, 90th and 99th, in milliseconds."""
    cuts = statistics.quantiles(values, n=100)
    return " / ".join(f"{cuts[p - 1] * 1e3:,.0f}" for p in (50, 90, 99))


def load(config: ModelConfig | None = None, count: int = 256, device: str = "cuda") -> None:
    """Twice the same lengths with other tokens (the first compiles kernels and records graphs), then decoding at
    the full batch in step: what the load would reach if no prompt had to be read and no answer ended."""
    model = Transformer(config or lite(), device=device, seed=0)
    engine = Engine(model, max_requests=count)
    random.seed(0)
    jobs = [(random.randint(100, 2000), random.randint(50, 500)) for _ in range(count)]
    serve(engine, jobs, 1)
    before, thrown = engine.steps, engine.scheduler.preemptions
    took, requests = serve(engine, jobs, 2)
    read, written = sum(p for p, _ in jobs), sum(len(r.times) for r in requests)
    passes, thrown = engine.steps - before, engine.scheduler.preemptions - thrown
    first = [r.times[0] for r in requests]
    between = [b - a for r in requests for a, b in zip(r.times, r.times[1:], strict=False)]
    whole = sum(p + a for p, a in jobs) / count
    ceiling, _ = decode(engine, count, round(whole - sum(a for _, a in jobs) / count / 2), 64)
    print(
        "| requests | written | in all | of the batch in step | first token, ms (50 / 90 / 99 %) | between tokens | "
        "passes |\n|---|---|---|---|---|---|---|"
    )
    print(
        f"| {count} at once, {read:,} + {written:,} tokens | {written / took:,.0f} tok/s | "
        f"{(read + written) / took:,.0f} tok/s | {written / took / ceiling:.0%} of {ceiling:,.0f} | "
        f"{percentiles(first)} | {percentiles(between)} | {passes}, {thrown} preemptions |"
    )
    console.print(", ".join(f"{k} {v}" for k, v in where().items()), style="dim")
