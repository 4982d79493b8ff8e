"""Every generation's text, written out by hand from facts section 4, and what each refuses."""

from dataclasses import replace
from typing import Any

import pytest

from rorqual.text import ENCODINGS, EncodingError, get_encoding

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
U, A = "<｜User｜>", "<｜Assistant｜>"
D = "｜DSML｜"
SYSTEM = {"role": "system", "content": "Be brief."}
CHAT = [
    SYSTEM,
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "Bye"},
]
TOOL = {
    "type": "function",
    "function": {"name": "f", "description": "does é", "parameters": {"type": "object", "properties": {}}},
}


def called(*calls: tuple[str, str], content: str | None = "Wait.", **more: Any) -> dict[str, Any]:
    return {
        "role": "assistant",
        "content": content,
        "tool_calls": [
            {"id": f"c{n}", "type": "function", "function": {"name": name, "arguments": arguments}}
            for n, (name, arguments) in enumerate(calls)
        ],
        **more,
    }


def result(number: int, text: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": f"c{number}", "content": text}


USING_TOOLS = [
    {"role": "user", "content": "Go"},
    called(("f", '{"a": 1}'), ("g", "{}")),
    result(0, "one"),
    result(1, "two"),
]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("user-assistant", f"{BOS}Be brief.\n\nUser: Hi\n\nAssistant: Hello!{EOS}User: Bye\n\nAssistant:"),
        ("coder", f"{BOS}Be brief.### Instruction:\nHi\n### Response:\nHello!\n<|EOT|>\n"
                  "### Instruction:\nBye\n### Response:\n"),
        ("roles", f"{BOS}Be brief.{U}Hi{A}Hello!{EOS}{U}Bye{A}"),
        ("r1", f"{BOS}Be brief.{U}Hi{A}Hello!{EOS}{U}Bye{A}<think>\n"),
        ("r1-0528", f"{BOS}Be brief.{U}Hi{A}Hello!{EOS}{U}Bye{A}"),
        ("v31", f"{BOS}Be brief.{U}Hi{A}</think>Hello!{EOS}{U}Bye{A}</think>"),
        ("v32", f"{BOS}Be brief.{U}Hi{A}</think>Hello!{EOS}{U}Bye{A}</think>"),
        ("v4", f"{BOS}Be brief.{U}Hi{A}</think>Hello!{EOS}{U}Bye{A}<think>"),
        ("chatml", "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
                   "<|im_start|>assistant\nHello!<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n"
                   "<|im_start|>assistant\n"),
    ],
)  # fmt: skip
def test_a_conversation(name: str, expected: str) -> None:
    encoding = get_encoding(name)
    assert encoding.encode(CHAT) == expected
    assert encoding.encode(CHAT[:3], add_generation_prompt=True) == encoding.encode(
        CHAT[:3], add_generation_prompt=False
    )


@pytest.mark.parametrize("name", ["user-assistant", "coder", "roles", "r1", "r1-0528", "v31", "chatml"])
def test_prompts_grow_by_appending(name: str) -> None:
    """A conversation is the start of the same one continued: caches live on it."""
    encoding = get_encoding(name)
    for end in range(1, len(CHAT)):
        assert encoding.encode(CHAT).startswith(encoding.encode(CHAT[:end], add_generation_prompt=False))


def test_coder_writes_its_own_system_sentence() -> None:
    written = get_encoding("coder").encode([{"role": "user", "content": "sort"}])
    assert written.startswith(
        BOS + "You are an AI programming assistant, utilizing the Deepseek Coder model, "
    )
    assert written.endswith("questions, you will refuse to answer\n### Instruction:\nsort\n### Response:\n")


def test_r1_zero() -> None:
    messages: list[dict[str, Any]] = [{"role": "user", "content": "What is 1+1?"}]
    encoding = get_encoding("r1-zero")
    prompt = encoding.encode(messages)
    assert prompt.startswith(
        BOS + "A conversation between User and Assistant. The user asks a question, and the Assistant"
    )
    assert prompt.endswith("<answer> answer here </answer>. User: What is 1+1?. Assistant:")
    messages.append({"role": "assistant", "content": "2", "reasoning_content": "hm"})
    assert encoding.encode(messages) == prompt + " <think>hm</think> <answer>2</answer>" + EOS
    for wrong in (CHAT[1:], messages[1:]):
        with pytest.raises(EncodingError, match="one user message"):
            encoding.encode(wrong)


