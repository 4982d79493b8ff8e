"""`/anthropic/v1/messages` and its token counting: Anthropic's form, mapped onto the same conversations.

Fields that have no meaning here are taken and ignored, as DeepSeek's own endpoint does (facts 5): cache_control,
metadata, container, mcp_servers, service_tier, the budget of thinking.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rorqual.serve.ask import Ask
from rorqual.serve.body import Body, between, parse, stops_of
from rorqual.serve.chat import thinking_of
from rorqual.serve.errors import Refusal, speaking
from rorqual.serve.meta import Meta
from rorqual.serve.parts import (
    CallArguments,
    CallStart,
    CallStop,
    Content,
    End,
    Part,
    Reasoning,
    Usage,
)
from rorqual.serve.service import Service, Talk
from rorqual.serve.tools import Choice, read_format, read_tools
from rorqual.serve.turn import Turn
from rorqual.serve.wire import event

PING = event({"type": "ping"}, "ping")


class CountRequest(Body):
    """The fields that make a prompt."""

    model: str
    messages: list[Any]
    system: str | list[dict[str, Any]] | None = None
    thinking: dict[str, Any] | None = None
    output_config: dict[str, Any] | None = None
    tools: list[Any] | None = None
    tool_choice: dict[str, Any] | None = None


class MessagesRequest(CountRequest):
    """The fields of a request; those at the end have no effect."""

    max_tokens: int
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    metadata: Any = None
    container: Any = None
    mcp_servers: Any = None
    service_tier: Any = None
    context_management: Any = None
    inference_geo: Any = None
    cache_control: Any = None


_NAMES = {
    "reasoning_effort": "output_config.effort",
    r"response_format(?:\.json_schema)?": "output_config.format",
    r"tools\.(\d+)\.function\.parameters": r"tools.\1.input_schema",
    r"tools\.(\d+)\.function": r"tools.\1",
}


@speaking(_NAMES)
def ask(raw: bytes, service: Service) -> Ask:
    """Understand a request. Raises Refusal."""
    request = parse(MessagesRequest, raw, strict=service.settings.strict)
    between("temperature", request.temperature, 0, 1)
    between("top_p", request.top_p, 0, 1)
    if request.max_tokens < 1:
        raise Refusal(400, "max_tokens must be at least 1", "max_tokens", "invalid_value")
    job = service.talk(
        talk_of(request, service),
        limit=request.max_tokens,
        stops=stops_of(request.stop_sequences, param="stop_sequences"),
        call_id="toolu_{}",
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=request.top_k,
    )
    meta = Meta(request.model, "msg_")
    return Ask(
        job,
        bool(request.stream),
        lambda turns: body(meta, turns[0]),
        lambda: Writer(meta, len(job.answers[0].prompt)),
        PING,
    )


@speaking(_NAMES)
def count(raw: bytes, service: Service) -> dict[str, int]:
    """`count_tokens`: the tokens of the prompt that a request would make."""
    request = parse(CountRequest, raw, strict=False)
    job = service.talk(talk_of(request, service), limit=1)
    return {"input_tokens": len(job.answers[0].prompt)}


def talk_of(request: CountRequest, service: Service) -> Talk:
    """The conversation that a request holds, in the form of the rest of this server."""
    if not request.model.startswith("claude-"):
        service.check_model(request.model)
    tools = read_tools([_tool(number, tool) for number, tool in enumerate(request.tools or ())] or None)
    config = request.output_config or {}
    fmt = config.get("format")
    if fmt is not None and not isinstance(fmt, Mapping):
        raise Refusal(400, "output_config.format must be an object", "output_config.format", "invalid_type")
    content, schema = read_format(fmt)
    effort = config.get("effort")
    if effort is not None and not isinstance(effort, str):
        raise Refusal(400, "output_config.effort must be a string", "output_config.effort", "invalid_type")
    thinking = thinking_of(request.thinking)
    if request.thinking is None and service.encoding.thinking == "choice":
        thinking = False  # Anthropic's default
    return Talk(
        messages=messages_of(request.messages, request.system),
        tools=tools,
        choice=choice_of(request.tool_choice, tools),
        thinking=thinking,
        effort=effort,
        content=content,
        schema=schema,
    )


def _tool(number: int, tool: Any) -> dict[str, Any]:
    """A tool in OpenAI's form."""
    if not isinstance(tool, Mapping) or tool.get("type", "custom") != "custom":
        told = "only tools of one's own (type 'custom') can be used here"
        raise Refusal(400, told, f"tools.{number}.type", "unsupported")
    names = {"name": "name", "description": "description", "input_schema": "parameters", "strict": "strict"}
    return {
        "type": "function",
        "function": {names[k]: v for k, v in tool.items() if k in names and v is not None},
    }


