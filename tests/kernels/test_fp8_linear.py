"""Quantised activations and products of FP8 codes, against rorqual.kernels.quant and fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rorqual.kernels import fp8_linear as op
from rorqual.kernels.quant import E8M0, FP8, QuantError, dequantize_fp8, quantize_fp8
from tests.interpreter import repair


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    repair(monkeypatch)


HOW: dict[str, dict[str, Any]] = {
    "few": {"FEW": True, "BO": 4, "num_warps": 1},
    "wide": {
        "BN": 16,
        "BO": 32,
        "SPLIT": 1,
        "STAGES": 2,
        "TALL": False,
        "num_warps": 4,
        "FETCH": 128,
        "UNROLL": 1,
    },
    "tall": {
        "BN": 16,
        "BO": 64,
        "SPLIT": 1,
        "STAGES": 2,
        "TALL": True,
        "num_warps": 4,
        "FETCH": 128,
        "UNROLL": 1,
    },
    "split": {
        "BN": 16,
        "BO": 64,
        "SPLIT": 2,
        "STAGES": 2,
        "TALL": True,
        "num_warps": 4,
        "FETCH": 128,
        "UNROLL": 2,
    },
}


def weight(out: int, width: int, device: torch.device, powers: bool = False) -> tuple[Tensor, Tensor]:
    """Codes whose blocks lie orders of magnitude apart, and their scales."""
    dense = torch.randn(out, width) * torch.logspace(-2, 2, out)[:, None] * torch.logspace(1, -1, width)
    codes, scale = quantize_fp8(dense, ue8m0=powers, scale_dtype=E8M0 if powers else torch.float32)
    return codes.to(device), scale.to(device)


def exact(x_codes: Tensor, x_scale: Tensor, codes: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The product in fp64, and the same of all magnitudes: what rounding errors are measured by."""
    x = dequantize_fp8(x_codes.cpu(), x_scale.cpu(), (1, 128), torch.float64)
    w = dequantize_fp8(codes.cpu(), scale.cpu(), (128, 128), torch.float64)
    return x @ w.T, x.abs() @ w.abs().T


def close(y: Tensor, want: tuple[Tensor, Tensor], bias: Tensor | float = 0.0) -> None:
    # FP8 tensor cores add up 128 products with some 14 bits; the interpreter in fp32.
    rtol = 2**-9 if y.dtype == torch.bfloat16 else 2**-18
    rtol = max(rtol, 2**-10) if y.is_cuda else rtol
    bias = torch.as_tensor(bias).cpu().double()
    assert y.isfinite().all()
    assert ((y.cpu().double() - want[0] - bias).abs() <= rtol * (want[1] + bias.abs())).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("pow2", [False, True])
@pytest.mark.parametrize(("rows", "width"), [(1, 128), (5, 320), (21, 72)])
def test_rows_are_quantised_as_defined(
    device: torch.device, rows: int, width: int, pow2: bool, dtype: torch.dtype
) -> None:
    x = (torch.randn(rows, 2 * width) * torch.logspace(-5, 3, rows)[:, None]).to(device, dtype)[:, :width]
    x[0, :128] = 0
    if rows > 2:
        x[2, 0] = 448 * 0.25  # a scale that is a power of two already
    codes, scale = op.quantize_fast(x, pow2)
    want, by = op.quantize_reference(x.cpu(), pow2)
    assert codes.dtype == FP8 and codes.shape == x.shape and scale.shape == by.shape
    assert torch.equal(scale.cpu(), by)
    assert torch.equal(codes.cpu().float(), want.float())
    for given, defined in zip(op.quantize_rows(x, pow2), (want, by), strict=True):
        assert given.shape == defined.shape and given.dtype == defined.dtype


@pytest.mark.parametrize("kind", list(HOW))
@pytest.mark.parametrize(
    ("rows", "out", "width", "powers"),
    [(1, 128, 256, False), (3, 200, 300, True), (19, 130, 128, False), (16, 72, 520, True)],
)
def test_close_to_fp64(
    device: torch.device, kind: str, rows: int, out: int, width: int, powers: bool
) -> None:
    x = (torch.randn(rows, width, device=device) * 3)[:, :width]
    codes, scale = weight(out, width, device, powers)
    bias = torch.randn(out, device=device)
    want = exact(*op.quantize_fast(x), codes, scale)
    close(op.fast(x, codes, scale, how=HOW[kind]), want)
    close(op.fast(x, codes, scale, bias, how=HOW[kind]), want, bias)
    want = exact(*op.quantize_reference(x), codes, scale)
    close(op.reference(x, codes, scale), want)


def test_powers_of_two_and_given_codes(device: torch.device) -> None:
    x = torch.randn(4, 256, device=device)
    codes, scale = weight(128, 256, device)
    held = op.quantize_fast(x, pow2=True)
    want = exact(*held, codes, scale)
    for how in (HOW["wide"], HOW["tall"]):
        close(op.fast(x, codes, scale, pow2=True, how=how), want)
    close(op.fast(x, codes, scale, how=HOW["tall"], quantized=held), want)


