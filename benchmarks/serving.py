"""The engine under load, against growing contexts, and from a cold start. All on one GPU but `turns`."""

from __future__ import annotations

import random
import subprocess
import sys
import time

import torch

import rorqual
from benchmarks.lite import lite
from benchmarks.record import console, where
from rorqual.engine import Engine, Sampling
from rorqual.family import ModelConfig
from rorqual.nn import Transformer


def load(config: ModelConfig | None = None, requests: int = 256, device: str = "cuda") -> None:
    """Prompts of 100 to 2,000 tokens and answers of 50 to 500, all submitted at once: total tokens a second."""
    config = config or lite()
    model = Transformer(config, device=device, seed=0)
    engine = Engine(model, max_requests=requests)
    random.seed(0)
    jobs = [(random.randint(100, 2000), random.randint(50, 500)) for _ in range(requests)]
    for turn in range(2):  # the first compiles kernels and records graphs
        begun = time.perf_counter()
        handles = []
        for prompt, answer in jobs:
            ids = torch.randint(0, config.vocab, (prompt,)).tolist()
            handles.append(engine.submit(ids, Sampling(0.0, max_new_tokens=answer, ignore_eos=True)))
        while engine.busy:
            engine.step()
        took = time.perf_counter() - begun
        read, written = sum(p for p, _ in jobs), sum(len(h.completion.ids) for h in handles)
        if turn:
            console.print(
                f"{requests} requests: {(read + written) / took:,.0f} tok/s in all, {written / took:,.0f} written, "
                f"{engine.steps} passes, {engine.scheduler.preemptions} preemptions"
            )
    console.print(str(where()), style="dim")


def start(layers: int = 4) -> None:
    """From process start to the first token with a checkpoint of about 2 GB, twice: the second finds compiled
    kernels on disk."""
    import tempfile

    with tempfile.TemporaryDirectory() as place:
        rorqual.save(Transformer(lite(layers), seed=0), place)
        code = (
            f"import rorqual; e = rorqual.Engine(rorqual.load({place!r}, device='cuda')); "
            "next(iter(e.submit([1, 2, 3], rorqual.Sampling(0.0))))"
        )
        for turn in ("first", "second"):
            begun = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True)
            console.print(f"{turn} start to first token: {time.perf_counter() - begun:.1f} s")


def turns(users: int = 12, rounds: int = 6) -> None:
    """Prefix caching on replayed conversations (claim 59): every turn brings all of the conversation again. Share
    of prompt tokens found, and time against the same load without the cache."""
    from benchmarks.tiny import tiny

    model = Transformer(tiny(), seed=0)
    for cached in (True, False):
        random.seed(0)
        engine = Engine(model, prefix_cache=cached)
        talks = [[random.randrange(32000) for _ in range(200)] for _ in range(users)]  # a system prompt each
        asked = found = 0
        begun = time.perf_counter()
        for _ in range(rounds):
            handles = []
            for talk in talks:
                talk += [random.randrange(32000) for _ in range(random.randint(20, 120))]
                handles.append(engine.submit(talk, Sampling(0.0, max_new_tokens=40, ignore_eos=True)))
            for talk, handle in zip(talks, handles, strict=True):
                talk += handle.result().ids
                asked, found = asked + handle.completion.prompt_tokens, found + handle.request.cached
        took = time.perf_counter() - begun
        name = "with" if cached else "without"
        console.print(
            f"{name} prefix cache: {took:.1f} s, {found / asked:.0%} of {asked:,} prompt tokens found"
        )
    console.print(str(where()), style="dim")
