"""Replayed conversations: what the prefix cache finds."""

from __future__ import annotations

import random
import time

from benchmarks.record import console, where
from rorqual.engine import Engine, Sampling
from rorqual.nn import Transformer


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