def test_chatml_default_system() -> None:
    asked = [{"role": "user", "content": "Hi"}]
    own = replace(get_encoding("chatml"), default_system="You are S.")
    assert own.encode(asked) == (
        "<|im_start|>system\nYou are S.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert own.encode([SYSTEM, *asked]) == get_encoding("chatml").encode([SYSTEM, *asked])


@pytest.mark.parametrize("name", ["roles", "r1", "r1-0528", "v31"])
def test_system_messages_are_joined_in_front(name: str) -> None:
    messages = [SYSTEM, {"role": "user", "content": "Hi"}, {"role": "system", "content": "Be kind."}]
    assert (
        get_encoding(name).encode(messages, add_generation_prompt=False) == f"{BOS}Be brief.\n\nBe kind.{U}Hi"
    )


@pytest.mark.parametrize("name", ["roles", "r1-0528"])
def test_v3_tool_calls(name: str) -> None:
    encoding = get_encoding(name)
    turn = (
        f"{BOS}{U}Go{A}Wait.<｜tool▁calls▁begin｜>"
        '<｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{"a": 1}\n```'
        "<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>g\n```json\n{}\n```<｜tool▁call▁end｜>"
        f"<｜tool▁calls▁end｜>{EOS}"
    )
    results = (
        "<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>one<｜tool▁output▁end｜>\n"
        "<｜tool▁output▁begin｜>two<｜tool▁output▁end｜><｜tool▁outputs▁end｜>"
    )
    assert encoding.encode(USING_TOOLS) == turn + results
    done = [*USING_TOOLS, {"role": "assistant", "content": "Done."}, {"role": "user", "content": "Thanks"}]
    assert encoding.encode(done) == f"{turn}{results}Done.{EOS}{U}Thanks{A}"


def test_v31_tool_calls() -> None:
    encoding = get_encoding("v31")
    written = (
        f"{BOS}{U}Go{A}</think>Wait.<｜tool▁calls▁begin｜>"
        '<｜tool▁call▁begin｜>f<｜tool▁sep｜>{"a": 1}<｜tool▁call▁end｜>'
        f"<｜tool▁call▁begin｜>g<｜tool▁sep｜>{{}}<｜tool▁call▁end｜><｜tool▁calls▁end｜>{EOS}"
        "<｜tool▁output▁begin｜>one<｜tool▁output▁end｜><｜tool▁output▁begin｜>two<｜tool▁output▁end｜>"
    )
    assert encoding.encode(USING_TOOLS) == written
    done = [*USING_TOOLS, {"role": "assistant", "content": "Done."}, {"role": "user", "content": "Why?"}]
    assert encoding.encode(done, thinking=True) == f"{written}Done.{EOS}{U}Why?{A}<think>"
    with pytest.raises(EncodingError, match="thinking=False"):
        encoding.encode(USING_TOOLS, thinking=True)


def test_v31_tools_section() -> None:
    written = get_encoding("v31").encode([SYSTEM, {"role": "user", "content": "Hi"}], tools=[TOOL])
    assert written == (
        f"{BOS}Be brief.\n\n## Tools\nYou have access to the following tools:\n\n"
        "### f\nDescription: does é\n\n"
        'Parameters: {"type": "object", "properties": {}}\n\n'
        "IMPORTANT: ALWAYS adhere to this exact format for tool use:\n"
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>tool_call_name<｜tool▁sep｜>tool_call_arguments<｜tool▁call▁end｜>"
        "{{additional_tool_calls}}<｜tool▁calls▁end｜>\n\nWhere:\n\n"
        "- `tool_call_name` must be an exact match to one of the available tools\n"
        "- `tool_call_arguments` must be valid JSON that strictly follows the tool's Parameters Schema\n"
        f"- For multiple tool calls, chain them directly without separators or spaces\n{U}Hi{A}</think>"
    )


def test_v3_tools_section() -> None:
    written = get_encoding("roles").encode([SYSTEM, {"role": "user", "content": "Hi"}], tools=[TOOL])
    head, _, rest = written.partition("```json\n")
    assert (
        head == f"{BOS}Be brief.\n\n## Tools\n\n### Function\n\n"
        "You have the following functions available:\n\n- `f`:\n"
    )
    assert rest.endswith(f"\n```{U}Hi{A}")


THOUGHT = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello!", "reasoning_content": "greet"},
    {"role": "user", "content": "Bye"},
]


