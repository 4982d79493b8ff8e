"""Batch-invariant mode: a token's log-probability does not depend on what else goes on, bit for bit."""

from __future__ import annotations

import random

import pytest
import torch

import rorqual
from rorqual.engine.draws import logprobs_of
from rorqual.engine.sampling import Sampling
from rorqual.model import Model
from tests.engine.conftest import MEMBERS, build
from tests.engine.test_engine import engine_of, idle, prompts_of


def alone(model: Model, ids: list[int]) -> torch.Tensor:
    """Logits [T, V] of the plain forward pass."""
    with rorqual.invariant():
        return model(torch.tensor([ids]))[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "speculate"), MEMBERS)
def test_bits_do_not_depend_on_company(kind: str, speculate: bool, dtype: torch.dtype) -> None:
    """Batches, chunks, prefix hits, preemption and speculation against the plain forward pass."""
    model = build(kind).to(dtype)
    engine = engine_of(model, 90, step_tokens=7, speculate=speculate, invariant=True)
    prompts = [[*range(4, 24), *prompt] for prompt in prompts_of(model.config.vocab, 3)]
    prompts += [[*prompt, 7, 8, 9] for prompt in prompts]
    handles = []
    for i, prompt in enumerate(prompts):
        sampling = Sampling(0.8, seed=i, max_new_tokens=8, logprobs=True, ignore_eos=True)
        handles.append(engine.submit(prompt, sampling))
        for _ in range(random.randint(0, 3)):
            engine.step()
        while i % 3 == 2 and engine.busy:
            engine.step()
    idle(engine)
    assert sum(h.request.cached for h in handles) > 0
    for prompt, handle in zip(prompts, handles, strict=True):
        done = handle.completion
        logits = alone(model, prompt + done.ids)[len(prompt) - 1 : -1]
        chosen, _, _ = logprobs_of(logits, torch.tensor(done.ids))
        assert done.logprobs == chosen.tolist()


def test_without_it_bits_do_change() -> None:
    """The test above would see a difference: plain passes of different shapes do differ in the last bits."""
    model = build("v3").to(torch.bfloat16)
    ids = [random.randrange(60) for _ in range(40)]
    whole, single = model(torch.tensor([ids]))[0], alone(model, ids)
    assert not torch.equal(whole, single)
    assert float((whole - single).abs().median()) < 0.02
