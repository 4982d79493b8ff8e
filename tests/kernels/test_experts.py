"""The routed feed-forward layer: kernels against the reference, the reference against plain arithmetic."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from rorqual.kernels import experts as op
from rorqual.kernels import experts_run, gluon_rings
from rorqual.kernels.experts import Plan, Shared, Tiles, Weights, fast, reference
from rorqual.kernels.experts_gather import gather_kernel
from rorqual.kernels.experts_triton import count_kernel, place_kernel, scan_kernel, sort_kernel, spread_kernel
from rorqual.kernels.quant import dequantize_fp8, quantize_fp8
from tests.interpreter import repair


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    repair(monkeypatch)


def stack(*shape: int, device: torch.device, dtype: torch.dtype) -> Weights:
    return Weights((torch.randn(*shape) * shape[-1] ** -0.5).to(device, dtype))


def as_codes(w: Weights) -> Weights:
    codes, scale = quantize_fp8(w.codes.float())
    return Weights(codes, scale, (128, 128))


def case(
    device: torch.device,
    tokens: int,
    chosen: int,
    count: int,
    hidden: int,
    width: int,
    shared: int = 0,
    dtype: torch.dtype = torch.float32,
    codes: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Weights, Weights, Weights, Shared | None]:
    def make(*shape: int) -> Weights:
        w = stack(*shape, device=device, dtype=dtype)
        return as_codes(w) if codes else w

    x = torch.randn(tokens, hidden).to(device, dtype)
    ids = torch.stack([torch.randperm(count)[:chosen] for _ in range(tokens)]).to(device)
    weights = torch.rand(tokens, chosen).to(device)
    wide = shared * width
    common = (make(wide, hidden), make(wide, hidden), make(hidden, wide)) if shared else None
    return (
        x,
        ids,
        weights,
        make(count, width, hidden),
        make(count, width, hidden),
        make(count, hidden, width),
        common,
    )


def exact(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate: Weights,
    up: Weights,
    down: Weights,
    shared: Shared | None,
    limit: float | None = None,
    add: Tensor | None = None,
    quantized: bool = False,
) -> Tensor:
    """The formula of the module's docstring in fp64, token by token; `quantized`: activations as E4M3 codes."""

    def coded(v: Tensor) -> Tensor:
        if not quantized:
            return v
        return dequantize_fp8(*quantize_fp8(v[None].float(), (1, 128)), (1, 128), torch.float64)[0]

    def matrix(w: Weights) -> Tensor:
        if w.scale is None:
            return w.codes.double()
        return dequantize_fp8(w.codes, w.scale, (128, 128), torch.float64)

    def through(x_D: Tensor, gate: Tensor, up: Tensor, down: Tensor, weight: float) -> Tensor:
        g, u = gate @ coded(x_D), up @ coded(x_D)
        if limit is not None:
            g, u = g.clamp(max=limit), u.clamp(-limit, limit)
        return down @ coded(g * torch.sigmoid(g) * u * weight)

    y = torch.zeros_like(x, dtype=torch.float64)
    g, u, d = matrix(gate), matrix(up), matrix(down)
    for n, k in itertools.product(range(ids.shape[0]), range(ids.shape[1])):
        e = int(ids[n, k])
        if 0 <= e < g.shape[0]:
            y[n] += through(x[n].double(), g[e], u[e], d[e], float(weights[n, k]))
    if shared is not None:
        common = [matrix(w) for w in shared]
        for n in range(x.shape[0]):
            y[n] += through(x[n].double(), *common, 1.0)
    return y if add is None else y + add.double()


def close(y: Tensor, expected: Tensor, tolerance: float) -> None:
    """Relative to the largest entry: what a dot product's rounding is relative to."""
    assert y.shape == expected.shape
    error = (y.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1e-9)
    assert error < tolerance, float(error)


