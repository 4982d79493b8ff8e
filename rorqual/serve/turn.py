"""A whole answer put together from its parts, for bodies that aren't streamed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from rorqual.serve.parts import (
    CallArguments,
    CallStart,
    Content,
    End,
    Part,
    Reasoning,
    TokenInfo,
    Usage,
)
from rorqual.text import ToolCall


@dataclass
class Turn:
    """One choice: its texts, calls (each with its id), tokens where log-probabilities were asked for, and its end."""

    reasoning: str = ""
    content: str = ""
    calls: list[ToolCall] = field(default_factory=list)
    reasoning_tokens: list[TokenInfo] = field(default_factory=list)
    content_tokens: list[TokenInfo] = field(default_factory=list)
    end: End | None = None

    def add(self, part: Part) -> None:
        """One more part."""
        match part:
            case Reasoning(text, tokens):
                self.reasoning += text
                self.reasoning_tokens += tokens
            case Content(text, tokens):
                self.content += text
                self.content_tokens += tokens
            case CallStart(_, call_id, name):
                self.calls.append(ToolCall(name, "", call_id))
            case CallArguments(index, text):
                call = self.calls[index]
                self.calls[index] = replace(call, arguments=call.arguments + text)
            case End():
                self.end = part

    def parts(self) -> Iterator[Part]:
        """The texts and calls, each in one piece, without the end."""
        if self.reasoning:
            yield Reasoning(self.reasoning)
        if self.content:
            yield Content(self.content)
        for index, call in enumerate(self.calls):
            yield CallStart(index, call.id or "", call.name)
            yield CallArguments(index, call.arguments)

    @property
    def finish(self) -> str:
        """The finish reason."""
        return self.end.finish if self.end is not None else "stop"


def usage_of(turns: Iterable[Turn]) -> Usage:
    """What all choices took together; the prompt counts once."""
    total = Usage()
    for turn in turns:
        if turn.end is not None:
            total = total + turn.end.usage
    return total
