"""Runs: each a function that makes a `train.Recipe`, every number with its source."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rorqual.recipes import mini, v1, v2, v3, v4
from rorqual.train.recipe import Recipe


@dataclass(frozen=True)
class Entry:
    """make: the recipe for a folder, of its own length or of so many tokens. prepare: builds the data that it names
    there, where it brings some. unverified: fields that the reports don't give, or that were recalled, not read."""

    make: Callable[..., Recipe]
    prepare: Callable[[Path], None] | None = None
    unverified: tuple[str, ...] = ()


_OPTIMIZER = ("optimizer.betas", "optimizer.decay")

RECIPES = {
    "v1-7b": Entry(v1.v1_7b, unverified=(*_OPTIMIZER, "clip", "dtype")),
    "v1-67b": Entry(v1.v1_67b, unverified=(*_OPTIMIZER, "clip", "dtype")),
    "v2": Entry(v2.v2, unverified=(*_OPTIMIZER, "dtype")),
    "v2-long": Entry(v2.v2_long, unverified=("rate", "v2", "clip", *_OPTIMIZER, "dtype")),
    "v2-lite": Entry(v2.v2_lite, unverified=("clip", *_OPTIMIZER, "dtype")),
    "v3": Entry(v3.v3),
    "v3-long": Entry(v3.v3_long, unverified=("mtp", "speed", "balance", "clip")),
    "v3.2-warm-up": Entry(v3.v32_warm_up, unverified=("optimizer", "clip")),
    "v3.2": Entry(v3.v32, unverified=("optimizer", "mtp", "speed", "balance", "clip")),
    "v4-flash": Entry(v4.v4_flash, unverified=("rate", "stages", "mtp", "clip", "dtype")),
    "v4-pro": Entry(v4.v4_pro, unverified=("rate", "stages", "mtp", "clip", "dtype")),
    "mini-cpu": Entry(mini.mini_cpu, mini.prepare),
    "mini-v1": Entry(mini.mini_v1, mini.prepare),
    "mini-v2": Entry(mini.mini_v2, mini.prepare),
    "mini-v3": Entry(mini.mini_v3, mini.prepare),
    "mini-v3.2-warm-up": Entry(mini.mini_v32_warm_up, mini.prepare),
    "mini-v3.2": Entry(mini.mini_v32, mini.prepare),
    "mini-v4": Entry(mini.mini_v4, mini.prepare),
}
"""By the name that `rorqual pretrain recipe:NAME` takes. Released members first, then miniatures."""


def entry(name: str) -> Entry:
    """A recipe by name. ValueError names those there are."""
    if name not in RECIPES:
        raise ValueError(f"there is no recipe {name!r}; there are {', '.join(RECIPES)}")
    return RECIPES[name]


__all__ = ["RECIPES", "Entry", "entry"]