SMALL = {"thin": Plan(Tiles(16, 16, 32, 4, 2, True), Tiles(16, 32, 32, 4, 2, True)),
         "wide": Plan(Tiles(16, 32, 32, 4, 2, False), Tiles(16, 16, 32, 4, 2, False)),
         "few": Plan(Tiles(2, 16, 16, 4, 2, True), Tiles(2, 16, 16, 4, 2, True), few=True)}  # fmt: skip


@pytest.mark.parametrize("limit", [None, 0.5])
@pytest.mark.parametrize("shared", [0, 2])
def test_reference_is_the_formula(limit: float | None, shared: int) -> None:
    *args, common = case(torch.device("cpu"), 5, 3, 6, 24, 12, shared)
    args[1][0, 1], args[1][4, 2] = -1, 6
    add = torch.randn(5, 24)
    y = reference(*args, limit=limit, shared=common, add_ND=add)
    close(y, exact(*args, common, limit, add), 1e-5)


@pytest.mark.parametrize("form", list(SMALL))
@pytest.mark.parametrize(
    "tokens, chosen, count, shared", [(1, 2, 4, 0), (1, 3, 5, 2), (3, 2, 3, 1), (4, 1, 7, 0)]
)
def test_plain(device: torch.device, form: str, tokens: int, chosen: int, count: int, shared: int) -> None:
    *args, common = case(device, tokens, chosen, count, 56, 40, shared)
    add = torch.randn(tokens, 56, device=device) if shared else None
    y = fast(*args, shared=common, add_ND=add, how=SMALL[form])
    close(y, exact(*args, common, add=add), 1e-5)


@pytest.mark.parametrize("form", ["thin", "wide"])
def test_more_pairs_than_a_tile(device: torch.device, form: str) -> None:
    *args, common = case(device, 37, 2, 5, 32, 24, 1)
    close(fast(*args, shared=common, how=SMALL[form]), exact(*args, common), 1e-5)


@pytest.mark.parametrize("form", list(SMALL))
def test_uneven(device: torch.device, form: str) -> None:
    """One expert has every token, most have none; ids outside the range, and a token with only such."""
    tokens = 4 if form == "few" else 20
    x, ids, weights, *stacks, _ = case(device, tokens, 3, 6, 32, 24)
    ids[:, 0], ids[:, 1], ids[:, 2] = 5, -1, 6
    ids[1] = -1
    for kind in (torch.int64, torch.int32):
        y = fast(x, ids.to(kind), weights, *stacks, how=SMALL[form])
        close(y, exact(x, ids, weights, *stacks, None), 1e-5)
    assert (y[1] == 0).all()


@pytest.mark.parametrize("form", list(SMALL))
def test_a_token_may_choose_an_expert_twice(device: torch.device, form: str) -> None:
    x, ids, weights, *stacks, _ = case(device, 3, 3, 4, 32, 24)
    ids[0], ids[1] = 2, torch.tensor([1, 2, 1])
    close(fast(x, ids, weights, *stacks, how=SMALL[form]), exact(x, ids, weights, *stacks, None), 1e-5)


@pytest.mark.parametrize("form", list(SMALL))
def test_limit(device: torch.device, form: str) -> None:
    *args, common = case(device, 3, 2, 4, 32, 24, 1)
    y = fast(*args, limit=0.3, shared=common, how=SMALL[form])
    close(y, exact(*args, common, 0.3), 1e-5)


@pytest.mark.parametrize("form", list(SMALL))
def test_bf16(device: torch.device, form: str) -> None:
    *args, common = case(device, 3, 2, 4, 32, 32, 1, dtype=torch.bfloat16)
    y = fast(*args, shared=common, how=SMALL[form])
    assert y.dtype == torch.bfloat16
    close(y, exact(*args, common), 2e-2)


