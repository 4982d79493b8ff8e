"""Small random members with a tokenizer-less interface, shared by the generation tests."""

from __future__ import annotations

import pytest

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
from rorqual.model import Model
from tests.parity.zoo import stir_ours

WIDTH = 32

MEMBERS = [("gqa", False), *((kind, drafts) for kind in ("v3", "v32", "v4") for drafts in (False, True))]
"""Kinds of `build`, plain and with speculation where there is an MTP module."""


def config(kind: str, vocab: int = 60) -> ModelConfig:
    """A two- or three-layer member: "gqa", "v3" (with MTP), "v32" (with MTP) or "v4" (with MTP)."""
    rope = Rope(8, interleaved=kind != "gqa")
    if kind == "gqa":
        layers = (Layer(GQA(4, 2, 8, rope), SwiGLU(48)),) * 2
        return ModelConfig("llama", vocab, WIDTH, layers, 200, dtype="float32", eos=(2,))
    if kind in ("v3", "v32"):
        index = Index(16, 16, 6) if kind == "v32" else None
        attention = MLA(4, 16, 12, 8, 10, rope, q_rank=20, index=index)
        router = Router("sigmoid", bias=True, groups=4, keep=2, group_score="top2", normalize=True, scale=2.5)
        layer = Layer(attention, MoE(8, 3, 12, 1, router))
        layers = (Layer(attention, SwiGLU(48)), layer)
        return ModelConfig(
            f"deepseek_{kind}", vocab, WIDTH, layers, 200, mtp=(layer,), dtype="float32", eos=(2,)
        )
    router = Router("sqrtsoftplus", bias=True, normalize=True, scale=1.5)
    moe = MoE(6, 2, 12, 1, router, limit=2.0)

    def attention(compress: Compress | None) -> CompressedAttention:
        return CompressedAttention(4, 16, 20, 2, 10, 8, rope, compress)

    parts = (Compress(4, True, Index(16, 16, 3)), Compress(16), None)
    layers = tuple(Layer(attention(c), moe) for c in parts)
    return ModelConfig(
        "deepseek_v4",
        vocab,
        WIDTH,
        layers,
        200,
        residual=HyperConnection(),
        mtp=layers[-1:],
        dtype="float32",
        eos=(2,),
    )


def build(kind: str, vocab: int = 60) -> Model:
    """The model of `config`, stirred."""
    model = Model(config(kind, vocab))
    stir_ours(model)
    return model


@pytest.fixture(scope="session", params=["gqa", "v3", "v32", "v4"])
def model(request: pytest.FixtureRequest) -> Model:
    return build(request.param)


@pytest.fixture(scope="session", params=["v3", "v32", "v4"])
def drafting(request: pytest.FixtureRequest) -> Model:
    return build(request.param)
