"""Runs plans on the device: pages and rings, forward passes, draws, and what comes back to the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from rorqual.engine.batch import Batch, Staging, lay_out
from rorqual.engine.draws import ACCEPT, DRAFT, RESIDUAL, judge, logprobs_of
from rorqual.engine.grammar import fill_masks
from rorqual.engine.graphs import Graphs
from rorqual.engine.request import Request
from rorqual.engine.sampling import UNSOUND, Sampler
from rorqual.engine.scheduler import Plan
from rorqual.kernels.mode import invariant as batch_invariant
from rorqual.nn import Transformer
from rorqual.nn.paged import PagedStep, Store, new_store


@dataclass
class Drawn:
    """What one request got from a pass."""

    tokens: list[int]
    logprobs: list[float] = field(default_factory=list)
    top: list[list[tuple[int, float]]] = field(default_factory=list)
    drafted: int = 0
    error: str = ""
    """Why nothing could be drawn: unsound logits, or a grammar that can't be followed."""


@dataclass
class Pass:
    """A forward pass and the requests that draw from it. `widths[r]` columns of request r: with a draft two."""

    requests: list[Request]
    slots: list[int]
    widths: list[int]
    logits: Tensor
    """[R, V] of each request's first column, then [R2, V] of the second columns of those that have one."""
    state: Tensor
    batch: Batch | None = None


class Flight:
    """Draws on their way to the host. `land()` waits for them and says what each request got."""

    def __init__(self, passed: Pass, ids_R2: Tensor, counts_R: Tensor, failed_R: Tensor) -> None:
        self.passed = passed
        self._parts = [_to_host(x) for x in (ids_R2, counts_R, failed_R)]
        self._logprobs: list[tuple[list[int], list[Tensor]]] = []
        self.stuck: dict[int, str] = {}
        self._event: torch.cuda.Event | None = None

    def note_logprobs(self, logits_RV: Tensor, ids_R: Tensor, rows: Sequence[int]) -> None:
        """Have the log-probabilities of these rows' tokens come along, for the requests that ask."""
        requests = self.passed.requests
        asking = [(i, r) for i, r in enumerate(rows) if requests[r].answer.done.logprobs is not None]
        picked = [i for i, _ in asking]
        if not asking:
            self._logprobs.append(([], []))
            return
        top = max(_alternatives(requests[r]) for _, r in asking)
        index = torch.tensor(picked, device=logits_RV.device)
        found = logprobs_of(logits_RV[index], ids_R[index], top)
        self._logprobs.append(([r for _, r in asking], [_to_host(x) for x in found]))

    def depart(self) -> Flight:
        """Everything that is to come along has been asked for."""
        if self._parts[0].is_pinned():
            self._event = torch.cuda.Event()
            self._event.record()
        return self

    def land(self) -> list[Drawn]:
        """One a request, in the pass's order."""
        if self._event is not None:
            self._event.synchronize()
        ids, counts, failed = (x.tolist() for x in self._parts)
        out = []
        for r, width in enumerate(self.passed.widths):
            drawn = Drawn(ids[r][: counts[r]], drafted=width - 1)
            if r in self.stuck:
                drawn.error = self.stuck[r]
            elif failed[r]:
                drawn.error = UNSOUND
            out.append(drawn)
        for rows, parts in self._logprobs:
            for r, chosen, top_ids, top_values in zip(rows, *(x.tolist() for x in parts), strict=True):
                if len(out[r].logprobs) < len(out[r].tokens):
                    out[r].logprobs.append(chosen)
                    best = list(zip(top_ids, top_values, strict=True))
                    out[r].top.append(best[: _alternatives(self.passed.requests[r])])
        return out


def _alternatives(request: Request) -> int:
    return 0 if request.answer.done.top_logprobs is None else int(request.sampling.logprobs)


def _to_host(x: Tensor) -> Tensor:
    if not x.is_cuda:
        return x
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)


