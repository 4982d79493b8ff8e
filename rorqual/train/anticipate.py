"""V4's anticipatory routing: a step's experts are chosen by the model of some steps before (V4 report; facts 3.10).

Old parameters aren't kept: a step's data is known long before, so its experts are chosen when the parameters that shall
choose them are there, and kept until the step comes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

ByLayer = dict[int, Tensor]


@dataclass(frozen=True)
class Anticipation:
    """`steps`: how old the parameters are that choose a step's experts. Their weights are those of the present ones.
    `hold`: it is on for so many steps after one that the guard skipped; none: in all steps."""

    steps: int = 1
    hold: int | None = None

    def __post_init__(self) -> None:
        if self.steps < 1 or (self.hold is not None and self.hold < 1):
            raise ValueError(
                f"anticipation by {self.steps} steps, held for {self.hold}: both must be above 0"
            )


class Routes:
    """Chosen experts of steps to come. `choose` gives those of a step by the parameters of now, None past the end."""

    def __init__(self, settings: Anticipation, choose: Callable[[int], ByLayer | None]) -> None:
        self.settings, self.choose = settings, choose
        self.until = 0
        """The step it is on to, where it is on for a while."""
        self._kept: dict[int, ByLayer] = {}

    def spiked(self, step: int) -> None:
        """The guard has skipped a step."""
        if self.settings.hold is not None:
            self.until = step + 1 + self.settings.hold

    def take(self, step: int) -> ByLayer | None:
        """Experts `[N, K]` int64 of a step about to be taken, by layer; None where routers choose for themselves.
        Called before every step, since it chooses for later ones, too. The first steps after it has been switched on
        have no parameters old enough: they get those of that moment."""
        if self.settings.hold is not None and step >= self.until:
            self._kept = {}
            return None
        for later in range(step, step + self.settings.steps + 1):
            if later not in self._kept:
                found = self.choose(later)
                if found is not None:
                    self._kept[later] = {n: ids_NK.to(torch.int16) for n, ids_NK in found.items()}
        self._kept = {later: kept for later, kept in self._kept.items() if later >= step}
        return {n: ids_NK.long() for n, ids_NK in self._kept.pop(step).items()}

    def tensors(self) -> dict[str, Tensor]:
        """All that is kept: "step.layer" -> experts."""
        return {f"{step}.{n}": ids for step, kept in self._kept.items() for n, ids in kept.items()}

    def restore(self, found: Mapping[str, Tensor], until: int, device: torch.device) -> None:
        """Take back what `tensors` gave."""
        self._kept, self.until = {}, until
        for name, ids_NK in found.items():
            step, n = map(int, name.split("."))
            self._kept.setdefault(step, {})[n] = ids_NK.to(device)
