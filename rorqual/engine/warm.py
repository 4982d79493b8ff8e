"""Before users come: answers that nobody asked for, so that their kernels are compiled and their passes recorded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from rorqual.engine.graphs import SIZES
from rorqual.engine.sampling import Sampling

if TYPE_CHECKING:
    from rorqual.engine.engine import Engine

LENGTHS = (
    1,
    2,
    3,
    5,
    9,
    16,
    17,
    33,
    64,
    65,
    130,
    256,
    300,
    512,
    700,
    1024,
    1500,
    2048,
    3000,
    4096,
    6000,
    8192,
)
"""Lengths of prompts, of about every size that kernels are chosen by; multiples of 16 and others."""

SHORT = 48
"""Length of prompts of which many are read at once."""

GREEDY = Sampling(0.0, max_new_tokens=3, ignore_eos=True)
WAYS = (
    GREEDY,
    replace(GREEDY, temperature=1.0, top_p=0.95),
    replace(GREEDY, temperature=0.7),
    replace(GREEDY, temperature=0.6, top_k=20, min_p=0.01),
    replace(GREEDY, logprobs=5),
    replace(GREEDY, temperature=0.7, repetition_penalty=1.1, logit_bias={0: 1.0}),
)
"""Ways to draw that have kernels of their own."""

COLUMNS = (16, 32)
"""Widths of page tables that graphs are recorded for, beside the narrowest."""


def warm(engine: Engine, most: int) -> Iterator[float]:
    """Have an engine meet passes of up to `most` answers; yields the share that is done. It must not run in a thread
    yet. What it leaves in the prefix cache is forgotten."""
    vocab, positions = engine.model.config.vocab, engine.model.config.max_positions
    longest = min(positions - 8, engine.scheduler.budget, engine.pages.total * engine.pages.page_size // 2)
    lengths = [length for length in LENGTHS if length <= longest] or [1]
    sizes = [size for size in SIZES if size <= most]
    work = 2 * len(lengths) + 3 * len(WAYS) + 3 * len(sizes)
    made = 0

    def prompts(count: int, length: int) -> list[list[int]]:
        """Prompts that have nothing in common with each other, or with those before."""
        nonlocal made
        made += 1
        return [
            [(made * 8191 + row * 127 + i * 31 + 1) % vocab for i in range(length)] for row in range(count)
        ]

    def beside(count: int, length: int) -> None:
        """Prompts that are read while others answer."""
        busy = [engine.submit(ids, replace(GREEDY, max_new_tokens=8)) for ids in prompts(min(2, most), 5)]
        engine.generate(prompts(count, length), GREEDY)
        for handle in busy:
            handle.result()

    done = 0.0
    for length in lengths:
        engine.generate(prompts(1, length), GREEDY)
        beside(1, length)
        yield (done := done + 2) / work
    for way in WAYS:
        for count in (1, min(3, most), min(16, most)):
            engine.generate(prompts(count, 4), way)
            yield (done := done + 1) / work
    for size in sizes:
        # Many short prompts at once are read otherwise than one long one.
        short = min(SHORT, lengths[-1])
        engine.generate(prompts(size, short), [WAYS[row % len(WAYS)] for row in range(size)])
        beside(size, short)
        yield (done := done + 1) / work
        for way in WAYS[:3]:
            engine.generate(prompts(size, 3), way)
        yield (done := done + 1) / work
        engine.runner.record(size, [c for c in COLUMNS if c * engine.pages.page_size <= positions])
        yield (done := done + 1) / work
    if engine.team is None:
        engine.pages.forget_all()
    else:
        engine.weights_changed()  # every rank forgets, at the same moment
