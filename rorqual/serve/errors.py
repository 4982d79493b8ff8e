"""Refusals: one kind of error inside, and how each API writes it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from rorqual.engine import EngineFull, GrammarError, SamplingError, TeamError
from rorqual.nn import ContextError, InputError
from rorqual.text import EncodingError

Style = Literal["deepseek", "openai", "anthropic"]
"""Whose form: DeepSeek's and OpenAI's differ in the status of parameters that have a wrong type."""


@dataclass
class Refusal(Exception):
    """A request that isn't answered, or no further: what the client is told.

    `status`: the HTTP status. `param`: the field at fault, as a path such as "messages.2.content". `code`: a word for
    programs. `headers`: to be sent beside it.
    """

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.message


_OPENAI_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    501: "server_error",
    503: "server_error",
    504: "server_error",
}
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    501: "api_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def render(refusal: Refusal, style: Style) -> tuple[int, dict[str, Any]]:
    """Status and body in the form of an API."""
    status = refusal.status
    if status == 422 and style != "deepseek":
        status = 400
    if style == "anthropic":
        kind = _ANTHROPIC_TYPES.get(status, "invalid_request_error")
        where = f"{refusal.param}: " if refusal.param and refusal.param not in refusal.message else ""
        status = 529 if status == 503 else status
        return status, {"type": "error", "error": {"type": kind, "message": where + refusal.message}}
    kind = _OPENAI_TYPES.get(status, "invalid_request_error")
    error = {"message": refusal.message, "type": kind, "param": refusal.param, "code": refusal.code or kind}
    return status, {"error": error}


_MESSAGE = re.compile(r"message (\d+): ([\w.\[\]]+|'[^']+')")


def refusal_of(error: Exception, *, param: str | None = None, grammar: str = "response_format") -> Refusal:
    """What a client is told of an error from below; what isn't the client's fault is 500 and says no more than
    it must. param: the field that holds the prompt; grammar: the one that asked for the grammar."""
    if isinstance(error, Refusal):
        return error
    text = str(error)
    if isinstance(error, EngineFull):
        return Refusal(429, text, code="queue_full")
    if isinstance(error, ContextError):
        return Refusal(400, text, param or "messages", "context_length_exceeded")
    if isinstance(error, GrammarError):
        missing = "not installed" in text
        return Refusal(501 if missing else 400, text, grammar, "invalid_grammar")
    if isinstance(error, EncodingError):
        found = _MESSAGE.match(text)
        place = f"messages.{found[1]}.{found[2].strip(chr(39))}" if found else param or "messages"
        return Refusal(400, text, place, "invalid_messages")
    if isinstance(error, SamplingError):
        word = text.split(" ", 1)[0]
        known = _FIELDS.get(word)
        text = text if known is None else known + text[len(word) :]
        return Refusal(400, text, known or param, "invalid_value")
    if isinstance(error, InputError):
        return Refusal(400, text, param, "invalid_value")
    if isinstance(error, TeamError):
        return Refusal(503, "the model has lost one of its processes", code="unavailable")
    return Refusal(500, "the server failed at this request", code="internal_error")


@contextmanager
def speaking(names: Mapping[str, str]) -> Iterator[None]:
    """Refusals name fields as `names` says, from the chat API's names (regular expressions of a path's beginning) to
    another API's."""
    try:
        yield
    except (Refusal, SamplingError) as error:
        refusal = refusal_of(error)
        for ours, theirs in names.items():
            found = re.match(rf"(?:{ours})(?=\.|$)", refusal.param or "")
            if found is not None and refusal.param is not None:
                name = found.expand(theirs)
                message = refusal.message.replace(found[0], name, 1)
                raise replace(refusal, message=message, param=name + refusal.param[found.end() :]) from error
        raise refusal from error


_FIELDS = {"max_new_tokens": "max_tokens"} | {
    name: name
    for name in (
        "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty",
        "stop", "seed", "logit_bias",
    )
}  # fmt: skip
