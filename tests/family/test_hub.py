"""config.json in both directions and both field styles, held to transformers' own config classes."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from rorqual.family import (
    GQA,
    MLA,
    Card,
    CompressedAttention,
    ConfigError,
    Layer,
    ModelConfig,
    MoE,
    SwiGLU,
    Yarn,
    config,
    from_hub,
    models,
    to_hub,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from transformers import (
        AutoConfig,
        DeepseekV2Config,
        DeepseekV3Config,
        DeepseekV4Config,
        DeepseekV32Config,
        LlamaConfig,
        PretrainedConfig,
        Qwen2Config,
        Qwen3Config,
    )

Release = tuple[str, dict[str, Any]]


def quiet(mapping: dict[str, Any]) -> ModelConfig:
    """Read with warnings as errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return from_hub(mapping)


def bare(model: ModelConfig) -> ModelConfig:
    return model.replace(name="")


def through(config: PretrainedConfig, folder: Path) -> dict[str, Any]:
    """What transformers saves."""
    config.save_pretrained(folder)
    return json.loads((folder / "config.json").read_text())  # type: ignore[no-any-return]


# -------------------------------------------------------------------------------- released field style


def test_a_released_file_reads_as_its_card(release: Release) -> None:
    name, mapping = release
    assert bare(quiet(mapping)) == bare(config(name))


def test_a_released_file_is_written_back_whole(release: Release) -> None:
    _, mapping = release
    assert {name: value for name, value in to_hub(quiet(mapping)).items() if name in mapping} == mapping


def test_reading_does_not_share_state_with_the_mapping(release: Release) -> None:
    _, mapping = release
    model = quiet(mapping)
    mapping["architectures"].append("changed")
    for value in mapping.values():
        if isinstance(value, dict):
            value.clear()
    assert "changed" not in to_hub(model)["architectures"]
    written = to_hub(model)
    written["architectures"].append("changed")
    assert "changed" not in to_hub(model)["architectures"]


def test_json_can_hold_what_is_written(release: Release) -> None:
    _, mapping = release
    written = to_hub(quiet(mapping))
    assert json.loads(json.dumps(written)) == written
    assert list(written) == sorted(written)


def test_bookkeeping_is_kept_apart(files: dict[str, Any]) -> None:
    model = quiet(files["deepseek-v2.5"])
    assert model.extra["seq_aux"] is True and model.extra["aux_loss_alpha"] == 0.001
    assert "hidden_size" not in model.extra and "rope_scaling" not in model.extra


def test_a_changed_config_drops_the_spelling_of_its_file(files: dict[str, Any]) -> None:
    model = quiet(files["deepseek-r1-0528-qwen3-8b"])
    assert to_hub(model)["rope_scaling"]["attn_factor"] == 0.8782488562869419
    first = model.layers[0]
    assert isinstance(first.attention, GQA) and isinstance(first.attention.rope.scaling, Yarn)
    assert first.attention.rope.scaling.rotation_amplitude() == 1.0
    short = to_hub(model.replace(layers=model.layers[:2]))
    assert short["num_hidden_layers"] == 2 and short["architectures"] == ["Qwen3ForCausalLM"]
    assert from_hub(short) == model.replace(layers=model.layers[:2])


def test_dropping_the_quantization_drops_its_fields(files: dict[str, Any]) -> None:
    for name in ("deepseek-v3", "deepseek-v4-flash"):
        written = to_hub(quiet(files[name]).replace(quantization=None))
        assert "quantization_config" not in written and "expert_dtype" not in written


@pytest.mark.parametrize("card", models(), ids=lambda card: card.name)
def test_every_card_round_trips(card: Card) -> None:
    assert quiet(to_hub(card.config)) == card.config


# ------------------------------------------------------------------------------------- transformers


