"""A connection: uvicorn's over httptools, with what those leave open bounded and what they let pass refused."""

from __future__ import annotations

import asyncio
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

HEAD = 16 * 1024
"""Most bytes of a request's line and headers, or of anything else that is no body."""

INVALID = "Invalid HTTP request received."
SWITCHING = (b"upgrade", b"http2-settings")


class Connection(HttpToolsProtocol):
    """Closes itself when a request's head doesn't arrive within the settings' `head_timeout`: from the beginning of the
    connection for its first request, from their first byte for others. Between requests uvicorn closes it after 5
    seconds.

    400 for heads, trailers or chunk headers longer than `HEAD`, for versions other than 1.0 and 1.1, for a host that is
    missing or doubtful (RFC 9112 3.2), for codings other than chunked (6.1) and for CONNECT; once an answer is under
    way such a request closes the connection instead. An upgrade is never taken: the request is answered as it stands.
    What is sent to a client of version 1.0 has no chunks.
    """

    _waiting: asyncio.TimerHandle | None = None
    _stands = ""
    """Where reading stands: in a "head", in a "body", or between messages."""
    _switching = False
    """The message whose head has just come asks for another protocol."""
    _head = 0
    """Bytes of this message's line, headers and trailers."""
    _idle = 0
    """Bytes that have come in a row and brought neither a head to its end nor a body any further."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """The connection stands."""
        super().connection_made(transport)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone."""
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Bytes have come."""
        if self.transport.is_closing():
            return
        self._unset_keepalive_if_required()
        self._idle += len(data)
        try:
            self._feed(data)
        except httptools.HttpParserError:
            self.send_400_response(INVALID)
            return
        if self._idle > HEAD:
            self.send_400_response(INVALID)
        elif not self._stands and not self._answering:
            self._wait()

    def send_400_response(self, msg: str) -> None:
        """Refuse what has come: by an answer, if none is half sent."""
        if self.cycle is not None and self.cycle.response_started and self._answering:
            self.transport.close()
        else:
            super().send_400_response(msg)

    def _feed(self, data: bytes) -> None:
        while True:
            try:
                self.parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as upgrade:
                # The parser has left the body unread. Once more, by a head that asks for nothing.
                data = self._plain_head() + data[upgrade.args[0] :]
                self.parser = httptools.HttpRequestParser(self)
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's

    def _plain_head(self) -> bytes:
        """The head that has just come, without what asks for another protocol."""
        version = self.parser.get_http_version().encode()
        lines = [b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, version)]
        for name, value in self.headers:
            if name == b"connection":
                value = b",".join(t for t in value.split(b",") if t.strip().lower() not in SWITCHING)
            if name not in SWITCHING and (value or name != b"connection"):
                lines.append(name + b": " + value)
        return b"\r\n".join(lines) + b"\r\n\r\n"

    # ------------------------------------------------------------------------- what the parser tells

    def on_message_begin(self) -> None:
        """A request's first byte."""
        self._head, self._stands, self._switching = 0, "head", False
        self._stop_waiting()
        self._wait()
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """A piece of its address."""
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header, whole; or a trailer, of which none is wanted."""
        self._count(len(name) + len(value) + 4)
        if self._stands == "head":
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Its head has come."""
        self._check()
        if self.parser.should_upgrade():
            self._switching = True
            return
        self._idle, self._stands = 0, "body"
        self._stop_waiting()
        super().on_headers_complete()
        if self.parser.get_http_version() == "1.0":
            _unframed(self.cycle)

    def on_body(self, body: bytes) -> None:
        """A piece of its body."""
        self._idle = 0
        if self.cycle.response_complete:
            self._wait()  # nobody reads it, but it need not take for ever
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Its end."""
        if not self._switching:
            self._stands = ""
            super().on_message_complete()

    def _check(self) -> None:
        """Raise ValueError, which the parser takes for a fault of the request."""
        version = self.parser.get_http_version()
        hosts = sum(name == b"host" for name, _ in self.headers)
        codings = [value.strip().lower() for name, value in self.headers if name == b"transfer-encoding"]
        if version not in ("1.0", "1.1") or self.parser.get_method() == b"CONNECT":
            raise ValueError("no such request is answered here")
        if hosts > 1 or (version == "1.1" and not hosts):
            raise ValueError("a request names one host")
        if codings and (codings != [b"chunked"] or version == "1.0"):
            raise ValueError("no other coding than chunked is known")

    def _count(self, size: int) -> None:
        self._head += size
        if self._head > HEAD:
            raise ValueError("the head is too long")

    # -------------------------------------------------------------------------------------- patience

    @property
    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _wait(self) -> None:
        if self._waiting is None:
            seconds = self.config.app.state.service.settings.head_timeout  # type: ignore[union-attr]
            self._waiting = self.loop.call_later(seconds, self._late)

    def _late(self) -> None:
        self._waiting = None
        if self._answering:  # an earlier request: it is not cut off by what follows it
            self._wait()
        else:
            self.transport.close()

    def _stop_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None


def _unframed(cycle: RequestResponseCycle) -> None:
    """Have a response of unknown length sent as it is, ended by the connection's end."""
    send, sized = cycle.send, False

    async def plain(message: Any) -> None:
        nonlocal sized
        if message["type"] == "http.response.start":
            sized = any(name.lower() == b"content-length" for name, _ in message.get("headers", ()))
            if not sized:
                cycle.chunked_encoding = False
        elif not sized:
            cycle.expected_content_length = len(message.get("body", b""))
        await send(message)

    cycle.send = plain  # type: ignore[method-assign]
