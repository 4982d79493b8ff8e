"""`/v1/chat/completions` with the real OpenAI client, over a model that writes what it is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from rorqual.text.tokens import DSML
from tests.serve.conftest import Served, until
from tests.serve.puppet import TOKENIZER, dsml

openai = pytest.importorskip("openai")

Start = Callable[..., Served]
ASK = [{"role": "user", "content": "What?"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "tells the weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer", "minimum": 1}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
STRICT = {"type": "function", "function": WEATHER["function"] | {"strict": True}}
CALL = dsml(("weather", {"city": "true>São Paulo", "days": "false>3"}))


def ask(server: Served, stream: bool = False, **options: Any) -> Any:
    """The one choice of an answer, whole or put together from a stream; with `.usage`."""
    client = server.openai()
    given = {"model": "rorqual", "messages": ASK, **options}
    if not stream:
        done = client.chat.completions.create(**given)
        choice = done.choices[0]
        message = choice.message
        calls = [(c.id, c.function.name, c.function.arguments) for c in message.tool_calls or ()]
        reasoning = getattr(message, "reasoning_content", None) or ""
        return Answer(reasoning, message.content or "", calls, choice.finish_reason, done.usage, choice)
    answer = Answer("", "", [], None, None, None)
    for chunk in client.chat.completions.create(stream=True, stream_options={"include_usage": True}, **given):
        answer.usage = chunk.usage or answer.usage
        for choice in chunk.choices:
            answer.choice = choice
            answer.finish = choice.finish_reason or answer.finish
            answer.reasoning += getattr(choice.delta, "reasoning_content", None) or ""
            answer.content += choice.delta.content or ""
            for call in choice.delta.tool_calls or ():
                if call.index == len(answer.calls):
                    answer.calls.append((call.id, call.function.name, ""))
                head = answer.calls[call.index]
                answer.calls[call.index] = (*head[:2], head[2] + call.function.arguments)
    return answer


class Answer:
    def __init__(
        self, reasoning: str, content: str, calls: Any, finish: Any, usage: Any, choice: Any
    ) -> None:
        self.reasoning, self.content, self.calls = reasoning, content, calls
        self.finish, self.usage, self.choice = finish, usage, choice


both = pytest.mark.parametrize("stream", [False, True])


@both
def test_thinking(puppet: Start, stream: bool) -> None:
    server = puppet("Hm, é.</think>Hello world")
    answer = ask(server, stream)
    assert (answer.reasoning, answer.content, answer.finish) == ("Hm, é.", "Hello world", "stop")
    prompt = server.engine.seen[0].prompt
    told = TOKENIZER.encode("Hm, é.</think>Hello world")
    assert answer.usage.prompt_tokens == len(prompt)
    assert answer.usage.completion_tokens == len(told) + 1  # and the end token
    assert answer.usage.completion_tokens_details.reasoning_tokens == len(TOKENIZER.encode("Hm, é.")) + 1
    assert answer.usage.prompt_cache_hit_tokens == len(prompt) // 2
    assert answer.usage.prompt_cache_hit_tokens + answer.usage.prompt_cache_miss_tokens == len(prompt)


@both
@pytest.mark.parametrize(
    "how", [{"extra_body": {"thinking": {"type": "disabled"}}}, {"reasoning_effort": "none"}]
)
def test_not_thinking(puppet: Start, stream: bool, how: Any) -> None:
    server = puppet("Hello world")
    answer = ask(server, stream, **how)
    assert (answer.reasoning, answer.content, answer.finish) == ("", "Hello world", "stop")
    assert TOKENIZER.decode(server.engine.seen[0].prompt).endswith("</think>")


def test_effort_reaches_the_prompt(puppet: Start) -> None:
    server = puppet("x</think>y")
    for effort in ("max", "ultra", "high", "low"):
        ask(server, reasoning_effort=effort)
    prompts = [TOKENIZER.decode(answer.prompt) for answer in server.engine.seen]
    assert [("Absolute maximum" in prompt) for prompt in prompts] == [True, True, False, False]


@both
@pytest.mark.parametrize("tool", [WEATHER, STRICT])
def test_tools(puppet: Start, stream: bool, tool: Any) -> None:
    server = puppet("Look.</think>I ask." + CALL)
    answer = ask(server, stream, tools=[tool])
    assert (answer.reasoning, answer.content, answer.finish) == ("Look.", "I ask.", "tool_calls")
    ((call_id, name, arguments),) = answer.calls
    assert call_id.startswith("call_") and name == "weather"
    assert json.loads(arguments) == {"city": "São Paulo", "days": 3}
    assert (server.engine.seen[0].grammar is not None) == (tool is STRICT)


@both
def test_several_calls_or_one(puppet: Start, stream: bool) -> None:
    long = f"true>B{'b' * 300}"
    two = dsml(
        ("weather", {"city": "true>A", "days": "false>1"}), ("weather", {"city": long, "days": "false>2"})
    )
    server = puppet("x</think>" + two)
    answer = ask(server, stream, tools=[WEATHER])
    assert [json.loads(call[2])["city"] for call in answer.calls] == ["A", long[5:]]
    assert answer.calls[0][0] != answer.calls[1][0]
    answer = ask(server, stream, tools=[WEATHER], parallel_tool_calls=False)
    assert [json.loads(call[2])["city"] for call in answer.calls] == ["A"] and answer.finish == "tool_calls"
    until(lambda: server.engine.cancelled == 1)


@both
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
@pytest.mark.parametrize("tool", [WEATHER, STRICT])
def test_a_call_that_must_be_made(puppet: Start, stream: bool, choice: Any, tool: Any) -> None:
    other = {"type": "function", "function": {"name": "other"}}
    server = puppet("x</think>" + CALL, "x</think>No.")
    answer = ask(server, stream, tools=[other, tool], tool_choice=choice)
    assert answer.finish == "tool_calls" and answer.calls[0][1] == "weather"
    with pytest.raises(openai.APIError):  # the grammar forbids to answer in words
        ask(server, stream, tools=[other, tool], tool_choice=choice)


def test_strict_calls_keep_to_their_schema(puppet: Start) -> None:
    wrong = dsml(("weather", {"city": "true>X", "days": "false>0"}))
    server = puppet("x</think>" + wrong)
    with pytest.raises(openai.InternalServerError):
        ask(server, tools=[STRICT])


@both
def test_no_calls_wanted(puppet: Start, stream: bool) -> None:
    server = puppet("x</think>fine")
    answer = ask(server, stream, tools=[WEATHER], tool_choice="none")
    assert answer.content == "fine" and not answer.calls
    bias = dict(server.engine.seen[0].sampling.bias)
    assert bias == {TOKENIZER.id_of(DSML): -100.0}
    assert "tells the weather" in TOKENIZER.decode(server.engine.seen[0].prompt)


@both
def test_a_broken_call_is_never_content_and_never_lost(puppet: Start, stream: bool) -> None:
    server = puppet(f"x</think>Then:\n\n<{DSML}tool_calls>\nnonsense</{DSML}tool_calls>")
    answer = ask(server, stream, tools=[WEATHER])
    assert (answer.content, answer.calls, answer.finish) == ("Then:", [], "stop")
    assert answer.choice.format_problem["text"].strip() == "nonsense"


@both
def test_a_call_cut_short(puppet: Start, stream: bool) -> None:
    server = puppet("x</think>" + CALL[: CALL.index("Paulo")] + "\0")
    answer = ask(server, stream, tools=[WEATHER])
    assert answer.finish == "length" and answer.calls[0][2] == '{"city": "São '
    assert "inside the tool calls" in answer.choice.format_problem["message"]


@both
def test_tool_calls_go_back_as_they_were_written(puppet: Start, stream: bool) -> None:
    """A call laid out in another way than the encoder's, in other tokens than the tokenizer's."""
    written = CALL.replace(">3<", "> 3 <")
    server = puppet("Think </think>" + written, "done</think>ok", "more</think>ok")
    first = ask(server, stream, tools=[WEATHER])
    call_id, name, arguments = first.calls[0]
    call = {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
    said = {"role": "assistant", "content": first.content, "tool_calls": [call]}
    result = {"role": "tool", "tool_call_id": call_id, "content": "sun"}
    ask(server, stream, tools=[WEATHER], messages=[*ASK, said, result])  # without its reasoning
    seen = server.engine.seen
    before = [*seen[0].prompt, *seen[0].done.ids]
    assert seen[1].prompt[: len(before)] == before
    assert TOKENIZER.decode(seen[1].prompt[len(before) :]).count("sun") == 1
    other = {
        **said,
        "tool_calls": [{**call, "function": {"name": name, "arguments": '{"city": "Rome", "days": 3}'}}],
    }
    ask(server, stream, tools=[WEATHER], messages=[*ASK, other, result])
    told = TOKENIZER.decode(seen[2].prompt)
    assert "Rome" in told and "Paulo" not in told and "Think " not in told


@both
def test_json_mode_and_schemas(puppet: Start, stream: bool) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    named = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema, "strict": True}}
    server = puppet('any {text} first</think>{"a": 1}')
    for wanted in ({"type": "json_object"}, named):
        answer = ask(server, stream, response_format=wanted)
        assert json.loads(answer.content) == {"a": 1} and answer.reasoning == "any {text} first"
    server.engine.script[0] = 'any</think>{"b": 1}'
    with pytest.raises(openai.APIError):
        ask(server, stream, response_format=named)


@both
@pytest.mark.parametrize(
    "wanted", [{"type": "regex", "regex": "a+b"}, {"type": "choice", "choice": ["aab", "x"]}]
)
def test_other_formats(puppet: Start, stream: bool, wanted: Any) -> None:
    server = puppet("</think>aab")
    assert ask(server, stream, response_format=wanted).content == "aab"


@both
def test_a_schema_beside_tools(puppet: Start, stream: bool) -> None:
    server = puppet('t</think>{"a": 1}', "t</think>" + CALL, "t</think>words")
    options = {"tools": [WEATHER], "response_format": {"type": "json_object"}}
    assert ask(server, stream, **options).content == '{"a": 1}'
    assert ask(server, stream, **options).calls
    with pytest.raises(openai.APIError):
        ask(server, stream, **options)


@both
def test_stop_strings_end_the_content_only(puppet: Start, stream: bool) -> None:
    server = puppet("END in thought</think>Hello worEN world END tail" + " and more" * 200)
    answer = ask(server, stream, stop=["END", "zzz"])
    assert (answer.reasoning, answer.content, answer.finish) == (
        "END in thought",
        "Hello worEN world ",
        "stop",
    )
    until(lambda: server.engine.cancelled == 1)
    server.engine.script[0] = "x</think>almost EN"
    assert ask(server, stream, stop="END").content == "almost EN"


@both
def test_length(puppet: Start, stream: bool) -> None:
    server = puppet("x</think>Hello world")
    answer = ask(server, stream, max_tokens=3)
    assert answer.finish == "length" and answer.usage.completion_tokens == 3
    assert server.engine.seen[0].sampling.max_new_tokens == 3
    ask(server, stream)
    assert server.engine.seen[1].sampling.max_new_tokens == 20_000 - len(server.engine.seen[1].prompt)


@both
def test_logprobs(puppet: Start, stream: bool) -> None:
    server = puppet("Hm</think>Hello é world")
    if stream:
        chunks = list(
            server.openai().chat.completions.create(
                model="rorqual", messages=ASK, stream=True, logprobs=True, top_logprobs=2
            )
        )
        found = [choice.logprobs for chunk in chunks for choice in chunk.choices if choice.logprobs]
        content = [token for one in found for token in one.content]
        reasoning = [token for one in found for token in getattr(one, "reasoning_content", None) or ()]
    else:
        choice = ask(server, logprobs=True, top_logprobs=2).choice
        content, reasoning = choice.logprobs.content, choice.logprobs.reasoning_content
    assert b"".join(bytes(token.bytes) for token in content).decode() == "Hello é world"
    assert len(content) == len(TOKENIZER.encode("Hello é world"))
    assert b"".join(bytes(t["bytes"] if isinstance(t, dict) else t.bytes) for t in reasoning) == b"Hm"
    assert all(token.logprob == -0.5 and len(token.top_logprobs) == 2 for token in content)


@both
def test_logprobs_beside_calls_and_stops(puppet: Start, stream: bool) -> None:
    server = puppet("Hm</think>I ask." + CALL, "Hm</think>one two STOP three")
    for text, options in (("I ask.", {"tools": [WEATHER]}), ("one two ", {"stop": "STOP"})):
        if stream:
            made = server.openai().chat.completions.create(
                model="rorqual", messages=ASK, stream=True, logprobs=True, **options
            )
            found = [choice.logprobs for chunk in made for choice in chunk.choices if choice.logprobs]
            tokens = [token for one in found for token in one.content]
        else:
            tokens = ask(server, logprobs=True, **options).choice.logprobs.content
        assert "".join(token.token for token in tokens) == text


def test_several_choices(puppet: Start) -> None:
    server = puppet("a</think>one", "b</think>two", "c</think>three")
    done = server.openai().chat.completions.create(model="rorqual", messages=ASK, n=3, seed=5)
    assert sorted(choice.message.content for choice in done.choices) == ["one", "three", "two"]
    assert [choice.index for choice in done.choices] == [0, 1, 2]
    assert sorted(answer.sampling.seed for answer in server.engine.seen) == [5, 6, 7]
    assert done.usage.prompt_tokens == len(server.engine.seen[0].prompt)


@both
def test_prefix_completion(puppet: Start, stream: bool) -> None:
    server = puppet("world", "more thought</think>Hello")
    last = {"role": "assistant", "content": "Hello ", "prefix": True}
    answer = ask(server, stream, messages=[*ASK, last], extra_body={"thinking": {"type": "disabled"}})
    assert (answer.reasoning, answer.content) == ("", "world")
    assert TOKENIZER.decode(server.engine.seen[0].prompt).endswith("</think>Hello ")
    last = {"role": "assistant", "content": "", "reasoning_content": "I begin, ", "prefix": True}
    answer = ask(server, stream, messages=[*ASK, last])
    assert (answer.reasoning, answer.content) == ("more thought", "Hello")


def test_sampling_fields_reach_the_engine(puppet: Start) -> None:
    server = puppet("x</think>y")
    ask(
        server, temperature=0.5, top_p=0.9, frequency_penalty=1, presence_penalty=-1.5, seed=3, logit_bias={"5": 2},
        extra_body={"top_k": 7, "min_p": 0.1, "repetition_penalty": 1.1},
    )  # fmt: skip
    s = server.engine.seen[0].sampling
    found = (
        s.temperature,
        s.top_p,
        s.frequency_penalty,
        s.presence_penalty,
        s.seed,
        s.top_k,
        s.min_p,
        s.bias,
    )
    assert found == (0.5, 0.9, 1, -1.5, 3, 7, 0.1, ((5, 2.0),)) and s.repetition_penalty == 1.1
    ask(server)
    assert server.engine.seen[1].sampling.temperature == 1.0


def test_the_form_of_a_stream(puppet: Start) -> None:
    httpx = pytest.importorskip("httpx2")
    server = puppet("x</think>Hello world")
    body = {"messages": ASK, "stream": True}
    answer = httpx.post(server.url + "/chat/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = answer.text.split("\n\n")
    assert (
        events[-1] == "" and events[-2] == "data: [DONE]" and all(e.startswith("data: ") for e in events[:-1])
    )
    chunks = [json.loads(event[6:]) for event in events[:-2]]
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks][-1] == "stop"
    assert all("usage" not in chunk for chunk in chunks)
