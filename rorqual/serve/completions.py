"""`/v1/completions` and `/beta/completions`: plain text continued, or the text between a prefix and a suffix."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import Any

from rorqual.serve.ask import Ask
from rorqual.serve.body import Drawn, between, parse, stops_of
from rorqual.serve.chat import Writer, usage, wants_usage
from rorqual.serve.driver import Job
from rorqual.serve.errors import Refusal
from rorqual.serve.meta import Meta
from rorqual.serve.parts import Content, End, Part, Reader, TokenInfo, Usage
from rorqual.serve.service import Service
from rorqual.serve.tools import read_format
from rorqual.serve.turn import Turn, usage_of
from rorqual.text import Tokenizer, fim

MOST_PROMPTS = 128


class CompletionRequest(Drawn):
    """The fields of a request. A prompt is text or token ids; several make as many answers."""

    prompt: str | list[str] | list[int] | list[list[int]]
    model: str | None = None
    suffix: str | None = None
    echo: bool | None = None
    best_of: int | None = None
    logprobs: int | None = None
    ignore_eos: bool | None = None
    user: Any = None
    user_id: Any = None


def ask(raw: bytes, service: Service) -> Ask:
    """Understand a request. Raises Refusal."""
    request = parse(CompletionRequest, raw, strict=service.settings.strict)
    service.check_model(request.model)
    between("logprobs", request.logprobs, 0, 20)
    drawing = request.drawing(service.settings.max_choices)
    n = request.n or 1
    if request.best_of not in (None, n):
        raise Refusal(400, "best_of is not supported: leave it out", "best_of", "unsupported")
    prompts = prompts_of(request, service)
    if len(prompts) * n > service.settings.max_queue:
        raise Refusal(400, f"{len(prompts)} prompts are too many for this server", "prompt", "invalid_value")
    echoes = [echo for echo, _ in prompts] if request.echo else [""] * len(prompts)
    jobs = [_job(request, ids, n, service, drawing) for _, ids in prompts]
    job = Job([a for job in jobs for a in job.answers], [r for job in jobs for r in job.readers])
    meta = Meta(service.settings.name, "cmpl-", request.logprobs is not None)
    form = Form(meta, service.model.tokenizer, [echo for echo in echoes for _ in range(n)], n)
    include = wants_usage(request.stream_options)
    return Ask(job, bool(request.stream), form.body, lambda: Writer(Chunks(form, include)))


def prompts_of(request: CompletionRequest, service: Service) -> list[tuple[str, list[int]]]:
    """Each prompt as text to echo, and as ids."""
    given: Any = request.prompt
    many = given if isinstance(given, list) and given and not isinstance(given[0], int) else [given]
    if not given and request.suffix is None:
        raise Refusal(400, "the prompt is empty: give at least one token", "prompt", "invalid_value")
    if len(many) > MOST_PROMPTS:
        raise Refusal(400, f"{len(many)} prompts are more than {MOST_PROMPTS}", "prompt", "invalid_value")
    prompts = []
    for prompt in many:
        if request.suffix is not None:
            if not isinstance(prompt, str):
                raise Refusal(400, "a prompt with a suffix must be text", "prompt", "invalid_value")
            prompts.append((prompt, _between(prompt, request.suffix, service)))
        elif isinstance(prompt, str):
            prompts.append((prompt, service.model.encode(prompt) if service.tokenizer else []))
        else:
            told = service.tokenizer.decode(prompt) if request.echo and _known(prompt, service) else ""
            prompts.append((told, prompt))
    return prompts


def _known(ids: list[int], service: Service) -> bool:
    return all(0 <= token < service.tokenizer.vocab_size for token in ids)


def _between(prompt: str, suffix: str, service: Service) -> list[int]:
    """Fill in the middle: its tokens are those of the format, even where the texts spell others."""
    tokenizer = service.tokenizer
    whole = fim("\0", "\1")
    begin, rest = whole.split("\0")
    hole, end = rest.split("\1")
    marks = [tokenizer.id_of(mark) for mark in (begin, hole, end)]
    if None in marks:
        raise Refusal(400, "this model has no tokens to fill in the middle", "suffix", "unsupported")
    start = [tokenizer.bos] if tokenizer.bos is not None else []
    texts = [tokenizer.encode(text, special=False) for text in (prompt, suffix)]
    return [t for t in (*start, marks[0], *texts[0], marks[1], *texts[1], marks[2]) if t is not None]


def _job(
    request: CompletionRequest, ids: list[int], n: int, service: Service, drawing: dict[str, Any]
) -> Job:
    stops, (grammar, _) = stops_of(request.stop), read_format(request.response_format)
    readers = [Reader(None, stops=stops, logprobs=request.logprobs is not None) for _ in range(n)]
    return service.job(
        ids,
        readers,
        16 if request.max_tokens is None and request.suffix is None else request.max_tokens,
        param="prompt",
        logprobs=None if request.logprobs is None else request.logprobs or True,
        grammar=grammar,
        ignore_eos=request.ignore_eos,
        **drawing,
    )


class Form:
    """How answers are written: `echoes` stand before each choice's text; `n` choices belong to each prompt."""

    def __init__(self, meta: Meta, tokenizer: Tokenizer | None, echoes: Sequence[str], n: int = 1) -> None:
        self.meta, self.tokenizer, self.echoes, self.n = meta, tokenizer, echoes, n

    def head(self) -> dict[str, Any]:
        """What every body and chunk begins with."""
        meta = self.meta
        told = {"id": meta.id, "object": "text_completion", "created": meta.created, "model": meta.model}
        return told | {"system_fingerprint": meta.fingerprint}

    def choice(
        self, index: int, text: str, tokens: Sequence[TokenInfo], start: int, finish: str | None
    ) -> dict[str, Any]:
        """A choice, or a piece of one whose text begins at `start`."""
        told = {"index": index, "text": text, "logprobs": None, "finish_reason": finish}
        if self.meta.logprobs and self.tokenizer is not None:
            told["logprobs"] = _logprobs(tokens, start, self.tokenizer)
        return told

    def body(self, turns: Sequence[Turn]) -> dict[str, Any]:
        """The whole answer."""
        choices = [
            self.choice(
                i, self.echoes[i] + turn.content, turn.content_tokens, len(self.echoes[i]), turn.finish
            )
            for i, turn in enumerate(turns)
        ]
        return self.head() | {"choices": choices, "usage": usage(total(turns, self.n))}


