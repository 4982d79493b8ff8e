"""Reading answers: split anywhere gives the same, round trips, malformed and truncated text, strict mode."""

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rorqual.text import (
    ENCODINGS,
    CallBegin,
    CallDelta,
    CallEnd,
    ContentDelta,
    EncodingError,
    Event,
    Parsed,
    ReasoningDelta,
    StreamParser,
    ToolCall,
    ToolCallError,
    get_encoding,
)

EOS = "<｜end▁of▁sentence｜>"
D = "｜DSML｜"
WITH_TOOLS = [name for name, encoding in ENCODINGS.items() if encoding.supports_tools]
MODES = [  # (encoding, thinking)
    (name, thinking)
    for name, encoding in ENCODINGS.items()
    for thinking in {"never": (False,), "always": (True,), "choice": (False, True)}[encoding.thinking]
]


def read(parser: StreamParser, text: str, sizes: list[int] | None = None) -> tuple[list[Event], Parsed]:
    """Feed `text` in pieces of the given sizes, over and over (None: at once); all events, and the result."""
    events: list[Event] = []
    if sizes is None:
        events += parser.feed(text)
    else:
        at = turn = 0
        while at < len(text):
            size = sizes[turn % len(sizes)]
            events += parser.feed(text[at : at + size])
            at, turn = at + size, turn + 1
    parsed = parser.finish()
    return events + list(parsed.events), parsed


def rebuilt(events: list[Event]) -> tuple[str, str, tuple[ToolCall, ...]]:
    """What a client makes of the events: reasoning, content, calls."""
    reasoning = content = ""
    calls: list[ToolCall] = []
    for event in events:
        match event:
            case ReasoningDelta(text):
                assert text
                reasoning += text
            case ContentDelta(text):
                assert text
                content += text
            case CallBegin(index, name):
                assert index == len(calls)
                calls.append(ToolCall(name, "", complete=False))
            case CallDelta(index, text):
                assert index == len(calls) - 1
                calls[index] = replace(calls[index], arguments=calls[index].arguments + text)
            case CallEnd(index):
                assert index == len(calls) - 1
    return reasoning, content, tuple(calls)


def agree(name: str, thinking: bool, text: str, sizes: list[int]) -> Parsed:
    """Read at once, by single characters and by the given sizes: all must agree. The result."""
    encoding = get_encoding(name)
    _, whole = read(encoding.parser(thinking=thinking), text)
    for split in ([1], sizes):
        events, parsed = read(encoding.parser(thinking=thinking), text, split)
        assert parsed == whole
        reasoning, content, calls = rebuilt(events)
        assert (reasoning, content) == (whole.reasoning, whole.content)
        assert [(c.name, c.arguments) for c in calls] == [(c.name, c.arguments) for c in whole.tool_calls]
    return whole


PIECES = ["a", "Zo", "é", "你", "😀", " ", "\n", "\n\n", "<", "</", "<th", "<｜", "｜", "<|im", "`", "\n```",
          "```json", '"', "\\", "{", "}", ">", "=", "parameter", "invoke", "<｜end▁of", "<｜tool", "User:", "\t",
          "\n<", "think>"]  # fmt: skip
SPECIAL = (
    EOS,
    "<think>",
    "</think>",
    D,
    "<｜tool▁",
    "<|EOT|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<answer>",
    "</answer>",
)
plain = (
    st.lists(st.sampled_from(PIECES), max_size=12)
    .map("".join)
    .filter(lambda text: not any(special in text for special in SPECIAL))
)
sizes = st.lists(st.integers(1, 9), min_size=1, max_size=4)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-99, 99) | st.floats(-1e6, 1e6) | plain,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(plain, inner, max_size=3),
    max_leaves=5,
)
keys = st.sampled_from(["a", "b c", "é", "x_1", "path", "q>r", "<"])
calls = st.lists(
    st.tuples(
        st.sampled_from(["f", "get_weather", "名前", "a.b-c"]), st.dictionaries(keys, values, max_size=3)
    ),
    max_size=3,
)


