"""Every way a checkpoint can be wrong ends in one error that names file, tensor, expected and found."""

import contextlib
import json
import shutil
import struct
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from rorqual.family import ConfigError
from rorqual.weights import CheckpointError, load, resolve
from tests.weights.test_load import shards


def refused(path, *patterns, **options):
    """Loading raises CheckpointError, and its text matches every pattern."""
    for pattern in patterns:
        with pytest.raises(CheckpointError, match=pattern):
            load(path, **options)


def test_one_error_tells_everything_with_counts(made, tmp_path):
    one = made("deepseek_v3").changed(
        tmp_path,
        {f"model.layers.1.mlp.experts.{e}.up_proj.weight": None for e in range(7)}
        | {
            "model.norm.weight": torch.ones(63),
            "model.layers.0.self_attn.q_norm.weight": torch.ones(4),
            "lm_head.weight": torch.ones(96, 64, dtype=torch.int32),
        },
    )
    refused(
        one.path,
        r"7 missing tensors: model.layers.1.mlp.experts.0.up_proj.weight; .*; and 2 more",
        r"1 unexpected tensors: model.layers.0.self_attn.q_norm.weight in model.safetensors",
        r"1 misshapen tensors: model.norm.weight in model.safetensors: expected \[64\], found \[63\]",
        r"wrong type: lm_head.weight in model.safetensors: expected F64 or F32 or F16 or BF16, found I32",
        str(tmp_path),
    )


def test_wrong_types(made, tmp_path):
    v4 = made("deepseek_v4")
    table = "model.layers.0.ffn.gate.tid2eid"
    refused(
        v4.changed(tmp_path / "a", {table: v4.tensors()[table].float()}).path,
        r"layers.0.ffn.gate.tid2eid in model.safetensors: expected I64 or I32, found F32",
    )
    small = v4.changed(tmp_path / "b", {table: v4.tensors()[table].int()})
    assert load(small.path).layers[0].ff.router.table.dtype == torch.int64


# ------------------------------------------------------------------------------------- broken files


def rewrite(file, header=None, cut=0, extra=b""):
    raw = file.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    old, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    new = header(old) if header else old
    blob = new if isinstance(new, bytes) else json.dumps(new).encode()
    file.write_bytes(struct.pack("<Q", len(blob)) + blob + data[: len(data) - cut] + extra)


def test_truncated_and_corrupt_files(checkpoint):
    one = checkpoint("llama")
    file = one.path / "model.safetensors"
    good = file.read_bytes()

    def broken(*patterns):
        refused(one.path, r"model.safetensors: corrupt or truncated", *patterns)
        file.write_bytes(good)

    rewrite(file, cut=10)
    broken(r"tensors end at byte \d+, the file has \d+ bytes")
    rewrite(file, extra=b"x")
    broken("the file has")
    file.write_bytes(good[:5])
    broken("the file has 5")
    file.write_bytes(b"")
    refused(one.path, "model.safetensors: the file is empty")
    file.write_bytes(good[:100])
    broken("the header should take")
    file.write_bytes(struct.pack("<Q", 2**60) + good[8:])
    broken("the header should take")
    rewrite(file, lambda h: b'{"a": [1, 2')
    broken("not JSON")
    rewrite(file, lambda h: b"\xff\xfe{}")
    broken("not JSON")
    rewrite(file, lambda h: [1])
    broken("not a JSON object")
    rewrite(file, lambda h: h | {"lm_head.weight": {"dtype": "F32"}})
    broken("the entry of lm_head.weight is malformed")
    rewrite(file, lambda h: h | {"lm_head.weight": h["lm_head.weight"] | {"shape": [96, -64]}})
    broken("the entry of lm_head.weight is malformed")
    rewrite(file, lambda h: h | {"lm_head.weight": h["lm_head.weight"] | {"shape": [96, 63]}})
    broken(r"lm_head.weight \[96, 63\] F32 has \d+ bytes")
    rewrite(file, lambda h: {k: v for k, v in h.items() if k != "lm_head.weight"})
    broken("begins at byte|tensors end at byte")
    body = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    rewrite(file, lambda h: body[:-1] + b", " + body[1:])
    broken("'a' stands in it twice")
    rewrite(file, lambda h: h | {"lm_head.weight": h["lm_head.weight"] | {"dtype": "F6_NEW"}})
    refused(one.path, "lm_head.weight has the type 'F6_NEW', expected one of F64")


