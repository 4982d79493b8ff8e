"""Runs: each a function that makes a `train.Recipe`, every number with its source."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rorqual.recipes import mini
from rorqual.train.recipe import Recipe


@dataclass(frozen=True)
class Entry:
    """make: the recipe for a folder, of its own length or of so many tokens. prepare: builds the data that it names
    there, where it brings some."""

    make: Callable[..., Recipe]
    prepare: Callable[[Path], None] | None = None


RECIPES = {"mini-cpu": Entry(mini.mini_cpu, mini.prepare)}


def entry(name: str) -> Entry:
    """A recipe by name. ValueError names those there are."""
    if name not in RECIPES:
        raise ValueError(f"there is no recipe {name!r}; there are {', '.join(RECIPES)}")
    return RECIPES[name]


__all__ = ["RECIPES", "Entry", "entry"]
