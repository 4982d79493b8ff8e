"""V4 against DeepSeek's own outputs (tests/data/encoding) and encoder (the package deepseek_recipe)."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rorqual.text import EncodingError, get_encoding

DATA = Path(__file__).parent.parent / "data" / "encoding"
V4 = get_encoding("v4")
BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
D = "｜DSML｜"
TOOL = {"type": "function", "function": {"name": "f", "description": "dé", "parameters": {"type": "object"}}}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def call(number: int | str, name: str, arguments: str) -> dict[str, Any]:
    return {"id": str(number), "type": "function", "function": {"name": name, "arguments": arguments}}


def test_official_example_with_tools() -> None:
    source = json.loads((DATA / "v4_input_1.json").read_text())
    expected = (DATA / "v4_output_1.txt").read_text()
    assert V4.encode(source["messages"], tools=source["tools"], thinking=True) == expected
    system, *rest = source["messages"]
    assert V4.encode([{**system, "tools": source["tools"]}, *rest], thinking=True) == expected


def test_official_example_with_dropped_reasoning() -> None:
    messages = json.loads((DATA / "v4_input_2.json").read_text())
    assert V4.encode(messages, thinking=True) == (DATA / "v4_output_2.txt").read_text()


def test_official_answers_parse() -> None:
    text = (DATA / "v4_output_1.txt").read_text()
    first, second = (part.split(EOS)[0] + EOS for part in text.split("<think>")[-2:])
    parsed = [_parse(part) for part in (first, second)]
    assert parsed[0].tool_calls[0].name == "get_weather"
    assert parsed[0].tool_calls[0].arguments == '{"location": "Beijing", "unit": "celsius"}'
    assert parsed[0].reasoning.endswith("I should use the get_weather tool.")
    assert parsed[1].content.startswith("The weather in Beijing is currently sunny")
    assert [p.problem for p in parsed] == [None, None]


def _parse(text: str) -> Any:
    parser = V4.parser(strict=True)
    parser.feed(text)
    return parser.finish()


# ---- the package, where preview and package agree: chat mode, and thinking apart from the effort text

recipe = pytest.importorskip("deepseek_recipe")


def theirs(
    messages: list[dict[str, Any]], *, thinking: bool, tools: list[Any] | None = None, **more: Any
) -> str:
    """The prompt of DeepSeek's encoder. Effort "low" of the package is the preview's None."""
    body = {"model": "DeepSeek-V4-Pro", "messages": messages, **({"tools": tools} if tools else {}), **more}
    body["thinking"] = {"type": "enabled" if thinking else "disabled"}
    if thinking:
        body.setdefault("reasoning_effort", "low")
    converted = recipe.ChatCompletionRequest(body).convert(recipe.ConversionOptions())
    return str(recipe.DeepseekV4Encoding().render_conversation(converted.conversation).prompt)


text = st.text(st.sampled_from("ab é你😀\n<>\"'\\|{}"), max_size=8)
# Quarters only: Python and the package's Rust write other floats differently (1e-07, 1e-7).
scalars = st.none() | st.booleans() | st.integers(-9, 9) | st.integers(-9, 9).map(lambda n: n / 4) | text
json_values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=2), max_leaves=3)


@st.composite
def conversations(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Some system messages; rounds of user, calls with results in any order, and an answer; then a user.

    Call ids sort as the calls stand: the package puts calls in the order of their ids, the preview leaves them.
    """
    messages = [{"role": "system", "content": draw(text)} for _ in range(draw(st.integers(0, 2)))]
    number = 0
    for _ in range(draw(st.integers(0, 3))):
        messages.append(user(draw(text)))
        for _ in range(draw(st.integers(0, 2))):
            calls = []
            for _ in range(draw(st.integers(1, 3))):
                arguments = draw(
                    st.dictionaries(text.filter(lambda key: key and '"' not in key), json_values, max_size=2)
                )
                written = json.dumps(arguments, ensure_ascii=draw(st.booleans()))
                calls.append(call(f"{number:03}", draw(st.sampled_from("fgh")), written))
                number += 1
            messages.append(assistant(draw(text), reasoning_content=draw(text), tool_calls=calls))
            ids = draw(st.permutations([c["id"] for c in calls]))
            messages += [{"role": "tool", "tool_call_id": i, "content": draw(text)} for i in ids]
        if messages[-1]["role"] == "tool" and draw(st.booleans()):
            continue  # the user speaks right after the results
        messages.append(assistant(draw(text), reasoning_content=draw(text)))
    return [*messages, user(draw(text))]


@settings(max_examples=150)
@given(messages=conversations(), thinking=st.booleans(), with_tools=st.booleans())
def test_prompts_equal_deepseeks_encoder(
    messages: list[dict[str, Any]], thinking: bool, with_tools: bool
) -> None:
    tools = [TOOL, {**TOOL, "function": {**TOOL["function"], "name": "g"}}] if with_tools else None
    assert V4.encode(messages, tools=tools, thinking=thinking) == theirs(
        messages, thinking=thinking, tools=tools
    )


