"""Who runs in the next pass, by rank: each decode that has memory, and prompts in chunks within a budget of tokens."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

from rorqual.engine.inside import Inside
from rorqual.engine.pages import Pages
from rorqual.engine.request import Request


@dataclass
class Plan:
    """One pass: requests that bring their last token (and perhaps a draft), and chunks of prompts.

    `ring_copies` (from, to) are made before it runs, in this order.
    """

    decodes: list[Request] = field(default_factory=list)
    chunks: list[tuple[Request, int]] = field(default_factory=list)
    ring_copies: list[tuple[int, int]] = field(default_factory=list)
    admitted: list[Request] = field(default_factory=list)
    """Requests that have just been given a slot."""
    inside: Inside | None = None
    """What its requests want told of tokens that this pass takes in."""

    def __bool__(self) -> bool:
        return bool(self.decodes or self.chunks)

    @property
    def requests(self) -> list[Request]:
        """All that take part."""
        return [*self.decodes, *(r for r, _ in self.chunks)]


class Scheduler:
    """Continuous batching over `slots` requests and the pages there are.

    Running requests are served by rank (priority, then arrival). When pages run out the last in rank gives
    all of its up and waits again; what it had computed stays findable as long as memory lasts, the rest
    is computed anew, with the same result: draws depend on the request's seed and the token's place alone.
    """

    def __init__(self, pages: Pages, slots: int, budget: int, positions: int) -> None:
        self.pages, self.budget, self.positions = pages, budget, positions
        self.running: list[Request] = []
        self.slots = list(range(slots - 1, -1, -1))
        self._waiting: list[tuple[tuple[int, int], Request]] = []
        self.preemptions = 0
        self._looking: set[int] = set()
        """Requests that look inside."""

    # ---------------------------------------------------------------------------------- membership

    @property
    def waiting(self) -> int:
        """Requests that hold nothing yet, or nothing any more."""
        return len(self._waiting)

    def add(self, request: Request) -> None:
        """A request joins those that wait."""
        heapq.heappush(self._waiting, (request.rank, request))
        if request.looks is not None:
            self._looking.add(id(request))

    def drop(self, request: Request) -> None:
        """A request leaves: all it holds is free."""
        self._looking.discard(id(request))
        if request.running:
            self.running.remove(request)
            self._strip(request)
        else:
            self._waiting = [entry for entry in self._waiting if entry[1] is not request]
            heapq.heapify(self._waiting)

    def everyone(self) -> list[Request]:
        """All requests, running and waiting."""
        return [*self.running, *(r for _, r in self._waiting)]

    def preempt(self, request: Request) -> None:
        """A running request gives everything up and waits again."""
        self.running.remove(request)
        self._strip(request)
        request.preemptions += 1
        self.preemptions += 1
        self.add(request)

    def _strip(self, request: Request) -> None:
        self.pages.release(request.pages)
        self.pages.release_ring(request.ring)
        self.slots.append(request.slot)
        request.pages, request.ring, request.slot = [], 0, -1
        request.held = request.blocks = 0
        request.drafted, request.draft = False, None

    # ---------------------------------------------------------------------------------------- plan

    def plan(self, limit: int | None = None) -> Plan:
        """The next pass; empty if nothing can run. `limit` bounds how many requests take part (after the
        device ran out of memory)."""
        plan, budget = Plan(), self.budget
        self.running.sort(key=lambda r: r.rank)
        for request in list(self.running):
            if limit is not None and len(plan.requests) >= limit:
                break
            if not request.running or request.finished or request.left <= 0:
                continue
            budget -= self._serve(request, budget, plan)
        while self._waiting and budget > 0 and (limit is None or len(plan.requests) < limit):
            request = self._waiting[0][1]
            if request.flying or not self._admit(request, plan):
                break
            budget -= self._serve(request, budget, plan)
        if self._looking:
            plan.inside = _asked(plan)
        return plan

    def _serve(self, request: Request, budget: int, plan: Plan) -> int:
        """Put a running request's next tokens into the plan; returns how many."""
        missing = request.length - request.held
        if missing == 1:
            reach = min(request.held + request.loose + request.width, request.longest)
            if not self._reach(request, reach):
                return 0
            plan.decodes.append(request)
            return 0  # the budget is the prompts': theirs should not be cut short by a few tokens
        count = self._chunk(request, min(missing, budget))
        if count <= 0 or not self._reach(request, request.held + count):
            return 0
        plan.chunks.append((request, count))
        return count

    def _chunk(self, request: Request, count: int) -> int:
        """`count`, cut where rings can be copied for the prefix cache: a chunk that passes the last whole
        block of the prompt ends there, and shorter ones end at a block's end if they reach one."""
        size = self.pages.page_size
        if not (self.pages.has_rings and self.pages.prefix_cache):
            return count
        border = (request.held + count) // size * size
        return border - request.held if border > request.held else count

    def _reach(self, request: Request, tokens: int) -> bool:
        """Hold pages for so many tokens, if need be by taking them from requests of lower rank."""
        missing = -(-tokens // self.pages.page_size) - len(request.pages)
        if missing <= 0:
            return True
        while (taken := self.pages.take(missing)) is None:
            victim = max(self.running, key=lambda r: r.rank)
            self.preempt(victim)
            if victim is request:
                return False
        request.pages += taken
        return True

    def _admit(self, request: Request, plan: Plan) -> bool:
        """Give a waiting request a slot, the pages of its longest cached prefix, and a ring."""
        while True:
            ring = self.pages.take_ring() if self.slots else None
            if ring is not None:
                match = self.pages.match(request.ids)
                rest = -(-request.length // self.pages.page_size) - len(match.pages)
                # Room for the whole prompt and a little: else requests would be let in only to be thrown out.
                if rest + (1 if self.running else 0) <= self.pages.available:
                    break
                self.pages.release(match.pages)
                self.pages.release_ring(ring)
            victim = max(self.running, key=lambda r: r.rank, default=None)
            if victim is None or victim.priority >= request.priority or victim in plan.requests:
                return False
            self.preempt(victim)
        heapq.heappop(self._waiting)
        request.slot, request.ring = self.slots.pop(), ring
        request.pages = match.pages
        request.blocks, request.block_name = len(match.pages), match.name
        request.held = len(match.pages) * self.pages.page_size
        if not request.preemptions:
            request.cached = request.held
        if match.ring:
            plan.ring_copies.append((match.ring, ring))
        self.running.append(request)
        plan.admitted.append(request)
        return True


def _asked(plan: Plan) -> Inside | None:
    """What the plan's requests want told of it. Of prompts nothing is; but a request that was thrown out brings tokens
    of its answer as a chunk."""
    asked: Inside | None = None
    again = (r for r, count in plan.chunks if r.held + count == r.length > len(r.answer.prompt))
    for request in (*plan.decodes, *again):
        if request.looks is not None:
            asked = request.looks.inside | asked
    return asked