def test_a_file_that_shrinks_while_it_is_read(checkpoint, monkeypatch):
    from rorqual.weights import load as module  # the function; its module's globals are patched

    one = checkpoint("deepseek_v3")
    real = module.__globals__["match"]

    def match_then_cut(*args):
        out = real(*args)
        with open(one.path / "model.safetensors", "r+b") as f:
            f.truncate(20_000)
        return out

    monkeypatch.setitem(module.__globals__, "match", match_then_cut)
    refused(one.path, "model.safetensors: the file ended inside", mapped=False)


def test_shards_and_index_that_disagree(checkpoint):
    one = checkpoint("llama")
    shards(one.path, 2)
    first, second = sorted(one.path.glob("model-*.safetensors"))
    index = one.path / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    name = next(n for n, f in good["weight_map"].items() if f == first.name)

    def broken(pattern, weight_map=None, text=None):
        index.write_text(text or json.dumps({"weight_map": weight_map}))
        refused(one.path, pattern)
        index.write_text(json.dumps(good))

    where = good["weight_map"]
    broken(
        r"index.json names 1 files that are not in the directory: absent.safetensors",
        where | {name: "absent.safetensors"},
    )
    broken(r"names 1 files that are not in the directory: \.\./x", where | {name: "../x"})
    broken(
        rf"points 1 tensors to files lacking them: {name} \(not in {second.name}\)",
        where | {name: second.name},
    )
    broken(r"points 1 tensors to files lacking them: ghost", where | {"ghost": first.name})
    broken(
        rf"does not name 1 tensors: {name} \(in {first.name}\)", {k: v for k, v in where.items() if k != name}
    )
    broken("expected a `weight_map`", text="{}")
    broken("expected a `weight_map`", text='{"weight_map": {"a": 1}}')
    broken("can't be read as JSON", text="{")
    state = load_file(second)
    save_file(state | {name: load_file(first)[name]}, second)
    refused(one.path, rf"1 tensors stand in two files: {name} \(in {first.name} and {second.name}\)")
    second.write_bytes(second.read_bytes()[:-3])
    refused(one.path, rf"{second.name}: corrupt or truncated")


def test_one_tensor_under_two_names(made, tmp_path):
    v4 = made("deepseek_v4")
    bad = v4.changed(tmp_path, {"embed.weight": v4.tensors()["model.embed_tokens.weight"]})
    refused(
        bad.path,
        r"(model\.embed_tokens|embed)\.weight in model.safetensors are the same tensor under two names",
    )


# --------------------------------------------------------------------------------------- directories


def test_directories_without_what_they_need(checkpoint, tmp_path):
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "is empty: expected config.json and model.safetensors")
    refused(tmp_path / "nowhere", "does not exist: expected a checkpoint directory or a .gguf file")
    one = checkpoint("llama")
    weights, config = one.path / "model.safetensors", one.path / "config.json"
    good = config.read_text()
    config.unlink()
    refused(one.path, "has no config.json")
    config.write_text("{not json")
    refused(one.path, "config.json: can't be read as JSON")
    config.write_text("[]")
    refused(one.path, "config.json: expected a JSON object, found list")
    config.write_text('{"model_type": "gpt2"}')
    with pytest.raises(ConfigError, match="gpt2"):
        load(one.path)
    config.write_text(good)
    refused(weights, "is a file: expected a checkpoint directory")
    weights.rename(one.path / "other.safetensors")
    refused(one.path, r"has no weights: expected model.safetensors .* found other.safetensors, but no index")
    (one.path / "other.safetensors").unlink()
    refused(one.path, r"has no weights: .* found config.json")


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.00.pth", "m.pt"]
)
def test_pickles_are_refused_with_the_way_out(checkpoint, name):
    one = checkpoint("llama")
    (one.path / "model.safetensors").unlink()
    (one.path / name).write_bytes(b"\x80\x04")
    refused(one.path, rf"pickles \({name}\).*refused.*safe_serialization=True")
    (one.path / "config.json").unlink()
    refused(one.path, rf"pickles \({name}\).*refused")
    if not name.endswith(".json"):
        refused(one.path / name, "is a pickle, which runs code .* safe_serialization=True")


