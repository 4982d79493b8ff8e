"""What an experiment is: arms times seeds, a rule that was written before, and a verdict by it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rorqual.train.recipe import Recipe

Outcome = dict[str, Any]
"""What a run came to, as it lies in its file: see `run.outcome`."""


@dataclass(frozen=True)
class Setup:
    """What arms are made for. `quick`: a size that a CPU goes through in seconds, to see that all works. `steps`: other
    than the size's own. `seeds`: how many runs an arm has."""

    corpus: str
    vocab: int
    quick: bool = False
    device: str = "cpu"
    steps: int | None = None
    seeds: int = 3


@dataclass(frozen=True)
class Arm:
    """One of the things compared. `make` gives its recipe, but for the seed. `seeds`: other than the setup's."""

    name: str
    make: Callable[[Setup], Recipe]
    seeds: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Results:
    """Outcomes by arm and seed."""

    runs: Mapping[str, Mapping[int, Outcome]]

    def of(self, arm: str, measure: str) -> dict[int, float]:
        """A measure of all runs of an arm, by seed; infinite where a run broke down."""
        found = {seed: run["measures"].get(measure) for seed, run in self.runs[arm].items()}
        return {seed: math.inf if value is None else float(value) for seed, value in found.items()}

    def mean(self, arm: str, measure: str) -> float:
        """Over the runs of an arm."""
        values = self.of(arm, measure).values()
        return sum(values) / len(values)


@dataclass(frozen=True)
class Verdict:
    """`held`: True, False, or None for undecided. `because`: the comparisons it rests on, in words."""

    held: bool | None
    because: tuple[str, ...]

    @property
    def word(self) -> str:
        return {True: "held", False: "did not hold", None: "undecided"}[self.held]


def together(*parts: Verdict) -> Verdict:
    """Holds if all parts do, fails if one does."""
    found = [part.held for part in parts]
    held = False if False in found else None if None in found else True
    return Verdict(held, tuple(line for part in parts for line in part.because))


@dataclass(frozen=True)
class Experiment:
    """`claims`: numbers of the list of claims. `rule`: what decides, in words; `judge` is the same in code. `limits`:
    what it does not show. `measures`: what the table shows. `more`: arms that follow from the first ones' results."""

    name: str
    claims: tuple[int, ...]
    claim: str
    rule: str
    limits: str
    arms: Callable[[Setup], tuple[Arm, ...]]
    judge: Callable[[Results], Verdict]
    measures: tuple[str, ...] = ("held-out loss", "training loss")
    more: Callable[[Setup, Results], tuple[Arm, ...]] | None = None
