"""The names: one to one, complete, and those of the released checkpoints."""

import pytest
import torch

import rorqual
from rorqual.nn import Transformer
from rorqual.weights import names

PAGES = ["deepseek-llm-67b-chat", "deepseek-moe-16b-base", "deepseek-v2-lite", "deepseek-v2", "deepseek-v3"]
PAGES += ["deepseek-v3.2", "deepseek-v4-flash", "deepseek-v4-pro", "deepseek-r1-distill-qwen-7b"]


def hub_names(config):
    model = Transformer(config, dtype=torch.bfloat16, device="meta")
    ours = [(n, t.shape[0] if names.routed_expert(n) else None) for n, t in model.state_dict().items()]
    return model, list(names.places(ours, config))


@pytest.mark.parametrize("page", PAGES)
def test_hub_names_are_one_to_one_and_cover_every_parameter(page):
    model, pairs = hub_names(rorqual.config(page))
    assert len({hub for hub, _ in pairs}) == len(pairs) == len({place for _, place in pairs})
    assert {place.ours for _, place in pairs} == set(model.state_dict())
    assert all(names.published(hub, model.config) == hub for hub, _ in pairs)


def test_v3_has_the_released_files_tensors():
    config = rorqual.config("deepseek-v3")
    _, pairs = hub_names(config)
    found = dict(pairs)
    dense = 3 * (7 + 2 + 3)
    moe = 58 * (7 + 2 + 256 * 3 + 3 + 2)
    mtp = 7 + 2 + 256 * 3 + 3 + 2 + 4
    assert len(found) == 3 + dense + moe + mtp
    for name in (
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.norm.weight",
        "model.layers.0.mlp.gate_proj.weight",
        "model.layers.60.self_attn.kv_a_proj_with_mqa.weight",
        "model.layers.3.mlp.gate.e_score_correction_bias",
        "model.layers.3.mlp.shared_experts.down_proj.weight",
        "model.layers.61.eh_proj.weight",
        "model.layers.61.enorm.weight",
        "model.layers.61.hnorm.weight",
        "model.layers.61.shared_head.norm.weight",
        "model.layers.61.mlp.experts.255.up_proj.weight",
    ):
        assert name in found
    assert found["model.layers.61.mlp.experts.255.up_proj.weight"] == names.Place(
        "mtp.0.block.ff.experts.up.weight", 255
    )
    assert set(names.copies(config)) == {
        "model.layers.61.embed_tokens.weight",
        "model.layers.61.shared_head.head.weight",
    }
    scaled = "model.layers.3.self_attn.o_proj.weight"
    assert names.scale_name(scaled, config) == scaled + "_scale_inv"
    assert names.weight_name(scaled + "_scale_inv", config) == scaled


def test_v4_has_the_published_tensors():
    config = rorqual.config("deepseek-v4-flash")
    found = dict(hub_names(config)[1])
    for name in (
        "embed.weight",
        "head.weight",
        "norm.weight",
        "hc_head_fn",
        "layers.0.attn.attn_sink",
        "layers.0.ffn.gate.tid2eid",
        "layers.2.attn.indexer.compressor.wgate.weight",
        "layers.2.attn.indexer.weights_proj.weight",
        "layers.3.ffn.gate.bias",
        "layers.3.attn.compressor.ape",
        "layers.42.hc_ffn_scale",
        "mtp.0.e_proj.weight",
        "mtp.0.hc_head_base",
        "mtp.0.attn_norm.weight",
        "mtp.0.ffn.experts.255.w2.weight",
    ):
        assert name in found
    assert "layers.3.ffn.gate.tid2eid" not in found and "layers.3.attn.indexer.wq_b.weight" not in found
    assert names.scale_name("mtp.0.e_proj.weight", config) == "mtp.0.e_proj.scale"
    assert names.weight_name("layers.0.hc_attn_scale", config) is None


@pytest.mark.parametrize(
    ("written", "published"),
    [
        ("model.embed_tokens.weight", "embed.weight"),
        ("lm_head.weight", "head.weight"),
        ("head.weight", "head.weight"),
        ("model.norm.weight", "norm.weight"),
        ("model.hc_head.hc_base", "hc_head_base"),
        ("model.layers.3.attn.norm.weight", "layers.3.attn.kv_norm.weight"),
        ("model.layers.3.attn.compressor.norm.weight", "layers.3.attn.compressor.norm.weight"),
        ("layers.3.attn.indexer.compressor.norm.weight", "layers.3.attn.indexer.compressor.norm.weight"),
        ("mtp.0.norm.weight", "mtp.0.norm.weight"),
        ("layers.3.attn.wq_a.weight_scale_inv", "layers.3.attn.wq_a.scale"),
    ],
)
def test_transformers_names_of_v4(written, published):
    assert names.published(written, rorqual.config("deepseek-v4-flash")) == published


def test_which_matrices_a_released_checkpoint_quantises():
    for page in ("deepseek-v3", "deepseek-v3.2", "deepseek-v4-flash"):
        config = rorqual.config(page)
        model = Transformer(config, dtype=torch.bfloat16, device="meta")
        plain = {names.hub_name(n, config) for n, t in model.state_dict().items() if not names.quantizable(n)}
        codes = {names.hub_name(n, config) for n in model.state_dict()} - plain
        assert not any(
            "norm" in n or "embed" in n or n.endswith(("head.weight", "gate.weight")) for n in codes
        )
        if page == "deepseek-v4-flash":
            assert "mtp.0.e_proj.weight" in codes and "layers.2.attn.indexer.wq_b.weight" in codes
            assert (
                "layers.2.attn.indexer.weights_proj.weight" in plain
                and "layers.2.attn.compressor.wkv.weight" in plain
            )
        else:
            assert "model.layers.61.eh_proj.weight" in plain
            assert "model.layers.61.self_attn.kv_a_proj_with_mqa.weight" in codes
