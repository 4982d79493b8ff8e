"""Which hub tensor is which of our parameters (docs/parameters.md), in both directions.

The names follow from the model's own parameters, and so from its layer plan: each is renamed piece by
piece, and a stack of experts becomes one hub tensor an expert. Two styles exist: "classic" (`model.layers`,
`self_attn`, `mlp`: llama, qwen and DeepSeek up to V3.2) and V4's (facts 3.4, 3.8, 3.9).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from rorqual.family import ModelConfig

CLASSIC = {
    "embed": "model.embed_tokens",
    "head": "lm_head",
    "norm": "model.norm",
    "attention_norm": "input_layernorm",
    "ff_norm": "post_attention_layernorm",
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.o": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "attention.q_a": "self_attn.q_a_proj",
    "attention.q_a_norm": "self_attn.q_a_layernorm",
    "attention.q_b": "self_attn.q_b_proj",
    "attention.kv_a": "self_attn.kv_a_proj_with_mqa",
    "attention.kv_a_norm": "self_attn.kv_a_layernorm",
    "attention.kv_b": "self_attn.kv_b_proj",
    "attention.index.q_b": "self_attn.indexer.wq_b",
    "attention.index.k": "self_attn.indexer.wk",
    "attention.index.k_norm": "self_attn.indexer.k_norm",
    "attention.index.w": "self_attn.indexer.weights_proj",
    "ff.gate": "mlp.gate_proj",
    "ff.up": "mlp.up_proj",
    "ff.down": "mlp.down_proj",
    "ff.router": "mlp.gate",
    "ff.router.bias": "mlp.gate.e_score_correction_bias",
    "ff.experts.gate": "mlp.experts.{}.gate_proj",
    "ff.experts.up": "mlp.experts.{}.up_proj",
    "ff.experts.down": "mlp.experts.{}.down_proj",
    "ff.shared.gate": "mlp.shared_experts.gate_proj",
    "ff.shared.up": "mlp.shared_experts.up_proj",
    "ff.shared.down": "mlp.shared_experts.down_proj",
    "mtp.embed_norm": "enorm",
    "mtp.hidden_norm": "hnorm",
    "mtp.project": "eh_proj",
    "mtp.norm": "shared_head.norm",
}
V4 = {
    "embed": "embed",
    "head": "head",
    "norm": "norm",
    "mix_head.fn": "hc_head_fn",
    "mix_head.base": "hc_head_base",
    "mix_head.scale": "hc_head_scale",
    "attention_norm": "attn_norm",
    "ff_norm": "ffn_norm",
    "attention_mix.fn": "hc_attn_fn",
    "attention_mix.base": "hc_attn_base",
    "attention_mix.scale": "hc_attn_scale",
    "ff_mix.fn": "hc_ffn_fn",
    "ff_mix.base": "hc_ffn_base",
    "ff_mix.scale": "hc_ffn_scale",
    "attention.q_a": "attn.wq_a",
    "attention.q_a_norm": "attn.q_norm",
    "attention.q_b": "attn.wq_b",
    "attention.kv": "attn.wkv",
    "attention.kv_norm": "attn.kv_norm",
    "attention.o_a": "attn.wo_a",
    "attention.o_b": "attn.wo_b",
    "attention.sink": "attn.attn_sink",
    "attention.compressor.kv": "attn.compressor.wkv",
    "attention.compressor.gate": "attn.compressor.wgate",
    "attention.compressor.norm": "attn.compressor.norm",
    "attention.compressor.ape": "attn.compressor.ape",
    "attention.index.q_b": "attn.indexer.wq_b",
    "attention.index.w": "attn.indexer.weights_proj",
    "attention.index.compressor.kv": "attn.indexer.compressor.wkv",
    "attention.index.compressor.gate": "attn.indexer.compressor.wgate",
    "attention.index.compressor.norm": "attn.indexer.compressor.norm",
    "attention.index.compressor.ape": "attn.indexer.compressor.ape",
    "ff.router": "ffn.gate",
    "ff.router.table": "ffn.gate.tid2eid",
    "ff.experts.gate": "ffn.experts.{}.w1",
    "ff.experts.up": "ffn.experts.{}.w3",
    "ff.experts.down": "ffn.experts.{}.w2",
    "ff.shared.gate": "ffn.shared_experts.w1",
    "ff.shared.up": "ffn.shared_experts.w3",
    "ff.shared.down": "ffn.shared_experts.w2",
    "mtp.embed_norm": "enorm",
    "mtp.hidden_norm": "hnorm",
    "mtp.embed_project": "e_proj",
    "mtp.hidden_project": "h_proj",
    "mtp.norm": "norm",
    "mtp.mix_head.fn": "hc_head_fn",
    "mtp.mix_head.base": "hc_head_base",
    "mtp.mix_head.scale": "hc_head_scale",
}
V4_ALIASES = (
    (r"^model\.", ""),
    (r"^embed_tokens\.", "embed."),
    (r"^lm_head\.", "head."),
    (r"^hc_head\.hc_", "hc_head_"),
    (r"\.attn\.norm\.", ".attn.kv_norm."),
    (r"\.weight_scale_inv$", ".scale"),
)
"""What transformers writes for V4 instead of the published names."""
IGNORED = re.compile(r"(^|\.)rotary_emb\.inv_freq$")
"""Buffers that old llama files carry; they follow from the config."""


@dataclass(frozen=True)
class Place:
    """Where a hub tensor goes: our parameter, and which expert of a stack."""

    ours: str
    expert: int | None = None


def is_v4(config: ModelConfig) -> bool:
    """Whether the published names are V4's."""
    return config.model_type == "deepseek_v4"


