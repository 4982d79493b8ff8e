"""The plain loop: batches, stops, lengths, streams, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from rorqual import Sampling
from rorqual.engine import Answer
from rorqual.engine.loop import PREFILL
from rorqual.model import Model
from rorqual.nn import ContextError, InputError
from tests.engine.conftest import build

GREEDY = Sampling(temperature=0.0, max_new_tokens=20, ignore_eos=True)


def by_hand(model: Model, prompt: list[int], count: int) -> list[int]:
    """Greedy continuation without a cache, the whole sequence anew for every token."""
    ids = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


PROMPTS = [[5], [7, 8, 9, 10, 11, 12, 13, 14, 15], list(range(3, 40)), [40, 41, 42]]


def test_batch_equals_single_prompts_equals_no_cache(model: Model) -> None:
    together = model.generate(PROMPTS, GREEDY)
    for prompt, done in zip(PROMPTS, together, strict=True):
        assert done.ids == by_hand(model, prompt, 20) == model.generate(prompt, GREEDY).ids
        assert done.finish_reason == "length" and done.prompt_tokens == len(prompt) and done.text is None


def test_long_prompts_are_fed_in_passes(monkeypatch: pytest.MonkeyPatch, model: Model) -> None:
    whole = model.generate(PROMPTS, GREEDY)
    assert len(PROMPTS) * max(map(len, PROMPTS)) < PREFILL
    monkeypatch.setattr("rorqual.engine.loop.PREFILL", 5 * len(PROMPTS))
    assert [d.ids for d in model.generate(PROMPTS, GREEDY)] == [d.ids for d in whole]


def test_rows_end_on_their_own(model: Model) -> None:
    """Each row gets an end token of its own kind: its own length."""
    free = model.generate(PROMPTS, GREEDY)
    samplings = [Sampling(temperature=0.0, max_new_tokens=n, ignore_eos=True) for n in (1, 20, 7, 13)]
    cut = model.generate(PROMPTS, samplings)
    assert [d.ids for d in cut] == [d.ids[: s.max_new_tokens] for d, s in zip(free, samplings, strict=True)]


def test_end_token_stops_and_is_kept_in_ids() -> None:
    model = build("gqa")
    free = model.generate([5, 6], GREEDY).ids
    end = free[4]
    model.config = model.config.replace(eos=(end,))
    done = model.generate([5, 6], Sampling(temperature=0.0, max_new_tokens=20))
    assert done.ids == free[: free.index(end) + 1] and done.finish_reason == "stop"
    assert model.generate([5, 6], GREEDY).ids == free


def test_sampled_rows_do_not_depend_on_their_neighbours(model: Model) -> None:
    s = Sampling(temperature=0.9, top_p=0.9, seed=11, max_new_tokens=15, ignore_eos=True)
    together = model.generate(PROMPTS, s)
    own = [
        model.generate(
            p, Sampling(temperature=0.9, top_p=0.9, seed=11 + i, max_new_tokens=15, ignore_eos=True)
        )
        for i, p in enumerate(PROMPTS)
    ]
    assert [d.ids for d in together] == [d.ids for d in own]


def test_logprobs_are_the_models_own() -> None:
    model = build("v3")
    s = Sampling(temperature=0.5, top_k=5, seed=1, max_new_tokens=6, logprobs=3, ignore_eos=True)
    done = model.generate([5, 6, 7], s)
    ids = torch.tensor([[5, 6, 7, *done.ids]])
    with torch.no_grad():
        logp = model(ids)[0, 2:-1].log_softmax(-1)
    for step, token in enumerate(done.ids):
        assert done.logprobs[step] == pytest.approx(float(logp[step, token]), abs=1e-4)
        best = logp[step].topk(3)
        assert [t for t, _ in done.top_logprobs[step]] == best.indices.tolist()
    assert model.generate([5], GREEDY).logprobs is None


def test_stream_gives_the_same_tokens_and_can_be_dropped() -> None:
    model = build("v4")
    whole = model.generate([5, 6, 7], GREEDY).ids
    assert [d.id for d in model.stream([5, 6, 7], GREEDY)] == whole
    stream = model.stream([5, 6, 7], GREEDY)
    assert next(stream).id == whole[0]
    stream.close()


def test_tensors_are_prompts_too() -> None:
    model = build("gqa")
    expected = model.generate([[4, 5, 6], [7, 8, 9]], GREEDY)
    rows = model.generate(torch.tensor([[4, 5, 6], [7, 8, 9]]), GREEDY)
    assert [r.ids for r in rows] == [e.ids for e in expected]
    assert model.generate(torch.tensor([4, 5, 6]), GREEDY).ids == expected[0].ids


def test_answers_stop_at_the_models_last_position() -> None:
    model = build("gqa")
    done = model.generate([3] * 195, Sampling(max_new_tokens=1000, ignore_eos=True))
    assert len(done.ids) == 5 and done.finish_reason == "length"


@pytest.mark.parametrize(
    ("prompt", "error", "words"),
    [
        ([], InputError, "no prompts"),
        ([[]], InputError, "prompt 0 is empty"),
        ([3, 60], InputError, "id 60"),
        ([-1], InputError, "id -1"),
        ([3] * 200, ContextError, "200 positions"),
        ("text", InputError, "tokenizer"),
        ([["a"]], InputError, "prompt 0"),
        ([True, False], InputError, "prompt 0"),
        (5, InputError, "prompts must be"),
        (torch.zeros(2), InputError, "integers"),
        (torch.tensor([True, False]), InputError, "integers"),
        (b"bytes", InputError, "bytes"),
    ],
    ids=str,
)
def test_bad_prompts(prompt: object, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        build("gqa").generate(prompt, GREEDY)


@pytest.mark.parametrize("sampling", [0.0, {"temperature": 1}, [None], "greedy"])
def test_bad_samplings(sampling: object) -> None:
    with pytest.raises(InputError, match="sampling must be"):
        build("gqa").generate([3], sampling)


def test_stop_strings_need_a_tokenizer() -> None:
    with pytest.raises(InputError, match="tokenizer"):
        build("gqa").generate([3], Sampling(stop="x"))


class Letters:
    """A tokenizer's stream in which id n is the n-th letter."""

    def push(self, token: int) -> str:
        return chr(ord("a") + token)

    def finish(self) -> str:
        return ""


