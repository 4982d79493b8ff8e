"""Tool calls in DSML, the tag language of V3.2 and V4 (facts 4.4, 4.5)."""

import json
import re
from collections.abc import Callable, Sequence

from rorqual.text.buffer import one_of
from rorqual.text.messages import EncodingError, ToolCall, is_json, to_json
from rorqual.text.parser import LIMIT, CallReader, StreamParser
from rorqual.text.tokens import DSML, EOS

_OPEN, _SHUT = f"<{DSML}", f"</{DSML}"
_INVOKE, _INVOKE_END = f"{_OPEN}invoke", f"{_SHUT}invoke>"
_PARAMETER, _PARAMETER_END = f"{_OPEN}parameter", f"{_SHUT}parameter>"

# Headers as the official parsers want them, and as they are still read when not strict.
_INVOKE_FORMS = (
    re.compile(rf'{_INVOKE}\s*name="(.*?)">', re.DOTALL),
    re.compile(rf'{_INVOKE}\s+name="?([^">\n]*+)"?\s*>'),
)
_PARAMETER_FORMS = (
    re.compile(rf'{_PARAMETER} name="(.*?)" string="(true|false)">', re.DOTALL),
    re.compile(rf'{_PARAMETER}\s+name="([^">\n]*+)"\s*(?:string="(true|false)"\s*)?>'),
)
_TAG_END = re.compile(r">|\n|(?=<)")
_LONGEST = 32  # no stop is longer


def write_dsml(
    calls: Sequence[ToolCall], block: str, mark: Callable[[str], str], *, blank_when_empty: bool
) -> str:
    """A DSML block named `block`, with the blank line before it; "" for no call.

    blank_when_empty: a call without parameters has an empty line inside, as V3.2 writes it; V4 has none.
    `mark` is applied to the caller's text.
    """
    if not calls:
        return ""
    lines = [f"{_OPEN}{block}>"]
    for call in calls:
        parameters = [_write_parameter(key, value, mark) for key, value in _parameters(call).items()]
        if not parameters and blank_when_empty:
            parameters = [""]
        header = f'{_INVOKE} name="{call.name}">'
        _check_header(header, call.name, _INVOKE_FORMS)
        lines += [f'{_INVOKE} name="{mark(call.name)}">', *parameters, _INVOKE_END]
    return "\n\n" + "\n".join([*lines, f"{_SHUT}{block}>"])


def _parameters(call: ToolCall) -> dict[str, object]:
    """The arguments as an object; text that is no JSON object becomes one parameter called "arguments"."""
    try:
        value = json.loads(call.arguments)
    except (ValueError, RecursionError):
        value = None
    return value if isinstance(value, dict) else {"arguments": call.arguments}


def _write_parameter(key: str, value: object, mark: Callable[[str], str]) -> str:
    kind, text = ("true", value) if isinstance(value, str) else ("false", to_json(value))
    header = f'{_PARAMETER} name="{key}" string="{kind}">'
    _check_header(header, key, _PARAMETER_FORMS)
    if _PARAMETER_END in text:
        raise EncodingError(f"the argument {key!r} holds {_PARAMETER_END!r}, which would end it; take it out")
    return f'{_PARAMETER} name="{mark(key)}" string="{kind}">{mark(text)}{_PARAMETER_END}'


def _check_header(header: str, name: str, forms: Sequence[re.Pattern[str]]) -> None:
    """Names stand in headers unescaped: refuse one that would be read back as another."""
    read = _read_header(header, forms)
    tags = (_OPEN, _SHUT, EOS)
    if (
        read is None
        or (read[0], read[1]) != (header, name)
        or len(header) > LIMIT
        or any(map(name.count, tags))
    ):
        raise EncodingError(f"{name!r:.80} cannot be the name of a call or an argument in DSML; rename it")


