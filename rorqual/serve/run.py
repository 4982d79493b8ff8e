"""`rorqual serve`: the application under uvicorn, with an orderly end."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import threading
import time
from types import FrameType
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

GRACE = 15.0
"""Seconds beyond the drain after which a process whose engine hangs ends all the same."""

LOCAL = ("127.0.0.1", "::1", "localhost")
log = logging.getLogger("rorqual.serve")


class Connection(H11Protocol):
    """Closes itself when a request's line and headers don't arrive within the settings' `head_timeout`: from the
    beginning of the connection for its first request, from their first byte for others. Between requests uvicorn closes
    it after 5 seconds, and h11 refuses headers above 16 KiB."""

    _waiting: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """The connection stands."""
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        """Bytes have come: of headers, as long as h11 has made no request of them."""
        super().data_received(data)
        if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
            self._wait()
        else:
            self._stop_waiting()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone."""
        self._stop_waiting()
        super().connection_lost(exc)

    def _wait(self) -> None:
        if self._waiting is None:
            seconds = self.config.app.state.service.settings.head_timeout  # type: ignore[union-attr]
            self._waiting = self.loop.call_later(seconds, self.transport.close)

    def _stop_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None


class Server(uvicorn.Server):
    """Drains when it is told to stop: new requests get 503 for as long as answers under way are being finished (at most
    the settings' `drain` seconds), then the process ends with code 0. A second signal ends it at once."""

    deadline: float | None = None
    """When a shutdown stops waiting for answers; None while none has been asked for."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal to stop."""
        if self.deadline is not None:
            log.warning("a second signal: ended at once")
            logging.shutdown()
            os._exit(128 + sig)
        service = self._service
        service.draining = True
        self.deadline = time.monotonic() + service.settings.drain
        log.info("shutting down: %d answers are under way", service.active)
        last = threading.Timer(service.settings.drain + GRACE, _give_up)
        last.daemon = True
        last.start()

    async def on_tick(self, counter: int) -> bool:
        """Whether it is time to go. The port stays open until then, so that who comes late is told so."""
        if self.deadline is not None:
            left = self.deadline - time.monotonic()
            if self._service.active <= 0 or left <= 0:
                if left <= 0:
                    log.warning("%d answers were not finished in time", self._service.active)
                self.config.timeout_graceful_shutdown = max(1, int(left))
                self.should_exit = True
        return await super().on_tick(counter)

    @property
    def _service(self) -> Any:
        return self.config.app.state.service  # type: ignore[union-attr]


def _give_up() -> None:
    log.error("the engine did not stop: ended without it")
    logging.shutdown()
    os._exit(1)


def bind(host: str, port: int) -> socket.socket:
    """The server's socket, not listening yet. To be bound before a model is loaded: the port may be taken, which is an
    OSError that says so."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
    except OSError as problem:
        found.close()
        raise OSError(f"can't listen on {host} port {port}: {problem.strerror or problem}") from None
    return found


def prepare_logs() -> None:
    """Send the server's lines to standard error, unless the program that holds it has said where they go."""
    if log.handlers:
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False


def run(
    app: FastAPI,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    listener: socket.socket | None = None,
    **options: Any,
) -> None:
    """Serve until told to stop; answers under way are then finished, for as long as the settings say. `listener`: a
    socket of `bind`; `options`: of uvicorn."""
    settings = app.state.service.settings
    prepare_logs()
    if host not in LOCAL and not settings.keys:
        log.warning("listening on %s without API keys: whoever can reach it can use it", host)
    given = {
        "log_level": "warning",
        "access_log": False,
        "server_header": False,
        "http": Connection,
        "ws": "none",
        **options,
    }
    if app.state.guard is not None:
        app.state.guard.hosts.add(host.lower())
    config = uvicorn.Config(app, host=host, port=port, **given)
    listener = listener or bind(host, port)
    log.info("serving %s on http://%s:%d", settings.name, host, listener.getsockname()[1])
    Server(config).run([listener])
