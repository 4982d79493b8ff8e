"""Models into released files: the same bytes back, fresh numbers where weights changed, and never a broken
checkpoint."""

import json
import os
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import rorqual.weights.write as write
from rorqual.family import Quantization
from rorqual.family.hub import from_hub
from rorqual.nn import Transformer
from rorqual.nn.linear import Matrix
from rorqual.weights import CheckpointError, load, save
from tests.weights.tiny import CONFIGS, same_bytes


def saved(path):
    """All tensors of a saved directory, one file or many."""
    state = {}
    for file in sorted(path.glob("*.safetensors")):
        state |= load_file(file)
    return state


def logits(model, ids):
    with torch.no_grad():
        return model(ids)


def published(state):
    """V4's names as published, for what transformers wrote."""
    named = {}
    for k, v in state.items():
        k = k.removeprefix("model.").replace("embed_tokens.", "embed.").replace("hc_head.hc_", "hc_head_")
        named[k.replace(".attn.norm.", ".attn.kv_norm.")] = v
    return named


@pytest.mark.parametrize("key", CONFIGS)
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float64])
def test_bf16_checkpoints_come_back_byte_for_byte(made, tmp_path, key, dtype):
    original = made(key)
    half = {k: v.bfloat16() for k, v in original.tensors().items() if v.is_floating_point()}
    half = {
        k: v for k, v in half.items() if not any(x in k for x in ("hc_", ".ape", "attn_sink", "gate.bias"))
    }
    one = original.changed(tmp_path / "half", half, {"dtype": "bfloat16"})
    save(load(one.path, dtype=dtype), tmp_path / "again")
    expected = published(one.tensors()) if key == "deepseek_v4" else one.tensors()
    same_bytes(expected, saved(tmp_path / "again"))
    save(load(tmp_path / "again"), tmp_path / "third")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "third" / name).read_bytes()


@pytest.mark.parametrize("kind", ["fp8", "ue8m0", "fp4"])
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float64])
def test_quantised_checkpoints_come_back_byte_for_byte(quantised, tmp_path, kind, dtype):
    q = quantised(kind)
    save(load(q.path, dtype=dtype), tmp_path / "again")
    expected = published(q.tensors()) if kind == "fp4" else q.tensors()
    if (
        dtype == torch.bfloat16
    ):  # the tiny checkpoints keep norms and the like in fp32, which bf16 holds exactly here
        assert all(
            torch.equal(v, v.bfloat16().float()) for k, v in expected.items() if k.endswith("norm.weight")
        )
    same_bytes(expected, saved(tmp_path / "again"))
    save(load(tmp_path / "again", dtype=dtype), tmp_path / "third")
    same_bytes(expected, saved(tmp_path / "third"))
    assert from_hub(json.loads((tmp_path / "third" / "config.json").read_text())).quantization is not None


def test_a_model_cast_after_loading_still_finds_its_codes(quantised, tmp_path):
    q = quantised("fp8")
    save(load(q.path, dtype=torch.float32).bfloat16(), tmp_path / "again")
    expected, again = q.tensors(), saved(tmp_path / "again")
    for name in expected:
        if name.endswith("weight_scale_inv") or expected[name].dtype == torch.float8_e4m3fn:
            assert torch.equal(expected[name].view(torch.uint8), again[name].view(torch.uint8)), name