@pytest.mark.parametrize(
    "card", [c for c in models() if c.config.model_type != "deepseek"], ids=lambda card: card.name
)
def test_transformers_reads_what_is_written(card: Card, tmp_path: Path) -> None:
    """AutoConfig loads the file with equal values, and its own writing of it reads as the same config."""
    written = to_hub(card.config)
    (tmp_path / "config.json").write_text(json.dumps(written))
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert theirs.model_type == card.config.model_type
    renamed = {
        "rope_theta",
        "rope_scaling",
        "torch_dtype",
        "_name_or_path",
        "compress_ratios",
        "num_hash_layers",
    }
    moved = {"topk_method", "quantization_config"}  # kept, but V4's gains expert_dtype
    for name in set(written) - renamed - moved:
        assert getattr(theirs, name) == written[name], name
    assert str(theirs.dtype).removeprefix("torch.") == card.config.dtype
    if card.config.model_type != "deepseek_v4":
        assert theirs.rope_parameters["rope_theta"] == written["rope_theta"]
        for name, value in (written["rope_scaling"] or {}).items():
            assert theirs.rope_parameters[name] == value
    again = through(theirs, tmp_path / "again")
    assert bare(quiet(again)) == bare(card.config)


TINY_MLA: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "max_position_embeddings": 512,
}
ROPE = {
    "rope_type": "yarn",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 64,
    "mscale": 0.7,
    "mscale_all_dim": 0.7,
}


def test_transformers_v2(tmp_path: Path) -> None:
    theirs = DeepseekV2Config(
        **TINY_MLA | {"n_group": None, "topk_group": None, "q_lora_rank": None}, first_k_dense_replace=2
    )
    model = quiet(through(theirs, tmp_path))
    assert [isinstance(layer.ff, SwiGLU) for layer in model.layers] == [True, True, False]
    attention, ff = model.layers[2].attention, model.layers[2].ff
    assert isinstance(attention, MLA) and isinstance(ff, MoE)
    assert (attention.q_rank, attention.kv_rank, attention.qk_dim, attention.v_dim) == (None, 16, 20, 10)
    assert attention.rope.interleaved and attention.rope.theta == 10000.0 and attention.rope.scaling is None
    assert (ff.router.score, ff.router.bias, ff.router.groups, ff.router.scale) == ("softmax", False, 1, 1.0)
    assert (ff.shared, model.eos, model.bos, model.vocab) == (2, (2,), 1, 99)


def test_transformers_v2_groups(tmp_path: Path) -> None:
    theirs = DeepseekV2Config(
        **TINY_MLA, topk_method="group_limited_greedy", routed_scaling_factor=16.0, rope_parameters=dict(ROPE)
    )
    model = quiet(through(theirs, tmp_path))
    ff = model.layers[0].ff
    assert isinstance(ff, MoE)
    assert (ff.router.groups, ff.router.keep, ff.router.group_score, ff.router.scale) == (4, 2, "max", 16.0)
    yarn = model.layers[0].attention.rope.scaling
    assert yarn == Yarn(8.0, 64, mscale=0.7, mscale_all_dim=0.7)


@pytest.mark.parametrize("interleaved", [True, False])
def test_transformers_v3(interleaved: bool, tmp_path: Path) -> None:
    theirs = DeepseekV3Config(
        **TINY_MLA,
        first_k_dense_replace=1,
        rope_interleave=interleaved,
        rope_parameters=dict(ROPE),
        num_mtp_layers=2,
    )
    model = quiet(through(theirs, tmp_path))
    assert len(model.mtp) == 2 and model.mtp[0] == model.layers[-1]
    attention, ff = model.layers[-1].attention, model.layers[-1].ff
    assert isinstance(attention, MLA) and isinstance(ff, MoE)
    assert attention.rope.interleaved is interleaved
    assert (ff.router.score, ff.router.bias, ff.router.normalize, ff.router.scale) == (
        "sigmoid",
        True,
        True,
        2.5,
    )
    assert (ff.router.groups, ff.router.keep, ff.router.group_score) == (4, 2, "top2")
    written = to_hub(model)
    assert ("rope_interleave" in written) is not interleaved
    assert quiet(written) == model


def test_transformers_v3_with_fewer_layers_than_dense_ones(tmp_path: Path) -> None:
    theirs = DeepseekV3Config(**TINY_MLA | {"num_hidden_layers": 2})
    model = quiet(through(theirs, tmp_path))
    assert all(isinstance(layer.ff, SwiGLU) for layer in (*model.layers, *model.mtp))