FP8_PLANS = {"thin": Plan(Tiles(16, 64, 128, 4, 2, True), Tiles(16, 128, 128, 4, 2, True)),
             "wide": Plan(Tiles(16, 64, 128, 4, 2, False), Tiles(16, 128, 128, 4, 2, False), codes=True),
             "thin codes": Plan(Tiles(16, 128, 128, 4, 2, True), Tiles(16, 128, 128, 4, 2, True), codes=True),
             "few": Plan(Tiles(2, 32, 128, 4, 2, True), Tiles(2, 64, 128, 4, 2, True), few=True)}  # fmt: skip


@pytest.mark.parametrize("form", list(FP8_PLANS))
def test_fp8(device: torch.device, form: str) -> None:
    """Against fp64 with the activations quantised as the kernels do. What is left is a code here and there that
    falls to the other side."""
    *args, common = case(device, 3, 2, 3, 256, 256, 2, codes=True)
    for w in (*args[3:], *(common or ())):
        assert w.scale is not None
        w.scale.mul_(torch.randint(-2, 3, w.scale.shape, device=device).exp2())
    y = fast(*args, shared=common, how=FP8_PLANS[form])
    close(y, exact(*args, common, quantized=form != "few"), 2e-3)


@pytest.mark.parametrize("limit, shared", [(None, 2), (0.5, 0)])
@pytest.mark.parametrize("codes, rows, stages", [(False, 128, 4), (False, 192, 3), (True, 128, 4)])
def test_gluon(
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    codes: bool,
    rows: int,
    stages: int,
    limit: float | None,
    shared: int,
) -> None:
    """Several tiles of an expert, one of few pairs, one of none; pairs sorted in one launch and in several."""
    *args, common = case(device, 300, 2, 4, 512, 256, shared, dtype=torch.bfloat16, codes=codes)
    x, ids = args[:2]
    if not gluon_rings.supported(x, 256, 512):
        pytest.skip("made for Hopper")
    ids[ids == 2] = 1
    ids[5] = -1
    ids[7, 0] = 2
    tile = Tiles(rows, 128, 128, 4, stages, False)
    how = Plan(tile, tile, codes=codes, gluon=True)
    y = fast(*args, limit=limit, shared=common, how=how)
    expected = exact(*args, common, limit, quantized=codes)
    close(y, expected, 2e-2)
    monkeypatch.setattr(experts_run, "ONE_CHUNK", 4)
    assert torch.equal(fast(*args, limit=limit, shared=common, how=how), y)


