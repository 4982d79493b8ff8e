"""Answers on the wire: JSON and server-sent events that stay alive while they wait and stop when nobody reads.

A response owns the job it sends. When the client goes away, the job is cancelled; when the job fails, the client is
told in the form of its API: by the status if nothing has been sent yet, else by an error event.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from rorqual.serve.errors import Refusal, Style, refusal_of, render

_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode


def dump(value: object) -> bytes:
    """Compact JSON, as UTF-8."""
    return _encode(value).encode("utf-8", "replace")


def event(value: Mapping[str, Any], name: str | None = None) -> bytes:
    """One server-sent event."""
    head = b"" if name is None else b"event: " + name.encode() + b"\n"
    return head + b"data: " + dump(value) + b"\n\n"


def refused(refusal: Refusal, style: Style) -> Response:
    """A refusal as a response."""
    status, body = render(refusal, style)
    return Response(dump(body), status, dict(refusal.headers), "application/json")


class _Sender(Response):
    """A response whose work stops when the client goes away. `on_close` is told what went wrong, if anything did."""

    def __init__(self, style: Style, on_close: Callable[[Exception | None], None]) -> None:
        self.style, self.on_close = style, on_close
        self.background = None
        self.begun = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = asyncio.create_task(self._guarded(send))
        gone = asyncio.create_task(_until_gone(receive))
        problem: Exception | None = None
        try:
            await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                problem = ConnectionError("the client went away")
        finally:
            for task in (work, gone):
                task.cancel()
            try:
                problem = await work or problem
            except asyncio.CancelledError:
                problem = problem or ConnectionError(
                    "the client did not read its answer, or the server ended"
                )
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await gone
            self.on_close(problem)

    async def _guarded(self, send: Send) -> Exception | None:
        """Send it all; what went wrong, if anything did."""
        try:
            await self.send(send)
        except OSError as error:  # the connection is gone
            return error
        except Exception as error:
            with contextlib.suppress(OSError, TimeoutError):
                async with asyncio.timeout(5):  # it may be that nobody reads
                    await self.fail(send, refusal_of(error))
            return error
        return None

    async def start(
        self, send: Send, status: int, kind: str, headers: Mapping[str, str] | None = None
    ) -> None:
        """Status and headers."""
        self.begun = True
        told = {"content-type": kind, "cache-control": "no-store", **(headers or {})}
        raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in told.items()]
        await send({"type": "http.response.start", "status": status, "headers": raw})

    async def send(self, send: Send) -> None:
        raise NotImplementedError

    async def fail(self, send: Send, refusal: Refusal) -> None:
        """Tell the client of an error."""
        status, body = render(refusal, self.style)
        if not self.begun:
            await self.start(send, status, "application/json", refusal.headers)
        await send({"type": "http.response.body", "body": dump(body), "more_body": False})


class Whole(_Sender):
    """One JSON body. `make` gives None while there is nothing to send, for which a blank line is sent."""

    def __init__(self, make: Callable[[], AsyncGenerator[Mapping[str, Any] | None]], *args: Any) -> None:
        super().__init__(*args)
        self.make = make

    async def send(self, send: Send) -> None:
        async with contextlib.aclosing(self.make()) as made:
            async for value in made:
                body = b"\n" if value is None else dump(value)
                if not self.begun:
                    sized = {} if value is None else {"content-length": str(len(body))}
                    await self.start(send, 200, "application/json", sized)
                await send({"type": "http.response.body", "body": body, "more_body": value is None})


class Events(_Sender):
    """Server-sent events, as `make` gives them. `failed` writes the event of an error; None for the usual one."""

    def __init__(
        self,
        make: Callable[[], AsyncGenerator[bytes]],
        style: Style,
        on_close: Callable[[Exception | None], None],
        failed: Callable[[Refusal], bytes] | None = None,
    ) -> None:
        super().__init__(style, on_close)
        self.make, self.failed = make, failed

    async def send(self, send: Send) -> None:
        async with contextlib.aclosing(self.make()) as made:
            async for piece in made:
                if not self.begun:
                    await self.start(
                        send, 200, "text/event-stream; charset=utf-8", {"x-accel-buffering": "no"}
                    )
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def fail(self, send: Send, refusal: Refusal) -> None:
        if not self.begun:
            await super().fail(send, refusal)
            return
        if self.failed is not None:
            told = self.failed(refusal)
        else:
            _, body = render(refusal, self.style)
            told = event(body, "error" if self.style == "anthropic" else None)
        await send({"type": "http.response.body", "body": told, "more_body": False})


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
