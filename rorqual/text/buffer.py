"""The text a parser has been given and not yet read."""

import re
from functools import lru_cache


class Buffer:
    """Unread text, read from an offset: a step costs what it reads, not what is still to come.

    `final`: no more text will follow. `drop` forgets what has been read; the parser does so after each feed.
    """

    def __init__(self) -> None:
        self.final = False
        self._text = ""
        self._at = 0

    def __len__(self) -> int:
        return len(self._text) - self._at

    def add(self, text: str) -> None:
        """More text has arrived."""
        self._text += text

    def drop(self) -> None:
        """Forget what has been read."""
        self._text, self._at = self._text[self._at :], 0

    def peek(self, count: int) -> str:
        """The next `count` characters, or as many as there are."""
        return self._text[self._at : self._at + count]

    def take(self, count: int) -> str:
        """Read `count` characters."""
        text = self.peek(count)
        self._at += len(text)
        return text

    def unread(self, text: str) -> None:
        """Put `text` back in front."""
        if self._text.endswith(text, 0, self._at):
            self._at -= len(text)
        else:
            self._text, self._at = text + self._text[self._at :], 0

    def starts(self, text: str) -> bool:
        """Whether `text` comes next."""
        return self._text.startswith(text, self._at)

    def may_become(self, text: str) -> bool:
        """Whether all that is here is the beginning of `text`, and the rest may still come."""
        return not self.final and len(self) < len(text) and text.startswith(self.peek(len(text)))

    def find(self, pattern: re.Pattern[str], start: int, end: int) -> re.Match[str] | None:
        """The first match between two places counted from here. (Its own places are not: use its text.)"""
        return pattern.search(self._text, self._at + start, self._at + end)

    def place(self, found: re.Match[str]) -> int:
        """Where a match of `find` begins, counted from here."""
        return found.start() - self._at

    def blanks(self) -> str:
        """Read whitespace, as much as there is."""
        found = _BLANKS.match(self._text, self._at)
        return self.take(len(found[0])) if found else ""

    def skip(self, layout: str) -> bool:
        """Drop as much of `layout` as the text begins with. False when that cannot be known yet."""
        here = self.peek(len(layout))
        same = next((n for n, (a, b) in enumerate(zip(here, layout, strict=False)) if a != b), len(here))
        if same == len(self) and same < len(layout) and not self.final:
            return False
        self.take(same)
        return True

    def until(self, *markers: str) -> tuple[str, str | None]:
        """Read up to the earliest marker (of several there the longest), and it; (text, None) when there is
        none yet.

        Without a marker, an end of the text that could be the start of one stays.
        """
        pattern, longest, firsts = _search(markers)
        found = pattern.search(self._text, self._at)
        if found:
            text = self._text[self._at : found.start()]
            self._at = found.end()
            return text, found[0]
        text = self.peek(len(self)) if self.final else self._certain(markers, longest, firsts)
        self._at += len(text)
        return text, None

    def _certain(self, markers: tuple[str, ...], longest: int, firsts: re.Pattern[str]) -> str:
        """What is unread, without the longest end of it that a marker begins with."""
        start = max(self._at, len(self._text) - longest)
        while start_of := firsts.search(self._text, start):
            start = start_of.start()
            if any(marker.startswith(self._text[start:]) for marker in markers):
                return self._text[self._at : start]
            start += 1
        return self._text[self._at :]


@lru_cache(maxsize=256)
def _search(markers: tuple[str, ...]) -> tuple[re.Pattern[str], int, re.Pattern[str]]:
    """What finds the earliest of some texts; the most letters of one that has not ended; its first letters."""
    firsts = "".join(sorted({re.escape(marker[0]) for marker in markers}))
    longest = max(map(len, markers), default=1) - 1
    return one_of(markers), longest, re.compile(f"[{firsts}]" if firsts else "(?!)")


_BLANKS = re.compile(r"\s*")


@lru_cache(maxsize=256)
def one_of(markers: tuple[str, ...]) -> re.Pattern[str]:
    """What finds the earliest of some texts; where several begin, the longest."""
    return re.compile("|".join(re.escape(marker) for marker in sorted(markers, key=len, reverse=True)))
