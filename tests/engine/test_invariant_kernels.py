"""Batch-invariant mode by kernels: the same bits alone and in company, in any chunks, drafted or found in a cache."""

from __future__ import annotations

import random
import sys
from typing import Any

import pytest
import torch

import rorqual
from rorqual.engine import Engine
from rorqual.engine.draws import logprobs_of
from rorqual.engine.sampling import Sampling
from rorqual.model import Model
from tests.engine.test_engine import engine_of, idle
from tests.engine.test_paged_kernels import interpreted, member

__all__ = ["interpreted"]


def alone(model: Model, prompt: list[int], ids: list[int]) -> list[float]:
    """Log-probabilities of `ids` after `prompt`, by the plain forward pass."""
    device = model.device
    with rorqual.invariant():
        logits = model(torch.tensor([prompt + ids], device=device))[0, len(prompt) - 1 : -1]
    found: list[float] = logprobs_of(logits, torch.tensor(ids, device=device))[0].tolist()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gqa", "v3", "v32", "v4"])
def test_bits_by_kernels(kind: str, request: pytest.FixtureRequest) -> None:
    """In Triton's interpreter, tiny: chunks of different lengths, company and prefix hits change no bit."""
    model = member(kind)
    stem = [random.randrange(60) for _ in range(33)]
    prompts = [stem, [*stem, 5, 6], [random.randrange(60) for _ in range(7)]]
    launched = request.getfixturevalue("interpreted")
    engine = engine_of(model, 200, step_tokens=24, invariant=True)
    done = []
    for i, group in enumerate((prompts[:1], prompts[1:])):
        sampling = Sampling(0.8, seed=i, max_new_tokens=3, logprobs=True, ignore_eos=True)
        handles = [engine.submit(prompt, sampling) for prompt in group]
        while engine.busy:
            engine.step()
        done += handles
    idle(engine)
    assert done[1].request.cached > 0 and launched
    for prompt, handle in zip(prompts, done, strict=True):
        answer = handle.completion
        assert answer.logprobs == alone(model, prompt, answer.ids)