RESULT = {"role": "tool", "tool_call_id": "1", "content": "r"}


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize(
    "messages",
    [
        [user("q"), assistant("", tool_calls=[call(1, "f", "not json")]), RESULT],
        [user("q"), assistant("", tool_calls=[call(1, "f", "[1]")]), RESULT],
        [user("q"), assistant("a"), assistant("b"), user("r")],
        [user("q"), {"role": "system", "content": "late"}, user("r")],
        [{"role": "system", "content": "only"}],
        [{"role": "latest_reminder", "content": "today"}, user("q")],
        [user("q"), {"role": "latest_reminder", "content": "today"}, user("r")],
        [user("q"), assistant("so", prefix=True)],
        [user("q"), assistant("so", prefix=True, reasoning_content="hm")],
        [user("q"), assistant("", prefix=True, reasoning_content="hm")],
        [user("q"), assistant("", prefix=True)],
        [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
    ],
)  # fmt: skip
def test_corner_cases_equal_deepseeks_encoder(messages: list[dict[str, Any]], thinking: bool) -> None:
    assert V4.encode(messages, thinking=thinking) == theirs(messages, thinking=thinking)


def test_effort_and_response_format_equal_deepseeks_encoder() -> None:
    """The package's "high" is the preview's "max"."""
    messages = [{"role": "system", "content": "s"}, user("q")]
    assert V4.encode(messages, effort="max") == theirs(messages, thinking=True, reasoning_effort="high")
    plain = V4.encode(messages, thinking=False)
    assert V4.encode(messages, thinking=False, effort="max") == plain == theirs(messages, thinking=False)
    assert V4.encode(messages, effort="high") == V4.encode(messages)
    schema = {"type": "object", "properties": {"é": {"type": "string"}}}
    asked = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    ours = V4.encode(messages, thinking=False, tools=[TOOL], response_format=schema)
    assert ours == theirs(messages, thinking=False, tools=[TOOL], response_format=asked)


def their_parse(answer: str, sizes: list[int]) -> tuple[str, str, list[tuple[str, str]]]:
    """Reasoning, content and calls as DeepSeek's stream processor reads them."""
    conversation = recipe.Conversation([recipe.UserMessage("q")], thinking_mode=True)
    request = recipe.ConversationRequest(conversation, recipe.ModelVersion.DeepseekV4Pro)
    generator = recipe.ChatCompletionRequest.chunk_generator(request, "id", "model")
    stage = recipe.ThinkingInitialStage.ReasoningStart
    processor = recipe.StreamProcessor(generator, recipe.ParsingOptions(thinking_initial_stage=stage))
    chunks = list(processor.push(recipe.InferenceChunk.ready()))
    at = turn = 0
    while at < len(answer):
        size = sizes[turn % len(sizes)]
        chunks += processor.push(recipe.InferenceChunk.text(answer[at : at + size], 1))
        at, turn = at + size, turn + 1
    chunks += (
        processor.push(recipe.InferenceChunk.finish(recipe.InferenceFinishReason.Stop)) + processor.finish()
    )
    reasoning = content = ""
    calls: list[list[str]] = []
    for chunk in chunks:
        for choice in json.loads(chunk.to_json())["choices"]:
            delta = choice["delta"]
            reasoning += delta.get("reasoning_content") or ""
            content += delta.get("content") or ""
            for piece in delta.get("tool_calls") or []:
                calls += [["", ""]] * (piece["index"] + 1 - len(calls))
                name, arguments = calls[piece["index"]]
                function = piece["function"]
                calls[piece["index"]] = [
                    name + (function.get("name") or ""),
                    arguments + (function.get("arguments") or ""),
                ]
    return reasoning, content, [(name, arguments) for name, arguments in calls]


@settings(max_examples=50)
@given(
    reasoning=text.map(str.strip),
    content=text.map(lambda words: words.replace("<", "(").strip()),
    calls=st.lists(
        st.tuples(st.sampled_from("fgh"), st.dictionaries(st.sampled_from(["a", "é", "k_1"]), json_values)),
        max_size=3,
    ),
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=3),
)
def test_answers_read_as_deepseeks_stream_processor_reads_them(
    reasoning: str, content: str, calls: list[tuple[str, dict[str, Any]]], sizes: list[int]
) -> None:
    """Without what the package reads otherwise: newlines at the edges (trimmed), quotes in names (not escaped),
    spaces in names (cut there) and "<" right before calls (a newline too many), both in small pieces only."""
    made = [call(n, name, json.dumps(arguments)) for n, (name, arguments) in enumerate(calls)]
    message = assistant(content, reasoning_content=reasoning, tool_calls=made)
    answer = V4.encode([user("q"), message])[len(V4.encode([user("q")])) :].removesuffix(EOS)
    parser = V4.parser()
    parser.feed(answer)
    parsed = parser.finish()
    ours = (parsed.reasoning, parsed.content, [(c.name, c.arguments) for c in parsed.tool_calls])
    assert ours == their_parse(answer, sizes)


