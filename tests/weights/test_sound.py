"""Codes, scales and values at the ends of their types: kept exactly, or refused by name."""

import warnings

import pytest
import torch

from rorqual.weights import CheckpointError, load, save
from tests.weights.test_save import saved
from tests.weights.tiny import Checkpoint, same_bytes

NAME = "model.layers.0.self_attn.o_proj.weight"
SCALE = NAME + "_scale_inv"


def with_matrix(quantised, to, change):
    """The FP8 checkpoint with the codes (as bytes) and scales of one matrix changed."""
    q = quantised("fp8")
    codes, scale = q.tensors()[NAME].view(torch.uint8).clone(), q.tensors()[SCALE].clone()
    change(codes, scale)
    return Checkpoint(q.path, q.ids, q.ids).changed(to, {NAME: codes.view(torch.float8_e4m3fn), SCALE: scale})


@pytest.mark.parametrize("code", [0x7F, 0xFF])
@pytest.mark.parametrize(
    "options", [{}, {"mapped": False}, {"dtype": torch.float32}, {"dtype": torch.float16}]
)
def test_codes_that_are_not_numbers_are_refused(quantised, tmp_path, code, options):
    def change(codes, scale):
        codes[5, 7] = code

    one = with_matrix(quantised, tmp_path / "x", change)
    with pytest.raises(CheckpointError, match=rf"{NAME} in model.safetensors: .* 1 FP8 codes of NaN"):
        load(one.path, **options)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float32, torch.float64])
def test_a_zero_scale_over_zeros_comes_back(quantised, tmp_path, dtype):
    def change(codes, scale):
        codes[:24, :24] = 0
        codes[3, 3] = 0x80  # minus zero
        scale[0, 0] = 0.0

    one = with_matrix(quantised, tmp_path / "x", change)
    save(load(one.path, dtype=dtype), tmp_path / "again")
    again = saved(tmp_path / "again")
    same_bytes({n: one.tensors()[n] for n in (NAME, SCALE)}, {n: again[n] for n in (NAME, SCALE)})


@pytest.mark.parametrize("value", [0.0, 1e-44, 3e36])
def test_scales_that_lose_codes_are_refused_unless_the_codes_are_kept(quantised, tmp_path, value):
    def change(codes, scale):
        codes[:24, :24] = (torch.arange(24 * 24) % 0x7F).to(torch.uint8).view(24, 24)
        scale[0, 0] = value

    one = with_matrix(quantised, tmp_path / "x", change)
    with pytest.raises(
        CheckpointError, match=rf"{NAME} in model.safetensors: scales of zero or near the end"
    ):
        load(one.path, dtype=torch.float32)
    save(load(one.path), tmp_path / "again")
    same_bytes(one.tensors(), saved(tmp_path / "again"))
    if value:
        save(load(one.path, dtype=torch.float64), tmp_path / "wide")
        same_bytes(one.tensors(), saved(tmp_path / "wide"))


@pytest.mark.parametrize("scale", [2.0**-120, 2.0**100])
def test_scales_that_only_look_extreme_are_read(quantised, tmp_path, scale):
    def change(codes, scales):
        scales[0, 0] = scale

    one = with_matrix(quantised, tmp_path / "x", change)
    save(load(one.path, dtype=torch.bfloat16), tmp_path / "again")
    again = saved(tmp_path / "again")
    same_bytes({n: one.tensors()[n] for n in (NAME, SCALE)}, {n: again[n] for n in (NAME, SCALE)})


def test_float16_says_what_it_loses(made, quantised, tmp_path):
    def change(codes, scale):
        codes[:24, :24] = 0x38  # 1.0
        scale[0, 0] = 1e-9

    one = with_matrix(quantised, tmp_path / "x", change)
    with pytest.warns(
        UserWarning, match=r"576 values too small for float16 became zero.*bfloat16 or float32"
    ):
        load(one.path, dtype=torch.float16)
    plain = made("llama").changed(tmp_path / "y", {"lm_head.weight": torch.full((96, 64), 1e-9)})
    with pytest.warns(UserWarning, match=r"6144 values too small for float16"):
        load(plain.path, dtype=torch.float16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(made("llama").path, dtype=torch.float16)
        load(plain.path, dtype=torch.bfloat16)


@pytest.mark.parametrize("kind", ["fp8", "fp4"])
def test_codes_or_scales_that_were_cast_are_not_written(quantised, tmp_path, kind):
    for part, dtype in (("weight", torch.bfloat16), ("scale", torch.bfloat16)):
        model = load(quantised(kind).path) if part == "weight" else load(tmp_path / kind / "codes")
        matrix = model.layers[1].ff.experts.gate
        held = getattr(matrix, part)
        cast = held.detach().float().to(dtype) if held.dtype != torch.int8 else held.detach().to(dtype)
        if part in matrix._buffers:
            matrix._buffers[part] = cast
        else:
            matrix._parameters[part] = torch.nn.Parameter(cast, requires_grad=False)
        for quantize in ("released", None):
            with pytest.raises(
                CheckpointError, match=r"experts.0.*can't be written: its codes are .*not be cast"
            ):
                save(model, tmp_path / "bad", quantize=quantize)
        assert not (tmp_path / "bad" / "model.safetensors").exists()


@pytest.mark.parametrize("options", [{}, {"mapped": False}, {"dtype": torch.bfloat16}])
def test_parameters_loaded_in_inference_mode_can_be_trained(quantised, options):
    with torch.inference_mode():
        model = load(quantised("fp8").path, **options)
    assert not any(t.is_inference() for t in model.state_dict(keep_vars=True).values())
    assert model.embed.weight.requires_grad
    (model.embed.weight.float() ** 2).sum().backward()
    assert model.embed.weight.grad is not None


@pytest.mark.parametrize("device", ["meta", "cuda:99", "nonsense", "hpu", ""])
def test_devices_that_can_not_be_used(made, device):
    with pytest.raises(ValueError, match="^device "):
        load(made("llama").path, device=device)
