"""Peers' libraries: used by the rules alone, never needed, and left alone once one fails. A stand-in takes the place of
the real one, which is tested where it is installed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rorqual.kernels import fp8_linear, gpu, peers
from rorqual.kernels.mla_decode import mla_decode, reference
from rorqual.kernels.mode import invariant
from rorqual.kernels.quant import dequantize_fp8
from tests.interpreter import repair


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Any device will do, and sizes from which peers are used are as small as the tests."""
    monkeypatch.setattr(peers, "_hopper", lambda device: True)
    monkeypatch.setattr(peers, "KEYS", 256)
    monkeypatch.setattr(peers, "ROWS", 64)
    monkeypatch.setattr(peers, "OUT", 128)
    monkeypatch.setattr(peers, "_failed", set())
    monkeypatch.delenv("RORQUAL_PEERS", raising=False)
    peers._imported.cache_clear()
    yield
    peers._imported.cache_clear()


@pytest.fixture
def flash_mla(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A stand-in for FlashMLA that computes by our definition and counts its calls."""
    calls: list[Any] = []

    def attend(
        q: Tensor, pages: Tensor, table: Tensor, ends: Tensor, rank: int, schedule: Any, **given: Any
    ) -> Any:
        calls.append(schedule)
        assert given["causal"] and given["use_legacy"] and pages.shape[2] == 1
        out = reference(
            q.flatten(0, 1),
            pages[:, :, 0],
            table,
            ends,
            width=q.shape[1],
            rank=rank,
            scale=given["softmax_scale"],
        )
        return out.view(*q.shape[:-1], rank), None

    module = SimpleNamespace(
        get_mla_metadata=lambda: (object(), None), flash_mla_with_kvcache=attend, calls=calls
    )
    monkeypatch.setitem(sys.modules, "flash_mla", module)
    return module


def decode_inputs(
    heads: int, width: int = 1, size: int = 64, device: str = "cpu", dtype: Any = torch.bfloat16
) -> Any:
    q = torch.randn(2 * width, heads, 576, device=device, dtype=dtype)
    pages = torch.randn(5, size, 576, device=device, dtype=dtype)
    table = torch.tensor([[1, 3], [4, 2]], dtype=torch.int32, device=device)
    return (q, pages, table, torch.tensor([size + 6, size], dtype=torch.int32, device=device)), {
        "width": width,
        "rank": 512,
        "scale": 0.04,
    }


@pytest.mark.parametrize(("heads", "width"), [(64, 2), (128, 1), (128, 2)])
def test_wide_decodes_go_to_the_peer(flash_mla: SimpleNamespace, heads: int, width: int) -> None:
    x, given = decode_inputs(heads, width)
    for _ in range(3):  # three layers of one pass
        assert torch.equal(mla_decode(*x, **given), reference(*x, **given))
    first, second, third = flash_mla.calls
    assert first is second is third, "one schedule a pass"
    fresh = (*x[:3], x[3] - 1)
    mla_decode(*fresh, **given)
    assert flash_mla.calls[-1] is not first
    x[3].sub_(1)  # other lengths in the same tensor
    mla_decode(*x, **given)
    assert flash_mla.calls[-1] is not first


def test_many_sequences_go_to_the_peer(flash_mla: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one block of rows each, if they are short, and of more whatever they hold."""
    monkeypatch.setattr(peers, "KEYS", 257)
    for heads, blocks, short in ((64, 2, 128), (128, 4, 0)):
        monkeypatch.setattr(peers, "BLOCKS", blocks)
        monkeypatch.setattr(peers, "SHORT", short)
        x, given = decode_inputs(heads)
        assert torch.equal(mla_decode(*x, **given), reference(*x, **given))
    assert len(flash_mla.calls) == 2


def test_what_stays_with_us(flash_mla: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    for shape in (
        {"heads": 16},
        {"heads": 64},
        {"heads": 128, "size": 32},
        {"heads": 128, "dtype": torch.float32},
    ):
        x, given = decode_inputs(**shape)  # type: ignore[arg-type]
        mla_decode(*x, **given)
    x, given = decode_inputs(128)
    monkeypatch.setattr(peers, "KEYS", 257)
    mla_decode(*x, **given)
    monkeypatch.setattr(peers, "BLOCKS", 2)
    monkeypatch.setattr(peers, "SHORT", 127)
    few, queries = decode_inputs(64)
    mla_decode(*few, **queries)
    monkeypatch.setattr(peers, "BLOCKS", 128)
    monkeypatch.setattr(peers, "KEYS", 256)
    mla_decode(*x, **given, splits="fixed")
    with invariant():
        mla_decode(*x, **given)
    monkeypatch.setenv("RORQUAL_PEERS", "0")
    mla_decode(*x, **given)
    assert not flash_mla.calls


def test_without_the_library_nothing_changes(
    flash_mla: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "flash_mla", None)  # importing it raises
    x, given = decode_inputs(128)
    assert torch.equal(mla_decode(*x, **given), reference(*x, **given))


def test_a_library_that_fails_is_left_alone(
    flash_mla: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        flash_mla.calls.append("tried")
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(flash_mla, "flash_mla_with_kvcache", broken)
    x, given = decode_inputs(128)
    with pytest.warns(UserWarning, match="flash_mla failed.*no kernel image"):
        assert torch.equal(mla_decode(*x, **given), reference(*x, **given))
    mla_decode(*x, **given)
    assert flash_mla.calls == ["tried"]


# ------------------------------------------------------------------------------------------------ FP8


def product_inputs() -> tuple[Tensor, Tensor, Tensor]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    codes = torch.randn(128, 256, device=device).to(torch.float8_e4m3fn)
    return torch.randn(70, 256, device=device).bfloat16(), codes, torch.rand(1, 2, device=device) + 0.5


def test_products_go_to_the_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []

    def product(a: Any, b: Any, y: Tensor, disable_ue8m0_cast: bool) -> None:
        assert disable_ue8m0_cast and a[1].stride(0) == 1, "scales lie rows side by side"
        shapes.append((tuple(a[0].shape), tuple(b[0].shape)))
        x = dequantize_fp8(*a, (1, 128), torch.float32)
        y.copy_(x @ dequantize_fp8(*b, (128, 128), torch.float32).T)

    monkeypatch.setitem(sys.modules, "deep_gemm", SimpleNamespace(fp8_gemm_nt=product))
    monkeypatch.setattr(fp8_linear, "usable", lambda *_: gpu.INSTALLED)
    if not gpu.INSTALLED:
        pytest.skip("Triton is not installed")
    if not torch.cuda.is_available():
        repair(monkeypatch)
    x, codes, scale = product_inputs()
    for bias in (None, torch.randn(128, device=x.device).bfloat16()):
        got = fp8_linear.fp8_linear(x, codes, scale, bias=bias)
        torch.testing.assert_close(got, fp8_linear.fast(x, codes, scale, bias), atol=0.05, rtol=0.02)
    assert shapes == [((70, 256), (128, 256))] * 2
    fp8_linear.fp8_linear(x[:63], codes, scale)  # too few rows, scales of another kind, invariant mode
    fp8_linear.fp8_linear(
        x, codes, torch.full((1, 2), 127, dtype=torch.uint8, device=x.device).view(torch.float8_e8m0fnu)
    )
    with invariant():
        fp8_linear.fp8_linear(x, codes, scale)
    assert len(shapes) == 2


# ----------------------------------------------------------------------------------------- the real ones


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "width"), [(64, 2), (128, 1), (128, 2)])
def test_flash_mla(heads: int, width: int) -> None:
    pytest.importorskip("flash_mla")
    x, given = decode_inputs(heads, width, device="cuda")
    x[3][1] = 0  # a padding sequence
    got = peers.mla_decode(*x, **given)
    assert got is not None
    torch.testing.assert_close(got, reference(*x, **given), atol=2e-2, rtol=2e-2)


@pytest.mark.gpu
def test_deep_gemm() -> None:
    pytest.importorskip("deep_gemm")
    x, codes, scale = product_inputs()
    got = peers.fp8_linear(x, codes, scale, None, fp8_linear.quantize_fast)
    assert got is not None
    torch.testing.assert_close(got, fp8_linear.fast(x, codes, scale), atol=0.05, rtol=0.02)
