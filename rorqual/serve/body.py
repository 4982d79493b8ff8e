"""Bodies of requests: read up to a limit, parsed and checked once, with the field at fault named."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.requests import ClientDisconnect, Request

from rorqual.serve.errors import Refusal

_TAGS = ("str", "int", "float", "bool", "dict", "list", "none", "function-")


class Body(BaseModel):
    """A request's fields. Types are not bent: "1" is no number. Unknown fields are kept apart (`check_known`)."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, protected_namespaces=())


class Drawn(Body):
    """The fields that chat and plain completions share: how answers are drawn, how many, and when they end."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    max_tokens: int | None = None
    stop: str | list[str] | None = None
    n: int | None = None
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None
    response_format: dict[str, Any] | None = None

    def drawing(self, most: int) -> dict[str, Any]:
        """The fields that say how tokens are drawn, as of `Sampling`. Refusal for what is out of range, an `n` above
        `most` too."""
        between("temperature", self.temperature, 0, 2)
        between("top_p", self.top_p, 0, 1)
        between("frequency_penalty", self.frequency_penalty, -2, 2)
        between("presence_penalty", self.presence_penalty, -2, 2)
        between("n", self.n, 1, most)
        return {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "frequency_penalty": self.frequency_penalty,
            "presence_penalty": self.presence_penalty,
            "logit_bias": bias_of(self.logit_bias),
            "seed": self.seed,
        }


M = TypeVar("M", bound=Body)


class Room:
    """Bytes of bodies that are held at once: `taken` of `limit`."""

    def __init__(self, limit: int, wait: int) -> None:
        self.limit, self.wait, self.taken = limit, wait, 0

    def take(self, size: int) -> None:
        """Count bytes in. Refusal 503 where there is no room."""
        if self.taken + size > self.limit:
            told = "too many bodies are being read: try again later"
            raise Refusal(503, told, code="busy", headers={"retry-after": str(self.wait)})
        self.taken += size


@asynccontextmanager
async def reading(request: Request, limit: int, seconds: float, room: Room) -> AsyncGenerator[bytes]:
    """The whole body, which counts against `room` from its first byte until the block is left. Refusal 413 as soon as
    it is longer than `limit` bytes, 408 if it takes longer than `seconds`, 503 if there is no room."""
    told = f"the body is larger than {limit:,} bytes"
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length[:18]) > limit:
        raise Refusal(413, told, code="body_too_large")
    pieces: list[bytes] = []
    size = held = 0
    try:
        try:
            async with asyncio.timeout(seconds):
                async for piece in request.stream():
                    size += len(piece)
                    if size > limit:
                        raise Refusal(413, told, code="body_too_large")
                    room.take(len(piece))
                    held = size
                    pieces.append(piece)
        except TimeoutError:
            raise Refusal(408, f"the body did not arrive within {seconds:g} s", code="body_timeout") from None
        except ClientDisconnect:
            raise Refusal(400, "the body ended early", code="incomplete_body") from None
        yield b"".join(pieces)
    finally:
        room.taken -= held


def parse(kind: type[M], body: bytes, *, strict: bool = False) -> M:
    """The fields of a JSON body. Raises Refusal: 400 for what is no JSON, 422 for what is no `kind`."""
    try:
        fields = kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        if first["type"] == "json_invalid":
            raise Refusal(400, f"the body is not JSON: {first['msg']}", code="invalid_json") from None
        param = _path(first["loc"])
        where = f"{param}: " if param else ""
        raise Refusal(422, f"{where}{first['msg']}", param or None, "invalid_type") from None
    except (ValueError, RecursionError) as error:
        raise Refusal(400, f"the body is not JSON: {error!s:.200}", code="invalid_json") from None
    if strict:
        extra = next(iter(fields.model_extra or {}), None)
        if extra is not None:
            raise Refusal(400, f"unknown field: {extra!r:.200}", str(extra)[:200], "unknown_field")
    return fields


def _path(place: tuple[Any, ...]) -> str:
    """Where in the body, without the names that pydantic gives to the members of a union."""
    steps: list[str] = []
    for step in place:
        if isinstance(step, str) and ("[" in step or step.startswith(_TAGS)) and steps:
            continue
        steps.append(str(step))
    return ".".join(steps)


def stops_of(raw: str | list[str] | None, most: int = 16, param: str = "stop") -> tuple[str, ...]:
    """Stop strings, checked."""
    stops = (raw,) if isinstance(raw, str) else tuple(raw or ())
    if len(stops) > most:
        raise Refusal(400, f"{param} holds {len(stops)} strings, more than {most}", param, "invalid_value")
    if not all(stops):
        raise Refusal(400, f"{param} must not hold an empty string", param, "invalid_value")
    return stops


def between(name: str, value: float | None, low: float, high: float) -> None:
    """Refuse a number outside its range."""
    if value is not None and not low <= value <= high:
        told = f"{name} must be between {low:g} and {high:g}, got {value!r:.40}"
        raise Refusal(400, told, name, "invalid_value")


def bias_of(raw: dict[str, float] | None) -> dict[int, float] | None:
    """`logit_bias` with its keys as token ids."""
    if raw is None:
        return None
    if not all(key.isascii() and key.isdigit() and len(key) < 10 for key in raw):
        raise Refusal(400, "logit_bias must map token ids to numbers", "logit_bias", "invalid_value")
    return {int(key): value for key, value in raw.items()}
