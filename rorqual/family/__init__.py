"""The facts: config parts, the released models by name, and the hub's config.json in both directions."""

from rorqual.family.cards import Card
from rorqual.family.hub import from_hub, to_hub
from rorqual.family.parts import (
    GQA,
    MLA,
    Compress,
    CompressedAttention,
    ConfigError,
    HyperConnection,
    Index,
    Layer,
    LinearScaling,
    Llama3Scaling,
    ModelConfig,
    MoE,
    Quantization,
    Rope,
    Router,
    SwiGLU,
    Yarn,
)
from rorqual.family.registry import card, config, models

__all__ = [
    "GQA",
    "MLA",
    "Card",
    "Compress",
    "CompressedAttention",
    "ConfigError",
    "HyperConnection",
    "Index",
    "Layer",
    "LinearScaling",
    "Llama3Scaling",
    "MoE",
    "ModelConfig",
    "Quantization",
    "Rope",
    "Router",
    "SwiGLU",
    "Yarn",
    "card",
    "config",
    "from_hub",
    "models",
    "to_hub",
]
