"""The hub's config.json in both directions: `from_hub` and `to_hub`.

Two field styles are read: what the released repositories hold (rope_theta with rope_scaling,
first_k_dense_replace, compress_ratios, num_hash_layers, torch_dtype, ...) and what transformers 5 writes
(rope_parameters, mlp_layer_types, layer_types, compress_rates, dtype, ...). The first is written.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any

from rorqual.family import hub_dense, hub_mla, hub_v4
from rorqual.family.fields import Fields
from rorqual.family.hub_rope import read_quantization, write_quantization
from rorqual.family.parts import ConfigError, Layer, ModelConfig

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "deepseek": "DeepseekForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "deepseek_v32": "DeepseekV32ForCausalLM",
    "deepseek_v4": "DeepseekV4ForCausalLM",
}
"""The model types that are read and written, and the class name each file carries."""

POSITIONS = {"llama": 2048, "qwen2": 32768, "qwen3": 32768}
"""`max_position_embeddings` that transformers assumes when a file has none; DeepSeek's must have it."""

# fmt: off
BOOKKEEPING = frozenset({
    "architectures", "auto_map", "transformers_version", "use_cache", "pretraining_tp", "attention_dropout",
    "seq_aux", "aux_loss_alpha", "ep_size", "output_router_logits", "router_aux_loss_coef",
    "router_jitter_noise", "output_hidden_states", "output_attentions", "return_dict",
    "chunk_size_feed_forward", "is_decoder", "id2label", "label2id", "problem_type",
    "tokenizer_class", "task_specific_params", "torchscript", "use_bfloat16", "tf_legacy_loss",
    "pruned_heads", "tie_encoder_decoder", "cross_attention_hidden_size", "add_cross_attention",
    "finetuning_task", "prefix", "decoder_start_token_id", "sep_token_id", "unsloth_version",
    "unsloth_fixed",
})
# fmt: on
"""Fields that say nothing about the function, or repeat what others say."""

SECOND_STYLE = frozenset(
    {"rope_parameters", "compress_rates", "partial_rotary_factor", "dtype", "num_mtp_layers"}
)
"""Fields of transformers' style: read, but written in the released style."""


def from_hub(mapping: Mapping[str, Any], *, source: str = "config.json") -> ModelConfig:
    """The config a hub config.json describes.

    Bookkeeping fields are kept in `extra`. Fields that are not known are kept there too and named in one
    `UserWarning`: they have no effect.

    Args:
        mapping: the parsed file, in the released or in transformers' field style.
        source: the file's name, for messages.

    Raises:
        ConfigError: a field is missing, of the wrong type, unsupported, or contradicts another; the message
            names the field, its value and the file.
    """
    try:
        config, unknown = _read(mapping, source)
    except RecursionError:
        raise ConfigError(f"{source}: is nested too deeply to be a config") from None
    _warn_of_architectures(mapping, config.model_type, source)
    if unknown:
        warnings.warn(f"{source}: unknown fields are ignored: {', '.join(unknown)}", stacklevel=2)
    return config


def _warn_of_architectures(mapping: Mapping[str, Any], model_type: str, source: str) -> None:
    """Warn if the class names in the file belong to another model type that is known here."""
    named = mapping.get("architectures")
    for name in named if isinstance(named, (list, tuple)) else ():
        other = next((kind for kind, ours in ARCHITECTURES.items() if ours == name), model_type)
        if other != model_type:
            warnings.warn(
                f"{source}: architectures names {name}, which is of model_type {other}: read as {model_type}",
                stacklevel=3,
            )


def to_hub(config: ModelConfig) -> dict[str, Any]:
    """The config.json of a config, in the field style of the released repositories, sorted by name.

    A config that came from a file is written as the file had it, where that still means the same.

    Raises:
        ConfigError: config.json can't say what the config says.
    """
    canonical = _write(config)
    fields, again = _parse(canonical, "to_hub")
    if again != config:
        raise ConfigError(
            f"model_type {config.model_type} can't express this config: {_difference(config, again)}"
        )
    extra = copy.deepcopy(dict(config.extra))
    whole = canonical | extra
    if any(name in fields.asked for name in extra):
        try:
            same = _parse(whole, "to_hub")[1] == config
        except ConfigError:
            same = False
        if not same:
            whole = canonical | {name: value for name, value in extra.items() if name not in fields.asked}
    return dict(sorted(whole.items()))


def _read(mapping: Mapping[str, Any], source: str) -> tuple[ModelConfig, list[str]]:
    """The config with its `extra`, and the names of unknown fields."""
    fields, config = _parse(mapping, source)
    unread = fields.unread()
    unknown = [name for name in unread if name not in BOOKKEEPING] + fields.strangers
    keep = {name for name in unread if mapping[name] is not None or name != "architectures"}
    if not SECOND_STYLE & set(mapping):
        written = _write(config)
        absent = object()
        keep |= {name for name in fields.asked & set(mapping) if mapping[name] != written.get(name, absent)}
    extra = {name: copy.deepcopy(mapping[name]) for name in mapping if name in keep}
    return config.replace(extra=extra), sorted(unknown)


