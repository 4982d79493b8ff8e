"""Tool calls in marked tokens (facts 4.2, 4.3): V3's form, fenced JSON after a type, and V3.1's bare form."""

import json
import re
from collections.abc import Callable, Sequence

from rorqual.text.messages import ToolCall, is_json
from rorqual.text.parser import LIMIT, CallReader
from rorqual.text.tokens import CALL_BEGIN, CALL_END, CALLS_BEGIN, CALLS_END, SEP

_TOKEN = "<｜tool▁"  # how every token of this kind begins
_TOKEN_END = re.compile("[<>]")
_TYPE = "function"
_FENCE, _FENCE_END = "```json\n", "\n```"


def write_marked(calls: Sequence[ToolCall], mark: Callable[[str], str], *, fenced: bool) -> str:
    """The block of calls; "" for none. fenced: V2.5 to R1-0528 (type, name, ```json); else V3.1 (name,
    JSON). `mark` is applied to the caller's text."""
    if not calls:
        return ""
    head, gap, tail = (_TYPE + SEP, "\n" + _FENCE, _FENCE_END) if fenced else ("", SEP, "")
    written = [
        f"{CALL_BEGIN}{head}{mark(call.name)}{gap}{mark(call.arguments)}{tail}{CALL_END}" for call in calls
    ]
    return CALLS_BEGIN + ("\n" if fenced else "").join(written) + CALLS_END


class MarkedReader(CallReader):
    """Reads V3.1's form. The arguments are passed on as the model wrote them, piece by piece."""

    starts = (_TOKEN,)
    fence_ends: tuple[str, ...] = ()

    def begin(self, layout: str) -> None:
        self._read: Callable[[], bool] = self._between
        self._inside = False  # between the tokens that open and close the whole block
        self._pieces: list[str] = []  # the text read so far in the state at hand

    def step(self) -> bool:
        return self._read()

    def _said(self) -> str:
        """The text collected in the state at hand, which is over."""
        text, self._pieces = "".join(self._pieces), []
        return text

    def _to_token(self) -> str | None:
        """Collect text up to a whole token or stop, which is returned and stays in the buffer. A token without
        its end reaches up to the next `<`, or is as long as LIMIT."""
        buffer = self.parser.buffer
        text, marker = buffer.until(_TOKEN, *self.parser.grammar.stops)
        self._pieces.append(text)
        if marker is None:
            return None
        buffer.unread(marker)
        if marker != _TOKEN:
            return marker
        end = buffer.find(_TOKEN_END, len(_TOKEN), LIMIT)
        if end is None:
            return buffer.peek(LIMIT) if len(buffer) >= LIMIT else None
        return buffer.peek(buffer.place(end) + (end[0] == ">"))

    def _between(self) -> bool:
        """Before, between and after calls: only tokens, and whitespace, belong here."""
        parser = self.parser
        token = self._to_token()
        if token is None:
            if parser.buffer.final:
                self._loose_text()
                if self._inside or parser.buffer:
                    parser.cut_off(parser.buffer.take(len(parser.buffer)))
            return False
        self._loose_text()
        parser.buffer.take(len(token))
        if token in parser.grammar.stops:
            if self._inside:
                parser.cut_off()
            parser.stop()
        elif token == CALL_BEGIN:
            if not self._inside:
                parser.fault(f"a call without {CALLS_BEGIN}")
            self._inside, self._read = True, self._header
        elif token == CALLS_BEGIN and not self._inside:
            self._inside = True
        elif token == CALLS_END and self._inside:
            self._inside = False
        else:
            parser.fault("a tool token stands where none belongs", token)
            if not self._inside and not parser.calls:
                parser.resume_content()
        return True

    def _loose_text(self) -> None:
        text = self._said()
        if text.strip():
            self.parser.fault("there is text between or after the tool calls", text)

    def _header(self) -> bool:
        """Up to the separator: the name. Without one it is set aside, and the next token decides."""
        token = self._to_token()
        if token is None and not self.parser.buffer.final:
            return False
        if token == SEP:
            self.parser.buffer.take(len(SEP))
            self._named(self._said())
        else:
            self.parser.fault("a call has no name", CALL_BEGIN + self._said())
            self._read = self._between
        return True

    def _named(self, before_separator: str) -> None:
        self.parser.call_begin(before_separator)
        self._read = self._arguments

    def _arguments(self) -> bool:
        """The JSON text up to a token; the end of a fence right before it is layout."""
        parser = self.parser
        text, marker = parser.buffer.until(*self.fence_ends, _TOKEN, *parser.grammar.stops)
        parser.call_text(text)
        if marker is None:
            if parser.buffer.final:
                parser.cut_off()
            return False
        if marker in parser.grammar.stops:
            parser.cut_off()
            parser.stop()
        else:
            parser.buffer.unread(_TOKEN)
            self._read = self._closing
        return True

    def _closing(self) -> bool:
        """The token after the arguments should close the call; another is left for `_between`."""
        parser = self.parser
        token = self._to_token()
        if token is None and not parser.buffer.final:
            return False
        closed = token == CALL_END
        good = is_json(parser.arguments) and isinstance(json.loads(parser.arguments), dict)
        parser.call_end(complete=closed and good)
        if not good:
            parser.fault("the arguments of a call are not a JSON object")
        if closed:
            parser.buffer.take(len(CALL_END))
        else:
            parser.fault(f"a call has no {CALL_END}")
        self._read = self._between
        return True


class FencedReader(MarkedReader):
    """Reads V3's form: what stands before the separator is the type; the name and a fence follow."""

    fence_ends = (_FENCE_END + _TOKEN, _FENCE_END + "\n" + _TOKEN)

    def _named(self, before_separator: str) -> None:
        if before_separator != _TYPE:
            self.parser.fault(f"the type of a call is not {_TYPE!r}", before_separator)
        self._read = self._name_line

    def _name_line(self) -> bool:
        parser = self.parser
        text, marker = parser.buffer.until("\n", _TOKEN, *parser.grammar.stops)
        self._pieces.append(text)
        if marker is None and not parser.buffer.final:
            return False
        parser.call_begin(self._said().strip())
        self._read = self._fence
        if marker is not None and marker != "\n":
            parser.buffer.unread(marker)
        return True

    def _fence(self) -> bool:
        parser = self.parser
        if parser.buffer.starts(_FENCE):
            parser.buffer.take(len(_FENCE))
        elif parser.buffer.may_become(_FENCE):
            return False
        else:
            parser.fault("the arguments are not in a ```json block")
        self._read = self._arguments
        return True
