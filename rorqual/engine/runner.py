"""Runs plans on the device: pages and rings, forward passes, draws, and what comes back to the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from rorqual.engine.batch import Batch, lay_out
from rorqual.engine.draws import logprobs_of
from rorqual.engine.grammar import fill_masks
from rorqual.engine.graphs import Graphs, Recorded
from rorqual.engine.inside import Facts, Inside
from rorqual.engine.looks import Insight, Insights
from rorqual.engine.packed import Left
from rorqual.engine.rehearse import Rehearsals
from rorqual.engine.request import Request
from rorqual.engine.sampling import UNSOUND, Sampler
from rorqual.engine.scheduler import Plan
from rorqual.engine.staging import Coming, Staging
from rorqual.engine.tallies import upload
from rorqual.engine.team import Together
from rorqual.kernels.mode import invariant as batch_invariant
from rorqual.kernels.single_ring import Rings
from rorqual.nn import Transformer
from rorqual.nn.paged import Group, PagedStep, Store, new_store
from rorqual.nn.watch import Watch


@dataclass
class Drawn:
    """What one request got from a pass."""

    tokens: list[int]
    logprobs: list[float] = field(default_factory=list)
    top: list[list[tuple[int, float]]] = field(default_factory=list)
    drafted: int = 0
    error: str = ""
    """Why nothing could be drawn: unsound logits, or a grammar that can't be followed."""
    insight: Insight | None = None
    """What the pass chose, if the request looks inside."""


@dataclass
class Pass:
    """A forward pass and the requests that draw from it. `widths[r]` tokens of request r: with a draft two."""

    requests: list[Request]
    slots: list[int]
    widths: list[int]
    first_RV: Tensor
    """Logits of each request's first token."""
    second_DV: Tensor
    """Logits of the second tokens, of the requests numbered in `drafted`."""
    drafted: list[int]
    drafts_D: Tensor
    """The drafts that those requests brought,"""
    tries_D: Tensor
    """and which of them are drafts, 1 or 0."""
    starts_R: Tensor
    """Positions of the first tokens."""
    state: Tensor
    """What MTP reads."""
    source: Batch | Recorded
    at: list[int]
    """The tokens' columns in the pass: of the first ones, then of the second ones."""
    inside: Inside | None = None
    """What is to be told of it, if anything."""
    drawn_4R: Tensor | None = None
    """With speculation what was drawn: first tokens, second tokens, how many of the two stand, and failures."""
    undrafted: bool = False
    """MTP has still to run over it."""


class Flight:
    """Draws on their way to the host. `land()` waits for them and says what each request got."""

    def __init__(self, passed: Pass, drawn: Tensor, stuck: dict[int, str]) -> None:
        """`drawn` int64 [2, R]: tokens and failures; or [4, R], as of `Pass`."""
        self.passed, self.stuck = passed, stuck
        self._coming = Coming(drawn)
        self._logprobs: list[tuple[list[int], list[Tensor]]] = []
        self._insights: Insights | None = None

    def note_logprobs(self, logits_RV: Tensor, ids_R: Tensor, rows: Sequence[int]) -> None:
        """Have the log-probabilities of these rows' tokens come along, for the requests that ask."""
        requests = self.passed.requests
        asking = [(i, r) for i, r in enumerate(rows) if requests[r].answer.done.logprobs is not None]
        picked = [i for i, _ in asking]
        if not asking:
            self._logprobs.append(([], []))
            return
        top = max(_alternatives(requests[r]) for _, r in asking)
        index = upload(picked, torch.int64, logits_RV.device)
        found = logprobs_of(logits_RV[index], ids_R[index], top)
        self._logprobs.append(([r for _, r in asking], self._coming.add(*found)))

    def note_inside(self, facts: Facts) -> None:
        """Have what the pass chose come along, for the requests that look inside."""
        passed = self.passed
        asking = [r for r, request in enumerate(passed.requests) if request.looks is not None]
        if passed.inside is None or not asking:
            return
        places = {r: d for d, r in enumerate(passed.drafted)}
        drafted = [r for r in asking if r in places and passed.widths[r] > 1]
        at = [passed.at[r] for r in asking]
        at += [passed.at[len(passed.requests) + places[r]] for r in drafted]
        device = passed.first_RV.device
        drafts = (
            passed.drafts_D[upload([places[r] for r in drafted], torch.int64, device)] if drafted else None
        )
        self._insights = Insights(facts, asking, drafted)
        self._insights.send(self._coming, passed.source.step.watch, upload(at, torch.int64, device), drafts)

    def depart(self) -> Flight:
        """Everything that is to come along has been asked for."""
        self._coming.depart()
        return self

    def land(self) -> list[Drawn]:
        """One a request, in the pass's order."""
        firsts, *more, failed = self._coming.land()[0].tolist()
        out = []
        for r, (first, width) in enumerate(zip(firsts, self.passed.widths, strict=True)):
            both = bool(more) and more[1][r] > 1
            drawn = Drawn([first, more[0][r]] if both else [first], drafted=width - 1)
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
        if self._insights is not None:
            for r, insight in self._insights.land().items():
                out[r].insight = insight
        return out


