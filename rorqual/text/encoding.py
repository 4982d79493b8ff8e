"""`Encoding`: how one generation writes a conversation and how its answers are read, behind one interface.

A generation is data plus one pure function `render(messages, request) -> str`; this file checks what a caller
asks for against what the generation has, so that nothing is ever silently ignored.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from rorqual.text.messages import EXTRA_FIELDS, EncodingError, Message, check, check_tools, to_json
from rorqual.text.parser import Grammar, StreamParser
from rorqual.text.tokenizer import MARK, Tokenizer
from rorqual.text.tokens import END_THINK, THINK

_TAGS = (THINK, END_THINK)
_PLACE = re.compile("\ufdd1(\\d+)\ufdd2" + MARK + "?")  # noncharacters: where a model's own tokens go back
_SPLIT_TAGS = re.compile(f"({THINK}|{END_THINK})")


@dataclass(frozen=True, slots=True)
class Request:
    """What the caller asked for, after checking. `tools` are function objects; `generate`: end with the text
    that opens the assistant's turn. `mark`: to be applied to a caller's text other than contents and reasoning as it
    is written (see `Encoding.encode_ids`)."""

    tools: tuple[Mapping[str, Any], ...]
    thinking: bool
    effort: str | None
    response_format: Mapping[str, Any] | None
    generate: bool
    drop_thinking: bool
    default_system: str | None
    mark: Callable[[str], str] = str


@dataclass(frozen=True, slots=True)
class Emitted:
    """The tokens in which a model wrote an assistant turn: the answer with its calls, up to but without the end
    token, and the reasoning before `</think>` (None: to be encoded from the message)."""

    answer: Sequence[int]
    reasoning: Sequence[int] | None = None


@dataclass(frozen=True, slots=True)
class Encoding:
    """A generation's chat format.

    roles, fields: the roles and extra message fields it knows. thinking: "never", "always", or "choice" with
    `default_thinking`. opens_thinking: the prompt itself writes `<think>`. tools: "never", "chat" (without
    thinking only) or "always". efforts: accepted values of `effort`. schema: it has a response-format
    section. default_system: written when a conversation has no system message (replace it with
    dataclasses.replace). loose_parts: content that is not text is named instead of refused. reads_think_tags:
    think tags in an assistant's content are markup.
    """

    name: str
    render: Callable[[Sequence[Message], Request], str]
    grammar: Grammar
    roles: tuple[str, ...] = ("system", "user", "assistant")
    fields: tuple[str, ...] = ()
    thinking: Literal["never", "always", "choice"] = "never"
    default_thinking: bool = False
    opens_thinking: bool = True
    tools: Literal["never", "chat", "always"] = "never"
    efforts: tuple[str, ...] = ()
    schema: bool = False
    default_system: str | None = None
    loose_parts: bool = False
    reads_think_tags: bool = False

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts at which generation ends."""
        return self.grammar.stops

    @property
    def supports_thinking(self) -> bool:
        """Whether answers can have reasoning."""
        return self.thinking != "never"

    @property
    def supports_tools(self) -> bool:
        """Whether the format has tool calls."""
        return self.tools != "never"

    def encode(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        thinking: bool | None = None,
        effort: str | None = None,
        response_format: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
        drop_thinking: bool = True,
    ) -> str:
        """The conversation as text, from the BOS text (where the generation has one) to the end.

        messages: OpenAI-shaped. tools: OpenAI tools, described to the model. thinking: None takes the
        generation's default. effort: V4's "high" or "max"; it has no effect without thinking.
        response_format: a JSON schema for the answer. add_generation_prompt: open the assistant's turn,
        unless the last message is the assistant's own. drop_thinking: leave out the reasoning of past turns
        as the generation was served; False writes it all, as the model would have written it (for training).
        A last assistant message with `prefix: true` is left open: its content continues the answer, its
        reasoning_content alone continues the reasoning.

        Raises EncodingError for a malformed conversation and for a feature the generation has not.
        """
        return self._write(
            messages, str, tools, thinking, effort, response_format, add_generation_prompt, drop_thinking
        )

    def encode_ids(
        self,
        messages: Sequence[Mapping[str, Any]],
        tokenizer: Tokenizer,
        *,
        replay: Mapping[int, Emitted] | None = None,
        **options: Any,
    ) -> list[int]:
        """The conversation as ids: those of `tokenizer.encode(self.encode(messages, **options))`, except that
        a special token spelled out in what the caller gave (contents, reasoning, calls, tools, schema) stays
        ordinary text, so that no user can write a turn of his own. `options`: as of `encode`.

        Think tags in an assistant's content stay markup where the format reads them (R1, V3.1). Raises
        EncodingError also for text that holds the noncharacter U+FDD0.

        replay: by place in `messages`, assistant turns whose tokens are known: those stand in the ids in place
        of what encoding the turn anew would give, which may differ (another split into tokens, another layout of
        arguments). Reasoning that the format drops stays dropped. Formats without tools encode anew.
        """
        plain = self.encode(messages, **options)
        if MARK in plain:
            raise EncodingError("the conversation holds the noncharacter U+FDD0; take it out")
        names = ("tools", "thinking", "effort", "response_format", "add_generation_prompt", "drop_thinking")
        given = dict(zip(names, (None, None, None, None, True, True), strict=True)) | options
        marked = self._write(messages, tokenizer.mark, *(given[name] for name in names))
        if marked.replace(MARK, "") != plain:
            raise EncodingError("special tokens in the contents change the form of the conversation")
        if not replay or not self.supports_tools or _PLACE.search(plain):
            return tokenizer.encode_marked(marked)
        text = self._write(messages, tokenizer.mark, *(given[name] for name in names), replay=replay)
        ids: list[int] = []
        for number, part in enumerate(_PLACE.split(text)):
            if number % 2:
                emitted = replay[int(part) // 2]
                ids += emitted.answer if int(part) % 2 == 0 else emitted.reasoning or ()
            elif part:
                ids += tokenizer.encode_marked(part)
        return ids

    def _write(
        self,
        messages: Sequence[Mapping[str, Any]],
        mark: Callable[[str], str],
        tools: Sequence[Mapping[str, Any]] | None,
        thinking: bool | None,
        effort: str | None,
        response_format: Mapping[str, Any] | None,
        add_generation_prompt: bool,
        drop_thinking: bool,
        *,
        replay: Mapping[int, Emitted] | None = None,
    ) -> str:
        """`encode`, with `mark` applied to all the caller's text, and places for the turns of `replay`."""
        checked = check(messages, loose_parts=self.loose_parts)
        thinks = self._thinks(thinking)
        functions = check_tools(tools) if tools else ()
        if functions and not self._calls(thinks):
            raise self._lacks("tools", "with thinking" if self.supports_tools else "")
        if effort is not None and effort not in self.efforts:
            known = f"use one of {', '.join(self.efforts)}" if self.efforts else "leave it out"
            raise EncodingError(f"effort={effort!r} is not possible with encoding {self.name!r}; {known}")
        if response_format is not None:
            if not self.schema:
                raise self._lacks("response_format")
            if not isinstance(response_format, Mapping):
                raise EncodingError(
                    f"response_format is a {type(response_format).__name__}; give a JSON schema"
                )
            to_json(response_format, "response_format")
        for message in checked:
            self._check_message(message, messages[message.index])
        request = Request(
            tools=functions,
            thinking=thinks,
            effort=effort,
            response_format=response_format,
            generate=add_generation_prompt and checked[-1].role != "assistant",
            drop_thinking=drop_thinking,
            default_system=self.default_system,
            mark=mark,
        )
        written = [self._marked(message, mark) for message in checked]
        for place, message in enumerate(written):
            emitted = (replay or {}).get(message.index)
            if emitted is not None and message.role == "assistant":
                own = emitted.reasoning is not None and message.reasoning
                written[place] = replace(
                    message,
                    emitted=f"\ufdd1{2 * message.index}\ufdd2",
                    reasoning=f"\ufdd1{2 * message.index + 1}\ufdd2" if own else message.reasoning,
                )
        return self.render(written, request)

    def _marked(self, message: Message, mark: Callable[[str], str]) -> Message:
        def marked(text: str) -> str:
            if message.role == "assistant" and self.reads_think_tags:
                return "".join(
                    part if part in _TAGS else mark(part).removesuffix(MARK)
                    for part in _SPLIT_TAGS.split(text)
                )
            return mark(text)

        blocks = tuple(replace(block, text=marked(block.text)) for block in message.blocks)
        return replace(message, blocks=blocks, reasoning=mark(message.reasoning))

    def parser(
        self,
        *,
        thinking: bool | None = None,
        tools: object = None,
        prefix: Mapping[str, Any] | None = None,
        strict: bool = False,
    ) -> StreamParser:
        """A parser for one answer. Give it what `encode` was given.

        tools: the list, or a bool; None means whether the generation has them. Without tools, call markup is
        ordinary content. prefix: the last message when it had `prefix: true`, so that reading starts where
        the prompt stopped. strict: raise ToolCallError instead of reporting problems.
        """
        thinks = self._thinks(thinking)
        calls = self.supports_tools if tools is None else bool(tools)
        if tools and not self._calls(thinks):
            raise self._lacks("tools", "with thinking" if self.supports_tools else "")
        if tools and not isinstance(tools, bool):
            check_tools(tools)
        start = "turn"
        if prefix is not None and prefix.get("content"):
            start = "content"
        elif prefix is not None and prefix.get("reasoning_content") and thinks:
            start = "reasoning"
        return StreamParser(
            self.grammar, start=start, thinking=thinks, opened=self.opens_thinking, tools=calls, strict=strict
        )

    def _thinks(self, thinking: bool | None) -> bool:
        if thinking is None:
            return self.default_thinking or self.thinking == "always"
        if thinking and self.thinking == "never":
            raise self._lacks("thinking")
        if not thinking and self.thinking == "always":
            raise EncodingError(f"encoding {self.name!r} always thinks; leave out thinking=False")
        return bool(thinking)

    def _calls(self, thinks: bool) -> bool:
        return self.tools == "always" or (self.tools == "chat" and not thinks)

    def _check_message(self, message: Message, raw: Mapping[str, Any]) -> None:
        """Refuse what this generation has no place for."""
        where = f"message {message.index}"
        if message.role not in self.roles:
            known = ", ".join(self.roles)
            raise EncodingError(
                f"{where}: role {message.role!r} is not known to encoding {self.name!r}; use {known}"
            )
        if message.calls and not self.supports_tools:
            raise self._lacks("tool_calls", f"({where})")
        if message.reasoning and not self.supports_thinking:
            raise self._lacks("reasoning_content", f"({where})")
        for field in EXTRA_FIELDS:
            if raw.get(field) and field not in self.fields:
                raise self._lacks(field, f"({where})")

    def _lacks(self, feature: str, detail: str = "") -> EncodingError:
        return EncodingError(
            f"encoding {self.name!r} has no {feature}{' ' + detail if detail else ''}; leave it out"
        )


def system_text(messages: Sequence[Message]) -> str:
    """The texts of all system messages, joined by a blank line; empty ones leave no trace."""
    return "\n\n".join(message.text for message in messages if message.role == "system" and message.text)