def clean(name: str, reasoning: str, content: str) -> tuple[str, str]:
    """Texts without what would be read as the format's own layout at their edges."""
    if name in ("r1", "r1-0528"):
        reasoning, content = reasoning.strip("\n"), content.lstrip("\n")
    if name == "r1-zero":
        reasoning = reasoning.strip()
    if name == "coder":
        content = content.rstrip("\n")
    return reasoning, content


@pytest.mark.parametrize(("name", "thinking"), MODES)
@settings(max_examples=40)
@given(reasoning=plain, content=plain, made=calls, sizes=sizes)
def test_an_encoded_answer_reads_back_whole_however_it_is_split(
    name: str,
    thinking: bool,
    reasoning: str,
    content: str,
    made: list[tuple[str, dict[str, Any]]],
    sizes: list[int],
) -> None:
    encoding = get_encoding(name)
    reasoning, content = clean(name, reasoning if thinking else "", content)
    if name in ("r1", "r1-0528") and not reasoning:
        reasoning = "hm"  # without any, these write no tags and the two halves cannot be told apart
    message: dict[str, Any] = {"role": "assistant", "content": content}
    if thinking:
        message["reasoning_content"] = reasoning
    if encoding.supports_tools and made and not (name == "v31" and thinking):
        message["tool_calls"] = [
            {
                "id": f"call_{n}",
                "type": "function",
                "function": {"name": f, "arguments": json.dumps(arguments)},
            }
            for n, (f, arguments) in enumerate(made)
        ]
    user = {"role": "user", "content": "q"}
    prompt = encoding.encode([user], thinking=thinking)
    whole = encoding.encode([user, message], thinking=thinking, drop_thinking=False)
    if name == "v31" and thinking and not reasoning:
        return  # past turns without reasoning are written in the other mode
    assert whole.startswith(prompt)
    parsed = agree(name, thinking, whole[len(prompt) :], sizes)
    assert (parsed.problem, parsed.truncated, parsed.unparsed) == (None, False, "")
    assert parsed.content == content
    assert parsed.reasoning == (reasoning if thinking else "")
    expected = message.get("tool_calls", [])
    assert [(c.name, c.complete) for c in parsed.tool_calls] == [
        (c["function"]["name"], True) for c in expected
    ]
    for call, source in zip(parsed.tool_calls, expected, strict=True):
        back, sent = json.loads(call.arguments), json.loads(source["function"]["arguments"])
        assert back == sent
        assert list(back) == list(sent)
    back_again = parsed.message()
    assert encoding.encode([user, back_again], thinking=thinking, drop_thinking=False) == whole
    strictly = encoding.parser(thinking=thinking, strict=True)
    assert read(strictly, whole[len(prompt) :])[1] == parsed


MARKUP = [
    "<think>", "</think>", "\n</think>\n\n", EOS, "<|EOT|>", "<|im_end|>", "<answer>", "</answer>", "```json\n",
    "\n```", "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>",
    "<｜tool▁sep｜>", "<｜tool▁outputs▁begin｜>", f"\n\n<{D}tool_calls>\n", f"\n\n<{D}function_calls>\n", f"</{D}tool_calls>",
    f"</{D}function_calls>", f'<{D}invoke name="f">\n', f'<{D}parameter name="k" string="true">',
    f'<{D}parameter name="j" string="false">', f'<{D}parameter name="l">', f"<{D}parameter",
    f"</{D}parameter>\n",
    f"</{D}invoke>\n", f"<{D}", f"</{D}", f"<{D}invoke", "function<｜tool▁sep｜>g\n```json\n", "{}", "1",
]  # fmt: skip
soup = st.lists(
    st.sampled_from(MARKUP) | st.sampled_from(PIECES) | st.integers(0, 9).map("word{}".format), max_size=16
)


