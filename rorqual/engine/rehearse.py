"""Before the first pass of a kind: its kernels are compiled side by side, by a pass over nothing."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import TYPE_CHECKING

from rorqual.engine.batch import lay_out
from rorqual.engine.request import Request
from rorqual.engine.scheduler import Plan
from rorqual.kernels.ahead import compiled_ahead
from rorqual.nn.layout import apart

if TYPE_CHECKING:
    from rorqual.engine.runner import Runner


class Rehearsals:
    """The kinds of passes met so far: about how many tokens, with decodes beside the chunks or without, long chunks
    or short ones. Kernels are chosen by such things."""

    def __init__(self) -> None:
        self._met: set[tuple[int, bool, bool]] = set()

    def rehearse(self, runner: Runner, plan: Plan) -> None:
        """Compile what the runner needs for a pass of this plan's kind, if it is the first; the plan and all caches
        stay as they are. Passes of decodes alone are rehearsed where their graphs are recorded."""
        counts = [count for _, count in plan.chunks]
        if not counts:
            return
        kind = (len(plan.decodes) + sum(counts)).bit_length(), bool(plan.decodes), max(counts) > 64
        if kind in self._met:
            return
        self._met.add(kind)
        model = runner.model
        nothing = Plan([_blank(r) for r in plan.decodes], [(_blank(r), count) for r, count in plan.chunks])
        # What is wrong with the pass it will say itself.
        with contextlib.suppress(Exception), apart(), compiled_ahead() as nothing_runs:
            batch = lay_out(nothing, runner.page_size, runner._staging, one_group_of_chunks=True)
            state = model.run_paged(batch.ids_N[None], batch.step, runner.stores)
            logits = model.logits(model.finish(state[:, batch.columns])[0])
            if nothing_runs:
                runner.sampler.rehearse(logits[: len(batch.drawing)], [r.slot for r in batch.drawing])


def _blank(request: Request) -> Request:
    """One of the same lengths that holds page 0 and ring 0, which belong to nobody."""
    return replace(request, ids=[0] * len(request.ids), pages=[0] * len(request.pages), ring=0)
