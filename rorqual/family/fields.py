"""Reading one JSON object field by field, with errors that name the field, its value and the file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from rorqual.family.parts import ConfigError


class Fields:
    """A JSON object being read. Remembers which fields were asked for, so that the rest can be reported.

    A field that is null counts as absent. Every method raises `ConfigError` for a value of the wrong type.
    """

    def __init__(self, mapping: Mapping[str, Any], source: str, path: str = "") -> None:
        self._mapping = mapping
        self._path = path
        self.source = source
        self.asked: set[str] = set()
        self.strangers: list[str] = []
        """Unknown fields of nested objects that have been read, as `outer.inner`."""

    def __contains__(self, name: str) -> bool:
        """Whether the field is there and not null."""
        self.asked.add(name)
        return self._mapping.get(name) is not None

    def given(self, name: str) -> bool:
        """Whether the field is there, be it null."""
        self.asked.add(name)
        return name in self._mapping

    def raw(self, name: str) -> Any:
        """The value as it is, None if absent."""
        self.asked.add(name)
        return self._mapping.get(name)

    def unread(self) -> list[str]:
        """The fields nobody asked for."""
        return [str(name) for name in self._mapping if name not in self.asked]

    def error(self, name: str, problem: str) -> ConfigError:
        """An error about a field: `config.json: rope_scaling.factor ...`."""
        return ConfigError(f"{self.source}: {self._path}{name} {problem}")

    def _wrong(self, name: str, wanted: str) -> NoReturn:
        raise self.error(name, f"must be {wanted}, got {self._mapping[name]!r}")

    def _missing(self, name: str) -> NoReturn:
        raise self.error(name, "is null but needed" if name in self._mapping else "is missing")

    # -------------------------------------------------------------------------------------- scalars

    def whole(self, name: str, default: int | None = None, *, least: int = 0) -> int:
        """A whole number of at least `least`; required unless there is a default."""
        value = self.maybe_whole(name, least=least)
        if value is not None:
            return value
        return default if default is not None else self._missing(name)

    def maybe_whole(self, name: str, *, least: int = 0) -> int | None:
        """A whole number of at least `least`, or None."""
        value = self.raw(name)
        if value is None:
            return None
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            self._wrong(
                name, "a positive whole number" if least == 1 else f"a whole number of {least} or more"
            )
        return value

    def size(self, name: str, default: int | None = None) -> int:
        """A whole number above zero; required unless there is a default."""
        return self.whole(name, default, least=1)

    def number(self, name: str, default: float | None = None, *, above: float | None = None) -> float:
        """A finite number, above `above` if given; required unless there is a default."""
        value = self.maybe_number(name, above=above)
        if value is not None:
            return value
        return default if default is not None else self._missing(name)

    def maybe_number(self, name: str, *, above: float | None = None) -> float | None:
        """A finite number, or None."""
        value = self.raw(name)
        if value is None:
            return None
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            self._wrong(name, "a number")
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number) or (above is not None and number <= above):
            self._wrong(name, "a finite number" if above is None else f"a finite number above {above:g}")
        return number

    def flag(self, name: str, default: bool) -> bool:
        """true or false."""
        value = self.raw(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            self._wrong(name, "true or false")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        """A string; required unless there is a default."""
        value = self.raw(name)
        if value is None:
            return default if default is not None else self._missing(name)
        if not isinstance(value, str):
            self._wrong(name, "a string")
        return value

    # ------------------------------------------------------------------------------------ composites

    def whole_list(self, name: str) -> list[int] | None:
        """A list of whole numbers of zero or more, or None."""
        value = self.raw(name)
        if value is None:
            return None
        good = isinstance(value, Sequence) and not isinstance(value, str)
        if not good or not all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in value):
            self._wrong(name, "a list of whole numbers")
        return list(value)

    def text_list(self, name: str) -> list[str] | None:
        """A list of strings, or None."""
        value = self.raw(name)
        if value is None:
            return None
        good = isinstance(value, Sequence) and not isinstance(value, str)
        if not good or not all(isinstance(v, str) for v in value):
            self._wrong(name, "a list of strings")
        return list(value)

    def inner(self, name: str) -> Fields | None:
        """A nested object, or None."""
        value = self.raw(name)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            self._wrong(name, "an object")
        return Fields(value, self.source, f"{self._path}{name}.")

    def close(self, inner: Fields) -> None:
        """Done with a nested object: note the fields of it that nobody asked for."""
        self.strangers += [f"{inner._path}{name}" for name in inner.unread()] + inner.strangers

    # -------------------------------------------------------------------------------------- checking

    def repeats(self, name: str, value: int, meaning: str) -> None:
        """The field, if there, must be `value`, which the others already say."""
        found = self.maybe_whole(name, least=1)
        if found is not None and found != value:
            raise self.error(name, f"({found}) contradicts {meaning} ({value})")

    def entries(self, name: str, count: int) -> None:
        """The list, if there, must have one entry a layer."""
        found = self.text_list(name)
        if found is not None and len(found) != count:
            raise self.error(name, f"has {len(found)} entries for {count} layers")

    def only(self, name: str, *allowed: Any) -> None:
        """The field, if there, must have one of the values `allowed`."""
        value = self.raw(name)
        if value is not None and not any(value == good and type(value) is type(good) for good in allowed):
            listed = " or ".join(_spelled(good) for good in allowed)
            raise self.error(name, f"{_spelled(value)} is not supported: only {listed} is")


def _spelled(value: Any) -> str:
    """A value as JSON has it, near enough."""
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else repr(value)
