"""A run as facts: model, data, schedules, optimizer. State after step n is a function of these and n."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

from rorqual.family import ModelConfig
from rorqual.train.balance import V2Balance
from rorqual.train.optim import AdamW, Settings
from rorqual.train.schedule import Schedule, Stage


@dataclass(frozen=True)
class Source:
    """A corpus and its weight in the mixture."""

    folder: str
    weight: float = 1.0


@dataclass(frozen=True)
class Guard:
    """Against loss spikes: a step whose gradient norm is more than `factor` times the median of the last `window`
    steps, or whose loss or gradient is not a number, moves nothing; after `most` such steps in a row the run stops."""

    factor: float = 10.0
    window: int = 50
    most: int = 5


@dataclass(frozen=True)
class Recipe:
    """Everything a run is made of. `tokens`: where it ends. `micro`: rows that go through the model at once.
    `rate`, `mtp` (λ) and `speed` (γ of the routers' biases) are functions of tokens seen."""

    name: str
    config: ModelConfig
    sources: tuple[Source, ...]
    stages: tuple[Stage, ...]
    tokens: int
    rate: Schedule
    optimizer: Settings = field(default_factory=AdamW)
    mtp: Schedule = field(default_factory=lambda: Schedule(0.3))
    speed: Schedule = field(default_factory=lambda: Schedule(0.001))
    balance: float = 1e-4
    v2: V2Balance | None = None
    clip: float | None = 1.0
    guard: Guard | None = field(default_factory=Guard)
    ema: float | None = None
    apart: bool = False
    micro: int = 8
    dtype: str = "float32"
    seed: int = 0
    evaluate_every: int = 0
    save_every: int = 0
    keep: int = 2

    def fingerprint(self) -> str:
        """What two runs compare, to know whether one goes on with the other. How often it is looked at and saved is
        left out, as is what of a folder's name."""
        left_out = ("name", "evaluate_every", "save_every", "keep", "sources")
        facts = [(f.name, repr(getattr(self, f.name))) for f in fields(self) if f.name not in left_out]
        weights = [source.weight for source in self.sources]
        return hashlib.sha256(repr((facts, weights)).encode()).hexdigest()


def override(recipe: Any, path: str, value: str) -> Any:
    """`recipe` with the field at `path` ("optimizer.decay", "stages.0.batch") read from text in the type it has.
    ValueError names what is there instead."""
    head, _, rest = path.partition(".")
    if isinstance(recipe, tuple):
        if not head.isdigit() or int(head) >= len(recipe):
            raise ValueError(f"{head!r} is no place in a list of {len(recipe)}: they are numbered from 0")
        at = int(head)
        new = override(recipe[at], rest, value) if rest else _read(recipe[at], value, head)
        return (*recipe[:at], new, *recipe[at + 1 :])
    if not is_dataclass(recipe) or isinstance(recipe, type):
        raise ValueError(f"nothing lies under {head!r} here")
    names = [f.name for f in fields(recipe) if not f.name.startswith("_")]
    if head not in names:
        raise ValueError(f"{type(recipe).__name__} has no {head!r}; it has {', '.join(names)}")
    old = getattr(recipe, head)
    return replace(recipe, **{head: override(old, rest, value) if rest else _read(old, value, head)})


def _read(old: Any, value: str, name: str) -> Any:
    """`value` in the type of what it replaces."""
    low = value.lower()
    try:
        if isinstance(old, bool):
            return {"true": True, "false": False, "yes": True, "no": False, "1": True, "0": False}[low]
        if isinstance(old, Schedule):
            return Schedule(float(value))
        if isinstance(old, str):
            return value
        if low == "none":
            return None
        if isinstance(old, int):
            return int(float(value)) if float(value).is_integer() else int(value)
        if isinstance(old, float) or old is None:
            return float(value)
    except (KeyError, ValueError):
        raise ValueError(
            f"{name}={value}: it is {old!r} now, and this can't be read as one of its kind"
        ) from None
    raise ValueError(f"{name} is a {type(old).__name__}: name a field of it, such as {name}.{_first(old)}")


def _first(old: Any) -> str:
    return next((f.name for f in fields(old)), "") if is_dataclass(old) else "0"