def choice_of(raw: Mapping[str, Any] | None, tools: Sequence[Mapping[str, Any]]) -> Choice:
    """`tool_choice` of Anthropic's API."""
    kind = "auto" if raw is None else raw.get("type")
    parallel = not (raw or {}).get("disable_parallel_tool_use")
    if kind in ("auto", "none"):
        return Choice(kind, None, parallel)
    if kind == "any" and tools:
        return Choice("required", None, parallel)
    name = (raw or {}).get("name")
    if kind == "tool" and any(tool["function"]["name"] == name for tool in tools):
        return Choice("required", name, False)
    told = f"tool_choice {json.dumps(raw, default=str)[:200]} does not fit the tools"
    raise Refusal(400, told, "tool_choice", "invalid_value")


# ---- messages


def messages_of(raw: Sequence[Any], system: Any) -> list[dict[str, Any]]:
    """Messages in OpenAI's form. A last assistant message is one to be continued."""
    messages: list[dict[str, Any]] = []
    if system:
        text = system if isinstance(system, str) else "\n\n".join(_texts(system, "system"))
        messages.append({"role": "system", "content": text})
    for number, message in enumerate(raw):
        place = f"messages.{number}"
        role = message.get("role") if isinstance(message, Mapping) else None
        if role not in ("user", "assistant", "system"):
            raise Refusal(
                400, f"role must be user or assistant, got {role!r:.80}", f"{place}.role", "invalid_value"
            )
        content = message.get("content")
        if isinstance(content, str):
            messages.append({"role": role, "content": content})
        elif isinstance(content, list):
            make = _assistant if role == "assistant" else _user
            messages += make(content, place, role)
        else:
            raise Refusal(400, "content must be text or a list of blocks", f"{place}.content", "invalid_type")
    if messages and messages[-1]["role"] == "assistant" and not messages[-1].get("tool_calls"):
        messages[-1]["prefix"] = True
    return messages


def _texts(blocks: Sequence[Any], place: str) -> list[str]:
    """The texts of blocks, all of which must be text."""
    return [_block_text(block, f"{place}.{number}") for number, block in enumerate(blocks)]


def _block_text(block: Any, place: str) -> str:
    """The text of a block, which must be text."""
    kind = block.get("type") if isinstance(block, Mapping) else type(block).__name__
    if not isinstance(block, Mapping) or kind != "text":
        raise Refusal(400, f"a block of type {kind!r:.80} can't be read here", place, "unsupported")
    text = block.get("text")
    if not isinstance(text, str):
        raise Refusal(400, "text must be a string", f"{place}.text", "invalid_type")
    return text


def _user(content: Sequence[Any], place: str, role: str) -> list[dict[str, Any]]:
    """A user's blocks: results of tools become messages of their own, before the text."""
    results: list[dict[str, Any]] = []
    texts: list[str] = []
    for number, block in enumerate(content):
        where = f"{place}.content.{number}"
        if not isinstance(block, Mapping) or block.get("type") != "tool_result":
            texts.append(_block_text(block, where))
            continue
        inner, call_id = block.get("content", ""), block.get("tool_use_id")
        if not isinstance(call_id, str):
            raise Refusal(400, "tool_use_id must be a string", f"{where}.tool_use_id", "invalid_type")
        if not isinstance(inner, str | list):
            raise Refusal(400, "content must be text or a list of blocks", f"{where}.content", "invalid_type")
        text = inner if isinstance(inner, str) else "\n\n".join(_texts(inner, f"{where}.content"))
        results.append({"role": "tool", "tool_call_id": call_id, "content": text})
    said = [{"role": role, "content": "\n\n".join(texts)}] if texts or not results else []
    return results + said


def _assistant(content: Sequence[Any], place: str, role: str) -> list[dict[str, Any]]:
    """An assistant's blocks: reasoning, text and calls."""
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    for number, block in enumerate(content):
        where = f"{place}.content.{number}"
        kind = block.get("type") if isinstance(block, Mapping) else None
        if kind == "thinking":
            if not isinstance(block.get("thinking"), str):
                raise Refusal(400, "thinking must be a string", f"{where}.thinking", "invalid_type")
            thoughts.append(block["thinking"])
        elif kind == "tool_use":
            name, call_id, given = block.get("name"), block.get("id"), block.get("input", {})
            if not isinstance(name, str) or not isinstance(call_id, str) or not isinstance(given, Mapping):
                raise Refusal(400, "tool_use needs id, name and an object input", where, "invalid_type")
            try:
                arguments = json.dumps(given, ensure_ascii=False, allow_nan=False)
            except (ValueError, RecursionError):
                raise Refusal(400, "input must be JSON", f"{where}.input", "invalid_value") from None
            function = {"name": name, "arguments": arguments}
            calls.append({"id": call_id, "type": "function", "function": function})
        elif kind != "redacted_thinking":
            texts.append(_block_text(block, where))
    message: dict[str, Any] = {"role": role, "content": "".join(texts)}
    if thoughts:
        message["reasoning_content"] = "".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    return [message]


