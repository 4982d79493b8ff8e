"""FP8 training: codes both ways, the three products and their gradients, against what the codes stand for."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from rorqual.kernels import fp8_train as op
from rorqual.kernels import fp8_train_dense as dense
from rorqual.kernels import fp8_train_experts as routed
from rorqual.kernels import fp8_train_products as products
from rorqual.kernels import fp8_train_quant as quant
from rorqual.kernels import fp8_train_swiglu as gated
from rorqual.kernels import mla_grad
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


@pytest.mark.parametrize(("second", "width"), [(72, 200), (128, 256)])
def test_weights_are_quantised_both_ways_and_side_by_side(
    device: torch.device, second: int, width: int
) -> None:
    one, two = (torch.randn(2, out, width, device=device) * 0.1 for out in (128, second))
    made = quant.empty_matrices(2, 256, width, device)
    for first, w in ((0, one), (128, two)):
        quant.quantize_matrices(w, made, first)
        codes, scale = quant.matrices_reference(w.cpu())
        assert torch.equal(made[0].codes[:, first : first + 128].cpu().float(), codes.float())
        assert torch.equal(made[0].scale[:, first // 128 : first // 128 + 1].cpu(), scale)
    assert torch.equal(made[1].codes.cpu().float(), made[0].codes.transpose(1, 2).cpu().float())
    assert torch.equal(made[1].scale.cpu(), made[0].scale.transpose(1, 2).cpu())
    with pytest.raises(QuantError, match="do not fit"):
        quant.quantize_matrices(one, made, 192)


def test_whole_blocks_of_weights_by_the_kernel(device: torch.device) -> None:
    w = (torch.randn(2, 128, 256, device=device) * 0.1).bfloat16()
    made = quant.empty_matrices(2, 128, 256, device)
    quant.matrices_fast(w, *(t for m in made for t in (m.codes, m.scale)))
    codes, scale = quant.matrices_reference(w.cpu())
    assert torch.equal(made[0].codes.cpu().float(), codes.float()) and torch.equal(made[0].scale.cpu(), scale)
    assert torch.equal(made[1].codes.cpu().float(), codes.transpose(1, 2).float())
    assert torch.equal(made[1].scale.cpu(), scale.transpose(1, 2))


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


def test_gradients_in_parts(device: torch.device) -> None:
    """Tokens in parts give the same sums; as many parts as fill the processors, one where tiles do."""
    x, dy = (torch.randn(640, width, device=device).bfloat16() for width in (256, 100))
    turned = [quant.quantize_both(t)[1] for t in (dy, x)]
    want = dense.in_parts(*turned, 100, 256, torch.float32, 1)
    for parts in (2, 5):
        assert apart(dense.in_parts(*turned, 100, 256, torch.float32, parts), want) < 1e-5
    assert apart(dense.dense_matrix(*turned, 100, 256, torch.bfloat16), want) < 2**-8
    add = torch.ones(100, 256, device=device)
    assert apart(dense.dense_matrix(*turned, 100, 256, torch.float32, add), want + 1) < 1e-5
    assert dense.parts_of(72, 512, 1536 * 1536, 132) == 5 and dense.parts_of(768, 512, 16384 * 1536, 132) == 1


def test_refusals_are_by_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """What cuBLASLt refuses is multiplied here, and it is not asked again; other shapes still go to it."""
    asked = []

    def library(a: Tensor, b: Tensor, *scales: Tensor, out_dtype: torch.dtype) -> Tensor:
        asked.append((*a.shape, b.shape[1]))
        if b.shape[1] == 256:
            raise RuntimeError("no such product")
        return torch.full((a.shape[0], b.shape[1]), 7.0, dtype=out_dtype)

    monkeypatch.setattr(torch, "_scaled_mm", library)
    monkeypatch.setattr(dense, "_hopper", lambda _: True)
    monkeypatch.setattr(dense, "_refused", set())
    found = []
    for out in (256, 208, 256, 208, 200):  # 200 is not in 16s
        w = quant.empty_matrices(1, out, 512, torch.device("cpu"))
        quant.quantize_matrices(torch.randn(1, out, 512), w)
        x = quant.quantize_along(torch.randn(128, 512).bfloat16())
        with pytest.warns(UserWarning, match="refuses") if not found else contextlib.nullcontext():
            found.append(dense.dense_rows(x, w[0], out, torch.bfloat16))
        want = products.rows_reference(x, w[0], products.whole(128, x.codes.device), out, torch.bfloat16)
        assert torch.equal(found[-1], torch.full_like(want, 7) if out == 208 else want)
    assert asked == [(128, 512, 256), (128, 512, 208), (128, 512, 208)]


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


def by_codes(x: Tensor, pow2: bool, floor: float = FP8_FLOOR) -> tuple[Tensor, Tensor]:
    """What x's codes in runs of channels stand for, and those in runs of tokens."""
    along, turned = quant.rows_reference(x, pow2, floor)
    found = values(along).float(), values(turned).float().T
    return found[0][: len(x), : x.shape[1]], found[1][: len(x), : x.shape[1]]


