"""What every route shares: the model and its engine, the settings, and the way from checked fields to a `Job`."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from rorqual.engine import Grammar, GrammarError, Inside, Sampling
from rorqual.engine.prompts import answers_of
from rorqual.nn import ContextError
from rorqual.serve.driver import Driver, Job
from rorqual.serve.errors import Refusal, refusal_of
from rorqual.serve.memory import Memory
from rorqual.serve.parts import End, Reader
from rorqual.serve.settings import Settings
from rorqual.serve.tools import Choice, banned, grammar_of
from rorqual.text import Encoding, Tokenizer
from rorqual.text.tokens import END_THINK

if TYPE_CHECKING:
    from rorqual.serve.inside import Watcher

EFFORTS = {
    "none": None, "minimal": "low", "low": "low", "medium": "high", "high": "high", "xhigh": "high",
    "max": "max", "ultra": "max",
}  # fmt: skip
"""Names of efforts that clients send, and DeepSeek's."""


@dataclass(frozen=True)
class Talk:
    """A conversation to be answered, whatever API it came by. Messages and tools are OpenAI-shaped and checked as
    far as `rorqual.text` does not. thinking None: the model's default."""

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] = ()
    choice: Choice = field(default_factory=Choice)
    thinking: bool | None = None
    effort: str | None = None
    content: Grammar | None = None
    schema: Mapping[str, Any] | None = None


