"""Chat messages in the OpenAI shape: checked once, here, and turned into one plain form for every encoding.

Source of the fields: facts section 5 (hosted API) and, for the extra fields of V4, section 4.5.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rorqual.text.tokens import TASKS

ROLES = ("system", "user", "assistant", "tool", "developer", "latest_reminder")
EXTRA_FIELDS = ("tools", "response_format", "content_blocks", "task", "wo_eos")
_KNOWN = ("role", "content", "reasoning_content", "tool_calls", "tool_call_id", "prefix", *EXTRA_FIELDS)
_UNWRITTEN = ("name", "id", "index", "type")  # clients send them; no template writes them
_EMPTY = ("refusal", "audio", "annotations", "function_call")  # allowed when they hold nothing
_OWNERS = {  # fields that only some roles may have
    "reasoning_content": ("assistant",),
    "tool_calls": ("assistant",),
    "prefix": ("assistant",),
    "wo_eos": ("assistant",),
    "tool_call_id": ("tool",),
    "content_blocks": ("user",),
    "tools": ("system", "developer"),
    "response_format": ("system", "developer"),
}


class EncodingError(ValueError):
    """A conversation that cannot be written: which message and field, what was found, what to do."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call. `arguments` is JSON text as the model or the caller wrote it, parameters in order.

    `complete` is False for a parsed call whose text was cut off or partly unreadable: do not run it
    unchecked.
    """

    name: str
    arguments: str
    id: str | None = None
    complete: bool = True


@dataclass(frozen=True, slots=True)
class Block:
    """A piece of content: text, or (`result` True) what a tool returned for the call `call_id`."""

    text: str
    result: bool = False
    call_id: str | None = None


@dataclass(frozen=True, slots=True)
class Message:
    """A checked message. `blocks` hold the content; `tools` and `response_format` are V3.2/V4 extras."""

    index: int
    role: str
    blocks: tuple[Block, ...] = ()
    reasoning: str = ""
    calls: tuple[ToolCall, ...] = ()
    prefix: bool = False
    eos: bool = True
    task: str | None = None
    tools: tuple[Mapping[str, Any], ...] = ()
    response_format: Mapping[str, Any] | None = None
    emitted: str | None = None
    """Stands for content and calls, where the model's own tokens are to be put back (`Encoding.encode_ids`)."""

    @property
    def text(self) -> str:
        """The content as one string; several parts are joined by a blank line, as in V4."""
        return "\n\n".join(block.text for block in self.blocks)


def check(messages: object, *, loose_parts: bool = False) -> list[Message]:
    """Read OpenAI-shaped messages. `loose_parts`: write "[Unsupported type]" for a part that is not text
    (V4).

    Tool results with ids come out in the order of their calls. Raises EncodingError for an empty list,
    unknown role, unknown, missing or wrong field, tool result without its call, a call answered twice, a
    `prefix` that is not on a last assistant message.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise EncodingError(f"messages is {_kind(messages)}; it must be a list of messages")
    if not messages:
        raise EncodingError("messages is empty; give at least one message")
    checked: list[Message] = []
    open_calls: tuple[ToolCall, ...] = ()
    answers: list[Message] = []
    for index, raw in enumerate(messages):
        message = _message(index, raw, loose_parts)
        if message.role == "tool":
            _check_result(message, open_calls, answers)
            answers.append(message)
        else:
            open_calls, answers = message.calls, []
        if message.prefix and (message.role != "assistant" or index != len(messages) - 1):
            raise _error(
                index, "prefix", "true", "only the last message may have it, and it must be an assistant's"
            )
        checked.append(message)
        checked[len(checked) - len(answers) :] = _in_order(answers, open_calls)
    return checked


def check_tools(tools: object, where: str = "tools") -> tuple[Mapping[str, Any], ...]:
    """The `function` objects of a list of OpenAI tools; EncodingError when one is malformed."""
    if isinstance(tools, (str, bytes, Mapping)) or not isinstance(tools, Sequence):
        raise EncodingError(f"{where} is {_kind(tools)}; it must be a list of tools")
    functions = []
    for number, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if (
            not isinstance(function, Mapping)
            or not isinstance(function.get("name"), str)
            or not function["name"]
        ):
            raise EncodingError(
                f"{where}[{number}] has no function with a name; it must look like "
                '{"type": "function", "function": {"name": …, "parameters": …}}'
            )
        function = {key: value for key, value in function.items() if (key, value) != ("description", None)}
        to_json(function, f"{where}[{number}]")
        functions.append(function)
    return tuple(functions)


def to_json(value: object, where: str = "a value", *, indent: int | None = None) -> str:
    """JSON as the published encoders write it: one line, ", " and ": " between, letters unescaped.
    EncodingError, naming `where`, for what JSON cannot hold."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, indent=indent)
    except (TypeError, ValueError, RecursionError) as error:
        raise EncodingError(f"{where} cannot be written as JSON: {error}") from None