@pytest.mark.parametrize(("name", "thinking"), MODES)
@settings(max_examples=100)
@given(parts=soup, sizes=sizes)
def test_any_soup_reads_the_same_however_it_is_split_and_loses_no_word(
    name: str, thinking: bool, parts: list[str], sizes: list[int]
) -> None:
    parsed = agree(name, thinking, "".join(parts), sizes)
    kept = " ".join(
        [
            parsed.reasoning,
            parsed.content,
            parsed.unparsed,
            *(c.name + " " + c.arguments for c in parsed.tool_calls),
        ]
    )
    for part in parts:
        if part.startswith("word"):
            assert part in kept
    if parsed.unparsed or parsed.truncated:
        assert parsed.problem
    if get_encoding(name).name in ("v4", "v32"):
        assert f"<{D}" not in parsed.content + parsed.reasoning
    elif get_encoding(name).supports_tools:
        assert "<｜tool▁" not in parsed.content + parsed.reasoning


def v4_call(*parameters: str, name: str = "f") -> str:
    lines = [
        f"<{D}tool_calls>",
        f'<{D}invoke name="{name}">',
        *parameters,
        f"</{D}invoke>",
        f"</{D}tool_calls>",
    ]
    return "\n\n" + "\n".join(lines)


def text_parameter(key: str, value: str) -> str:
    return f'<{D}parameter name="{key}" string="true">{value}</{D}parameter>'


def json_parameter(key: str, value: str) -> str:
    return f'<{D}parameter name="{key}" string="false">{value}</{D}parameter>'


def v4(text: str, *, thinking: bool = False, strict: bool = False) -> Parsed:
    return read(get_encoding("v4").parser(thinking=thinking, strict=strict), text)[1]


def test_arguments_arrive_while_they_are_written() -> None:
    parser = get_encoding("v4").parser(thinking=False)
    assert parser.feed("Sure.") == [ContentDelta("Sure.")]
    assert parser.feed("\n\n<") == []
    assert parser.feed(f'{D}tool_calls>\n<{D}invoke name="f">\n') == [CallBegin(0, "f")]
    assert parser.feed(f'<{D}parameter name="k" string="true">one ') == [
        CallDelta(0, '{"k": '),
        CallDelta(0, '"'),
        CallDelta(0, "one "),
    ]
    assert parser.feed('"two"') == [CallDelta(0, '\\"two\\"')]
    assert parser.feed(f"</{D}parameter>\n</{D}invoke>") == [CallDelta(0, '"'), CallDelta(0, "}"), CallEnd(0)]
    assert parser.finish().tool_calls[0].arguments == '{"k": "one \\"two\\""}'


def test_v4_keeps_parameter_order_and_json_as_written() -> None:
    parsed = v4(
        "c" + v4_call(json_parameter("z", "[1,2]"), text_parameter("a", "x\ny"), json_parameter("m", "2.0"))
    )
    assert parsed.content == "c"
    assert parsed.tool_calls[0].arguments == '{"z": [1,2], "a": "x\\ny", "m": 2.0}'


def test_newlines_before_a_block_beyond_the_blank_line_are_content() -> None:
    assert v4("c\n" + v4_call()).content == "c\n"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("content without end", "unfinished"),
        ("a <think> b" + EOS, "special token"),
        ("a </think> b" + EOS, "special token"),
        (f"a {D} b" + EOS, "special token"),
        ("c" + v4_call(text_parameter("k", "1"), text_parameter("k", "2")) + EOS, "twice"),
        ("c" + v4_call() + "later" + EOS, "after the tool calls"),
        ("c" + v4_call() + "\n" + EOS, "layout"),
        ("c" + v4_call()[1:] + EOS, "blank line"),
        ("c" + v4_call().replace('name="f"', "name=f") + EOS, "no readable name"),
        (
            "c" + v4_call(text_parameter("k", "v")).replace(f"</{D}parameter>\n", f"</{D}parameter>") + EOS,
            "layout",
        ),
        ("c" + v4_call(f'<{D}parameter name="k">v</{D}parameter>') + EOS, "no readable name"),
        ("c" + v4_call(json_parameter("k", "[1")) + EOS, "not JSON"),
        ("c" + v4_call()[: -len(f"</{D}tool_calls>")], "ended inside"),
        ("done" + EOS + "more", "after the end"),
    ],
)
def test_strict_v4_refuses_what_the_official_parser_refuses(text: str, reason: str) -> None:
    with pytest.raises(ToolCallError, match=reason):
        v4(text, strict=True)
    with pytest.raises(ToolCallError, match=reason):
        read(get_encoding("v4").parser(thinking=False, strict=True), text, [1])
    v4(text)  # lenient: nothing raised