class Service:
    """A model, served. `model` is a `rorqual.Model`, `engine` the engine it runs in."""

    def __init__(self, model: Any, engine: Any, settings: Settings | None = None) -> None:
        self.model, self.engine = model, engine
        self.settings = settings or Settings()
        self.driver = Driver(engine, model.device)
        self.memory = Memory(self.settings.remembered)
        self.created = int(time.time())
        self.active = 0
        """Answers taken and not finished."""
        self.draining = False

    # ------------------------------------------------------------------------------------ the model

    @property
    def tokenizer(self) -> Tokenizer:
        if self.model.tokenizer is None:
            raise Refusal(
                400, "this model was loaded without a tokenizer: give token ids", code="unsupported"
            )
        tokenizer: Tokenizer = self.model.tokenizer
        return tokenizer

    @property
    def encoding(self) -> Encoding:
        if self.model.encoding is None:
            told = "this model has no chat format: use /v1/completions with plain text"
            raise Refusal(400, told, "messages", "unsupported")
        encoding: Encoding = self.model.encoding
        return encoding

    @property
    def context(self) -> int:
        """Tokens that a prompt and its answer may have together."""
        positions = int(self.model.config.max_positions)
        pages = getattr(self.engine, "pages", None)
        return positions if pages is None else min(positions, pages.total * pages.page_size)

    def check_model(self, name: str | None) -> None:
        """Refuse a model that isn't served here."""
        if name is not None and name != self.settings.name and name not in self.settings.aliases:
            told = f"the model {name!r:.200} does not exist; this server has {self.settings.name!r}"
            raise Refusal(404, told, "model", "model_not_found")

    # ------------------------------------------------------------------------------------ admission

    def admit(self, answers: int) -> None:
        """Count answers in, or turn them away. `release` counts them out."""
        wait = {"retry-after": str(self.settings.retry_after)}
        if self.draining:
            raise Refusal(503, "the server is shutting down", code="draining", headers=wait)
        if not self.driver.alive:
            raise Refusal(503, "the engine does not run", code="unavailable")
        if answers > self.settings.max_queue:
            raise Refusal(400, f"this server makes at most {self.settings.max_queue} answers at once", "n")
        if self.active + answers > self.settings.max_queue:
            told = f"{self.active} answers are under way or wait already: try again later"
            raise Refusal(429, told, code="queue_full", headers=wait)
        self.active += answers

    def release(self, answers: int) -> None:
        """Answers are over."""
        self.active -= answers

    # ----------------------------------------------------------------------------------------- jobs

    def sampling(self, limit: int | None, used: int, **options: Any) -> Sampling:
        """A `Sampling` of the fields that a request gave (None: not given). `limit`: most tokens of the answer."""
        given = {name: value for name, value in options.items() if value is not None}
        if "top_p" in given:  # 0, which APIs allow, leaves the likeliest token
            given["top_p"] = max(given["top_p"], 1e-9)
        room = self.context - used
        if room < 1:
            told = f"the prompt has {used} tokens, and the context ends at {self.context}: shorten it"
            raise ContextError(told)
        if limit is None:
            given["max_new_tokens"] = min(room, self.settings.max_tokens or room)
        else:
            given["max_new_tokens"] = limit if limit < 1 else min(limit, room)
        return Sampling(**given)

    def talk(
        self,
        talk: Talk,
        *,
        limit: int | None = None,
        n: int = 1,
        stops: Sequence[str] = (),
        call_id: str = "call_{}",
        inside: Inside | None = None,
        watcher: Callable[[], Watcher] | None = None,
        **options: Any,
    ) -> Job:
        """The job of answering a conversation; `options` as of `Sampling`. `inside`: what the engine is to tell;
        `watcher` makes what puts it together for an answer. Raises Refusal."""
        encoding, tokenizer = self.encoding, self.tokenizer
        if (
            len(talk.messages) > self.context
        ):  # each takes a token at least: said before they are all written out
            told = f"{len(talk.messages)} messages are more than the context of {self.context} tokens holds"
            raise Refusal(400, told, "messages", "context_length_exceeded")
        thinking, effort = thinks(talk, encoding)
        if talk.tools and not encoding.supports_tools:
            raise Refusal(400, "this model's chat format has no tools", "tools", "unsupported")
        if talk.tools and thinking and encoding.tools == "chat":
            raise Refusal(400, "this model calls tools only without thinking", "thinking", "unsupported")
        options_of = {"tools": talk.tools or None, "thinking": thinking}
        messages, known = self.memory.recall(talk.messages)
        try:
            prompt = encoding.encode_ids(
                messages,
                tokenizer,
                replay=known,
                effort=effort,
                response_format=talk.schema if encoding.schema else None,
                **options_of,
            )
            last = messages[-1]
            prefix = last if last.get("prefix") else None
            calls = bool(talk.tools) and talk.choice.mode != "none"
            history = encoding.supports_tools and any(message.get("tool_calls") for message in messages)
            tools: Any = talk.tools if calls else history and talk.choice.mode != "none"
            parsers = [encoding.parser(thinking=thinking, tools=tools, prefix=prefix) for _ in range(n)]
            starts = parsers[0].inside
        except ValueError as error:
            raise refusal_of(error) from error
        try:
            grammar = grammar_of(encoding, tokenizer, talk.tools, talk.choice, talk.content)
        except GrammarError as error:
            raise refusal_of(error, grammar="tools") from error
        asked_by = "response_format" if grammar is talk.content else "tools"
        if grammar is not None and prefix is not None and prefix.get("content"):
            told = "an answer that continues a prefix can't be held to a format"
            raise Refusal(400, told, "response_format", "invalid_value")
        reasons = starts == "reasoning" or (starts == "opening" and _may_think(encoding, thinking))
        one_call = not talk.choice.parallel and grammar is talk.content  # else the grammar sees to it
        if grammar is not None and reasons:
            grammar = grammar.after(END_THINK)
        bias = dict(options.pop("logit_bias", None) or {})
        if talk.tools and talk.choice.mode == "none":
            bias = banned(encoding, tokenizer) | bias
        options |= {"logit_bias": bias or None, "grammar": grammar}
        readers = [
            Reader(
                parser,
                stops=stops,
                new_id=lambda index: call_id.format(secrets.token_hex(12)),
                logprobs=options.get("logprobs") not in (None, False),
                one_call=one_call,
                watcher=watcher() if watcher is not None else None,
            )
            for parser in parsers
        ]
        try:
            job = self.job(prompt, readers, limit, asked_by=asked_by, inside=inside, **options)
        except Refusal as refusal:
            if refusal.code == "invalid_grammar" and talk.content is not None:
                self._check_content(talk.content)
            raise
        return replace(job, on_end=self._remember)

    def job(
        self,
        prompt: list[int],
        readers: list[Reader],
        limit: int | None,
        *,
        param: str | None = None,
        asked_by: str = "response_format",
        inside: Inside | None = None,
        **options: Any,
    ) -> Job:
        """The job of continuing ids, once a reader. `param`: the field that holds the prompt, `asked_by`: the one that
        asked for the grammar."""
        try:
            sampling = self.sampling(limit, len(prompt), **options)
            return Job(answers_of(self.model, [prompt] * len(readers), sampling, inside), readers)
        except ValueError as error:
            raise refusal_of(error, param=param, grammar=asked_by) from error

    def _check_content(self, content: Grammar) -> None:
        """Refuse a grammar of the content that is bad by itself, not only beside tools."""
        try:
            self.model.compiler.state(content)
        except GrammarError as error:
            raise refusal_of(error) from error

    def _remember(self, reader: Reader, end: End) -> None:
        """Keep the tokens of an answer that can go back into a context as it is."""
        if reader.stopped or reader.parsed is None:
            return
        ids = reader.ids
        if ids and ids[-1] in self.model.end_ids:
            ids = ids[:-1]
        self.memory.keep(ids, reader.parsed, reader.calls, self.encoding, self.tokenizer)


def thinks(talk: Talk, encoding: Encoding) -> tuple[bool | None, str | None]:
    """Whether to think, and how hard, in the terms of an encoding."""
    if talk.effort is not None and talk.effort not in EFFORTS:
        told = f"reasoning_effort {talk.effort!r:.80} is unknown; use one of {', '.join(EFFORTS)}"
        raise Refusal(400, told, "reasoning_effort", "invalid_value")
    thinking, effort = talk.thinking, EFFORTS.get(talk.effort or "none")
    if thinking is None and talk.effort is not None and encoding.thinking == "choice":
        fits = encoding.tools != "chat" or not talk.tools
        thinking = effort is not None if effort is None or fits else None
    if encoding.thinking == "never":
        if thinking:
            raise Refusal(400, "this model does not think", "thinking", "unsupported")
        thinking = None
    if encoding.thinking == "always" and thinking is False:
        if talk.thinking is False:
            raise Refusal(400, "this model always thinks", "thinking", "unsupported")
        thinking = None
    return thinking, effort if effort in encoding.efforts and thinking is not False else None


def _may_think(encoding: Encoding, thinking: bool | None) -> bool:
    return encoding.thinking == "always" or (encoding.default_thinking if thinking is None else thinking)
