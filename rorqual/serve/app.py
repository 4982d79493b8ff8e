"""The server: thin routes over `Service`."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from starlette.exceptions import HTTPException

from rorqual.engine import Engine, TeamError
from rorqual.serve import chat, completions, inside, messages, pages, responses, tokens
from rorqual.serve.ask import Ask
from rorqual.serve.body import Room, reading
from rorqual.serve.browsers import Guard, Guarded
from rorqual.serve.driver import Running
from rorqual.serve.errors import Refusal, Style, refusal_of
from rorqual.serve.metrics import Metrics
from rorqual.serve.parts import End, Part, Usage
from rorqual.serve.service import Service
from rorqual.serve.settings import Settings
from rorqual.serve.tracing import Told, Tracing, configured
from rorqual.serve.turn import Turn
from rorqual.serve.wire import Events, Whole, dump, refused

log = logging.getLogger("rorqual.serve")
Understand = Callable[[bytes, Service], Ask]


def create_app(
    model: Any, settings: Settings | None = None, *, engine: Any = None, **options: Any
) -> FastAPI:
    """A server of one model as an ASGI application. `engine`: the engine to use, else one is made with `options`.

    `app.state.service` holds what it works with. The engine runs from the application's start to its end; one made
    here is closed then.
    """
    own = engine is None
    service = Service(model, Engine(model, **options) if own else engine, settings)
    doors = Doors(service)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.driver.start()
        doors.tracing = doors.tracing or configured(service.settings.name)
        try:
            yield
        finally:
            service.draining = True
            await asyncio.to_thread(service.driver.stop)
            if own:
                try:
                    service.engine.close()
                except TeamError as error:  # the other ranks are gone already
                    log.error("%s", error)
            if doors.tracing is not None:
                await asyncio.to_thread(doors.tracing.close)

    app = FastAPI(title="rorqual", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.router.redirect_slashes = False  # it would lead to wherever the Host header says
    app.state.service, app.state.doors = service, doors
    if service.settings.cors:
        origins = list(service.settings.cors)
        app.add_middleware(CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"])
    app.state.guard = None
    if not service.settings.keys:
        app.state.guard = Guard(service.settings.cors, service.settings.hosts)
        app.add_middleware(Guarded, guard=app.state.guard, refuse=doors.turn_away)
    for path in ("/chat/completions", "/v1/chat/completions", "/beta/chat/completions"):
        app.add_api_route(path, doors.answering(chat.ask, "deepseek"), methods=["POST"])
    for path in ("/completions", "/v1/completions", "/beta/completions"):
        app.add_api_route(path, doors.answering(completions.ask, "deepseek"), methods=["POST"])
    app.add_api_route("/v1/responses", doors.answering(responses.ask, "openai"), methods=["POST"])
    for path in ("/anthropic/v1/messages", "/v1/messages"):
        app.add_api_route(path, doors.answering(messages.ask, "anthropic"), methods=["POST"])
        app.add_api_route(
            path + "/count_tokens", doors.reading(messages.count, "anthropic"), methods=["POST"]
        )
    for name, read in (("tokenize", tokens.tokenize), ("detokenize", tokens.detokenize)):
        app.add_api_route(f"/{name}", doors.reading(read, "deepseek"), methods=["POST"])
    for path in ("/models", "/v1/models"):
        app.add_api_route(path, doors.guarded(doors.models), methods=["GET"])
        app.add_api_route(path + "/{name}", doors.guarded(doors.model), methods=["GET"])
    app.add_api_route("/inside", doors.guarded(doors.inside), methods=["GET"])
    app.add_api_route("/health", doors.health, methods=["GET"])
    app.add_api_route("/ready", doors.ready, methods=["GET"])
    app.add_api_route("/metrics", doors.guarded(doors.figures), methods=["GET"])
    if service.settings.page:
        app.include_router(pages.router())
    app.add_exception_handler(HTTPException, doors.no_such_route)
    app.add_exception_handler(Exception, _failed)
    return app


class Doors:
    """The routes' handlers."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.metrics = Metrics(service)
        self.tracing: Tracing | None = None
        settings = service.settings
        self.room = Room(settings.max_bodies * settings.max_body, settings.retry_after)
        self._keys = [hashlib.sha256(key.encode()).digest() for key in service.settings.keys]

    # ------------------------------------------------------------------------------------- answers

    def answering(self, understand: Understand, style: Style) -> Callable[[Request], Awaitable[Response]]:
        """The handler of a route that answers with a model's words."""

        async def handler(request: Request) -> Response:
            request.state.begun = time.monotonic()
            try:
                self.check_key(request)
                self.service.admit(0)
                async with self._body(request) as raw:
                    ask = await asyncio.to_thread(understand, raw, self.service)
                self.service.admit(len(ask.job.answers))
            except Exception as error:
                return self.refuse(request, error, style)
            return self.sending(request, ask, style)

        return handler

    def sending(self, request: Request, ask: Ask, style: Style) -> Response:
        """The response that runs a job; it counts the job's answers out at its end."""
        settings = self.service.settings
        account = _Account(self, request, ask)

        def run() -> Running:
            account.running = Running(
                self.service.driver,
                ask.job,
                keep_alive=settings.keep_alive,
                timeout=settings.timeout,
                first_timeout=settings.first_timeout,
                stall=settings.stall,
            )
            return account.running

        async def whole() -> AsyncGenerator[Mapping[str, Any] | None]:
            turns = [Turn() for _ in ask.job.answers]
            async with aclosing(aiter(run())) as batches:
                async for batch in batches:
                    if not batch:
                        yield None
                    for index, part in batch:
                        turns[index].add(part)
                        account.note(part)
            yield ask.whole(turns)

        writer, head = ask.writer(), b""

        async def events() -> AsyncGenerator[bytes]:
            nonlocal head
            head = b"".join(writer.start())
            async with aclosing(aiter(run())) as batches:
                async for batch in batches:
                    pieces = [head] if batch else [ask.ping]
                    for index, part in batch:
                        account.note(part)
                        pieces += writer.feed(index, part)
                    head = b"" if batch else head
                    yield b"".join(pieces)
            yield b"".join(writer.end())

        if ask.stream:
            failed = getattr(writer, "failed", None)
            end = None if failed is None else lambda refusal: head + failed(refusal)
            return Events(events, style, account.close, end)
        return Whole(whole, style, account.close)

    # --------------------------------------------------------------------------------------- others

    def guarded(
        self, make: Callable[[Request], Awaitable[Response]]
    ) -> Callable[[Request], Awaitable[Response]]:
        """A handler behind the keys, with refusals in OpenAI's form."""

        async def handler(request: Request) -> Response:
            try:
                self.check_key(request)
                return await make(request)
            except Exception as error:
                return self.refuse(request, error, style_of(request.url.path))

        return handler

    def reading(
        self, read: Callable[[bytes, Service], Mapping[str, Any]], style: Style
    ) -> Callable[[Request], Awaitable[Response]]:
        """The handler of a route that needs no engine: a body in, a body out."""

        async def handler(request: Request) -> Response:
            try:
                self.check_key(request)
                async with self._body(request) as raw:
                    return _json(await asyncio.to_thread(read, raw, self.service))
            except Exception as error:
                return self.refuse(request, error, style)

        return handler

    async def models(self, request: Request) -> Response:
        """The models there are: one, and its other names."""
        names = (self.service.settings.name, *self.service.settings.aliases)
        return _json({"object": "list", "data": [self._card(name) for name in names]})

    async def model(self, request: Request) -> Response:
        """One model by name."""
        name = request.path_params["name"]
        self.service.check_model(name)
        return _json(self._card(name))

    def _card(self, name: str) -> dict[str, Any]:
        told = {"id": name, "object": "model", "created": self.service.created, "owned_by": "rorqual"}
        return told | {"context_window": self.service.context}

    async def inside(self, request: Request) -> Response:
        """What requests may have told of the model's inside."""
        return _json(inside.describe(self.service))

    async def health(self) -> Response:
        """Whether the process works: its engine's thread lives."""
        good = self.service.driver.alive
        return _json({"status": "ok" if good else "engine down"}, 200 if good else 503)

    async def ready(self) -> Response:
        """Whether new requests are welcome."""
        service = self.service
        full = service.active >= service.settings.max_queue
        state = (
            "draining"
            if service.draining
            else "full"
            if full
            else "ready"
            if service.driver.alive
            else "down"
        )
        return _json({"status": state}, 200 if state == "ready" else 503)

    async def figures(self, request: Request) -> Response:
        """The figures."""
        return Response(self.metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")

    def _body(self, request: Request) -> AbstractAsyncContextManager[bytes]:
        settings = self.service.settings
        return reading(request, settings.max_body, settings.body_timeout, self.room)

    # -------------------------------------------------------------------------------------- keys

    def check_key(self, request: Request) -> None:
        """Refuse a request without one of the keys. Every key is compared, each in constant time."""
        if not self._keys:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            given = request.headers.get("x-api-key", "")
        digest = hashlib.sha256(given.strip().encode()).digest()
        if sum(hmac.compare_digest(digest, key) for key in self._keys) == 0:
            told = "no valid API key was given: send it as 'Authorization: Bearer KEY'"
            raise Refusal(401, told, code="invalid_api_key", headers={"www-authenticate": "Bearer"})

    async def no_such_route(self, request: Request, error: Any) -> Response:
        """What no route takes."""
        told = {404: f"there is no {request.url.path}", 405: f"{request.method} is not possible here"}
        text = told.get(error.status_code, str(error.detail))
        refusal = Refusal(error.status_code, text, code="no_such_route", headers=error.headers or {})
        return self.turn_away(request, refusal)

    def turn_away(self, request: Request, refusal: Refusal) -> Response:
        """A refusal of what has come to no route, in the form of the path's API."""
        return self.refuse(request, refusal, style_of(request.url.path))

    def refuse(self, request: Request, error: Exception, style: Style) -> Response:
        """An error as a response; ours are logged."""
        refusal = refusal_of(error)
        if refusal.status >= 500 and not isinstance(error, Refusal):
            log.error("%s failed", request.url.path, exc_info=error)
        response = refused(refusal, style)
        self.metrics.requests.labels(_route(request), response.status_code).inc()
        _log(route=request.url.path, status=response.status_code, code=refusal.code)
        begun = getattr(request.state, "begun", None)
        if self.tracing is not None and begun is not None:
            self.tracing.record(
                Told(
                    _route(request),
                    request.method,
                    request.headers,
                    response.status_code,
                    begun,
                    refusal.code,
                )
            )
        return response


class _Account:
    """What is noted of one request from its start to its end."""

    def __init__(self, doors: Doors, request: Request, ask: Ask) -> None:
        self.doors, self.request, self.job = doors, request, ask.job
        self.route, self.answers = request.url.path, len(ask.job.answers)
        self.begun: float = request.state.begun
        self.running: Running | None = None
        self.usage = Usage()
        self.finishes: list[str] = []

    def note(self, part: Part) -> None:
        """A part went out."""
        if isinstance(part, End):
            self.answers -= 1  # before the client has read it: its next request may follow at once
            self.doors.service.release(1)
            self.usage = self.usage + part.usage
            self.finishes.append(part.finish)
            self.doors.metrics.answered(part.usage, part.problem is not None)

    def close(self, problem: Exception | None) -> None:
        """The response is over, well or not."""
        service, metrics = self.doors.service, self.doors.metrics
        service.release(self.answers)
        now, running = time.monotonic(), self.running
        if running is not None:
            running.cancel()
        metrics.whole.observe(now - self.begun)
        queued = running.queued if running is not None else None
        if queued is not None:
            metrics.queued.observe(queued - self.begun)
        if running is not None and running.first is not None:
            metrics.first.observe(running.first - self.begun)
            more = running.tokens - len(running.job.answers)
            if more > 0:
                metrics.between.observe((now - running.first) * len(running.job.answers) / more)
        gone = isinstance(problem, OSError)
        status = 200 if problem is None else 499 if gone else refusal_of(problem).status
        if problem is not None and status == 500 and not isinstance(problem, Refusal):
            log.error("%s failed", self.route, exc_info=problem)
        metrics.cancelled.inc(gone)
        metrics.requests.labels(self.route, status).inc()
        usage = self.usage
        _log(
            route=self.route,
            status=status,
            seconds=round(now - self.begun, 3),
            prompt=usage.prompt,
            cached=usage.cached,
            completion=usage.completion,
        )
        if self.doors.tracing is not None:
            self.doors.tracing.record(
                Told(
                    _route(self.request),
                    self.request.method,
                    self.request.headers,
                    status,
                    self.begun,
                    code=None if problem is None else "cancelled" if gone else refusal_of(problem).code,
                    usage=usage,
                    finishes=self.finishes,
                    sampling=self.job.answers[0].sampling,
                    answers=len(self.job.answers),
                    queued=queued,
                    first=running.first if running is not None else None,
                )
            )


def _route(request: Request) -> str:
    """The route as it was declared; "none" where there is none, so that what clients make up is counted as one."""
    return str(getattr(request.scope.get("route"), "path", "none"))


def style_of(path: str) -> Style:
    """Whose form errors have on a path."""
    if path.startswith(("/anthropic", "/v1/messages")):
        return "anthropic"
    return "openai" if path.startswith("/v1/responses") else "deepseek"


def _json(value: object, status: int = 200) -> Response:
    return Response(dump(value), status, media_type="application/json")


def _log(**fields: Any) -> None:
    """One line of JSON about a request; never what was said in it."""
    if log.isEnabledFor(logging.INFO):
        log.info(json.dumps({key: value for key, value in fields.items() if value is not None}))


async def _failed(request: Request, error: Exception) -> Response:
    return refused(refusal_of(error), style_of(request.url.path))
