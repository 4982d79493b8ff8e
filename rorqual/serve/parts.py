"""Tokens to parts: what an answer is made of, whatever API asked for it.

This is the only place where a model's tokens become something a client sees. A `Reader` is fed the engine's deltas and
gives parts: reasoning, content, tool calls, and one `End`. Each API writes parts in its own way and never looks at text
for markers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from rorqual.engine import Completion, Delta, Look
from rorqual.text import (
    CallBegin,
    CallDelta,
    CallEnd,
    ContentDelta,
    Event,
    Parsed,
    ReasoningDelta,
    StreamParser,
    ToolCall,
)

if TYPE_CHECKING:
    from rorqual.serve.inside import Watcher


@dataclass(frozen=True, slots=True)
class TokenInfo:
    """A token with its log-probability, the likeliest alternatives as (id, log-probability), and its place in the
    answer."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    place: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class Reasoning:
    """More reasoning. `tokens`: those that brought it, where log-probabilities were asked for."""

    text: str
    tokens: tuple[TokenInfo, ...] = ()


@dataclass(frozen=True, slots=True)
class Content:
    """More of the answer."""

    text: str
    tokens: tuple[TokenInfo, ...] = ()


@dataclass(frozen=True, slots=True)
class CallStart:
    """A tool call begins: its place in the list, an id of its own, the function's name."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of a call's arguments, as JSON text."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class CallStop:
    """A call is over; its arguments are whole."""

    index: int


@dataclass(frozen=True, slots=True)
class Glimpse:
    """Tokens as seen from inside, for who asked: each with the part that its letters went to ("reasoning", "content",
    "call" or "markup"). `count`: tokens of the answer so far."""

    tokens: tuple[tuple[TokenInfo, str, Look], ...]
    count: int


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens: of the prompt, of those found in the prefix cache, of the answer, of those in its reasoning."""

    prompt: int = 0
    cached: int = 0
    completion: int = 0
    reasoning: int = 0

    def __add__(self, other: Usage) -> Usage:
        """The usage of two answers to the same prompt."""
        return Usage(
            max(self.prompt, other.prompt),
            max(self.cached, other.cached),
            self.completion + other.completion,
            self.reasoning + other.reasoning,
        )


@dataclass(frozen=True, slots=True)
class End:
    """The answer is over.

    finish: "stop", "length" or "tool_calls", the last only if every call is whole. stop: the stop string that ended
    it. problem: what broke the model's output format, and `unparsed`, the text that fitted nowhere: markup of a broken
    call is never shown as content, and never lost.
    """

    finish: str
    usage: Usage = Usage()
    stop: str | None = None
    problem: str | None = None
    unparsed: str = ""


Part = Reasoning | Content | CallStart | CallArguments | CallStop | Glimpse | End


class Stops:
    """Finds stop strings in text that comes in pieces; holds back what could still become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = tuple(stops)
        self.found: str | None = None
        self._held = ""

    def feed(self, text: str) -> str:
        """The text that is certain to come before any stop string. Sets `found` at the first."""
        if not self.stops:
            return text
        text, self._held = self._held + text, ""
        places = [(at, -len(stop), stop) for stop in self.stops if (at := text.find(stop)) >= 0]
        if places:
            at, _, self.found = min(places)
            return text[:at]
        keep = max(_overlap(text, stop) for stop in self.stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """No more text will follow here: what was held back."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)


@dataclass(slots=True)
class _Spoken:
    """Tokens whose text begins at a place in the text of the content, or of the reasoning."""

    start: int
    tokens: list[TokenInfo]


class _Channel:
    """One of the two texts of an answer, and the tokens that bring it."""

    def __init__(self, name: str, watcher: Watcher | None) -> None:
        self.name, self.watcher = name, watcher
        self.sent = 0
        self.read = 0
        self._waiting: list[_Spoken] = []

    def note(self, start: int, tokens: list[TokenInfo]) -> None:
        """These tokens' text begins at this place."""
        self._waiting.append(_Spoken(start, tokens))

    def take(self, text: str, *, last: bool = False) -> tuple[TokenInfo, ...]:
        """The tokens that go out with more text: those that begin in it, and at the end all that are left."""
        self.sent += len(text)
        ready = [s for s in self._waiting if last or s.start < self.sent]
        self._waiting = [s for s in self._waiting if not last and s.start >= self.sent]
        tokens = tuple(token for spoken in ready for token in spoken.tokens)
        if self.watcher is not None:
            self.watcher.settled(tokens, self.name)
        return tokens