def test_public_op(device: torch.device) -> None:
    codes, scale = weight(96, 200, device)
    for rows in (0, 1, 33):
        x = torch.randn(rows, 200, device=device).bfloat16()
        y = op.fp8_linear(x, codes, scale)
        assert y.shape == (rows, 96) and y.dtype == torch.bfloat16
        if rows:
            close(y, exact(*op.quantize_reference(x.cpu()), codes, scale))
    codes, scale = weight(48, 512, device)
    x = torch.randn(301, 512, device=device).bfloat16()
    close(op.fp8_linear(x, codes, scale), exact(*op.quantize_reference(x.cpu()), codes, scale))
    small, by = quantize_fp8(torch.randn(96, 200, device=device), (64, 64))
    x = torch.randn(2, 200, device=device)
    codes_x, scale_x = op.quantize_reference(x)
    w = dequantize_fp8(small, by, (64, 64), torch.float64)
    want = dequantize_fp8(codes_x, scale_x, (1, 128), torch.float64) @ w.T
    assert torch.allclose(op.fp8_linear(x, small, by, (64, 64)).double(), want, rtol=1e-5, atol=1e-5)
    with pytest.raises(QuantError):
        op.reference(x, codes, scale[:, :1])


def test_same_bits_again(device: torch.device) -> None:
    x = torch.randn(7, 520, device=device)
    codes, scale = weight(100, 520, device)
    first = op.fast(x, codes, scale, how=HOW["split"])
    assert torch.equal(first, op.fast(x, codes, scale, how=HOW["split"]))


def test_fixed_form_gives_a_row_the_same_bits_in_any_company(device: torch.device) -> None:
    out, width = (70, 384) if device.type == "cpu" else (2112, 3072)
    sizes = (1, 2, 17, 40) if device.type == "cpu" else (1, 2, 17, 33, 64, 65, 300, 2500)
    codes, scale = weight(out, width, device)
    x = torch.randn(sizes[-1], width, device=device).to(torch.bfloat16)
    full = op.fixed(x, codes, scale)
    close(full, exact(*op.quantize_fast(x), codes, scale))
    for rows in sizes:
        assert torch.equal(op.fixed(x[:rows], codes, scale), full[:rows])
        assert torch.equal(op.fixed(x[-rows:], codes, scale), full[-rows:])


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("rows", "out", "width", "how"),
    [
        (64, 448, 2048, {"BN": 64, "STEPS": 16, "WIDE": 2, "STAGES": 3, "TALL": False}),
        (5, 200, 2048, {"BN": 16, "STEPS": 16, "WIDE": 4, "STAGES": 4, "TALL": True}),
        (40, 136, 3584, {"BN": 64, "STEPS": 14, "WIDE": 4, "STAGES": 2, "TALL": False}),
        (130, 72, 1024, {"BN": 128, "STEPS": 8, "WIDE": 1, "STAGES": 4, "TALL": False}),
    ],
)
@pytest.mark.parametrize("powers", [False, True])
def test_ring_close_to_fp64(rows: int, out: int, width: int, how: dict[str, Any], powers: bool) -> None:
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a Hopper GPU")
    how = {**how, "BO": 64, "num_warps": 8 if how["BN"] == 128 else 4}
    device = torch.device("cuda")
    x = torch.randn(rows, width, device=device) * torch.logspace(-2, 2, rows, device=device)[:, None]
    codes, scale = weight(out, width, device, powers)
    bias = torch.randn(out, device=device)
    held = op.quantize_fast(x, powers)
    want = exact(*held, codes, scale)
    ys = [
        op.fast(x, codes, scale, bias, powers, how=how, quantized=held),
        op.fast(x, codes, scale, bias, powers, how=how),
        op.fast(x, codes, scale, bias, powers, ahead=True, how=how),
    ]
    for y in ys:
        close(y, want, bias)
        assert torch.equal(y, ys[0])


@pytest.mark.gpu
def test_recorded_behind_a_copy_and_another_stream() -> None:
    """Dependent launches wait for whatever is before them: a fill, a copy, a kernel of another stream, x itself."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    device = torch.device("cuda")
    source = torch.zeros(64, 2048, device=device, dtype=torch.bfloat16)
    codes, scale = weight(1024, 2048, device)
    held, x, beside = torch.zeros_like(codes), torch.empty_like(source), torch.cuda.Stream()

    def run() -> tuple[Tensor, ...]:
        found = [torch.zeros(1 << 20, device=device)]
        x.copy_(source)  # a copy of memory, then x at once
        found.append(op.fp8_linear(x, codes, scale))
        held.copy_(codes)  # the weight itself is written by what is before
        found.append(op.fp8_linear(x, held, scale))
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            twice = x * 2
        torch.cuda.current_stream().wait_stream(beside)
        found.append(op.fp8_linear(twice, held, scale))
        held.zero_()
        found.append(op.fp8_linear(twice, held, scale))
        return tuple(found[1:])

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = run()
    for seed in range(20):
        source.copy_(torch.randn(64, 2048, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        want = op.reference(source, codes, scale).float(), op.reference(source * 2, codes, scale).float()
        for y, z in zip(recorded, (want[0], want[0], want[1], torch.zeros_like(want[0])), strict=True):
            assert float((y.float() - z).norm()) <= 5e-3 * float(z.norm())
