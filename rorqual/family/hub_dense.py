"""config.json of llama, qwen2 and qwen3 (V1, Coder, Math, the distills) in both directions."""

from __future__ import annotations

from typing import Any

from rorqual.family.fields import Fields
from rorqual.family.hub_rope import read_rope, write_rope
from rorqual.family.parts import GQA, ConfigError, Layer, Llama3Scaling, ModelConfig, SwiGLU, Yarn, require

QWEN = ("qwen2", "qwen3")


def read_layers(fields: Fields, model_type: str) -> tuple[Layer, ...]:
    """The equal layers of a dense model."""
    fields.only("hidden_act", "silu")
    fields.only("mlp_bias", False)
    attention = read_attention(fields, model_type)
    if model_type in QWEN:
        _no_sliding_window(fields)
    elif "sliding_window" in fields and fields.flag("use_sliding_window", True):
        raise fields.error(
            "sliding_window", f"{fields.raw('sliding_window')!r} is not supported: only null is"
        )
    count = layer_count(fields)
    return (Layer(attention, SwiGLU(fields.size("intermediate_size"))),) * count


def layer_count(fields: Fields) -> int:
    """`num_hidden_layers`, within reason."""
    count = fields.size("num_hidden_layers")
    if count > 10_000:
        raise fields.error("num_hidden_layers", f"must be 10,000 or fewer, got {count}")
    return count


def read_attention(fields: Fields, model_type: str) -> GQA:
    """Multi-head or grouped-query attention; Qwen2 has biases, Qwen3 norms on queries and keys."""
    heads = fields.size("num_attention_heads")
    hidden = fields.size("hidden_size")
    head_dim = fields.maybe_whole("head_dim", least=1)
    if head_dim is None and model_type == "qwen3":
        head_dim = 128  # transformers' default for Qwen3
    if head_dim is None:
        if hidden % heads:
            raise fields.error("hidden_size", f"({hidden}) doesn't divide by num_attention_heads ({heads})")
        head_dim = hidden // heads
    if head_dim % 2:
        raise fields.error("head_dim", f"must be even for rotary positions, got {head_dim}")
    kv_heads = fields.size("num_key_value_heads", heads)
    if heads % kv_heads:
        raise fields.error(
            "num_key_value_heads", f"({kv_heads}) doesn't divide the {heads} of num_attention_heads"
        )
    bias = model_type == "qwen2"
    if model_type == "deepseek":
        fields.only("attention_bias", False)
    elif model_type != "qwen2":
        bias = fields.flag("attention_bias", False)
    rope = read_rope(fields, head_dim, interleaved=False)
    return GQA(
        heads,
        kv_heads,
        head_dim,
        rope,
        qkv_bias=bias,
        out_bias=bias and model_type != "qwen2",
        qk_norm=model_type == "qwen3",
    )


def _no_sliding_window(fields: Fields) -> None:
    """Refuse a file that limits some layers to a window."""
    fields.only("use_mrope", False)
    fields.entries("layer_types", layer_count(fields))
    kinds = fields.text_list("layer_types") or []
    if any(kind != "full_attention" for kind in kinds):
        other = next(kind for kind in kinds if kind != "full_attention")
        raise fields.error("layer_types", f'"{other}" is not supported: only "full_attention" is')
    window = fields.maybe_whole("sliding_window")
    full = fields.maybe_whole("max_window_layers")  # transformers takes 28 where the file is silent
    limited = (28 if full is None else full) < layer_count(fields)
    if fields.flag("use_sliding_window", False) and window is not None and limited and not kinds:
        raise fields.error("use_sliding_window", "true is not supported: only full attention is")


def write(config: ModelConfig) -> dict[str, Any]:
    """The fields that describe a dense model's layers."""
    first = config.layers[0]
    attention, ff = first.attention, first.ff
    require(
        isinstance(attention, GQA) and isinstance(ff, SwiGLU) and not config.mtp,
        f"model_type {config.model_type} is written for grouped-query attention with SwiGLU only",
    )
    assert isinstance(attention, GQA) and isinstance(ff, SwiGLU)
    out: dict[str, Any] = {"intermediate_size": ff.width, **write_attention(attention, config)}
    if config.model_type in QWEN:
        out |= {"use_sliding_window": False, "sliding_window": None, "max_window_layers": len(config.layers)}
        if config.model_type == "qwen3":
            out["attention_bias"] = attention.qkv_bias
    else:
        out |= {"attention_bias": attention.qkv_bias, "mlp_bias": False}
    return out


def write_attention(attention: GQA, config: ModelConfig) -> dict[str, Any]:
    """The fields that describe grouped-query attention."""
    kind = "rope_type" if isinstance(attention.rope.scaling, (Llama3Scaling, Yarn)) else "type"
    out = {
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.kv_heads,
        **write_rope(attention.rope, kind=kind),
    }
    if attention.rope.dim != attention.head_dim or attention.rope.interleaved:
        raise ConfigError(f"model_type {config.model_type} rotates whole heads in half-split layout only")
    if config.model_type == "qwen3" or attention.head_dim * attention.heads != config.hidden:
        out["head_dim"] = attention.head_dim
    return out
