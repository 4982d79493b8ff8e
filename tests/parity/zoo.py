"""Tiny random members of the family, built by transformers: the other side of every parity test.

Sizes are odd on purpose (no width equals another by chance), index heads are many (few would tie at a
score of zero), windows, ratios and top-k lie far below the lengths tested.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf

VOCAB = 250
IDS = dict(vocab_size=VOCAB, bos_token_id=1, eos_token_id=2, pad_token_id=None)
DENSE = dict(IDS, hidden_size=48, intermediate_size=112, num_hidden_layers=3, num_attention_heads=6)


def yarn(mscale: float | None = None, **more: Any) -> dict[str, Any]:
    scales = {} if mscale is None else dict(mscale=mscale, mscale_all_dim=mscale)
    return dict(
        rope_type="yarn",
        rope_theta=10000.0,
        factor=4.0,
        original_max_position_embeddings=32,
        **scales,
        **more,
    )


MLA = dict(
    IDS,
    hidden_size=56,
    intermediate_size=104,
    moe_intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=4,
    first_k_dense_replace=1,
    kv_lora_rank=36,
    qk_nope_head_dim=14,
    qk_rope_head_dim=8,
    v_head_dim=10,
    num_experts_per_tok=3,
    max_position_embeddings=160,
)
V2 = dict(MLA, n_shared_experts=2, norm_topk_prob=False, rope_parameters=yarn(0.707))
V3 = dict(MLA, n_routed_experts=12, n_shared_experts=1, norm_topk_prob=True, routed_scaling_factor=2.5)


def llama_linear() -> Any:
    rope = dict(rope_type="linear", rope_theta=100000.0, factor=4.0)
    return hf.LlamaForCausalLM(
        hf.LlamaConfig(**DENSE, num_key_value_heads=6, max_position_embeddings=128, rope_parameters=rope)
    )


def llama_gqa_llama3() -> Any:
    rope = dict(
        rope_type="llama3",
        rope_theta=500000.0,
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=32,
    )
    return hf.LlamaForCausalLM(
        hf.LlamaConfig(
            **DENSE,
            num_key_value_heads=2,
            max_position_embeddings=256,
            rms_norm_eps=1e-5,
            rope_parameters=rope,
        )
    )


def llama_mqa_tied() -> Any:
    rope = dict(rope_type="default", rope_theta=10000.0)
    return hf.LlamaForCausalLM(
        hf.LlamaConfig(
            **DENSE,
            num_key_value_heads=1,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            rope_parameters=rope,
        )
    )


def qwen2() -> Any:
    rope = dict(rope_type="default", rope_theta=10000.0)
    return hf.Qwen2ForCausalLM(
        hf.Qwen2Config(
            **DENSE,
            num_key_value_heads=2,
            max_position_embeddings=256,
            use_sliding_window=False,
            rope_parameters=rope,
        )
    )


def qwen3() -> Any:
    return hf.Qwen3ForCausalLM(
        hf.Qwen3Config(
            **DENSE, num_key_value_heads=3, head_dim=20, max_position_embeddings=128, rope_parameters=yarn()
        )
    )


def v2_lite() -> Any:
    greedy = dict(
        n_routed_experts=8, topk_method="greedy", n_group=1, topk_group=1, routed_scaling_factor=1.0
    )
    return hf.DeepseekV2ForCausalLM(hf.DeepseekV2Config(**V2, **greedy, q_lora_rank=None))


def v2() -> Any:
    limited = dict(n_routed_experts=12, topk_method="group_limited_greedy", n_group=4, topk_group=2)
    return hf.DeepseekV2ForCausalLM(
        hf.DeepseekV2Config(**V2, **limited, routed_scaling_factor=16.0, q_lora_rank=40)
    )


def v3() -> Any:
    return hf.DeepseekV3ForCausalLM(
        hf.DeepseekV3Config(
            **V3,
            q_lora_rank=40,
            n_group=4,
            topk_group=2,
            num_nextn_predict_layers=0,
            rope_parameters=yarn(1.0),
        )
    )


def v3_no_query_latent() -> Any:
    plain = dict(rope_type="default", rope_theta=50000.0)
    return hf.DeepseekV3ForCausalLM(
        hf.DeepseekV3Config(
            **V3, q_lora_rank=None, n_group=1, topk_group=1, num_nextn_predict_layers=0, rope_parameters=plain
        )
    )


def v32() -> Any:
    index = dict(index_topk=7, index_head_dim=16, index_n_heads=16)
    return hf.DeepseekV32ForCausalLM(
        hf.DeepseekV32Config(
            **V3, **index, q_lora_rank=40, n_group=4, topk_group=2, rope_parameters=yarn(1.0)
        )
    )


def v4() -> Any:
    sliding, sparse, heavy = (
        "sliding_attention",
        "compressed_sparse_attention",
        "heavily_compressed_attention",
    )
    layers = [sliding, sparse, heavy, sparse, heavy]
    config = hf.DeepseekV4Config(
        **IDS,
        hidden_size=56,
        moe_intermediate_size=24,
        num_hidden_layers=len(layers),
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=32,
        q_lora_rank=40,
        partial_rotary_factor=8 / 32,
        num_experts_per_tok=2,
        n_routed_experts=6,
        n_shared_experts=1,
        scoring_func="sqrtsoftplus",
        routed_scaling_factor=1.5,
        max_position_embeddings=256,
        rope_theta=10000.0,
        compress_rope_theta=160000.0,
        layer_types=layers,
        mlp_layer_types=["hash_moe"] * 2 + ["moe"] * 3,
        compress_rates={sparse: 4, heavy: 16},
        swiglu_limit=1.5,
        sliding_window=8,
        o_groups=2,
        o_lora_rank=20,
        index_n_heads=16,
        index_head_dim=16,
        index_topk=3,
        num_nextn_predict_layers=0,
        rope_parameters=dict(
            rope_type="yarn", factor=4.0, beta_fast=32, beta_slow=1, original_max_position_embeddings=64
        ),
    )
    return hf.DeepseekV4ForCausalLM(config)


MEMBERS: dict[str, Callable[[], Any]] = {
    f.__name__: f
    for f in (
        llama_linear,
        llama_gqa_llama3,
        llama_mqa_tied,
        qwen2,
        qwen3,
        v2_lite,
        v2,
        v3,
        v3_no_query_latent,
        v32,
        v4,
    )
}


@torch.no_grad()
def stir(model: torch.nn.Module) -> None:
    """Random values for everything, at sizes where each part matters; a tensor's values follow its name."""
    kept = model.state_dict(keep_vars=True)
    for name, tensor in kept.items():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        if name.endswith("tid2eid"):
            experts = model.config.n_routed_experts
            for row in tensor:
                row.copy_(torch.randperm(experts, generator=generator)[: row.numel()])
            continue
        if not tensor.is_floating_point():
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        if tensor.dim() >= 2:
            spread = 1.0 if "embed" in name else tensor.shape[-1] ** -0.5
            tensor.copy_(noise * spread)
        elif name.endswith("norm.weight") or "layernorm" in name or "scale" in name:
            tensor.copy_(1 + 0.2 * noise)
        else:
            tensor.copy_(0.3 * noise)
    model.tie_weights()


@torch.no_grad()
def stir_ours(model: torch.nn.Module, seed: int = 0) -> None:
    """The same for a model of ours."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not tensor.is_floating_point():
            continue
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        if tensor.dim() >= 2 and not name.endswith("ape"):
            tensor.copy_(noise * (1.0 if "embed" in name else tensor.shape[-1] ** -0.5))
        else:
            tensor.copy_((1.0 if "norm" in name else 0.0) + 0.3 * noise)


def build(name: str, directory: Path) -> Any:
    """A stirred member, also written to `directory` as a checkpoint."""
    model = MEMBERS[name]()
    model.set_attn_implementation("eager")
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    stir(model)
    model.eval().save_pretrained(directory)
    return model


def largest(a: torch.Tensor, b: torch.Tensor) -> float:
    """The greatest difference; infinite if shapes differ or either holds a NaN."""
    if a.shape != b.shape or bool(a.isnan().any()) or bool(b.isnan().any()):
        return math.inf
    return float((a - b).abs().max())
