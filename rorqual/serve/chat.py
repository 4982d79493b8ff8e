"""`/v1/chat/completions`: DeepSeek's form of OpenAI's (facts 5)."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from rorqual.serve.ask import Ask
from rorqual.serve.body import Drawn, between, parse, stops_of
from rorqual.serve.driver import Job
from rorqual.serve.errors import Refusal, speaking
from rorqual.serve.inside import Pane, Watcher, Wish, facts_of, wish_of
from rorqual.serve.meta import Meta
from rorqual.serve.parts import (
    CallArguments,
    CallStart,
    Content,
    End,
    Glimpse,
    Part,
    Reasoning,
    TokenInfo,
    Usage,
)
from rorqual.serve.service import Service, Talk
from rorqual.serve.tools import read_choice, read_format, read_tools
from rorqual.serve.turn import Turn, usage_of
from rorqual.serve.wire import dump, event
from rorqual.text import Tokenizer

HOLE = "\0text\0"
"""Stands for a text."""

MESSAGE_FIELDS = (
    "role", "content", "name", "reasoning_content", "tool_calls", "tool_call_id", "prefix", "tools",
    "response_format", "content_blocks", "task", "wo_eos", "refusal", "audio", "annotations", "function_call",
)  # fmt: skip
"""Fields of a message that mean something here; others are left out, or refused in strict mode."""


class ChatRequest(Drawn):
    """The fields of a request. What stands last is taken and has no effect."""

    messages: list[Any]
    model: str | None = None
    thinking: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    max_completion_tokens: int | None = None
    tools: list[Any] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    inside: bool | dict[str, Any] | None = None
    user: Any = None
    user_id: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    verbosity: Any = None


def job_of(request: ChatRequest, service: Service, wish: Wish | None = None) -> Job:
    """The job that a request asks for; `wish`: what it asks of the model's inside. Raises Refusal."""
    service.check_model(request.model)
    drawing = request.drawing(service.settings.max_choices)
    between("top_logprobs", request.top_logprobs, 0, 20)
    if request.top_logprobs and not request.logprobs:
        raise Refusal(400, "top_logprobs needs logprobs: true", "top_logprobs", "invalid_value")
    tools = read_tools(request.tools)
    content, schema = read_format(request.response_format)
    talk = Talk(
        messages=messages_of(request.messages, service.settings.strict),
        tools=tools,
        choice=read_choice(request.tool_choice, tools, request.parallel_tool_calls),
        thinking=thinking_of(request.thinking),
        effort=request.reasoning_effort,
        content=content,
        schema=schema,
    )
    top = (request.top_logprobs or True) if request.logprobs else None
    if wish is not None:  # for both the same figures, from which each takes what it asked for
        top = max(request.top_logprobs or 0, wish.alternatives) or True
    limit = request.max_completion_tokens if request.max_tokens is None else request.max_tokens
    names = {"max_tokens": "max_completion_tokens"} if request.max_tokens is None else {}
    with speaking(names):
        return service.talk(
            talk,
            limit=limit,
            n=request.n or 1,
            stops=stops_of(request.stop),
            logprobs=top,
            inside=wish.inside if wish is not None and wish.looks else None,
            watcher=None if wish is None else lambda: Watcher(wish.looks),
            **drawing,
        )


def thinking_of(raw: Mapping[str, Any] | None) -> bool | None:
    """`thinking: {"type": "enabled" | "disabled"}`."""
    kind = (raw or {}).get("type")
    if raw is None or kind == "adaptive":
        return None
    if kind not in ("enabled", "disabled"):
        raise Refusal(
            400, f"thinking.type is {kind!r:.80}; use enabled or disabled", "thinking.type", "invalid_value"
        )
    return bool(kind == "enabled")


def messages_of(raw: Sequence[Any], strict: bool) -> list[Any]:
    """Messages as `rorqual.text` takes them: a developer's are the system's, unknown fields go."""
    messages: list[Any] = []
    for number, message in enumerate(raw):
        if isinstance(message, Mapping):
            unknown = next((field for field in message if field not in MESSAGE_FIELDS), None)
            if unknown is not None and strict:
                place = f"messages.{number}.{unknown}"[:200]
                raise Refusal(400, f"unknown field: {place}", place, "unknown_field")
            message = {k: v for k, v in message.items() if k in MESSAGE_FIELDS}
            if message.get("role") == "developer":
                message["role"] = "system"
        messages.append(message)
    return messages


