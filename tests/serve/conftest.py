"""A server in a thread, over a puppet or a small real model."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

from tests.serve.puppet import Puppet, PuppetModel

pytest.importorskip("fastapi")
pytest.importorskip("llguidance")
uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("httptools")


class Served:
    """A running server: its address, its service, and the puppet if there is one."""

    def __init__(self, app: Any, listener: Any) -> None:
        self.app, self.listener = app, listener
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self.service = app.state.service
        self.engine = self.service.engine

    def openai(self, path: str = "/v1", **options: Any) -> Any:
        openai = pytest.importorskip("openai")
        return openai.OpenAI(base_url=self.url + path, **{"api_key": "none", "max_retries": 0, **options})

    def anthropic(self, **options: Any) -> Any:
        anthropic = pytest.importorskip("anthropic")
        given = {"api_key": "none", "max_retries": 0, **options}
        return anthropic.Anthropic(base_url=self.url + "/anthropic", **given)


class Prompt(uvicorn.Server):
    """Looks every 5 ms whether it should end, not every 100."""

    async def main_loop(self) -> None:
        while not await self.on_tick(0):
            await asyncio.sleep(0.005)


@contextmanager
def serving(app: Any) -> Iterator[Served]:
    from rorqual.serve.run import configure

    server = Prompt(configure(app, port=0))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until(lambda: server.started)
    try:
        yield Served(app, server.servers[0].sockets[0])
    finally:
        gate = getattr(app.state.service.engine, "gate", None)
        if gate is not None:
            gate.set()
        server.should_exit = True
        thread.join(timeout=20)


def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.005)


@pytest.fixture
def puppet() -> Iterator[Callable[..., Served]]:
    """`puppet("text", …, encoding="v4", **settings)`: a server whose model writes these texts."""
    with ExitStack() as stack:

        def start(*script: str, encoding: str | None = "v4", step_tokens: int = 1, **settings: Any) -> Served:
            from rorqual.serve import Settings, create_app

            engine = Puppet(*script, step_tokens=step_tokens)
            app = create_app(PuppetModel(encoding), Settings(**settings), engine=engine)
            return stack.enter_context(serving(app))

        yield start
