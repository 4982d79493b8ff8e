"""Going back: to which checkpoint, and which samples are left out from there on.

A run that goes back to step c from step s takes step c again with the samples that follow those of step s: what was
seen from c to s is never learned from (as PaLM did, arXiv 2204.02311 section 5.1). Rates, batch sizes and tokens are
those of step c; only the samples move on.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from rorqual.train.checkpoint import CheckpointLost, Kept, facts_of, read, steps_in
from rorqual.train.schedule import Steps


@dataclass(frozen=True)
class Skip:
    """From step `step` on, so many samples of each stage are left out: (stage, samples) pairs."""

    step: int
    samples: tuple[tuple[int, int], ...]
    why: str = ""


def left_out(skips: Iterable[Skip], step: int, stage: int) -> int:
    """Samples of a stage that the steps before `step` and itself have left out."""
    return sum(n for skip in skips if skip.step <= step for at, n in skip.samples if at == stage)


def back_to(skips: Sequence[Skip], steps: Steps, step: int, failed: int, why: str) -> list[Skip]:
    """The skips of a run that goes back to `step` because of step `failed`. What later skips left out stays out."""
    over: dict[int, int] = {}
    for number in range(step, failed + 1):
        stage, _, samples, _ = steps[number]
        over[stage] = over.get(stage, 0) + samples
    before = [replace(skip, step=min(skip.step, step)) for skip in skips]
    return [*before, Skip(step, tuple(sorted(over.items())), why)]


def as_facts(skips: Iterable[Skip]) -> list[dict[str, Any]]:
    """As a checkpoint has them."""
    return [asdict(skip) | {"samples": [list(pair) for pair in skip.samples]} for skip in skips]


def from_facts(facts: Iterable[dict[str, Any]]) -> list[Skip]:
    """As `as_facts` gave them."""
    return [
        Skip(int(f["step"]), tuple((int(stage), int(n)) for stage, n in f["samples"]), str(f["why"]))
        for f in facts
    ]


def begun(folder: Path) -> int | None:
    """The step that a run was going back to when all ended: its checkpoint knows of it, and later ones, which were to
    be deleted, don't. None if there is no such thing."""
    found = {step: facts_of(folder, step) for step in steps_in(folder)}
    known = {step: len(facts.get("skips", ())) for step, facts in found.items() if facts}
    top = max(known.values(), default=0)
    last = max((step for step, count in known.items() if count == top), default=0)
    return last if any(step > last for step in known) else None


def sound_before(folder: Path, every: int) -> Kept | None:
    """The newest checkpoint that is whole and all numbers. Those that came in their turn, each `every` steps, go before
    those of an interruption, so that an interrupted run goes back to where the unbroken one would."""
    for step in sorted(steps_in(folder), key=lambda s: (every > 0 and s % every == 0, s), reverse=True):
        try:
            kept = read(folder, step)
        except CheckpointLost:
            continue
        tensors = (t for group in kept.tensors.values() for t in group.values())
        if all(bool(torch.isfinite(t).all()) for t in tensors if t.is_floating_point()):
            return kept
    return None
