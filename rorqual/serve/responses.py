"""`/v1/responses`: OpenAI's newer form, its fields as conversations.

Nothing is stored: `previous_response_id` and background answers are refused, so a client sends the whole input each
time.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rorqual.serve.ask import Ask
from rorqual.serve.body import Body, between, parse
from rorqual.serve.errors import Refusal, speaking
from rorqual.serve.meta import Meta
from rorqual.serve.response_events import Writer, body
from rorqual.serve.service import Service, Talk
from rorqual.serve.tools import read_choice, read_format, read_tools


class ResponsesRequest(Body):
    """The fields of a request; those at the end have no effect."""

    input: str | list[Any]
    model: str | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    reasoning: dict[str, Any] | None = None
    text: dict[str, Any] | None = None
    tools: list[Any] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    stream: bool | None = None
    previous_response_id: str | None = None
    conversation: Any = None
    background: bool | None = None
    metadata: Any = None
    store: Any = None
    include: Any = None
    user: Any = None
    truncation: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    stream_options: Any = None
    client_metadata: Any = None


_NAMES = {
    "max_tokens": "max_output_tokens",
    "reasoning_effort": "reasoning.effort",
    r"response_format(?:\.json_schema)?": "text.format",
    r"tools\.(\d+)\.function": r"tools.\1",
}


@speaking(_NAMES)
def ask(raw: bytes, service: Service) -> Ask:
    """Understand a request. Raises Refusal."""
    request = parse(ResponsesRequest, raw, strict=service.settings.strict)
    service.check_model(request.model)
    for field in ("previous_response_id", "conversation", "background"):
        if getattr(request, field):
            told = f"{field} is not supported: nothing is stored here; send the whole input"
            raise Refusal(400, told, field, "unsupported")
    between("temperature", request.temperature, 0, 2)
    between("top_p", request.top_p, 0, 1)
    tools = read_tools([_tool(number, tool) for number, tool in enumerate(request.tools or ())] or None)
    fmt = (request.text or {}).get("format")
    if fmt is not None and not isinstance(fmt, Mapping):
        raise Refusal(400, "text.format must be an object", "text.format", "invalid_type")
    content, schema = read_format(fmt)
    effort = (request.reasoning or {}).get("effort")
    if effort is not None and not isinstance(effort, str):
        raise Refusal(400, "reasoning.effort must be a string", "reasoning.effort", "invalid_type")
    talk = Talk(
        messages=messages_of(request.input, request.instructions),
        tools=tools,
        choice=read_choice(request.tool_choice, tools, request.parallel_tool_calls),
        effort=effort,
        content=content,
        schema=schema,
    )
    job = service.talk(
        talk,
        limit=request.max_output_tokens,
        temperature=request.temperature,
        top_p=request.top_p,
    )
    meta = Meta(service.settings.name, "resp_")
    shown = {
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "temperature": 1.0 if request.temperature is None else request.temperature,
        "top_p": 1.0 if request.top_p is None else request.top_p,
        "tool_choice": request.tool_choice or "auto",
        "tools": request.tools or [],
        "text": request.text or {"format": {"type": "text"}},
        "reasoning": request.reasoning or {"effort": None, "summary": None},
        "metadata": request.metadata or {},
        "store": False,
        "truncation": "disabled",
        "previous_response_id": None,
    }
    return Ask(
        job, bool(request.stream), lambda turns: body(meta, shown, turns[0]), lambda: Writer(meta, shown)
    )


def _tool(number: int, tool: Any) -> dict[str, Any]:
    """A tool in the chat API's form: here its fields stand at the top."""
    if not isinstance(tool, Mapping) or tool.get("type") != "function":
        kind = tool.get("type") if isinstance(tool, Mapping) else type(tool).__name__
        told = f"only functions can be used here, not a tool of type {kind!r:.80}"
        raise Refusal(400, told, f"tools.{number}.type", "unsupported")
    names = ("name", "description", "parameters", "strict")
    return {"type": "function", "function": {k: v for k, v in tool.items() if k in names and v is not None}}


