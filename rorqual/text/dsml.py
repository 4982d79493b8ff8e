"""Tool calls in DSML, the tag language of V3.2 and V4 (facts 4.4, 4.5)."""

import json
import re
from collections.abc import Callable, Sequence

from rorqual.text.messages import ToolCall, is_json, to_json
from rorqual.text.parser import CallReader, StreamParser
from rorqual.text.tokens import DSML

_OPEN, _SHUT = f"<{DSML}", f"</{DSML}"
_INVOKE, _INVOKE_END = f"{_OPEN}invoke", f"{_SHUT}invoke>"
_PARAMETER, _PARAMETER_END = f"{_OPEN}parameter", f"{_SHUT}parameter>"

# Headers as the official parsers want them, and as they are still read when not strict.
_INVOKE_FORMS = (rf'{_INVOKE}\s*name="(.*?)">', rf'{_INVOKE}\s+name="?([^">\n]*)"?\s*>')
_PARAMETER_FORMS = (
    rf'{_PARAMETER} name="(.*?)" string="(true|false)">',
    rf'{_PARAMETER}\s+name="([^">\n]*)"\s*(?:string="(true|false)"\s*)?>',
)


def write_dsml(calls: Sequence[ToolCall], block: str, *, blank_when_empty: bool) -> str:
    """A DSML block named `block`, with the blank line before it; "" for no call.

    blank_when_empty: a call without parameters has an empty line inside, as V3.2 writes it; V4 has none.
    """
    if not calls:
        return ""
    lines = [f"{_OPEN}{block}>"]
    for call in calls:
        parameters = [_write_parameter(key, value) for key, value in _parameters(call).items()]
        if not parameters and blank_when_empty:
            parameters = [""]
        lines += [f'{_INVOKE} name="{call.name}">', *parameters, _INVOKE_END]
    return "\n\n" + "\n".join([*lines, f"{_SHUT}{block}>"])


def _parameters(call: ToolCall) -> dict[str, object]:
    """The arguments as an object; text that is no JSON object becomes one parameter called "arguments"."""
    try:
        value = json.loads(call.arguments)
    except ValueError:
        value = None
    return value if isinstance(value, dict) else {"arguments": call.arguments}


def _write_parameter(key: str, value: object) -> str:
    kind, text = ("true", value) if isinstance(value, str) else ("false", to_json(value))
    return f'{_PARAMETER} name="{key}" string="{kind}">{text}{_PARAMETER_END}'


