"""Several ranks as one engine: rank 0 takes requests, and all ranks run their passes in step.

Every rank has a core of its own. The ranks of a tensor row are told the same requests at the same moment and take
the same decisions: schedules follow from requests and tokens, and tokens from logits that are the same bits on all
of them (sums over ranks are). A running sum over what was drawn, sent along, finds it should that ever fail.
Rows have requests of their own, and meet in the layers of experts. So all ranks meet once a step on the host
(`meet`): each says what its next pass is, how many tokens, whether a graph could run it; a pass is run by all or
by none, a row without work bringing one token that nobody reads. With the same message rank 0 sends what its
callers want, and gets back what was drawn; both wait for the step after. On a GPU all this happens beside the
pass before.

The caller's `Handle` and `Request` on rank 0 are fronts: no scheduler knows them. Every rank that works on the
request has a `Request` of its own, whose handle (`Relay`) puts what comes into the next message.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import sys
import threading
import time
from array import array
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from rorqual.engine.grammar import Grammar, GrammarError
from rorqual.engine.inside import Inside, Look, Sight
from rorqual.engine.loop import Answer, Delta
from rorqual.engine.request import Handle, Request
from rorqual.engine.sampling import Sampling, SamplingError
from rorqual.engine.scheduler import Plan
from rorqual.nn import InputError
from rorqual.nn.layout import Layout, connected, gather_into

if TYPE_CHECKING:
    from rorqual.engine.core import Core

CLOSE = ["close"]
ROOM = 1 << 13
"""Bytes of a message that go in one exchange; a longer one takes a second."""

WATCH = 0.3
"""Seconds between looks at whether another rank has failed, and how long a rank that is stuck may stay so."""
GRACE = 5.0

ERRORS: dict[str, type[Exception]] = {e.__name__: e for e in (SamplingError, GrammarError, InputError)}
"""Errors that come back as what they were; others as `TeamError`."""


class TeamError(RuntimeError):
    """A rank failed, or left; the engine has ended on all of them."""


@dataclass
class Together:
    """A pass that all ranks run: by graphs for so many sequences and page-table columns at least, or without."""

    graphs: bool
    size: int
    blocks: int


@dataclass
class _News:
    """What became of a request since the last message."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] | None = None
    top: list[list[tuple[int, float]]] | None = None
    error: tuple[str, str] | None = None
    end: tuple[int, int, int, int] | None = None
    """Once it has ended: prompt tokens found in the prefix cache, preemptions, tokens drafted and accepted."""
    inside: list[list[Any]] | None = None
    """Where it is asked for, by token: what has become known of tokens with it (`_packed`)."""


class Relay(Handle):
    """The handle of a rank's own request: what comes goes into the next message to rank 0."""

    def __init__(self, team: Team, number: int) -> None:
        super().__init__(team.core)
        self.team, self.number = team, number

    def _put(self, delta: Delta) -> None:
        assert self.request is not None
        done, news = self.request.answer.done, self.team.news_of(self.number)
        self.team.drew(self.number, delta.id)
        news.tokens.append(delta.id)
        if done.logprobs is not None:
            news.logprobs = [*(news.logprobs or ()), done.logprobs[-1]]
        if done.top_logprobs is not None:
            news.top = [*(news.top or ()), done.top_logprobs[-1]]
        if done.inside is not None:
            news.inside = [*(news.inside or ()), [_packed(look) for look in delta.inside]]

    def _notify(self) -> None:
        assert self.request is not None
        request = self.request
        if not request.finished or not self.team.leave(self.number):
            return
        news, done = self.team.news_of(self.number), request.answer.done
        news.end = request.cached, request.preemptions, done.drafted, done.accepted
        if self.error is not None:
            news.error = type(self.error).__name__, str(self.error)
            self.team.drew(self.number, -1)


