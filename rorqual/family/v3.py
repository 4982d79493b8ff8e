"""The third generation: 256 experts, one MTP layer, FP8 (arXiv 2412.19437), and R1 on its shape."""

from __future__ import annotations

import dataclasses

from rorqual.family.cards import K, page
from rorqual.family.parts import Index, Layer, ModelConfig, MoE, Quantization, Router, SwiGLU
from rorqual.family.v2 import latent

ROUTER = Router(score="sigmoid", bias=True, groups=8, keep=4, group_score="top2", normalize=True, scale=2.5)
"""Auxiliary-loss-free balancing; a token stays within 4 of 8 groups (V3 report, section 2.1.2)."""


def v3_shape(*, ue8m0: bool = False, index: Index | None = None) -> ModelConfig:
    """V3, R1 and V3.1, or V3.2 with an `index`: 3 dense layers, 58 with experts, one MTP layer.

    `ue8m0`: the checkpoint's block scales are powers of two (V3.1 onwards).
    """
    attention = dataclasses.replace(latent(128, 1536, 1.0), index=index)
    experts = Layer(attention, MoE(routed=256, top_k=8, width=2048, shared=1, router=ROUTER))
    return ModelConfig(
        model_type="deepseek_v3" if index is None else "deepseek_v32",
        vocab=129280,
        hidden=7168,
        layers=(*(Layer(attention, SwiGLU(18432)),) * 3, *(experts,) * 58),
        max_positions=160 * K,
        mtp=(experts,),
        quantization=Quantization(ue8m0=ue8m0),
        bos=0,
        eos=(1,),
    )


V3_BASE = page(
    "DeepSeek-V3-Base",
    v3_shape(),
    released="2024-12-26",
    context=128 * K,
    source="DeepSeek-V3, arXiv 2412.19437",
)
V31_BASE = V3_BASE.sibling(
    "DeepSeek-V3.1-Base",
    config=v3_shape(ue8m0=True),
    released="2025-08-21",
    licence="MIT",
    source="DeepSeek-V3.1 model card",
)
R1 = V3_BASE.sibling(
    "DeepSeek-R1",
    released="2025-01-20",
    licence="MIT",
    encoding="r1",
    source="DeepSeek-R1, arXiv 2501.12948",
)

CARDS = (
    V3_BASE,
    V3_BASE.sibling("DeepSeek-V3", encoding="roles"),
    V3_BASE.sibling("DeepSeek-V3-0324", released="2025-03-24", licence="MIT", encoding="roles"),
    R1.sibling("DeepSeek-R1-Zero", encoding="r1-zero"),
    R1,
    R1.sibling("DeepSeek-R1-0528", released="2025-05-28", encoding="r1-0528"),
    V3_BASE.sibling(
        "DeepSeek-Prover-V2-671B",
        released="2025-04-30",
        encoding="roles",
        source="DeepSeek-Prover-V2, arXiv 2504.21801",
    ),
    V31_BASE,
    V31_BASE.sibling("DeepSeek-V3.1", encoding="v31"),
    V31_BASE.sibling("DeepSeek-V3.1-Terminus", released="2025-09-22", encoding="v31"),
)
