"""Released files into models: the right logits, the right types, nothing more held than needed."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from rorqual.family.hub import from_hub
from rorqual.kernels.fp8_linear import reference as fp8_reference
from rorqual.nn import Transformer
from rorqual.nn.linear import Linear, Matrix
from rorqual.nn.moe import MoE
from rorqual.weights import CheckpointError, load, save
from tests.weights.tiny import CONFIGS, VOCAB

PLAIN = Linear.forward


def logits(model, ids):
    with torch.no_grad():
        return model(ids)


def shards(path, count):
    """Spread a single-file checkpoint over `count` files with an index."""
    state = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    where = {}
    for i in range(count):
        name = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
        part = {k: v for n, (k, v) in enumerate(sorted(state.items())) if n % count == i}
        save_file(part, path / name)
        where |= dict.fromkeys(part, name)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


@pytest.mark.parametrize("key", CONFIGS)
def test_logits_equal_transformers(made, key):
    original = made(key)
    model = load(original.path)
    assert model.dtype == torch.float32 and not any(t.is_meta for t in model.state_dict().values())
    assert (logits(model, original.ids) - original.logits).abs().max() < 1e-4


def test_moe_16b_is_llamas_attention_beside_v2s_experts(made, tmp_path):
    """transformers has no `deepseek`; its files name llama's attention and V2's experts."""
    v2 = made("deepseek_v2-lite")
    state = {k: v for k, v in v2.tensors().items() if ".mlp." in k or ("layernorm" in k and "kv_a" not in k)}
    state |= {"model.norm.weight": torch.ones(64), "lm_head.weight": torch.randn(VOCAB, 64)}
    state |= {"model.embed_tokens.weight": torch.randn(VOCAB, 64)}
    for i in range(3):
        for name in "qkvo":
            state[f"model.layers.{i}.self_attn.{name}_proj.weight"] = torch.randn(64, 64) / 8
    shared = ("vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers")
    shared += ("num_attention_heads", "num_key_value_heads", "n_routed_experts", "n_shared_experts")
    shared += ("num_experts_per_tok", "first_k_dense_replace", "max_position_embeddings", "rms_norm_eps")
    config = {k: v for k, v in v2.config().items() if k in shared}
    config |= {
        "model_type": "deepseek",
        "scoring_func": "softmax",
        "norm_topk_prob": False,
        "hidden_act": "silu",
    }
    config |= {
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "moe_layer_freq": 1,
    }
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = load(tmp_path)
    ours = model.state_dict()
    assert torch.equal(
        ours["layers.1.ff.experts.up.weight"][5], state["model.layers.1.mlp.experts.5.up_proj.weight"]
    )
    assert torch.equal(ours["layers.2.attention.k.weight"], state["model.layers.2.self_attn.k_proj.weight"])
    assert logits(model, v2.ids).isfinite().all()


@pytest.mark.parametrize("key", ["deepseek_v3", "deepseek_v4", "llama-tied"])
def test_shards_give_the_same_model(checkpoint, key):
    one = checkpoint(key)
    whole = load(one.path, mapped=False).state_dict()
    shards(one.path, 3)
    parts = load(one.path).state_dict()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_v4_loads_under_published_and_transformers_names(made, tmp_path):
    original = made("deepseek_v4")
    assert (
        "model.embed_tokens.weight" in original.tensors()
    )  # transformers' odd names are what was read above
    save(load(original.path), tmp_path / "published")
    published = load_file(tmp_path / "published" / "model.safetensors")
    for name in ("embed.weight", "head.weight", "norm.weight", "hc_head_base", "layers.1.attn.kv_norm.weight",
                 "layers.1.attn.indexer.compressor.ape", "layers.0.ffn.gate.tid2eid", "layers.3.ffn.gate.bias",
                 "layers.2.ffn.experts.5.w2.weight", "layers.0.hc_attn_fn"):  # fmt: skip
        assert name in published
    assert not any(name.startswith("model.") for name in published)
    again = load(tmp_path / "published")
    assert (logits(again, original.ids) - original.logits).abs().max() < 1e-4


@pytest.mark.parametrize("key", ["llama", "deepseek_v3", "deepseek_v4"])
def test_dtypes(made, tmp_path, key):
    original = made(key)
    stored = {k: v.bfloat16() if v.dim() > 1 and v.is_floating_point() and "hc_" not in k and "ape" not in k else v
              for k, v in original.tensors().items()}  # fmt: skip
    stored = {k: v.bfloat16() if "norm" in k else v for k, v in stored.items()}
    half = original.changed(tmp_path, stored, {"dtype": "bfloat16"})
    kept = load(half.path)
    assert kept.dtype == torch.bfloat16
    pinned = {n for n, t in kept.state_dict().items() if t.dtype == torch.float32}
    expected = ("_mix.", "mix_head.", "ape", "sink", "router.bias")
    biases = {
        n for n in pinned if n.endswith(".bias") and "router" not in n
    }  # stored fp32 here, cast to the model's
    assert not biases and all(any(e in n for e in expected) for n in pinned)
    assert key == "llama" or pinned
    for dtype in (torch.float32, torch.float16):
        model = load(half.path, dtype=dtype)
        for name, tensor in model.state_dict().items():
            want = torch.int64 if name.endswith("table") else torch.float32 if name in pinned else dtype
            assert tensor.dtype == want, name
    wide = load(half.path, dtype=torch.float64)
    assert {t.dtype for t in wide.state_dict().values()} <= {torch.float64, torch.int64}
    assert (
        logits(wide, original.ids) - original.logits
    ).abs().max() < 1e-4  # BF16 holds these weights exactly
    assert (logits(load(half.path, dtype=torch.float32), original.ids) - original.logits).abs().max() < 1e-4


def test_mixed_types_take_the_configs_and_norms_stay_as_stored(made, tmp_path):
    original = made("deepseek_v32")
    stored = {k: v.bfloat16() for k, v in original.tensors().items() if v.dim() > 1 and "wk." not in k}
    model = load(original.changed(tmp_path, stored, {"dtype": "bfloat16"}).path)
    state = model.state_dict()
    assert model.dtype == state["layers.0.attention.index.k.weight"].dtype == torch.bfloat16
    assert state["layers.0.attention.index.k_norm.weight"].dtype == torch.float32
    save(model, tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    wk = "model.layers.0.self_attn.indexer.wk.weight"
    assert again[wk].dtype == torch.float32 and torch.equal(again[wk], original.tensors()[wk])


def test_float16_that_overflows_is_refused(made, tmp_path):
    big = torch.full((96, 64), 1e5)
    path = made("llama").changed(tmp_path, {"model.layers.0.mlp.up_proj.weight": big}).path
    with pytest.raises(
        CheckpointError, match=r"up_proj.weight in model.safetensors: 6144 values exceed float16"
    ):
        load(path, dtype=torch.float16)


def test_only_float_types_are_accepted(made):
    with pytest.raises(ValueError, match="float type"):
        load(made("llama").path, dtype=torch.int8)


def test_the_given_class_is_built(made):
    class Mine(Transformer):
        pass

    assert isinstance(load(made("llama").path, build=Mine), Mine)


def test_mapped_parameters_can_be_trained_without_touching_the_file(checkpoint):
    one = checkpoint("llama")
    before = (one.path / "model.safetensors").read_bytes()
    model = load(one.path)
    assert all(p.requires_grad for p in model.parameters())
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    assert (one.path / "model.safetensors").read_bytes() == before


def test_unmapped_parameters_own_their_memory(checkpoint):
    one = checkpoint("deepseek_v3")
    model = load(one.path, mapped=False)
    file = one.path / "model.safetensors"
    with open(file, "r+b") as f:
        f.seek(file.stat().st_size // 2)
        f.write(b"\xff" * 4096)
    assert (logits(model, one.ids) - one.logits).abs().max() < 1e-4


# ----------------------------------------------------------------------------------------- quantised


@pytest.mark.parametrize("kind", ["fp8", "ue8m0", "fp4"])
def test_codes_are_kept_or_multiplied_out(quantised, kind):
    q = quantised(kind)
    right = logits(load(q.plain), q.ids)
    kept = load(q.path)
    matrices = [m for m in kept.modules() if isinstance(m, Matrix) and m.held_as_codes]
    assert len(matrices) > 10 and all(not m.weight.requires_grad for m in matrices)
    assert {m.weight.dtype for m in matrices} == ({torch.int8} if kind == "fp4" else set()) | {
        torch.float8_e4m3fn
    }
    assert (logits(kept, q.ids) - right).abs().max() < 1e-4
    assert not kept.released_scales
    for dtype in (torch.float32, torch.float64):
        plain = load(q.path, dtype=dtype)
        assert not any(m.held_as_codes for m in plain.modules() if isinstance(m, Matrix))
        assert (logits(plain, q.ids) - right).abs().max() < 1e-4
        for name, tensor in load(q.plain, dtype=dtype).state_dict().items():
            same = plain.state_dict()[name]
            assert torch.equal(same.float(), tensor.float()), name
        assert len(plain.released_scales) == len(matrices)


def test_codes_and_type_can_be_chosen_apart(quantised):
    q = quantised("fp8")
    model = load(q.path, dtype=torch.bfloat16, quantized=True)
    assert model.dtype == torch.bfloat16 and model.layers[1].ff.experts.gate.held_as_codes
    model = load(q.path, quantized=False)
    assert model.dtype == torch.float32 and not model.layers[1].ff.experts.gate.held_as_codes


# ---------------------------------------------------------------------------------------------- MTP


def with_mtp(original, to, *, copies=True):
    """V3 or V4 with one MTP layer: a copy of the last layer's tensors and the parts of its own."""
    state, v4 = original.tensors(), original.config()["model_type"] == "deepseek_v4"
    last = original.config()["num_hidden_layers"] - 1
    source = "model.layers.0." if v4 else f"model.layers.{last}."  # V4's MTP layer attends the window only
    target = "mtp.0." if v4 else f"model.layers.{last + 1}."
    new = {target + k.removeprefix(source): v for k, v in state.items() if k.startswith(source)}
    new = {k.replace(".attn.norm.", ".attn.kv_norm."): v for k, v in new.items()}
    if v4:  # an ordinary router instead of the hash table
        del new["mtp.0.ffn.gate.tid2eid"]
        new["mtp.0.ffn.gate.bias"] = torch.rand(6)
        new |= {f"mtp.0.{n}.weight": torch.rand(64) + 0.5 for n in ("enorm", "hnorm", "norm")}
        new |= {f"mtp.0.{n}.weight": torch.randn(64, 64) / 8 for n in ("e_proj", "h_proj")}
        new |= {"mtp.0.hc_head_fn": torch.randn(4, 256), "mtp.0.hc_head_base": torch.randn(4)}
        new["mtp.0.hc_head_scale"] = torch.rand(1)
        embed, head = "mtp.0.emb.tok_emb.weight", "mtp.0.head.weight"
    else:
        new |= {f"{target}{n}.weight": torch.rand(64) + 0.5 for n in ("enorm", "hnorm", "shared_head.norm")}
        new[f"{target}eh_proj.weight"] = torch.randn(64, 128) / 8
        embed, head = f"{target}embed_tokens.weight", f"{target}shared_head.head.weight"
    if copies:
        new[embed] = state["model.embed_tokens.weight"]
        new[head] = state["head.weight" if v4 else "lm_head.weight"]
    return original.changed(to, new, {"num_nextn_predict_layers": 1}), list(new)


