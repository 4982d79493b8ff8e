"""FP8 training: codes both ways, the three products and their gradients, against what the codes stand for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rorqual.kernels import fp8_train as op
from rorqual.kernels import fp8_train_products as products
from rorqual.kernels import fp8_train_quant as quant
from rorqual.kernels import fp8_train_swiglu as gated
from rorqual.kernels.fp8_train_products import Groups, padded_ends
from rorqual.kernels.fp8_train_quant import GRADIENT_FLOOR, Codes
from rorqual.kernels.quant import FP8, FP8_FLOOR, QuantError, dequantize_fp8
from tests.interpreter import repair


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    repair(monkeypatch)


def values(codes: Codes) -> Tensor:
    """What codes stand for, in fp64 on the CPU."""
    return dequantize_fp8(codes.codes.cpu(), codes.scale.cpu(), (1, 128), torch.float64)


def same(found: Codes, want: Codes, end: int | None = None) -> None:
    assert found.codes.dtype == FP8 and found.scale.stride(0) == 1
    assert torch.equal(found.scale.cpu()[:end], want.scale.cpu()[:end])
    assert torch.equal(found.codes.cpu().float()[:end], want.codes.cpu().float()[:end])


def apart(found: Tensor, want: Tensor) -> float:
    found, want = found.detach().cpu().double(), want.detach().cpu().double()
    return float((found - want).norm() / want.norm())


@pytest.mark.parametrize(
    "pow2, floor, dtype", [(False, FP8_FLOOR, torch.bfloat16), (True, GRADIENT_FLOOR, torch.float32)]
)
@pytest.mark.parametrize("rows, width, end", [(128, 256, None), (130, 72, None), (256, 128, 128)])
def test_rows_are_quantised_both_ways(
    device: torch.device, rows: int, width: int, end: int | None, pow2: bool, floor: float, dtype: torch.dtype
) -> None:
    x = (torch.randn(rows, width) * torch.logspace(-9, 3, rows)[:, None]).to(device, dtype)
    x[:, 3] = 0
    x[5] = 0
    until = None if end is None else torch.tensor([end], dtype=torch.int32, device=device)
    along, turned = quant.rows_fast(x, pow2, floor, until)
    assert turned is not None
    wants = quant.rows_reference(x.cpu(), pow2, floor, None if until is None else until.cpu())
    same(along, wants[0], end)
    columns = None if end is None else end // 128
    assert torch.equal(turned.codes.cpu().float()[:, :end], wants[1].codes.float()[:, :end])
    assert torch.equal(turned.scale.cpu()[:, :columns], wants[1].scale[:, :columns])
    same(quant.rows_fast(x, pow2, floor, until, both=False)[0], wants[0], end)
    # Both stand for x, to half a step of E4M3's three bits of fraction (of two with scales rounded up, near zero).
    real = x.cpu().double()[:end]
    for found in (values(along)[:rows][:end, :width], values(turned).T[:rows][:end, :width]):
        assert apart(found, real) < 2**-4.5
    # A gradient far below the floor of activations keeps its bits.
    if floor == GRADIENT_FLOOR:
        assert apart(values(along)[6:7, :width], real[6:7]) < 2**-4.5


def test_weights_are_quantised_both_ways_and_side_by_side(device: torch.device) -> None:
    one, two = (torch.randn(2, out, 200, device=device) * 0.1 for out in (128, 72))
    made = quant.empty_matrices(2, 256, 200, device)
    for first, w in ((0, one), (128, two)):
        quant.quantize_matrices(w, made, first)
        codes, scale = quant.matrices_reference(w.cpu())
        assert torch.equal(made[0].codes[:, first : first + 128].cpu().float(), codes.float())
        assert torch.equal(made[0].scale[:, first // 128 : first // 128 + 1].cpu(), scale)
    assert torch.equal(made[1].codes.cpu().float(), made[0].codes.transpose(1, 2).cpu().float())
    assert torch.equal(made[1].scale.cpu(), made[0].scale.transpose(1, 2).cpu())
    with pytest.raises(QuantError, match="do not fit"):
        quant.quantize_matrices(one, made, 192)


def case(device: torch.device, counts: list[int], out: int, width: int, spare: int = 0) -> tuple[Any, ...]:
    """Rows by expert, filled up with zeros and `spare` rows that are nobody's; matrices; their gradient."""
    ends = padded_ends(torch.tensor(counts))
    rows = int(ends[-1]) + spare
    x, dy = torch.zeros(rows, width), torch.zeros(rows, out)
    for count, begin in zip(counts, [0, *ends.tolist()], strict=False):
        x[begin : begin + count] = torch.randn(count, width)
        dy[begin : begin + count] = torch.randn(count, out) * 1e-6
    w = torch.randn(len(counts), out, width) * width**-0.5
    groups = Groups.of(ends.to(device), rows)
    return x.to(device, torch.bfloat16), w.to(device), dy.to(device, torch.bfloat16), groups