def test_transformers_v32(tmp_path: Path) -> None:
    kinds = ["sparse", "dense", "sparse"]
    theirs = DeepseekV32Config(
        **TINY_MLA,
        mlp_layer_types=kinds,
        index_n_heads=4,
        index_head_dim=16,
        index_topk=5,
        rope_parameters=dict(ROPE),
    )
    model = quiet(through(theirs, tmp_path))
    assert [isinstance(layer.ff, MoE) for layer in model.layers] == [True, False, True]
    attention = model.layers[1].attention
    assert isinstance(attention, MLA) and attention.index is not None
    assert (attention.index.heads, attention.index.dim, attention.index.top_k) == (4, 16, 5)
    written = to_hub(model)
    assert written["mlp_layer_types"] == kinds
    assert AutoConfig.for_model(**written).mlp_layer_types == kinds


TINY_V4: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 64,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "head_dim": 32,
    "q_lora_rank": 24,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "sliding_window": 6,
    "o_groups": 2,
    "o_lora_rank": 8,
    "index_n_heads": 4,
    "index_head_dim": 16,
    "index_topk": 5,
    "max_position_embeddings": 512,
}


def kinds_of(model: ModelConfig) -> list[str]:
    return [a.kind for a in (layer.attention for layer in model.layers) if isinstance(a, CompressedAttention)]


def test_transformers_v4_odd_ratios(tmp_path: Path) -> None:
    """Ratios other than 4 and 128 need transformers' names, which are written then too."""
    names = ["heavily_compressed_attention", "sliding_attention", "compressed_sparse_attention"]
    theirs = DeepseekV4Config(
        **TINY_V4,
        layer_types=[*names, names[0], names[2]],
        compress_rates={"compressed_sparse_attention": 2, "heavily_compressed_attention": 16},
        mlp_layer_types=["moe", "hash_moe", "moe", "moe", "moe"],
        partial_rotary_factor=0.25,
        rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        swiglu_limit=1.5,
    )
    model = quiet(through(theirs, tmp_path))
    assert kinds_of(model) == ["HCA", "SWA", "CSA", "HCA", "CSA"]
    first, second = model.layers[0].attention, model.layers[1].attention
    assert isinstance(first, CompressedAttention) and isinstance(second, CompressedAttention)
    assert first.compress is not None and first.compress.ratio == 16
    assert (first.rope.dim, first.rope.theta, second.rope.theta) == (8, 160000.0, 10000.0)
    assert isinstance(first.rope.scaling, Yarn) and first.rope.scaling.rotation_amplitude() == 1.0
    routers = [layer.ff.router.hashed for layer in model.layers if isinstance(layer.ff, MoE)]
    assert routers == [False, True, False, False, False]
    written = to_hub(model)
    assert written["compress_ratios"] == [16, 0, 2, 16, 2, 0]
    again = AutoConfig.for_model(**copy.deepcopy(written))
    assert again.layer_types == theirs.layer_types
    assert again.compress_rates == theirs.compress_rates
    assert again.mlp_layer_types == theirs.mlp_layer_types
    assert again.rope_parameters["compress"]["factor"] == 4.0
    assert quiet(written) == model


def test_transformers_v4_defaults(tmp_path: Path) -> None:
    model = quiet(through(DeepseekV4Config(), tmp_path))
    assert kinds_of(model) == ["HCA", "HCA", *["HCA", "CSA"] * 20, "HCA"]
    assert model.residual is not None and model.residual.streams == 4
    assert model.quantization is None


@pytest.mark.parametrize("inside", [True, False])
def test_v4_expert_format_at_the_top_or_inside(inside: bool, files: dict[str, Any]) -> None:
    mapping = files["deepseek-v4-flash"]
    if inside:
        mapping["quantization_config"]["expert_dtype"] = mapping.pop("expert_dtype")
    model = quiet(mapping)
    assert model.quantization is not None and model.quantization.experts == "fp4"
    written = to_hub(model)
    assert all(written[name] == value for name, value in mapping.items())


