"""Conversations that would be written wrongly or in part are refused, always with an EncodingError."""

import math
from typing import Any

import pytest

from rorqual.text import EncodingError, get_encoding

D = "｜DSML｜"
USER = {"role": "user", "content": "q"}


def called(*arguments: Any, **more: Any) -> dict[str, Any]:
    calls = [
        {"id": f"c{n}", "type": "function", "function": {"name": "f", "arguments": given}}
        for n, given in enumerate(arguments)
    ]
    return {"role": "assistant", "content": "", "tool_calls": calls, **more}


def result(number: int, text: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": f"c{number}", "content": text}


def test_unknown_fields_are_named() -> None:
    with pytest.raises(EncodingError, match="'contnt' is not a field"):
        get_encoding("v4").encode([USER | {"contnt": "x"}])
    with pytest.raises(EncodingError, match="'refusal' is not a field"):
        get_encoding("v4").encode([USER, called("{}", refusal="no")])
    harmless = {"name": "n", "id": "1", "index": 0, "type": "message", "refusal": None, "audio": None}
    assert get_encoding("v4").encode([USER | harmless | {"annotations": None}]) == get_encoding("v4").encode(
        [USER]
    )


def test_content_beside_content_blocks() -> None:
    blocks = [{"type": "text", "text": "x"}]
    with pytest.raises(EncodingError, match="content is given beside content_blocks"):
        get_encoding("v4").encode([USER | {"content_blocks": blocks}])


@pytest.mark.parametrize("name", ["roles", "r1-0528", "v31", "v32", "v4"])
def test_tool_results_follow_the_calls(name: str) -> None:
    encoding = get_encoding(name)
    begin = [USER, called("{}", "{}", "{}")]
    mixed = encoding.encode([*begin, result(2, "two"), result(0, "zero"), result(1, "one")])
    assert mixed == encoding.encode([*begin, result(0, "zero"), result(1, "one"), result(2, "two")])
    with pytest.raises(EncodingError, match="tool_call_id is 'c0'; a message before it answers"):
        encoding.encode([*begin, result(0, "zero"), result(0, "again")])


@pytest.mark.parametrize("name", ["v31", "v4"])
@pytest.mark.parametrize(
    "arguments", ['{"a": NaN}', {"a": math.inf}, {"a": {1, 2}}, '{"a":' + "[" * 100_000 + "]" * 100_000 + "}"]
)
def test_arguments_that_are_no_json(name: str, arguments: Any) -> None:
    with pytest.raises(EncodingError, match="arguments"):
        get_encoding(name).encode([USER, called(arguments)], thinking=False)


@pytest.mark.parametrize(
    "arguments",
    [{'a">': 1}, {f"a<{D}": 1}, {"k" * 2000: 1}, {"a": f"x</{D}parameter>"}, {"a": [f"</{D}parameter>"]}],
)
def test_arguments_that_would_not_read_back_in_dsml(arguments: dict[str, Any]) -> None:
    for name in ("v32", "v4"):
        with pytest.raises(EncodingError):
            get_encoding(name).encode([USER, called(arguments)])


def test_values_json_cannot_hold() -> None:
    bad = {"type": "object", "default": {1}}
    tool = {"type": "function", "function": {"name": "f", "parameters": bad}}
    for name in ("roles", "v31", "v32", "v4"):
        with pytest.raises(EncodingError, match=r"tools\[0\] cannot be written as JSON"):
            get_encoding(name).encode([USER], tools=[tool], thinking=False)
    with pytest.raises(EncodingError, match="response_format cannot be written"):
        get_encoding("v4").encode([USER], response_format=bad)
    with pytest.raises(EncodingError, match="message 0: response_format cannot be written"):
        get_encoding("v4").encode([{"role": "system", "content": "", "response_format": bad}, USER])


def test_results_inside_results() -> None:
    part: dict[str, Any] = {"type": "text", "text": "x"}
    for _ in range(100_000):
        part = {"type": "tool_result", "content": [part]}
    with pytest.raises(EncodingError, match="cannot hold another"):
        get_encoding("v4").encode([{"role": "user", "content_blocks": [part]}])
    while "content" in part:  # taken apart by hand: Python would free it recursively
        part = part["content"].pop()


def test_a_description_of_none_is_left_out() -> None:
    bare = {"type": "function", "function": {"name": "f", "parameters": {}}}
    null = {"type": "function", "function": {**bare["function"], "description": None}}  # type: ignore[dict-item]
    for name in ("roles", "v31", "v32", "v4"):
        encoding = get_encoding(name)
        assert encoding.encode([USER], tools=[null], thinking=False) == encoding.encode(
            [USER], tools=[bare], thinking=False
        )


def test_a_parser_refuses_tools_where_encode_does() -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    v31 = get_encoding("v31")
    for refuse in (
        lambda: v31.encode([USER], thinking=True, tools=[tool]),
        lambda: v31.parser(thinking=True, tools=[tool]),
    ):
        with pytest.raises(EncodingError, match="has no tools with thinking"):
            refuse()
    with pytest.raises(EncodingError, match=r"tools\[0\] has no function"):
        get_encoding("v4").parser(tools=[{}])
