"""What one forward pass brings: new items for each row of a batch, and what bricks share during it.

Tokens stand in a row without holes: the item at position p of a row is its p-th real token, whatever
padding the caller had. So a row is described by where its new items start and how many there are, and
causality alone keeps padding out of sight.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rorqual.family.parts import Rope
from rorqual.nn.dropping import Capacity
from rorqual.nn.rope import Rotation, rotation
from rorqual.nn.watch import Watch


class Rows:
    """New items of a batch: row b brings `counts[b]` items at positions `starts[b]`, `starts[b]` + 1, …

    In tensors the items of row b are the first `counts[b]` of `width` columns; what stands to the right
    is padding: computed, never stored, never seen by a real item.
    """

    def __init__(self, starts: list[int], counts: list[int], width: int, device: torch.device) -> None:
        self.starts, self.counts, self.width, self.device = starts, counts, width, device
        self.ends = [s + c for s, c in zip(starts, counts, strict=True)]
        self.uniform = len(set(starts)) == 1 and all(c == width for c in counts)
        """Every row starts at one position and fills every column: slices do, no index is needed."""

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def end(self) -> int:
        """Items that the longest row holds after this pass."""
        return max(self.ends)

    @cached_property
    def starts_B(self) -> Tensor:
        """`starts` as a tensor [B]."""
        return torch.tensor(self.starts, device=self.device)

    @cached_property
    def positions_BT(self) -> Tensor:
        """Position of every column [B, T]; padding columns count on."""
        return self.starts_B[:, None] + torch.arange(self.width, device=self.device)

    @cached_property
    def real_BT(self) -> Tensor:
        """True where a column holds a real item [B, T]."""
        counts_B = torch.tensor(self.counts, device=self.device)
        return torch.arange(self.width, device=self.device) < counts_B[:, None]

    @cached_property
    def where(self) -> tuple[Tensor, Tensor, Tensor]:
        """Row, column and position of every real item, flat."""
        row, column = self.real_BT.nonzero(as_tuple=True)
        return row, column, self.positions_BT[row, column]

    @cached_property
    def among_padding(self) -> tuple[Tensor, Tensor] | None:
        """Row and column of every real item, flat; None where every column is real."""
        return None if all(count == self.width for count in self.counts) else self.where[:2]


@dataclass
class Trace:
    """What a pass chose, by layer, for those who want to look inside (`model(ids, trace=Trace())`).

    `hidden[0]` is the embedding, `hidden[i]` the residual stream after i layers, the last one after the
    final norm. `experts[i]`: ids [N, K], weights [N, K] and router logits [N, E] of layer i; N counts the
    real tokens, batch and time row-major. `selected[i]`: positions (DSA) or entries (CSA) each token attends
    [B, T, k], -1 where fewer exist. In a padded batch the columns of `hidden` and `selected` are those of the
    pass: each row's real tokens first, whatever side the caller padded.
    """

    hidden: list[Tensor] = field(default_factory=list)
    only_experts: bool = False
    """Whether `hidden` and `selected` stay empty: of a long row they are gigabytes."""
    experts: dict[int, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)
    selected: dict[int, Tensor] = field(default_factory=dict)


@dataclass
class IndexerTraining:
    """How the indexers of sparse attention take part in a pass that is learned from (V3.2 report 2.1; facts 3.8).

    `dense`: attention goes to all it can see, not to what an indexer chooses. `learns`: each indexer is compared with
    the main attention; `losses[i]` is then layer i's KL divergence, summed over queries.
    """

    dense: bool = False
    learns: bool = True
    losses: dict[int, Tensor] = field(default_factory=dict)


def within(documents_BT: Tensor) -> Tensor:
    """Where each token stands in its document: how many before it in the row have the same number, one after the
    other."""
    at_BT = torch.arange(documents_BT.shape[1], device=documents_BT.device).expand_as(documents_BT)
    begins_BT = torch.ones_like(documents_BT, dtype=torch.bool)
    begins_BT[:, 1:] = documents_BT.diff(dim=1) != 0
    return at_BT - torch.where(begins_BT, at_BT, 0).cummax(1).values


class Pools(NamedTuple):
    """Windows of a fixed number of tokens, counted from each document's first: the column `begin` [B, E] each begins
    at, in rising order (rows with fewer repeat some), and which a token sees: those from `low` to before `high`
    [B, T], of its own document and finished."""

    begin: Tensor
    low: Tensor
    high: Tensor


def pools(documents_BT: Tensor, ratio: int) -> Pools:
    """The windows of `ratio` tokens that documents finish; what a document leaves over is in none."""
    at_BT = within(documents_BT)
    ends_BT = (at_BT + 1) % ratio == 0
    high_BT = ends_BT.cumsum(1)
    first_BT = torch.arange(at_BT.shape[1], device=at_BT.device) - at_BT
    most = int(high_BT[:, -1].max())
    end_BE = (~ends_BT).to(torch.uint8).argsort(dim=1, stable=True)[:, :most]
    return Pools((end_BE - ratio + 1).clamp(min=0), (high_BT - ends_BT.long()).gather(1, first_BT), high_BT)


class Step:
    """One forward pass: its rows, and rotations and masks shared by all layers."""

    watch: Watch | None = None
    """Keeps what a paged pass chose, where somebody looks inside."""
    indexers: IndexerTraining | None = None
    """Set while training; otherwise attention goes where indexers say, and they learn nothing."""
    routes: dict[int, Tensor] | None = None
    """Experts [N, K] that are settled before the pass, by layer."""
    capacity: Capacity | None = None
    """How many tokens a device takes (V2's token dropping); None: all."""

    recompute = False
    """Whether a pass with gradients keeps less, and makes again what is cheap to make."""

    def __init__(self, rows: Rows, trace: Trace | None = None, documents_BT: Tensor | None = None) -> None:
        self.rows, self.trace, self.documents_BT = rows, trace, documents_BT
        self.layer = 0
        self._rotations: dict[Rope, Rotation] = {}
        self._mask: tuple[int, Tensor] | None = None
        self._pools: dict[int, Pools] = {}

    def rotation(self, rope: Rope) -> Rotation:
        """cos and sin of the new tokens, `[B, T, dim / 2]` (`[1, T, ...]` if all rows are alike)."""
        if rope not in self._rotations:
            positions = self.rows.positions_BT[:1] if self.rows.uniform else self.rows.positions_BT
            if self.documents_BT is not None:
                positions = within(self.documents_BT)
            self._rotations[rope] = rotation(rope, positions)
        return self._rotations[rope]

    def attend(self, brick: Any, x_BTD: Tensor, cache: Any) -> Tensor:
        """An attention brick on this pass."""
        out: Tensor = brick(x_BTD, self, cache)
        return out

    @property
    def all_visible(self) -> bool:
        """Every key up to `rows.end` is visible to every query: one new token in rows of one length."""
        return self.rows.uniform and self.rows.width == 1

    @property
    def causal(self) -> bool:
        """Keys are the new tokens themselves, and each query sees those up to its own."""
        return self.from_zero and self.documents_BT is None

    @property
    def from_zero(self) -> bool:
        """No row has a past: keys are the new tokens themselves and a plain causal mask serves."""
        return not any(self.rows.starts)

    @cached_property
    def first_BT(self) -> Tensor | None:
        """Position where each token's document begins; None where documents are not told apart."""
        if self.documents_BT is None:
            return None
        return self.rows.positions_BT - within(self.documents_BT)

    def pools(self, ratio: int) -> Pools:
        """The finished windows of `ratio` tokens, document by document."""
        assert self.documents_BT is not None
        if ratio not in self._pools:
            self._pools[ratio] = pools(self.documents_BT, ratio)
        return self._pools[ratio]

    def visible_BTK(self, keys: int) -> Tensor:
        """True where key position k is not after the query's position, and of the same document where those are told
        apart; `[1, T, K]` if rows are alike."""
        if self._mask is None or self._mask[0] != keys:
            positions = self.rows.positions_BT[:1] if self.rows.uniform else self.rows.positions_BT
            mask = torch.arange(keys, device=positions.device) <= positions[..., None]
            if self.documents_BT is not None:
                mask = mask & (self.documents_BT[:, :, None] == self.documents_BT[:, None, :])
            self._mask = (keys, mask)
        return self._mask[1]