def by_blocks(w: Tensor) -> Tensor:
    codes, scale = quant.matrices_reference(w[None])
    return dequantize_fp8(codes, scale, (128, 128), torch.float32)[0, : len(w), : w.shape[1]]


def multiplied_out(x: Tensor, slope: Tensor, *weights: Tensor) -> list[Tensor]:
    """y = x w^T of weights side by side, and the gradients of x and w: codes multiplied out, products in fp32."""
    (rows, rows_turned), (dy, dy_turned) = by_codes(x, False), by_codes(slope, False, GRADIENT_FLOOR)
    w = torch.cat([by_blocks(w) for w in weights])
    dws = (dy_turned.T @ rows_turned).split([len(w) for w in weights])
    return [(rows @ w.T).to(x.dtype), (dy @ w).to(x.dtype), *dws]


def swiglu_multiplied_out(
    x: Tensor, weight: Tensor | None, gate: Tensor, up: Tensor, down: Tensor, slope: Tensor, pow2: bool
) -> list[Tensor]:
    """The same for one expert: y and the gradients of x, the router's weights, gate, up and down."""
    (x_rows, x_turned), (dy, dy_turned) = by_codes(x, pow2), by_codes(slope, pow2, GRADIENT_FLOOR)
    first, last = [by_blocks(gate), by_blocks(up)], by_blocks(down)
    both = torch.cat([(x_rows @ w.T).to(x.dtype) for w in first], 1)
    leaves = [t.detach().float().requires_grad_() for t in (both, weight) if t is not None]
    h = gated.reference(leaves[0], None if weight is None else leaves[1], None)
    h_rows, h_turned = by_codes(h.detach(), pow2)
    dboth, *dweight = torch.autograd.grad(h, leaves, (dy @ last).to(x.dtype).float())
    parts = [by_codes(part, pow2, GRADIENT_FLOOR) for part in dboth.chunk(2, 1)]
    dx = sum(along @ w for (along, _), w in zip(parts, first, strict=True))
    y, dws = (h_rows @ last.T).to(x.dtype), [turned.T @ x_turned for _, turned in parts]
    return [y, torch.as_tensor(dx).to(x.dtype), *dweight, *dws, dy_turned.T @ h_turned]


def test_linears_are_their_codes_multiplied_out(device: torch.device) -> None:
    x, weights = torch.randn(70, 200).bfloat16(), [torch.randn(out, 200) * 0.1 for out in (128, 72)]
    slope = torch.randn(70, 200).bfloat16() * 1e-6
    there = [t.to(device).requires_grad_() for t in (x, *weights)]
    y = op.linear(*there)
    wants = multiplied_out(x, slope, *weights)
    for found, want in zip(gradients(y, slope.to(device), *there), wants, strict=True):
        assert found.shape == want.shape and apart(found, want) < (5e-3 if y.is_cuda else 1e-4)
    # Into buffers, and from rows of any shape.
    buffers = [torch.ones_like(there[1]), None]
    y = op.linear(there[0].unflatten(0, (7, 10)), *there[1:], into=buffers)
    y.flatten(0, 1).backward(slope.to(device))
    assert there[1].grad is None and buffers[0] is not None
    assert apart(buffers[0] - 1, wants[2]) < 0.1  # what 1e-6 leaves of itself beside 1
    assert apart(there[2].grad, wants[3]) < 5e-3


