"""What the model wrote, kept so that it goes back into a context token for token.

A client sends an answer back as text. Encoding that text anew may give other tokens than the model wrote: another split
of the same letters, or, for tool calls, another layout of the same arguments. The model would then read a conversation
it did not have, and the engine would find less of it in its prefix cache. So answers are kept by what a client sees of
them, and put back where the same comes again. Answers with calls are known by the ids of their calls, which nobody
else can guess: they also give back reasoning that a client left out.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rorqual.text import Emitted, Encoding, Parsed, Tokenizer, ToolCall
from rorqual.text.tokens import END_THINK


@dataclass(frozen=True, slots=True)
class Turn:
    """An answer as it was: its tokens, and its reasoning as text."""

    emitted: Emitted
    reasoning: str

    @property
    def size(self) -> int:
        """Tokens it takes to keep."""
        return 16 + len(self.emitted.answer) + len(self.emitted.reasoning or ())


class Memory:
    """The last answers, up to so many tokens in all. Safe to share between threads."""

    def __init__(self, tokens: int) -> None:
        self._most, self._size = tokens, 0
        self._turns: OrderedDict[bytes, Turn] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._turns)

    def keep(
        self,
        ids: Sequence[int],
        parsed: Parsed,
        calls: Sequence[ToolCall],
        encoding: Encoding,
        tokenizer: Tokenizer,
    ) -> None:
        """Note an answer: its tokens without the end token, what they were read as, the calls with their ids."""
        emitted = split(ids, parsed, encoding, tokenizer)
        if emitted is None:
            return
        turn = Turn(emitted, parsed.reasoning)
        with self._lock:
            key = _key(parsed.content, [(call.id, call.name, call.arguments) for call in calls])
            self._forget(key)
            self._turns[key] = turn
            self._size += turn.size
            while self._size > self._most:
                self._forget(next(iter(self._turns)))

    def _forget(self, key: bytes) -> None:
        turn = self._turns.pop(key, None)
        self._size -= turn.size if turn is not None else 0

    def recall(
        self, messages: Sequence[Mapping[str, Any]]
    ) -> tuple[list[Mapping[str, Any]], dict[int, Emitted]]:
        """The messages, with reasoning given back to answers that called tools, and the tokens of those known."""
        told, known = list(messages), {}
        for index, message in enumerate(messages):
            turn = self._find(message)
            if turn is None:
                continue
            said = message.get("reasoning_content")
            if not said and message.get("tool_calls") and turn.reasoning:
                told[index] = {**message, "reasoning_content": turn.reasoning}
                said = turn.reasoning
            same = said == turn.reasoning
            known[index] = turn.emitted if same else Emitted(turn.emitted.answer)
        return told, known

    def _find(self, message: object) -> Turn | None:
        if not isinstance(message, Mapping) or message.get("role") != "assistant" or message.get("prefix"):
            return None
        content, raw = message.get("content") or "", message.get("tool_calls") or ()
        if not isinstance(content, str) or not isinstance(raw, Sequence):
            return None
        try:
            calls = [(c["id"], c["function"]["name"], c["function"]["arguments"]) for c in raw]
        except (KeyError, TypeError):
            return None
        key = _key(content, calls)
        with self._lock:
            turn = self._turns.get(key)
            if turn is not None:
                self._turns.move_to_end(key)
        return turn


def split(ids: Sequence[int], parsed: Parsed, encoding: Encoding, tokenizer: Tokenizer) -> Emitted | None:
    """An answer's tokens as reasoning and the rest; None where they can't be told apart, or hold layout that
    the format does not write in a conversation."""
    if not encoding.supports_tools or parsed.truncated:
        return None
    answer, reasoning = list(ids), None
    mark = tokenizer.id_of(END_THINK)
    if parsed.reasoning or (mark is not None and mark in answer):
        if mark is None or answer.count(mark) != 1:
            return None
        at = answer.index(mark)
        answer, reasoning = answer[at + 1 :], answer[:at]
    before, after = encoding.grammar.think_end
    text = tokenizer.decode(answer)
    if (after and text.startswith(after)) or (not parsed.tool_calls and text != parsed.content):
        return None
    if reasoning is not None and (before or tokenizer.decode(reasoning) != parsed.reasoning):
        reasoning = None
    return Emitted(answer, reasoning)


def _key(content: str, calls: Sequence[tuple[Any, Any, Any]]) -> bytes:
    """What a client sees of an answer; arguments count as JSON, since some clients keep them as objects."""
    told = json.dumps([content, [(str(i), str(name), _arguments(args)) for i, name, args in calls]])
    return hashlib.sha256(told.encode()).digest()


def _arguments(text: Any) -> Any:
    try:
        return json.dumps(json.loads(text) if isinstance(text, str) else text, sort_keys=True)
    except (TypeError, ValueError, RecursionError):
        return str(text)