class Runner:
    """A model with its pages. A pass can be started while the draws of the one before are on their way."""

    def __init__(
        self,
        model: Transformer,
        pages: int,
        page_size: int,
        rings: int,
        slots: int,
        speculate: bool,
        invariant: bool,
        fp8_cache: bool,
    ) -> None:
        self.invariant = invariant
        self.model, self.page_size, self.device, self.speculate = model, page_size, model.device, speculate
        lanes = model.lanes(fp8_cache)
        if not speculate:
            lanes = lanes[: len(model.layers)]
        self.stores: list[Store] = [new_store(kinds, pages, page_size, rings, self.device) for kinds in lanes]
        self._ring_names = [
            [name for name, lane in kinds.items() if lane.keep is not None] for kinds in lanes
        ]
        self.sampler = Sampler(model.config.vocab, self.device, slots)
        self._staging = Staging(self.device)
        self._graphs = None
        self._by_rows = model.fixed_rows or not invariant
        """Whether a pass takes all its tokens at once: else each is a pass of its own."""
        if self.device.type == "cuda" and self._by_rows:
            model.adjoin()
            self._graphs = Graphs(page_size, self._forward)
        self._newest = torch.zeros(slots + 1, dtype=torch.int64, device=self.device)
        """The last token drawn for each slot, for passes that start before the host has seen it."""
        self._q: Tensor | None = None
        """What each slot's draft was drawn from [slots, V], where drafts are sampled."""

    # ------------------------------------------------------------------------------------- forward

    @torch.inference_mode()
    def forward(self, plan: Plan) -> Pass:
        """Start a plan's forward pass."""
        with batch_invariant(self.invariant):
            return self._start(plan)

    def _start(self, plan: Plan) -> Pass:
        for request in plan.admitted:
            known = len(request.answer.prompt)
            sampling = (
                request.sampling if request.seed is None else replace(request.sampling, seed=request.seed)
            )
            request.seed = self.sampler.admit(
                request.slot, sampling, request.answer.prompt, request.ids[known:]
            )
        for source, target in plan.ring_copies:
            self.copy_ring(source, target)
        if self._graphs is not None and not plan.chunks:
            widths = {request.width for request in plan.decodes}
            if len(widths) == 1:
                passed = self._replay(plan, widths.pop())
                if passed is not None:
                    return passed
        batch = lay_out(plan, self.page_size, self._staging, one_group_of_chunks=self.device.type == "cuda")
        if batch.late is not None:
            batch.ids_N[batch.late[0]] = self._newest[batch.late[1]]
        if not self._by_rows:
            state = self._by_token(batch)
            rows = [
                self.model.logits(self.model.finish(state[:, c : c + 1])[0]) for c in batch.columns.tolist()
            ]
            logits = torch.cat(rows) if rows else state.new_empty(0, self.model.config.vocab)
        else:
            state = self.model.run_paged(batch.ids_N[None], batch.step, self.stores)
            logits = self.model.logits(self.model.finish(state[:, batch.columns])[0])
        return Pass(batch.drawing, [r.slot for r in batch.drawing], batch.widths, logits, state, batch)

    def _by_token(self, batch: Batch) -> Tensor:
        """The pass token by token, each as if it were alone (batch-invariant mode without kernels for it)."""
        states = []
        for group in batch.step.groups:
            for s, (start, count) in enumerate(zip(group.starts, group.counts, strict=True)):
                first = group.tokens.start + sum(group.counts[:s])
                for j in range(count):
                    at = slice(first + j, first + j + 1)
                    alone = group.alone(s, start + j)
                    step = PagedStep(batch.step.positions_N[at], [alone], self.page_size)
                    states.append(self.model.run_paged(batch.ids_N[None, at], step, self.stores))
        return torch.cat(states, 1)

    def _forward(self, ids_1N: Tensor, step: PagedStep) -> tuple[Tensor, Tensor]:
        """A decoding pass: logits `[N, V]` and states of every token."""
        state = self.model.run_paged(ids_1N, step, self.stores)
        return self.model.logits(self.model.finish(state)[0]), state

    def _replay(self, plan: Plan, width: int) -> Pass | None:
        """A plan of decodes alone, from a recorded graph; None if none is large enough."""
        assert self._graphs is not None
        if self.speculate:  # what MTP needs of the batch is laid out below
            return None
        out = self._graphs.run(plan.decodes, width, self._newest)
        if out is None:
            return None
        slots = [r.slot for r in plan.decodes]
        return Pass(list(plan.decodes), slots, [width] * len(slots), *out)

    # ---------------------------------------------------------------------------------------- draw

    @torch.inference_mode()
    def draw(self, passed: Pass) -> Flight:
        """Draw each request's next token, and the one after for drafts that stand."""
        requests, slots, rows = passed.requests, passed.slots, len(passed.requests)
        drafted = [r for r, width in enumerate(passed.widths) if width == 2]
        stuck: dict[int, str] = {}
        mask = self._masks(requests, stuck)
        first_RV = passed.logits[:rows]
        counts_R = torch.ones(rows, dtype=torch.int64, device=self.device)
        if not drafted:
            first_R = self.sampler.draw(first_RV, slots, mask)
            self.sampler.saw(slots, first_R)
            ids_R2 = first_R[:, None]
            self._newest[self._index(slots)] = first_R
            bonus = None
        else:
            ids_R2, stands_R, bonus = self._verify(passed, drafted, mask)
            counts_R += stands_R
        flight = Flight(passed, ids_R2, counts_R, self.sampler.failed(slots))
        flight.stuck = stuck
        flight.note_logprobs(first_RV, ids_R2[:, 0], range(rows))
        if bonus is not None:
            flight.note_logprobs(passed.logits[rows:], bonus, drafted)
        return flight.depart()

    def _verify(self, passed: Pass, drafted: list[int], mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """First tokens and, where the draft stands, the one after: ids `[R, 2]`, whether it stood `[R]`, and the
        second tokens of the drafted rows. A draft d stands with probability min(1, p(d) / q(d)), else the token
        is drawn from what p has over q."""
        sampler, rows = self.sampler, len(passed.requests)
        plain = [r for r in range(rows) if passed.widths[r] == 1]
        ids_R2 = torch.zeros(rows, 2, dtype=torch.int64, device=self.device)
        stands_R = torch.zeros(rows, dtype=torch.bool, device=self.device)
        if plain:
            at, slots = self._index(plain), [passed.slots[r] for r in plain]
            tokens = sampler.draw(passed.logits[:rows][at], slots, None if mask is None else mask[at])
            sampler.saw(slots, tokens)
            ids_R2[at, 0] = tokens
        at, slots = self._index(drafted), [passed.slots[r] for r in drafted]
        drafts = self._index([passed.requests[r].draft for r in drafted])
        first_DV, mask_D = passed.logits[:rows][at], None if mask is None else mask[at]
        if all(passed.requests[r].sampling.greedy for r in drafted):
            first = sampler.draw(first_DV, slots, mask_D)
            stands = first == drafts
        else:
            assert self._q is not None
            p, q = sampler.distribution(first_DV, slots, mask_D), self._q[self._index(slots)]
            stands, rest = judge(p, q, drafts, sampler.uniforms(slots, ACCEPT))
            first = torch.where(stands, drafts, sampler.draw_from(rest, slots, RESIDUAL))
        sampler.saw(slots, first)
        bonus = sampler.draw(passed.logits[rows:], slots, self._masks_after_drafts(passed, drafted))
        sampler.saw(slots, bonus, stands)
        ids_R2[at] = torch.stack((first, bonus), 1)
        stands_R[at] = stands
        return ids_R2, stands_R, bonus

    def _index(self, values: Sequence[int]) -> Tensor:
        if self.device.type != "cuda":
            return torch.tensor(values, dtype=torch.int64)
        return torch.tensor(values, dtype=torch.int64, pin_memory=True).to(self.device, non_blocking=True)

    def _masks(self, requests: Sequence[Request], stuck: dict[int, str]) -> Tensor | None:
        """What grammars allow next, as a bitmask on the device; None where no request has one. Rows whose grammar
        can't go on are named in `stuck`."""
        states = [r.answer.grammar for r in requests]
        compiler = next((s.compiler for s in states if s is not None), None)
        if compiler is None:
            return None
        bits_RW = compiler.bitmask(len(states))
        for r in fill_masks(states, bits_RW):
            state = states[r]
            stuck[r] = f"the grammar can't be followed any further: {state and state.error}"
            bits_RW[r] = -1
        return bits_RW.to(self.device, non_blocking=True)

    def _masks_after_drafts(self, passed: Pass, drafted: list[int]) -> Tensor | None:
        """The same for the token after each draft (of no account where the draft breaks the grammar)."""
        requests = [passed.requests[r] for r in drafted]
        took = []
        for r in requests:
            state = r.answer.grammar
            if state is not None and state.validate([r.draft]):
                state.advance(r.draft)
                took.append(state)
        mask = self._masks(requests, {})
        for state in took:
            state.rollback(1)
        return mask

    # --------------------------------------------------------------------------------------- draft

    @torch.inference_mode()
    def draft(self, passed: Pass, drawn: Sequence[Drawn]) -> None:
        """Run MTP over the pass's tokens, now that what follows each is known, and draw the next draft of every
        request that goes on."""
        batch = passed.batch
        assert batch is not None
        next_N, columns = batch.next_N, []
        for r, (last, got) in enumerate(zip(batch.last, drawn, strict=True)):
            first = last - passed.widths[r] + 1
            columns.append(first + len(got.tokens) - 1)
        at = [
            last - w + 1 + j
            for last, w, got in zip(batch.last, passed.widths, drawn, strict=True)
            for j in range(len(got.tokens))
        ]
        if at:
            next_N[self._index(at)] = self._index([t for got in drawn for t in got.tokens])
        with batch_invariant(self.invariant):
            state = (
                passed.state if self.model.config.residual is not None else self.model.finish(passed.state)
            )
            store = self.stores[len(self.model.layers)]
            hidden, _ = self.model.predict_further_paged(state, next_N[None], batch.step, 0, store)
        living = [r for r, request in enumerate(passed.requests) if request.running and not request.finished]
        if not living:
            return
        requests = [passed.requests[r] for r in living]
        slots = [r.slot for r in requests]
        with batch_invariant(self.invariant):
            logits = self.model.logits(hidden[0, self._index([columns[r] for r in living])])
        mask = self._masks(requests, {})
        if all(r.sampling.greedy for r in requests):
            drafts = self.sampler.draw(logits, slots, mask)
        else:
            q = self.sampler.distribution(logits, slots, mask)
            if self._q is None:
                self._q = q.new_zeros(self._newest.shape[0], q.shape[1])
            self._q[self._index(slots)] = q
            drafts = self.sampler.draw_from(q, slots, DRAFT)
        for request, draft in zip(requests, drafts.tolist(), strict=True):
            request.draft = draft

    # --------------------------------------------------------------------------------------- pages

    @torch.inference_mode()
    def copy_ring(self, source: int, target: int) -> None:
        """One ring's content into another, in every layer."""
        for store, names in zip(self.stores, self._ring_names, strict=True):
            for name in names:
                store[name][target] = store[name][source]

    @torch.inference_mode()
    def wipe(self, pages: list[int], ring: int) -> None:
        """Zero what a failed request held: NaN left in a page could reach those who get it next."""
        index = torch.tensor(pages, device=self.device)
        for store, rings in zip(self.stores, self._ring_names, strict=True):
            for name, memory in store.items():
                if name in rings:
                    memory[ring] = 0
                elif pages:
                    memory[index] = 0
