"""The thread that runs the engine, and answers on their way from it to asyncio.

Submitting and cancelling take the engine's lock, which is held for whole passes; the event loop must not wait for it.
So one thread alone touches the engine: between passes it carries out what was ordered, and after each it hands all that
is new to the event loop in one call.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch

from rorqual.engine import Completion, Delta, Handle, TeamError
from rorqual.engine.loop import Answer
from rorqual.engine.thread import release_pool, work_alone
from rorqual.serve.errors import Refusal, refusal_of
from rorqual.serve.parts import Content, End, Part, Reader, Reasoning, TokenInfo


class Engine(Protocol):
    """What is needed of an engine; `rorqual.Engine` has it."""

    @property
    def busy(self) -> bool: ...

    def submit_answer(self, answer: Answer, priority: int = 0) -> Handle: ...

    def step(self) -> bool: ...

    def fail_all(self, error: Exception) -> None: ...


@dataclass
class News:
    """What came of one answer: tokens, with log-probabilities if asked for, and whether it is over."""

    deltas: list[Delta] = field(default_factory=list)
    infos: list[TokenInfo | None] = field(default_factory=list)
    done: Completion | None = None
    cached: int = 0
    error: Exception | None = None


class Ticket:
    """One answer under way, as the driver's thread sees it. `told` is called on the event loop."""

    def __init__(self, answer: Answer, told: Callable[[News], None], priority: int = 0) -> None:
        self.answer, self.told, self.priority = answer, told, priority
        self.loop = asyncio.get_running_loop()
        self.handle: Handle | None = None
        self.cancelled = False
        self.seen = 0
        self.begun: float | None = None
        """When the pass began in which the engine first worked on it."""

    @property
    def running(self) -> bool:
        """Whether the engine works on it (over several ranks it can't be seen before the first token)."""
        request = self.handle.request if self.handle is not None else None
        return request is not None and request.running

    def news(self) -> News | None:
        """What is new; None for nothing."""
        handle = self.handle
        assert handle is not None
        over = handle.done
        deltas = handle.come()
        if not deltas and not over:
            return None
        done = handle.completion
        infos: list[TokenInfo | None] = [None] * len(deltas)
        if done.logprobs is not None:
            places = range(self.seen, self.seen + len(deltas))
            tops = done.top_logprobs
            infos = [
                TokenInfo(done.ids[i], done.logprobs[i], tuple(tops[i]) if tops else (), i) for i in places
            ]
        self.seen += len(deltas)
        if done.inside is not None:
            done.inside.clear()  # it has come with the deltas; kept for a long answer it may be gigabytes
        cached = handle.request.cached if handle.request is not None else 0
        return News(deltas, infos, done if over else None, cached, handle.error)


