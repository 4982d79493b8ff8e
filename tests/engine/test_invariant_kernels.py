"""Batch-invariant mode by kernels: the same bits alone and in company, in any chunks, drafted or found in a cache."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

import rorqual
from rorqual.engine.draws import logprobs_of
from rorqual.engine.engine import Engine
from rorqual.engine.request import Handle
from rorqual.engine.sampling import Sampling
from rorqual.family import (
    GQA,
    MLA,
    Compress,
    CompressedAttention,
    HyperConnection,
    Index,
    Layer,
    ModelConfig,
    MoE,
    Rope,
    Router,
    SwiGLU,
)
from rorqual.kernels.quant import quantize_fp8
from rorqual.model import Model
from rorqual.nn.linear import Matrix
from tests.engine.test_engine import engine_of, idle
from tests.engine.test_paged_kernels import interpreted, member
from tests.parity.zoo import stir_ours

__all__ = ["interpreted"]

VOCAB = 1000


def check(model: Model, handles: list[Handle]) -> None:
    """Every answer's log-probabilities are those of the plain forward pass, to the bit."""
    for handle in handles:
        prompt, answer = list(handle.request.answer.prompt), handle.completion
        with rorqual.invariant():
            logits = model(torch.tensor([prompt + answer.ids], device=model.device))[0, len(prompt) - 1 : -1]
        chosen, _, _ = logprobs_of(logits, torch.tensor(answer.ids, device=model.device))
        assert answer.logprobs == chosen.tolist()


def serve(engine: Engine, prompts: list[list[int]], new: int, between: int = 0) -> list[Handle]:
    """Sampled answers to all prompts, which come `between` steps after one another."""
    handles = []
    for i, prompt in enumerate(prompts):
        sampling = Sampling(0.8, seed=i, max_new_tokens=new, logprobs=True, ignore_eos=True)
        handles.append(engine.submit(prompt, sampling))
        for _ in range(between):
            engine.step()
    while engine.busy:
        engine.step()
    for handle in handles:
        if handle.error is not None:
            raise handle.error
        assert len(handle.completion.ids) == new
    return handles


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gqa", "v3", "v32", "v4"])
def test_bits_by_kernels(kind: str, request: pytest.FixtureRequest) -> None:
    """In Triton's interpreter, tiny: chunks of different lengths, company and prefix hits change no bit."""
    model = member(kind)
    stem = [random.randrange(60) for _ in range(33)]
    launched = request.getfixturevalue("interpreted")
    engine = engine_of(model, 200, step_tokens=24, invariant=True)
    handles = serve(engine, [stem], 2)
    handles += serve(engine, [[*stem, 5, 6], [random.randrange(60) for _ in range(7)]], 2)
    idle(engine)
    assert handles[1].request.cached > 0 and launched
    check(model, handles)


def config(kind: str) -> ModelConfig:
    """A few layers of widths at which the kernels for the released models run."""
    common: dict[str, Any] = {"dtype": "float32", "eos": (2,)}
    if kind == "gqa":
        layers = (Layer(GQA(8, 2, 128, Rope(128, interleaved=False)), SwiGLU(1024)),) * 2
        return ModelConfig("llama", VOCAB, 512, layers, 4096, **common)
    rope = Rope(64, interleaved=True)
    if kind == "v4":
        router = Router("sqrtsoftplus", bias=True, normalize=True, scale=1.5)
        moe = MoE(16, 4, 128, 1, router, limit=2.0)
        parts = (Compress(4, True, Index(16, 128, 32)), Compress(128), None)
        layers = tuple(Layer(CompressedAttention(16, 512, 256, 4, 128, 128, rope, c), moe) for c in parts)
        streams = HyperConnection()
        return ModelConfig(
            "deepseek_v4", VOCAB, 512, layers, 4096, residual=streams, mtp=layers[-1:], **common
        )
    router = Router("sigmoid", bias=True, groups=4, keep=2, group_score="top2", normalize=True, scale=2.5)
    attention = MLA(16, 512, 128, 64, 128, rope, 256, Index(16, 128, 64) if kind == "v32" else None)
    layer = Layer(attention, MoE(16, 4, 128, 1, router))
    layers = (Layer(attention, SwiGLU(1024)), layer)
    return ModelConfig(f"deepseek_{kind}", VOCAB, 512, layers, 4096, mtp=(layer,), **common)


def made(config: ModelConfig, dtype: torch.dtype) -> Model:
    model = Model(config)
    stir_ours(model)
    return model.to("cuda", dtype)


KINDS = [f"{kind}-{dtype}" for dtype in ("bfloat16", "float32") for kind in ("gqa", "v3", "v32", "v4")]
KINDS.append("v3-codes")


