"""What `tools`, `tool_choice` and `response_format` ask of an answer, as a grammar over the model's own format.

An answer after its reasoning is content, or a block of tool calls, or content and then calls. Strict functions and
calls that must be made are held to their form by a grammar, token by token; everything else is left to the model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rorqual.engine import Grammar
from rorqual.engine.grammar import MOST_TEXT
from rorqual.serve.errors import Refusal
from rorqual.serve.strict import check_schema, check_strict
from rorqual.text import Encoding, Tokenizer
from rorqual.text.dsml import DsmlReader
from rorqual.text.marked import FencedReader, MarkedReader
from rorqual.text.tokens import CALL_BEGIN, CALL_END, CALLS_BEGIN, CALLS_END, DSML, SEP

MOST_TOOLS = 128
MOST_FORMS = 256
"""In which one parameter of a strict function may stand."""
NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")


@dataclass(frozen=True, slots=True)
class Choice:
    """How tools are to be used: "auto", "none", or "required" (with the one function that `name` names, if given).
    parallel: several calls at once are welcome."""

    mode: str = "auto"
    name: str | None = None
    parallel: bool = True


def read_tools(raw: Sequence[Any] | None) -> list[dict[str, Any]]:
    """OpenAI-shaped tools, checked; Refusal names what is wrong with which."""
    tools: list[dict[str, Any]] = []
    if raw is not None and len(raw) > MOST_TOOLS:
        raise Refusal(400, f"{len(raw)} tools are more than {MOST_TOOLS}", "tools", "invalid_value")
    for number, tool in enumerate(raw or ()):
        place = f"tools.{number}"
        if not isinstance(tool, Mapping) or tool.get("type", "function") != "function":
            raise Refusal(400, "a tool must have the type 'function'", f"{place}.type", "invalid_tool")
        function = tool.get("function")
        if not isinstance(function, Mapping):
            raise Refusal(400, "a tool must have an object 'function'", f"{place}.function", "invalid_tool")
        name = function.get("name")
        if not isinstance(name, str) or not NAME.fullmatch(name):
            told = f"a function's name must match {NAME.pattern}, got {name!r:.80}"
            raise Refusal(400, told, f"{place}.function.name", "invalid_tool")
        if any(name == other["function"]["name"] for other in tools):
            raise Refusal(400, f"two functions are called {name!r}", f"{place}.function.name", "invalid_tool")
        for field, kind in (("description", str), ("parameters", Mapping), ("strict", bool)):
            if function.get(field) is not None and not isinstance(function[field], kind):
                wanted = {str: "a string", Mapping: "an object", bool: "true or false"}[kind]
                raise Refusal(400, f"{field} must be {wanted}", f"{place}.function.{field}", "invalid_tool")
        if function.get("strict"):
            check_strict(function.get("parameters") or {}, f"{place}.function.parameters")
        kept = {k: v for k, v in function.items() if v is not None}
        tools.append({"type": "function", "function": kept})
    return tools


def read_choice(raw: object, tools: Sequence[Mapping[str, Any]], parallel: bool | None) -> Choice:
    """`tool_choice` of the OpenAI APIs."""
    several = parallel is not False
    if raw is None or (isinstance(raw, str) and raw in ("auto", "none", "required")):
        mode = raw if isinstance(raw, str) else "auto"
        if mode == "required" and not tools:
            raise Refusal(
                400, "tool_choice is 'required', but there are no tools", "tool_choice", "invalid_value"
            )
        return Choice(mode, None, several)
    if isinstance(raw, Mapping):
        inner = raw.get("function")
        name = inner.get("name") if isinstance(inner, Mapping) else raw.get("name")
        if isinstance(name, str) and any(tool["function"]["name"] == name for tool in tools):
            return Choice("required", name, False)
        raise Refusal(
            400,
            f"tool_choice names {name!r:.80}, which is not among the tools",
            "tool_choice",
            "invalid_value",
        )
    told = "tool_choice must be 'none', 'auto', 'required' or name a function"
    raise Refusal(400, told, "tool_choice", "invalid_value")


def read_format(raw: Mapping[str, Any] | None) -> tuple[Grammar | None, Mapping[str, Any] | None]:
    """`response_format`: the grammar of the content, and the schema to show the model (None: none)."""
    kind = (raw or {}).get("type", "text")
    if raw is None or kind == "text":
        return None, None
    if kind == "json_object":
        return Grammar.json_schema({"type": "object"}), None
    if kind == "json_schema":
        inner = raw.get("json_schema", raw)
        schema = inner.get("schema") if isinstance(inner, Mapping) else None
        if not isinstance(schema, Mapping):
            where = "response_format.json_schema.schema"
            raise Refusal(400, "response_format needs a JSON schema: an object", where, "invalid_value")
        return Grammar.json_schema(schema), schema
    for name, make in (("regex", Grammar.regex), ("grammar", Grammar.ebnf), ("choice", Grammar.choice)):
        if kind == name:
            if raw.get(name) is None:
                where = f"response_format.{name}"
                raise Refusal(
                    400, f"response_format of type {name!r} needs the field {name!r}", where, "invalid_value"
                )
            return make(raw[name]), None
    told = f"response_format has the type {kind!r:.80}; use text, json_object, json_schema, regex, grammar or choice"
    raise Refusal(400, told, "response_format.type", "invalid_value")


def grammar_of(
    encoding: Encoding,
    tokenizer: Tokenizer,
    tools: Sequence[Mapping[str, Any]],
    choice: Choice,
    content: Grammar | None,
) -> Grammar | None:
    """What the answer after its reasoning must look like; None: as the model likes."""
    functions = [tool["function"] for tool in tools]
    if choice.name is not None:
        functions = [function for function in functions if function["name"] == choice.name]
    strict = any(function.get("strict") for function in functions)
    if not functions or choice.mode == "none" or (choice.mode == "auto" and not strict and content is None):
        return content
    lines = _calls(encoding, tokenizer, functions, choice.parallel)
    if choice.mode == "required":
        return Grammar.ebnf("start: block\n" + lines)
    if content is None:
        return Grammar.ebnf(f"start: TEXT | tail\nTEXT: /(?s:.*)/\n{lines}")
    if content.kind == "json_schema":
        return Grammar.ebnf(f"start: content | block\ncontent: {_json(json.loads(content.text))}\n{lines}")
    raise Refusal(
        400, "a response_format of this type can't be combined with tools", "response_format", "invalid_value"
    )


def banned(encoding: Encoding, tokenizer: Tokenizer) -> dict[int, float]:
    """A bias that keeps a model from calling tools it was told of."""
    reader = encoding.grammar.reader
    marker = DSML if isinstance(reader, type) and issubclass(reader, DsmlReader) else CALLS_BEGIN
    token = tokenizer.id_of(marker)
    return {} if token is None else {token: -100.0}


# ---- the block of calls in each generation's spelling


def _calls(
    encoding: Encoding, tokenizer: Tokenizer, functions: Sequence[Mapping[str, Any]], parallel: bool
) -> str:
    """Rules `block`, a block of calls, and `tail`, content with such a block at its end."""
    reader = encoding.grammar.reader
    if isinstance(reader, type) and issubclass(reader, DsmlReader):
        return _Dsml(tokenizer, reader.block).rules(functions, parallel)
    if isinstance(reader, type) and issubclass(reader, MarkedReader):
        return _marked(tokenizer, functions, parallel, fenced=issubclass(reader, FencedReader))
    raise Refusal(400, f"encoding {encoding.name!r} has no tool calls", "tools", "invalid_value")


def _token(tokenizer: Tokenizer, spelling: str) -> str:
    token = tokenizer.id_of(spelling)
    if token is None:
        told = f"this model's vocabulary has no token {spelling}: calls can't be held to a form"
        raise Refusal(400, told, "tools", "unsupported")
    return f"<[{token}]>"


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _json(schema: object) -> str:
    """A JSON value inside a Lark grammar. (`::=` would make it one of another notation.)"""
    return "%json " + json.dumps(schema, ensure_ascii=False).replace("::=", "\\u003a:=")


def _marked(
    tokenizer: Tokenizer, functions: Sequence[Mapping[str, Any]], parallel: bool, *, fenced: bool
) -> str:
    begin, end, call, call_end, sep = (
        _token(tokenizer, token) for token in (CALLS_BEGIN, CALLS_END, CALL_BEGIN, CALL_END, SEP)
    )
    lines = []
    for number, function in enumerate(functions):
        head = [_text("function"), sep, _text(function["name"] + "\n```json\n")]
        head = head if fenced else [_text(function["name"]), sep]
        tail = [_text("\n```")] if fenced else []
        lines += [
            f"call{number}: {' '.join([call, *head, f'value{number}', *tail, call_end])}",
            f"value{number}: {_json(_parameters(function))}",
        ]
    one = " | ".join(f"call{number}" for number in range(len(functions)))
    gap = _text("\n") + " " if fenced else ""
    more = f" ({gap}one)*" if parallel else ""
    return "\n".join(
        [f"block: {begin} one{more} {end}", "tail: BEFORE block", "BEFORE: /(?s:.*)/", f"one: {one}", *lines]
    )


def _parameters(function: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema that a function's arguments are held to: its own if it is strict, else any object."""
    if function.get("strict"):
        return function.get("parameters") or {
            "type": "object",
            "properties": {},
            "additionalProperties": False,
        }
    return {"type": "object"}


