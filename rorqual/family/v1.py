"""The first generation: DeepSeek LLM, DeepSeekMath and DeepSeek-Prover, all shaped like LLaMA."""

from __future__ import annotations

from rorqual.family.cards import K, page
from rorqual.family.parts import GQA, Layer, LinearScaling, Llama3Scaling, ModelConfig, Rope, SwiGLU, Yarn


def dense(
    layers: int,
    hidden: int,
    heads: int,
    kv_heads: int,
    width: int,
    vocab: int = 102400,
    *,
    head_dim: int | None = None,
    theta: float = 10000.0,
    scaling: LinearScaling | Llama3Scaling | Yarn | None = None,
    positions: int = 4096,
    ids: tuple[int, int] = (100000, 100001),
    eps: float = 1e-6,
    model_type: str = "llama",
    qkv_bias: bool = False,
    qk_norm: bool = False,
) -> ModelConfig:
    """A decoder of `layers` equal layers: attention of `heads` over `kv_heads`, then SwiGLU of `width`.

    `ids` are the begin- and end-of-sequence ids; heads are `hidden // heads` wide unless `head_dim` is given.
    """
    head_dim = head_dim or hidden // heads
    rope = Rope(dim=head_dim, theta=theta, scaling=scaling)
    attention = GQA(heads, kv_heads, head_dim, rope, qkv_bias=qkv_bias, qk_norm=qk_norm)
    return ModelConfig(
        model_type=model_type,
        vocab=vocab,
        hidden=hidden,
        layers=(Layer(attention, SwiGLU(width)),) * layers,
        max_positions=positions,
        norm_eps=eps,
        bos=ids[0],
        eos=(ids[1],),
    )


SEVEN = dense(30, 4096, 32, 32, 11008)
"""The 7B shape that LLM, Coder-v1.5, Math and Prover share."""

# fmt: off
SHAPE = (
    "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size",
    "vocab_size", "rope_theta", "rope_scaling", "max_position_embeddings", "tie_word_embeddings", "rms_norm_eps",
)
# fmt: on
"""What is recalled of Coder-v1.5 and Math: all of the shape (facts 1.1)."""

LLM_7B = page(
    "deepseek-llm-7b-base",
    SEVEN,
    released="2023-11-29",
    context=4 * K,
    source="DeepSeek LLM, arXiv 2401.02954",
    aliases=("deepseek-llm-7b",),
    unverified=("rope_theta", "tie_word_embeddings", "rms_norm_eps"),
)
LLM_67B = LLM_7B.sibling(
    "deepseek-llm-67b-base",
    config=dense(95, 8192, 64, 8, 22016),
    aliases=("deepseek-llm-67b",),
)
MATH = LLM_7B.sibling(
    "deepseek-math-7b-base",
    released="2024-02-05",
    source="DeepSeekMath, arXiv 2402.03300",
    aliases=("deepseek-math-7b",),
    unverified=(*SHAPE, "bos_token_id", "eos_token_id"),
)
PROVER = MATH.sibling("DeepSeek-Prover-V1", released="2024-05", source="DeepSeek-Prover, arXiv 2405.14333")
PROVER_V15 = MATH.sibling(
    "DeepSeek-Prover-V1.5-Base",
    released="2024-08-16",
    source="DeepSeek-Prover-V1.5, arXiv 2408.08152",
    aliases=("deepseek-prover-v1.5",),
)

CARDS = (
    LLM_7B,
    LLM_7B.sibling("deepseek-llm-7b-chat", encoding="user-assistant"),
    LLM_67B,
    LLM_67B.sibling("deepseek-llm-67b-chat", encoding="user-assistant"),
    MATH,
    MATH.sibling("deepseek-math-7b-instruct", encoding="user-assistant"),
    MATH.sibling("deepseek-math-7b-rl", encoding="user-assistant"),
    PROVER,
    PROVER_V15,
    PROVER_V15.sibling("DeepSeek-Prover-V1.5-SFT"),
    PROVER_V15.sibling("DeepSeek-Prover-V1.5-RL"),
    PROVER_V15.sibling(
        "DeepSeek-Prover-V2-7B",
        config=SEVEN.replace(max_positions=32 * K),
        released="2025-04-30",
        context=32 * K,
        encoding="roles",
        source="DeepSeek-Prover-V2, arXiv 2504.21801",
        unverified=tuple(name for name in MATH.unverified if name != "max_position_embeddings"),
        note="how its context was extended from 4,096 to 32,768 positions is not known (rope_scaling)",
    ),
)