@pytest.mark.parametrize(
    "counts, out, width, spare",
    [([100, 0, 130], 200, 256, 128), ([256], 72, 130, 0), ([3, 140], 384, 300, 256)],
)
def test_products(device: torch.device, counts: list[int], out: int, width: int, spare: int) -> None:
    """All three in the portable form and in the one that is used here, against fp64 products of what the codes
    stand for; rows that are nobody's give zeros."""
    x, w, dy, groups = case(device, counts, out, width, spare)
    w_codes, w_turned = quant.empty_matrices(len(counts), out, width, device)
    quant.quantize_matrices(w, (w_codes, w_turned))
    along, turned = quant.quantize_both(x)
    dy_along, dy_turned = quant.quantize_both(dy, floor=GRADIENT_FLOOR)
    matrix = dequantize_fp8(w_codes.codes.cpu(), w_codes.scale.cpu(), (128, 128), torch.float64)
    wants = [torch.zeros(len(x), out).double(), torch.zeros(len(x), width).double()]
    sums = torch.zeros(len(counts), out, width).double()
    for e, (begin, end) in enumerate(groups.spans()):
        wants[0][begin:end] = values(along)[begin:end] @ matrix[e, :out].T
        wants[1][begin:end] = values(dy_along)[begin:end] @ matrix[e, :, :width]
        sums[e] = values(dy_turned)[:out, begin:end] @ values(turned)[:width, begin:end].T
    # FP8 tensor cores add up 128 products with some 14 bits; the interpreter in fp32; results are bf16.
    bound = 2**-8
    for rows, matrices, want in ((along, w_codes, wants[0]), (dy_along, w_turned, wants[1])):
        y = torch.full(want.shape, float("nan"), device=device, dtype=torch.bfloat16)
        products.rows_fast(rows, matrices, groups, y)
        assert apart(y, want) < bound
        y = products.rows_product(rows, matrices, groups, want.shape[1])
        assert apart(y, want) < bound and not y[int(groups.end) :].any()
        more = products.rows_product(rows, matrices, groups, want.shape[1], add=y.clone())
        assert apart(more, 2 * want) < bound
    dw = torch.full(sums.shape, float("nan"), device=device)
    products.matrix_fast(dy_turned, turned, groups, dw)
    assert apart(dw, sums) < (2**-10 if dw.is_cuda else 2**-18)
    for dtype in (torch.float32, torch.bfloat16):
        dw = products.matrix_product(dy_turned, turned, groups, out, width, dtype)
        assert dw.dtype == dtype and apart(dw, sums) < bound
        assert not dw[[e for e, count in enumerate(counts) if not count]].any()
        assert apart(products.matrix_product(dy_turned, turned, groups, out, width, add=dw), 2 * sums) < bound


@pytest.mark.parametrize("limit, weighed", [(None, True), (0.5, False)])
def test_swiglu_codes(device: torch.device, limit: float | None, weighed: bool) -> None:
    both, slope = torch.randn(256, 512), torch.randn(256, 256) * 1e-5
    weights = torch.rand(256) if weighed else None
    there = [None if t is None else t.to(device) for t in (both, weights, slope)]
    end = torch.tensor([128], dtype=torch.int32)
    args = limit, True, False, end.to(device)
    h = gated.forward_fast(there[0], there[1], limit, True, end.to(device))  # type: ignore[arg-type]
    # Sigmoids differ by an ulp, so codes may by a step, on a border.
    want = gated.forward_reference(both, weights, limit, True, end)
    assert apart(values(h)[:128], values(want)[:128]) < 1e-3
    found = gated.backward_fast(there[0], there[1], there[2], *args)  # type: ignore[arg-type]
    wants = gated.backward_reference(both, weights, slope, limit, True, False, end)
    assert apart(values(found[0])[:, :128], values(wants[0])[:, :128]) < 1e-3
    assert apart(values(found[1])[:128], values(wants[1])[:128]) < 1e-3
    assert apart(values(found[2])[:, :128], values(wants[2])[:, :128]) < 1e-3
    if weighed:
        assert found[3] is not None and wants[3] is not None
        assert apart(found[3], wants[3]) < 1e-5 and not found[3][128:].any()


def gradients(y: Tensor, slope: Tensor, *of: Tensor) -> list[Tensor]:
    return [y, *torch.autograd.grad(y, of, slope, retain_graph=True)]


