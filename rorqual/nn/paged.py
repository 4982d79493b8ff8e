"""Caches in pages, for many sequences at once: what the engine allocates and attention bricks read and write.

A brick declares *lanes*: kinds of items it keeps. A growing lane has one item for every `every` tokens,
in pages that a table maps sequences to; a ring lane keeps the last `keep` tokens of a sequence and takes the
same memory whatever its length. All lanes of a model share one table: block b of a sequence, `page_size`
tokens, is page `table[s, b]` of every growing lane of every layer. Page 0 and ring 0 take what padding writes.

A pass is flat, `[1, N, D]`: the new tokens of sequence after sequence. Where no kernel reads the pages as
they lie, each group of like sequences is laid out as rows, and the plain brick runs on a copy of its pages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from rorqual.family.parts import Rope
from rorqual.nn.cache import ROLLBACK, LayerCache
from rorqual.nn.rope import Rotation, rotation
from rorqual.nn.step import Rows, Step, Trace


@dataclass(frozen=True)
class Lane:
    """Items of one kind: their `shape` and type; one for every `every` tokens, or a ring over the last `keep`.

    `fill` stands in a ring before the first token. In FP8 layouts an item is a row of bytes.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    every: int = 1
    keep: int | None = None
    fill: float = 0.0

    @property
    def ring(self) -> int:
        """Places of the ring: what is kept, and a short pass that may be taken back."""
        assert self.keep is not None
        return self.keep + ROLLBACK

    def bytes_per_item(self) -> int:
        """Bytes of one item."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


Lanes = dict[str, Lane]
Store = dict[str, Tensor]
"""One layer's lanes: growing ones `[pages, page_size / every, *shape]`, rings `[rings, places, *shape]`."""


class PagedBrick(Protocol):
    """What an attention brick offers for pages."""

    def lanes(self, dtype: torch.dtype, fp8: bool = False) -> Lanes:
        """The kinds of items it keeps; with `fp8` in the released FP8 layout, `InputError` if it has none."""

    def view(self, store: Store, group: Group) -> LayerCache:
        """Its cache over the pages of a group's sequences."""

    def __call__(self, x_BTD: Tensor, step: Step, cache: Any) -> Tensor: ...