def _read_header(region: str, forms: Sequence[re.Pattern[str]]) -> re.Match[str] | None:
    """The shortest header `region` begins with in one of the forms."""
    if ">" not in region:
        return None
    matches = [match for form in forms if (match := form.match(region))]
    return min(matches, key=lambda match: match.end(), default=None)


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
        self._borders = one_of((_OPEN, _SHUT, *parser.grammar.stops))
        self._tags = (self._begin, self._end, _INVOKE, _INVOKE_END, _PARAMETER, _PARAMETER_END)

    def begin(self, layout: str) -> None:
        if layout != "\n\n":
            self.parser.fault("the tool calls do not start after a blank line")
        self._read: Callable[[], bool] = self._tag
        self._inside = False  # between the block's two tags
        self._calling = False  # between a call's two tags
        self._whole = True  # nothing of the open call was unreadable
        self._names: set[str] = set()  # its parameters so far
        self._name = ""  # the last of them
        self._pieces: list[str] = []  # the text read so far in the state at hand
        self._layouts: tuple[str, ...] = ()  # what may stand before the next tag

    def step(self) -> bool:
        return self._read()

    def _expect(self, *layouts: str) -> bool:
        """Next comes a tag, after one of these layouts."""
        self._layouts, self._read = layouts, self._between
        return True

    def _said(self) -> str:
        """The text collected in the state at hand, which is over."""
        text, self._pieces = "".join(self._pieces), []
        return text

    def _between(self) -> bool:
        """The text before the next tag: a newline inside the block, nothing after it."""
        parser = self.parser
        piece, marker = parser.buffer.until(_OPEN, _SHUT, *parser.grammar.stops)
        self._pieces.append(piece)
        if marker is None and not parser.buffer.final:
            return False
        text = self._said()
        if text.strip():
            self._lost("there is text between or after the tool calls", text)
        elif text not in self._layouts and (marker or text) and parser.strict:
            parser.fault("the layout of the tool calls is wrong", text)
        if marker in (_OPEN, _SHUT):
            parser.buffer.unread(marker)
            self._read = self._tag
            return True
        if self._inside:
            parser.cut_off()
        if marker is not None:
            parser.stop()
        return marker is not None

    def _tag(self) -> bool:
        """The tag at the start of the buffer."""
        parser = self.parser
        tag = next((tag for tag in self._tags if parser.buffer.starts(tag)), None)
        if tag is None and any(map(parser.buffer.may_become, self._tags)):
            return False
        if tag == _INVOKE and not self._calling:
            return self._invoke()
        if tag == _PARAMETER and self._calling:
            return self._parameter()
        if tag == _INVOKE_END and self._calling:
            parser.buffer.take(len(tag))
            parser.call_text("}" if self._names else "{}")
            parser.call_end(complete=self._whole)
            self._calling = False
            return self._expect("\n")
        if tag == self._begin and not self._inside:
            parser.buffer.take(len(tag))
            self._inside = True
            return self._expect("\n")
        if tag == self._end and self._inside and not self._calling:
            parser.buffer.take(len(tag))
            self._inside = False
            return self._expect("")
        return self._unexpected()

    def _unexpected(self) -> bool:
        """A tag out of place, or unknown: set it aside, up to its end, the next line or the next tag."""
        parser = self.parser
        end = parser.buffer.find(_TAG_END, 1, LIMIT)
        if end is None and len(parser.buffer) < LIMIT:
            if parser.buffer.final:
                parser.cut_off(parser.buffer.take(len(parser.buffer)))
            return False
        length = LIMIT if end is None else parser.buffer.place(end) + len(end[0])
        self._lost("a DSML tag stands where none belongs", parser.buffer.take(length))
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
        self.parser.buffer.take(header.end())
        self.parser.call_begin(header[1])
        self._inside, self._calling, self._whole, self._names = True, True, True, set()
        return self._expect("\n", "\n\n")

    def _parameter(self) -> bool:
        header = self._header(_PARAMETER_FORMS)
        if header is None:
            return self._unreadable("a parameter has no readable name")
        self.parser.buffer.take(header.end())
        name, kind = header[1], header[2]
        if name in self._names:
            self._lost(f"the parameter {name!r} is given twice", header[0])
            self._read = self._repeated
            return True
        if kind is None:
            self.parser.fault(f"the parameter {name!r} does not say string=")
        self.parser.call_text((", " if self._names else "{") + to_json(name) + ": ")
        self._names.add(name)
        self._name = name
        self._read = self._json_value
        if kind == "true":
            self.parser.call_text('"')
            self._read = self._text_value
        return True

    def _text_value(self) -> bool:
        text, marker = self.parser.buffer.until(_PARAMETER_END, *self.parser.grammar.stops)
        self.parser.call_text(to_json(text)[1:-1])
        if marker == _PARAMETER_END:
            self.parser.call_text('"')
        return self._after_value(marker)

    def _json_value(self) -> bool:
        text, marker = self.parser.buffer.until(_PARAMETER_END, *self.parser.grammar.stops)
        self._pieces.append(text)
        if marker is None and not self.parser.buffer.final:
            return False
        value = self._said()
        if marker == _PARAMETER_END and not is_json(value):
            self._lost(f"the value of {self._name!r} is not JSON; it is kept as text")
            value = to_json(value)
        self.parser.call_text(value)
        return self._after_value(marker)

    def _repeated(self) -> bool:
        """The value of a parameter that is there already: set aside."""
        text, marker = self.parser.buffer.until(_PARAMETER_END, *self.parser.grammar.stops)
        self._lost("its second value is set aside", text)
        return self._after_value(marker)

    def _after_value(self, marker: str | None) -> bool:
        """A value ended by its tag, or more of it is to come, or the text ended inside it."""
        parser = self.parser
        if marker == _PARAMETER_END:
            return self._expect("\n")
        if marker is None and not parser.buffer.final:
            return False
        parser.cut_off()
        if marker is not None:
            parser.stop()
        return marker is not None

    def _header(self, forms: tuple[re.Pattern[str], re.Pattern[str]]) -> re.Match[str] | None:
        """The header at the start of the buffer, if it is readable. Of the two forms the shorter match
        counts, so that a header is read as soon as it has arrived."""
        region = self.parser.buffer.peek(self._next_tag())
        return _read_header(region, forms[:1] if self.parser.strict else forms)

    def _next_tag(self) -> int:
        """Where the next tag or stop after the one at the start begins; at most LIMIT."""
        buffer = self.parser.buffer
        found = buffer.find(self._borders, 1, LIMIT + _LONGEST)
        return min(buffer.place(found) if found else len(buffer), LIMIT)

    def _unreadable(self, problem: str) -> bool:
        """The header does not match (yet). When the next tag begins it never will, nor when it is longer than
        LIMIT: set it aside."""
        buffer = self.parser.buffer
        end = self._next_tag()
        if not buffer.final and (end == len(buffer) or (end == LIMIT and len(buffer) < LIMIT + _LONGEST)):
            return False
        self._lost(problem, buffer.take(end))
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
