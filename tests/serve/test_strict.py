"""Strict functions: which schemas are taken, and what their grammars allow."""

from __future__ import annotations

import re
from typing import Any

import pytest

from rorqual.engine import Grammar
from rorqual.engine.grammar import GrammarCompiler
from rorqual.serve.errors import Refusal
from rorqual.serve.tools import MOST_FORMS, Choice, _anchored, grammar_of, read_tools
from rorqual.text import get_encoding
from tests.serve.puppet import TOKENIZER, dsml

pytest.importorskip("llguidance")

COMPILER = GrammarCompiler(TOKENIZER)


def tool(parameters: dict[str, Any], required: bool = True) -> dict[str, Any]:
    schema = {"type": "object", "properties": parameters, "additionalProperties": False}
    schema |= {"required": list(parameters)} if required else {}
    return {"type": "function", "function": {"name": "f", "strict": True, "parameters": schema}}


def grammar(parameters: dict[str, Any]) -> Grammar:
    made = grammar_of(get_encoding("v4"), TOKENIZER, read_tools([tool(parameters)]), Choice("required"), None)
    assert made is not None
    return made


def takes(made: Grammar, value: str) -> bool:
    """Whether the call f(x=value) fits; value as after `string=`: "true>…" or "false>…"."""
    state, ids = COMPILER.state(made), TOKENIZER.encode(dsml(("f", {"x": value})))
    return state.validate(ids) == len(ids)


def refused(parameters: dict[str, Any], words: str, param: str = "tools") -> None:
    with pytest.raises(Refusal, match=words) as raised:
        grammar(parameters)
    assert raised.value.status == 400 and (raised.value.param or "").startswith(param)


def test_schemas_that_name_themselves() -> None:
    again = {"$ref": "#/properties/x"}
    refused({"x": {"anyOf": [again] * 7}}, "'x' .*no value fits")
    made = grammar(
        {"x": {"anyOf": [*[again] * 7, {"type": "string"}, {"type": "integer"}, {"type": "integer"}]}}
    )
    assert made.text.count("integer") == 1 and len(made.text) < 1000
    assert takes(made, "true>a") and takes(made, "false>1") and not takes(made, "false>{}")
    refused({"x": {"anyOf": [{"const": str(n)} for n in range(MOST_FORMS + 1)]}}, "more than 256 forms")
    deep: Any = {"type": "string"}
    for _ in range(50):
        deep = {"anyOf": [deep, {"type": "null"}]}
    assert takes(grammar({"x": deep}), "true>a")


def test_schemas_that_are_none() -> None:
    place = "tools.0.function.parameters.properties.x"
    for wrong in ({"enum": 5}, {"enum": "abc"}, {"enum": []}, {"anyOf": 5}, {"anyOf": {}}, {"allOf": "x"}):
        refused({"x": wrong}, "must be a list of one or more", place)
        refused(
            {"x": {"anyOf": [{"type": "null"}, wrong]}}, "must be a list of one or more", f"{place}.anyOf.1"
        )
        hidden = {"type": "array", "items": {"type": "null"}, "hidden": wrong}
        if "allOf" not in wrong:
            refused({"y": hidden, "x": {"$ref": "#/properties/y/hidden"}}, "'x'.*must be a list")
    for wrong in (5, None, "x", []):
        refused({"x": wrong}, "a schema must be an object", place)
    assert takes(grammar({"x": True}), "false>[1]")
    assert takes(grammar({"x": {"anyOf": [False, {"type": "null"}]}}), "false>null")
    refused({"x": False}, "no value fits")


def test_large_schemas_are_refused_at_once() -> None:
    string = {"type": "string"}
    assert grammar({f"p{n}": string for n in range(1000)})
    refused({f"p{n}": string for n in range(1001)}, "at most 1,000 properties", "tools.0")
    inner = tool({f"p{n}": string for n in range(600)})["function"]["parameters"]
    refused({"a": inner, "b": inner}, "at most 1,000 properties", "tools.0")
    many = {"$ref": "#/properties/p0/hidden"}
    hidden = {"p0": {"type": "null", "hidden": {"anyOf": [string] * 900}}}
    refused(hidden | {f"p{n}": many for n in range(1, 1000)}, "more than 262,144 bytes")
    refused({"x": {"anyOf": [string] * 1001}}, "1,001 values", "tools.0")
    refused({"x": {"enum": [0] * 10_001}}, "10,001 values", "tools.0")
    refused({"x": {"enum": ["a" * 300_000]}}, "more than 262,144 bytes")
    with pytest.raises(Refusal) as raised:
        read_tools([tool({f"p{n}" + "x" * 500: string for n in range(5000)}, required=False)])
    assert len(raised.value.message) < 1000 and raised.value.message.endswith("and 4995 more")


PATTERNS = [
    "^a|b$",
    "^ab$",
    "ab",
    r"^\\/$",
    r"^a/b\/c$",
    r"^a\$",
    r"a\\$",
    "^(a|b)$",
    "^[|)]a$",
    "^a$|^b",
    "a||^b",
]
TEXTS = ["a", "b", "ab", "ba", "xb", "ax", "xax", "\\/", "/", "a/b/c", "a$", "a\\", "|a", ")a", "", "cb"]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_mean_what_they_mean_in_a_schema(pattern: str) -> None:
    made = grammar({"x": {"type": "string", "pattern": pattern}})
    for text in TEXTS:
        assert takes(made, f"true>{text}") == (re.search(pattern, text) is not None), text


def test_a_pattern_that_ends_early() -> None:
    refused({"x": {"type": "string", "pattern": "a\\"}}, "single backslash")
    assert _anchored("^/$") == r"((\/))"