def test_reasoning_of_past_turns_is_dropped_and_can_be_kept() -> None:
    r1, v31, v32 = (get_encoding(name) for name in ("r1", "v31", "v32"))
    assert r1.encode(THOUGHT) == f"{BOS}{U}Hi{A}Hello!{EOS}{U}Bye{A}<think>\n"
    assert r1.encode(THOUGHT, drop_thinking=False) == (
        f"{BOS}{U}Hi{A}<think>\ngreet\n</think>\n\nHello!{EOS}{U}Bye{A}<think>\n"
    )
    for encoding in (v31, v32):
        assert encoding.encode(THOUGHT, thinking=True) == f"{BOS}{U}Hi{A}</think>Hello!{EOS}{U}Bye{A}<think>"
        kept = encoding.encode(THOUGHT, thinking=True, drop_thinking=False)
        assert kept == f"{BOS}{U}Hi{A}<think>greet</think>Hello!{EOS}{U}Bye{A}<think>"


@pytest.mark.parametrize("name", ["r1", "r1-0528"])
def test_r1_history_keeps_only_what_follows_the_think_tag(name: str) -> None:
    inline = [THOUGHT[0], {"role": "assistant", "content": "<think>\ngreet\n</think>\n\nHello!"}, THOUGHT[2]]
    assert get_encoding(name).encode(inline).startswith(f"{BOS}{U}Hi{A}\n\nHello!{EOS}{U}Bye{A}")
    kept = get_encoding(name).encode(inline, drop_thinking=False)
    assert kept == get_encoding(name).encode(THOUGHT, drop_thinking=False)


def test_v32_tool_calls() -> None:
    encoding = get_encoding("v32")
    messages = [
        USING_TOOLS[0],
        called(("f", '{"a": 1, "b": "x"}'), ("g", "{}"), reasoning_content="think"),
        *USING_TOOLS[2:],
    ]
    before = f"{BOS}{U}Go{A}<think>think</think>Wait.\n\n"
    block = (
        f'<{D}function_calls>\n<{D}invoke name="f">\n<{D}parameter name="a" string="false">1</{D}parameter>\n'
        f'<{D}parameter name="b" string="true">x</{D}parameter>\n</{D}invoke>\n'
        f'<{D}invoke name="g">\n\n</{D}invoke>\n'
        f"</{D}function_calls>{EOS}"
    )
    results = "\n\n<function_results>\n<result>one</result>\n<result>two</result>\n</function_results>\n\n"
    assert encoding.encode(messages, thinking=True) == before + block + results + "<think>"
    chat = before.replace("<think>think", "") + block + results + "</think>"
    assert encoding.encode(messages, thinking=False) == chat
    answered = [*messages, {"role": "assistant", "content": "Done.", "reasoning_content": "so"}]
    assert (
        encoding.encode(answered, thinking=True) == before + block + results + f"<think>so</think>Done.{EOS}"
    )
    more = [*answered, {"role": "user", "content": "Why?"}]
    assert encoding.encode(more, thinking=True) == chat + f"Done.{EOS}{U}Why?{A}<think>"


def test_v32_tools_section_and_developer() -> None:
    encoding = get_encoding("v32")
    written = encoding.encode([SYSTEM, {"role": "user", "content": "Hi"}], tools=[TOOL])
    assert written.startswith(
        f"{BOS}Be brief.\n\n## Tools\n\n"
        "You have access to a set of tools you can use to answer the user's question.\n"
        f'You can invoke functions by writing a "<{D}function_calls>" block like the following as part of '
        f'your reply to the user:\n<{D}function_calls>\n<{D}invoke name="$FUNCTION_NAME">\n'
    )
    schema = '{"name": "f", "description": "does é", "parameters": {"type": "object", "properties": {}}}'
    assert written.endswith(
        "<think>...thinking about results</think>\n\nHere are the functions available in JSONSchema format:\n"
        f"<functions>\n{schema}\n</functions>\n{U}Hi{A}</think>"
    )
    developer = [{"role": "developer", "content": "Hi", "response_format": {"type": "object"}}]
    assert encoding.encode(developer) == (
        f"{BOS}{U}\n\n## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"
        f'{{"type": "object"}}\n\n# The user\'s message is: Hi{A}</think>'
    )