def is_json(text: str) -> bool:
    """Whether `text` is one JSON value (NaN and Infinity are not JSON)."""

    def refuse(name: str) -> object:
        raise ValueError(name)

    try:
        json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError):
        return False
    return True


def _message(index: int, raw: object, loose: bool) -> Message:
    if not isinstance(raw, Mapping):
        raise EncodingError(f"message {index} is {_kind(raw)}; it must be an object with role and content")
    role = raw.get("role")
    if role not in ROLES:
        raise _error(index, "role", repr(role), f"use one of {', '.join(ROLES)}")
    for field, value in raw.items():
        if field not in (*_KNOWN, *_UNWRITTEN) and (value or field not in _EMPTY):
            known = ", ".join(_KNOWN)
            raise _error(index, repr(field), "not a field of a message", f"take it out; known are {known}")
    assistant = role == "assistant"
    for field, allowed in _OWNERS.items():
        if raw.get(field) and role not in allowed:
            raise _error(index, field, "present", f"a message of role {role} cannot have it")
    reasoning = _optional(index, raw, "reasoning_content", str) or ""
    prefix = bool(_optional(index, raw, "prefix", bool))
    calls = _calls(index, raw.get("tool_calls"))
    if prefix and calls:
        raise _error(
            index, "tool_calls", "present", "a prefix message is unfinished text; it cannot hold calls"
        )
    task = _optional(index, raw, "task", str)
    if task is not None and task not in TASKS:
        raise _error(index, "task", repr(task), f"use one of {', '.join(TASKS)}")
    content = raw.get("content")
    if raw.get("content_blocks"):
        if content:
            raise _error(index, "content", "given beside content_blocks", "give only one of the two")
        content = raw["content_blocks"]
    if content is None and not (assistant and (calls or reasoning or prefix)):
        raise _error(index, "content", "nothing", "give a string (it may be empty) or a list of text parts")
    call_id = _optional(index, raw, "tool_call_id", str)
    blocks = () if content is None else _blocks(index, content, loose, role == "tool", call_id)
    if role == "developer" and not any(block.text for block in blocks):
        raise _error(index, "content", "empty text", "a developer message must say something")
    tools = raw.get("tools")
    response_format = _optional(index, raw, "response_format", Mapping)
    to_json(response_format, f"message {index}: response_format")
    return Message(
        index=index,
        role=str(role),
        blocks=blocks,
        reasoning=reasoning,
        calls=calls,
        prefix=prefix,
        eos=not _optional(index, raw, "wo_eos", bool),
        task=task,
        tools=check_tools(tools, f"message {index}: tools") if tools else (),
        response_format=response_format,
    )


def _blocks(index: int, content: object, loose: bool, result: bool, call_id: str | None) -> tuple[Block, ...]:
    """Content as blocks. A tool message is one block whatever its parts."""
    if isinstance(content, str):
        return (Block(content, result, call_id),)
    if not isinstance(content, Sequence):
        raise _error(index, "content", _kind(content), "it must be a string or a list of text parts")
    blocks = tuple(_part(index, number, part, loose, result) for number, part in enumerate(content))
    if result:
        return (Block("\n\n".join(block.text for block in blocks), True, call_id),)
    return blocks