class DsmlReader(CallReader):
    """Reads what `write_dsml` writes; a subclass names the block.

    The arguments come out as one JSON object. A text value is passed on piece by piece as it arrives; a JSON
    value comes whole, since it is checked first and kept as text when it is not JSON.
    """

    block = ""
    starts = tuple(newlines + tag for tag in (_OPEN, _SHUT) for newlines in ("\n\n", "\n", ""))

    def __init__(self, parser: StreamParser) -> None:
        super().__init__(parser)
        self._begin, self._end = f"{_OPEN}{self.block}>", f"{_SHUT}{self.block}>"
        self._tags = (self._begin, self._end, _INVOKE, _INVOKE_END, _PARAMETER, _PARAMETER_END)

    def begin(self, layout: str) -> None:
        if layout != "\n\n":
            self.parser.fault("the tool calls do not start after a blank line")
        self._read: Callable[[], bool] = self._tag
        self._inside = False  # between the block's two tags
        self._calling = False  # between a call's two tags
        self._whole = True  # nothing of the open call was unreadable
        self._names: list[str] = []  # its parameters so far
        self._text = ""  # read so far in the state at hand
        self._layouts: tuple[str, ...] = ()  # what may stand before the next tag

    def step(self) -> bool:
        return self._read()

    def _expect(self, *layouts: str) -> bool:
        """Next comes a tag, after one of these layouts."""
        self._layouts, self._read, self._text = layouts, self._between, ""
        return True

    def _between(self) -> bool:
        """The text before the next tag: a newline inside the block, nothing after it."""
        parser = self.parser
        text, marker = parser.until(_OPEN, _SHUT, *parser.grammar.stops)
        self._text += text
        if marker is None and not parser.final:
            return False
        if self._text.strip():
            self._lost("there is text between or after the tool calls", self._text)
        elif self._text not in self._layouts and (marker or self._text) and parser.strict:
            parser.fault("the layout of the tool calls is wrong", self._text)
        if marker in (_OPEN, _SHUT):
            parser.buffer = marker + parser.buffer
            self._read = self._tag
            return True
        if self._inside:
            parser.cut_off()
        self._text = ""
        if marker is not None:
            parser.stop()
        return marker is not None

    def _tag(self) -> bool:
        """The tag at the start of the buffer."""
        parser = self.parser
        tag = next((tag for tag in self._tags if parser.buffer.startswith(tag)), None)
        if tag is None and not parser.final and any(known.startswith(parser.buffer) for known in self._tags):
            return False
        if tag == _INVOKE and not self._calling:
            return self._invoke()
        if tag == _PARAMETER and self._calling:
            return self._parameter()
        if tag == _INVOKE_END and self._calling:
            parser.take(len(tag))
            parser.call_text("}" if self._names else "{}")
            parser.call_end(complete=self._whole)
            self._calling = False
            return self._expect("\n")
        if tag == self._begin and not self._inside:
            parser.take(len(tag))
            self._inside = True
            return self._expect("\n")
        if tag == self._end and self._inside and not self._calling:
            parser.take(len(tag))
            self._inside = False
            return self._expect("")
        return self._unexpected()

    def _unexpected(self) -> bool:
        """A tag out of place, or unknown: set it aside, up to its end, the next line or the next tag."""
        parser = self.parser
        end = re.compile(r">|\n|(?=<)").search(parser.buffer, 1)
        if end is None:
            if parser.final:
                parser.cut_off(parser.take(len(parser.buffer)))
            return False
        self._lost("a DSML tag stands where none belongs", parser.take(end.end()))
        if not self._inside and not parser.calls:
            parser.resume_content()
            return True
        return self._expect("\n")

    def _invoke(self) -> bool:
        header = self._header(_INVOKE_FORMS)
        if header is None:
            return self._unreadable("a call has no readable name")
        if not self._inside:
            self.parser.fault(f"a call without {self._begin}")
        self.parser.take(header.end())
        self.parser.call_begin(header[1])
        self._inside, self._calling, self._whole, self._names = True, True, True, []
        return self._expect("\n", "\n\n")

    def _parameter(self) -> bool:
        header = self._header(_PARAMETER_FORMS)
        if header is None:
            return self._unreadable("a parameter has no readable name")
        self.parser.take(header.end())
        name, kind = header[1], header[2]
        if name in self._names:
            self._lost(f"the parameter {name!r} is given twice", header[0])
            self._read = self._repeated
            return True
        if kind is None:
            self.parser.fault(f"the parameter {name!r} does not say string=")
        self.parser.call_text((", " if self._names else "{") + to_json(name) + ": ")
        self._names.append(name)
        self._text = ""
        self._read = self._json_value
        if kind == "true":
            self.parser.call_text('"')
            self._read = self._text_value
        return True

    def _text_value(self) -> bool:
        text, marker = self.parser.until(_PARAMETER_END, *self.parser.grammar.stops)
        self.parser.call_text(to_json(text)[1:-1])
        if marker == _PARAMETER_END:
            self.parser.call_text('"')
        return self._after_value(marker)

    def _json_value(self) -> bool:
        text, marker = self.parser.until(_PARAMETER_END, *self.parser.grammar.stops)
        self._text += text
        if marker is None and not self.parser.final:
            return False
        if marker == _PARAMETER_END and not is_json(self._text):
            self._lost(f"the value of {self._names[-1]!r} is not JSON; it is kept as text")
            self._text = to_json(self._text)
        self.parser.call_text(self._text)
        return self._after_value(marker)

    def _repeated(self) -> bool:
        """The value of a parameter that is there already: set aside."""
        text, marker = self.parser.until(_PARAMETER_END, *self.parser.grammar.stops)
        self._lost("its second value is set aside", text)
        return self._after_value(marker)

    def _after_value(self, marker: str | None) -> bool:
        """A value ended by its tag, or more of it is to come, or the text ended inside it."""
        parser = self.parser
        if marker == _PARAMETER_END:
            return self._expect("\n")
        if marker is None and not parser.final:
            return False
        parser.cut_off()
        if marker is not None:
            parser.stop()
        return marker is not None

    def _header(self, forms: tuple[str, str]) -> re.Match[str] | None:
        """The header at the start of the buffer, if it is readable. Of the two forms the shorter match
        counts, so that a header is read as soon as it has arrived."""
        region = self.parser.buffer[: self._next_tag()]
        tried = forms[:1] if self.parser.strict else forms
        matches = [match for form in tried if (match := re.compile(form, re.DOTALL).match(region))]
        return min(matches, key=lambda match: match.end(), default=None)

    def _next_tag(self) -> int:
        """Where the next tag or stop after the one at the start begins; the buffer's length if nowhere."""
        buffer = self.parser.buffer
        places = (buffer.find(tag, 1) for tag in (_OPEN, _SHUT, *self.parser.grammar.stops))
        return min((place for place in places if place >= 0), default=len(buffer))

    def _unreadable(self, problem: str) -> bool:
        """The header does not match (yet). When the next tag begins it never will: set it aside."""
        end = self._next_tag()
        if end == len(self.parser.buffer) and not self.parser.final:
            return False
        self._lost(problem, self.parser.take(end))
        return self._expect("\n")

    def _lost(self, problem: str, text: str = "") -> None:
        """Report a fault; the open call is no longer whole."""
        self._whole = False
        self.parser.fault(problem, text)


class DsmlReaderV32(DsmlReader):
    """V3.2."""

    block = "function_calls"


class DsmlReaderV4(DsmlReader):
    """V4."""

    block = "tool_calls"
