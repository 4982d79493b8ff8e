"""DeepSeek's rules for the schemas of strict functions (facts 5)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rorqual.engine.grammar import MOST_CHOICES
from rorqual.serve.errors import Refusal

MOST_PROPERTIES = 1000
"""Of a strict function, those of inner objects included."""

MOST_BRANCHES = 1000
"""Of an anyOf, oneOf or allOf."""


def check_strict(schema: Any, place: str, depth: int = 0) -> int:
    """A strict schema names all of an object's properties as required and allows no others. Returns how many
    properties it has in all."""
    check_schema(schema, place)
    if not isinstance(schema, Mapping) or depth > 64:
        return 0
    inner = [
        (f"{place}.{key}.{number}", one)
        for key in ("anyOf", "oneOf", "allOf")
        for number, one in enumerate(schema.get(key) or ())
    ]
    count = 0
    if schema.get("type") == "object" or "properties" in schema:
        properties = schema.get("properties") or {}
        if not isinstance(properties, Mapping):
            raise Refusal(400, "properties must be an object", f"{place}.properties", "invalid_tool")
        count = len(properties)
        required = schema.get("required")
        named = {name for name in required if isinstance(name, str)} if isinstance(required, list) else set()
        missing = [name for name in properties if name not in named]
        if missing:
            more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
            names = ", ".join(f"{name:.80}" for name in missing[:5]) + more
            told = f"a strict function must list all properties as required; missing: {names}"
            raise Refusal(400, told, f"{place}.required", "invalid_tool")
        if properties and schema.get("additionalProperties") is not False:
            told = "a strict function's objects must have additionalProperties: false"
            raise Refusal(400, told, f"{place}.additionalProperties", "invalid_tool")
        inner += [(f"{place}.properties.{name:.80}", one) for name, one in properties.items()]
    for key in ("$defs", "definitions"):
        if isinstance(schema.get(key), Mapping):
            inner += [(f"{place}.{key}.{name:.80}", one) for name, one in schema[key].items()]
    if isinstance(schema.get("items"), Mapping):
        inner.append((f"{place}.items", schema["items"]))
    for where, one in inner:
        count += check_strict(one, where, depth + 1)
        if count > MOST_PROPERTIES:
            told = f"a strict function may have at most {MOST_PROPERTIES:,} properties in all"
            raise Refusal(400, told, place, "invalid_tool")
    return count


def check_schema(schema: Any, place: str) -> None:
    """Refuse what is no schema, and lists in it that are none."""
    if isinstance(schema, bool):
        return
    if not isinstance(schema, Mapping):
        raise Refusal(400, "a schema must be an object, true or false", place, "invalid_tool")
    for key in ("enum", "anyOf", "oneOf", "allOf"):
        if key in schema and not (isinstance(schema[key], list) and schema[key]):
            where = place if place == "tools" else f"{place}.{key}"
            raise Refusal(400, f"{key} must be a list of one or more", where, "invalid_tool")
        most = MOST_CHOICES if key == "enum" else MOST_BRANCHES
        if len(schema.get(key, ())) > most:
            told = f"{key} holds {len(schema[key]):,} values, more than {most:,}"
            raise Refusal(400, told, place, "invalid_tool")
