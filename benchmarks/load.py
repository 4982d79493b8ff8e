"""A server's load on one GPU: 256 requests at once, prompts of 100 to 2,000 tokens, answers of 50 to 500."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from benchmarks.lite import decode, lite, read
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


def load(
    config: ModelConfig | None = None,
    count: int = 256,
    device: str = "cuda",
    prompts: tuple[int, int] = (100, 2000),
    answers: tuple[int, int] = (50, 500),
) -> None:
    """Twice the same lengths with other tokens (the first compiles kernels and records graphs). Then, for comparison,
    what the same engine does with prompts alone and with a full batch of answers in step."""
    model = Transformer(config or lite(), device=device, seed=0)
    engine = Engine(model, max_requests=count)
    random.seed(0)
    jobs = [(random.randint(*prompts), random.randint(*answers)) for _ in range(count)]
    serve(engine, jobs, 1)
    before, thrown = engine.steps, engine.scheduler.preemptions
    took, requests = serve(engine, jobs, 2)
    given, written = sum(p for p, _ in jobs), sum(len(r.times) for r in requests)
    passes, thrown = engine.steps - before, engine.scheduler.preemptions - thrown
    first = [r.times[0] for r in requests]
    between = [b - a for r in requests for a, b in zip(r.times, r.times[1:], strict=False)]
    several, usual = max(1, count // 4), round(given / count)
    reading = several * usual / statistics.median(read(engine, several, usual) for _ in range(3))
    decoding, _ = decode(engine, count, round((given + written / 2) / count), 64)
    ideal = given / reading + written / decoding
    print(
        "| requests | written | in all | took | first token, ms (50 / 90 / 99 %) | between tokens | passes |\n"
        f"|---|---|---|---|---|---|---|\n| {count} at once, {given:,} + {written:,} tokens | "
        f"{written / took:,.0f} tok/s | {(given + written) / took:,.0f} tok/s | {took:.2f} s | "
        f"{percentiles(first)} | {percentiles(between)} | {passes}, {thrown} preemptions |\n"
        f"against all {count} answers in step, nothing to read: {decoding:,.0f} tok/s, of which the load wrote "
        f"{written / took / decoding:.0%}\n"
        f"against an ideal schedule, prompts read at {reading:,.0f} tok/s and then answers written at that rate: "
        f"{given / reading:.2f} + {written / decoding:.2f} s, {ideal / took:.0%} of the time the load took"
    )
    console.print(", ".join(f"{k} {v}" for k, v in where().items()), style="dim")
