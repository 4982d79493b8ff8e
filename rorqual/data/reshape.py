"""What is done to documents before they become tokens for training: fill-in-the-middle, and tokens split in two.

Both are drawn for each document alone, from the seed and the document's place in the corpus: the same at any number of
workers and after any interruption.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from rorqual.data.errors import DataError
from rorqual.text import Tokenizer
from rorqual.text.tokens import FIM_BEGIN, FIM_END, FIM_HOLE

COMBINED = re.compile(r"([^\w\s]+)([\r\n]+)")
"""Punctuation together with the line break after it."""


@dataclass(frozen=True)
class Shape:
    """fim: share of documents put in the order prefix, suffix, middle (V3 report 4.1: 0.1). split: share of the tokens
    of punctuation and line breaks that are taken apart, so that a prompt ending in the first of the two looks like what
    was trained on (same section, which gives no share). bos, eos: whether documents begin and end with these tokens."""

    fim: float = 0.0
    split: float = 0.0
    bos: bool = True
    eos: bool = True

    def __post_init__(self) -> None:
        for name in ("fim", "split"):
            if not 0 <= getattr(self, name) <= 1:
                raise DataError(f"{name} is {getattr(self, name)}; it is a share, 0 to 1")


class Shaper:
    """Documents to token ids."""

    def __init__(self, tokenizer: Tokenizer, shape: Shape, seed: int) -> None:
        self.tokenizer, self.shape, self.seed = tokenizer, shape, seed
        if shape.bos and tokenizer.bos is None:
            raise DataError("this tokenizer names no token that begins a text: build with --no-bos")
        if shape.eos and not tokenizer.eos:
            raise DataError("this tokenizer names no token that ends a text: build with --no-eos")
        self._first = [tokenizer.bos] if shape.bos and tokenizer.bos is not None else []
        self._last = [tokenizer.eos[0]] if shape.eos else []
        self._fim: list[int] = []
        if shape.fim:
            found = [tokenizer.id_of(token) for token in (FIM_BEGIN, FIM_HOLE, FIM_END)]
            self._fim = [number for number in found if number is not None]
            if len(self._fim) < 3:
                raise DataError(
                    f"this tokenizer lacks {FIM_BEGIN}, {FIM_HOLE} or {FIM_END}: build without --fim"
                )
        self._halves = combined(tokenizer) if shape.split else {}

    def ids(self, text: str, piece: int, number: int) -> list[int]:
        """The document, the `number`-th of its piece: BOS, text, EOS. Added tokens spelled in the text are text."""
        random = None
        if self.shape.fim or self.shape.split:
            random = np.random.Generator(np.random.Philox(key=[self.seed, (piece << 32) + number]))
        if random is not None and self.shape.fim and random.random() < self.shape.fim:
            # Two places drawn evenly cut it in three (of characters, so that no token is cut).
            first, second = sorted(random.integers(0, len(text) + 1, 2).tolist())
            begin, hole, end = self._fim
            prefix, middle, suffix = (
                self._encode(part, random) for part in (text[:first], text[first:second], text[second:])
            )
            inner = [begin, *prefix, hole, *suffix, end, *middle]
        else:
            inner = self._encode(text, random)
        return [*self._first, *inner, *self._last]

    def _encode(self, text: str, random: np.random.Generator | None) -> list[int]:
        ids = self.tokenizer.encode(text, special=False)
        if random is None or not self._halves:
            return ids
        out: list[int] = []
        for token in ids:
            halves = self._halves.get(token)
            out += halves if halves is not None and random.random() < self.shape.split else (token,)
        return out


def combined(tokenizer: Tokenizer) -> dict[int, tuple[int, ...]]:
    """The vocabulary's tokens of punctuation with a line break, and what each is as two."""
    found = {}
    for token in range(tokenizer.vocab_size):
        try:
            match = COMBINED.fullmatch(tokenizer.bytes_of(token).decode("utf-8"))
        except UnicodeDecodeError:
            continue
        if match is not None:
            halves = tuple(n for part in match.groups() for n in tokenizer.encode(part, special=False))
            if len(halves) > 1:
                found[token] = halves
    return found
