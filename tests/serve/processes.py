"""Servers in processes of their own, over a puppet: what signals do to them, and what they leave in their logs."""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.forks import CONTEXT


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


class Process:
    """A server's process: `url`, `gate` (cleared, its engine waits), and `log` once it has ended."""

    def __init__(self, place: Path, text: str, **settings: Any) -> None:
        self.port, self.gate = free_port(), CONTEXT.Event()
        self.url, self.path = f"http://127.0.0.1:{self.port}", place / "log"
        self.gate.set()
        given = (self.port, self.gate, str(self.path), text, settings)
        self.process = CONTEXT.Process(target=_serve, args=given)

    @property
    def log(self) -> str:
        return self.path.read_text()

    def signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def code(self, seconds: float = 30) -> int | None:
        """The exit code, once it has ended."""
        self.process.join(seconds)
        return self.process.exitcode


@contextmanager
def server(place: Path, text: str, **settings: Any) -> Iterator[Process]:
    made = Process(place, text, **settings)
    made.process.start()
    try:
        yield made
    finally:
        made.process.kill()
        made.process.join()


def _serve(port: int, gate: Any, path: str, text: str, settings: dict[str, Any]) -> None:
    from rorqual.serve import Settings, create_app
    from rorqual.serve import run as module
    from tests.serve.puppet import Puppet, PuppetModel

    log = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    module.GRACE = settings.pop("grace", module.GRACE)
    options = {}
    if settings.pop("debug", False):
        logging.basicConfig(level=logging.DEBUG, stream=sys.stderr)
        logging.getLogger("rorqual.serve").setLevel(logging.DEBUG)
        options = {"log_level": "trace", "access_log": True}
    engine = Puppet(text)
    engine.gate = gate
    module.run(create_app(PuppetModel(), Settings(**settings), engine=engine), port=port, **options)
