"""Added tokens are found where the library finds them."""

from __future__ import annotations

import random
import re

import pytest
from tokenizers import AddedToken, decoders, models, normalizers
from tokenizers import Tokenizer as Backend

from rorqual.text.added import finder, longest_of, spelled

WORDS = [
    "ü",
    "<think>",
    "</think>",
    "<｜User｜>",
    "<｜User",
    "｜DSML｜",
    "<｜/table>｜",
    "ab",
    "abc",
    "bcd",
    "ab\n",
    "  ",
    "   ",
]


def made(second: list[str], normalizer: object = None, **options: bool) -> Backend:
    words = dict.fromkeys([*WORDS, *second])
    backend = Backend(models.WordLevel({"x": 0}, unk_token="x"))
    backend.decoder = decoders.ByteLevel()
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.add_tokens([AddedToken(w, normalized=w in second, **options) for w in words])
    return backend


def theirs(backend: Backend, text: str) -> list[tuple[str, int]]:
    added = backend.get_added_tokens_decoder()
    whole = backend.encode(text, add_special_tokens=False)
    return [
        (added[n].content, start)
        for n, (start, _) in zip(whole.ids, whole.offsets, strict=True)
        if n in added and len(added[n].content) > 1
    ]


def texts() -> list[str]:
    pick = random.Random(0)
    pieces = [*WORDS, *(w[1:] for w in WORDS), *(w[:-1] for w in WORDS), "x", "<", "｜"]
    return ["".join(pick.choices(pieces, k=pick.randint(1, 9))) for _ in range(400)]


@pytest.mark.parametrize("second", [[], ["</think>", "｜DSML｜", "  ", "   "]])
def test_as_the_library_finds_them(second: list[str]) -> None:
    backend = made(second)
    pattern = finder(backend, backend.get_added_tokens_decoder())
    assert pattern is not None
    for text in texts():
        assert [(m[0], m.start()) for m in pattern.finditer(text)] == theirs(backend, text), text


@pytest.mark.parametrize(
    ("second", "normalizer", "options"),
    [
        (["abc"], None, {}),  # begins like one of the first, which comes before it though it is shorter
        (["ün"], None, {}),  # of a letter that is one of the first
        (["<think>"], normalizers.Lowercase(), {}),
        ([], None, {"lstrip": True}),
        ([], None, {"single_word": True}),
    ],
)
def test_what_only_the_library_can(second: list[str], normalizer: object, options: dict[str, bool]) -> None:
    backend = made(second, normalizer, **options)
    assert finder(backend, backend.get_added_tokens_decoder()) is None


def test_every_first_letter() -> None:
    pattern = spelled(WORDS)
    for text in texts():
        places = [n for n in range(len(text)) if any(text.startswith(word, n) for word in WORDS)]
        assert [m.start() for m in pattern.finditer(text)] == places
    assert spelled([]).search("anything") is None and re.compile(longest_of([])).search("x") is None


def test_a_thousand_tokens_that_begin_alike_are_not_gone_through_one_by_one() -> None:
    words = [f"<｜place▁holder▁no▁{n}｜>" for n in range(1000)]
    assert longest_of(words).count("holder") == 1 and spelled(words).pattern.count("holder") == 1


def test_words_that_begin_one_another() -> None:
    words = ["a" * n for n in range(2, 500)] + ["ab"]
    assert [m[0] for m in re.finditer(longest_of(words), "aaaab" + "a" * 600)] == [
        "aaaa",
        "a" * 499,
        "a" * 101,
    ]
    assert len(spelled(words).findall("aaab")) == 3