@pytest.mark.parametrize("chunks", [False, True])
@pytest.mark.parametrize("tokens, shared, rows", [(1, 0, 4), (33, 2, 4), (50, 1, 16), (50, 2, 24)])
def test_sort(device: torch.device, tokens: int, shared: int, rows: int, chunks: bool) -> None:
    """Lists longer than a chunk; tiles cover every expert's pairs once, in order, and nothing else."""
    count, chosen = 5, 3
    ids = torch.randint(-1, count + 1, (tokens, chosen), device=device)
    ids[ids == 2] = 3  # one expert without any
    pairs = tokens * chosen
    tiles = pairs // rows + count + shared * -(-tokens // rows)
    order = torch.full((pairs + shared * tokens,), -7, dtype=torch.int32, device=device)
    table = torch.full((3, tiles), -7, dtype=torch.int32, device=device)
    x = torch.zeros(128, device=device)  # nothing to quantise
    codes = x.to(torch.float8_e4m3fn)
    flat = ids.flatten().tolist()
    if chunks:
        many = -(-pairs // 16)
        counts = torch.full((many + 1, 8), -7, dtype=torch.int32, device=device)
        places = torch.full((pairs,), -7, dtype=torch.int32, device=device)
        count_kernel[(many,)](
            ids, counts, x, codes, x, pairs, count, many, 0, CHUNK=16, BINS=8, GROUPS=64, PDL=False
        )
        taken = torch.full((2,), -7, dtype=torch.int32, device=device)
        scan_kernel[(2,)](counts, taken, many, BINS=8, WIDE=4, HIGH=4, PDL=False)
        assert taken.tolist() == [0, 0]
        place_kernel[(max(many, -(-tiles // 4)),)](
            ids, counts, order, places, table, pairs, tokens, count, shared, tiles, many,
            ROWS=rows, CHUNK=16, BINS=8, WIDE=4, TILES=4, PDL=False,
        )  # fmt: skip
        for pair, expert in enumerate(flat):
            place = int(places[pair])
            assert place == -1 if not 0 <= expert < count else order[place] == pair
    else:
        sort_kernel[(count + shared,)](
            ids, order, table, x, codes, x, pairs, tokens, count, shared, tiles, 0,
            ROWS=rows, CHUNK=16, GROUPS=64, PDL=False,
        )  # fmt: skip
    wanted = [[p for p, e in enumerate(flat) if e == expert] for expert in range(count)]
    wanted += [[pairs + s * tokens + n for n in range(tokens)] for s in range(shared)]
    got: list[list[int]] = [[] for _ in wanted]
    for expert, begin, end in table.T.tolist():
        assert expert >= -1
        if expert >= 0:
            assert 0 < end - begin <= rows
            got[expert] += order[begin:end].tolist()
    assert got == wanted


@pytest.mark.parametrize("fp8", [False, True])
def test_spread(device: torch.device, fp8: bool) -> None:
    """Rows by place, quantised or not; a pair without a place writes nothing. Codes come by token as well."""
    tokens, chosen, hidden = 5, 2, 256
    x = torch.randn(tokens, hidden).to(device)
    pairs = tokens * chosen
    places = torch.randperm(pairs).int().to(device)
    places[3] = -1
    kind = torch.float8_e4m3fn if fp8 else x.dtype
    spread = torch.zeros(pairs + tokens, hidden, device=device).to(kind)
    scales = torch.zeros(pairs + tokens, hidden // 128, device=device)
    spread_kernel[(tokens, 1)](
        x, places, spread, scales, pairs, hidden, K=chosen, GROUPS=4, FP8=fp8, PDL=False
    )
    expected = torch.zeros(pairs + tokens, hidden, device=device)
    for pair, place in enumerate(places.tolist()):
        if place >= 0:
            expected[place] = x[pair // chosen]
    if fp8:
        expected[pairs:] = x
        expected = dequantize_fp8(*quantize_fp8(expected, (1, 128)), (1, 128), torch.float32)
        spread = dequantize_fp8(spread, scales, (1, 128), torch.float32)
    assert torch.equal(spread, expected)


def test_gather(device: torch.device) -> None:
    """Rows by place, then by token, quantised; a place of no pair may hold anything that is finite."""
    tokens, chosen, hidden = 5, 2, 256
    x = torch.randn(tokens, hidden).to(device)
    pairs = tokens * chosen
    order = torch.randperm(pairs).int()
    wanted = torch.cat([x.cpu()[order // chosen], x.cpu()]).to(device)
    order[pairs - 1] = 2**30
    codes = torch.zeros(pairs + tokens, hidden, device=device).to(torch.float8_e4m3fn)
    scales = torch.zeros(pairs + tokens, hidden // 128, device=device)
    taken = torch.full((2,), 7, dtype=torch.int32, device=device)
    gather_kernel[(pairs + tokens, 1)](
        x, order.to(device), codes, scales, taken, pairs, tokens, hidden, K=chosen, GROUPS=4, PDL=False
    )
    got = dequantize_fp8(codes, scales, (1, 128), torch.float32)
    expected = dequantize_fp8(*quantize_fp8(wanted, (1, 128)), (1, 128), torch.float32)
    real = [row for row in range(pairs + tokens) if row != pairs - 1]
    assert torch.equal(got[real], expected[real]) and bool(got.isfinite().all())
    assert taken.tolist() == [0, 0]


@pytest.mark.parametrize("codes", [False, True])
def test_many_pairs(device: torch.device, monkeypatch: pytest.MonkeyPatch, codes: bool) -> None:
    """More pairs than one launch sorts."""
    monkeypatch.setattr(experts_run, "ONE_CHUNK", 4)
    *args, common = case(device, 3, 2, 3, 128, 128, 1, codes=codes)
    plan = FP8_PLANS["wide"] if codes else SMALL["wide"]
    close(fast(*args, shared=common, how=plan), exact(*args, common, quantized=codes), 2e-3)


@pytest.mark.parametrize("codes", [False, True])
def test_fixed_form_ignores_the_batch(device: torch.device, codes: bool) -> None:
    """A token's bits are those it has alone, whatever else is there."""
    tokens = 70
    if device.type == "cpu" and codes:
        tokens = 5
    *args, common = case(device, tokens, 2, 3, 128, 128, 1, codes=codes)
    x, ids, weights, *stacks = args
    y = fast(*args, shared=common, fixed=True)
    for n in (0, 1, tokens - 1):
        alone = slice(n, n + 1)
        assert torch.equal(
            fast(x[alone], ids[alone], weights[alone], *stacks, shared=common, fixed=True)[0], y[n]
        )
    some = fast(x[:4], ids[:4], weights[:4], *stacks, shared=common, fixed=True)
    assert torch.equal(some, y[:4])


@pytest.mark.parametrize("width, codes", [(36, False), (48, True)])
def test_shared_experts_of_another_kind(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, width: int, codes: bool
) -> None:
    """Of a width or a form that can't be folded in: plain products beside the kernels."""
    *args, _ = case(device, 3, 2, 4, 32, 24)
    wide = [
        stack(*shape, device=device, dtype=torch.float32) for shape in ((width, 32), (width, 32), (32, width))
    ]
    common = tuple(as_codes(w) for w in wide) if codes else tuple(wide)
    monkeypatch.setattr(op, "usable", lambda *_: True)
    add = torch.randn(3, 32, device=device)
    y = op.experts(*args, limit=0.5, shared=common, add_ND=add)
    close(y, exact(*args, common, 0.5, add), 1e-5)


def test_gradients_flow_through_the_reference() -> None:
    x, ids, weights, *stacks, _ = case(torch.device("cpu"), 4, 2, 3, 16, 8)
    leaves = [x, weights, *(w.codes for w in stacks)]
    for leaf in leaves:
        leaf.requires_grad_()
    op.experts(x, ids, weights, *stacks).square().sum().backward()
    got = [leaf.grad for leaf in leaves]
    again = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    exact(again[0], ids, torch.zeros(4, 2), *(Weights(w) for w in again[2:]), None)
    y = sum_by_hand(again[0], ids, again[1], *again[2:])
    y.square().sum().backward()
    for a, b in zip(got, again, strict=True):
        torch.testing.assert_close(a, b.grad, rtol=1e-4, atol=1e-5)


def sum_by_hand(x: Tensor, ids: Tensor, weights: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Every pair's matrices gathered: wasteful, and as plain as it gets."""
    g = torch.einsum("nkwd,nd->nkw", gate[ids], x)
    u = torch.einsum("nkwd,nd->nkw", up[ids], x)
    inner = torch.nn.functional.silu(g) * u * weights[..., None]
    return torch.einsum("nkdw,nkw->nd", down[ids], inner)


def test_every_batch_has_a_plan() -> None:
    """Tiles that the kernels accept: both products of a sorted batch cut pairs alike, FP8 steps hold one scale."""
    for tokens, fp8, fixed in itertools.product((1, 4, 5, 64, 200, 512, 8192), (False, True), (False, True)):
        plan = op.plan(tokens, 6, 64, fp8, fixed)
        assert plan.few or plan.up.rows == plan.down.rows
        assert not fp8 or plan.gluon or plan.up.depth == plan.down.depth == 128
        assert not plan.codes or plan.up.out in (64, 128)
        assert not fixed or (not plan.few and not plan.gluon and plan.codes == fp8)