def messages_of(raw: str | Sequence[Any], instructions: str | None) -> list[dict[str, Any]]:
    """Input items as messages: reasoning, text and calls that follow each other are one assistant message."""
    messages: list[dict[str, Any]] = []
    if instructions:
        messages.append({"role": "system", "content": instructions})
    if isinstance(raw, str):
        return [*messages, {"role": "user", "content": raw}]
    for number, item in enumerate(raw):
        place = f"input.{number}"
        if not isinstance(item, Mapping):
            raise Refusal(400, "an item of the input must be an object", place, "invalid_type")
        kind = item.get("type", "message")
        if kind == "message":
            _message(messages, item, place)
        elif kind == "reasoning":
            content, summary = (_thoughts(item, field, place) for field in ("content", "summary"))
            turn = _assistant(messages, fresh=True)
            turn["reasoning_content"] = content or summary
        elif kind == "function_call":
            _call(messages, item, place)
        elif kind == "function_call_output":
            call_id, output = item.get("call_id"), item.get("output", "")
            if not isinstance(call_id, str):
                raise Refusal(400, "call_id must be a string", f"{place}.call_id", "invalid_type")
            text = output if isinstance(output, str) else _text(output, f"{place}.output")
            messages.append({"role": "tool", "tool_call_id": call_id, "content": text})
        else:
            raise Refusal(
                400, f"an item of type {kind!r:.80} can't be read here", f"{place}.type", "unsupported"
            )
    return [{k: v for k, v in message.items() if v != "" or k == "content"} for message in messages]


def _thoughts(item: Mapping[str, Any], field: str, place: str) -> str:
    """The text of a reasoning item's content or summary."""
    parts = item.get(field)
    if not isinstance(parts, list | None):
        raise Refusal(400, f"{field} must be a list of parts", f"{place}.{field}", "invalid_type")
    for number, part in enumerate(parts or ()):
        if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
            told = "a part of reasoning must be an object with a string 'text'"
            raise Refusal(400, told, f"{place}.{field}.{number}", "invalid_type")
    return "".join(part["text"] for part in parts or ())


def _message(messages: list[dict[str, Any]], item: Mapping[str, Any], place: str) -> None:
    role = item.get("role")
    if role not in ("user", "assistant", "system", "developer"):
        raise Refusal(400, f"the role {role!r:.80} is unknown", f"{place}.role", "invalid_value")
    text = _text(item.get("content"), f"{place}.content")
    if role == "assistant":
        turn = _assistant(messages, fresh=False)
        if turn["content"] or turn.get("tool_calls"):
            turn = _assistant(messages, fresh=True)
        turn["content"] = text
    else:
        messages.append({"role": "system" if role == "developer" else role, "content": text})


def _call(messages: list[dict[str, Any]], item: Mapping[str, Any], place: str) -> None:
    for field in ("call_id", "name", "arguments"):
        if not isinstance(item.get(field), str):
            raise Refusal(400, f"{field} must be a string", f"{place}.{field}", "invalid_type")
    function = {"name": item["name"], "arguments": item["arguments"]}
    call = {"id": item["call_id"], "type": "function", "function": function}
    _assistant(messages, fresh=False).setdefault("tool_calls", []).append(call)


def _assistant(messages: list[dict[str, Any]], *, fresh: bool) -> dict[str, Any]:
    """The assistant message that stands last, or a new one."""
    if fresh or not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": ""})
    return messages[-1]


def _text(content: Any, place: str) -> str:
    """The text of a message or an output."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise Refusal(400, "content must be text or a list of parts", place, "invalid_type")
    texts = []
    for number, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        text = part.get("refusal" if kind == "refusal" else "text") if isinstance(part, Mapping) else None
        known = kind in ("input_text", "output_text", "text", "refusal")
        if known and not isinstance(text, str):
            field = "refusal" if kind == "refusal" else "text"
            raise Refusal(400, f"{field} must be a string", f"{place}.{number}.{field}", "invalid_type")
        if not known or not isinstance(text, str):
            told = f"a part of type {json.dumps(kind, default=str)[:80]} can't be read here"
            raise Refusal(400, told, f"{place}.{number}", "unsupported")
        texts.append(text)
    return "\n\n".join(texts)