def test_strict_v4_wants_the_reasoning_closed() -> None:
    with pytest.raises(ToolCallError):
        v4("thoughts" + v4_call() + EOS, thinking=True, strict=True)
    with pytest.raises(ToolCallError):
        v4("thoughts" + EOS, thinking=True, strict=True)
    assert v4("thoughts</think>c" + EOS, thinking=True, strict=True) == Parsed("thoughts", "c")


def test_a_call_cut_off_inside_a_value() -> None:
    whole = "c" + v4_call(text_parameter("k", "value"), json_parameter("n", "[1, 2]"))
    parsed = v4(whole[: whole.index("alue")])
    assert parsed.truncated
    assert parsed.problem == "the text ended inside the tool calls"
    assert parsed.tool_calls == (ToolCall("f", '{"k": "v', complete=False),)
    parsed = v4(whole[: whole.index(", 2]")])
    assert parsed.tool_calls == (ToolCall("f", '{"k": "value", "n": [1', complete=False),)


def test_every_truncation_of_a_call_is_reported_and_none_raises() -> None:
    whole = "Hi" + v4_call(text_parameter("k", "value"), json_parameter("n", "[1, 2]"))
    begun = whole.index(D) + len(D)
    for end in range(begun, len(whole)):
        parsed = v4(whole[:end])
        assert parsed.truncated and parsed.problem, whole[:end]
        assert parsed.content == "Hi"
    assert v4(whole).problem is None


def test_what_is_wrong_with_a_call_is_reported_and_kept() -> None:
    parsed = v4(v4_call(json_parameter("k", "[1"), text_parameter("k", "again"), text_parameter("ok", "yes")))
    call = parsed.tool_calls[0]
    assert json.loads(call.arguments) == {"k": "[1", "ok": "yes"}
    assert not call.complete
    assert "again" in parsed.unparsed
    assert parsed.problem is not None and "not JSON" in parsed.problem and "twice" in parsed.problem


def test_a_call_without_its_block_is_still_a_call() -> None:
    parsed = v4(f'Sure. <{D}invoke name="f">\n{text_parameter("k", "v")}\n</{D}invoke>')
    assert parsed.content == "Sure. "
    assert parsed.tool_calls[0].arguments == '{"k": "v"}'
    assert parsed.problem


def test_a_parameter_without_its_kind_is_json_or_text() -> None:
    parameters = (
        f'<{D}parameter name="{key}">{value}</{D}parameter>' for key, value in (("n", "3"), ("t", "x y"))
    )
    parsed = v4(v4_call(*parameters))
    assert json.loads(parsed.tool_calls[0].arguments) == {"n": 3, "t": "x y"}
    assert parsed.problem


def test_tool_calls_inside_the_reasoning_are_found() -> None:
    parsed = v4("thinking" + v4_call(), thinking=True)
    assert parsed.reasoning == "thinking"
    assert [call.name for call in parsed.tool_calls] == ["f"]
    assert parsed.problem == "the reasoning has no </think>"


def test_without_tools_markup_is_ordinary_text() -> None:
    text = "see" + v4_call()
    assert read(get_encoding("v4").parser(thinking=False, tools=False), text)[1].content == text


def test_reasoning_without_end_is_truncated() -> None:
    for name in ("v4", "v32", "v31", "r1"):
        parsed = read(get_encoding(name).parser(thinking=True), "so, first")[1]
        assert parsed == Parsed(
            "so, first", "", truncated=True, problem="the text ended inside the reasoning"
        )


def test_a_repeated_think_tag_is_dropped() -> None:
    assert read(get_encoding("r1").parser(), "<think>\nhm\n</think>\n\nyes" + EOS)[1].reasoning == "hm"
    assert v4("<think>hm</think>yes" + EOS, thinking=True).reasoning == "hm"


