"""The one error of this package, and how it lists what is wrong."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

SHOWN = 5
"""How many offenders of a kind an error names before it only counts."""


class CheckpointError(ValueError):
    """A checkpoint that can't be read or written as asked: names file, tensor, the expected and the found."""


def some(items: Sequence[str], separator: str = ", ") -> str:
    """The first few items, and how many more there are."""
    text = separator.join(items[:SHOWN])
    return text if len(items) <= SHOWN else f"{text}{separator}and {len(items) - SHOWN} more"


class Problems:
    """Collects everything wrong with a checkpoint, to be told at once."""

    def __init__(self) -> None:
        self._found: dict[str, list[str]] = {}

    def add(self, kind: str, what: str) -> None:
        """Note one offender of a `kind` such as "missing tensors"."""
        self._found.setdefault(kind, []).append(what)

    def raise_if_any(self, where: Path) -> None:
        """Raise one CheckpointError with every kind, its count and its first few offenders."""
        if self._found:
            kinds = (f"{len(items)} {kind}: {some(items, '; ')}" for kind, items in self._found.items())
            raise CheckpointError(f"{where} can't be loaded.\n  " + "\n  ".join(kinds))