class _Dsml:
    """V3.2's and V4's: a tag for each parameter, strings as they are, other values as JSON."""

    def __init__(self, tokenizer: Tokenizer, block: str) -> None:
        self.mark, self.block = _token(tokenizer, DSML), block
        self._lines: list[str] = []
        self._names: dict[str, str] = {}
        self._written = 0

    def rules(self, functions: Sequence[Mapping[str, Any]], parallel: bool) -> str:
        calls = " | ".join(self._call(function) for function in functions)
        inside = (
            f'{self.mark} "{self.block}>\\n" one{"+" if parallel else ""} "</" {self.mark} "{self.block}>"'
        )
        return "\n".join(
            [
                f'block: "\\n\\n<" {inside}',
                f"tail: BEFORE {inside}",
                r"BEFORE: /(?s:(.*\n\n|\n\n)<)/",
                f"one: {calls}",
                r"ANY: /(?s:.*<\/)/",
                r"NAME: /[^<>\"\n]+/",
                *self._lines,
            ]
        )

    def _rule(self, text: str) -> str:
        """A rule's name; two with the same text are one."""
        self._spend(len(text))
        if text not in self._names:
            self._names[text] = f"r{len(self._names)}"
            self._lines.append(f"{self._names[text]}: {text}")
        return self._names[text]

    def _spend(self, count: int) -> None:
        """Count bytes, those of rules that were there already too: what costs more than a grammar may have is
        refused before much time has gone into it."""
        self._written += count
        if self._written > MOST_TEXT:
            told = f"the schemas of strict functions make a grammar of more than {MOST_TEXT:,} bytes"
            raise Refusal(400, told, "tools", "invalid_tool")

    def _call(self, function: Mapping[str, Any]) -> str:
        header = _text(f'invoke name="{function["name"]}">\n')
        if function.get("strict"):
            schema = function.get("parameters") or {}
            inner = [
                self._parameter(key, value, schema) for key, value in (schema.get("properties") or {}).items()
            ]
        else:
            text = f'"true\\">" ANY {self.mark} "parameter>\\n"'
            value = f'"false\\">" {self._rule(_json({}))} "</" {self.mark} "parameter>\\n"'
            inner = [
                self._rule(f'"<" {self.mark} "parameter name=\\"" NAME "\\" string=\\"" ({text} | {value})')
                + "*"
            ]
        if not inner and self.block == "function_calls":
            inner = [_text("\n")]  # V3.2 writes an empty line
        return self._rule(f'"<" {self.mark} {header} {" ".join(inner)} "</" {self.mark} "invoke>\\n"')

    def _parameter(self, key: str, schema: Any, whole: Mapping[str, Any]) -> str:
        """One parameter of a strict function."""
        try:
            forms = " | ".join(self._forms(schema, whole))
        except Refusal as refusal:
            told = f"the parameter {key!r:.80} of a strict function: {refusal.message}"
            raise Refusal(400, told, "tools", "invalid_tool") from None
        start = _text(f'parameter name="{key}" string="')
        return self._rule(f'"<" {self.mark} {start} ({forms}) {self.mark} "parameter>\\n"')

    def _forms(self, schema: Any, whole: Mapping[str, Any]) -> list[str]:
        """How a value may stand: `true">` and the string as it is, or `false">` and JSON, each with `</`. Schemas may
        name themselves, so each is looked at once."""
        forms: dict[str, None] = {}
        seen: set[int] = set()
        waiting = [schema]
        while waiting:
            schema = waiting.pop()
            self._spend(8)
            resolved = _resolve(schema, whole)
            if id(resolved) in seen or schema is False:
                continue
            seen.add(id(resolved))
            check_schema(resolved, "tools")
            if "anyOf" in resolved:
                waiting += reversed(resolved["anyOf"])
                continue
            forms |= dict.fromkeys(self._simple(schema, resolved, whole))
            if len(forms) > MOST_FORMS:
                raise Refusal(400, f"its anyOf has more than {MOST_FORMS} forms", "tools", "invalid_tool")
        if not forms:
            raise Refusal(400, "no value fits its schema", "tools", "invalid_tool")
        return list(forms)

    def _simple(self, schema: Any, resolved: Mapping[str, Any], whole: Mapping[str, Any]) -> list[str]:
        """The forms of a schema without anyOf."""
        options = [resolved["const"]] if "const" in resolved else resolved.get("enum")
        if options is not None:
            texts = [_text(one + "</") for one in options if isinstance(one, str)]
            others = [one for one in options if not isinstance(one, str)]
            forms = [f'"true\\">" ({" | ".join(texts)})'] if texts else []
            return forms + ([self._value({"enum": others}, whole)] if others else [])
        if resolved.get("type") == "string":
            if isinstance(resolved.get("pattern"), str):
                return [f'"true\\">" /{_anchored(resolved["pattern"])}<\\//']
            return ['"true\\">" ANY']
        return [self._value(schema if isinstance(schema, Mapping) else {}, whole)]

    def _value(self, schema: Any, whole: Mapping[str, Any]) -> str:
        shared = {key: whole[key] for key in ("$defs", "definitions") if key in whole}
        return f'"false\\">" {self._rule(_json({**schema, **shared}))} "</"'