@pytest.mark.parametrize(
    ("name", "content", "reasoning", "end"),
    [
        ("user-assistant", "So", "", "User: q\n\nAssistant: So"),
        ("user-assistant", "", "", "User: q\n\nAssistant:"),
        ("coder", "So", "", "### Response:\nSo"),
        ("chatml", "So", "", "<|im_start|>assistant\nSo"),
        ("roles", "```python\n", "", f"{U}q{A}```python\n"),
        ("r1", "So", "", f"{U}q{A}So"),
        ("r1", "", "hm", f"{U}q{A}<think>\nhm"),
        ("r1", "So", "hm", f"{U}q{A}<think>\nhm\n</think>\n\nSo"),
        ("r1", "", "", f"{U}q{A}<think>\n"),
        ("r1-0528", "", "", f"{U}q{A}"),
        ("r1-zero", "So", "hm", "User: q. Assistant: <think>hm</think> <answer>So"),
        ("r1-zero", "", "hm", "User: q. Assistant: <think>hm"),
        ("v31", "So", "hm", f"{U}q{A}<think>hm</think>So"),
        ("v31", "", "hm", f"{U}q{A}<think>hm"),
        ("v31", "So", "", f"{U}q{A}</think>So"),
        ("v32", "So", "hm", f"{U}q{A}<think>hm</think>So"),
        ("v32", "", "hm", f"{U}q{A}<think>hm"),
        ("v4", "So", "", f"{U}q{A}<think></think>So"),
    ],
)
def test_prefix_completion_leaves_the_turn_open(name: str, content: str, reasoning: str, end: str) -> None:
    message = {"role": "assistant", "content": content, "prefix": True, "reasoning_content": reasoning}
    encoding = get_encoding(name)
    written = encoding.encode(
        [{"role": "user", "content": "q"}, message], thinking=encoding.supports_thinking
    )
    assert written.endswith(end)


def test_prefix_in_chat_mode() -> None:
    for name in ("v31", "v32", "v4"):
        messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "So", "prefix": True}]
        assert get_encoding(name).encode(messages, thinking=False) == f"{BOS}{U}q{A}</think>So"


@pytest.mark.parametrize(
    ("name", "options", "message", "reason"),
    [
        ("user-assistant", {"tools": [TOOL]}, {}, "has no tools"),
        ("r1", {"tools": [TOOL]}, {}, "has no tools"),
        ("v31", {"tools": [TOOL], "thinking": True}, {}, "no tools with thinking"),
        ("roles", {"thinking": True}, {}, "has no thinking"),
        ("r1", {"thinking": False}, {}, "always thinks"),
        ("v32", {"effort": "max"}, {}, "leave it out"),
        ("roles", {"response_format": {}}, {}, "has no response_format"),
        ("v4", {"response_format": "json"}, {}, "give a JSON schema"),
        ("v4", {"tools": {"name": "f"}}, {}, "must be a list"),
        ("v4", {"tools": [{"name": "f"}]}, {}, r"tools\[0\] has no function"),
        ("v31", {}, {"role": "developer", "content": "x"}, "role 'developer' is not known to encoding 'v31'"),
        ("chatml", {}, {"role": "latest_reminder", "content": "x"}, "is not known"),
        (
            "roles",
            {},
            {"role": "assistant", "content": "x", "reasoning_content": "y"},
            "has no reasoning_content",
        ),
        ("coder", {}, called(("f", "{}")), "has no tool_calls"),
        ("v31", {}, {"role": "user", "content": "x", "task": "title"}, "has no task"),
        ("v31", {}, {**SYSTEM, "tools": [TOOL]}, "has no tools"),
        ("roles", {}, {"role": "user", "content": [{"type": "image_url"}]}, "takes text parts only"),
    ],
)
def test_a_feature_the_generation_has_not_is_an_error(
    name: str, options: dict[str, Any], message: dict[str, Any], reason: str
) -> None:
    messages = [{"role": "user", "content": "q"}, *([message] if message else [])]
    with pytest.raises(EncodingError, match=reason):
        get_encoding(name).encode(messages, **options)


