"""Sampling against a naive implementation, and draws against the probabilities they claim."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rorqual.engine import Sampler, Sampling, SamplingError

VOCAB = 12


def sampler(*rows: Sampling, prompts: list[list[int]] | None = None, vocab: int = VOCAB) -> Sampler:
    return Sampler(list(rows), prompts or [[] for _ in rows], vocab, torch.device("cpu"))


def naive(logits: list[float], s: Sampling, prompt: list[int], answer: list[int]) -> list[float]:
    """The documented order, with plain lists."""
    z = list(logits)
    for t in set(prompt) | set(answer):
        z[t] = z[t] / s.repetition_penalty if z[t] > 0 else z[t] * s.repetition_penalty
    for t in set(answer):
        z[t] -= s.presence_penalty + s.frequency_penalty * answer.count(t)
    if s.temperature == 0:
        return [1.0 if i == z.index(max(z)) else 0.0 for i in range(len(z))]
    e = [math.exp((v - max(z)) / s.temperature) for v in z]
    p = {i: v / sum(e) for i, v in enumerate(e)}
    order = sorted(p, key=lambda i: (-p[i], i))
    if s.top_k:
        order = order[: s.top_k]
    kept, mass, whole = [], 0.0, sum(p[i] for i in order)
    for i in order:
        if kept and mass >= s.top_p * whole:
            break
        kept.append(i)
        mass += p[i]
    kept = [i for i in kept if p[i] >= s.min_p * p[order[0]]]
    total = sum(p[i] for i in kept)
    return [p[i] / total if i in kept else 0.0 for i in range(len(z))]


@given(
    st.lists(st.floats(-8, 8, width=32), min_size=VOCAB, max_size=VOCAB, unique=True),
    st.builds(
        Sampling,
        temperature=st.sampled_from([0.0, 0.3, 1.0, 1.7]),
        top_p=st.sampled_from([0.15, 0.55, 0.93, 1.0]),
        top_k=st.integers(0, VOCAB + 3),
        min_p=st.sampled_from([0.0, 0.03, 0.4, 1.0]),
        repetition_penalty=st.sampled_from([0.7, 1.0, 1.3]),
        presence_penalty=st.sampled_from([-0.5, 0.0, 0.8]),
        frequency_penalty=st.sampled_from([0.0, 0.6]),
    ),
    st.lists(st.integers(0, VOCAB - 1), max_size=4),
    st.lists(st.integers(0, VOCAB - 1), max_size=4),
)
def test_distribution_equals_the_definition(
    logits: list[float], s: Sampling, prompt: list[int], answer: list[int]
) -> None:
    ours = sampler(s, prompts=[prompt])
    for token in answer:
        ours.saw([token])
    p = ours.distribution(torch.tensor([logits]))[0]
    assert float(p.sum()) == pytest.approx(1, abs=1e-5)
    # A token on a top-p or min-p border may fall to either side in fp32: then a hair's change of the border
    # must explain it.
    near = [
        replace(
            s,
            top_p=s.top_p * (1 + e) if s.top_p < 1 else 1.0,
            min_p=s.min_p * (1 + e) if s.min_p < 1 else 1.0,
        )
        for e in (0, 1e-5, -1e-5)
    ]
    assert any(torch.allclose(p, torch.tensor(naive(logits, one, prompt, answer)), atol=2e-5) for one in near)


def test_draws_follow_the_probabilities() -> None:
    p = torch.tensor([[0.5, 0.0, 0.2, 0.05, 0.25]])
    ours = sampler(Sampling(seed=3), vocab=5)
    count = torch.zeros(5)
    for _ in range(4000):
        count[ours.draw_from(p)] += 1
    expected = p[0] * 4000
    assert count[1] == 0
    chi2 = float(((count - expected).square() / expected.clamp(min=1e-9))[p[0] > 0].sum())
    assert chi2 < 16.3  # 3 degrees of freedom: exceeded once in a thousand


def test_a_row_draws_the_same_whatever_stands_beside_it() -> None:
    logits = torch.randn(3, VOCAB)
    rows = [Sampling(seed=s, temperature=t, top_k=k) for s, t, k in ((1, 1.0, 0), (2, 0.7, 5), (3, 0.0, 0))]
    together = sampler(*rows)
    alone = [sampler(row) for row in rows]
    for _ in range(20):
        assert together.draw(logits).tolist() == [int(a.draw(logits[i : i + 1])) for i, a in enumerate(alone)]


def test_seed_repeats_and_no_seed_does_not() -> None:
    logits = torch.zeros(1, 1000)

    def run(seed: int | None) -> list[int]:
        one = sampler(Sampling(seed=seed), vocab=1000)
        return [int(one.draw(logits)) for _ in range(8)]

    assert run(7) == run(7) != run(8)
    assert run(None) != run(None)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", "hot"),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("min_p", -1),
        ("top_k", -1),
        ("top_k", 2.5),
        ("repetition_penalty", 0),
        ("presence_penalty", math.inf),
        ("max_new_tokens", 0),
        ("max_new_tokens", True),
        ("seed", -4),
        ("seed", 2**62),
        ("stop", ("",)),
        ("stop", 5),
        ("logprobs", -1),
    ],
)
def test_bad_values_are_named(field: str, value: Any) -> None:
    with pytest.raises(SamplingError, match=field):
        Sampling(**{field: value})


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nan_logits_are_refused(temperature: float) -> None:
    logits = torch.zeros(1, VOCAB)
    for bad in (math.nan, math.inf):
        logits[0, 3] = bad
        with pytest.raises(SamplingError, match="NaN or infinite"):
            sampler(Sampling(temperature=temperature)).draw(logits)
    with pytest.raises(SamplingError, match="NaN or infinite"):
        sampler(Sampling(temperature=temperature)).draw(torch.full((1, VOCAB), -math.inf))


def test_tiny_temperatures_are_greedy_and_masks_hold() -> None:
    logits = torch.tensor([[0.0, 5.0, 1.0, -math.inf]])
    for heat in (1e-39, 1e-30, 1e-6):
        assert int(sampler(Sampling(temperature=heat), vocab=4).draw(logits)) == 1
    one = sampler(Sampling(temperature=50.0, seed=1), vocab=4)
    assert 3 not in {int(one.draw(logits)) for _ in range(200)}
