"""Reads what a model writes, as it is written: reasoning, then content, then tool calls.

`StreamParser` takes text in pieces of any size and gives the same result as for the whole text at once. It
holds back only what could still turn out to be the start of a marker. Which markers there are is data
(`Grammar`); how the generations spell their calls is in `rorqual.text.marked` and `rorqual.text.dsml`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from rorqual.text.buffer import Buffer
from rorqual.text.messages import ToolCall
from rorqual.text.tokens import BOS, END_THINK, EOS, THINK

LIMIT = 1024  # characters of a tag or a call's header


class ToolCallError(ValueError):
    """In strict mode: the text breaks the generation's output format."""


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """More reasoning text."""

    text: str


@dataclass(frozen=True, slots=True)
class ContentDelta:
    """More answer text."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegin:
    """A tool call starts: its place in the list (from 0) and the function's name."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class CallDelta:
    """More of the call's arguments, as JSON text."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class CallEnd:
    """The call is finished; its deltas together are its arguments."""

    index: int


Event = ReasoningDelta | ContentDelta | CallBegin | CallDelta | CallEnd


@dataclass(frozen=True, slots=True)
class Parsed:
    """An assistant turn taken apart.

    `truncated`: the text ended inside the reasoning or inside a call. `problem`: what was wrong with it, or
    None. `unparsed`: the text that fitted nowhere, so that nothing is lost. `events`: what `finish` itself
    released, to be sent on after the events of `feed`.
    """

    reasoning: str
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    truncated: bool = False
    problem: str | None = None
    unparsed: str = ""
    events: tuple[Event, ...] = field(default=(), compare=False)

    def message(self) -> dict[str, Any]:
        """The turn as an OpenAI-shaped message; calls get the ids call_0, call_1, …"""
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = [
                {
                    "id": call.id or f"call_{index}",
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for index, call in enumerate(self.tool_calls)
            ]
        return message


class CallReader:
    """How one generation spells tool calls. One reader serves one parse and works on its parser's buffer.

    A reader sets markup aside that has no end within LIMIT characters: what a parser holds is bounded.

    starts: texts that end the content. A start may begin with newlines; they are layout and are dropped.
    """

    starts: tuple[str, ...] = ()

    def __init__(self, parser: "StreamParser") -> None:
        self.parser = parser

    def begin(self, layout: str) -> None:
        """The buffer now begins with markup; `layout` is the run of newlines dropped before it."""

    def step(self) -> bool:
        """Read on. False when more text is needed, or at the end of the text when all of it is read."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Grammar:
    """The output format of a generation.

    stops: texts that end the turn. lead: template text before the answer, dropped once. tail: template text
    before a stop. think_gap: after `<think>`; think_end: before and after `</think>` — layout, dropped when
    there. wrappers: tags around the answer, dropped. reader: how calls are spelled. special: texts that a
    well-formed answer cannot contain (strict mode).
    """

    stops: tuple[str, ...] = (EOS,)
    lead: str = ""
    tail: str = ""
    think_gap: str = ""
    think_end: tuple[str, str] = ("", "")
    wrappers: tuple[str, ...] = ()
    reader: Callable[["StreamParser"], CallReader] | None = None
    special: tuple[str, ...] = (BOS, EOS, THINK, END_THINK)


