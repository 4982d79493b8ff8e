"""R1 distilled into Qwen and Llama models, and R1-0528 into Qwen3-8B (arXiv 2501.12948, section 2.4)."""

from __future__ import annotations

from rorqual.family.cards import Card, K, page
from rorqual.family.parts import Llama3Scaling, ModelConfig, Yarn
from rorqual.family.v1 import dense


def qwen(
    layers: int, hidden: int, heads: int, kv_heads: int, width: int, vocab: int, theta: float
) -> ModelConfig:
    """A Qwen2.5 shape: biases on query, key and value. The two Math models keep base 10,000 and eps 1e-6."""
    return dense(
        layers,
        hidden,
        heads,
        kv_heads,
        width,
        vocab,
        theta=theta,
        positions=128 * K,
        ids=(151646, 151643),
        eps=1e-6 if theta == 10000.0 else 1e-5,
        model_type="qwen2",
        qkv_bias=True,
    )


def llama(layers: int, hidden: int, heads: int, width: int) -> ModelConfig:
    """A Llama 3.1 or 3.3 shape."""
    return dense(
        layers,
        hidden,
        heads,
        8,
        width,
        vocab=128256,
        theta=500000.0,
        scaling=Llama3Scaling(factor=8.0, original=8192, low=1.0, high=4.0),
        positions=128 * K,
        ids=(128000, 128001),
        eps=1e-5,
    )


QWEN3_8B = dense(
    36,
    4096,
    32,
    8,
    12288,
    vocab=151936,
    theta=1000000.0,
    scaling=Yarn(factor=4.0, original=32768, amplitude=1.0),
    positions=128 * K,
    ids=(151643, 151645),
    model_type="qwen3",
    qk_norm=True,
)
"""The released file sets YaRN's `attn_factor` to 0.87825 = 1 / (0.1 ln 4 + 1): cos and sin are not scaled."""


def distilled(label: str, config: ModelConfig, *unverified: str, licence: str) -> Card:
    """One of the six distills of January 2025."""
    return page(
        f"DeepSeek-R1-Distill-{label}",
        config,
        released="2025-01-20",
        context=128 * K,
        licence=licence,
        encoding="r1",
        source="DeepSeek-R1, arXiv 2501.12948",
        aliases=(f"r1-distill-{label.lower()}",),
        unverified=("tie_word_embeddings", "bos_token_id", "eos_token_id", *unverified),
    )


FROM_QWEN = "MIT, base Apache-2.0"
CARDS = (
    distilled(
        "Qwen-1.5B", qwen(28, 1536, 12, 2, 8960, 151936, 1e4), "max_position_embeddings", licence=FROM_QWEN
    ),
    distilled(
        "Qwen-7B", qwen(28, 3584, 28, 4, 18944, 152064, 1e4), "max_position_embeddings", licence=FROM_QWEN
    ),
    distilled("Qwen-14B", qwen(48, 5120, 40, 8, 13824, 152064, 1e6), licence=FROM_QWEN),
    distilled("Qwen-32B", qwen(64, 5120, 40, 8, 27648, 152064, 1e6), licence=FROM_QWEN),
    distilled("Llama-8B", llama(32, 4096, 32, 14336), licence="MIT + Llama 3.1"),
    distilled("Llama-70B", llama(80, 8192, 64, 28672), licence="MIT + Llama 3.3"),
    page(
        "DeepSeek-R1-0528-Qwen3-8B",
        QWEN3_8B,
        released="2025-05-28",
        context=128 * K,
        licence="MIT, base Apache-2.0",
        encoding="r1-0528",
        source="DeepSeek-R1-0528 model card",
        aliases=("r1-0528-qwen3-8b",),
        unverified=(
            "tie_word_embeddings",
            "bos_token_id",
            "eos_token_id",
            "max_position_embeddings",
            "rope_scaling",
        ),
    ),
)
