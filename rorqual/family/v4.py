"""V4: compressed attention, hyper-connections and FP4 experts (arXiv 2606.19348)."""

from __future__ import annotations

from collections.abc import Sequence

from rorqual.family.cards import K, page
from rorqual.family.parts import (
    Compress,
    CompressedAttention,
    HyperConnection,
    Index,
    Layer,
    ModelConfig,
    MoE,
    Quantization,
    Rope,
    Router,
    Yarn,
)

PLAIN = Rope(dim=64, theta=10000.0, interleaved=True)
"""Positions of layers that only see the window."""
STRETCHED = Rope(
    dim=64, theta=160000.0, scaling=Yarn(factor=16.0, original=65536, amplitude=1.0), interleaved=True
)
"""Positions of compressing layers: YaRN's frequencies without its attention factor."""


def v4_shape(
    *,
    hidden: int,
    heads: int,
    q_rank: int,
    o_groups: int,
    index_top_k: int,
    experts: int,
    width: int,
    scale: float,
    ratios: Sequence[int],
    expert_format: str = "fp4",
) -> ModelConfig:
    """A V4 model; `ratios` has a layer's tokens to a cache entry: 0 window only, 4 CSA, 128 HCA.

    The first three layers choose experts by token id; the MTP layer attends the window only (section 4.2.1).
    """

    def layer(ratio: int, *, hashed: bool) -> Layer:
        sparse = ratio == 4
        index = Index(heads=64, dim=128, top_k=index_top_k) if sparse else None
        attention = CompressedAttention(
            heads=heads,
            head_dim=512,
            q_rank=q_rank,
            o_groups=o_groups,
            o_rank=1024,
            window=128,
            rope=STRETCHED if ratio else PLAIN,
            compress=Compress(ratio, overlap=sparse, index=index) if ratio else None,
        )
        router = Router(score="sqrtsoftplus", bias=not hashed, hashed=hashed, normalize=True, scale=scale)
        return Layer(attention, MoE(experts, 6, width, 1, router, limit=10.0))

    return ModelConfig(
        model_type="deepseek_v4",
        vocab=129280,
        hidden=hidden,
        layers=tuple(layer(ratio, hashed=i < 3) for i, ratio in enumerate(ratios)),
        max_positions=K * K,
        residual=HyperConnection(streams=4, iterations=20, eps=1e-6),
        mtp=(layer(0, hashed=False),),
        quantization=Quantization(ue8m0=True, experts=expert_format),
        bos=0,
        eos=(1,),
    )


def flash(expert_format: str = "fp4") -> ModelConfig:
    """V4-Flash: 43 layers, two of the window alone, then CSA and HCA in turn."""
    return v4_shape(
        hidden=4096,
        heads=64,
        q_rank=1024,
        o_groups=8,
        index_top_k=512,
        experts=256,
        width=2048,
        scale=1.5,
        ratios=(0, 0, *(4, 128) * 20, 4),
        expert_format=expert_format,
    )


def pro(expert_format: str = "fp4") -> ModelConfig:
    """V4-Pro: 61 layers, two HCA, then CSA and HCA in turn."""
    return v4_shape(
        hidden=7168,
        heads=128,
        q_rank=1536,
        o_groups=16,
        index_top_k=1024,
        experts=384,
        width=3072,
        scale=2.5,
        ratios=(128, 128, *(4, 128) * 29, 4),
        expert_format=expert_format,
    )


FLASH_BASE = page(
    "DeepSeek-V4-Flash-Base",
    flash("fp8"),
    released="2026-04-24",
    context=K * K,
    licence="MIT",
    source="DeepSeek-V4, arXiv 2606.19348",
)
PRO_BASE = FLASH_BASE.sibling("DeepSeek-V4-Pro-Base", config=pro("fp8"))

CARDS = (
    FLASH_BASE,
    FLASH_BASE.sibling("DeepSeek-V4-Flash", config=flash(), encoding="v4"),
    PRO_BASE,
    PRO_BASE.sibling("DeepSeek-V4-Pro", config=pro(), encoding="v4"),
)