def _part(index: int, number: int, part: object, loose: bool, result: bool) -> Block:
    field = f"content[{number}]"
    if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
        raise _error(index, field, _kind(part), 'it must be an object such as {"type": "text", "text": …}')
    kind = part["type"]
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise _error(index, f"{field}.text", _kind(part.get("text")), "it must be a string")
        return Block(part["text"])
    if not loose:
        raise _error(index, f"{field}.type", repr(kind), "this encoding takes text parts only")
    if kind == "tool_result" and result:
        raise _error(index, f"{field}.type", "'tool_result'", "a tool result cannot hold another")
    if kind == "tool_result":
        inner = _blocks(
            index, part.get("content", ""), loose, True, _optional(index, part, "tool_use_id", str)
        )
        return inner[0]
    return Block(f"[Unsupported {kind}]")


def _calls(index: int, raw: object) -> tuple[ToolCall, ...]:
    if raw is None:
        return ()
    if isinstance(raw, (str, Mapping)) or not isinstance(raw, Sequence):
        raise _error(index, "tool_calls", _kind(raw), "it must be a list")
    calls = []
    for number, call in enumerate(raw):
        function = call.get("function") if isinstance(call, Mapping) else None
        field = f"tool_calls[{number}].function"
        if not isinstance(call, Mapping) or not isinstance(function, Mapping):
            raise _error(index, field, _kind(function), "it must be an object with name and arguments")
        if call.get("type", "function") != "function":
            raise _error(index, f"tool_calls[{number}].type", repr(call["type"]), "it must be 'function'")
        name, arguments = function.get("name"), function.get("arguments", "{}")
        if not isinstance(name, str) or not name:
            raise _error(index, f"{field}.name", _kind(name), "it must be a non-empty string")
        if isinstance(arguments, Mapping):
            arguments = to_json(arguments, f"message {index}: {field}.arguments")
        if not isinstance(arguments, str):
            raise _error(index, f"{field}.arguments", _kind(arguments), "it must be a string of JSON")
        _check_arguments(index, f"{field}.arguments", arguments)
        calls.append(ToolCall(name, arguments, _optional(index, call, "id", str)))
    return tuple(calls)


def _check_arguments(index: int, field: str, text: str) -> None:
    """Text that is no JSON is written as it is, but not what only Python takes for JSON."""
    if is_json(text):
        return
    try:
        json.loads(text)
    except RecursionError:
        raise _error(index, field, "nested too deeply", "no reader can take it apart") from None
    except ValueError:
        return
    raise _error(index, field, "not JSON: it holds NaN or Infinity", "write null or a text instead")


def _in_order(answers: list[Message], calls: tuple[ToolCall, ...]) -> list[Message]:
    """Tool results in the order of their calls, if all have ids; else as given."""
    order = {call.id: number for number, call in enumerate(calls)}
    ids = [answer.blocks[0].call_id for answer in answers]
    if None in order or not all(call_id in order for call_id in ids):
        return answers
    return sorted(answers, key=lambda answer: order[answer.blocks[0].call_id])


def _check_result(message: Message, calls: tuple[ToolCall, ...], earlier: Sequence[Message]) -> None:
    """A tool message answers a call of the assistant message before it: by id where both have one."""
    number = len(earlier) + 1
    if not calls:
        raise _error(message.index, "role", "'tool'", "it must follow an assistant message with tool_calls")
    if number > len(calls):
        raise _error(message.index, "role", "'tool'", f"there are {number} results for {len(calls)} call(s)")
    wanted = message.blocks[0].call_id
    if wanted is not None and any(wanted == answer.blocks[0].call_id for answer in earlier):
        raise _error(message.index, "tool_call_id", repr(wanted), "a message before it answers that call")
    known = [call.id for call in calls]
    if wanted is not None and None not in known and wanted not in known:
        raise _error(
            message.index,
            "tool_call_id",
            repr(wanted),
            f"the calls before it are {', '.join(map(str, known))}",
        )


def _optional(index: int, raw: Mapping[str, Any], field: str, kind: type) -> Any:
    """A field that may be absent or null, else must be of `kind`."""
    value = raw.get(field)
    if value is not None and not isinstance(value, kind):
        raise _error(index, field, _kind(value), f"it must be {_NAMES[kind]}")
    return value


_NAMES: dict[type, str] = {str: "a string", bool: "true or false", Mapping: "an object"}


def _kind(value: object) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"


def _error(index: int, field: str, found: str, advice: str) -> EncodingError:
    return EncodingError(f"message {index}: {field} is {found}; {advice}")