def of(kinds: list[str]) -> pytest.MarkDecorator:
    """The test takes these of the large models."""
    return pytest.mark.parametrize("large", kinds, indirect=True, scope="module")


@pytest.fixture(scope="module", params=KINDS)
def large(request: pytest.FixtureRequest) -> Model:
    kind, dtype = request.param.split("-")
    if dtype != "codes":
        return made(config(kind), getattr(torch, dtype))
    model = made(config(kind), torch.bfloat16)
    for module in model.layers.modules():
        if isinstance(module, Matrix):
            codes, scale = quantize_fp8(module.weight.detach())
            module.hold_codes(torch.float8_e4m3fn, torch.float32, (128, 128))
            module.weight.data, module.scale.data = codes, scale  # type: ignore[union-attr]
    return model


def words(count: int) -> list[int]:
    return [random.randrange(VOCAB) for _ in range(count)]


def engine_for(model: Model, step_tokens: int = 8192, **options: Any) -> Engine:
    return Engine(model, invariant=True, memory=2**30, max_requests=80, step_tokens=step_tokens, **options)


@pytest.mark.gpu
def test_chunks_and_prefixes(large: Model) -> None:
    """Prompts whole and cut into chunks of 1, 7 and 64, from the start and behind a prefix that was found."""
    stem = words(150)
    prompts = [stem, [*stem, *words(9)], words(300)]
    for step_tokens, most in ((8192, 3), (64, 3), (7, 3), (1, 1)):
        engine = engine_for(large, step_tokens)
        handles = serve(engine, prompts[:1], 4) + serve(engine, prompts[1:most], 4)
        assert most == 1 or handles[1].request.cached > 0
        idle(engine)
        check(large, handles)


@pytest.mark.gpu
def test_company(large: Model) -> None:
    """Batches from 1 to 72, so that every form of the products has its turn, by recorded graphs and beside prompts."""
    prompts = [words(random.randint(1, 200)) for _ in range(72)]
    engine = engine_for(large)
    handles = serve(engine, prompts[:3], 6, between=2) + serve(engine, prompts[3:20], 6, between=1)
    handles += serve(engine, prompts[20:37], 5) + serve(engine, prompts, 4)
    idle(engine)
    graphs = engine.runner.graphs
    assert graphs is not None and graphs._made
    check(large, handles[:6] + random.sample(handles[6:], 24))


@pytest.mark.gpu
@of([kind for kind in KINDS if not kind.startswith("gqa")])  # that has no MTP module
def test_drafts(large: Model) -> None:
    """With drafts, which bring two rows a request."""
    engine = engine_for(large, speculate=True)
    handles = serve(engine, [words(random.randint(1, 100)) for _ in range(12)], 8, between=1)
    idle(engine)
    assert engine.runner.graphs is not None and engine.runner.graphs._made
    check(large, handles)


@pytest.mark.gpu
def test_graphs_change_no_bit(large: Model) -> None:
    prompt, answers = words(90), []
    for recorded in (True, False):
        engine = engine_for(large)
        if not recorded:
            engine.runner.graphs = None
        (handle,) = serve(engine, [prompt], 8)
        answers.append((handle.completion.ids, handle.completion.logprobs))
    assert answers[0] == answers[1]


@pytest.mark.gpu
def test_rows_of_a_forward_pass(large: Model) -> None:
    """`model(ids)` of a padded batch gives each row what it has alone."""
    rows = [words(count) for count in (1, 40, 130)]
    ids = torch.zeros(3, 130, dtype=torch.int64, device="cuda")
    for b, row in enumerate(rows):
        ids[b, : len(row)] = torch.tensor(row)
    mask = torch.arange(130, device="cuda") < torch.tensor([[len(row)] for row in rows], device="cuda")
    with rorqual.invariant():
        together = large(ids, mask)
        for b, row in enumerate(rows):
            assert torch.equal(together[b, : len(row)], large(torch.tensor([row], device="cuda"))[0])
        if all(
            m.scale is None for m in large.modules() if isinstance(m, Matrix)
        ):  # matrices where they first lay
            assert torch.equal(made(large.config, large.dtype)(ids, mask), together)


@pytest.mark.gpu
@of([kind for kind in KINDS if not kind.endswith("float32")])  # of that it isn't sure
def test_without_it_bits_do_change(large: Model) -> None:
    """The tests above would see a difference: plain passes differ in the last bits where products are in bf16."""
    engine = Engine(large, memory=2**30, max_requests=80)
    handles = serve(engine, [words(random.randint(20, 60)) for _ in range(40)], 6)
    with pytest.raises(AssertionError):
        check(large, handles)