class Team:
    """One rank's side of an engine of many. `core` is this rank's; made on all ranks at the same time."""

    def __init__(self, core: Core, layout: Layout) -> None:
        self.core, self.layout, self.leads = core, layout, layout.rank == 0
        self.closed = False
        self.error: TeamError | None = None
        self._orders: list[Any] = []
        """On rank 0: what callers want, for the next message."""
        self._heard: list[Any] = []
        """What the last message said is to be done before the next plan."""
        self._brought: list[tuple[int, list[Any]]] = []
        """News of the last messages that callers have not been given yet, and whose."""
        self._fronts: dict[int, tuple[Request, int]] = {}
        """On rank 0: callers' requests under way, and the rows that have them."""
        self._load = [0] * layout.data
        self._numbers = 0
        self._own: dict[int, Request] = {}
        self._news: dict[int, _News] = {}
        self._others_busy = False
        self._ended = threading.Event()
        self._drawn = 0
        """A sum over all that this rank's requests have drawn: the same on all ranks of a row."""
        self._watch_for_failures()

    # ------------------------------------------------------------------------------------ callers

    @property
    def busy(self) -> bool:
        """Whether anything is under way for a caller, or on another rank."""
        return bool(self._fronts or self._orders or self._heard or self._others_busy)

    def submit(self, answer: Answer, priority: int) -> Handle:
        """Queue an answer: the row with the fewest requests will have it."""
        self._check_open()
        handle = Handle(self.core)
        row = min(range(self.layout.data), key=lambda r: self._load[r])
        seed = answer.sampling.seed
        request = Request(answer, handle, priority, self._numbers, list(answer.prompt))
        request.seed = secrets.randbits(62) if seed is None else seed
        handle.request = request
        number = self._numbers
        self._numbers += 1
        self._fronts[number] = request, row
        self._load[row] += 1
        words, ends = asdict(answer.sampling), sorted(answer.ends)
        inside = None if answer.inside is None else asdict(answer.inside)
        order = ["add", row, number, answer.prompt, words, priority, request.seed, ends, inside]
        self._orders.append(order)
        return handle

    @property
    def waiting(self) -> int:
        """Requests beyond those that can run at once."""
        return sum(max(0, load - self.core.slots) for load in self._load)

    def cancel(self, handle: Handle) -> None:
        """The caller wants no more; the row hears of it with the next message."""
        for number, (request, row) in self._fronts.items():
            if request.handle is handle:
                request.answer.done.finish_reason = "cancelled"
                self._orders.append(["cancel", row, number])
                self._dismiss(number)
                return

    def weights_changed(self) -> None:
        """All ranks are to drop what was computed with the old weights."""
        self._check_open()
        self._orders.append(["weights"])

    def close(self) -> None:
        """End the engine on all ranks; requests under way are cancelled. Rank 0 says it, the others hear it."""
        if self.closed or not self.leads:
            return
        for request, _ in list(self._fronts.values()):
            self.core._cancel(request.handle)
        if self.error is None:
            with self.guarding():
                self._exchange({"do": [CLOSE]})
        self._close()

    def _close(self) -> None:
        self.closed, self.layout.tokens = True, None
        self._ended.set()

    def _check_open(self) -> None:
        if self.error is not None:
            raise self.error
        if self.closed:
            raise InputError("the engine is closed")
        if not self.leads:
            raise InputError(
                f"rank 0 takes requests; this is rank {self.layout.rank}, which calls engine.follow()"
            )

    def _dismiss(self, number: int) -> None:
        _, row = self._fronts.pop(number)
        self._load[row] -= 1

    # ------------------------------------------------------------------------------------- steps

    def meet(self, plan: Plan) -> bool:
        """Tell the others of this rank's next pass, and hear of theirs: whether there is one at all. Sets what
        all have to agree on for it."""
        if self.error is not None:
            raise self.error
        tokens = sum(r.width for r in plan.decodes) + sum(c for _, c in plan.chunks)
        blocks = max((len(r.pages) for r in plan.decodes), default=1)
        note: dict[str, Any] = {"pass": [tokens, len(plan.chunks), len(plan.decodes), blocks]}
        note["busy"], note["drawn"] = self.core.has_own, self._drawn
        if self.leads:
            note["do"], self._orders = self._orders, []
        if self.layout.column == 0 and self._news:
            note["got"] = [
                [number, n.tokens, n.logprobs, n.top, n.error, n.end, n.inside]
                for number, n in self._news.items()
            ]
        self._news = {}
        notes = self._exchange(note)
        self._heard = notes[0]["do"]
        if self._heard == [CLOSE]:
            self._close()
            return False
        self._check_rows(notes)
        self._others_busy = any(n["busy"] for n in notes)
        if self.leads:
            self._brought = [(rank, n["got"]) for rank, n in enumerate(notes) if "got" in n]
        if not self.layout.gathers:
            return bool(plan)
        tokens, chunks, size, blocks = (
            max(column) for column in zip(*(n["pass"] for n in notes), strict=True)
        )
        own = self.core.runner.graphs
        graphs = chunks == 0 and own is not None and own.fits(size)
        self.core.runner.together = Together(graphs, size, blocks)
        self.layout.tokens = None if graphs else max(1, tokens)
        return bool(tokens)

    def _check_rows(self, notes: list[dict[str, Any]]) -> None:
        """The ranks of a row draw by themselves, from logits of the same bits. Plans follow from what was drawn two
        passes ago, so a difference is found before it can lead to different passes."""
        for rank, note in enumerate(notes):
            first = rank - rank % self.layout.tensor
            if note["drawn"] != notes[first]["drawn"]:
                raise RuntimeError(f"ranks {first} and {rank} drew different tokens for the same requests")

    def drew(self, number: int, token: int) -> None:
        """Count a token of a request, or -1 for its failure, into what the row has drawn."""
        self._drawn = (self._drawn * 31 + number * 1_000_003 + token) % (1 << 61)

    def obey(self) -> None:
        """Do what rank 0 said with the last message."""
        if self.leads and self.core._stale():
            self._orders.append(["weights"])
        heard, self._heard = self._heard, []
        for kind, *what in heard:
            if kind == "weights":
                self.core._renew()
            elif what[0] == self.layout.row:
                if kind == "add":
                    self._add(*what[1:])
                else:
                    self._drop(*what[1:])

    def _add(
        self,
        number: int,
        prompt: list[int],
        words: dict[str, Any],
        priority: int,
        seed: int,
        ends: list[int],
        inside: dict[str, bool] | None,
    ) -> None:
        sampling, given = _sampling(words), self.core.model
        tokenizer = getattr(given, "tokenizer", None)
        if tokenizer is None and (sampling.stop or sampling.grammar):
            raise InputError("stop strings and grammars need a tokenizer on every rank")
        answer = Answer(
            prompt,
            sampling,
            frozenset(ends),
            tokenizer.stream() if tokenizer is not None and sampling.stop else None,
            None if sampling.grammar is None else given.compiler.state(sampling.grammar),  # type: ignore[operator,union-attr]
            None if inside is None else Inside(**inside),
        )
        handle = Relay(self, number)
        request = handle.request = Request(answer, handle, priority, number, list(prompt))
        request.seed, request.looks = seed, self.core.looks_of(answer)
        self._own[number] = request
        self.core.scheduler.add(request)

    def _drop(self, number: int) -> None:
        request = self._own.pop(number, None)
        if request is not None and not request.finished:
            request.answer.done.finish_reason = "cancelled"
            self.core.scheduler.drop(request)

    def news_of(self, number: int) -> _News:
        """What the next message will say of a request."""
        news = self._news.get(number)
        if news is None:
            news = self._news[number] = _News()
        return news

    def leave(self, number: int) -> bool:
        """A request of this rank has ended; whether that is new."""
        return self._own.pop(number, None) is not None

    def deliver(self) -> None:
        """On rank 0: hand callers what the last message brought."""
        brought, self._brought = self._brought, []
        for rank, got in brought:
            for number, *news in got:
                if number in self._fronts:
                    self._hand(number, rank, _News(*news))

    def _hand(self, number: int, rank: int, news: _News) -> None:
        request = self._fronts[number][0]
        done, handle = request.answer.done, request.handle
        for i, token in enumerate(news.tokens):
            if done.logprobs is not None and news.logprobs is not None:
                done.logprobs.append(news.logprobs[i])
            if done.top_logprobs is not None and news.top is not None:
                done.top_logprobs.append([(t, p) for t, p in news.top[i]])
            request.ids.append(token)
            known: tuple[Look, ...] = ()
            if done.inside is not None and news.inside is not None:
                known = tuple(_unpacked(look) for look in news.inside[i])
                done.inside += known
            text = request.answer.take(token)
            handle._put(Delta(0, token, text, done.finish_reason, known))
        if news.end is not None:
            request.cached, request.preemptions, done.drafted, done.accepted = news.end
        if news.error is not None:
            name, text = news.error
            kind = ERRORS.get(name)
            handle.error = kind(text) if kind else TeamError(f"rank {rank}: {name}: {text}")
        if request.finished:
            self._dismiss(number)
        handle._notify()

    def _exchange(self, note: dict[str, Any]) -> list[dict[str, Any]]:
        """Every rank's note, in the order of the ranks."""
        blob = json.dumps(note, separators=(",", ":")).encode()
        found = self._exchange_bytes(len(blob).to_bytes(8, "little") + blob[: ROOM - 8], ROOM)
        sizes = [int.from_bytes(f[:8], "little") for f in found]
        longest = max(sizes) - (ROOM - 8)
        if longest > 0:
            rest = self._exchange_bytes(blob[ROOM - 8 :], longest)
            found = [f + r for f, r in zip(found, rest, strict=True)]
        return [json.loads(f[8 : 8 + size]) for f, size in zip(found, sizes, strict=True)]

    def _exchange_bytes(self, data: bytes, room: int) -> list[bytes]:
        mine = torch.frombuffer(bytearray(data.ljust(room, b"\0")), dtype=torch.uint8)
        out = torch.empty(room * self.layout.world, dtype=torch.uint8)
        with connected():
            gather_into(out, mine, group=self.layout.host)
        whole = out.numpy().tobytes()
        return [whole[i : i + room] for i in range(0, len(whole), room)]

    # ----------------------------------------------------------------------------------- failures

    @contextlib.contextmanager
    def guarding(self) -> Iterator[None]:
        """Whatever goes wrong inside ends the engine on all ranks, since the others wait for this one."""
        if self.error is not None:
            raise self.fail(self.error)  # found by the watch between two passes: callers have yet to hear it
        try:
            yield
        except BaseException as error:
            raise self.fail(error) from error

    def fail(self, error: BaseException) -> BaseException:
        """Say what happened here to all ranks and callers; what to raise."""
        rank = self.layout.rank
        if self.error is None:
            text = self._posted()
            if text is None and isinstance(error, ConnectionError):
                text = f"rank {rank} lost the others: {error}"
            elif text is None:
                text = f"rank {rank} failed: {type(error).__name__}: {error}"
                with contextlib.suppress(Exception):
                    self._store.set(self._key, text)
                if self.leads:  # its process may keep the store: the others are to read this before it goes
                    time.sleep(2 * WATCH)
            self.error = TeamError(f"{text}; the engine has ended on all ranks")
        self.layout.broken = True
        self._ended.set()
        for request, _ in self._fronts.values():
            request.handle.error = self.error
            request.handle._notify()
        self._fronts.clear()
        return self.error if isinstance(error, Exception) else error

    def _posted(self) -> str | None:
        """What another rank said when it failed. A connection that breaks may be seen before what broke it."""
        with contextlib.suppress(Exception):
            if self._store.check([self._key]):
                return str(self._store.get(self._key).decode())
        return None

    def _watch_for_failures(self) -> None:
        """A thread that looks whether another rank has failed: this one may then wait for it for ever."""
        self._store = dist.distributed_c10d._get_default_store()
        Team._made += 1
        self._key = f"rorqual/failed/{Team._made}"
        threading.Thread(target=self._watch, name="rorqual-watch", daemon=True).start()

    _made = 0
    """Engines made so far, the same on all ranks: their failures go by it."""

    def _watch(self) -> None:
        while not self._ended.wait(WATCH):
            text = self._posted()
            if text is None:
                continue
            self.error = self.error or TeamError(f"{text}; the engine has ended on all ranks")
            if self.layout.device.type == "cuda":
                for axis in (self.layout.data_axis, self.layout.tensor_axis):
                    if axis is None:
                        continue
                    if axis.near is not None:
                        axis.near.stop.fill_(1)
                    with contextlib.suppress(Exception):
                        axis.group._get_backend(self.layout.device).abort()
            if not self._ended.wait(GRACE) and not self.leads:
                print(f"rank {self.layout.rank} ends: {self.error}", file=sys.stderr, flush=True)
                os._exit(1)  # the thread that runs the engine hangs in a call that nothing will answer
            return


def _packed(look: Look) -> list[Any]:
    """A look as JSON has it."""
    seen = None if look.seen is None else [(s.layer, list(s.positions), s.every) for s in look.seen]
    return [look.index, look.experts, look.drafted, look.refused, seen]


def _unpacked(fields: list[Any]) -> Look:
    index, experts, drafted, refused, seen = fields
    sights = None if seen is None else [Sight(layer, array("i", at), every) for layer, at, every in seen]
    return Look(index, experts, drafted, tuple(refused), sights)


def _sampling(words: dict[str, Any]) -> Sampling:
    """A `Sampling` from its fields as JSON has them."""
    grammar = words["grammar"]
    if grammar is not None:
        after = grammar["start_after"]
        grammar = Grammar(
            grammar["kind"], grammar["text"], tuple(after) if isinstance(after, list) else after
        )
    pairs = tuple((int(token), float(value)) for token, value in words["logit_bias"])
    return Sampling(**(words | {"grammar": grammar, "logit_bias": pairs, "stop": tuple(words["stop"])}))
