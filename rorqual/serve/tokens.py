"""`/tokenize` and `/detokenize`."""

from __future__ import annotations

from typing import Any

from rorqual.serve.body import Body, parse
from rorqual.serve.chat import messages_of, thinking_of
from rorqual.serve.errors import Refusal
from rorqual.serve.service import Service, Talk
from rorqual.serve.tools import read_tools


class TokenizeRequest(Body):
    """Text, or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Any] | None = None
    tools: list[Any] | None = None
    thinking: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Body):
    """Token ids."""

    tokens: list[int]
    model: str | None = None


def tokenize(raw: bytes, service: Service) -> dict[str, Any]:
    """A text's tokens, or those of the prompt that a conversation makes; with their letters if asked for."""
    request = parse(TokenizeRequest, raw, strict=service.settings.strict)
    service.check_model(request.model)
    if (request.prompt is None) == (request.messages is None):
        raise Refusal(400, "give either prompt or messages", "prompt", "invalid_value")
    if request.messages is not None:
        talk = Talk(
            messages_of(request.messages, service.settings.strict),
            read_tools(request.tools),
            thinking=thinking_of(request.thinking),
            effort=request.reasoning_effort,
        )
        ids = service.talk(talk, limit=1).answers[0].prompt
    else:
        tokenizer, text = service.tokenizer, request.prompt or ""
        ids = tokenizer.encode(text, special=request.add_special_tokens is not False)
    told = {"tokens": ids, "count": len(ids), "max_model_len": service.context}
    if request.return_token_strs:
        told["token_strs"] = [service.tokenizer.bytes_of(token).decode("utf-8", "replace") for token in ids]
    return told


def detokenize(raw: bytes, service: Service) -> dict[str, Any]:
    """The text of tokens."""
    request = parse(DetokenizeRequest, raw, strict=service.settings.strict)
    service.check_model(request.model)
    vocab = service.model.config.vocab
    bad = next((n for n, token in enumerate(request.tokens) if not 0 <= token < vocab), None)
    if bad is not None:
        told = f"the token id {request.tokens[bad]!r:.40} is outside the vocabulary of {vocab}"
        raise Refusal(400, told, f"tokens.{bad}", "invalid_value")
    return {"prompt": service.tokenizer.decode(request.tokens)}