def page_bytes(layers: Iterable[Lanes], page_size: int) -> int:
    """Bytes of one page over all layers' growing lanes."""
    growing = (lane for lanes in layers for lane in lanes.values() if lane.keep is None)
    return sum(page_size // lane.every * lane.bytes_per_item() for lane in growing)


def ring_bytes(layers: Iterable[Lanes]) -> int:
    """Bytes of one sequence's rings over all layers; 0 if the model keeps none."""
    return sum(
        lane.ring * lane.bytes_per_item()
        for lanes in layers
        for lane in lanes.values()
        if lane.keep is not None
    )


def new_store(lanes: Lanes, pages: int, page_size: int, rings: int, device: torch.device) -> Store:
    """Zeroed memory for a layer: `pages` pages and `rings` rings, those that padding writes to included."""
    store: Store = {}
    with torch.inference_mode(False):  # so that weights and pages can be used anywhere
        for name, lane in lanes.items():
            lead = (rings, lane.ring) if lane.keep is not None else (pages, page_size // lane.every)
            store[name] = torch.zeros(*lead, *lane.shape, dtype=lane.dtype, device=device)
    return store


class Places(NamedTuple):
    """Flat places of the real new items, and of all that each row holds then, up to the longest row's end."""

    new_n: Tensor
    held_SK: Tensor


@dataclass
class Group:
    """Sequences of a pass whose new tokens stand next to each other in the flat batch.

    Sequence s brings `counts[s]` tokens from position `starts[s]` on. `table_SB`: page numbers; `ring_S`:
    ring numbers; `ends_S` tokens held after the pass; `offsets_S1` where each one's tokens begin within the
    group. The lists are for hosts: under graph capture they are empty and only the tensors count.
    """

    tokens: slice
    starts: list[int]
    counts: list[int]
    width: int
    """Tokens of the sequence that brings most; all bring as many in a decoding group."""
    end: int
    """Bound on the tokens any sequence holds after the pass."""
    table_SB: Tensor
    ring_S: Tensor
    ends_S: Tensor
    offsets_S1: Tensor
    decoding: bool

    def alone(self, s: int, position: int) -> Group:
        """The token at `position` of sequence s, as a pass of its own."""
        return Group(
            tokens=slice(0, 1),
            starts=[position],
            counts=[1],
            width=1,
            end=position + 1,
            table_SB=self.table_SB[s : s + 1],
            ring_S=self.ring_S[s : s + 1],
            ends_S=torch.full_like(self.ends_S[s : s + 1], position + 1),
            offsets_S1=self.offsets_S1.new_tensor([0, 1]),
            decoding=True,
        )

    @cached_property
    def seq_N(self) -> Tensor:
        """Row of the table that each of the group's tokens belongs to, int64."""
        rows = torch.arange(self.table_SB.shape[0], device=self.table_SB.device)
        count = self.tokens.stop - self.tokens.start
        if self.decoding:
            return rows.repeat_interleave(self.width) if self.width > 1 else rows
        return rows.repeat_interleave(self.offsets_S1.diff(), output_size=count)

    @cached_property
    def step(self) -> Step:
        """The pass as rows, one a sequence."""
        return Step(Rows(self.starts, self.counts, self.width, self.table_SB.device))

    def places(self, rows: Rows, per_page: int) -> Places:
        """Where items lie in pages of so many, for `rows` of the group's sequences; worked out once for all layers."""
        key = id(rows), per_page
        if key not in self._places:
            if rows.among_padding is None:
                position_n = rows.positions_BT.flatten()
                page_n = self.table_SB.gather(1, rows.positions_BT // per_page).flatten()
            else:
                row, _, position_n = rows.where
                page_n = self.table_SB[row, position_n // per_page]
            first_SP = self.table_SB[:, : -(-rows.end // per_page), None].long() * per_page
            held_SK = (
                (first_SP + torch.arange(per_page, device=first_SP.device))
                .flatten(1)[:, : rows.end]
                .contiguous()
            )
            found = Places(page_n.long() * per_page + position_n % per_page, held_SK)
            self._places[key] = rows, found  # with the rows: their id is theirs as long as they are kept
        return self._places[key][1]

    @cached_property
    def _places(self) -> dict[tuple[int, int], tuple[Rows, Places]]:
        return {}

    def rows(self, x_1N: Tensor) -> Tensor:
        """The group's part of a flat batch `[1, N, ...]` as rows `[S, width, ...]`, zero where padded."""
        mine = x_1N[0, self.tokens]
        if self.step.rows.among_padding is None:
            return mine.unflatten(0, (len(self.counts), self.width))
        out = mine.new_zeros(len(self.counts), self.width, *mine.shape[1:])
        out[self.step.rows.among_padding] = mine
        return out

    def flat(self, y_ST: Tensor) -> Tensor:
        """Rows `[S, width, ...]` back to the group's tokens `[n, ...]`."""
        among = self.step.rows.among_padding
        return y_ST.flatten(0, 1) if among is None else y_ST[among]


class Numbers(NamedTuple):
    """Of a group's tokens, int32: their ring, position and row of the page table."""

    ring_N: Tensor
    position_N: Tensor
    seq_N: Tensor


class PagedStep(Step):
    """One pass over a flat batch: `positions_N` of its tokens, and its groups in the order they stand."""

    def __init__(self, positions_N: Tensor, groups: Sequence[Group], page_size: int) -> None:
        self.positions_N, self.groups, self.page_size = positions_N, list(groups), page_size
        self.trace = None
        self.layer = 0
        self._rotations: dict[Rope, Rotation] = {}
        self.shared: dict[Any, Any] = {}
        """What kernels work out once a pass, for all layers."""

    def rotation(self, rope: Rope) -> Rotation:
        if rope not in self._rotations:
            self._rotations[rope] = rotation(rope, self.positions_N[None])
        return self._rotations[rope]

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """`make()` the first time this pass asks for `key`, its result afterwards."""
        if key not in self.shared:
            self.shared[key] = make()
        return self.shared[key]

    def numbers(self, g: Group) -> Numbers:
        """What kernels ask of each of a group's tokens."""

        def make() -> Numbers:
            return Numbers(g.ring_S[g.seq_N].int(), self.positions_N[g.tokens].int(), g.seq_N.int())

        made: Numbers = self.once(("numbers", g.tokens.start), make)
        return made

    def finished(self, g: Group, every: int) -> Tensor:
        """How many items of a lane with one for `every` tokens each of a group's tokens sees, int32 `[n]`."""
        n = self.numbers(g)
        made: Tensor = self.once(("finished", g.tokens.start, every), lambda: (n.position_N + 1) // every)
        return made

    def in_rings(self, g: Group, places: int) -> Tensor:
        """Flat place `[n]` of each of a group's tokens in rings of so many places."""
        n = self.numbers(g)
        made: Tensor = self.once(
            ("ring", g.tokens.start, places), lambda: n.ring_N.long() * places + n.position_N % places
        )
        return made

    def slots(self, every: int = 1) -> Tensor:
        """Flat place `[N]` of each token's item in a growing lane: page * items a page + place in the page. For a
        lane of one item for `every` tokens, the place that a token's item belongs to, finished or not."""

        def make() -> Tensor:
            per_page, parts = self.page_size // every, []
            for g in self.groups:
                position = self.positions_N[g.tokens]
                page = g.table_SB[g.seq_N, position // self.page_size]
                parts.append(page.long() * per_page + position % self.page_size // every)
            return torch.cat(parts)

        made: Tensor = self.once(("slots", every), make)
        return made

    def by_token(self, group: Group) -> Group:
        """The group's tokens as rows of their own, each of a sequence that ends with it: what batch-invariant mode
        gives to kernels that read pages. All of a pass's items are in the pages before one is read."""

        def make() -> Group:
            count = group.tokens.stop - group.tokens.start
            seq_N = group.seq_N
            return Group(
                tokens=group.tokens,
                starts=[],
                counts=[],
                width=1,
                end=group.end,
                table_SB=group.table_SB[seq_N],
                ring_S=group.ring_S[seq_N],
                # A row of padding sees nothing, as before.
                ends_S=torch.minimum(self.positions_N[group.tokens].int() + 1, group.ends_S[seq_N]),
                offsets_S1=torch.arange(count + 1, device=seq_N.device, dtype=torch.int32),
                decoding=True,
            )

        if group.decoding and group.width == 1:
            return group
        made: Group = self.once(("by token", group.tokens.start), make)
        return made

    def attend(self, brick: Any, x_1ND: Tensor, cache: Any) -> Tensor:
        fast = brick.paged(x_1ND, self, cache)
        if fast is not None:
            return fast
        parts = []
        for g in self.groups:
            rows = g.step
            rows.trace = None if self.watch is None else Trace()
            parts.append(g.flat(brick(g.rows(x_1ND), rows, brick.view(cache, g))))
            if self.watch is not None and rows.trace is not None and rows.trace.selected:
                self.watch.saw(self.layer, g.flat(rows.trace.selected[rows.layer]))
        return (parts[0] if len(parts) == 1 else torch.cat(parts))[None]


class Packing(NamedTuple):
    """How items lie as bytes, and back: `[n, *shape]` to `[n, bytes]` uint8."""

    pack: Callable[[Tensor], Tensor]
    unpack: Callable[[Tensor], Tensor]


class PagedSlots:
    """`nn.cache.Slots` over pages: stores new items, and gives a copy of all of a group's items."""

    def __init__(self, pages_PT: Tensor, group: Group, packed: Packing | None = None) -> None:
        self.pages, self.group, self.packed = pages_PT, group, packed

    def append(self, new_BT: Tensor, rows: Rows) -> Tensor:
        """Store the real items of `new_BT` [S, T, *shape]; returns all items up to the longest row's end.

        Items past a shorter row's end hold anything finite; causality hides them.
        """
        at = self.group.places(rows, self.pages.shape[1])
        items = self.pages.view(-1, *self.pages.shape[2:])
        new = new_BT.flatten(0, 1) if rows.among_padding is None else new_BT[rows.among_padding]
        items[at.new_n] = new.to(items.dtype) if self.packed is None else self.packed.pack(new)
        held = items.index_select(0, at.held_SK.flatten()).unflatten(0, at.held_SK.shape)
        if self.packed is None:
            return held
        return self.packed.unpack(held.flatten(0, 1)).unflatten(0, held.shape[:2])

    def select(self, rows_B: Tensor) -> None:
        raise NotImplementedError("pages belong to the engine: a view of them selects nothing")

    def bytes_per_item(self) -> int:
        return self.pages[0, 0].numel() * self.pages.element_size()


class RingTail:
    """`nn.cache.Tail` over rings: the last items of each row, in the place of their position modulo the ring."""

    def __init__(self, ring_RL: Tensor, lane: Lane, group: Group, packed: Packing | None = None) -> None:
        assert lane.keep is not None
        self.packed = packed
        self.ring, self.keep, self.fill, self.ring_S = ring_RL, lane.keep, lane.fill, group.ring_S.long()

    def extend(self, new_BTW: Tensor, rows: Rows) -> Tensor:
        """`[S, keep + T, width]`: column keep + t holds the item of position `starts[s]` + t."""
        places = self.ring.shape[1]
        before = rows.starts_B[:, None] + torch.arange(-self.keep, 0, device=rows.device)
        old = self.ring[self.ring_S[:, None], before % places]
        bytes_BTW = new_BTW
        if self.packed is not None:  # whoever looks at the new items sees what will be read later
            bytes_BTW = self.packed.pack(new_BTW.flatten(0, 1)).unflatten(0, new_BTW.shape[:2])
            old, new_BTW = (
                self.packed.unpack(z.flatten(0, 1)).unflatten(0, z.shape[:2]) for z in (old, bytes_BTW)
            )
        old = torch.where((before >= 0)[..., None], old, self.fill)
        row, column, position = rows.where
        if rows.width > places:
            ends = torch.tensor(rows.ends, device=rows.device)
            last = position >= ends[row] - places
            row, column, position = row[last], column[last], position[last]
        self.ring[self.ring_S[row], position % places] = bytes_BTW[row, column].to(self.ring.dtype)
        return torch.cat((old, new_BTW.to(old.dtype)), 1)

    def reaches(self, starts: list[int]) -> bool:
        return True

    def select(self, rows_B: Tensor) -> None:
        raise NotImplementedError("rings belong to the engine: a view of them selects nothing")

    def bytes_per_row(self) -> int:
        return self.keep * self.ring.shape[2] * self.ring.element_size()
