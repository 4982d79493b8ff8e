"""Drafting with MTP changes how fast answers come and nothing else."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from rorqual import Sampling
from rorqual.engine import Sampler
from rorqual.model import Model
from rorqual.nn import InputError, Rows
from tests.engine.conftest import build

PROMPTS = [[5], [7, 8, 9, 10, 11, 12, 13, 14, 15], list(range(3, 40)), [40, 41, 42]]


@pytest.mark.parametrize("prefill", [2048, 16])
def test_greedy_is_the_plain_answer(monkeypatch: pytest.MonkeyPatch, drafting: Model, prefill: int) -> None:
    monkeypatch.setattr("rorqual.engine.loop.PREFILL", prefill)
    samplings = [Sampling(temperature=0.0, max_new_tokens=n, ignore_eos=True) for n in (30, 17, 24, 1)]
    plain = drafting.generate(PROMPTS, samplings)
    fast = drafting.generate(PROMPTS, samplings, speculate=True)
    assert [d.ids for d in fast] == [d.ids for d in plain]
    assert fast[0].drafted > 0 and 0 <= fast[0].accepted <= fast[0].drafted


def test_penalties_see_drafted_tokens(drafting: Model) -> None:
    s = Sampling(
        temperature=0.0, max_new_tokens=25, frequency_penalty=2.0, repetition_penalty=1.2, ignore_eos=True
    )
    assert [d.ids for d in drafting.generate(PROMPTS, s, speculate=True)] == [
        d.ids for d in drafting.generate(PROMPTS, s)
    ]


def test_a_perfect_drafter_is_always_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """When MTP drafts what the main model will say, every draft stands: two tokens a pass."""
    model = build("v3")
    sampling = Sampling(temperature=0.0, max_new_tokens=41, ignore_eos=True)
    whole = [5, 6, 7, *model.generate([5, 6, 7], sampling).ids]
    genuine = Model.predict_further

    def knowing(self: Model, state: torch.Tensor, following: torch.Tensor, rows: Rows, **more: Any) -> Any:
        logits, state = genuine(self, state, following, rows, **more)
        sure = torch.zeros_like(logits)
        for t in range(rows.counts[0]):  # the pair of tokens i and i + 1 predicts token i + 2
            sure[0, t, [*whole, 0, 0][rows.starts[0] + t + 2]] = 99.0
        return sure, state

    monkeypatch.setattr(Model, "predict_further", knowing)
    done = model.generate([5, 6, 7], sampling, speculate=True)
    assert done.ids == whole[3:]
    assert done.accepted == done.drafted == 20


@pytest.mark.parametrize(
    ("kind", "filters"),
    [("v3", {}), ("v4", {}), ("v3", {"top_k": 3}), ("v4", {"top_p": 0.8}), ("v3", {"min_p": 0.2})],
)
def test_sampled_answers_have_the_plain_distribution(kind: str, filters: dict[str, Any]) -> None:
    """All answers of three tokens over five words: counts against the model's exact probabilities."""
    words, length, samples = 5, 3, 3000
    model = build(kind, vocab=words)
    prompt = [1, 2, 3]
    s = Sampling(temperature=1.3, max_new_tokens=length, ignore_eos=True, seed=0, **filters)
    definition = Sampler(words, torch.device("cpu"), 1)
    definition.admit(0, s, prompt)
    exact = {}
    for answer in itertools.product(range(words), repeat=length):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + list(answer)]))[0, 2:-1]
        exact[answer] = math.prod(
            float(definition.distribution(logits[i : i + 1], [0])[0, t]) for i, t in enumerate(answer)
        )
    assert sum(exact.values()) == pytest.approx(1, abs=1e-4)
    done = model.generate([prompt] * samples, s, speculate=True)
    counts = {answer: 0 for answer in exact}
    for d in done:
        counts[tuple(d.ids)] += 1
    assert 0.05 < sum(d.accepted for d in done) / sum(d.drafted for d in done) < 0.95
    # Rare answers are pooled, so that every cell expects at least ten.
    rare = [a for a in exact if exact[a] * samples < 10]
    cells = [(counts[a], exact[a] * samples) for a in exact if a not in rare]
    cells.append((sum(counts[a] for a in rare), sum(exact[a] for a in rare) * samples))
    cells = [(o, e) for o, e in cells if e > 0]
    chi2 = sum((o - e) ** 2 / e for o, e in cells)
    freedom = len(cells) - 1
    assert chi2 < freedom + 4 * math.sqrt(2 * freedom)


def test_rows_end_on_end_tokens_wherever_they_fall(drafting: Model) -> None:
    """An end token may be the first or the second of two settled at once; nothing is said after it."""
    free = Sampling(temperature=0.0, max_new_tokens=24, ignore_eos=True)
    ending = Sampling(temperature=0.0, max_new_tokens=24)
    before = drafting.config
    try:
        for place in range(1, 9):
            end = drafting.generate(PROMPTS[1], free).ids[place]
            drafting.config = before.replace(eos=(end,))
            plain = drafting.generate(PROMPTS, ending)
            fast = drafting.generate(PROMPTS, ending, speculate=True)
            assert [(d.ids, d.finish_reason) for d in fast] == [(d.ids, d.finish_reason) for d in plain]
            assert any(d.finish_reason == "stop" for d in fast)
    finally:
        drafting.config = before


def test_needs_an_mtp_module() -> None:
    with pytest.raises(InputError, match="MTP"):
        build("gqa").generate([5], Sampling(), speculate=True)
