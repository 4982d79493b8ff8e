"""The FP8 cache layout of V3.2: its bytes are the released ones, and answers stay close."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

import rorqual
from rorqual.engine import Engine, Sampling
from rorqual.family import MLA, Index, Rope
from rorqual.model import Model
from rorqual.nn import InputError, Transformer
from tests.engine.conftest import build, config
from tests.engine.test_engine import idle
from tests.parity.zoo import stir_ours


def test_bytes_of_v32() -> None:
    """48,068 bytes a token (facts 2.3): 656 + 132 in each of 61 layers."""
    model = Transformer(rorqual.config("deepseek-v3.2"), device="meta")
    layers = model.lanes(fp8=True)[: len(model.layers)]
    assert sum(lane.bytes_per_item() for lanes in layers for lane in lanes.values()) == 48_068


@pytest.mark.parametrize("sparse", [False, True])
def test_answers_stay_close(sparse: bool) -> None:
    plain = config("v32" if sparse else "v3")
    index = Index(16, 128, 6) if sparse else None
    attention = MLA(4, 128, 12, 16, 10, Rope(16, interleaved=True), q_rank=20, index=index)
    layers = tuple(replace(layer, attention=attention) for layer in plain.layers)
    model = Model(replace(plain, layers=layers, mtp=()))
    stir_ours(model)
    engine = Engine(model, max_requests=4, fp8_cache=True, step_tokens=16)
    prompts = [[random.randrange(60) for _ in range(30)] for _ in range(4)]
    first = Sampling(0.0, max_new_tokens=1, logprobs=5, ignore_eos=True)
    near = []
    for ours, exact in zip(engine.generate(prompts, first), model.generate(prompts, first), strict=True):
        there = dict(exact.top_logprobs[0])
        near += [abs(value - there[token]) for token, value in ours.top_logprobs[0] if token in there]
    assert len(near) >= 12
    median = float(torch.tensor(near).median())
    assert 0 < median < 0.1, "rounded to three bits, but no more"
    idle(engine)


@pytest.mark.parametrize("kind", ["gqa", "v3", "v4"])
def test_models_without_such_a_layout_are_refused(kind: str) -> None:
    with pytest.raises(InputError, match="FP8"):
        Engine(build(kind), fp8_cache=True)