# ---- what is sent back


def body(meta: Meta, turns: Sequence[Turn], tokenizer: Tokenizer) -> dict[str, Any]:
    """The whole answer."""
    choices = []
    for index, turn in enumerate(turns):
        message: dict[str, Any] = {
            "role": "assistant",
            "content": turn.content or (None if turn.calls else ""),
        }
        if turn.reasoning or turn.reasoning_tokens:
            message["reasoning_content"] = turn.reasoning
        if turn.calls:
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for call in turn.calls
            ]
        choice = {"index": index, "message": message, "logprobs": None, "finish_reason": turn.finish}
        if meta.logprobs:
            choice["logprobs"] = _logprobs(turn.content_tokens, turn.reasoning_tokens, tokenizer, meta.top)
        choices.append(choice | _problem(turn.end))
    return _head(meta, "chat.completion") | {"choices": choices, "usage": usage(usage_of(turns))}


class Chunks:
    """The parts of an answer as chunks of a stream, in order."""

    def __init__(
        self,
        meta: Meta,
        tokenizer: Tokenizer,
        *,
        n: int = 1,
        include_usage: bool = False,
        pane: Pane | None = None,
    ) -> None:
        self.meta, self.tokenizer, self.include_usage = meta, tokenizer, include_usage
        self._pane = pane
        self._glimpses: dict[int, list[Glimpse]] = {}
        self._head = _head(meta, "chat.completion.chunk") | ({"usage": None} if include_usage else {})
        self._opened = [False] * n
        self._usage = Usage()

    def feed(self, index: int, part: Part) -> Iterator[dict[str, Any]]:
        """The chunks of one part."""
        if not self._opened[index]:
            self._opened[index] = True
            yield self._chunk(index, {"role": "assistant", "content": ""})
        if isinstance(part, Glimpse):  # for the next chunk; if another comes before it, for one of its own
            if index in self._glimpses:
                yield self._chunk(index, {}) | self._told(index)
            self._glimpses.setdefault(index, []).append(part)
            return
        for chunk in self._chunks(index, part):
            yield chunk | self._told(index)

    def alike(self, index: int, part: Part) -> Hashable:
        """A name for parts that make one chunk, the same but for its text; None for others."""
        plain = type(part) is Content or type(part) is Reasoning
        if plain and self._opened[index] and not self.meta.logprobs and index not in self._glimpses:
            return index, type(part)
        return None

    def _told(self, index: int) -> dict[str, Any]:
        """What goes with the next chunk of a choice from inside, if anything."""
        glimpses = self._glimpses.pop(index, None)
        return {} if glimpses is None or self._pane is None else {"inside": self._pane.told(index, glimpses)}

    def _chunks(self, index: int, part: Part) -> Iterator[dict[str, Any]]:
        match part:
            case Reasoning(text, tokens):
                yield self._chunk(index, {"reasoning_content": text}, logprobs=([], tokens))
            case Content(text, tokens):
                yield self._chunk(index, {"content": text}, logprobs=(tokens, []))
            case CallStart(number, call_id, name):
                function = {"name": name, "arguments": ""}
                call = {"index": number, "id": call_id, "type": "function", "function": function}
                yield self._chunk(index, {"tool_calls": [call]})
            case CallArguments(number, text):
                call = {"index": number, "function": {"arguments": text}}
                yield self._chunk(index, {"tool_calls": [call]})
            case End():
                self._usage = self._usage + part.usage
                yield self._chunk(index, {}, part.finish, **_problem(part))

    def end(self) -> Iterator[dict[str, Any]]:
        """After all parts: the usage, if asked for."""
        if self.include_usage:
            yield self._head | {"choices": [], "usage": usage(self._usage)}

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        finish: str | None = None,
        logprobs: tuple[Sequence[TokenInfo], Sequence[TokenInfo]] | None = None,
        **extra: Any,
    ) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}
        if logprobs is not None and self.meta.logprobs:
            choice["logprobs"] = _logprobs(*logprobs, self.tokenizer, self.meta.top)
        return self._head | {"choices": [choice | extra]}