def routed_case(device: torch.device, kind: torch.dtype) -> tuple[Any, ...]:
    tokens, chosen, experts, width, depth = 150, 2, 3, 72, 136
    ids = torch.randint(-1, experts + 1, (tokens, chosen))
    ids[ids == 1] = 0  # nobody's
    x, add, slope = (torch.randn(tokens, depth).to(kind) for _ in range(3))
    weights = torch.rand(tokens, chosen)
    stacks = [torch.randn(experts, *size) * 0.1 for size in ((width, depth), (width, depth), (depth, width))]
    return ids.to(device), *(t.to(device) for t in (x, weights, *stacks, add)), (slope * 1e-5).to(device)


def test_experts_are_their_codes_multiplied_out(device: torch.device) -> None:
    ids, x, weights, gate, up, down, add, slope = routed_case(device, torch.bfloat16)
    leaves = [t.requires_grad_() for t in (x, weights, gate, up, down, add)]
    y = routed.routed_trained(x, ids, weights, gate, up, down, add_ND=add)
    found = gradients(y, slope, *leaves)
    ids, slope, x, weights, gate, up, down, add = (
        t.detach().cpu() for t in (ids, slope, x, weights, gate, up, down, add)
    )
    y, dx = add.float(), torch.zeros(x.shape)
    wants = [torch.zeros(w.shape) for w in (weights, gate, up, down)]
    for e in range(len(gate)):
        n, k = (ids == e).nonzero(as_tuple=True)
        if not len(n):
            continue
        one = swiglu_multiplied_out(x[n], weights[n, k], gate[e], up[e], down[e], slope[n], True)
        y.index_add_(0, n, one[0].float())
        dx.index_add_(0, n, one[1].float())
        wants[0][n, k] = one[2]
        for want, dw in zip(wants[1:], one[3:], strict=True):
            want[e] = dw
    # On a GPU sums differ in their last bits, and so some codes of what comes after, each by a step.
    bound = 1e-2 if found[0].is_cuda else 1e-4
    for got, want in zip(found, (y.bfloat16(), dx.bfloat16(), *wants, slope), strict=True):
        assert got.shape == want.shape and apart(got, want) < bound


def test_swiglu_is_its_codes_multiplied_out(device: torch.device) -> None:
    _, x, _, gate, up, down, _, slope = routed_case(device, torch.bfloat16)
    leaves = [t.requires_grad_() for t in (x, gate[0], up[0], down[0])]
    found = gradients(op.swiglu_trained(*leaves, None), slope, *leaves)
    given = [t.detach().cpu() for t in leaves]
    wants = swiglu_multiplied_out(given[0], None, *given[1:], slope.cpu(), False)
    for got, want in zip(found, wants, strict=True):
        assert got.shape == want.shape and apart(got, want) < (1e-2 if got.is_cuda else 1e-4)


def test_close_to_full_precision(device: torch.device) -> None:
    """Results and gradients lie as far from the unquantised ones as E4M3's three bits of fraction say: each side's
    rounding is some 2.5 % of its norm."""
    ids, x, weights, gate, up, down, _, slope = routed_case(device, torch.bfloat16)
    leaves = [t.requires_grad_() for t in (x, weights, gate, up, down)]

    def exact() -> Tensor:
        one_hot = (ids[..., None] == torch.arange(len(gate), device=device)).double()
        share_NE = (one_hot * weights.double()[..., None]).sum(1)
        h = torch.nn.functional.silu(torch.einsum("nd,ewd->enw", x.double(), gate.double()))
        h = h * torch.einsum("nd,ewd->enw", x.double(), up.double())
        return torch.einsum("enw,edw,ne->nd", h, down.double(), share_NE)

    y = routed.routed_trained(x, ids, weights, gate, up, down)
    wants = gradients(exact(), slope.double(), *leaves)
    for found, want in zip(gradients(y, slope, *leaves), wants, strict=True):
        assert 0.01 < apart(found, want) < 0.12  # three quantisations on the way, two of them of products
        assert found.dtype in (x.dtype, gate.dtype)
    w = gate[0].detach().requires_grad_()
    wants = gradients(x.double() @ w.double().T, slope[:, :72].double(), x, w)
    for found, want in zip(gradients(op.linear(x, w), slope[:, :72], x, w), wants, strict=True):
        assert 0.01 < apart(found, want) < 0.05


