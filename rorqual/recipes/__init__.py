"""Runs: each a function that makes a `train.Recipe`, every number with its source."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rorqual.recipes.mini import mini_cpu
from rorqual.train.recipe import Recipe

RECIPES: dict[str, Callable[[Path], Recipe]] = {"mini-cpu": mini_cpu}
"""By name. Each is given the folder of the run, where it may put what it needs."""


def recipe(name: str, folder: Path) -> Recipe:
    """A recipe by name. ValueError names those there are."""
    if name not in RECIPES:
        raise ValueError(f"there is no recipe {name!r}; there are {', '.join(RECIPES)}")
    return RECIPES[name](folder)


__all__ = ["RECIPES", "recipe"]
