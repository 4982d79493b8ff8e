"""Batches as a function of a seed and a number: which tokens stand in sample n never depends on what came before it, on
how many ranks read, or on whether a run was stopped in between.

A corpus is one row of tokens, cut into windows of equal length; an epoch goes through all of them in an order of its
own. A mixture gives each block of `BLOCK` samples its sources in exact proportion, in an order of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from rorqual.data.errors import DataError
from rorqual.data.numbers import permuted, word
from rorqual.data.shards import Corpus, Ints

BLOCK = 2**14
"""Samples within which a mixture's proportions hold exactly."""

_EPOCH, _ORDER = 2, 3
"""What numbers are drawn for (see `numbers.word`)."""


@dataclass(frozen=True)
class Batch:
    """Samples of a step. `ids_BT`: token ids int64 `[B, T + look]`, the last `look` of which are only foretold, never
    read. `documents_BT` int64: tokens of a row with the same number belong to one document. `sources_B`: the source of
    each row."""

    ids_BT: Tensor
    documents_BT: Tensor
    sources_B: Tensor
    look: int = 1


class Windows:
    """A corpus as windows of `length` tokens; sample j is a window, and epochs follow each other without end."""

    def __init__(self, corpus: Corpus, length: int, look: int, seed: int) -> None:
        self.corpus, self.length, self.look, self.seed = corpus, length, look, seed
        self.count = (corpus.tokens - look) // length
        if self.count < 1:
            raise DataError(
                f"{corpus.folder} has {corpus.tokens} tokens to {corpus.split} on, and one sample needs "
                f"{length + look}: take a shorter sequence or more text"
            )

    def read(self, sample: int) -> tuple[Ints, Ints]:
        """Ids and documents `[length + look]` of sample `sample` of this corpus."""
        epoch, within = divmod(sample, self.count)
        key = word(self.seed, _EPOCH, epoch)
        at = int(permuted(np.array([within]), self.count, key)[0])
        return self.corpus.read(at * self.length, self.length + self.look)


class Mixture:
    """Samples of `length` tokens from corpora by weight, `look` more for what is predicted."""

    def __init__(
        self, corpora: Sequence[Corpus], weights: Sequence[float] | None = None, *,
        length: int, look: int = 1, seed: int = 0,
    ) -> None:  # fmt: skip
        weights = list(weights) if weights is not None else [float(c.tokens) for c in corpora]
        if not corpora or len(weights) != len(corpora):
            raise DataError(f"{len(corpora)} corpora and {len(weights)} weights: give one weight to each")
        if not all(np.isfinite(w) and w > 0 for w in weights):
            raise DataError(f"weights are {weights}; each must be above 0")
        if length < 1 or look < 0:
            raise DataError(f"a sample of {length} tokens and {look} more can't be")
        tokenizers = {corpus.manifest.tokenizer for corpus in corpora}
        if len(tokenizers) > 1:
            names = ", ".join(str(corpus.folder) for corpus in corpora)
            raise DataError(f"{names} were built with different tokenizers: one model can't read both")
        self.length, self.look, self.seed = length, look, seed
        self.windows = [Windows(c, length, look, word(seed, n)) for n, c in enumerate(corpora)]
        share = np.array(weights) / np.sum(weights) * BLOCK
        counts = np.floor(share).astype(np.int64)
        # The samples that are left go where most was cut off.
        counts[np.argsort(counts - share, kind="stable")[: BLOCK - int(counts.sum())]] += 1
        if (counts == 0).any():
            few = [str(c.folder) for c, n in zip(corpora, counts, strict=True) if n == 0]
            raise DataError(
                f"{', '.join(few)}: the weight is under 1 / {BLOCK} of all, too little to be mixed in"
            )
        self.counts = counts
        self._order = lru_cache(maxsize=2)(self._order_of)

    def _order_of(self, block: int) -> tuple[Ints, Ints]:
        """The sources of a block's samples, and how many samples of its source stand before each."""
        at = permuted(np.arange(BLOCK), BLOCK, word(self.seed, _ORDER, block))
        sources = np.repeat(np.arange(len(self.counts)), self.counts)[at]
        before = np.empty(BLOCK, dtype=np.int64)
        for source, count in enumerate(self.counts):
            before[sources == source] = np.arange(count)
        return sources, before

    def place(self, sample: int) -> tuple[int, int]:
        """The source of a sample, and its number among that source's samples."""
        block, within = divmod(sample, BLOCK)
        sources, before = self._order(block)
        source = int(sources[within])
        return source, block * int(self.counts[source]) + int(before[within])

    def batch(self, first: int, count: int, *, rank: int = 0, ranks: int = 1) -> Batch:
        """Samples `first` to `first + count`, or the equal part of them that belongs to a rank."""
        if count % ranks:
            raise DataError(f"{count} samples can't be shared evenly by {ranks} ranks")
        each = count // ranks
        places = [self.place(sample) for sample in range(first + rank * each, first + (rank + 1) * each)]
        read = [self.windows[source].read(number) for source, number in places]
        return Batch(
            torch.from_numpy(np.stack([ids for ids, _ in read])),
            torch.from_numpy(np.stack([documents for _, documents in read])),
            torch.tensor([source for source, _ in places]),
            self.look,
        )


class Ahead:
    """A mixture whose next batch is read by a thread while this one is worked on: as many samples, those after it.
    What was guessed wrong is read again."""

    def __init__(self, mixture: Mixture) -> None:
        self.mixture = mixture
        self._thread = ThreadPoolExecutor(1, "batches")
        self._next: tuple[tuple[int, int], Future[Batch]] | None = None

    def batch(self, first: int, count: int) -> Batch:
        """`Mixture.batch`."""
        waiting, self._next = self._next, None
        if waiting is not None and waiting[0] == (first, count):
            found = waiting[1].result()
        else:
            if waiting is not None:
                waiting[1].exception()  # one reader at a time
            found = self.mixture.batch(first, count)
        self._next = (first + count, count), self._thread.submit(self.mixture.batch, first + count, count)
        return found
