"""The FP8 cache layouts of V3.2 and V4: their bytes are the released ones, and answers stay close."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

import rorqual
from rorqual.engine import Completion, Engine, Sampling
from rorqual.family import MLA, Compress, CompressedAttention, Index, ModelConfig, Rope
from rorqual.kernels.entries import entry_bytes
from rorqual.model import Model
from rorqual.nn import InputError, Transformer
from rorqual.nn.compressed import CompressedAttention as Brick
from rorqual.nn.paged import Group, new_store, page_bytes
from rorqual.nn.step import Rows, Step
from tests.engine.conftest import build, config
from tests.engine.test_engine import idle
from tests.parity.zoo import stir_ours


def test_bytes_of_v32() -> None:
    """48,068 bytes a token (facts 2.3): 656 + 132 in each of 61 layers."""
    model = Transformer(rorqual.config("deepseek-v3.2"), device="meta")
    layers = model.lanes(fp8=True)[: len(model.layers)]
    assert sum(lane.bytes_per_item() for lanes in layers for lane in lanes.values()) == 48_068


@pytest.mark.parametrize(("member", "growing"), [("v4-flash", 3_514.25), ("v4-pro", 5_031.4375)])
def test_bytes_of_v4(member: str, growing: float) -> None:
    """A page grows a cache by the bytes of facts 2.3: 584 an entry, and 68 of an index key beside it, once in 4
    tokens of a CSA layer; 584 once in 128 of an HCA layer. At 2^20 tokens 7.31 % and 10.47 % of V3.2's (claim 28);
    rings take 584 for each of the window's places."""
    model = Transformer(rorqual.config(f"deepseek-{member}"), device="meta")
    layers = model.lanes(fp8=True)[: len(model.layers)]
    assert page_bytes(layers, 128) / 128 == growing
    share = growing / 48_068
    assert round(100 * share, 2) == {"v4-flash": 7.31, "v4-pro": 10.47}[member]
    assert all(lanes["window"].bytes_per_item() == 584 for lanes in layers)
    fixed = sum(lanes["window"].bytes_per_item() * (lanes["window"].keep or 0) for lanes in layers)
    assert fixed == {"v4-flash": 3_214_336, "v4-pro": 4_559_872}[member]


def small_v4() -> ModelConfig:
    """Entries of 64 + 8 channels, index keys of 32: a block of each rounding."""
    plain = config("v4")
    layers = []
    for layer in (*plain.layers, *plain.mtp):
        a = layer.attention
        assert isinstance(a, CompressedAttention)
        c = a.compress and replace(a.compress, index=Index(16, 32, 3) if a.compress.index else None)
        layers.append(replace(layer, attention=replace(a, head_dim=72, compress=c)))
    return replace(plain, layers=tuple(layers[:-1]), mtp=tuple(layers[-1:]))


def test_v4_rounds_as_the_simulation() -> None:
    """Beside a model that simulates the released rounding only the rotary channels differ, kept in bf16 here."""
    model = Model(small_v4())
    stir_ours(model)
    prompts = [[random.randrange(60) for _ in range(count)] for count in (50, 7, 33, 21)]
    sampling = Sampling(0.0, max_new_tokens=12, logprobs=5, ignore_eos=True)
    plain = model.generate(prompts, sampling)
    model.simulate_released_rounding()
    rounded = model.generate(prompts, sampling)
    model.simulate_released_rounding(False)
    engine = Engine(model, max_requests=4, fp8_cache=True, step_tokens=16)
    ours = engine.generate(prompts, sampling)
    idle(engine)
    lanes = model.lanes(fp8=True)[: len(model.layers)]
    grown = [
        memory.nbytes
        for kinds, store in zip(lanes, engine.runner.stores, strict=True)
        for name, memory in store.items()
        if kinds[name].keep is None
    ]
    assert sum(grown) == (engine.pages.total + 1) * page_bytes(lanes, engine.pages.page_size), (
        "bytes that are there"
    )

    def apart(a: list[Completion], b: list[Completion]) -> float:
        first = [(x.top_logprobs[0], dict(y.top_logprobs[0])) for x, y in zip(a, b, strict=True)]
        gaps = [abs(value - other[t]) for top, other in first for t, value in top if t in other]
        assert len(gaps) >= 12
        return float(torch.tensor(gaps).median())

    assert apart(ours, rounded) < 0.2 * apart(ours, plain), (apart(ours, rounded), apart(ours, plain))
    again = Engine(model, max_requests=4, fp8_cache=True, speculate=True, step_tokens=7)
    assert [c.ids for c in again.generate(prompts, sampling)] == [c.ids for c in ours]


@torch.no_grad()
@pytest.mark.parametrize("compress", [Compress(4, True, Index(16, 32, 3)), Compress(16), None])
def test_a_v4_brick_over_bytes_equals_the_simulation(compress: Compress | None) -> None:
    """In bf16, where rotary channels lose nothing: the same bits as a cache of rounded entries, chunk by chunk."""
    part = CompressedAttention(4, 72, 20, 2, 10, 8, Rope(8, interleaved=True), compress)
    brick = Brick(32, part, 1e-6).requires_grad_(False)
    for parameter in brick.parameters():
        parameter.normal_(0, 0.2)
    brick.bfloat16()
    store = new_store(brick.lanes(torch.bfloat16, fp8=True), 5, 16, 2, torch.device("cpu"))
    cache = brick.new_cache(1, 64, torch.bfloat16, torch.device("cpu"))
    x_BTD, start = torch.randn(1, 41, 32).bfloat16(), 0
    for count in (19, 1, 1, 13, 1, 6):
        chunk, step = (
            x_BTD[:, start : start + count],
            Step(Rows([start], [count], count, torch.device("cpu"))),
        )
        for module in (brick, brick.index):
            if module is not None:
                module.simulate = True
        want = brick(chunk, step, cache)
        for module in (brick, brick.index):
            if module is not None:
                module.simulate = False
        end = start + count
        group = Group(
            slice(0, count), [start], [count], count, end, torch.tensor([[3, 1, 4]]), torch.tensor([1]),
            torch.tensor([end]), torch.tensor([0, count]), count == 1,
        )  # fmt: skip
        assert torch.equal(brick(chunk, step, brick.view(store, group)), want)
        start = end
    assert store["window"].dtype == torch.uint8 and store["window"].shape[2] == entry_bytes(72, 8)


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


@pytest.mark.gpu
@pytest.mark.parametrize("speculate", [False, True])
def test_v4_over_bytes_on_the_gpu(speculate: bool) -> None:
    """By kernels and graphs, in fp32: the CPU's greedy answers over the same bytes."""
    model = Model(small_v4())
    stir_ours(model)
    prompts = [[random.randrange(60) for _ in range(count)] for count in (1, 38, 7, 60, 21)]
    sampling = Sampling(0.0, max_new_tokens=16, ignore_eos=True)
    plain = [c.ids for c in Engine(model, max_requests=4, fp8_cache=True).generate(prompts, sampling)]
    engine = Engine(model.cuda(), max_requests=4, fp8_cache=True, step_tokens=24, speculate=speculate)
    assert [c.ids for c in engine.generate(prompts, sampling)] == plain
    idle(engine)
