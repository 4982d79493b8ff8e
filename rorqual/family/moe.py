"""DeepSeekMoE-16B: fine-grained and shared experts on ordinary multi-head attention (arXiv 2401.06066)."""

from __future__ import annotations

from rorqual.family.cards import K, page
from rorqual.family.parts import GQA, Layer, ModelConfig, MoE, Rope, SwiGLU

ATTENTION = GQA(heads=16, kv_heads=16, head_dim=128, rope=Rope(dim=128))
SIXTEEN = ModelConfig(
    model_type="deepseek",
    vocab=102400,
    hidden=2048,
    layers=(
        Layer(ATTENTION, SwiGLU(10944)),
        *(Layer(ATTENTION, MoE(routed=64, top_k=6, width=1408, shared=2)),) * 27,
    ),
    max_positions=4096,
    bos=100000,
    eos=(100001,),
)

BASE = page(
    "deepseek-moe-16b-base",
    SIXTEEN,
    released="2024-01-11",
    context=4 * K,
    source="DeepSeekMoE, arXiv 2401.06066",
    aliases=("deepseek-moe-16b",),
    unverified=("released",),
)

CARDS = (BASE, BASE.sibling("deepseek-moe-16b-chat", encoding="user-assistant"))