def usage(total: Usage) -> dict[str, Any]:
    """`usage` with DeepSeek's and OpenAI's names."""
    return {
        "prompt_tokens": total.prompt,
        "completion_tokens": total.completion,
        "total_tokens": total.prompt + total.completion,
        "prompt_cache_hit_tokens": total.cached,
        "prompt_cache_miss_tokens": total.prompt - total.cached,
        "prompt_tokens_details": {"cached_tokens": total.cached},
        "completion_tokens_details": {"reasoning_tokens": total.reasoning},
    }


def _head(meta: Meta, kind: str) -> dict[str, Any]:
    return {
        "id": meta.id,
        "object": kind,
        "created": meta.created,
        "model": meta.model,
        "system_fingerprint": meta.fingerprint,
    }


def _problem(end: End | None) -> dict[str, Any]:
    """What broke the output format, in a field of our own: never as content, and never lost."""
    if end is None or end.problem is None:
        return {}
    return {"format_problem": {"message": end.problem, "text": end.unparsed}}


def _logprobs(
    content: Sequence[TokenInfo], reasoning: Sequence[TokenInfo], tokenizer: Tokenizer, most: int
) -> dict[str, Any]:
    told: dict[str, Any] = {"content": [_token(info, tokenizer, most) for info in content], "refusal": None}
    if reasoning:
        told["reasoning_content"] = [_token(info, tokenizer, most) for info in reasoning]
    return told


def _token(info: TokenInfo, tokenizer: Tokenizer, most: int) -> dict[str, Any]:
    top = [_spelled(token, logprob, tokenizer) for token, logprob in info.top[:most]]
    return _spelled(info.id, info.logprob, tokenizer) | {"top_logprobs": top}


def _spelled(token: int, logprob: float, tokenizer: Tokenizer) -> dict[str, Any]:
    raw = tokenizer.bytes_of(token)
    return {"token": raw.decode("utf-8", "replace"), "logprob": max(logprob, -9999.0), "bytes": list(raw)}


class Writer:
    """A stream of chunks, and `[DONE]` at its end."""

    def __init__(self, chunks: Any) -> None:
        self.chunks = chunks
        self._frames: dict[Hashable, tuple[bytes, bytes]] = {}
        """What stands before and after the text of chunks that are alike."""

    def start(self) -> Iterator[bytes]:
        """Nothing stands before the first chunk."""
        return iter(())

    def feed(self, index: int, part: Part) -> Iterable[bytes]:
        """A part's chunks."""
        kind = self.chunks.alike(index, part)
        if kind is None or not isinstance(part, Content | Reasoning):
            return map(event, self.chunks.feed(index, part))
        if kind not in self._frames:
            (chunk,) = self.chunks.feed(index, replace(part, text=HOLE))
            before, _, after = event(chunk).rpartition(dump(HOLE))  # what may hold anything stands before it
            self._frames[kind] = before, after
        before, after = self._frames[kind]
        return (before + dump(part.text) + after,)

    def end(self) -> Iterator[bytes]:
        """The usage, and the end."""
        yield from map(event, self.chunks.end())
        yield b"data: [DONE]\n\n"


def ask(raw: bytes, service: Service) -> Ask:
    """Understand a request. Raises Refusal."""
    request = parse(ChatRequest, raw, strict=service.settings.strict)
    wish = wish_of(request.inside, bool(request.stream), service)
    job = job_of(request, service, wish)
    meta = Meta(service.settings.name, logprobs=bool(request.logprobs), top=request.top_logprobs or 0)
    tokenizer, n = service.tokenizer, len(job.answers)
    facts, prompt = facts_of(service), len(job.answers[0].prompt)
    pane = None if wish is None or facts is None else Pane(wish, facts, prompt, tokenizer, n)
    include = wants_usage(request.stream_options)
    return Ask(
        job,
        bool(request.stream),
        lambda turns: body(meta, turns, tokenizer),
        lambda: Writer(Chunks(meta, tokenizer, n=n, include_usage=include, pane=pane)),
    )


def wants_usage(options: Mapping[str, Any] | None) -> bool:
    """`stream_options.include_usage`."""
    value = (options or {}).get("include_usage")
    if value is not None and not isinstance(value, bool):
        where = "stream_options.include_usage"
        raise Refusal(422, f"{where}: Input should be a valid boolean", where, "invalid_type")
    return bool(value)