class StreamParser:
    """Feed it the text a model generates; read the events; `finish` for the whole turn.

    grammar: the generation's format. start: "turn" (the template has just opened the assistant's turn),
    "reasoning" or "content" (the prompt ended inside one, as in prefix completion). thinking: the turn may
    have reasoning; opened: the prompt already wrote `<think>`. strict: raise ToolCallError where DeepSeek's
    own parser would (facts 4.5) instead of reporting a problem.
    """

    def __init__(
        self,
        grammar: Grammar,
        *,
        start: str = "turn",
        thinking: bool = False,
        opened: bool = False,
        tools: bool = False,
        strict: bool = False,
    ) -> None:
        self.grammar = grammar
        self.strict = strict
        self.buffer = Buffer()
        self.calls: list[ToolCall] = []
        self._thinking, self._opened = thinking, opened
        self._reader = grammar.reader(self) if tools and grammar.reader else None
        before, _ = grammar.think_end
        self._think_ends = (before + END_THINK, END_THINK) if before else (END_THINK,)
        tailed = tuple(grammar.tail + stop for stop in grammar.stops) if grammar.tail else ()
        self._endings = (*tailed, *grammar.stops, *(self._reader.starts if self._reader else ()))
        """The texts that end reasoning or content."""
        self._state = {"turn": self._turn, "reasoning": self._reasoning, "content": self._content}[start]
        self._places = {
            self._turn: "opening",
            self._opening: "opening",
            self._gap: "reasoning",
            self._reasoning: "reasoning",
            self._after_reasoning: "content",
            self._content: "content",
            self._done: "end",
        }
        self._events: list[Event] = []
        self._reasoning_text: list[str] = []
        self._content_text: list[str] = []
        self._arguments: list[str] = []
        self._unparsed: list[str] = []
        self._blanks: list[str] = []  # whitespace that may be layout
        self._problems: list[str] = []
        self._truncated = False
        self._stopped = False
        self._result: Parsed | None = None

    @property
    def inside(self) -> str:
        """Where reading stands: "opening", "reasoning", "content", "calls" or "end"."""
        return self._places.get(self._state, "calls")

    @property
    def unread(self) -> int:
        """Characters held back: they may yet turn out to begin a marker."""
        return len(self.buffer)

    def feed(self, text: str) -> list[Event]:
        """Take more text; the events it completes. ValueError for what is not text."""
        if not isinstance(text, str):
            raise ValueError(f"feed takes text, found a {type(text).__name__}")
        if self._result is not None:
            raise RuntimeError("feed after finish: make a new parser for the next turn")
        self.buffer.add(text)
        return self._run()

    def finish(self) -> Parsed:
        """The text has ended: release what was held back and give the whole turn."""
        if self._result is None:
            self.buffer.final = True
            events = tuple(self._run())
            self._keep_arguments()
            self._check_end()
            self._result = Parsed(
                reasoning="".join(self._reasoning_text),
                content="".join(self._content_text),
                tool_calls=tuple(self.calls),
                truncated=self._truncated,
                problem="; ".join(dict.fromkeys(self._problems)) or None,
                unparsed="".join(self._unparsed),
                events=events,
            )
        return self._result

    def _run(self) -> list[Event]:
        while self._state():
            pass
        self.buffer.drop()
        events, self._events = self._events, []
        return events

    # ---- states: each returns False when it needs more text, or at the end when nothing is left

    def _turn(self) -> bool:
        """Right after the template: its lead, an opening `<think>`."""
        if self.grammar.lead and not self.buffer.skip(self.grammar.lead):
            return False
        self._state = self._opening if self._thinking else self._content
        return True

    def _opening(self) -> bool:
        """`<think>`, which the model may have to write itself. After a prompt that did, it is dropped."""
        self._blanks.append(self.buffer.blanks())
        if self.buffer.starts(THINK):
            if self._opened:
                self.fault("the model repeated <think>")
            self.buffer.take(len(THINK))
            self._blanks = []
            self._state = self._gap
        elif self.buffer.may_become(THINK):
            return False
        else:
            self.buffer.unread("".join(self._blanks))
            self._blanks = []
            self._state = self._reasoning if self._opened else self._content
        return True

    def _gap(self) -> bool:
        """Layout after `<think>`."""
        if self.grammar.think_gap and not self.buffer.skip(self.grammar.think_gap):
            return False
        self._state = self._reasoning
        return True

    def _reasoning(self) -> bool:
        ends = self._think_ends
        text, marker = self.buffer.until(*ends, *self._endings)
        if text:
            self._reasoning_text.append(text)
            self._events.append(ReasoningDelta(text))
        if marker is None:
            if self.buffer.final:
                self._truncated = True
                self.fault("the text ended inside the reasoning")
            return False
        if marker in ends:
            self._state = self._after_reasoning
            return True
        self.fault("the reasoning has no </think>")
        self._truncated |= marker in self.grammar.stops
        return self._ended_by(marker)

    def _after_reasoning(self) -> bool:
        """Layout after `</think>`; with wrapping tags, any whitespace up to the first."""
        _, after = self.grammar.think_end
        if self.grammar.wrappers:
            self.buffer.blanks()
            if not self.buffer and not self.buffer.final:
                return False
        elif after and not self.buffer.skip(after):
            return False
        self._state = self._content
        return True

    def _content(self) -> bool:
        text, marker = self.buffer.until(*self.grammar.wrappers, *self._endings)
        if text:
            self._content_text.append(text)
            self._events.append(ContentDelta(text))
        if marker is None or marker in self.grammar.wrappers:
            return marker is not None
        return self._ended_by(marker)

    def _done(self) -> bool:
        """After a stop: only whitespace may follow (templates put a newline there)."""
        text = self.buffer.take(len(self.buffer))
        said = text.rstrip()
        if said:
            self.fault("there is text after the end of the turn", "".join(self._blanks) + said)
            self._blanks = []
        self._blanks.append(text[len(said) :])
        return False

    def _ended_by(self, marker: str) -> bool:
        """Go where a marker of `_endings` leads; True, since there is more to do."""
        if self._reader and marker in self._reader.starts:
            markup = marker.lstrip("\n")
            self.buffer.unread(markup)
            self._state = self._reader.step
            self._reader.begin(marker.removesuffix(markup))
        else:
            self.stop()
        return True

    def _check_end(self) -> None:
        """Strict mode's last demands: an end token (optional after calls), no special token in the text."""
        if not self.strict:
            return
        if not self._stopped and not self.calls:
            raise ToolCallError("the turn is unfinished: it ended without its end token")
        for special in self.grammar.special:
            if special in "".join(self._reasoning_text) or special in "".join(self._content_text):
                raise ToolCallError(f"the special token {special!r} stands inside the text")

    # ---- what states and call readers share

    def fault(self, problem: str, unparsed: str = "") -> None:
        """Report a break of the format, keeping the text concerned; in strict mode raise ToolCallError."""
        if self.strict:
            raise ToolCallError(f"{problem}: {unparsed!r}" if unparsed else problem)
        self._problems.append(problem)
        self._unparsed.append(unparsed)

    def stop(self) -> None:
        """An end token was read."""
        self._stopped = True
        self._state = self._done

    def resume_content(self) -> None:
        """What looked like calls was not: go on with the answer."""
        self._state = self._content

    def cut_off(self, unparsed: str = "") -> None:
        """The text ended inside the tool calls, perhaps with part of a tag."""
        self._truncated = True
        self.fault("the text ended inside the tool calls", unparsed)

    def call_begin(self, name: str) -> None:
        """A call starts. It counts as incomplete until `call_end`."""
        self.calls.append(ToolCall(name, "", complete=False))
        self._arguments = []
        self._events.append(CallBegin(len(self.calls) - 1, name))

    def call_text(self, text: str) -> None:
        """More of the arguments of the open call."""
        if text:
            self._arguments.append(text)
            self._events.append(CallDelta(len(self.calls) - 1, text))

    def call_end(self, *, complete: bool = True) -> None:
        """The open call is closed; not `complete` when some of it could not be read."""
        self._keep_arguments()
        self.calls[-1] = replace(self.calls[-1], complete=complete)
        self._events.append(CallEnd(len(self.calls) - 1))

    @property
    def arguments(self) -> str:
        """The arguments of the open call so far."""
        return "".join(self._arguments)

    def _keep_arguments(self) -> None:
        """Move the collected arguments into the last call."""
        if self._arguments:
            self.calls[-1] = replace(self.calls[-1], arguments=self.calls[-1].arguments + self.arguments)
            self._arguments = []