def _kept(inside: Inside | None) -> tuple[bool, bool] | None:
    """What a pass has to keep of its choices; None if nothing."""
    return (inside.experts, bool(inside.seen)) if inside is not None and inside.watches else None


def _alternatives(request: Request) -> int:
    return 0 if request.answer.done.top_logprobs is None else int(request.sampling.logprobs)


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
        self.facts = Facts.of(model, fp8_cache, speculate)
        lanes = model.lanes(fp8_cache)
        if not speculate:
            lanes = lanes[: len(model.layers)]
        self.stores: list[Store] = [new_store(kinds, pages, page_size, rings, self.device) for kinds in lanes]
        self._ring_names = [
            [name for name, lane in kinds.items() if lane.keep is not None] for kinds in lanes
        ]
        idle = 1  # a slot for idle rows of graphs
        self.sampler = Sampler(model.config.vocab, self.device, slots + idle)
        self._staging = Staging(self.device)
        self._rehearsals = Rehearsals()
        there = self.sampler.newest_S
        self._left = Left(there, torch.zeros_like(there), torch.zeros_like(there))
        self.together: Together | None = None
        """What the ranks of an engine of many have agreed on for the next pass."""
        self.graphs: Graphs | None = None
        self._rings = Rings.claim(self.device)
        """Kept over a change of weights: graphs that follow others go on with them."""
        self._by_rows = model.fixed_rows or not invariant
        """Whether a pass takes all its tokens at once: else each is a pass of its own."""
        if self.device.type == "cuda" and self._by_rows:
            model.adjoin()
            self.graphs = self.new_graphs()

    def release(self) -> None:
        """Give the memory of caches and graphs back, whoever still knows this runner: no pass follows."""
        self.stores, self.graphs, self._rings = [], None, None

    def new_graphs(self) -> Graphs:
        """Graphs of this runner's decoding passes."""
        further = self._further if self.speculate else None
        return Graphs(self.page_size, self._forward, further, self._left, self._staging, self._rings)

    # ------------------------------------------------------------------------------------- forward

    @torch.inference_mode()
    def admit(self, plan: Plan) -> None:
        """Seat the plan's new requests, and give them the rings they go on from: once, before its pass."""
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

    def replays(self, plan: Plan) -> bool:
        """Whether the plan's pass runs from a graph: then what passes under way bring need not be known."""
        if self.graphs is None or (self.together is not None and not self.together.graphs):
            return False
        return not plan.chunks and self.graphs.fits(len(plan.decodes))

    @torch.inference_mode()
    def forward(self, plan: Plan) -> Pass:
        """Start a plan's forward pass."""
        with batch_invariant(self.invariant):
            return self._replay(plan) if self.replays(plan) else self._run(plan)

    def _replay(self, plan: Plan) -> Pass:
        """A plan of decodes alone, from a recorded graph. With speculation all bring two tokens; the second of
        those without a draft is any."""
        assert self.graphs is not None
        width, rows = 1 + self.speculate, len(plan.decodes)
        kept = _kept(plan.inside)
        made = self.graphs.run(plan.decodes, width, self._least, kept or (False, False))
        logits = made.logits.unflatten(0, (-1, width))[:rows]
        ids, starts = (x.view(-1, width)[:rows] for x in (made.laid.ids_N, made.laid.positions_N))
        return Pass(
            list(plan.decodes),
            [r.slot for r in plan.decodes],
            [r.width for r in plan.decodes],
            logits[:, 0],
            logits[:, -1],
            list(range(rows)) if self.speculate else [],
            ids[:, -1],
            made.laid.tries_S[:rows],
            starts[:, 0],
            made.state,
            made,
            [r * width + second for second in range(width) for r in range(rows)],
            plan.inside,
        )

    @property
    def _least(self) -> tuple[int, int]:
        return (1, 1) if self.together is None else (self.together.size, self.together.blocks)

    @torch.inference_mode()
    def idle(self) -> None:
        """A pass for other ranks' sake, of none of this one's requests: its tokens are on page 0."""
        if self.graphs is not None and self.together is not None and self.together.graphs:
            self.graphs.run([], 1, self._least)
            return
        zero = torch.zeros(1, dtype=torch.int64, device=self.device)
        ends = torch.ones(1, dtype=torch.int32, device=self.device)
        offsets = torch.arange(2, dtype=torch.int32, device=self.device)
        group = Group(slice(0, 1), [0], [1], 1, 1, zero[None].int(), zero, ends, offsets, decoding=True)
        self.model.run_paged(zero[None], PagedStep(zero, [group], self.page_size), self.stores)

    @torch.inference_mode()
    def record(self, size: int, columns: Sequence[int]) -> None:
        """Record the decoding passes of `size` answers with page tables so wide, if passes are recorded here."""
        if self.graphs is None or self.together is not None:
            return
        with batch_invariant(self.invariant):
            for wide in columns:
                self.graphs.run([], 1 + self.speculate, (size, wide))

    def _run(self, plan: Plan) -> Pass:
        """Any plan, as it comes."""
        if self.graphs is not None and self.device.type == "cuda":
            self._rehearsals.rehearse(self, plan)
        batch = lay_out(plan, self.page_size, self._staging, one_group_of_chunks=self.device.type == "cuda")
        for late, table in ((batch.late, self._left.newest_S), (batch.drafts, self._left.draft_S)):
            if late is not None:
                batch.ids_N[late[0]] = table[late[1]]
        rows, kept = len(batch.drawing), _kept(plan.inside)
        if kept is not None:
            batch.step.watch = Watch(*kept)
        if not self._by_rows:
            state = self._by_token(batch)
            parts = [self._head(state[:, c : c + 1]) for c in batch.columns.tolist()]
            logits = torch.cat(parts) if parts else state.new_empty(0, self.model.config.vocab)
        else:
            state = self.model.run_paged(batch.ids_N[None], batch.step, self.stores)
            logits = self._head(state[:, batch.columns])
        return Pass(
            batch.drawing,
            [r.slot for r in batch.drawing],
            batch.widths,
            logits[:rows],
            logits[rows:],
            [r for r, width in enumerate(batch.widths) if width == 2],
            batch.ids_N[batch.columns[rows:]],
            torch.ones_like(batch.columns[rows:]),
            batch.step.positions_N[batch.columns[:rows]],
            self._finished(state) if self.speculate else state,
            batch,
            batch.at,
            plan.inside,
        )

    def _head(self, state: Tensor) -> Tensor:
        """Logits `[n, V]` of states `[1, n, ...]`."""
        return self.model.logits(self.model.finish(state)[0])

    def _finished(self, state: Tensor) -> Tensor:
        """What MTP reads: V4's raw streams, or V3's hidden state after the final norm."""
        return state if self.model.config.residual is not None else self.model.finish(state)

    def _by_token(self, batch: Batch) -> Tensor:
        """The pass token by token, each as if it were alone (batch-invariant mode without kernels for it)."""
        states, watch = [], batch.step.watch
        watches: list[Watch] = []
        for group in batch.step.groups:
            for s, (start, count) in enumerate(zip(group.starts, group.counts, strict=True)):
                first = group.tokens.start + sum(group.counts[:s])
                for j in range(count):
                    at = slice(first + j, first + j + 1)
                    alone = group.alone(s, start + j)
                    step = PagedStep(batch.step.positions_N[at], [alone], self.page_size)
                    if watch is not None:
                        step.watch = Watch(watch.experts, watch.seen)
                        watches.append(step.watch)
                    states.append(self.model.run_paged(batch.ids_N[None, at], step, self.stores))
        if watch is not None:
            watch.take(watches)
        return torch.cat(states, 1)

    def _forward(self, ids_1N: Tensor, step: PagedStep) -> tuple[Tensor, Tensor]:
        """A decoding pass: logits `[N, V]` of every token, and the states that MTP reads."""
        state = self.model.run_paged(ids_1N, step, self.stores)
        hidden = self.model.finish(state)
        return self.model.logits(hidden[0]), state if self.model.config.residual is not None else hidden

    def _further(self, state: Tensor, next_1N: Tensor, step: PagedStep, columns: Tensor) -> Tensor:
        """MTP over a pass: logits `[len(columns), V]` of the tokens after the next, at these columns."""
        store = self.stores[len(self.model.layers)]
        hidden, _ = self.model.further(state, next_1N, step, 0, store)
        return self.model.logits(hidden[0, columns])

    # ---------------------------------------------------------------------------------------- draw

    @torch.inference_mode()
    def draw(self, passed: Pass) -> Flight:
        """Draw each request's next token, and the one after for drafts that stand; and the next draft, unless
        grammars have to take these tokens first (then `draft` does)."""
        requests, rows = passed.requests, len(passed.requests)
        stuck: dict[int, str] = {}
        mask = self._masks(requests, stuck)
        if passed.drafted:
            drawn = passed.drawn_4R = self._verify(passed, mask)
        else:
            drawn = self.sampler.take(passed.first_RV, passed.slots, mask)
            if self.speculate:
                one = torch.ones_like(drawn[0])
                drawn = passed.drawn_4R = torch.stack((drawn[0], one, one, drawn[1]))
        flight = Flight(passed, drawn, stuck)
        flight.note_logprobs(passed.first_RV, drawn[0], range(rows))
        if passed.drafted:
            second_D = drawn[1] if len(passed.drafted) == rows else drawn[1, self._index(passed.drafted)]
            flight.note_logprobs(passed.second_DV, second_D, passed.drafted)
        if passed.inside is not None:
            flight.note_inside(self.facts)
        flight.depart()
        passed.undrafted = self.speculate
        if self.speculate and all(r.answer.grammar is None for r in requests):
            self.draft(passed)
        return flight

    def _verify(self, passed: Pass, mask: Tensor | None) -> Tensor:
        """Draw where some rows have drafts, and where these stand once more: int64 [4, R] as of `Pass`."""
        if len(passed.drafted) == len(passed.requests):
            return self._judge(passed, passed.first_RV, mask)
        drafted = set(passed.drafted)
        plain = [r for r in range(len(passed.requests)) if r not in drafted]
        drawn_4R = torch.ones(4, len(passed.requests), dtype=torch.int64, device=self.device)
        at = self._index(plain)
        masked = None if mask is None else mask[at]
        drawn_4R[0::3, at] = self.sampler.take(passed.first_RV[at], [passed.slots[r] for r in plain], masked)
        at = self._index(passed.drafted)
        drawn_4R[:, at] = self._judge(passed, passed.first_RV[at], None if mask is None else mask[at])
        return drawn_4R

    def _judge(self, passed: Pass, first_DV: Tensor, mask_D: Tensor | None) -> Tensor:
        """The same of the rows with drafts alone."""
        slots = [passed.slots[r] for r in passed.drafted]
        first_D, stands_D = self.sampler.judge(first_DV, slots, passed.drafts_D, passed.tries_D, mask_D)
        second_2D = self.sampler.take(passed.second_DV, slots, self._masks_after_drafts(passed), stands_D)
        return torch.stack((first_D, second_2D[0], stands_D + 1, second_2D[1]))

    def _index(self, values: Sequence[int]) -> Tensor:
        return upload(values, torch.int64, self.device)

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

    def _masks_after_drafts(self, passed: Pass) -> Tensor | None:
        """The same for the token after each draft (of no account where the draft breaks the grammar)."""
        requests = [passed.requests[r] for r in passed.drafted]
        took = []
        for request in requests:
            state = request.answer.grammar
            if state is None or request.draft is None:
                continue
            there, place = request.draft
            draft = int(there.land()[0][place])
            if state.validate([draft]):
                state.advance(draft)
                took.append(state)
        mask = self._masks(requests, {})
        for state in took:
            state.rollback(1)
        return mask

    # --------------------------------------------------------------------------------------- draft

    @torch.inference_mode()
    def draft(self, passed: Pass) -> None:
        """Run MTP over the pass's tokens, now that what follows each is known, and draw the next draft of every
        request that may go on."""
        source, drawn_4R, rows = passed.source, passed.drawn_4R, len(passed.requests)
        assert drawn_4R is not None
        passed.undrafted = False
        with batch_invariant(self.invariant):
            if isinstance(source, Recorded):
                assert self.graphs is not None
                logits = self.graphs.draft(source, drawn_4R[:2].T, drawn_4R[2])
            else:
                source.next_N[source.columns[:rows]] = drawn_4R[0]
                if passed.drafted:
                    source.next_N[source.columns[rows:]] = drawn_4R[1, self._index(passed.drafted)]
                columns = source.columns[:rows] + drawn_4R[2] - 1
                logits = self._further(passed.state, source.next_N[None], source.step, columns)
        slots_R = self.sampler.index(passed.slots)
        self._left.held_S[slots_R] = passed.starts_R + drawn_4R[2]
        requests, slots = passed.requests, passed.slots
        mask = self._masks(requests, {})
        drafts = self.sampler.draft(logits, slots, mask)
        self._left.draft_S[slots_R] = drafts
        coming = None if mask is None else Coming(drafts).depart()
        for row, request in enumerate(requests):
            if request.running and not request.finished:
                request.drafted = True
                request.draft = None if coming is None else (coming, row)

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
        index = upload(pages, torch.int64, self.device)
        for store, rings in zip(self.stores, self._ring_names, strict=True):
            for name, memory in store.items():
                if name in rings:
                    memory[ring].zero_()
                elif pages:
                    memory.view(torch.uint8).index_fill_(0, index, 0)