def total(turns: Sequence[Turn], n: int) -> Usage:
    """The usage of several prompts with `n` answers each."""
    each = [usage_of(turns[at : at + n]) for at in range(0, len(turns), n)]
    return Usage(
        sum(u.prompt for u in each),
        sum(u.cached for u in each),
        sum(u.completion for u in each),
        sum(u.reasoning for u in each),
    )


class Chunks:
    """The parts of an answer as chunks of a stream."""

    def __init__(self, form: Form, include_usage: bool) -> None:
        self.form, self.include_usage = form, include_usage
        self._turns = [Turn() for _ in form.echoes]
        self._said = [0] * len(form.echoes)

    def feed(self, index: int, part: Part) -> Iterator[dict[str, Any]]:
        """The chunks of one part."""
        turn = self._turns[index]
        echo = "" if self._said[index] else self.form.echoes[index]
        if echo:
            self._said[index] = len(echo)
            yield self._chunk(self.form.choice(index, echo, (), 0, None))
        match part:
            case Content(text, tokens):
                yield self._chunk(self.form.choice(index, text, tokens, self._said[index], None))
                self._said[index] += len(text)
            case End():
                turn.add(part)
                yield self._chunk(self.form.choice(index, "", (), self._said[index], part.finish))

    def alike(self, index: int, part: Part) -> Hashable:
        """A name for parts that make one chunk, the same but for its text; None for others."""
        said = self._said[index] or not self.form.echoes[index]
        return index if said and type(part) is Content and not self.form.meta.logprobs else None

    def end(self) -> Iterator[dict[str, Any]]:
        """After all parts: the usage, if asked for."""
        if self.include_usage:
            yield self.form.head() | {"choices": [], "usage": usage(total(self._turns, self.form.n))}

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        return self.form.head() | {"choices": [choice]} | ({"usage": None} if self.include_usage else {})


def _logprobs(tokens: Sequence[TokenInfo], start: int, tokenizer: Tokenizer) -> dict[str, Any]:
    """OpenAI's old form: four lists."""
    spelled, offsets, at = [], [], start
    for info in tokens:
        text = _spelling(info.id, tokenizer)
        spelled.append(text)
        offsets.append(at)
        at += len(text)
    tops = [{_spelling(token, tokenizer): logprob for token, logprob in info.top} for info in tokens]
    return {
        "tokens": spelled,
        "token_logprobs": [max(info.logprob, -9999.0) for info in tokens],
        "top_logprobs": tops if any(tops) else None,
        "text_offset": offsets,
    }


def _spelling(token: int, tokenizer: Tokenizer) -> str:
    raw = tokenizer.bytes_of(token)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