def test_transformers_llama(tmp_path: Path) -> None:
    theirs = LlamaConfig(
        hidden_size=48,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=10,
        num_hidden_layers=2,
        intermediate_size=80,
        vocab_size=77,
        attention_bias=True,
        eos_token_id=[5, 6],
        pad_token_id=3,
        tie_word_embeddings=True,
    )
    model = quiet(through(theirs, tmp_path))
    attention = model.layers[0].attention
    assert isinstance(attention, GQA)
    assert (attention.heads, attention.kv_heads, attention.head_dim) == (6, 2, 10)
    assert attention.qkv_bias and attention.out_bias and not attention.qk_norm
    assert not attention.rope.interleaved
    assert (model.eos, model.bos, model.pad, model.tied) == ((5, 6), 1, 3, True)
    assert (model.norm_eps, attention.rope.theta, model.max_positions) == (1e-6, 10000.0, 2048)
    assert quiet(to_hub(model)) == model


def test_defaults_of_a_sparse_llama_file_are_transformers() -> None:
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1}
    mapping = {"model_type": "llama", "intermediate_size": 80, "vocab_size": 50, **sizes}
    model, theirs = quiet(mapping), LlamaConfig(**mapping)
    attention = model.layers[0].attention
    assert isinstance(attention, GQA)
    assert (attention.kv_heads, attention.head_dim) == (theirs.num_key_value_heads, theirs.head_dim)
    assert attention.rope.theta == theirs.rope_parameters["rope_theta"]
    assert model.norm_eps == theirs.rms_norm_eps and model.tied == theirs.tie_word_embeddings
    assert model.max_positions == theirs.max_position_embeddings
    assert quiet(mapping | {"model_type": "qwen2"}).max_positions == Qwen2Config().max_position_embeddings
    qwen3 = quiet(mapping | {"model_type": "qwen3"}).layers[0].attention
    assert isinstance(qwen3, GQA) and qwen3.head_dim == Qwen3Config().head_dim


def test_transformers_qwen(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 50}
    rope = {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "attention_factor": 1.25,
    }
    two = quiet(through(Qwen2Config(**sizes, num_key_value_heads=2, intermediate_size=80), tmp_path / "2"))
    three = quiet(
        through(
            Qwen3Config(
                **sizes, num_key_value_heads=2, intermediate_size=80, head_dim=24, rope_parameters=rope
            ),
            tmp_path / "3",
        )
    )
    a, b = two.layers[0].attention, three.layers[0].attention
    assert isinstance(a, GQA) and isinstance(b, GQA)
    assert (a.qkv_bias, a.out_bias, a.qk_norm, a.head_dim) == (True, False, False, 16)
    assert (b.qkv_bias, b.out_bias, b.qk_norm, b.head_dim) == (False, False, True, 24)
    assert isinstance(b.rope.scaling, Yarn) and b.rope.scaling.rotation_amplitude() == 1.25
    assert quiet(to_hub(three)) == three
    assert AutoConfig.for_model(**to_hub(three)).rope_parameters["attention_factor"] == 1.25


# ------------------------------------------------------------------------------------- what can't be said


def test_what_config_json_cannot_say_is_refused() -> None:
    v3 = config("deepseek-v3")
    with pytest.raises(ConfigError, match="dense layers first"):
        to_hub(v3.replace(layers=v3.layers[::-1]))
    with pytest.raises(ConfigError, match="model_type 'mamba'"):
        to_hub(v3.replace(model_type="mamba"))
    with pytest.raises(ConfigError, match="MLA only"):
        to_hub(v3.replace(layers=config("deepseek-llm-7b").layers, mtp=()))
    llm = config("deepseek-llm-7b")
    narrow = Layer(llm.layers[0].attention, SwiGLU(8))
    with pytest.raises(ConfigError, match=r"can't express.*layers\[1\]"):
        to_hub(llm.replace(layers=(llm.layers[0], narrow)))
    with pytest.raises(ConfigError, match="mtp"):
        to_hub(v3.replace(mtp=(v3.layers[0],)))


def test_a_rotary_fraction_says_nothing_about_mla() -> None:
    """transformers 5.17 writes one beside qk_rope_head_dim, which is what counts."""
    written = to_hub(config("deepseek-v2-lite"))
    rope = {"rope_type": "default", "rope_theta": 10000, "partial_rotary_factor": 0.25}
    changed = {k: v for k, v in written.items() if k not in ("rope_scaling", "rope_theta")} | {
        "rope_parameters": rope
    }
    assert from_hub(changed).layers[0].attention.rope.dim == 64