_ANYTHING: Mapping[str, Any] = {}


def _resolve(schema: Any, whole: Mapping[str, Any]) -> Mapping[str, Any]:
    """A schema, or what its `$ref` names; what anything fits if that can't be found: the compiler says why then."""
    for _ in range(32):
        if not isinstance(schema, Mapping):
            return _ANYTHING
        reference = schema.get("$ref")
        if not isinstance(reference, str) or not reference.startswith("#/"):
            return schema
        if len(reference) > 1000:
            return _ANYTHING
        target: Any = whole
        for step in reference[2:].split("/"):
            target = target.get(step) if isinstance(target, Mapping) else None
        schema = target
    return _ANYTHING


def _anchored(pattern: str) -> str:
    """A pattern of a JSON schema, which may match anywhere, as one for the whole string, inside Lark's slashes. Each
    branch of `^a|b$` has its own anchors."""
    branches, begun, depth, listed = [], 0, 0, False
    pieces = re.findall(r"\\.|[^\\]", pattern, re.DOTALL)
    if sum(map(len, pieces)) != len(pattern):
        raise Refusal(400, "its pattern ends in a single backslash", "tools", "invalid_tool")
    for at, piece in enumerate(pieces):
        if listed:
            listed = piece != "]"
        elif piece == "[":
            listed = True
        elif piece in "()":
            depth += 1 if piece == "(" else -1
        elif piece == "|" and depth == 0:
            branches.append(pieces[begun:at])
            begun = at + 1
    return "(" + "|".join(_branch(branch) for branch in [*branches, pieces[begun:]]) + ")"


def _branch(pieces: list[str]) -> str:
    """A pattern without alternatives, in letters and escapes, for the whole string."""
    head, tail = pieces[:1] == ["^"], pieces[-1:] == ["$"]
    inner = pieces[head : len(pieces) - tail]
    text = "".join("\\/" if piece == "/" else piece for piece in inner)
    return ("" if head else "(?s:.*)") + f"({text})" + ("" if tail else "(?s:.*)")