def test_pickles_beside_safetensors_do_no_harm(checkpoint):
    one = checkpoint("llama")
    (one.path / "training_args.bin").write_bytes(b"\x80\x04")
    load(one.path)


# ---------------------------------------------------------------------------------------- quantised


def edited(q, to, **changes):
    """A quantised checkpoint with tensors changed: name -> tensor, or None to remove it."""
    shutil.copytree(q.path, to)
    state = load_file(to / "model.safetensors")
    for name, tensor in changes.items():
        state.pop(name, None)
        if tensor is not None:
            state[name] = tensor
    save_file(state, to / "model.safetensors")
    return to


@pytest.mark.parametrize("dtype", [None, torch.float32])
@pytest.mark.parametrize("kind", ["fp8", "fp4"])
def test_scales_that_do_not_fit(quantised, tmp_path, kind, dtype):
    q = quantised(kind)
    stem = "layers.1.ffn.experts.3.w1." if kind == "fp4" else "model.layers.1.mlp.experts.3.gate_proj."
    weight, scale = stem + "weight", stem + ("scale" if kind == "fp4" else "weight_scale_inv")
    file_weight = weight if weight in q.tensors() else "model." + weight
    file_scale = scale if scale in q.tensors() else "model." + scale
    good = q.tensors()[file_scale]

    def bad(name, *patterns, **changes):
        refused(edited(q, tmp_path / name, **changes), *patterns, dtype=dtype)

    bad(
        "a",
        rf"1 quantised weights without scales: \S*{weight} in .*expected \S*{scale}",
        **{file_scale: None},
    )
    bad("b", rf"1 missing tensors: {weight}", rf"1 scales without weights: \S*{scale}", **{file_weight: None})
    wanted = (
        r"\[32, 2\] for \[32, 64\] in blocks of \[1, 32\]" if kind == "fp4" else r"\[2, 3\] for .* \[24, 24\]"
    )
    bad(
        "c",
        rf"1 misshapen scales: \S*{scale} in .*: expected {wanted}, found \[1, ",
        **{file_scale: good[:1].clone()},
    )
    bad(
        "d",
        rf"1 scales of a wrong type: \S*{scale} .*expected F32 or F8_E8M0, found F16",
        **{file_scale: good.half()},
    )
    poisoned = good.clone()
    poisoned.view(torch.uint8).view(-1)[-4:] = 0xFF  # NaN in fp32 and in e8m0
    bad(
        "e",
        rf"{scale} in model.safetensors: expected finite scales, found \d NaN or infinite",
        **{file_scale: poisoned},
    )
    plain = torch.zeros(32, 64, dtype=torch.bfloat16)
    bad("f", rf"1 scales beside weights that are not quantised: \S*{scale}", r"1 stacks of mixed types: experts of "
        r"layers.1.ff.experts.gate.weight: expected one type, found BF16, ", **{file_weight: plain})  # fmt: skip
    bad("g", rf"1 scales without weights: \S*{stem}x", **{file_scale.replace(stem, stem + "x."): good})


def test_poisoned_scales_of_a_plain_matrix(quantised, tmp_path):
    q = quantised("ue8m0")
    name = "model.layers.0.self_attn.o_proj.weight_scale_inv"
    path = edited(q, tmp_path / "nan", **{name: torch.full_like(q.tensors()[name], float("nan"))})
    for options in ({}, {"mapped": False}, {"dtype": torch.bfloat16}):
        refused(
            path,
            r"o_proj.weight_scale_inv in model.safetensors: expected finite scales, found \d+ NaN",
            **options,
        )


def test_codes_that_the_config_does_not_announce(quantised, tmp_path):
    q = quantised("fp8")
    config = json.loads((q.path / "config.json").read_text())
    del config["quantization_config"]
    (q.path / "config.json").write_text(json.dumps(config))
    refused(
        q.path,
        r"FP8 weights in a config.json without quantization_config: model.layers.0.\S+ in model.safetensors; .* more",
    )