OK = {"role": "user", "content": "q"}


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "messages is empty"),
        ("hello", "messages is a str; it must be a list"),
        ([OK, "hello"], "message 1 is a str; it must be an object"),
        ([OK, {"content": "x"}], "message 1: role is None; use one of system, user"),
        ([{"role": "boss", "content": "x"}], "message 0: role is 'boss'"),
        ([{"role": "user"}], "message 0: content is nothing; give a string"),
        ([{"role": "user", "content": 3}], "message 0: content is a int; it must be a string or a list"),
        ([{"role": "user", "content": ["x"]}], r"message 0: content\[0\] is a str"),
        ([{"role": "user", "content": [{"type": "text"}]}], r"content\[0\].text is nothing"),
        ([OK, {"role": "assistant", "content": None}], "message 1: content is nothing"),
        (
            [OK, {"role": "assistant", "content": "x", "tool_calls": {}}],
            "message 1: tool_calls is a dict; it must be a list",
        ),
        ([OK, {"role": "assistant", "tool_calls": [{"id": "1"}]}], r"tool_calls\[0\].function is nothing"),
        (
            [OK, {"role": "assistant", "tool_calls": [{"function": {"name": ""}}]}],
            "name is a str; it must be a non-empty",
        ),
        (
            [OK, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": 1}}]}],
            "arguments is a int",
        ),
        (
            [OK, {"role": "assistant", "content": "x", "reasoning_content": 1}],
            "reasoning_content is a int; it must be a string",
        ),
        ([{**OK, "prefix": True}], "prefix is present; a message of role user cannot have it"),
        (
            [OK, {"role": "assistant", "content": "x", "prefix": True}, OK],
            "message 1: prefix is true; only the last",
        ),
        ([OK, {**called(("f", "{}")), "prefix": True}], "prefix message is unfinished"),
        (
            [OK, result(0, "r")],
            "message 1: role is 'tool'; it must follow an assistant message with tool_calls",
        ),
        ([OK, called(("f", "{}")), OK, result(0, "r")], "message 3: role is 'tool'; it must follow"),
        ([OK, called(("f", "{}")), result(0, "r"), result(0, "s")], "there are 2 results for 1 call"),
        (
            [OK, called(("f", "{}")), result(7, "r")],
            "message 2: tool_call_id is 'c7'; the calls before it are c0",
        ),
        ([{"role": "developer", "content": ""}], "message 0: content is empty text"),
    ],
)
def test_malformed_conversations_say_where_and_what(messages: Any, reason: str) -> None:
    with pytest.raises(EncodingError, match=reason):
        get_encoding("v4").encode(messages)


def test_the_caller_s_messages_are_left_alone() -> None:
    messages = [
        OK,
        called(("f", "{}")),
        result(0, "r"),
        {"role": "user", "content": [{"type": "text", "text": "x"}]},
    ]
    before = repr(messages)
    get_encoding("v4").encode(messages, tools=[TOOL])
    assert repr(messages) == before


def test_every_encoding_tells_what_it_has() -> None:
    assert {name: encoding.stops for name, encoding in ENCODINGS.items()} == {
        **dict.fromkeys(ENCODINGS, (EOS,)),
        "coder": ("<|EOT|>",),
        "chatml": ("<|im_end|>", "<|endoftext|>"),
    }
    assert [name for name, e in ENCODINGS.items() if e.supports_thinking] == [
        "r1",
        "r1-0528",
        "r1-zero",
        "v31",
        "v32",
        "v4",
    ]
    assert [name for name, e in ENCODINGS.items() if e.supports_tools] == [
        "roles",
        "r1-0528",
        "v31",
        "v32",
        "v4",
    ]