@pytest.mark.parametrize("key", ["deepseek_v3", "deepseek_v4"])
@pytest.mark.parametrize("copies", [True, False])
def test_mtp_is_read_and_written_with_its_copies_if_they_were_there(made, tmp_path, key, copies):
    one, new = with_mtp(made(key), tmp_path / "mtp", copies=copies)
    model = load(one.path)
    assert len(model.mtp) == 1 and (logits(model, one.ids) - one.logits).abs().max() < 1e-4
    state, stored = model.state_dict(), one.tensors()
    prefix = "mtp.0." if key == "deepseek_v4" else "model.layers.3."
    assert torch.equal(state["mtp.0.hidden_norm.weight"], stored[prefix + "hnorm.weight"])
    save(model, tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert {k for k in again if k.startswith(prefix)} == set(new)
    assert all(torch.equal(again[k], stored[k]) for k in new)


def test_mtp_copies_must_be_copies(made, tmp_path):
    one, _ = with_mtp(made("deepseek_v3"), tmp_path / "mtp")
    changed = one.tensors()["model.embed_tokens.weight"].clone()
    changed[-1, -1] += 1
    bad = one.changed(tmp_path / "bad", {"model.layers.3.embed_tokens.weight": changed})
    with pytest.raises(
        CheckpointError, match=r"layers.3.embed_tokens.weight .* repeat model.embed_tokens.weight"
    ):
        load(bad.path)


def test_declared_but_absent_mtp_is_left_out_with_a_warning(made, tmp_path):
    for key in ("deepseek_v3", "deepseek_v4"):
        one = made(key).changed(tmp_path / key, config={"num_nextn_predict_layers": 1})
        with pytest.warns(UserWarning, match="declares 1 multi-token-prediction layers but holds none"):
            model = load(one.path)
        assert len(model.mtp) == 0 and model.config.mtp == ()
        save(model, tmp_path / "again")
        assert from_hub(json.loads((tmp_path / "again" / "config.json").read_text())).mtp == ()
        assert (logits(load(tmp_path / "again"), one.ids) - one.logits).abs().max() < 1e-4
        shutil.rmtree(tmp_path / "again")


def test_half_an_mtp_layer_is_an_error(made, tmp_path):
    one, _ = with_mtp(made("deepseek_v3"), tmp_path / "mtp")
    bad = one.changed(tmp_path / "bad", {"model.layers.3.eh_proj.weight": None})
    with pytest.raises(CheckpointError, match=r"1 missing tensors: model.layers.3.eh_proj.weight"):
        load(bad.path)


def test_undeclared_mtp_is_unexpected(made, tmp_path):
    one, _ = with_mtp(made("deepseek_v3"), tmp_path / "mtp")
    bad = one.changed(tmp_path / "bad", config={"num_nextn_predict_layers": 0})
    with pytest.raises(CheckpointError, match=r"unexpected tensors: model.layers.3"):
        load(bad.path)


# ------------------------------------------------------------------------------------ tied and ignored


def test_a_tied_head_may_stand_in_the_file_if_it_equals_the_embedding(made, tmp_path):
    tied = made("llama-tied")
    embed = tied.tensors()["model.embed_tokens.weight"]
    assert "lm_head.weight" not in tied.tensors()
    model = load(tied.changed(tmp_path / "same", {"lm_head.weight": embed}).path)
    assert model.head is None and (logits(model, tied.ids) - tied.logits).abs().max() < 1e-4
    save(model, tmp_path / "again")
    assert "lm_head.weight" not in load_file(tmp_path / "again" / "model.safetensors")
    bad = tied.changed(tmp_path / "other", {"lm_head.weight": embed + 1})
    with pytest.raises(CheckpointError, match=r"lm_head.weight .* must repeat model.embed_tokens.weight"):
        load(bad.path)


def test_old_rotary_buffers_are_skipped(made, tmp_path):
    one = made("llama").changed(tmp_path, {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.rand(8)})
    assert (logits(load(one.path), one.ids) - one.logits).abs().max() < 1e-4


# ---------------------------------------------------------------------------------------------- GPU


def rounding(model):
    """`Linear.forward` as a GPU has it: what goes through codes is rounded to FP8 too, but for shared experts whose
    blocks no kernel takes."""
    experts = [
        brick.shared for brick in model.modules() if isinstance(brick, MoE) and brick.shared is not None
    ]
    apart = {layer for shared in experts for layer in shared.modules()}

    def forward(self, x):
        if self.scale is None or self.fp4 or self in apart:
            return PLAIN(self, x)
        y = fp8_reference(x.flatten(0, -2), self.weight, self.scale, self.block, self.bias)
        return y.unflatten(0, x.shape[:-1])

    return forward


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["fp8", "ue8m0", "fp4"])
@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_on_a_gpu_as_on_the_cpu(quantised, tmp_path, kind, dtype, monkeypatch):
    q = quantised(kind)
    model, right = load(q.path, dtype=dtype, device="cuda"), load(q.path, dtype=dtype)
    for name, tensor in right.state_dict().items():
        there = model.state_dict()[name]
        assert there.is_cuda and torch.equal(there.cpu().view(torch.uint8), tensor.view(torch.uint8)), name
    there = logits(model, q.ids.cuda()).cpu()
    monkeypatch.setattr(Linear, "forward", rounding(right))
    here = logits(right, q.ids)
    if dtype is None:  # an activation between two codes may go either way, and a router or indexer with it
        assert float(((there - here).norm(dim=-1) / here.norm(dim=-1)).median()) < 1e-2
    else:
        assert (there - here).abs().max() < 1e-2
    monkeypatch.undo()
    save(model, tmp_path / "gpu")
    save(right, tmp_path / "cpu")
    written = [(tmp_path / d / "model.safetensors").read_bytes() for d in ("gpu", "cpu")]
    assert written[0] == written[1]