# ---- what the package has not: facts 4.5


def test_effort_stands_right_after_bos_and_only_when_thinking() -> None:
    assert V4.encode([user("q")], effort="max").startswith(
        BOS + "Reasoning Effort: Absolute maximum with no shortcuts"
    )
    for wrong in ("low", "medium", ""):
        with pytest.raises(EncodingError, match="use one of high, max"):
            V4.encode([user("q")], effort=wrong)


def test_developer_messages() -> None:
    messages = [{"role": "developer", "content": "do", "tools": [TOOL]}]
    written = V4.encode(messages, thinking=False)
    assert written.startswith(f"{BOS}{USER}do\n\n## Tools\n\n")
    assert written.endswith(f"to invoke tool calls.\n{ASSISTANT}</think>")
    schema = {"type": "object"}
    written = V4.encode([{"role": "developer", "content": "do", "response_format": schema}], thinking=False)
    assert written == (
        f"{BOS}{USER}do\n\n## Response Format:\n\n"
        "You MUST strictly adhere to the following schema to reply:\n"
        f'{{"type": "object"}}{ASSISTANT}</think>'
    )


def test_dropping_removes_earlier_developer_messages_and_reasoning() -> None:
    messages = [{"role": "developer", "content": "old"}, assistant("a", reasoning_content="r"), user("q")]
    dropped = f"{BOS}{ASSISTANT}</think>a{EOS}{USER}q{ASSISTANT}<think>"
    kept = f"{BOS}{USER}old{ASSISTANT}<think>r</think>a{EOS}{USER}q{ASSISTANT}<think>"
    assert V4.encode(messages, thinking=True) == dropped
    assert V4.encode(messages, thinking=True, drop_thinking=False) == kept
    assert V4.encode(messages, thinking=False) == kept.replace("<think>r", "").replace("<think>", "</think>")


def test_tools_anywhere_keep_all_reasoning() -> None:
    messages = [
        {"role": "system", "content": "s", "tools": [TOOL]},
        user("q"),
        assistant("a", reasoning_content="r"),
        user("q2"),
    ]
    assert f"{ASSISTANT}<think>r</think>a{EOS}" in V4.encode(messages, thinking=True)
    assert f"{ASSISTANT}</think>a{EOS}" in V4.encode(
        [{"role": "system", "content": "s"}, *messages[1:]], thinking=True
    )


def test_quick_tasks() -> None:
    asked = [{**user("q"), "task": "query"}]
    assert V4.encode(asked) == f"{BOS}{USER}q<｜query｜>"
    assert V4.encode([*asked, assistant("words")]) == f"{BOS}{USER}q<｜query｜>words{EOS}"
    asked = [{**user("q"), "task": "action"}]
    assert V4.encode(asked, thinking=False) == f"{BOS}{USER}q{ASSISTANT}</think><｜action｜>"
    assert V4.encode(asked, thinking=True) == f"{BOS}{USER}q{ASSISTANT}<think><｜action｜>"
    titled = [user("q"), assistant("a", task="title")]
    assert V4.encode(titled, thinking=False) == f"{BOS}{USER}q{ASSISTANT}</think>a{EOS}<｜title｜>"
    with pytest.raises(EncodingError, match="use one of action, query, authority, domain, title, read_url"):
        V4.encode([{**user("q"), "task": "dance"}])
    with pytest.raises(EncodingError, match="only its answer"):
        V4.encode([{**user("q"), "task": "title"}, user("again")])


def test_wo_eos_leaves_the_turn_open() -> None:
    assert V4.encode([user("q"), assistant("a", wo_eos=True)], thinking=False).endswith("</think>a")


def test_content_blocks_and_parts_that_are_not_text() -> None:
    parts = [{"type": "text", "text": "x"}, {"type": "image"}]
    blocks = [{"type": "tool_result", "tool_use_id": "2", "content": parts},
              {"type": "text", "text": "see"}, {"type": "image_url"},
              {"type": "tool_result", "tool_use_id": "1", "content": "y"}]  # fmt: skip
    messages = [user("q"), assistant("", tool_calls=[call(1, "f", "{}"), call(2, "f", "{}")])]
    written = V4.encode([*messages, {"role": "user", "content_blocks": blocks}], thinking=False)
    results = (
        "<tool_result>y</tool_result>\n\nsee\n\n[Unsupported image_url]\n\n"
        "<tool_result>x\n\n[Unsupported image]</tool_result>"
    )
    assert written.endswith(f"{EOS}{USER}{results}{ASSISTANT}</think>")


def test_no_generation_prompt() -> None:
    assert V4.encode([user("q")], add_generation_prompt=False) == f"{BOS}{USER}q"
    assert V4.encode([user("q"), assistant("a")], thinking=False).endswith("</think>a" + EOS)
