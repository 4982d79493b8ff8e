"""`/anthropic/v1/messages` with the real Anthropic client."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.serve.conftest import Served, until
from tests.serve.puppet import TOKENIZER, dsml

anthropic = pytest.importorskip("anthropic")
Start = Callable[..., Served]
both = pytest.mark.parametrize("stream", [False, True])
ASK = [{"role": "user", "content": "What?"}]
WEATHER = {
    "name": "weather",
    "description": "tells the weather",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
CALL = dsml(("weather", {"city": "true>São Paulo"}))
MORE = {"temperature": 0.5, "top_k": 3}  # which newer clients have no arguments for
THINK = {"type": "enabled", "budget_tokens": 1024}


def ask(server: Served, stream: bool, **options: Any) -> Any:
    """The final message."""
    client = server.anthropic()
    given = {"model": "rorqual", "messages": ASK, "max_tokens": 2000, **options}
    if not stream:
        return client.messages.create(**given)
    with client.messages.stream(**given) as events:
        return events.get_final_message()


@both
def test_text(puppet: Start, stream: bool) -> None:
    server = puppet("Hello world é")
    done = ask(server, stream, system=[{"type": "text", "text": "Be brief."}], extra_body=MORE)
    assert [block.text for block in done.content] == ["Hello world é"]
    assert (done.stop_reason, done.stop_sequence, done.role, done.type) == (
        "end_turn",
        None,
        "assistant",
        "message",
    )
    answer = server.engine.seen[0]
    told = TOKENIZER.decode(answer.prompt)
    assert "Be brief." in told and told.endswith("</think>")
    assert done.usage.input_tokens + done.usage.cache_read_input_tokens == len(answer.prompt)
    assert done.usage.cache_read_input_tokens == len(answer.prompt) // 2
    assert done.usage.output_tokens == len(TOKENIZER.encode("Hello world é")) + 1
    assert (answer.sampling.temperature, answer.sampling.top_k) == (0.5, 3)


@both
def test_thinking_and_calls_there_and_back(puppet: Start, stream: bool) -> None:
    server = puppet("Look.</think>I ask." + CALL, "It shone.</think>Sun.")
    done = ask(server, stream, tools=[WEATHER], thinking=THINK)
    thought, text, call = done.content
    assert (thought.type, thought.thinking, text.text) == ("thinking", "Look.", "I ask.")
    assert (call.type, call.name, call.input) == ("tool_use", "weather", {"city": "São Paulo"})
    assert done.stop_reason == "tool_use" and call.id.startswith("toolu_")
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "sun"}]}
    said = [block.model_dump() for block in done.content]
    more = [{"role": "assistant", "content": said}, {"role": "user", "content": [result]}]
    done = ask(server, stream, tools=[WEATHER], thinking=THINK, messages=[*ASK, *more])
    assert [block.type for block in done.content] == ["thinking", "text"]
    first, second = server.engine.seen
    before = [*first.prompt, *first.done.ids]
    assert second.prompt[: len(before)] == before
    assert TOKENIZER.decode(second.prompt).endswith("<tool_result>sun</tool_result><｜Assistant｜><think>")


@both
def test_a_call_that_must_be_made(puppet: Start, stream: bool) -> None:
    server = puppet(CALL)
    for choice in ({"type": "any"}, {"type": "tool", "name": "weather"}):
        done = ask(server, stream, tools=[WEATHER], tool_choice=choice)
        assert [block.type for block in done.content] == ["tool_use"]
        assert server.engine.seen[-1].grammar is not None


@both
def test_ends(puppet: Start, stream: bool) -> None:
    server = puppet("one END" + " two" * 300)
    done = ask(server, stream, stop_sequences=["zz", "END"])
    assert (done.stop_reason, done.stop_sequence, done.content[0].text) == ("stop_sequence", "END", "one ")
    until(lambda: not server.engine.live)
    assert ask(server, stream, max_tokens=2).stop_reason == "max_tokens"
    server.engine.script[0] = "\0"
    assert ask(server, stream).content[0].text == ""


@both
def test_a_call_cut_short(puppet: Start, stream: bool) -> None:
    server = puppet(CALL[: CALL.index("Paulo")] + "\0")
    client = server.anthropic()
    if not stream:
        done = ask(server, stream, tools=[WEATHER])
        assert done.stop_reason == "max_tokens"
        assert done.content[0].input == {"INVALID_JSON": '{"city": "São '}
        return
    events = list(
        client.messages.create(model="rorqual", messages=ASK, max_tokens=900, tools=[WEATHER], stream=True)
    )
    partial = "".join(e.delta.partial_json for e in events if e.type == "content_block_delta")
    assert partial == '{"city": "São '
    assert [e.type for e in events][-3:] == ["content_block_stop", "message_delta", "message_stop"]


def test_a_prefix_is_continued(puppet: Start) -> None:
    server = puppet(" world")
    done = ask(server, False, messages=[*ASK, {"role": "assistant", "content": "Hello"}])
    assert done.content[0].text == " world"
    assert TOKENIZER.decode(server.engine.seen[0].prompt).endswith("</think>Hello")


def test_counting(puppet: Start) -> None:
    server = puppet("x")
    found = server.anthropic().messages.count_tokens(model="claude-any", messages=ASK, tools=[WEATHER])
    ask(server, False, tools=[WEATHER], model="claude-any")
    assert found.input_tokens == len(server.engine.seen[0].prompt)


def test_refusals_have_anthropics_form(puppet: Start) -> None:
    server = puppet("x", keys=("secret",))
    with pytest.raises(anthropic.AuthenticationError):
        ask(server, False)
    client = server.anthropic(api_key="secret")
    given: dict[str, Any] = {"model": "rorqual", "messages": ASK, "max_tokens": 5}
    client.messages.create(**given)
    for wrong, error, found in (
        ({"model": "other"}, anthropic.NotFoundError, "not_found_error"),
        ({"max_tokens": 0}, anthropic.BadRequestError, "max_tokens"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            anthropic.BadRequestError,
            "image",
        ),
        ({"messages": [{"role": "tool", "content": "x"}]}, anthropic.BadRequestError, "messages.0.role"),
        ({"messages": "x"}, anthropic.BadRequestError, "messages"),
        ({"tool_choice": {"type": "any"}}, anthropic.BadRequestError, "tool_choice"),
        ({"tools": [{"type": "web_search_20250305", "name": "w"}]}, anthropic.BadRequestError, "tools.0"),
        ({"extra_body": {"temperature": 1.5}}, anthropic.BadRequestError, "temperature"),
    ):
        with pytest.raises(error) as raised:
            client.messages.create(**{**given, **wrong})
        assert raised.value.body["type"] == "error" and found in str(raised.value.body["error"])
