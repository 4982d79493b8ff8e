"""The engine's core: requests in, tokens out, one step at a time."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Sequence

import torch

from rorqual.engine.looks import Looks
from rorqual.engine.loop import Answer, Delta
from rorqual.engine.pages import Pages
from rorqual.engine.request import Handle, Request
from rorqual.engine.runner import Drawn, Flight, Pass, Runner
from rorqual.engine.sampling import SamplingError
from rorqual.engine.scheduler import Plan, Scheduler
from rorqual.engine.team import Team, TeamError
from rorqual.engine.thread import drive, forget_frames, release_pool, waker
from rorqual.kernels.held import refresh_scales
from rorqual.kernels.linear import packing
from rorqual.nn import InputError, Transformer
from rorqual.nn.cache import ROLLBACK
from rorqual.nn.layout import Layout
from rorqual.nn.paged import ring_bytes


class EngineFull(InputError):
    """As many requests wait as the engine takes: try again later."""


class Core:
    """Requests in, tokens out; one step at a time, under one lock.

    `model.generate`'s answers, token for token, whatever arrives, leaves, is preempted or found in the prefix
    cache. Where drafts are sampled (`speculate` at a temperature) a seed's answer is one of the same distribution, and
    preemption makes it another. See `rorqual.Engine` for the options.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        slots: int,
        pages: int,
        page_size: int,
        step_tokens: int,
        max_waiting: int,
        prefix_cache: bool,
        speculate: bool,
        invariant: bool = False,
        fp8_cache: bool = False,
        layout: Layout | None = None,
    ) -> None:
        lanes = model.lanes(fp8_cache)[: None if speculate else len(model.layers)]
        rings = 0
        if ring_bytes(lanes):
            rings = 1 + slots + (slots if prefix_cache else 0)
        self.model = model
        self.pages = Pages(pages + 1, rings, page_size, prefix_cache)
        self.scheduler = Scheduler(self.pages, slots, step_tokens, model.config.max_positions)
        self.runner = Runner(model, pages + 1, page_size, rings, slots, speculate, invariant, fp8_cache)
        gathers = layout is not None and layout.gathers
        self.facts = None if gathers else self.runner.facts
        """What there is to see of the model for those who look inside; None where that isn't written."""
        self.max_waiting, self.speculate = max_waiting, speculate
        self._lock = threading.RLock()
        self._progress = threading.Condition(self._lock)
        self._thread: threading.Thread | None = None
        self._flight: tuple[Plan, Flight] | None = None
        self._arrivals = 0
        self._limit: int | None = None
        """Requests a pass, while the device is short of memory."""
        self.slots = slots
        self._ahead = model.device.type == "cuda"
        self._full_budget = step_tokens
        self._look_at_weights()
        self._weights = self._weights_stamp()
        self._ended = threading.Event()
        """For the thread there is: it is to end."""
        self._closed = False
        self._spoken = False
        """Whether any token has come yet: the first is not kept waiting for the next pass's kernels."""
        self.steps = 0
        """Passes run so far."""
        self.team = Team(self, layout) if layout is not None and layout.world > 1 else None

    # -------------------------------------------------------------------------------------- submit

    def submit_answer(self, answer: Answer, priority: int = 0) -> Handle:
        """Queue an answer to be made (its prompt and sampling checked by the caller)."""
        needed = -(-(len(answer.prompt) + answer.sampling.max_new_tokens) // self.pages.page_size)
        if needed > self.pages.total:
            held = self.pages.total * self.pages.page_size
            raise InputError(
                f"the request may grow to {len(answer.prompt) + answer.sampling.max_new_tokens} tokens, but the "
                f"engine's pages hold {held} in all: shorten it, lower max_new_tokens, or give the engine more memory"
            )
        if answer.inside is not None and self.facts is None:
            raise InputError("looking inside isn't written for data ranks that share experts: leave it out")
        with self._lock:
            if self._closed:
                raise InputError("the engine is closed")
            waiting = self.scheduler.waiting if self.team is None else self.team.waiting
            if waiting >= self.max_waiting:
                raise EngineFull(
                    f"{waiting} requests wait already, the engine takes {self.max_waiting}: try later"
                )
            if self.team is not None:
                handle = self.team.submit(answer, priority)
                self._progress.notify_all()
                return handle
            handle = Handle(self)
            self._arrivals += 1
            request = Request(answer, handle, priority, self._arrivals, list(answer.prompt))
            request.looks = self.looks_of(answer)
            handle.request = request
            self.scheduler.add(request)
            self._progress.notify_all()
        return handle

    def looks_of(self, answer: Answer) -> Looks | None:
        """What collects an answer's tokens as seen from inside; None if it doesn't ask."""
        if answer.inside is None or answer.done.inside is None or self.facts is None:
            return None
        return Looks(answer.inside, self.facts, len(answer.prompt), answer.done.inside)

    # ---------------------------------------------------------------------------------------- step

    @property
    def busy(self) -> bool:
        """Whether any request is under way."""
        return self.has_own or (self.team is not None and self.team.leads and self.team.busy)

    @property
    def has_own(self) -> bool:
        """The same, of requests that this process works on."""
        return bool(self._flight or self.scheduler.running or self.scheduler.waiting)

    def step(self) -> bool:
        """One pass and what it brings; False if there was nothing to do.

        On a GPU a pass is started before the draws of the one before it are read, so the device need not wait
        for the host; its own draws come after that, when grammars know what they allow. With speculation it is
        then not known yet how many tokens the pass before has brought: only graphs can start without that.
        """
        team = self.team
        with self._lock, self._products(), contextlib.nullcontext() if team is None else team.guarding():
            if team is None:
                self._check_weights()
            else:
                team.obey()
                if team.closed:
                    return False
            plan = self.scheduler.plan(self._limit)
            runs = bool(plan) if team is None else team.meet(plan)
            passed = self._forward(plan) if plan and runs else None
            if runs and not plan:
                self._keep_step()
            if team is not None:
                team.deliver()
            self._land()
            if passed is not None:
                self._draw(passed, plan)
            # Drafts under a grammar wait for the tokens before them; and after the last request nobody would land.
            undrafted = passed is not None and passed.undrafted
            if not self._ahead or not self._spoken or undrafted or not self.scheduler.running:
                self._land()
            self._progress.notify_all()
            return runs or self.busy

    def _settle(self, plan: Plan) -> None:
        """Land what the plan's pass can't start without."""
        if any(r.loose for r in plan.decodes) and not self.runner.replays(plan):
            self._land()
            plan.decodes = [r for r in plan.decodes if r.running]
            plan.chunks = [(r, count) for r, count in plan.chunks if r.running]

    def _products(self) -> contextlib.AbstractContextManager[None]:
        """Packed weight copies on the CPU; not in batch-invariant mode, which the trainer has to meet."""
        packs = self.model.device.type == "cpu" and not self.runner.invariant
        return packing(()) if packs else contextlib.nullcontext()

    def _forward(self, plan: Plan) -> Pass | None:
        """Start a pass; if it fails its requests fail, and the engine goes on."""
        try:
            self.runner.admit(plan)
            self._settle(plan)
            if not plan:
                return None
            passed = self.runner.forward(plan)
        except torch.OutOfMemoryError as error:
            self._raise_if(self.team is not None)  # others are in the middle of this pass and need this rank
            self._with_less(plan, error)
            return None
        except Exception as error:
            self._raise_if(self.team is not None)
            self._fail(plan.requests, error)
            return None
        except BaseException:
            self._start_over(plan)
            raise
        self.steps += 1
        self._limit = None if self._limit is None or self._limit > self.slots else self._limit + 1
        self.scheduler.budget = min(self._full_budget, self.scheduler.budget + self.pages.page_size)
        for request in plan.decodes:
            request.loose += request.width - 1
            request.held += 1
        for request, count in plan.chunks:
            request.held += count
        for request in passed.requests:
            request.flying += 1
        return passed

    def _with_less(self, plan: Plan, error: Exception) -> None:
        """The device ran out of memory: the next pass takes half as many requests and tokens; one request alone
        with no more than a page of tokens fails. To pages nothing was written that the next pass would not write;
        but layers before the one that failed may have rings full of a chunk's last tokens, where those before the
        chunk are needed again: such requests start over."""
        forget_frames(error)
        torch.cuda.empty_cache()
        lost = [request for request, _ in plan.chunks if request.ring]
        for request in {id(r): r for r in (*plan.admitted, *lost)}.values():
            self.scheduler.preempt(request)
        tokens = len(plan.decodes) + sum(count for _, count in plan.chunks)
        if len(plan.requests) == 1 and tokens <= self.pages.page_size:
            self._fail(plan.requests, error)
            return
        self._limit = max(1, len(plan.requests) // 2)
        if plan.chunks:
            self.scheduler.budget = max(self.pages.page_size, min(self.scheduler.budget, tokens) // 2)

    def _draw(self, passed: Pass, plan: Plan) -> None:
        try:
            self._flight = (plan, self.runner.draw(passed))
        except Exception as error:
            self._raise_if(self._shares_requests)
            self._arrive(passed)
            self._fail(plan.requests, error)
        except BaseException:
            self._arrive(passed)
            self._start_over(plan)
            raise

    def _start_over(self, plan: Plan) -> None:
        """The step was interrupted (Ctrl-C): what its requests hold can't be told, so they begin again."""
        for request in plan.requests:
            if request.running and not request.finished:
                self.scheduler.preempt(request)
            request.handle._notify()

    def _arrive(self, passed: Pass) -> None:
        """The pass is no longer under way."""
        for request, width in zip(passed.requests, passed.widths, strict=True):
            request.flying -= 1
            request.loose -= width - 1

    def _land(self) -> None:
        """Read the draws under way and hand them out."""
        if self._flight is None:
            return
        (plan, flight), self._flight = self._flight, None
        passed = flight.passed
        self._arrive(passed)
        self._spoken = self._spoken or bool(passed.requests)
        try:
            landed = flight.land()
            for request, drawn in zip(passed.requests, landed, strict=True):
                if not request.finished:
                    self._take(request, drawn)
            if passed.undrafted:
                self.runner.draft(passed)
        except Exception as error:
            self._raise_if(self._shares_requests)
            self._fail(plan.requests, error)
        except BaseException:
            self._start_over(plan)
            raise
        for request in plan.requests:
            if request.running and not request.finished:
                self._record(request)
            request.handle._notify()

    def _keep_step(self) -> None:
        """Take part in a pass that only other ranks have tokens for."""
        self.runner.idle()
        self.steps += 1

    @property
    def _shares_requests(self) -> bool:
        """Whether other ranks work on the same requests: none may part from the others."""
        return self.team is not None and self.team.layout.tensor > 1

    @staticmethod
    def _raise_if(condition: bool) -> None:
        """Raise what is being handled if `condition` holds."""
        if condition:
            raise

    def _take(self, request: Request, drawn: Drawn) -> None:
        """New tokens of a request: to its answer, and to its owner."""
        if drawn.error:
            self._fail([request], SamplingError(drawn.error))
            return
        done, looks = request.answer.done, request.looks
        if request.running:
            request.held += len(drawn.tokens) - 1
        done.drafted += drawn.drafted
        done.accepted += len(drawn.tokens) - 1
        for i, token in enumerate(drawn.tokens):
            if done.logprobs is not None:
                done.logprobs.append(drawn.logprobs[i])
            if done.top_logprobs is not None:
                done.top_logprobs.append(drawn.top[i])
            request.ids.append(token)
            text = request.answer.take(token)
            known = () if looks is None else looks.take(drawn, i, last=done.finish_reason is not None)
            request.handle._put(Delta(0, token, text, done.finish_reason, known))
            if done.finish_reason is not None:
                self._record(request)
                self.scheduler.drop(request)
                return

    def _record(self, request: Request) -> None:
        """Full blocks whose tokens are known become findable; rings are copied at a block's end."""
        size = self.pages.page_size
        whole = min(request.held, len(request.ids)) // size
        while request.blocks < whole:
            at = request.blocks * size
            request.block_name = self.pages.record(
                request.block_name if request.blocks else self.pages.root,
                request.ids[at : at + size],
                request.pages[request.blocks],
            )
            request.blocks += 1
            if request.blocks == whole and request.held + request.loose - whole * size <= ROLLBACK - 2:
                copy = self.pages.room_for_copy(request.block_name)
                if copy:
                    self.runner.copy_ring(request.ring, copy)

    def _fail(self, requests: Sequence[Request], error: Exception) -> None:
        """Deliver an error to each, and free what they held."""
        forget_frames(error)
        for request in requests:
            if request.finished:
                continue
            request.handle.error = error
            with contextlib.suppress(Exception):
                self.runner.wipe(request.pages[request.blocks :], request.ring)
            self.scheduler.drop(request)
            request.handle._notify()

    def _release(self) -> None:
        """The engine has ended: nothing that is still held of it, not even a handle, keeps its memory."""
        with self._lock:
            self._flight = None
            if self.model.device.type == "cuda" and self.team is None:
                torch.cuda.synchronize(self.model.device)  # a graph may still be running
            self.runner.release()

    # -------------------------------------------------------------------------------------- cancel

    def _cancel(self, handle: Handle) -> None:
        with self._lock:
            request = handle.request
            if request is None or request.finished:
                return
            if self.team is not None:
                self.team.cancel(handle)
                handle._notify()
                self._progress.notify_all()
                return
            request.answer.done.finish_reason = "cancelled"
            if request.looks is not None:
                request.looks.close()
            self.scheduler.drop(request)
            handle._notify()
            self._progress.notify_all()

    # ------------------------------------------------------------------------------------- weights

    def weights_changed(self) -> None:
        """The weights have new values: what was computed with the old ones is dropped, and requests under way
        are computed anew from their tokens. Changes PyTorch counts (in place, optimizers) and weights that moved are
        noticed without this call; writes through `.data`, and modules' parameters that became others, are not."""
        with self._lock:
            if self.team is None:
                self._renew()
            else:
                self.team.weights_changed()

    def _renew(self) -> None:
        with self._lock:
            self._land()
            if self._look_at_weights() and self.runner.graphs is not None:  # graphs know the old places
                self.model.adjoin()
                self._look_at_weights()
                self.runner.graphs = self.runner.new_graphs()
            self._weights = self._weights_stamp()
            for pack in self.model.packs():
                pack.check()
            refresh_scales()
            for request in list(self.scheduler.running):
                self.scheduler.preempt(request)
            self.pages.forget_all()

    def _look_at_weights(self) -> bool:
        """Note the model's tensors, buffers too (training moves the router's biases in place); whether any moved."""
        before = getattr(self, "_places", None)
        tensors = (*self.model.parameters(), *self.model.buffers())
        self._numbers = [t for t in tensors if not t.is_inference()]
        self._places = [t.data_ptr() for t in tensors]
        return before != self._places

    def _weights_stamp(self) -> int:
        return sum(t._version + t.data_ptr() for t in self._numbers)

    def _stale(self) -> bool:
        """Whether weights have changed since it was last looked."""
        before, self._weights = self._weights, self._weights_stamp()
        return before != self._weights

    def _check_weights(self) -> None:
        if self._stale():
            self.weights_changed()

    # --------------------------------------------------------------------------------- who drives it

    def start(self) -> None:
        """Give the engine a thread of its own (asyncio use does this): it then runs whenever there is work. The thread
        ends with the engine; an engine that is closed gets none."""
        with self._lock:
            if self._thread is None and not self._closed:
                release_pool(self.model.device)
                self._ended = threading.Event()
                known = weakref.ref(self, waker(self._progress))
                self._thread = threading.Thread(
                    target=drive,
                    args=(known, self.model.device, self._progress, self._ended),
                    name="rorqual-engine",
                    daemon=True,
                )
                self._thread.start()

    def stop(self) -> None:
        """End that thread; requests under way stay as they are. Who waits for them in asyncio waits until `start`."""
        with self._lock:
            thread, self._thread = self._thread, None
            self._ended.set()
            self._progress.notify_all()
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _drive_once(self) -> bool:
        """A step for the engine's thread, which outlives what is wrong outside any request's own work; False if the
        engine has ended."""
        try:
            self.step()
        except TeamError:
            return False  # it has been given to everyone who waits
        except Exception as error:
            self.fail_all(error)
        return True

    def fail_all(self, error: Exception) -> None:
        """A step failed outside any request's own work: everyone is given the error, and the engine goes on."""
        with self._lock:
            self._flight = None
            self._fail(self.scheduler.everyone(), error)
            self._progress.notify_all()

    def _wait(self, handle: Handle) -> None:
        """Until something new may have come for a handle: drive the engine, or wait for its thread."""
        with self._lock:
            if handle.done:  # and all of it has come, since it comes under this lock
                handle._notify()
            elif self._thread is None:
                self.step()
            elif not handle._ready:
                self._progress.wait(timeout=1.0)