@pytest.mark.parametrize("grouped", [False, True])
def test_close_to_full_precision(device: torch.device, grouped: bool) -> None:
    """Results and gradients lie as far from the unquantised ones as E4M3's three bits of fraction say: each side's
    rounding is some 2.5 % of its norm."""
    counts, (out, width) = [100, 0, 130], (200, 256)
    x, w, dy, groups = case(device, counts, out, width, 128)
    if not grouped:
        x, w, dy, groups = x[:70].view(2, 35, -1), w[0], dy[:70].view(2, 35, -1), None
    down = (torch.randn(*w.shape[:-2], width, out, device=device) * out**-0.5).requires_grad_()
    x, w, up = x.requires_grad_(), w.requires_grad_(), (0.5 * w + 0.1 * w.flip(-1)).detach().requires_grad_()
    p = torch.rand(x.shape[:-1].numel(), device=device, requires_grad=True)

    def exact(y: Tensor, matrix: Tensor) -> Tensor:
        if groups is None:
            return y @ matrix.double().T
        parts = [y[a:b] @ matrix[e].double().T for e, (a, b) in enumerate(groups.spans())]
        return torch.cat([*parts, y.new_zeros(len(y) - int(groups.end), matrix.shape[1])])

    def exact_swiglu() -> Tensor:
        h = torch.nn.functional.silu(exact(x.double(), w)) * exact(x.double(), up)
        return exact(h * p.double().view(*h.shape[:-1], 1), down)

    first = gradients(op.linear(x, w, groups), dy, x, w)
    for found, want in zip(first, gradients(exact(x.double(), w), dy.double(), x, w), strict=True):
        assert 0.01 < apart(found, want) < 0.05
        assert found.dtype in (x.dtype, w.dtype)
    slope = torch.randn(x.shape, device=device).to(x.dtype)
    if groups is not None:
        slope[int(groups.end) :] = 0
    given = x, w, up, down, p
    y = op.swiglu(x, w, up, down, groups, p, powers=op.Powers(rows=True, slopes=True))
    for found, want in zip(
        gradients(y, slope, *given), gradients(exact_swiglu(), slope.double(), *given), strict=True
    ):
        assert 0.01 < apart(found, want) < 0.12  # three quantisations on the way, two of them of products


def test_linears_share_rows_and_add_into_buffers(device: torch.device) -> None:
    x = torch.randn(40, 136, device=device).bfloat16().requires_grad_()
    one, two = (torch.randn(out, 136, device=device, requires_grad=True) for out in (64, 264))
    ys = op.linears(x, (one, two))
    slopes = [torch.randn_like(y) for y in ys]
    together = torch.autograd.grad(ys, (x, one, two), slopes)
    alone = [gradients(op.linear(x, w), s, x, w) for w, s in zip((one, two), slopes, strict=True)]
    for y, found in zip(ys, alone, strict=True):
        assert torch.equal(y, found[0])
    assert apart(together[0], alone[0][1].float() + alone[1][1].float()) < 2**-7
    for found, own in zip(together[1:], alone, strict=True):
        assert torch.equal(found, own[2])
    buffers = [torch.ones_like(one), None]
    torch.autograd.backward(op.linears(x, (one, two), into=buffers), slopes)
    assert one.grad is None and buffers[0] is not None
    assert apart(buffers[0] - 1, alone[0][2]) < 1e-5 and torch.equal(two.grad, alone[1][2])  # type: ignore[arg-type]


def test_codes_follow_their_weight(device: torch.device) -> None:
    w = torch.randn(128, 128, device=device, requires_grad=True)
    x = torch.randn(128, 128, device=device).bfloat16()
    held = op.held_matrices((w,))
    before = op.linear(x, w)
    assert op.held_matrices((w,))[0] is held[0]
    y = op.linear(x, w)
    with torch.no_grad():
        w.mul_(-1)
    assert torch.equal(op.linear(x, w), -before) and op.held_matrices((w,))[0] is held[0]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    w.data.mul_(-1)  # not counted
    assert torch.equal(op.linear(x, w), -before)
    op.outdate()
    assert torch.equal(op.linear(x, w), before)
    size = len(op._held)
    del w, y, before
    assert len(op._held) == size - 1


def test_bad_shapes_are_named() -> None:
    x = torch.randn(128, 128)
    with pytest.raises(QuantError, match="rows of 128 channels meet a weight"):
        op.linear(x, torch.randn(8, 64))
    with pytest.raises(QuantError, match="gate, up and down"):
        op.swiglu(x, torch.randn(64, 128), torch.randn(64, 128), torch.randn(64, 128))
    with pytest.raises(QuantError, match="int32 ends"):
        Groups.of(torch.tensor([128]), 128)
    with pytest.raises(QuantError, match="128 rows, but groups of 256"):
        op.linear(x, torch.randn(1, 8, 128), Groups.of(torch.tensor([256], dtype=torch.int32), 256))