class Reader:
    """Reads one answer.

    parser: the generation's, or None for text without a form. stops: strings that end the answer where they stand in
    its content; reasoning and calls may hold them. new_id: makes ids of calls. logprobs: give the tokens with the text.
    one_call: the answer ends with its first call. watcher: is told of tokens and where their letters went; `glimpse` is
    then what has come to be known.
    Once `stopped` is set the rest of the answer isn't wanted: the caller cancels it, and feeds no more.
    """

    def __init__(
        self,
        parser: StreamParser | None,
        *,
        stops: Sequence[str] = (),
        new_id: Callable[[int], str] = "call_{}".format,
        logprobs: bool = False,
        one_call: bool = False,
        watcher: Watcher | None = None,
    ) -> None:
        self.parser, self.new_id, self.one_call, self.watcher = parser, new_id, one_call, watcher
        self.calls: list[ToolCall] = []
        self.parsed: Parsed | None = None
        self.stopped = False
        self.ids: list[int] = []
        self.reasoning_tokens = 0
        self._stops = Stops(stops)
        self._logprobs = logprobs
        self._content, self._reasoning = _Channel("content", watcher), _Channel("reasoning", watcher)
        self._silent: list[TokenInfo] = []  # tokens without text of their own: parts of a character
        self._text = ""  # what the parser has not read yet
        self._starts: list[tuple[int, list[TokenInfo]]] = []  # tokens by where they begin in `_text`

    # ---------------------------------------------------------------------------------------- in

    def feed(self, delta: Delta, info: TokenInfo | None = None) -> list[Part]:
        """One token; the parts that it completes."""
        if self.stopped:
            return []
        self.ids.append(delta.id)
        before = self.parser.inside if self.parser else "content"
        events = self.parser.feed(delta.text) if self.parser else _plain(delta.text)
        if "reasoning" in (before, self.parser.inside if self.parser else before):
            self.reasoning_tokens += 1
        if self.watcher is not None and info is not None:
            self.watcher.came(info, delta.inside)
        if self._logprobs:
            self._attribute(delta.text, info, events)
        return list(self._parts(events))

    def glimpse(self, *, last: bool = False) -> list[Part]:
        """What has become known of tokens as seen from inside, and at the end all that is left of them."""
        tokens = self.watcher.known(last=last) if self.watcher is not None else ()
        return [Glimpse(tokens, len(self.ids))] if tokens else []

    def end(self, done: Completion, cached: int) -> list[Part]:
        """The answer is over, by its end token, its length or a stop string: what was held back, and `End`."""
        parts: list[Part] = []
        if self.parser is None:
            self.parsed = Parsed("", "")
        else:
            self.parsed = self.parser.finish()
            if not self.stopped:
                if self._logprobs:
                    self._attribute("", None, self.parsed.events, last=True)
                parts += self._parts(self.parsed.events)
        if not self.stopped:
            parts += self._loose()
            parts += self._left()
        parts += self.glimpse(last=True)
        usage = Usage(done.prompt_tokens, cached, len(self.ids), self.reasoning_tokens)
        if self.stopped:
            found = self._stops.found
            return [*parts, End("tool_calls" if found is None else "stop", usage, found)]
        whole = bool(self.parsed.tool_calls) and all(call.complete for call in self.parsed.tool_calls)
        finish = "length" if done.finish_reason == "length" else "tool_calls" if whole else "stop"
        return [*parts, End(finish, usage, None, self.parsed.problem, self.parsed.unparsed)]

    # --------------------------------------------------------------------------------------- out

    def _parts(self, events: Sequence[Event]) -> Iterator[Part]:
        for event in events:
            if self.stopped:
                return
            match event:
                case ReasoningDelta(text):
                    yield Reasoning(text, self._reasoning.take(text))
                case ContentDelta(text):
                    text = self._stops.feed(text)
                    self.stopped = self._stops.found is not None
                    tokens = self._content.take(text)
                    if text or tokens:
                        yield Content(text, tokens)
                case CallBegin(index, name):
                    yield from self._loose()
                    self.calls.append(ToolCall(name, "", self.new_id(index)))
                    yield CallStart(index, self.calls[-1].id or "", name)
                case CallDelta(index, text):
                    call = self.calls[index]
                    self.calls[index] = replace(call, arguments=call.arguments + text)
                    yield CallArguments(index, text)
                case CallEnd(index):
                    self.stopped = self.one_call and self._whole(index)
                    yield CallStop(index)

    def _whole(self, index: int) -> bool:
        """Whether a call that has ended can be made."""
        return self.parser is not None and self.parser.calls[index].complete

    def _loose(self) -> Iterator[Part]:
        """What the stop strings held back, now that none can come."""
        text = self._stops.flush()
        if text:
            yield Content(text, self._content.take(text))

    def _left(self) -> Iterator[Part]:
        """Tokens whose text never came."""
        for channel, kind in ((self._reasoning, Reasoning), (self._content, Content)):
            tokens = channel.take("", last=True)
            if tokens:
                yield kind("", tokens)

    # --------------------------------------------------------------------- which text a token brought

    def _attribute(
        self, text: str, info: TokenInfo | None, events: Sequence[Event], *, last: bool = False
    ) -> None:
        """Give tokens to the texts that their letters went to. What the parser read last stands in `_text` up to
        what it holds back; the events' texts stand there in order, between markup that belongs to neither."""
        if info is not None:
            self._silent.append(info)
        if text and self._silent:
            self._starts.append((len(self._text), self._silent))
            self._silent = []
        self._text += text
        read = (
            len(self._text) if last or self.parser is None else max(0, len(self._text) - self.parser.unread)
        )
        spans: list[tuple[int, int, _Channel | None, int]] = []
        at = 0
        for event in events:
            if isinstance(event, ReasoningDelta | ContentDelta):
                channel = self._reasoning if isinstance(event, ReasoningDelta) else self._content
                begin = max(self._text.find(event.text, at), at)
                at = begin + len(event.text)
                spans.append((begin, at, channel, channel.read))
                channel.read += len(event.text)
            elif self.watcher is not None and (letters := self.watcher.letters(event, self._text)):
                begin = self._text.find(letters, at)
                if begin >= 0:
                    at = begin + len(letters)
                    spans.append((begin, at, None, 0))
        if self.watcher is not None and not last and self._in_calls(events):
            read = min(read, at)  # what these tokens are will be seen when their call says more
        kept: list[tuple[int, list[TokenInfo]]] = []
        if not self._starts:
            self._text = self._text[read:]
            return
        ends = [start for start, _ in self._starts[1:]] + [len(self._text)]
        for (start, tokens), stop in zip(self._starts, ends, strict=True):
            if start >= read and not last:
                kept.append((start - read, tokens))
                continue
            span = next((s for s in spans if s[0] < stop and start < s[1]), None)
            if span is not None and span[2] is not None:
                span[2].note(span[3] + max(start - span[0], 0), tokens)
            elif span is None and stop > read and not last:  # partly unread: what it becomes is not known yet
                kept.append((0, tokens))
            elif self.watcher is not None:
                self.watcher.settled(tokens, "markup" if span is None else "call")
        self._starts = kept
        self._text = self._text[read:]

    def _in_calls(self, events: Sequence[Event]) -> bool:
        """Whether reading stands among calls and nothing new was said of any."""
        told = any(isinstance(event, CallBegin | CallDelta | CallEnd) for event in events)
        return not told and self.parser is not None and self.parser.inside == "calls"


def _plain(text: str) -> list[Event]:
    return [ContentDelta(text)] if text else []