def _parse(mapping: Mapping[str, Any], source: str) -> tuple[Fields, ModelConfig]:
    """The fields as read, and the config without `extra`."""
    if not isinstance(mapping, Mapping):
        raise ConfigError(f"{source}: must hold a JSON object, got {type(mapping).__name__}")
    if strange := [name for name in mapping if not isinstance(name, str)]:
        raise ConfigError(f"{source}: field names must be strings, got {strange[0]!r}")
    fields = Fields(mapping, source)
    fields.only("is_encoder_decoder", False)
    model_type = fields.text("model_type")
    if model_type not in ARCHITECTURES:
        listed = ", ".join(ARCHITECTURES)
        raise fields.error("model_type", f'"{model_type}" is not supported: only {listed} are')
    try:
        config = _surround(fields, model_type)
    except ConfigError as error:
        if str(error).startswith(source):
            raise
        raise ConfigError(f"{source}: {error}") from None
    return fields, config


def _surround(fields: Fields, model_type: str) -> ModelConfig:
    """The whole config: layers by their generation's reader, then what surrounds them."""
    residual = None
    mtp: tuple[Layer, ...] = ()
    if model_type in POSITIONS:
        layers = hub_dense.read_layers(fields, model_type)
    elif model_type == "deepseek_v4":
        layers, mtp, residual = hub_v4.read_layers(fields, model_type)
    else:
        layers, mtp = hub_mla.read_layers(fields, model_type)
    return ModelConfig(
        model_type=model_type,
        vocab=fields.size("vocab_size"),
        hidden=fields.size("hidden_size"),
        layers=layers,
        max_positions=fields.size("max_position_embeddings", POSITIONS.get(model_type)),
        norm_eps=fields.number("rms_norm_eps", 1e-6, above=0),
        tied=fields.flag("tie_word_embeddings", False),
        residual=residual,
        mtp=mtp,
        quantization=read_quantization(fields),
        dtype=_dtype(fields),
        init_std=fields.number("initializer_range", 0.02, above=0),
        bos=fields.maybe_whole("bos_token_id"),
        eos=_eos(fields),
        pad=fields.maybe_whole("pad_token_id", least=-1),
        name=fields.text("_name_or_path", ""),
    )


def _dtype(fields: Fields) -> str:
    """`torch_dtype` of released files, `dtype` of transformers 5; bfloat16 where neither is given."""
    names = [name for name in ("torch_dtype", "dtype") if name in fields]
    values = {name: fields.text(name).removeprefix("torch.") for name in names}
    if len(set(values.values())) > 1:
        raise fields.error("torch_dtype", f'"{values["torch_dtype"]}" contradicts dtype "{values["dtype"]}"')
    for name, value in values.items():
        if value not in ("float64", "float32", "bfloat16", "float16"):
            raise fields.error(name, f'"{value}" is not supported: only float32, bfloat16 or float16 is')
        return value
    return "bfloat16"


def _eos(fields: Fields) -> tuple[int, ...]:
    """One id or several."""
    if isinstance(fields.raw("eos_token_id"), (list, tuple)):
        return tuple(fields.whole_list("eos_token_id") or ())
    one = fields.maybe_whole("eos_token_id")
    return () if one is None else (one,)


def _write(config: ModelConfig) -> dict[str, Any]:
    """The released-style file of a config, without its `extra`."""
    if config.model_type not in ARCHITECTURES:
        raise ConfigError(
            f"model_type {config.model_type!r} can't be written: only {', '.join(ARCHITECTURES)} can"
        )
    if config.model_type in POSITIONS:
        described = hub_dense.write(config)
    elif config.model_type == "deepseek_v4":
        described = hub_v4.write(config)
    else:
        described = hub_mla.write(config)
    out: dict[str, Any] = {
        "architectures": [ARCHITECTURES[config.model_type]],
        "model_type": config.model_type,
        "vocab_size": config.vocab,
        "hidden_size": config.hidden,
        "num_hidden_layers": len(config.layers),
        "hidden_act": "silu",
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tied,
        "torch_dtype": config.dtype,
        "bos_token_id": config.bos,
        "eos_token_id": list(config.eos) if len(config.eos) > 1 else config.eos[0] if config.eos else None,
        **described,
        **write_quantization(config.quantization, config.model_type),
    }
    if config.pad is not None:
        out["pad_token_id"] = config.pad
    if config.name:
        out["_name_or_path"] = config.name
    return out


def _difference(one: ModelConfig, other: ModelConfig) -> str:
    """Which fields of two configs differ, in words."""
    for part in dataclasses.fields(ModelConfig):
        mine, theirs = getattr(one, part.name), getattr(other, part.name)
        if part.name == "extra" or mine == theirs:
            continue
        if part.name in ("layers", "mtp") and len(mine) == len(theirs):
            where = next(i for i, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a != b)
            return f"{part.name}[{where}] is {mine[where]}, which would be read back as {theirs[where]}"
        return f"{part.name} is {mine!r}, which would be read back as {theirs!r}"
    return "nothing differs"
