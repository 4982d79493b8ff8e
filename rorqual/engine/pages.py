"""Pages and rings of the engine's caches: who holds which, and which finished content can serve again.

A block is `page_size` tokens. Full blocks stay findable after their request has gone: a block is known by
the block before it and its own tokens, compared whole, so two different prefixes are never taken for one.
Memory comes first from pages that hold nothing, then from the least recently used block nobody holds.
A model with rings (V4) can go on from a block only where its rings were copied at that block's end.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

BlockKey = tuple[int, tuple[int, ...]]
"""The name of the block before, and the tokens of this one."""


@dataclass
class Match:
    """A cached beginning: its pages, the name of its last block, and the ring copy to go on from (0: none)."""

    pages: list[int] = field(default_factory=list)
    name: int = 0
    ring: int = 0


class Pages:
    """`pages` pages and `rings` rings, number 0 of each kept out: padding writes there."""

    def __init__(self, pages: int, rings: int, page_size: int, prefix_cache: bool = True) -> None:
        self.page_size, self.prefix_cache, self.has_rings = page_size, prefix_cache, rings > 0
        self.total = pages - 1
        self._free = list(range(pages - 1, 0, -1))
        self._holders = [0] * pages
        self._rings = list(range(rings - 1, 0, -1))
        self._root = 0
        self._named = 0
        self._found: dict[BlockKey, int] = {}
        self._key: dict[int, BlockKey] = {}
        self._name: dict[int, int] = {}
        self._page: dict[int, int] = {}
        """The page of a block by its name."""
        self._idle: OrderedDict[int, None] = OrderedDict()
        """Pages that nobody holds but that can be found, least recently used first."""
        self._copies: OrderedDict[int, int] = OrderedDict()
        """Ring copies by the page of the block at whose end they were made, least recently used first."""

    # ---------------------------------------------------------------------------------------- pages

    @property
    def available(self) -> int:
        """Pages that can be taken now."""
        return len(self._free) + len(self._idle)

    @property
    def idle(self) -> int:
        """Pages that nobody holds, kept for their content."""
        return len(self._idle)

    def take(self, count: int) -> list[int] | None:
        """`count` pages, or None with nothing taken."""
        if count > self.available:
            return None
        taken = []
        for _ in range(count):
            if not self._free:
                self._forget(next(iter(self._idle)))
            page = self._free.pop()
            self._holders[page] = 1
            taken.append(page)
        return taken

    def release(self, pages: Sequence[int]) -> None:
        """Give pages back. Findable ones stay so until their memory is wanted, the last block first."""
        for page in reversed(pages):
            self._holders[page] -= 1
            assert self._holders[page] >= 0, f"page {page} was given back twice"
            if self._holders[page]:
                continue
            if page in self._key:
                self._idle[page] = None
            else:
                self._free.append(page)

    def _forget(self, page: int) -> None:
        """Make an idle page free: its content can no longer be found."""
        del self._idle[page]
        self._unname(page)
        self._free.append(page)

    def _unname(self, page: int) -> None:
        del self._found[self._key.pop(page)], self._page[self._name.pop(page)]
        if page in self._copies:
            self._rings.append(self._copies.pop(page))

    # --------------------------------------------------------------------------------- prefix cache

    @property
    def root(self) -> int:
        """The name of the block before the first: another one for every version of the weights."""
        return self._root

    def forget_all(self) -> None:
        """The weights have changed: nothing computed so far may be found again."""
        for page in list(self._idle):
            self._forget(page)
        for page in list(self._key):
            self._unname(page)
        self._named += 1
        self._root = self._named

    def match(self, ids: Sequence[int]) -> Match:
        """The longest cached beginning of `ids` that leaves at least one token to compute; its pages are then
        held. Rings that it goes on from are named, not held: copy them before taking any."""
        if not self.prefix_cache:
            return Match(name=self._root)
        best, pages, name = Match(name=self._root), [], self._root
        for start in range(0, (len(ids) - 1) // self.page_size * self.page_size, self.page_size):
            page = self._found.get((name, tuple(ids[start : start + self.page_size])))
            if page is None:
                break
            name = self._name[page]
            pages.append(page)
            if not self.has_rings or page in self._copies:
                best = Match(list(pages), name, self._copies.get(page, 0))
        for page in best.pages:
            self._holders[page] += 1
            self._idle.pop(page, None)
        if best.ring:
            self._copies.move_to_end(best.pages[-1])
        return best

    def record(self, before: int, tokens: Sequence[int], page: int) -> int:
        """`page` now holds this full block after block `before`: the block's name. If the same block is
        known already, that one stays the one to be found."""
        key = (before, tuple(tokens))
        if not self.prefix_cache:
            return before
        if key not in self._found:
            self._named += 1
            self._found[key], self._key[page], self._name[page] = page, key, self._named
            self._page[self._named] = page
        return self._name[self._found[key]]

    # ---------------------------------------------------------------------------------------- rings

    def take_ring(self) -> int | None:
        """A ring for a sequence; 0 if the model keeps none, None if all are taken."""
        if not self.has_rings:
            return 0
        if not self._rings and self._copies:
            self._rings.append(self._copies.popitem(last=False)[1])
        return self._rings.pop() if self._rings else None

    def release_ring(self, ring: int) -> None:
        """Give a sequence's ring back."""
        if ring:
            self._rings.append(ring)

    def room_for_copy(self, name: int) -> int:
        """A ring to copy a sequence's into, at the end of the block of this name, whoever's page serves for it; 0 if
        there is no need or no room. The copy counts from now on: make it before anything else runs."""
        page = self._page.get(name)
        if not self.has_rings or page is None or page in self._copies:
            return 0
        if not self._rings and self._copies:
            self._rings.append(self._copies.popitem(last=False)[1])
        if not self._rings:
            return 0
        self._copies[page] = self._rings.pop()
        return self._copies[page]

    # ----------------------------------------------------------------------------------------- check

    def check(self) -> None:
        """Raise AssertionError if the books don't balance (tests)."""
        held = sum(1 for h in self._holders[1:] if h)
        assert held + len(self._free) + len(self._idle) == self.total, "pages lost or counted twice"
        assert len(set(self._free)) == len(self._free), "a page is free twice"
        assert not set(self._free) & set(self._idle), "a page is free and idle"
        assert all(not self._holders[p] for p in (*self._free, *self._idle)), "a held page is free"
        assert set(self._found.values()) == set(self._key) == set(self._name), "names and pages differ"
        assert {n: p for p, n in self._name.items()} == self._page, "a block's name leads to another page"
        assert set(self._copies) <= set(self._key), "a ring copy of a forgotten block"
