"""Schedules: learning rates, batch sizes and weights as functions of the tokens seen, so that a run can be resumed,
cut and continued at any batch size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

Shape = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True)
class Phase:
    """From where the phase before ended to `until` tokens, the value goes to `to` in a `shape`; a constant jumps."""

    until: float
    to: float
    shape: Shape = "constant"


@dataclass(frozen=True)
class Schedule:
    """A value over tokens: from `start` through phases; after the last it stays."""

    start: float
    phases: tuple[Phase, ...] = ()

    def __post_init__(self) -> None:
        ends = [phase.until for phase in self.phases]
        if not all(b > a for a, b in zip([0.0, *ends], ends, strict=False)):
            raise ValueError(f"the phases of a schedule must end one after the other, not at {ends}")
        values = [self.start, *(phase.to for phase in self.phases)]
        if not all(0 <= value < math.inf for value in values):
            raise ValueError(f"a schedule goes through {values}: each must be a number and not below 0")

    def __call__(self, tokens: float) -> float:
        begun, value = 0.0, self.start
        for phase in self.phases:
            if tokens < phase.until:
                share = (tokens - begun) / (phase.until - begun)
                match phase.shape:
                    case "constant":
                        return phase.to
                    case "linear":
                        return value + (phase.to - value) * share
                    case "cosine":
                        return phase.to + (value - phase.to) * (1 + math.cos(math.pi * share)) / 2
            begun, value = phase.until, phase.to
        return value


def constant(value: float) -> Schedule:
    """The same at all times."""
    return Schedule(value)


def multi_step(peak: float, warmup: float, tokens: float, steps: Sequence[tuple[float, float]]) -> Schedule:
    """V1's and V2's: linear warm-up, the peak, and from each share of all tokens on a factor of the peak (V1 report
    2.3: 31.6 % from 80 % on, 10 % from 90 %; V2 report 3.1.2: 60 and 90 %)."""
    phases, factor = [Phase(warmup, peak, "linear")], 1.0
    for share, after in steps:
        phases.append(Phase(share * tokens, peak * factor))
        factor = after
    return Schedule(0.0, (*phases, Phase(tokens, peak * factor)))


def v3(
    peak: float, warmup: float, tokens: float, end: float | None = None, last: float | None = None
) -> Schedule:
    """V3's, its 14.8T tokens scaled to `tokens`: warm-up, constant to 10T, cosine over 4.3T down to `end` (a tenth),
    constant for 333B, and `last` (a thirtieth) for 167B (V3 report 4.2)."""
    end, last = end or peak / 10, last or peak * 7.3e-6 / 2.2e-4
    unit = tokens / 14.8
    return Schedule(
        0.0,
        (
            Phase(warmup, peak, "linear"),
            Phase(10 * unit, peak),
            Phase(14.3 * unit, end, "cosine"),
            Phase(14.633 * unit, end),
            Phase(tokens, last),
        ),
    )


def wsd(peak: float, warmup: float, tokens: float, decay: float = 0.2, end: float = 0.0) -> Schedule:
    """Warm-up, stable, decay: the last share `decay` of all tokens goes linearly to `end`."""
    return Schedule(
        0.0,
        (Phase(warmup, peak, "linear"), Phase((1 - decay) * tokens, peak), Phase(tokens, end, "linear")),
    )


def cosine(peak: float, warmup: float, tokens: float, end: float = 0.0) -> Schedule:
    """Warm-up, then half a cosine down to `end`."""
    return Schedule(0.0, (Phase(warmup, peak, "linear"), Phase(tokens, end, "cosine")))


@dataclass(frozen=True)
class Stage:
    """From `start` tokens on: sequences of `length` tokens, `batch` of them a step at first, `to` of them once
    `ramp` more tokens have been seen (V3 report 4.2: 3,072 to 15,360 over 469B)."""

    length: int
    batch: int
    start: int = 0
    to: int | None = None
    ramp: int = 0
    multiple: int = 1
    """Batches are multiples of it."""


@dataclass(frozen=True)
class Steps:
    """Which samples each step takes. Steps are counted by walking: each takes as many tokens as those before say."""

    stages: tuple[Stage, ...]
    _known: list[tuple[int, int, int, int]] = field(default_factory=list, repr=False, compare=False)

    def __post_init__(self) -> None:
        starts = [stage.start for stage in self.stages]
        if not starts or starts[0] != 0 or starts != sorted(set(starts)):
            raise ValueError(f"stages begin at 0 and one after the other, not at {starts}")
        for stage in self.stages:
            to = stage.batch if stage.to is None else stage.to
            if min(stage.length, stage.batch, to, stage.multiple) < 1 or stage.ramp < 0:
                raise ValueError(f"{stage}: length, batch, to and multiple must be above 0, ramp not below")
            if stage.batch % stage.multiple:
                raise ValueError(f"{stage} has no steps: batches must be multiples of `multiple`")

    def __getitem__(self, step: int) -> tuple[int, int, int, int]:
        """Of step `step`: its stage, its first sample in that stage, its samples, and the tokens seen before it."""
        while len(self._known) <= step:
            self._known.append(self._next())
        return self._known[step]

    def _next(self) -> tuple[int, int, int, int]:
        if not self._known:
            return 0, 0, self._samples(0, 0), 0
        number, first, samples, before = self._known[-1]
        seen = before + samples * self.stages[number].length
        following = number + 1 < len(self.stages) and seen >= self.stages[number + 1].start
        number, first = (number + 1, 0) if following else (number, first + samples)
        return number, first, self._samples(number, seen), seen

    def _samples(self, number: int, seen: int) -> int:
        stage = self.stages[number]
        if stage.to is None or stage.ramp == 0:
            return stage.to or stage.batch
        share = min(1.0, (seen - stage.start) / stage.ramp)
        wanted = stage.batch + (stage.to - stage.batch) * share
        return max(stage.multiple, round(wanted / stage.multiple) * stage.multiple)
