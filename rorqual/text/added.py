"""Finding a tokenizer's added tokens, such as "<think>", where a text spells them."""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

DEEPEST = 100
"""Choices one inside the other that an expression may have; words of which more begin one another are a list."""

_SAME = {"type": "Sequence", "normalizers": []}  # a normaliser that changes nothing


def spelled(words: Iterable[str]) -> re.Pattern[str]:
    """What finds the first letter of every spelling of some words, wherever it stands."""
    rests: dict[str, list[str]] = {}
    for word in words:
        rests.setdefault(word[0], []).append(word[1:])
    parts = [f"{re.escape(letter)}(?={longest_of(rest)})" for letter, rest in rests.items()]
    return re.compile("|".join(parts) or "(?!)")


def finder(backend: Backend, added: Mapping[int, AddedToken]) -> re.Pattern[str] | None:
    """What finds added tokens of several letters in a text as the library would; None where only the library can."""
    several = {token.content: token for token in added.values() if len(token.content) > 1}
    if any(token.lstrip or token.rstrip or token.single_word for token in several.values()):
        return None
    # Those that are looked for in normalised text come second. If the text is as it was, and none of them begins
    # before one of the first in the same letters, that makes no difference.
    second = {content for content, token in several.items() if token.normalized}
    first = tuple(
        token.content for token in added.values() if token.content not in second and not token.normalized
    )
    begins = {content[:n] for content in first for n in range(1, len(content) + 1)}
    overlap = any(
        (n and content[n:] in begins) or content[n:].startswith(first)
        for content in second
        for n in range(len(content))
    )
    changes = backend.normalizer is not None and json.loads(backend.normalizer.__getstate__()) != _SAME
    if second and (overlap or changes):
        return None
    return re.compile(longest_of(several))


def longest_of(words: Iterable[str]) -> str:
    """A regular expression of the longest of some words that stands at a place; one that goes letter by letter, since a
    list of a thousand would be gone through at every letter that all of them begin with."""
    words, tree = list(words), dict[str, Any]()
    for word in words:
        node = tree
        for letter in word:
            node = node.setdefault(letter, {})
        node[""] = {}
    try:
        return _expression(tree, DEEPEST) if tree else "(?!)"
    except RecursionError:
        return f"(?:{'|'.join(map(re.escape, sorted(words, key=len, reverse=True)))})"


def _expression(tree: Mapping[str, Any], left: int) -> str:
    if not left:
        raise RecursionError
    tail = ""
    while len(tree) == 1:  # no choice: letter after letter, not one inside the other
        ((letter, tree),) = tree.items()
        tail += re.escape(letter)
        if letter == "":
            return tail
    ways = "|".join(
        re.escape(letter) + _expression(rest, left - 1) for letter, rest in tree.items() if letter
    )
    return f"{tail}(?:{ways}){'?' if '' in tree else ''}"