class Driver:
    """Runs an engine, whose model is on `device`, in a thread of its own, from `start` to `stop`."""

    def __init__(self, engine: Engine, device: torch.device) -> None:
        self.engine, self.device = engine, device
        self.broken: Exception | None = None
        """Why the engine takes no more requests, if it doesn't."""
        self._orders: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._live: dict[Ticket, None] = {}
        self._stopping = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin; again after `stop` is allowed."""
        if self._thread is None:
            self._stopping = False
            release_pool(self.device)
            self._thread = threading.Thread(target=self._run, name="rorqual-driver", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """End the thread; answers under way are cancelled."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._orders.put(self._finish)
            thread.join()

    @property
    def alive(self) -> bool:
        """Whether requests can be taken."""
        return self._thread is not None and self._thread.is_alive() and self.broken is None

    def submit(self, ticket: Ticket) -> None:
        """Have an answer made."""
        self._orders.put(lambda: self._admit(ticket))

    def cancel(self, ticket: Ticket) -> None:
        """Stop an answer, before the next pass. Nothing more is told of it."""
        ticket.cancelled = True
        self._orders.put(lambda: self._drop(ticket))

    # ------------------------------------------------------------------------------ in the thread

    def _run(self) -> None:
        work_alone(self.device)
        while not self._stopping:
            try:
                order = self._orders.get(block=not self.engine.busy)
                while True:
                    order()
                    order = self._orders.get_nowait()
            except queue.Empty:
                pass
            if self._stopping:
                return
            began = time.monotonic()
            if self.engine.busy:
                try:
                    self.engine.step()
                except TeamError as error:
                    self.broken = error
                    self._give_up(error)
                    return
                except Exception as error:
                    self.engine.fail_all(error)
            self._tell(began)

    def _admit(self, ticket: Ticket) -> None:
        if ticket.cancelled:
            return
        try:
            ticket.handle = self.engine.submit_answer(ticket.answer, ticket.priority)
        except Exception as error:
            self._send([(ticket, News(error=error, done=ticket.answer.done))])
            return
        self._live[ticket] = None

    def _drop(self, ticket: Ticket) -> None:
        if ticket in self._live and ticket.handle is not None:
            del self._live[ticket]
            ticket.handle.cancel()

    def _finish(self) -> None:
        self._stopping = True
        self._give_up(RuntimeError("the server is shutting down"))

    def _give_up(self, error: Exception) -> None:
        lost = [(ticket, News(error=error, done=ticket.answer.done)) for ticket in self._live]
        for ticket in list(self._live):
            self._drop(ticket)
        self._send(lost)

    def _tell(self, began: float) -> None:
        """Hand out what the pass has brought that began at that time."""
        told = []
        for ticket in list(self._live):
            news = ticket.news()
            if ticket.begun is None and (news is not None or ticket.running):
                ticket.begun = began
            if news is not None:
                told.append((ticket, news))
                if news.done is not None:
                    del self._live[ticket]
        self._send(told)

    def _send(self, told: list[tuple[Ticket, News]]) -> None:
        for loop in {ticket.loop for ticket, _ in told}:
            mine = [(ticket, news) for ticket, news in told if ticket.loop is loop]
            try:
                loop.call_soon_threadsafe(_deliver, mine)
            except RuntimeError:  # the loop is closed: nobody waits there any more
                for ticket, _ in mine:
                    self._drop(ticket)


def _deliver(told: list[tuple[Ticket, News]]) -> None:
    for ticket, news in told:
        if not ticket.cancelled:
            ticket.told(news)


EARLY = 0.005
"""Seconds by which a timer of the event loop may fire before its time (uvloop counts in milliseconds)."""


@dataclass
class Job:
    """Answers to be made of one prompt, one a choice, and how each is read."""

    answers: list[Answer]
    readers: list[Reader]
    priority: int = 0
    on_end: Callable[[Reader, End], None] | None = None