def test_codes_of_another_format_than_announced(quantised, tmp_path):
    q = quantised("fp4")
    config = json.loads((q.path / "config.json").read_text())
    del config["expert_dtype"]
    (q.path / "config.json").write_text(json.dumps(config))
    refused(
        q.path,
        r"tensors of a wrong type: model.layers.0.ffn.experts.0.w1.weight in .*: expected F8_E4M3, found I8",
    )


def test_codes_where_only_numbers_may_be(quantised, tmp_path):
    q = quantised("fp8")
    path = edited(q, tmp_path / "x", **{"model.norm.weight": torch.ones(64).to(torch.float8_e4m3fn)})
    refused(
        path, r"model.norm.weight in model.safetensors: expected F64 or F32 or F16 or BF16, found F8_E4M3"
    )


# ------------------------------------------------------------------------------------------- hostile


def deep(depth=100_000):
    return "[" * depth + "]" * depth


def test_files_made_to_break_the_reader(checkpoint):
    one = checkpoint("llama")
    file, config = one.path / "model.safetensors", one.path / "config.json"
    good, good_config = file.read_bytes(), config.read_text()
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    for bad in (
        {"dtype": ["F32"]},
        {"dtype": {}},
        {"dtype": None},
        {"shape": 3},
        {"shape": [[1]]},
        {"shape": [True]},
        {"data_offsets": None},
        {"data_offsets": [0, 4, 8]},
        {"data_offsets": "04"},
    ):
        rewrite(file, lambda h, bad=bad: {"a": entry | bad})
        refused(one.path, "the entry of a is malformed")
        file.write_bytes(good)
    rewrite(file, lambda h: {"a": 3})
    refused(one.path, "the entry of a is malformed")
    file.write_bytes(good)
    rewrite(file, lambda h: deep().encode())
    refused(one.path, "its header is not JSON")
    file.write_bytes(good)
    config.write_text(deep())
    refused(one.path, "config.json: can't be read as JSON")
    config.write_text(good_config[:-2] + ', "torch_dtype": "float32", "torch_dtype": "bfloat16"}')
    refused(one.path, "'torch_dtype' stands in it twice")
    for depth in (300, 600, 900):  # Python's own JSON reader takes these
        config.write_text(good_config[:-2] + ', "extra": ' + deep(depth) + "}")
        with warnings.catch_warnings(), contextlib.suppress(CheckpointError, ConfigError):
            warnings.simplefilter("ignore")
            load(one.path)
    config.unlink()
    config.mkdir()
    refused(one.path, "config.json: can't be read")
    config.rmdir()
    config.write_text(good_config)
    file.unlink()
    file.mkdir()
    refused(one.path, "model.safetensors: ")
    file.rmdir()
    index = one.path / "model.safetensors.index.json"
    index.write_text(deep())
    refused(one.path, "index.json: can't be read as JSON")
    index.write_text('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}')
    refused(one.path, "index.json: .*'a' stands in it twice")
    index.write_text('{"weight_map": {"a": "", "b": "."}}')
    refused(one.path, r"names \d files that are not in the directory")


@pytest.mark.parametrize("name", ["x" * 300, "x/" * 3000, "nul\0byte", "x" * 300 + ".gguf"])
def test_paths_that_the_system_refuses(name):
    refused(name, "(can't be read|does not exist)")
    with pytest.raises(CheckpointError, match="is neither a path nor a hub id|is not a hub id"):
        resolve(name)


def test_a_path_below_a_file(checkpoint):
    one = checkpoint("llama")
    refused(one.path / "config.json" / "x", "does not exist")


def test_layers_of_multi_token_prediction_that_are_not_declared(made, tmp_path):
    one = made("deepseek_v3").changed(
        tmp_path,
        {"model.layers.3.enorm.weight": torch.ones(64), "model.layers.3.hnorm.weight": torch.ones(64)},
    )
    refused(one.path, "2 unexpected tensors", r"of layer 3 and on.*set num_nextn_predict_layers to")