def published(name: str, config: ModelConfig) -> str:
    """The published form of a tensor name that a checkpoint of this kind may also use."""
    if is_v4(config):
        for pattern, replacement in V4_ALIASES:
            name = re.sub(pattern, replacement, name)
    return name


def hub_name(ours: str, config: ModelConfig) -> str:
    """Published name of our parameter; a stack of experts has `{}` where the expert's number goes."""
    table = V4 if is_v4(config) else CLASSIC
    match = re.match(r"(layers|mtp)\.(\d+)\.(block\.)?", ours)
    if match is None:
        return _renamed(ours, table)
    owner, number, block = match[1], int(match[2]), match[3]
    rest = ours[match.end() :]
    if owner == "mtp" and block is None:
        rest = "mtp." + rest
    if is_v4(config):
        prefix = f"{owner}.{number}."
    else:
        prefix = f"model.layers.{number + (len(config.layers) if owner == 'mtp' else 0)}."
    return prefix + _renamed(rest, table)


def _renamed(piece: str, table: dict[str, str]) -> str:
    if piece in table:
        return table[piece]
    stem, _, leaf = piece.rpartition(".")
    return f"{table[stem]}.{leaf}"


def scale_name(weight: str, config: ModelConfig) -> str:
    """Hub name of the scales that belong to the hub's `weight`."""
    return weight.removesuffix("weight") + "scale" if is_v4(config) else weight + "_scale_inv"


def weight_name(scale: str, config: ModelConfig) -> str | None:
    """The weight that a tensor named as scales belongs to, or None if the name is not one of scales."""
    suffix, weight = (".scale", ".weight") if is_v4(config) else (".weight_scale_inv", ".weight")
    return scale.removesuffix(suffix) + weight if scale.endswith(suffix) else None


def places(ours: Iterable[tuple[str, int | None]], config: ModelConfig) -> Iterator[tuple[str, Place]]:
    """(hub name, place) of every tensor a checkpoint must hold, scales left out.

    `ours`: our parameters, each with its number of experts, or None if it is not a stack.
    """
    for name, experts in ours:
        pattern = hub_name(name, config)
        if experts is None:
            yield pattern, Place(name)
        else:
            yield from ((pattern.format(e), Place(name, e)) for e in range(experts))


def copies(config: ModelConfig) -> dict[str, str]:
    """Hub tensors that may repeat another one: {copy: original}. Each must equal its original.

    Released V3 files carry embedding and head again beside the MTP layer; a tied checkpoint may carry the
    head.
    """
    embed, head = hub_name("embed.weight", config), hub_name("head.weight", config)
    original_head = embed if config.tied else head
    out = {head: embed} if config.tied else {}
    for k in range(len(config.mtp)):
        if is_v4(config):
            out[f"mtp.{k}.emb.tok_emb.weight"], out[f"mtp.{k}.head.weight"] = embed, original_head
        else:
            layer = f"model.layers.{len(config.layers) + k}."
            out[layer + "embed_tokens.weight"], out[layer + "shared_head.head.weight"] = embed, original_head
    return out


def is_mtp(hub: str, config: ModelConfig) -> bool:
    """Whether a hub tensor belongs to a declared multi-token-prediction layer."""
    match = re.match(r"mtp\.\d+\." if is_v4(config) else r"model\.layers\.(\d+)\.", hub)
    return match is not None and (is_v4(config) or int(match[1]) >= len(config.layers))


def quantizable(ours: str) -> bool:
    """Whether a released quantised checkpoint keeps our parameter as codes (facts 3.5, 3.9).

    The matrices inside layers, except routers, compressors, the indexers' head weights and V3's MTP
    projection.
    """
    if not re.match(r"(layers|mtp)\.", ours) or not ours.endswith(".weight"):
        return False
    stem = ours.removesuffix(".weight")
    kept = stem.endswith(("norm", ".router", ".index.w", ".project")) or ".compressor." in ours
    return not kept


def routed_expert(ours: str) -> bool:
    """Whether our parameter is a stack of routed experts (FP4 in V4)."""
    return ".experts." in ours


def small(ours: str) -> bool:
    """Norms and router weights: read by the modules in any float type."""
    return ours.endswith((".router.weight", "norm.weight", "norm.bias"))