# ---- what is sent back

_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


def _reason(end: End) -> str:
    return "stop_sequence" if end.stop is not None else _REASONS[end.finish]


def usage(used: Usage) -> dict[str, int]:
    """`usage` with Anthropic's names: what the cache gave does not count as input."""
    return {
        "input_tokens": used.prompt - used.cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": used.cached,
        "output_tokens": used.completion,
    }


def body(meta: Meta, turn: Turn) -> dict[str, Any]:
    """The whole answer."""
    content: list[dict[str, Any]] = []
    if turn.reasoning:
        content.append({"type": "thinking", "thinking": turn.reasoning, "signature": ""})
    if turn.content or not turn.calls:
        content.append({"type": "text", "text": turn.content})
    for call in turn.calls:
        content.append(
            {"type": "tool_use", "id": call.id, "name": call.name, "input": _input(call.arguments)}
        )
    end = turn.end or End("stop")
    told = _head(meta) | {"content": content, "stop_reason": _reason(end), "stop_sequence": end.stop}
    problem = (
        {} if end.problem is None else {"format_problem": {"message": end.problem, "text": end.unparsed}}
    )
    return told | {"usage": usage(end.usage)} | problem


def _head(meta: Meta) -> dict[str, Any]:
    return {"id": meta.id, "type": "message", "role": "assistant", "model": meta.model}


def _input(arguments: str) -> Any:
    """A call's arguments as an object; text that is none, of a call cut short, in Anthropic's wrapping for it."""
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        value = None
    return value if isinstance(value, dict) else {"INVALID_JSON": arguments}


class Writer:
    """A stream of events: the message, its blocks one after the other, its end."""

    def __init__(self, meta: Meta, prompt: int) -> None:
        self.meta, self.prompt = meta, prompt
        self._open: str | None = None
        self._blocks = 0

    def start(self) -> Iterator[bytes]:
        """The head of the message."""
        told = _head(self.meta) | {"content": [], "stop_reason": None, "stop_sequence": None}
        yield _event("message_start", message=told | {"usage": usage(Usage(self.prompt))})

    def feed(self, index: int, part: Part) -> Iterator[bytes]:
        """The events of one part."""
        match part:
            case Reasoning(text, _):
                yield from self._block("thinking", {"type": "thinking", "thinking": "", "signature": ""})
                yield self._delta(type="thinking_delta", thinking=text)
            case Content(text, _):
                yield from self._block("text", {"type": "text", "text": ""})
                yield self._delta(type="text_delta", text=text)
            case CallStart(number, call_id, name):
                block = {"type": "tool_use", "id": call_id, "name": name, "input": {}}
                yield from self._block(f"call {number}", block)
            case CallArguments(_, text):
                yield self._delta(type="input_json_delta", partial_json=text)
            case CallStop():
                yield from self._close()
            case End():
                if not self._blocks:
                    yield from self._block("text", {"type": "text", "text": ""})
                yield from self._close()
                told = {"stop_reason": _reason(part), "stop_sequence": part.stop}
                problem = {"message": part.problem, "text": part.unparsed}
                extra = {} if part.problem is None else {"format_problem": problem}
                yield _event("message_delta", delta=told | extra, usage=usage(part.usage))

    def end(self) -> Iterator[bytes]:
        """The end of the message."""
        yield _event("message_stop")

    def _block(self, kind: str, block: dict[str, Any]) -> Iterator[bytes]:
        """Be inside a block of this kind."""
        if self._open == kind:
            return
        yield from self._close()
        self._open = kind
        self._blocks += 1
        yield _event("content_block_start", index=self._blocks - 1, content_block=block)

    def _close(self) -> Iterator[bytes]:
        if self._open is None:
            return
        if self._open == "thinking":
            yield self._delta(type="signature_delta", signature="")
        self._open = None
        yield _event("content_block_stop", index=self._blocks - 1)

    def _delta(self, **delta: Any) -> bytes:
        return _event("content_block_delta", index=self._blocks - 1, delta=delta)


def _event(kind: str, **fields: Any) -> bytes:
    return event({"type": kind, **fields}, kind)
