"""Batch n is a function of seed and n: whatever was read before it, by however many ranks."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from rorqual.data import Corpus, DataError, Mixture, Options, build
from rorqual.data.batches import BLOCK
from rorqual.data.numbers import mix, mix_all, permuted, uniform, word
from rorqual.nn.step import within
from tests.data.corpora import TOKENIZER, json_lines, texts, tokenizer


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> list[Corpus]:
    made = []
    for n, count in enumerate((200, 40)):
        place = tmp_path_factory.mktemp("c")
        source = json_lines(place / "a.jsonl", texts(count, start=1000 * n))
        build([str(source)], place / "c", TOKENIZER, Options(piece=900), workers=1)
        made.append(Corpus(place / "c"))
    return made


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 1000, 4097])
def test_a_permutation_is_one(size: int) -> None:
    one, other = (permuted(np.arange(size), size, key) for key in (7, 8))
    assert sorted(one.tolist()) == list(range(size))
    assert size < 16 or (one.tolist() != other.tolist() and one.tolist() != list(range(size)))
    # One index at a time it is the same.
    assert [int(permuted(np.array([i]), size, 7)[0]) for i in range(min(size, 50))] == one[:50].tolist()


def test_permutations_leave_no_order() -> None:
    """Neighbours part, and where index 0 goes is even over keys."""
    far = np.abs(np.diff(permuted(np.arange(10_000), 10_000, 3)))
    assert 3000 < far.mean() < 3700  # a third of 10,000
    to = Counter(int(permuted(np.array([0]), 10, key)[0]) for key in range(5000))
    assert len(to) == 10 and max(to.values()) < 620 and min(to.values()) > 380


def test_numbers_of_places() -> None:
    words = np.array([0, 1, 2**63, 2**64 - 1], dtype=np.uint64)
    assert mix_all(words).tolist() == [mix(int(w)) for w in words]
    assert mix(0) == 0xE220A8397B1DCDAF  # the first number of SplitMix64 from 0, as published with it
    found = [uniform(1, n) for n in range(4000)]
    assert 0.48 < np.mean(found) < 0.52 and min(found) >= 0 and max(found) < 1
    assert len({word(1, 2), word(2, 1), word(1), word(1, 2, 0)}) == 4


def test_a_row_is_the_corpus_cut_in_windows(corpora: list[Corpus]) -> None:
    corpus, length, look = corpora[0], 53, 3
    whole, numbers = corpus.read(0, corpus.tokens)
    mixture = Mixture([corpus], length=length, look=look, seed=5)
    count = mixture.windows[0].count
    assert count == (corpus.tokens - look) // length > 100
    begins = []
    for epoch in range(2):
        batch = mixture.batch(epoch * count, count)
        found = []
        for row, documents in zip(batch.ids_BT.numpy(), batch.documents_BT.numpy(), strict=True):
            (at,) = (
                begin
                for begin in range(0, count * length, length)
                if np.array_equal(whole[begin : begin + length + look], row)
                and np.array_equal(numbers[begin : begin + length + look], documents)
            )
            found.append(at // length)
        assert sorted(found) == list(range(count))
        begins.append(found)
    assert begins[0] != begins[1]


def test_reads_over_shards_are_reads_of_one_row(corpora: list[Corpus]) -> None:
    corpus = corpora[0]
    assert len(corpus.manifest.shards) > 3
    whole, numbers = corpus.read(0, corpus.tokens)
    assert (np.diff(numbers) >= 0).all() and numbers[-1] == corpus.documents - 1
    bos = TOKENIZER.bos
    assert (
        (whole == bos) == (np.diff(numbers, prepend=-1) == 1)
    ).all()  # a document begins where its number does
    for begin in range(0, corpus.tokens - 700, 97):
        part, here = corpus.read(begin, 700)
        assert np.array_equal(part, whole[begin : begin + 700]) and np.array_equal(
            here, numbers[begin : begin + 700]
        )
    for begin, count in ((-1, 5), (corpus.tokens - 4, 5)):
        with pytest.raises(IndexError):
            corpus.read(begin, count)


def test_batches_are_the_same_from_anywhere(corpora: list[Corpus]) -> None:
    def mixture(seed: int = 1) -> Mixture:
        return Mixture(corpora, [0.7, 0.3], length=32, seed=seed)

    expected = [mixture().batch(8 * n, 8) for n in range(4)]
    again = mixture()
    for n in (3, 0, 2, 1):
        assert torch.equal(again.batch(8 * n, 8).ids_BT, expected[n].ids_BT)
    for ranks in (2, 4, 8):
        parts = [mixture().batch(16, 8, rank=rank, ranks=ranks) for rank in range(ranks)]
        assert torch.equal(torch.cat([part.ids_BT for part in parts]), expected[2].ids_BT)
        assert torch.equal(torch.cat([part.sources_B for part in parts]), expected[2].sources_B)
    assert not torch.equal(mixture(2).batch(0, 8).ids_BT, expected[0].ids_BT)


def test_mixtures_hold_their_proportions(corpora: list[Corpus]) -> None:
    mixture = Mixture(corpora, [5, 1], length=16, seed=9)
    places = [mixture.place(sample) for sample in range(2 * BLOCK)]
    counts = Counter(source for source, _ in places[:BLOCK])
    assert abs(counts[1] - BLOCK / 6) < 1 and sum(counts.values()) == BLOCK
    # Each source's samples come one after the other, and every stretch has about its share.
    for source in (0, 1):
        numbers = [number for found, number in places if found == source]
        assert numbers == list(range(len(numbers)))
    share = [np.mean([s for s, _ in places[at : at + 600]]) for at in range(0, BLOCK, 600)]
    assert min(share) > 0.1 and max(share) < 0.24


def test_positions_begin_anew_with_documents(corpora: list[Corpus]) -> None:
    batch = Mixture(corpora, length=64, seed=2).batch(0, 16)
    for ids, documents, positions in zip(
        batch.ids_BT, batch.documents_BT, within(batch.documents_BT), strict=True
    ):
        expected, last = [], None
        for number in documents.tolist():
            expected.append(expected[-1] + 1 if number == last else 0)
            last = number
        assert positions.tolist() == expected
        assert (ids[1:] == TOKENIZER.bos).tolist() == (positions[1:] == 0).tolist()


def test_what_cannot_be_mixed_is_named(corpora: list[Corpus], tmp_path: Path) -> None:
    for weights, why in (
        ([1], "2 corpora and 1"),
        ([1, 0], "above 0"),
        ([1, 1e-9], "too little"),
        ([1, np.nan], "above 0"),
    ):
        with pytest.raises(DataError, match=why):
            Mixture(corpora, weights, length=16)
    with pytest.raises(DataError, match="take a shorter sequence"):
        Mixture(corpora, length=10**6)
    with pytest.raises(DataError, match="can't be"):
        Mixture(corpora, length=0)
    with pytest.raises(DataError, match="shared evenly by 3"):
        Mixture(corpora, length=16).batch(0, 8, rank=0, ranks=3)
    build([str(json_lines(tmp_path / "a.jsonl", texts(50)))], tmp_path / "c", tokenizer("sea"), workers=1)
    with pytest.raises(DataError, match="different tokenizers"):
        Mixture([*corpora, Corpus(tmp_path / "c")], length=16)
