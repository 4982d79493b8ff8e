"""A request under way, and the handle its owner holds."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rorqual.engine.looks import Looks
from rorqual.engine.loop import Answer, Completion, Delta
from rorqual.engine.sampling import Sampling
from rorqual.engine.staging import Coming

if TYPE_CHECKING:
    from rorqual.engine.core import Core


@dataclass(eq=False)
class Request:
    """One sequence: what is known of it, what it holds, and how far its caches reach."""

    answer: Answer
    handle: Handle
    priority: int
    arrival: int
    ids: list[int]
    """Prompt and answer, as far as the host has seen them."""
    flying: int = 0
    """Tokens drawn in a pass whose results have not been read yet."""
    held: int = 0
    """Tokens whose cache items are written, or will be by passes already under way."""
    pages: list[int] = field(default_factory=list)
    ring: int = 0
    slot: int = -1
    """Row of the sampler's tables; -1 while waiting."""
    blocks: int = 0
    """Full blocks that are recorded in the prefix cache, and the name of the last."""
    block_name: int = 0
    loose: int = 0
    """Drafts in passes whose results have not been read yet: up to so many tokens more than `held` may stand."""
    drafted: bool = False
    """Whether a draft of its next token waits on the device."""
    draft: tuple[Coming, int] | None = None
    """Where on the host the draft will be, for grammars: a copy under way, and the place in it."""
    seed: int | None = None
    """What its draws come from, once it has run."""
    cached: int = 0
    """Prompt tokens that the prefix cache supplied when the request first ran."""
    preemptions: int = 0
    looks: Looks | None = None
    """What is told of the model's inside, if it asks for that."""

    @property
    def sampling(self) -> Sampling:
        return self.answer.sampling

    @property
    def length(self) -> int:
        """Tokens there are, those on their way included."""
        return len(self.ids) + self.flying

    @property
    def longest(self) -> int:
        """Tokens that prompt and answer may come to."""
        return len(self.answer.prompt) + self.sampling.max_new_tokens

    @property
    def width(self) -> int:
        """Tokens that a decode of it brings: the last one, and the draft if one is worth trying."""
        return 2 if self.drafted and self.left > 1 else 1

    @property
    def rank(self) -> tuple[int, int]:
        """Order of service: priority first, then who came first."""
        return -self.priority, self.arrival

    @property
    def running(self) -> bool:
        return self.slot >= 0

    @property
    def finished(self) -> bool:
        return self.answer.done.finish_reason is not None or self.handle.error is not None

    @property
    def left(self) -> int:
        """Tokens that may still be drawn, those on their way taken off."""
        return self.sampling.max_new_tokens - (self.length - len(self.answer.prompt))


class Handle:
    """An answer on its way. Iterate for `Delta`s as they come (`for`, or `async for`), or ask for `result()`.

    While the engine has no thread of its own, waiting on a handle drives the engine. A failed request
    raises its error from here, once what came before it has been handed out.
    """

    def __init__(self, engine: Core) -> None:
        self._engine: Core | None = engine
        """None once all of the answer has come: who keeps the handle then keeps no engine alive."""
        self._ready: deque[Delta] = deque()
        self._waiters: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []
        self.error: Exception | None = None
        self.request: Request | None = None

    @property
    def done(self) -> bool:
        """No more tokens will come."""
        return self.request is None or self.request.finished

    @property
    def completion(self) -> Completion:
        """The answer as far as it has come."""
        assert self.request is not None
        return self.request.answer.done

    def __iter__(self) -> Iterator[Delta]:
        while True:
            while self._ready:
                yield self._ready.popleft()
            if not self._more():
                break
        if self.error is not None:
            raise self.error

    async def __aiter__(self) -> AsyncIterator[Delta]:
        self._driven()
        here = (asyncio.get_running_loop(), asyncio.Event())
        self._waiters.append(here)
        try:
            while True:
                here[1].clear()
                while self._ready:
                    yield self._ready.popleft()
                if self._engine is None and not self._ready:
                    break
                await here[1].wait()
        finally:
            self._waiters.remove(here)
        if self.error is not None:
            raise self.error

    def result(self) -> Completion:
        """Wait for the whole answer."""
        for _ in self:
            pass
        return self.completion

    async def wait(self) -> Completion:
        """The same, for asyncio."""
        async for _ in self:
            pass
        return self.completion

    def come(self) -> list[Delta]:
        """What has come and was not handed out yet, without waiting."""
        return [self._ready.popleft() for _ in range(len(self._ready))]

    def cancel(self) -> None:
        """Stop; the memory is free at once. What has come so far stays; the finish reason is "cancelled"."""
        if (engine := self._engine) is not None:
            engine._cancel(self)

    # An iterator that waits to be asked keeps its variables: the engine must not be one of them.

    def _more(self) -> bool:
        """Wait until something may have come; False if all has been handed out."""
        if (engine := self._engine) is not None:
            engine._wait(self)
            return True
        return bool(self._ready)

    def _driven(self) -> None:
        if (engine := self._engine) is not None:
            engine.start()

    # ------------------------------------------------------------------------------ for the engine

    def _put(self, delta: Delta) -> None:
        self._ready.append(delta)

    def _notify(self) -> None:
        """Something came, or the answer has ended: then nothing more will be put here."""
        if self.done:
            self._engine = None
        for loop, event in list(self._waiters):
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits there any more
                loop.call_soon_threadsafe(event.set)
