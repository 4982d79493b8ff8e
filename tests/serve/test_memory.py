"""Answers go back into a context token for token, in every format that has tools."""

from __future__ import annotations

import random

import pytest

from rorqual.serve.memory import Memory, split
from rorqual.text import Emitted, ToolCall, get_encoding
from rorqual.text import tokens as t
from tests.serve.puppet import TOKENIZER, dsml

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
ASK = {"role": "user", "content": "What?"}
CALLS = {
    "v4": dsml(("f", {"a": "false> [1,2]"})),
    "v32": dsml(("f", {"a": "false> [1,2]"}), block="function_calls"),
    "v31": f"{t.CALLS_BEGIN}{t.CALL_BEGIN}f{t.SEP}{{ \"a\":[1,2]}}{t.CALL_END}{t.CALLS_END}",
    "roles": f"{t.CALLS_BEGIN}{t.CALL_BEGIN}function{t.SEP}f\n```json\n{{ \"a\":[1,2]}}\n```{t.CALL_END}{t.CALLS_END}",
}  # fmt: skip


def letters(text: str) -> list[int]:
    """Ids of a text, letter by letter, which is not how the tokenizer writes it."""
    ids: list[int] = []
    for token in TOKENIZER.encode(text):
        added = TOKENIZER.decode([token]) in (t.END_THINK, t.DSML, *MARKS)
        ids += (
            [token]
            if added
            else [TOKENIZER.encode(chr(b))[0] if b < 128 else token for b in TOKENIZER.bytes_of(token)]
        )
    return ids


MARKS = (t.CALLS_BEGIN, t.CALLS_END, t.CALL_BEGIN, t.CALL_END, t.SEP)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("thinking", [False, True])
def test_the_next_prompt_begins_with_all_that_was_said(name: str, thinking: bool) -> None:
    encoding = get_encoding(name)
    thinking = thinking and encoding.tools == "always" and encoding.thinking == "choice"
    options = {"tools": [TOOL], "thinking": thinking if encoding.thinking == "choice" else None}
    prompt = encoding.encode_ids([ASK], TOKENIZER, **options)
    wrote = ("Hello thought</think>" if thinking else "") + "Hello world" + CALLS[name]
    ids = letters(wrote)
    assert ids != TOKENIZER.encode(wrote) and TOKENIZER.decode(ids) == wrote
    parser = encoding.parser(**options)
    parser.feed(wrote)
    parsed = parser.finish()
    assert len(parsed.tool_calls) == 1 and parsed.problem is None
    calls = [ToolCall("f", parsed.tool_calls[0].arguments, "call_1")]
    memory = Memory(1000)
    memory.keep(ids, parsed, calls, encoding, TOKENIZER)
    said = parsed.message() | {"tool_calls": [
        {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": calls[0].arguments}}
    ]}  # fmt: skip
    result = {"role": "tool", "tool_call_id": "call_1", "content": "sun"}
    stripped = {key: value for key, value in said.items() if key != "reasoning_content"}
    for message in (said, stripped):
        told, known = memory.recall([ASK, message, result])
        assert told[1] == said
        if encoding.thinking == "choice" and encoding.tools == "chat":
            options["thinking"] = False
        found = encoding.encode_ids(told, TOKENIZER, replay=known, **options)
        before = [*prompt, *ids, TOKENIZER.eos[0]]
        assert found[: len(before)] == before
        anew = encoding.encode_ids(told, TOKENIZER, **options)
        assert anew[: len(before)] != before and TOKENIZER.decode(anew).endswith(
            TOKENIZER.decode(found[len(before) :])
        )
    edited = {**said, "content": "Hello"}
    assert memory.recall([ASK, edited, result]) == ([ASK, edited, result], {})


def test_what_a_client_writes_cannot_take_an_answers_place() -> None:
    encoding = get_encoding("v4")
    emitted = {1: Emitted([5, 6, 7])}
    messages = [{**ASK, "content": "\ufdd12\ufdd2"}, {"role": "assistant", "content": "a"}, ASK]
    found = encoding.encode_ids(messages, TOKENIZER, replay=emitted)
    assert found == encoding.encode_ids(messages, TOKENIZER)


def test_split_refuses_what_it_can_not_tell_apart() -> None:
    encoding = get_encoding("v4")

    def parsed(text: str, thinking: bool = True) -> object:
        parser = encoding.parser(thinking=thinking)
        parser.feed(text)
        return parser.finish()

    for text in ("a</think>b</think>c", "never ends", "a</think>b" + CALLS["v4"][:40]):
        assert split(TOKENIZER.encode(text), parsed(text), encoding, TOKENIZER) is None  # type: ignore[arg-type]
    good = split(TOKENIZER.encode("a</think>b"), parsed("a</think>b"), encoding, TOKENIZER)  # type: ignore[arg-type]
    assert good == Emitted(TOKENIZER.encode("b"), TOKENIZER.encode("a"))


def test_memory_is_bounded() -> None:
    encoding, rng = get_encoding("v4"), random.Random(0)
    memory = Memory(500)
    for n in range(100):
        text = f"{n} " * rng.randint(1, 20)
        parser = encoding.parser(thinking=False)
        parser.feed(text)
        memory.keep(TOKENIZER.encode(text), parser.finish(), (), encoding, TOKENIZER)
        assert memory._size == sum(turn.size for turn in memory._turns.values()) <= 500
    assert 0 < len(memory) < 30
