"""The engine against growing contexts (one GPU), and on replayed conversations (any machine)."""

from __future__ import annotations

import random
import time
from dataclasses import replace

import torch

import rorqual
from benchmarks.record import console, where
from rorqual.engine import Engine, Sampling
from rorqual.nn import Transformer


def context(member: str, lengths: list[int], layers: int = 4, device: str = "cuda", batch: int = 1) -> None:
    """Time of a decoding pass at growing contexts: a member's own widths with few layers, random weights, caches
    filled with noise (what they hold doesn't change the work)."""
    whole = rorqual.config(member)
    plan = whole.layers[-layers:]
    config = replace(whole, layers=plan, mtp=(), max_positions=max(lengths) + 256, quantization=None)
    model = Transformer(config, dtype=torch.bfloat16, device=device, seed=0)
    engine = Engine(model, max_requests=batch, prefix_cache=False)
    for store in engine.runner.stores:
        for memory in store.values():
            memory.normal_()
    for length in lengths:
        handles = [
            engine.submit([1] * length, Sampling(0.0, max_new_tokens=64, ignore_eos=True))
            for _ in range(batch)
        ]
        engine.scheduler.plan()
        for handle in handles:
            handle.request.held = length - 1  # as if the prompt had been read
            assert engine.scheduler._reach(handle.request, length)
        for _ in range(8):
            engine.step()
        _wait(device)
        begun = time.perf_counter()
        for _ in range(32):
            engine.step()
        _wait(device)
        each = (time.perf_counter() - begun) / 32
        held = sum(
            length // lane.every * lane.bytes_per_item()
            for lanes in model.lanes()
            for lane in lanes.values()
            if lane.keep is None
        )
        console.print(
            f"{member} {layers} layers, {length:>9,} tokens: {each * 1e3:.3f} ms, cache {held / 1e6:.1f} MB"
        )
        for handle in handles:
            handle.cancel()
        while engine.busy:
            engine.step()


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


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
