"""What `rorqual inspect --fit` says is what the engine would do: shares as `spread` cuts them, pages as it lays them."""

from __future__ import annotations

import json

import pytest
import torch

from rorqual.cli import app
from rorqual.engine.fit import lines, machine, rank_bytes, room
from rorqual.family import ConfigError
from rorqual.family import config as member
from rorqual.nn import Transformer
from rorqual.nn.paged import page_bytes
from rorqual.nn.spread import spread
from tests.engine.conftest import config
from tests.engine.test_parallel import layout_of


@pytest.mark.parametrize("kind", ["gqa", "v3", "v32", "v4"])
@pytest.mark.parametrize(("data", "tensor"), [(1, 1), (2, 1), (1, 2)])
def test_weights_are_those_of_a_rank(kind: str, data: int, tensor: int) -> None:
    small = config(kind).replace(dtype="bfloat16")
    model = Transformer(small, dtype=torch.bfloat16, device="meta")
    if data * tensor > 1:
        model = spread(model, layout_of(data, tensor, 0))
    held = [*model.parameters(), *model.buffers()]
    real = sum(tensor.numel() * tensor.element_size() for tensor in held)
    assert real <= rank_bytes(small, data, tensor, "bf16") <= 1.003 * real


def test_caches_are_the_engine_s() -> None:
    found = room(member("deepseek-v3"), machine("8xH200"), context=32768, requests=64)
    assert (found.data, found.tensor, found.precision, found.token) == (8, 1, "fp8", 70272)
    left = 141 * 10**9 * 9 // 10 - 2 * 10**9 - found.weights
    assert found.caches == left and found.sequences == left // (70272 * 32768) * 8 and found.fits
    assert not room(member("deepseek-v3"), machine("8xH200"), context=32768, requests=200).fits
    whole = room(member("deepseek-v3"), machine("8xH200"), context=32768, tensor=8)
    assert (
        whole.weights < found.weights and whole.sequences < found.sequences
    )  # latents are whole on each rank
    eighth = room(member("deepseek-v3.2"), machine("8xH200"), context=9, fp8_cache=True)
    lanes = Transformer(member("deepseek-v3.2"), dtype=torch.bfloat16, device="meta").lanes(True)[:61]
    assert eighth.token == page_bytes(lanes, 64) / 64
    shared = room(member("r1-distill-llama-70b"), machine("4x80gb"), context=9)
    assert (shared.data, shared.tensor, shared.token) == (1, 4, 327680 / 4)
    flash = room(member("deepseek-v4-flash"), machine("2xH200"), context=9, requests=64)
    assert flash.windows == 2 * 32 * 23_298_048


def test_machines() -> None:
    assert machine("8xH200").count == 8 and machine("h100").device.memory == 80 * 10**9
    assert machine("2x48gb").device.memory == 48 * 10**9 and machine("cpu16gb").cpu
    for wrong in ("", "8x", "0xH200", "z80", "2xcpu16gb", "x" * 500):
        with pytest.raises(ConfigError, match="unknown"):
            machine(wrong)
    assert room(member("deepseek-v2-lite"), machine("24gb"), context=100).sequences == 0
    assert room(member("deepseek-v2-lite"), machine("cpu16gb"), context=100).sequences == 0


def test_what_can_not_be_laid_out() -> None:
    for options, told in (
        ({"tensor": 3}, "are not the 8 devices"),
        ({"data": 3}, "are not the 8 devices"),
        ({"context": 0}, "at least 1"),
    ):
        with pytest.raises(ConfigError, match=told):
            room(member("deepseek-v3"), machine("8xH200"), **{"context": 9, **options})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="4 heads or groups of them don't divide by 8"):
        room(member("r1-distill-qwen-7b"), machine("8x24gb"), context=9)


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    call = ["inspect", "deepseek-v3", "--fit", "8xH200", "--context", "32768", "--batch", "64"]
    found = room(member("deepseek-v3"), machine("8xH200"), context=32768, requests=64)
    app(call, result_action="return_value")
    assert capsys.readouterr().out.splitlines() == lines(found, 32768)
    app([*call, "--json"], result_action="return_value")
    told = json.loads(capsys.readouterr().out)
    assert told["sequences"] == found.sequences and told["fits"] is True
    with pytest.raises(ValueError, match="--fit MACHINE"):
        app(["inspect", "deepseek-v3", "--tensor", "2"], exit_on_error=False)
