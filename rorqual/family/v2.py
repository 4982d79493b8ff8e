"""The second generation: latent attention and 160 experts (arXiv 2405.04434); Lite, Coder-V2, V2.5."""

from __future__ import annotations

from rorqual.family.cards import K, page
from rorqual.family.parts import MLA, Layer, ModelConfig, MoE, Rope, Router, SwiGLU, Yarn


def stretch(mscale: float) -> Rope:
    """The rope of V2 and V3: 64 channels, YaRN from 4,096 to 163,840 positions (V2 report, section 3.1.4)."""
    yarn = Yarn(factor=40.0, original=4096, mscale=mscale, mscale_all_dim=mscale)
    return Rope(dim=64, scaling=yarn, interleaved=True)


def latent(heads: int, q_rank: int | None, mscale: float) -> MLA:
    """MLA with the widths every V2 and V3 model has: latent 512, heads of 128 + 64, values of 128."""
    return MLA(
        heads=heads, kv_rank=512, nope_dim=128, rope_dim=64, v_dim=128, rope=stretch(mscale), q_rank=q_rank
    )


def v2_shape(layers: int, hidden: int, attention: MLA, dense: int, experts: MoE) -> ModelConfig:
    """One layer with a SwiGLU of width `dense`, then `layers - 1` with `experts`."""
    return ModelConfig(
        model_type="deepseek_v2",
        vocab=102400,
        hidden=hidden,
        layers=(Layer(attention, SwiGLU(dense)), *(Layer(attention, experts),) * (layers - 1)),
        max_positions=160 * K,
        bos=100000,
        eos=(100001,),
    )


def big(mscale: float) -> ModelConfig:
    """The 236B shape: 160 experts in 8 groups, a token stays within 3 of them (section 2.2.2)."""
    router = Router(score="softmax", groups=8, keep=3, group_score="max", scale=16.0)
    experts = MoE(routed=160, top_k=6, width=1536, shared=2, router=router)
    return v2_shape(60, 5120, latent(128, 1536, mscale), 12288, experts)


LITE_SHAPE = v2_shape(27, 2048, latent(16, None, 0.707), 10944, MoE(routed=64, top_k=6, width=1408, shared=2))

V2 = page(
    "DeepSeek-V2",
    big(0.707),
    released="2024-05-06",
    context=128 * K,
    source="DeepSeek-V2, arXiv 2405.04434",
)
LITE = V2.sibling("DeepSeek-V2-Lite", config=LITE_SHAPE, released="2024-05-16", context=32 * K)
CODER = V2.sibling(
    "DeepSeek-Coder-V2-Base",
    config=big(1.0),
    released="2024-06-17",
    source="DeepSeek-Coder-V2, arXiv 2406.11931",
    aliases=("deepseek-coder-v2",),
    unverified=("released", "rope_scaling.mscale", "rope_scaling.mscale_all_dim"),
)
CODER_LITE = LITE.sibling(
    "DeepSeek-Coder-V2-Lite-Base",
    released="2024-06-17",
    context=128 * K,
    source="DeepSeek-Coder-V2, arXiv 2406.11931",
    aliases=("deepseek-coder-v2-lite",),
    unverified=("released",),
)
V25 = V2.sibling("DeepSeek-V2.5", config=big(1.0), released="2024-09-05", encoding="roles")

CARDS = (
    V2,
    V2.sibling("DeepSeek-V2-Chat", encoding="user-assistant"),
    V2.sibling(
        "DeepSeek-V2-Chat-0628",
        released="2024-06-28",
        encoding="user-assistant",
        aliases=("deepseek-v2-0628",),
        unverified=("released", "rope_scaling.mscale", "rope_scaling.mscale_all_dim"),
    ),
    LITE,
    LITE.sibling("DeepSeek-V2-Lite-Chat", encoding="user-assistant"),
    CODER,
    CODER.sibling("DeepSeek-Coder-V2-Instruct", encoding="user-assistant"),
    CODER.sibling(
        "DeepSeek-Coder-V2-Instruct-0724",
        released="2024-07-24",
        encoding="user-assistant",
        aliases=("deepseek-coder-v2-0724",),
    ),
    CODER_LITE,
    CODER_LITE.sibling("DeepSeek-Coder-V2-Lite-Instruct", encoding="user-assistant"),
    V25,
    V25.sibling("DeepSeek-V2.5-1210", released="2024-12-10"),
)
