"""`rorqual serve`: the application under uvicorn, with an orderly end."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from rorqual.serve.connection import Connection

GRACE = 15.0
"""Seconds beyond the drain after which a process whose engine hangs ends all the same."""

LOCAL = ("127.0.0.1", "::1", "localhost")
log = logging.getLogger("rorqual.serve")


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
    OSError that says so; ValueError for what is no port."""
    if not 0 <= port < 2**16:
        raise ValueError(f"port {port} can't be: ports are numbers from 0 (any that is free) to 65535")
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


def configure(app: FastAPI, **options: Any) -> uvicorn.Config:
    """The application as uvicorn is to run it; `options` are uvicorn's."""
    given: dict[str, Any] = {"log_level": "warning", "access_log": False, "server_header": False}
    given |= {"http": Connection, "ws": "none"}
    return uvicorn.Config(app, **(given | options))


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
    if app.state.guard is not None:
        app.state.guard.hosts.add(host.lower())
    config = configure(app, host=host, port=port, **options)
    listener = listener or bind(host, port)
    log.info("serving %s on http://%s:%d", settings.name, host, listener.getsockname()[1])
    Server(config).run([listener])