def test_experts_places_are_whole_tiles(device: torch.device) -> None:
    ids = routed_case(device, torch.float32)[0]
    places = routed.by_expert(ids, 3)
    ends, pairs = [0, *places.ends_E.tolist()], places.pair_P
    assert len(pairs) == (ids.numel() + 3 * 127) // 128 * 128
    for e, (begin, end) in enumerate(pairwise(ends)):
        mine = (ids.flatten() == e).nonzero().flatten()
        assert begin % 128 == 0 and end - begin == -(-len(mine) // 128) * 128
        assert torch.equal(pairs[begin : begin + len(mine)], mine)
        assert torch.equal(places.place_NK.flatten()[mine].cpu(), begin + torch.arange(len(mine)))
        assert (pairs[begin + len(mine) : end] == -1).all()
    assert (pairs[ends[-1] :] == -1).all()
    assert (places.place_NK[(ids < 0) | (ids > 2)] == -1).all()
    x = torch.randn(len(ids), 136, device=device)
    found = quant.rows_fast(x, True, FP8_FLOOR, None, True, pairs, 2)
    wants = quant.spread_reference(x.cpu(), pairs.cpu(), 2, True, FP8_FLOOR)
    for codes, want in zip(found, wants, strict=True):
        assert codes is not None
        same(codes, want)


@pytest.mark.parametrize("q_rank, keep", [(128, True), (None, False)])
def test_mla_is_close_to_full_precision(device: torch.device, q_rank: int | None, keep: bool) -> None:
    """All results and gradients, made anew or kept; the projections' own exactness is tested above."""
    batch, heads, width, rank, nope, rope, v = 2, 2, 192, 64, 64, 64, 128
    shape = mla_grad.Shape(batch, heads, nope, rope, rank, 128**-0.5, 1e-6, True, keep)
    first = heads * (nope + rope) if q_rank is None else q_rank

    def make(*size: int) -> Tensor:
        return (torch.randn(size) * size[-1] ** -0.5).to(device, torch.bfloat16).requires_grad_()

    def norm(size: int) -> Tensor:
        return torch.rand(size).add(0.5).to(device, torch.bfloat16).requires_grad_()

    up = None if q_rank is None else make(heads * (nope + rope), first)
    matrices = mla_grad.Matrices(
        make(first, width), None if up is None else norm(first), up,
        make(rank + rope, width), norm(rank), make(heads * (nope + v), rank),
    )  # fmt: skip
    turns = torch.arange(24)[:, None] * torch.logspace(0, -3, rope // 2)
    cos, sin = turns.cos().to(device), turns.sin().to(device)
    x = torch.randn(batch * 24, width).to(device, torch.bfloat16).requires_grad_()
    leaves = [x, *(t for t in vars(matrices).values() if t is not None)]
    slope = torch.randn(batch * 24, heads * v).to(device, torch.bfloat16)
    wants, found = (
        gradients(mla_grad.mla_trained(x, matrices, cos, sin, replace(shape, fp8=fp8)), slope, *leaves)
        for fp8 in (False, True)
    )
    for got, want in zip(found, wants, strict=True):
        assert got.shape == want.shape and 0.01 < apart(got, want) < 0.15


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
    with pytest.raises(QuantError, match="outputs in 128s"):
        op.linear(x, torch.randn(8, 128), torch.randn(8, 128))
    with pytest.raises(QuantError, match="gate, up and down"):
        op.swiglu_trained(x, torch.randn(64, 128), torch.randn(64, 128), torch.randn(64, 128), None)
    ids, p, w = torch.zeros(128, 1, dtype=torch.int64), torch.ones(128, 1), torch.randn(2, 64, 128)
    with pytest.raises(QuantError, match="gate, up and down"):
        routed.routed_trained(x, ids, p, w, w, w)
    with pytest.raises(QuantError, match="int32 ends"):
        Groups.of(torch.tensor([128]), 128)