@pytest.mark.parametrize(
    ("text", "stop", "kept", "reason"),
    [
        ("abcabd", ("abd",), "abc", "stop"),
        ("aaab", ("aab",), "a", "stop"),
        ("abcde", ("x", "cd"), "ab", "stop"),
        ("abc", ("cd",), "abc", "length"),
        ("abab", ("abac",), "abab", "length"),
    ],
)
def test_stop_strings(text: str, stop: tuple[str, ...], kept: str, reason: str) -> None:
    """Streamed text never shows a part of a stop string, and nothing is lost if it stays incomplete."""
    sampling = Sampling(stop=stop, max_new_tokens=len(text))
    answer = Answer([1], sampling, frozenset(), Letters())
    shown = ""
    for letter in text:
        shown += answer.take(ord(letter) - ord("a"))
        assert kept.startswith(shown)
        if answer.done.finish_reason:
            break
    assert shown == answer.done.text == kept and answer.done.finish_reason == reason


def test_forward_refuses_bad_input() -> None:
    model = build("gqa")
    with pytest.raises(InputError, match="int64"):
        model(torch.zeros(1, 3))
    with pytest.raises(InputError, match=r"\[batch, time\]"):
        model(torch.zeros(3, dtype=torch.long))
    with pytest.raises(InputError, match="vocabulary"):
        model(torch.tensor([[3, 60]]))
    with pytest.raises(InputError, match="mask"):
        model(torch.tensor([[3, 4]]), torch.ones(1, 3))
    with pytest.raises(InputError, match="mask must be"):
        model(torch.tensor([[3, 4]]), torch.tensor([[0.0, -float("inf")]]))
    with pytest.raises(InputError, match="mask must be"):
        model(torch.tensor([[3, 4]]), torch.tensor([[1, 2]]))
    with pytest.raises(InputError, match="row 1"):
        model(torch.tensor([[3, 4], [3, 4]]), torch.tensor([[1, 1], [0, 0]]))
    with pytest.raises(ContextError, match="200 positions"):
        model(torch.zeros(1, 201, dtype=torch.long))
    with pytest.raises(InputError, match="cache holds 2 rows"):
        model(torch.tensor([[3]]), cache=model.new_cache(2))
