"""DeepSeek-Coder: four dense sizes with a 32,256-token vocabulary, and v1.5 on the LLM shape."""

from __future__ import annotations

from rorqual.family.cards import Card, K, page
from rorqual.family.parts import LinearScaling, ModelConfig
from rorqual.family.v1 import SEVEN, SHAPE, dense

INSTRUCT_EOS = 32021
"""`<|EOT|>`, which ends a reply of the instruct models."""


def shape(layers: int, hidden: int, heads: int, kv_heads: int, width: int) -> ModelConfig:
    """A Coder of the first series: rope base 100,000 stretched four times, 16,384 positions."""
    return dense(
        layers,
        hidden,
        heads,
        kv_heads,
        width,
        vocab=32256,
        theta=100000.0,
        scaling=LinearScaling(4.0),
        positions=16 * K,
        ids=(32013, 32014),
    )


def size(label: str, config: ModelConfig, unverified: tuple[str, ...]) -> Card:
    """The base checkpoint of one size."""
    return page(
        f"deepseek-coder-{label}-base",
        config,
        released="2023-11-02",
        context=16 * K,
        source="DeepSeek-Coder, arXiv 2401.14196",
        aliases=(f"deepseek-coder-{label}",),
        unverified=unverified,
    )


def instruct(base: Card) -> Card:
    """The instruct checkpoint beside a base one: the same shape, another end of reply."""
    repo = base.hub_id.split("/")[1].replace("-base", "-instruct")
    return base.sibling(repo, eos=INSTRUCT_EOS, encoding="coder")


RECALLED = ("rope_theta", "rope_scaling", "tie_word_embeddings", "rms_norm_eps")
SMALL = size("1.3b", shape(24, 2048, 16, 16, 5504), ())
MQA = size("5.7bmqa", shape(32, 4096, 32, 1, 11008), RECALLED)
MEDIUM = size("6.7b", shape(32, 4096, 32, 32, 11008), RECALLED)
LARGE = size("33b", shape(62, 7168, 56, 8, 19200), RECALLED)
V15 = page(
    "deepseek-coder-7b-base-v1.5",
    SEVEN,
    released="2024-01",
    context=4 * K,
    source="DeepSeek-Coder, arXiv 2401.14196",
    aliases=("deepseek-coder-7b-v1.5",),
    unverified=SHAPE,
)

CARDS = (
    SMALL,
    instruct(SMALL),
    MQA,
    MEDIUM,
    instruct(MEDIUM),
    LARGE,
    instruct(LARGE),
    V15,
    V15.sibling("deepseek-coder-7b-instruct-v1.5", eos=100015, encoding="coder"),
)
