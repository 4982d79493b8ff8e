"""Tokens to parts: whatever way a text is cut, its parts are the same; nothing leaks and nothing is lost."""

from __future__ import annotations

import random

import pytest

from rorqual.engine import Completion, Delta
from rorqual.serve.parts import CallStart, Content, End, Part, Reader, Reasoning, Stops, TokenInfo
from rorqual.serve.turn import Turn
from rorqual.text import get_encoding
from rorqual.text import tokens as t
from tests.serve.puppet import dsml

V31_CALLS = f'{t.CALLS_BEGIN}{t.CALL_BEGIN}f{t.SEP}{{"a": 1}}{t.CALL_END}{t.CALL_BEGIN}g{t.SEP}{{}}{t.CALL_END}{t.CALLS_END}'
V3_CALLS = f'{t.CALLS_BEGIN}{t.CALL_BEGIN}function{t.SEP}f\n```json\n{{"a": 1}}\n```{t.CALL_END}{t.CALLS_END}'
CALLS = dsml(("f", {"a": "false>1", "b": "true>x\ny"}), ("g", {}))
ANSWERS = {
    "v4": ["Hm.</think>Hello" + CALLS, "Hm</think>", "no end of thought", "a</think>b < c </thin", f"x</think><{t.DSML}"],
    "v32": ["Hm.</think>Hello" + CALLS.replace("tool_calls", "function_calls")],
    "v31": ["Hello" + V31_CALLS, "Hello" + V31_CALLS[:60], "Hello", f"a{t.CALL_END}b"],
    "roles": ["Hello" + V3_CALLS, V3_CALLS[:-30]],
    "r1": ["Hm.\n</think>\n\nHello\n"],
    "r1-0528": ["<think>\nHm.\n</think>\n\nHello" + V3_CALLS, "Hello"],
    "user-assistant": [" Hello <think>"],
    "chatml": ["Hello"],
}  # fmt: skip
CASES = [(name, text) for name, texts in ANSWERS.items() for text in texts]


def read(
    name: str, pieces: list[str], finish: str = "stop", **options: object
) -> tuple[Turn, list[Part], Reader]:
    encoding = get_encoding(name)
    thinking = True if name in ("v4", "v32") else None
    tools = encoding.supports_tools
    reader = Reader(encoding.parser(thinking=thinking, tools=tools), **options)  # type: ignore[arg-type]
    parts: list[Part] = []
    for n, piece in enumerate(pieces):
        parts += reader.feed(Delta(0, n, piece), TokenInfo(n, -0.25))
        if reader.stopped:
            break
    done = Completion(ids=list(range(len(pieces))), finish_reason=finish, prompt_tokens=3)
    parts += reader.end(done, 2)
    turn = Turn()
    for part in parts:
        turn.add(part)
    return turn, parts, reader


def cut(text: str, rng: random.Random) -> list[str]:
    places = sorted(rng.sample(range(len(text) + 1), rng.randint(0, min(12, len(text)))))
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]


@pytest.mark.parametrize(("name", "text"), CASES)
def test_cut_anywhere_it_reads_the_same(name: str, text: str) -> None:
    rng = random.Random(7)
    whole, _, _ = read(name, [text])
    for at in range(len(text)):
        turn, _, _ = read(name, [text[:at], text[at:]])
        assert _said(turn) == _said(whole), at
    for _ in range(20):
        turn, _, _ = read(name, cut(text, rng), logprobs=True)
        assert _said(turn) == _said(whole)


def _said(turn: Turn) -> object:
    assert turn.end is not None
    calls = [(call.name, call.arguments) for call in turn.calls]
    return turn.reasoning, turn.content, calls, turn.end.finish, turn.end.problem, turn.end.unparsed


@pytest.mark.parametrize(("name", "text"), CASES)
def test_no_markup_leaks_and_no_letter_is_lost(name: str, text: str) -> None:
    """Markup shows in `unparsed` or not at all; each word of the answer shows somewhere."""
    turn, _, _ = read(name, [text])
    shown = turn.reasoning + turn.content + "".join(call.name + call.arguments for call in turn.calls)
    if name not in ("user-assistant", "chatml"):
        assert not any(mark in shown for mark in (t.THINK, t.END_THINK, t.DSML, "<｜tool"))
    assert turn.end is not None
    for word in ("Hm", "Hello", "thought"):
        assert (word in text) == (word in shown + turn.end.unparsed)


@pytest.mark.parametrize(("name", "text"), CASES)
def test_tokens_stand_with_the_text_that_they_brought(name: str, text: str) -> None:
    """With a token a letter, those of a text spell it."""
    for stops in ((), ("l", "zz"), ("lo", "o " * 9)):
        turn, parts, _ = read(name, list(text), logprobs=True, stops=stops)
        for said, tokens in ((turn.reasoning, turn.reasoning_tokens), (turn.content, turn.content_tokens)):
            assert "".join(text[info.id] for info in tokens) == said
        assert all(p.text or p.tokens for p in parts if isinstance(p, Content | Reasoning))


def test_tokens_of_many_letters_are_given_once() -> None:
    rng = random.Random(3)
    for name, text in CASES:
        for _ in range(10):
            turn, _, _ = read(name, cut(text, rng), logprobs=True)
            ids = [info.id for info in (*turn.reasoning_tokens, *turn.content_tokens)]
            assert sorted(set(ids)) == ids


def test_finish_reasons() -> None:
    assert read("v4", ["x</think>Hello" + CALLS])[0].finish == "tool_calls"
    assert read("v4", ["x</think>Hello" + CALLS], "length")[0].finish == "length"
    assert read("v4", ["x</think>Hello" + CALLS[:100]])[0].finish == "stop"
    assert read("v4", ["x</think>Hello"])[0].finish == "stop"
    turn, _, _ = read("v4", ["x</think>Hel", "lo wor", "ld"], stops=["wo"])
    assert (turn.content, turn.end and turn.end.stop, turn.finish) == ("Hello ", "wo", "stop")


def test_one_call_is_enough() -> None:
    turn, parts, reader = read("v4", list("x</think>Hello" + CALLS), one_call=True)
    assert [call.name for call in turn.calls] == ["f"] and turn.finish == "tool_calls" and reader.stopped
    assert (
        turn.end is not None
        and turn.end.problem is None
        and sum(isinstance(p, CallStart) for p in parts) == 1
    )


def test_usage() -> None:
    turn, parts, _ = read("v4", ["<think>", "Hm", ".", "</think>", "Hello"])
    assert turn.end is not None
    assert turn.end.usage.reasoning == 4 and turn.end.usage.completion == 5
    assert (turn.end.usage.prompt, turn.end.usage.cached) == (3, 2)
    assert isinstance(parts[-1], End)


def test_stop_strings_in_every_cut() -> None:
    rng = random.Random(1)
    for _ in range(500):
        text = "".join(rng.choice("ab") for _ in range(rng.randint(0, 12)))
        stops = [
            "".join(rng.choice("ab") for _ in range(rng.randint(1, 4))) for _ in range(rng.randint(1, 3))
        ]
        places = [(text.find(stop), stop) for stop in stops if stop in text]
        finder, said = Stops(stops), ""
        for piece in cut(text, rng):
            said += finder.feed(piece)
            if finder.found:
                break
        said += "" if finder.found else finder.flush()
        # In pieces the first to be whole is found; it may begin a little after one that is longer.
        if places:
            assert (
                finder.found in stops
                and said == text[: len(said)]
                and text[len(said) :].startswith(finder.found)
            )
            assert len(said) >= min(places)[0]
        else:
            assert finder.found is None and said == text
