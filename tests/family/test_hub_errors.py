"""Bad files: each gives a ConfigError that names the field and the file, and nothing else ever escapes."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rorqual.family import ConfigError, ModelConfig, config, from_hub, to_hub

LLAMA, QWEN, MOE, V2, V3, V32, V4 = (
    "deepseek-coder-1.3b-base",
    "deepseek-r1-distill-qwen-1.5b",
    "deepseek-moe-16b-base",
    "deepseek-v2.5",
    "deepseek-v3",
    "deepseek-v3.2",
    "deepseek-v4-flash",
)
GONE = object()

BAD: list[tuple[str, str, Any]] = [
    # wrong types
    (V3, "hidden_size", "7168"),
    (V3, "hidden_size", True),
    (V3, "hidden_size", 7168.5),
    (V3, "hidden_size", [7168]),
    (V3, "rms_norm_eps", "1e-6"),
    (V3, "rms_norm_eps", float("nan")),
    (V3, "norm_topk_prob", 1),
    (V3, "norm_topk_prob", "true"),
    (V3, "eos_token_id", "1"),
    (V3, "eos_token_id", [1, "2"]),
    (V3, "rope_scaling", "yarn"),
    (V3, "rope_scaling", [40]),
    (V3, "rope_theta", "10000"),
    (V3, "torch_dtype", 16),
    (V3, "scoring_func", 3),
    (V3, "model_type", 3),
    (V3, "quantization_config", "fp8"),
    (V4, "compress_ratios", "0,4,128"),
    (V4, "compress_ratios", [0.5] * 44),
    (V4, "layer_types", [1] * 43),
    (LLAMA, "tie_word_embeddings", "false"),
    (LLAMA, "_name_or_path", 7),
    # out of range
    (V3, "hidden_size", 0),
    (V3, "hidden_size", -1),
    (V3, "num_hidden_layers", 10**12),
    (V3, "num_nextn_predict_layers", -1),
    (V3, "num_nextn_predict_layers", 10**9),
    (V3, "rms_norm_eps", 0),
    (V3, "rope_theta", 0),
    (V3, "n_shared_experts", -1),
    (V3, "qk_rope_head_dim", 63),
    (LLAMA, "num_key_value_heads", 3),
    (LLAMA, "hidden_size", 2050),
    (LLAMA, "head_dim", 127),
    (V4, "swiglu_limit", -1.0),
    (V4, "qk_rope_head_dim", 1024),
    # missing
    (V3, "model_type", GONE),
    (V3, "hidden_size", GONE),
    (V3, "hidden_size", None),
    (V3, "vocab_size", GONE),
    (V3, "num_hidden_layers", GONE),
    (V3, "kv_lora_rank", GONE),
    (V3, "q_lora_rank", GONE),
    (V3, "n_routed_experts", GONE),
    (V3, "first_k_dense_replace", GONE),
    (V3, "moe_intermediate_size", GONE),
    (V3, "intermediate_size", GONE),
    (V3, "n_group", None),
    (V3, "routed_scaling_factor", GONE),
    (V3, "max_position_embeddings", GONE),
    (V32, "index_topk", GONE),
    (V4, "compress_ratios", GONE),
    (V4, "num_hash_layers", GONE),
    (V4, "qk_rope_head_dim", GONE),
    (V4, "compress_rope_theta", GONE),
    (V4, "hc_mult", GONE),
    (LLAMA, "intermediate_size", GONE),
    (LLAMA, "num_attention_heads", GONE),
    # unsupported
    (V3, "model_type", "mixtral"),
    (V3, "hidden_act", "gelu"),
    (LLAMA, "hidden_act", "relu"),
    (V4, "hidden_act", "gelu"),
    (V3, "attention_bias", True),
    (MOE, "attention_bias", True),
    (V4, "attention_bias", True),
    (LLAMA, "mlp_bias", True),
    (QWEN, "use_sliding_window", True),
    (QWEN, "layer_types", ["full_attention"] * 27 + ["sliding_attention"]),
    (QWEN, "use_mrope", True),
    (V3, "moe_layer_freq", 2),
    (V3, "topk_method", "greedy"),
    (V2, "topk_method", "random"),
    (V4, "topk_method", "greedy"),
    (V2, "scoring_func", "tanh"),
    (V3, "scoring_func", "tanh"),
    (V2, "rope_interleave", False),
    (V2, "num_nextn_predict_layers", 1),
    (V2, "use_mla", False),
    (V32, "indexer_rope_interleave", True),
    (V3, "torch_dtype", "int8"),
    (V4, "num_key_value_heads", 2),
    (V4, "expert_dtype", "int4"),
    (LLAMA, "partial_rotary_factor", 0.5),
    # contradictions
    (V3, "num_key_value_heads", 8),
    (V3, "num_experts_per_tok", 300),
    (V3, "num_experts_per_tok", 200),
    (V3, "n_group", 7),
    (V3, "topk_group", 9),
    (V3, "dtype", "float16"),
    (V3, "num_mtp_layers", 2),
    (V4, "compress_ratios", [0] * 42),
    (V4, "compress_ratios", [0] * 43 + [4]),
    (V4, "compress_ratios", [0] * 42 + [16]),
    (V4, "layer_types", ["sliding_attention"] * 43),
    (V4, "layer_types", ["sliding_attention"] * 42),
    (V4, "mlp_layer_types", ["moe"] * 43),
    (V4, "mlp_layer_types", ["dense"] * 43),
    (V4, "partial_rotary_factor", 0.5),
    (V4, "intermediate_size", 11008),
    (V4, "o_groups", 7),
    (V4, "rope_parameters", {"main": {"rope_theta": 5.0}}),
    (V32, "q_lora_rank", None),
    (V3, "rope_parameters", {"rope_type": "linear", "factor": 2.0}),
    (V3, "rope_parameters", {"rope_theta": 777.0}),
    (V3, "mlp_layer_types", ["dense"] * 4 + ["sparse"] * 57),
    (V2, "mlp_layer_types", ["sparse"] * 60),
    (MOE, "mlp_layer_types", ["dense"] * 28),
    (V3, "mlp_layer_types", ["dense"] * 3),
    (MOE, "n_group", 8),
    (MOE, "topk_group", 2),
    (QWEN, "layer_types", ["full_attention"] * 27),
    (V32, "layer_types", ["indexed_attention"] * 60),
    (V3, "qk_head_dim", 128),
    (V3, "head_dim", 128),
    (V2, "head_dim", 192),
    (LLAMA, "sliding_window", 4096),
    (LLAMA, "is_encoder_decoder", True),
    (V3, "eos_token_id", 129280),
    (V3, "eos_token_id", [1, 200000]),
    (V3, "bos_token_id", 129280),
    (LLAMA, "pad_token_id", 32256),
    (LLAMA, "initializer_range", 0),
    (V3, "rope_theta", 1),
]
BAD_INSIDE: list[tuple[str, str, str, Any]] = [
    (V3, "rope_scaling", "type", "dynamic"),
    (V3, "rope_scaling", "type", "longrope"),
    (V3, "rope_scaling", "type", "su"),
    (V3, "rope_scaling", "rope_type", "linear"),
    (V3, "rope_scaling", "factor", GONE),
    (V3, "rope_scaling", "factor", "40"),
    (V3, "rope_scaling", "factor", 0),
    (V3, "rope_scaling", "original_max_position_embeddings", GONE),
    (V3, "rope_scaling", "beta_fast", -1),
    (V3, "rope_scaling", "mscale", "1.0"),
    (V3, "rope_scaling", "truncate", False),
    (LLAMA, "rope_scaling", "factor", None),
    (V3, "quantization_config", "quant_method", "awq"),
    (V3, "quantization_config", "quant_method", GONE),
    (V3, "quantization_config", "fmt", "e5m2"),
    (V3, "quantization_config", "activation_scheme", "static"),
    (V3, "quantization_config", "weight_block_size", None),
    (V3, "quantization_config", "weight_block_size", [128]),
    (V3, "quantization_config", "weight_block_size", [0, 128]),
    (V3, "quantization_config", "weight_block_size", "128"),
    (V3, "quantization_config", "scale_fmt", "e4m3"),
]


def changed(mapping: dict[str, Any], name: str, value: Any) -> None:
    if value is GONE:
        mapping.pop(name, None)
    else:
        mapping[name] = value


@pytest.mark.parametrize(("model", "name", "value"), BAD)
def test_bad_field(model: str, name: str, value: Any, files: dict[str, Any]) -> None:
    mapping = files[model]
    changed(mapping, name, value)
    with pytest.raises(ConfigError) as caught:
        from_hub(mapping, source="some/config.json")
    assert str(caught.value).startswith("some/config.json: ")
    assert name in str(caught.value)


@pytest.mark.parametrize(("model", "outer", "name", "value"), BAD_INSIDE)
def test_bad_nested_field(model: str, outer: str, name: str, value: Any, files: dict[str, Any]) -> None:
    mapping = files[model]
    changed(mapping[outer], name, value)
    with pytest.raises(ConfigError) as caught:
        from_hub(mapping)
    assert str(caught.value).startswith("config.json: ")
    assert f"{name}" in str(caught.value)


def test_unsupported_values_say_what_is_supported(files: dict[str, Any]) -> None:
    mapping = files[V3] | {"hidden_act": "gelu"}
    with pytest.raises(ConfigError, match='hidden_act "gelu" is not supported: only "silu" is'):
        from_hub(mapping)
    mapping = files[V3] | {"model_type": "gpt2"}
    with pytest.raises(
        ConfigError, match=r'model_type "gpt2" is not supported: only llama, .*deepseek_v4 are'
    ):
        from_hub(mapping)
    mapping = files[V3]
    mapping["rope_scaling"]["type"] = "longrope"
    with pytest.raises(ConfigError, match=r'rope_scaling\.type "longrope".*"yarn"'):
        from_hub(mapping)


def test_field_names_are_strings(files: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"config.json: field names must be strings, got 3"):
        from_hub(files[V3] | {3: 4})


@pytest.mark.parametrize("mapping", [None, [], "text", 3])
def test_not_an_object(mapping: Any) -> None:
    with pytest.raises(ConfigError, match="JSON object"):
        from_hub(mapping)


def test_fp4_experts_need_a_quantization(files: dict[str, Any]) -> None:
    mapping = files[V4]
    del mapping["quantization_config"]
    with pytest.raises(ConfigError, match="expert_dtype"):
        from_hub(mapping)


# ----------------------------------------------------------------------------------------- warnings


def test_unknown_fields_are_named_in_one_warning(files: dict[str, Any]) -> None:
    mapping = files[V3] | {"router_flavour": 3, "dspark_block_size": 4}
    mapping["rope_scaling"]["wobble"] = 1
    with pytest.warns(UserWarning) as caught:
        model = from_hub(mapping, source="odd.json")
    assert len(caught) == 1
    assert str(caught[0].message) == (
        "odd.json: unknown fields are ignored: dspark_block_size, rope_scaling.wobble, router_flavour"
    )
    assert model.replace(name="") == config("deepseek-v3").replace(name="")
    written = to_hub(model)
    assert (written["router_flavour"], written["rope_scaling"]["wobble"]) == (3, 1)


def test_known_files_warn_of_nothing(release: tuple[str, dict[str, Any]]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        from_hub(release[1])


def test_classes_of_another_model_type_are_warned_of(files: dict[str, Any]) -> None:
    with pytest.warns(UserWarning, match="names DeepseekV2ForCausalLM, which is of model_type deepseek_v2"):
        from_hub(files[V3] | {"architectures": ["DeepseekV2ForCausalLM"]})


# --------------------------------------------------------------------------------- meant differently


def test_fields_that_repeat_others_are_accepted(files: dict[str, Any]) -> None:
    """Those that transformers writes, and a window that is switched off."""
    repeats = {
        V3: {"head_dim": 64, "qk_head_dim": 192, "mlp_layer_types": ["dense"] * 3 + ["sparse"] * 58},
        MOE: {"n_group": 1, "topk_group": None, "mlp_layer_types": ["dense"] + ["sparse"] * 27},
        LLAMA: {"sliding_window": 4096, "use_sliding_window": False, "is_encoder_decoder": False},
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, extra in repeats.items():
            model = from_hub(files[name] | extra)
            assert model == from_hub(files[name])
            assert {n: v for n, v in to_hub(model).items() if n in extra} == extra


def test_values_that_mean_the_same_are_accepted(files: dict[str, Any]) -> None:
    same = config("deepseek-v3").replace(name="")
    for change in (
        {"hidden_size": 7168.0},
        {"moe_layer_freq": None},
        {"eos_token_id": [1]},
        {"n_shared_experts": 1},
    ):
        mapping = files[V3] | change
        model = from_hub(mapping)
        assert model == same
        assert {name: value for name, value in to_hub(model).items() if name in mapping} == mapping
    assert from_hub(files[V3] | {"torch_dtype": "torch.bfloat16"}) == same


def test_a_window_above_all_layers_is_not_in_use(files: dict[str, Any]) -> None:
    mapping = files[QWEN] | {"use_sliding_window": True, "max_window_layers": 28}
    assert from_hub(mapping).layers == config(QWEN).layers


def test_no_experts_at_all(files: dict[str, Any]) -> None:
    mapping = files[V3] | {"n_routed_experts": None}
    model = from_hub(mapping)
    assert len({layer.ff for layer in model.layers}) == 1
    written = to_hub(model)
    assert {name: value for name, value in written.items() if name in mapping} == mapping


def test_a_greedy_router_ignores_its_groups(files: dict[str, Any]) -> None:
    mapping = files[V2] | {"topk_method": "greedy"}
    model = from_hub(mapping)
    assert model.layers[-1].ff.router.groups == 1  # type: ignore[union-attr]
    assert to_hub(model)["n_group"] == 8


# --------------------------------------------------------------------------------------------- fuzz

VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 300),
    st.just(10**30),
    st.floats(),
    st.sampled_from(["", "yarn", "linear", "fp8", "softmax", "greedy", "bfloat16"]),
    st.lists(st.one_of(st.integers(-1, 5), st.text(max_size=2), st.none()), max_size=3),
    st.dictionaries(
        st.sampled_from(["type", "rope_type", "factor", "quant_method"]), st.integers(0, 3), max_size=2
    ),
)


@settings(max_examples=400)
@given(data=st.data())
def test_nothing_but_config_errors_escapes(data: st.DataObject) -> None:
    names = [LLAMA, QWEN, MOE, V2, V3, V32, V4]
    mapping = copy.deepcopy(to_hub(config(data.draw(st.sampled_from(names)))))
    for _ in range(data.draw(st.integers(1, 3))):
        target = mapping
        name = data.draw(st.sampled_from(sorted(target)))
        if isinstance(target[name], dict) and target[name] and data.draw(st.booleans()):
            target = target[name]
            name = data.draw(st.sampled_from(sorted(target)))
        if data.draw(st.booleans()):
            target.pop(name)
        else:
            target[name] = data.draw(VALUES)
        if not mapping:
            break
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = from_hub(mapping)
        except ConfigError as error:
            assert str(error).startswith("config.json: ")
            return
        assert isinstance(model, ModelConfig)
        assert from_hub(to_hub(model)) == model