@pytest.mark.parametrize("kind", ["fp8", "fp4"])
def test_a_changed_block_gets_a_fresh_scale_and_the_others_keep_theirs(quantised, tmp_path, kind):
    q = quantised(kind)
    model = load(q.path, dtype=torch.float32)
    gate = model.layers[1].ff.experts.gate
    with torch.no_grad():
        gate.weight[2, 0, 0] = 50.0
    save(model, tmp_path / "again")
    before, after = (load(p).layers[1].ff.experts.gate for p in (q.path, tmp_path / "again"))
    different = before.scale.float() != after.scale.float()
    assert different.sum() == 1 and different[2, 0, 0]
    rows, columns = (1, 32) if kind == "fp4" else (24, 24)
    same = torch.ones_like(before.weight.view(torch.uint8), dtype=torch.bool)
    same[2, :rows, : columns // (2 if kind == "fp4" else 1)] = False
    assert torch.equal(before.weight.view(torch.uint8)[same], after.weight.view(torch.uint8)[same])
    assert after.matrix(torch.float32)[2, 0, 0] == pytest.approx(50.0, rel=0.07 if kind == "fp8" else 0.26)


def test_every_released_name_and_type_is_kept(quantised, tmp_path):
    q = quantised("fp4")
    save(load(q.path), tmp_path / "again")
    with safe_open(tmp_path / "again" / "model.safetensors", "pt") as f:
        assert f.metadata() == {"format": "pt"}
        assert f.get_slice("layers.1.ffn.experts.0.w1.scale").get_dtype() == "F8_E8M0"
        assert f.get_slice("layers.1.ffn.experts.0.w1.weight").get_dtype() == "I8"
        assert f.get_slice("layers.1.attn.wo_a.weight").get_dtype() == "F8_E4M3"
        assert f.get_slice("layers.0.ffn.gate.tid2eid").get_dtype() == "I64"


# ------------------------------------------------------------------------------------ plain and fresh


@pytest.mark.parametrize("kind", ["fp8", "fp4"])
def test_quantize_none_writes_plain_matrices(quantised, tmp_path, kind):
    q = quantised(kind)
    for held in (None, torch.float32):
        save(load(q.path, dtype=held), tmp_path / "plain", quantize=None)
        model = load(tmp_path / "plain")
        assert model.config.quantization is None and model.dtype == torch.float32
        assert not any(m.held_as_codes for m in model.modules() if isinstance(m, Matrix))
        right = load(q.plain).state_dict()
        assert all(torch.equal(t, right[n]) for n, t in model.state_dict().items())
        shutil.rmtree(tmp_path / "plain")


@pytest.mark.parametrize("key", ["llama-tied", "qwen3", "deepseek_v3", "deepseek_v4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_model_is_written_in_the_types_it_holds(made, tmp_path, key, dtype):
    config = load(made(key).path).config
    model = Transformer(config, dtype=dtype, seed=1)
    save(model, tmp_path / "fresh")
    again = load(tmp_path / "fresh")
    assert again.dtype == dtype and again.config.dtype == str(dtype).removeprefix("torch.")
    assert all(torch.equal(t, again.state_dict()[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize(
    ("key", "experts"), [("deepseek_v3", "fp8"), ("deepseek_v4", "fp4"), ("deepseek_v4", "fp8")]
)
def test_a_fresh_model_is_quantised_as_its_config_says(made, tmp_path, key, experts):
    original = made(key)
    config = load(original.path).config
    config = config.replace(quantization=Quantization((16, 32), ue8m0=key == "deepseek_v4", experts=experts))
    model = Transformer(config, dtype=torch.float32, seed=1)
    save(model, tmp_path / "fresh")
    again = load(tmp_path / "fresh")
    held = {n for n, m in again.named_modules() if isinstance(m, Matrix) and m.held_as_codes}
    plain = {n for n, m in again.named_modules() if isinstance(m, Matrix)} - held
    assert "layers.1.ff.experts.down" in held and "layers.1.attention.q_a" in held and "head" in plain
    assert not any("compressor" in n or n.endswith("index.w") for n in held)
    assert again.layers[1].ff.experts.up.weight.dtype == (
        torch.int8 if experts == "fp4" else torch.float8_e4m3fn
    )
    scales = {m.scale.dtype for m in again.modules() if isinstance(m, Matrix) and m.held_as_codes}
    assert scales == {torch.float8_e8m0fnu if key == "deepseek_v4" else torch.float32}
    before, after = model.layers[1].attention.q_a.weight, again.layers[1].attention.q_a.matrix(torch.float32)
    assert ((before - after).abs() <= before.abs() / 16 + 1e-3 * before.abs().max()).all()


def test_weights_that_are_not_numbers_are_not_quantised(quantised, tmp_path):
    model = load(quantised("fp8").path, dtype=torch.float32)
    with torch.no_grad():
        model.layers[0].attention.o.weight[3, 3] = float("nan")
    with pytest.raises(CheckpointError, match=r"layers.0.self_attn.o_proj.weight can't be quantised.*NaN"):
        save(model, tmp_path / "bad")
    assert list((tmp_path / "bad").iterdir()) == []


# -------------------------------------------------------------------------------------------- shards


@pytest.mark.parametrize("kind", ["deepseek_v3", "fp8"])
def test_shards_and_their_index(made, quantised, tmp_path, kind):
    source = quantised("fp8") if kind == "fp8" else made(kind)
    save(load(source.path), tmp_path / "many", max_shard_bytes=50_000)
    files = sorted(p.name for p in (tmp_path / "many").iterdir())
    count = len(files) - 2
    assert count > 3 and files[:2] == ["config.json", f"model-00001-of-{count:05d}.safetensors"]
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    expected = source.tensors()
    assert index["weight_map"].keys() == expected.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in expected.values())
    sizes = [(tmp_path / "many" / f).stat().st_size for f in files if f.endswith("safetensors")]
    assert max(sizes) < 50_000 + 20_000  # header
    same_bytes(expected, saved(tmp_path / "many"))
    for name, file in index["weight_map"].items():
        if name.endswith("weight_scale_inv"):
            assert index["weight_map"][name.removesuffix("_scale_inv")] == file
    assert (
        logits(load(tmp_path / "many"), source.ids) - logits(load(source.path), source.ids)
    ).abs().max() == 0


def test_a_save_over_another_replaces_it_whatever_their_files(made, tmp_path):
    original, to = made("deepseek_v3"), tmp_path / "to"
    expected = original.tensors()
    for limit in (10**9, 100_000, 60_000, 60_000, 10**9, 100_000):
        (to / "tokenizer.json").parent.mkdir(exist_ok=True)
        (to / "tokenizer.json").write_text("kept")
        save(load(to if (to / "config.json").exists() else original.path), to, max_shard_bytes=limit)
        same_bytes(expected, saved(to))  # no file of an earlier save is left
        load(to)
        assert (to / "tokenizer.json").read_text() == "kept"
        assert not (to / write.STAGING).exists()


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("limits", [(10**9, 10**9), (60_000, 60_000), (10**9, 60_000), (60_000, 10**9)])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_an_interrupted_save_leaves_the_old_checkpoint(made, tmp_path, monkeypatch, limits, call):
    """Every single call that touches the disk's state is made to fail once."""
    old = load(made("deepseek_v3").path, mapped=False)
    new = Transformer(old.config, dtype=torch.float32, seed=5)
    expected = made("deepseek_v3").tensors()
    real, failed_at = getattr(os, call), 0
    while True:
        to = tmp_path / f"{call}{failed_at}"
        save(old, to, max_shard_bytes=limits[0])
        before = {p.name for p in to.iterdir()}
        count = 0

        def fail(*args, at=failed_at):
            nonlocal count
            count += 1
            if count == at + 1:
                raise Interrupted
            return real(*args)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, fail)
            try:
                save(new, to, max_shard_bytes=limits[1])
            except Interrupted:
                if call == "fsync" and count == write_count(limits[1], new):
                    break  # the directory's own fsync, after the new checkpoint stands
                assert {p.name for p in to.iterdir()} == before
                same_bytes(expected, saved(to))
                load(to)
            else:
                break
        failed_at += 1
    assert failed_at >= 2
    assert torch.equal(load(to).embed.weight, new.embed.weight)


def write_count(limit, model):
    """How many fsyncs a save makes up to the first after its last rename: each shard, config.json, perhaps the
    index, the journal, the directory twice."""
    size = sum(t.nbytes for t in model.state_dict().values())
    if size < limit:
        return 5
    from rorqual.weights.save import _split, _Writer

    return len(_split(list(_Writer(model, True).pieces()), limit)) + 5


def test_what_an_earlier_crash_left_behind_does_no_harm(made, tmp_path):
    original = made("llama")
    save(load(original.path), tmp_path / "to")
    (tmp_path / "to" / write.STAGING).mkdir()
    (tmp_path / "to" / write.STAGING / "model.safetensors").write_bytes(b"half")
    same_bytes(
        original.tensors(), {n: t for n, t in load_file(tmp_path / "to" / "model.safetensors").items()}
    )
    load(tmp_path / "to")
    save(load(tmp_path / "to"), tmp_path / "to")
    assert sorted(p.name for p in (tmp_path / "to").iterdir()) == ["config.json", "model.safetensors"]


def test_bad_arguments(made, tmp_path):
    model = load(made("llama").path)
    with pytest.raises(ValueError, match="quantize"):
        save(model, tmp_path / "x", quantize="int4")
    with pytest.raises(ValueError, match="max_shard_bytes"):
        save(model, tmp_path / "x", max_shard_bytes=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        save(model, tmp_path / "file")
    assert not (tmp_path / "x").exists()
