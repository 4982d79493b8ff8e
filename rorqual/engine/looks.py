"""What requests that look inside get from passes: on its way to the host, and put together token by token."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from rorqual.engine.inside import Facts, Inside, Look, Sight
from rorqual.engine.staging import Coming
from rorqual.nn.watch import Watch

if TYPE_CHECKING:
    from rorqual.engine.runner import Drawn


@dataclass
class Chosen:
    """What one token's pass chose: expert ids of all layers in a row, and what each indexed layer picked (an array
    [layers, k], -1 for nothing)."""

    experts: list[int] | None = None
    picked: Any = None


@dataclass
class Insight:
    """What one request gets from a pass: of the token it brought, of the draft behind it, and that draft's id."""

    first: Chosen = field(default_factory=Chosen)
    second: Chosen = field(default_factory=Chosen)
    draft: int | None = None


class Insights:
    """A pass's choices on their way to the host, of the requests in its `rows` that ask."""

    def __init__(self, facts: Facts, rows: Sequence[int], drafted: Sequence[int]) -> None:
        """`drafted`: those of `rows` that brought a draft."""
        self.facts, self.rows, self.drafted = facts, rows, drafted
        self._experts: Tensor | None = None
        self._picked: Tensor | None = None
        self._drafts: Tensor | None = None

    def send(self, coming: Coming, watch: Watch | None, index_C: Tensor, drafts_D: Tensor | None) -> None:
        """Have them come along: of the columns `index_C`, one for each of the rows and then for each with a draft; and
        those drafts."""
        if watch is not None and watch.experts:
            (self._experts,) = coming.add(watch.experts_at(self.facts.expert_layers, index_C))
        if watch is not None and watch.seen:
            (self._picked,) = coming.add(watch.seen_at(self.facts.indexed, index_C))
        if drafts_D is not None:
            (self._drafts,) = coming.add(drafts_D)

    def land(self) -> dict[int, Insight]:
        """By row, once they have come."""
        count = len(self.rows) + len(self.drafted)
        experts = [None] * count if self._experts is None else self._experts.tolist()
        picked = [None] * count if self._picked is None else self._picked.numpy()
        each = [Chosen(e, p) for e, p in zip(experts, picked, strict=True)]
        found = {row: Insight(chosen) for row, chosen in zip(self.rows, each, strict=False)}
        drafts = [None] * len(self.drafted) if self._drafts is None else self._drafts.tolist()
        for row, chosen, draft in zip(self.drafted, each[len(self.rows) :], drafts, strict=True):
            found[row].second, found[row].draft = chosen, draft
        return found


class Looks:
    """An answer's tokens as they come to be known from inside. `prompt`: tokens before it; `asked`: by the request,
    `inside`: what of that the model has."""

    def __init__(self, asked: Inside, facts: Facts, prompt: int, done: list[Look]) -> None:
        self.inside, self.facts, self.prompt, self.done = facts.told(asked), facts, prompt, done
        self._count = 0
        self._newest: tuple[bool, tuple[int, ...]] | None = None
        """Of the newest token, whose pass is still to come: whether it was drafted, and what was refused for it."""

    def take(self, drawn: Drawn, place: int, *, last: bool) -> tuple[Look, ...]:
        """Token `place` of those that a pass brought joins the answer, as its `last` or not; what is known now and was
        not before."""
        known: list[Look] = []
        insight, count = drawn.insight or Insight(), len(drawn.tokens)
        if place == 0 and self._newest is not None:
            known.append(self._look(insight.first))
        drafted = count > 1 and place == 0 and self.inside.drafts
        refused = place == 0 and count == 1 and insight.draft is not None and self.inside.drafts
        self._newest = drafted, (insight.draft,) if refused and insight.draft is not None else ()
        if count > 1 and place == 0:
            known.append(self._look(insight.second))
        elif last or not self.inside.watches:
            known.append(self._look(Chosen()))
        return tuple(known)

    def close(self) -> None:
        """No more will come."""
        if self._newest is not None:
            self._look(Chosen())

    def _look(self, chosen: Chosen) -> Look:
        """The newest token's, which is now settled."""
        assert self._newest is not None
        index, self._count = self._count, self._count + 1
        look = Look(index, self._experts(chosen), *self._newest, self._seen(chosen, self.prompt + index))
        self._newest = None
        self.done.append(look)
        return look

    def _experts(self, chosen: Chosen) -> list[list[int]] | None:
        if chosen.experts is None or not self.inside.experts:
            return None
        out, at = [], 0
        for width in self.facts.widths:
            out.append(chosen.experts[at : at + width])
            at += width
        return out

    def _seen(self, chosen: Chosen, position: int) -> list[Sight] | None:
        if chosen.picked is None or not self.inside.seen:
            return None
        found, wanted = [], self.inside.seen or ()
        rows = dict(zip(self.facts.indexed, chosen.picked, strict=True))
        for layer, (kind, every) in enumerate(zip(self.facts.attention, self.facts.every, strict=True)):
            if wanted is not True and layer not in wanted:
                continue
            if kind == "hca":  # all that are finished
                found.append(
                    Sight(layer, array("i", range(0, (position + 1) // every * every, every)), every)
                )
            elif layer in rows:
                row = rows[layer]
                places = np.sort(row[row >= 0] * every).astype(np.int32)
                found.append(Sight(layer, array("i", places.tobytes()), every))
        return found