def test_r1_0528_may_answer_without_thinking() -> None:
    assert read(get_encoding("r1-0528").parser(), "yes" + EOS)[1] == Parsed("", "yes")
    assert read(get_encoding("r1-0528").parser(), "<think>\nhm\n</think>\n\nyes" + EOS)[1] == Parsed(
        "hm", "yes"
    )


def test_r1_zero_tags() -> None:
    text = " <think> hm </think>\n<answer> 42 </answer>"
    assert read(get_encoding("r1-zero").parser(), text)[1] == Parsed(" hm ", " 42 ")


def test_v3_calls_as_a_model_writes_them() -> None:
    text = (
        "Let me see.<｜tool▁calls▁begin｜>"
        '<｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{"a": 1}\n```'
        "<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>g\n```json\n{}\n```<｜tool▁call▁end｜>"
        "<｜tool▁calls▁end｜>" + EOS
    )
    parsed = read(get_encoding("roles").parser(), text, [3])[1]
    assert parsed == Parsed("", "Let me see.", (ToolCall("f", '{"a": 1}'), ToolCall("g", "{}")))


def test_v31_arguments_that_are_no_json_object_are_reported() -> None:
    begin, end = (
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>",
        "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    )
    parsed = read(get_encoding("v31").parser(), begin + '{"a": ' + end)[1]
    assert parsed.tool_calls == (ToolCall("f", '{"a": ', complete=False),)
    assert parsed.problem == "the arguments of a call are not a JSON object"
    with pytest.raises(ToolCallError):
        read(get_encoding("v31").parser(strict=True), begin + "[1]" + end)


@pytest.mark.parametrize("name", WITH_TOOLS)
def test_calls_do_not_wait_for_the_end(name: str) -> None:
    encoding = get_encoding(name)
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": "b"}'}}
    user = {"role": "user", "content": "q"}
    text = encoding.encode(
        [user, {"role": "assistant", "content": "", "tool_calls": [call]}],
        thinking=encoding.thinking == "always",
    )
    parser = encoding.parser(thinking=encoding.thinking == "always")
    text = text[text.index("<｜Assistant｜") + len("<｜Assistant｜>") :].removeprefix("</think>")
    events = [event for letter in text.removesuffix(EOS) for event in parser.feed(letter)]
    assert CallBegin(0, "f") in events and CallEnd(0) in events


def test_a_parser_continues_where_a_prefix_stopped() -> None:
    encoding = get_encoding("v4")
    answer = {"role": "assistant", "content": "The answer", "prefix": True}
    assert read(encoding.parser(prefix=answer), " is 4." + EOS)[1] == Parsed("", " is 4.")
    thought = {"role": "assistant", "content": "", "reasoning_content": "So", "prefix": True}
    assert read(encoding.parser(prefix=thought), "\nnow</think>4" + EOS)[1] == Parsed("\nnow", "4")


def test_a_finished_parser_takes_no_more() -> None:
    parser = get_encoding("roles").parser()
    parser.feed("a")
    assert parser.finish() == parser.finish() == Parsed("", "a")
    with pytest.raises(RuntimeError, match="new parser"):
        parser.feed("b")


def test_parsers_refuse_what_the_generation_has_not() -> None:
    with pytest.raises(EncodingError, match="no tools"):
        get_encoding("coder").parser(tools=True)
    with pytest.raises(EncodingError, match="no thinking"):
        get_encoding("roles").parser(thinking=True)
    with pytest.raises(EncodingError, match="always thinks"):
        get_encoding("r1").parser(thinking=False)


def test_long_answers_take_linear_time() -> None:
    """A call with a long text value, letter by letter; reading it again for each would take minutes."""
    body = "x < y \n" * 8_000
    parsed = read(
        get_encoding("v4").parser(thinking=False), "c" + v4_call(text_parameter("k", body)) + EOS, [1]
    )[1]
    assert json.loads(parsed.tool_calls[0].arguments) == {"k": body}