class Running:
    """A job under way. Iterate for batches of (choice, part); leave the loop, or call `cancel`, to stop it.

    keep_alive: after so many seconds without anything new an empty batch comes. timeout: seconds for all of it;
    first_timeout: until its first token; stall: for what is made of one batch, which takes long if nobody reads it: the
    task that it was made in is then cancelled, as it is when `timeout` has passed. Raises Refusal for what goes wrong.
    """

    def __init__(
        self,
        driver: Driver,
        job: Job,
        *,
        keep_alive: float = 10.0,
        timeout: float | None = None,
        first_timeout: float | None = None,
        stall: float = 120.0,
    ) -> None:
        self.driver, self.job = driver, job
        self.started = time.monotonic()
        self.first: float | None = None
        """When the first token came."""
        self.tokens = 0
        self._timeout, self._first_timeout, self._stall = timeout, first_timeout, stall
        self._task = asyncio.current_task()
        self._handed: float | None = None
        """When the batch was handed out that is being sent; None while it waits for one."""
        self._news: deque[tuple[int, News]] = deque()
        self._event = asyncio.Event()
        # One timer that goes on by itself: nothing is set or taken back for a token.
        self._period = min(
            limit for limit in (keep_alive, timeout, first_timeout, stall) if limit is not None
        )
        self._due = False
        self._loop = asyncio.get_running_loop()
        self._timer = self._loop.call_later(self._period, self._tick)
        self._open: dict[int, Ticket] = {}
        self._tickets: list[Ticket] = []
        for number, answer in enumerate(job.answers):
            ticket = Ticket(answer, lambda news, number=number: self._told(number, news), job.priority)  # type: ignore[misc]
            self._open[number] = ticket
            self._tickets.append(ticket)
            driver.submit(ticket)

    @property
    def queued(self) -> float | None:
        """When the engine began with the first of its answers."""
        return min((t.begun for t in self._tickets if t.begun is not None), default=None)

    def _told(self, number: int, news: News) -> None:
        self._news.append((number, news))
        self._event.set()

    def _tick(self) -> None:
        self._due = True
        self._event.set()
        if self._handed is not None:
            now = time.monotonic()
            late = self._timeout is not None and now - self.started > self._timeout + self._period
            if (late or now - self._handed > self._stall) and self._task is not None:
                self._task.cancel()
                return
        self._timer = self._loop.call_later(self._period, self._tick)

    def cancel(self) -> None:
        """Stop what still runs."""
        self._timer.cancel()
        for ticket in self._open.values():
            self.driver.cancel(ticket)
        self._open.clear()
        self._event.set()

    async def __aiter__(self) -> AsyncGenerator[list[tuple[int, Part]]]:
        try:
            while self._open:
                if not self._news:
                    self._event.clear()
                    await self._event.wait()
                if self._due:
                    self._check()
                    if not self._news:
                        self._handed = time.monotonic()
                        yield []
                        self._handed = None
                parts: list[tuple[int, Part]] = []
                while self._news:
                    number, news = self._news.popleft()
                    if number in self._open:
                        parts += [(number, part) for part in self._read(number, news)]
                if parts:
                    self._handed = time.monotonic()
                    yield merged(parts)
                    self._handed = None
        finally:
            self.cancel()

    def _check(self) -> None:
        """Every now and then: is it still worth waiting?"""
        self._due = False
        if not self.driver.alive:
            raise Refusal(503, "the engine does not run", code="unavailable")
        limits = [self._timeout, self._first_timeout if self.first is None else None]
        waited = time.monotonic() - self.started
        if any(limit is not None and waited > limit - EARLY for limit in limits):
            raise Refusal(504, "the answer took longer than this server allows", code="timeout")

    def _read(self, number: int, news: News) -> list[Part]:
        reader = self.job.readers[number]
        parts: list[Part] = []
        for delta, info in zip(news.deltas, news.infos, strict=True):
            self.first = self.first or time.monotonic()
            self.tokens += 1
            parts += reader.feed(delta, info)
            if reader.stopped:
                break
        if reader.watcher is not None and (glimpse := reader.glimpse()):
            # It goes with the last of them, when all letters are out.
            parts = [part for _, part in merged([(number, part) for part in parts])]
            parts[-1:] = [*glimpse, *parts[-1:]]
        if news.error is not None:
            raise self._refusal(news.error)
        if reader.stopped or news.done is not None:
            ticket = self._open.pop(number)
            if news.done is None:
                self.driver.cancel(ticket)
            ended = reader.end(news.done or ticket.answer.done, news.cached)
            parts += ended
            if self.job.on_end is not None and isinstance(ended[-1], End):
                self.job.on_end(reader, ended[-1])
        return parts

    def _refusal(self, error: Exception) -> Refusal:
        """What went wrong before the first token may be the request's fault; after it is ours."""
        found = refusal_of(error)
        if found.status in (429, 503) or (self.first is None and type(error).__name__ == "InputError"):
            return found
        if found.status == 400:
            return Refusal(500, found.message, code="generation_failed")
        return found


def merged(parts: list[tuple[int, Part]]) -> list[tuple[int, Part]]:
    """The same parts, texts of a kind that follow each other in one choice as one."""
    out: list[tuple[int, Part]] = []
    for number, part in parts:
        if out and isinstance(part, Content | Reasoning) and out[-1][0] == number:
            last = out[-1][1]
            if type(last) is type(part) and isinstance(last, Content | Reasoning):
                out[-1] = number, type(part)(last.text + part.text, last.tokens + part.tokens)
                continue
        out.append((number, part))
    return out
