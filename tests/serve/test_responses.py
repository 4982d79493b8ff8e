"""`/v1/responses` with the real OpenAI client."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.serve.conftest import Served
from tests.serve.puppet import TOKENIZER, dsml

openai = pytest.importorskip("openai")
Start = Callable[..., Served]
both = pytest.mark.parametrize("stream", [False, True])
WEATHER = {
    "type": "function",
    "name": "weather",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
CALL = dsml(("weather", {"city": "true>São Paulo"}))


def ask(server: Served, stream: bool, **options: Any) -> Any:
    """The final response; a stream's events must lead up to it."""
    client = server.openai()
    given = {"model": "rorqual", "input": "What?", **options}
    if not stream:
        return client.responses.create(**given)
    events = list(client.responses.create(stream=True, **given))
    assert [e.sequence_number for e in events] == list(range(len(events)))
    assert [e.type for e in events[:2]] == ["response.created", "response.in_progress"]
    final = events[-1].response
    for kind, field in (
        ("output_text", "text"),
        ("reasoning_text", "text"),
        ("function_call_arguments", "arguments"),
    ):
        deltas = "".join(e.delta for e in events if e.type == f"response.{kind}.delta")
        assert deltas == "".join(getattr(e, field) for e in events if e.type == f"response.{kind}.done")
    done = [e.item for e in events if e.type == "response.output_item.done"]
    assert [item.model_dump() for item in done] == [item.model_dump() for item in final.output]
    return final


@both
def test_text_after_reasoning(puppet: Start, stream: bool) -> None:
    server = puppet("Hm.</think>Hello world")
    done = ask(server, stream, instructions="Be brief.", reasoning={"effort": "high"}, max_output_tokens=500)
    assert (done.status, done.output_text) == ("completed", "Hello world")
    assert [item.type for item in done.output] == ["reasoning", "message"]
    assert done.output[0].content[0].text == "Hm."
    prompt = server.engine.seen[0].prompt
    assert "Be brief." in TOKENIZER.decode(prompt)
    assert done.usage.input_tokens == len(prompt)
    assert done.usage.input_tokens_details.cached_tokens == len(prompt) // 2
    assert done.usage.output_tokens_details.reasoning_tokens == 4
    done = ask(server, stream, max_output_tokens=2, reasoning={"effort": "none"})
    assert (done.status, done.incomplete_details.reason) == ("incomplete", "max_output_tokens")


@both
def test_calls_there_and_back(puppet: Start, stream: bool) -> None:
    server = puppet("Look.</think>I ask." + CALL, "x</think>Sun.")
    done = ask(server, stream, tools=[WEATHER])
    assert [item.type for item in done.output] == ["reasoning", "message", "function_call"]
    call = done.output[2]
    assert (call.name, json.loads(call.arguments)) == ("weather", {"city": "São Paulo"})
    said = [item.model_dump(exclude_none=True) for item in done.output]
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "sun"}
    given = [{"role": "user", "content": "What?"}, *said, result]
    assert ask(server, stream, tools=[WEATHER], input=given).output_text == "Sun."
    first, second = server.engine.seen
    before = [*first.prompt, *first.done.ids]
    assert second.prompt[: len(before)] == before


@both
def test_a_call_that_is_cut_off_is_incomplete(puppet: Start, stream: bool) -> None:
    server = puppet("x</think>I ask." + CALL)
    whole = len(TOKENIZER.encode("x</think>I ask." + CALL))
    done = ask(server, stream, tools=[WEATHER], max_output_tokens=whole - 12)
    assert done.status == "incomplete"
    assert [(item.type, item.status) for item in done.output] == [
        ("reasoning", "completed"),
        ("message", "completed"),
        ("function_call", "incomplete"),
    ]


def test_an_error_in_the_middle_of_a_stream(puppet: Start) -> None:
    server = puppet("x</think>" + "word " * 3000)
    events = iter(server.openai().responses.create(model="rorqual", input="What?", stream=True))
    seen = [next(events) for _ in range(8)]
    server.engine.fail = RuntimeError("a kernel failed")
    seen += events
    last = seen[-1]
    assert (last.type, last.code, last.param) == ("error", "internal_error", None)
    assert last.message and [event.sequence_number for event in seen] == list(range(len(seen)))


@both
def test_formats(puppet: Start, stream: bool) -> None:
    server = puppet('x</think>{"a": 1}')
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    fmt = {"type": "json_schema", "name": "a", "schema": schema}
    assert json.loads(ask(server, stream, text={"format": fmt}).output_text) == {"a": 1}
    assert server.engine.seen[0].grammar is not None


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"input": [{"type": "computer_call"}]}, "input.0.type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input.0.content.0"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"input": []}, "messages"),
        ({"temperature": 9}, "temperature"),
        ({"max_output_tokens": "5"}, "max_output_tokens"),
    ],
)
def test_refusals_name_the_field(puppet: Start, wrong: Any, field: str) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        ask(puppet("x"), False, **wrong)
    assert raised.value.body["param"] == field
