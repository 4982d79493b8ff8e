"""Kernels of training, each against its definition, and bricks that write their own backward pass against autograd's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rorqual.family import Rope, parts
from rorqual.kernels import (
    cross_entropy,
    mla_grad,
    mla_turn,
    norm_grad,
    route_grad,
    sequence_loss,
    swiglu_grad,
)
from rorqual.kernels import experts_grad as grad
from rorqual.kernels import experts_sort as sort
from rorqual.kernels.experts import Weights, reference
from rorqual.kernels.route import Rule, choose_reference
from rorqual.nn.mla import MLA
from rorqual.nn.step import Rows, Step
from tests.interpreter import repair

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's, over -inf and overflow

SCORES = ("softmax", "sigmoid", "sqrtsoftplus")


@pytest.fixture(autouse=True)
def rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    repair(monkeypatch)


def near(actual: Any, expected: Any, tolerance: float = 2e-6) -> None:
    """Norm of the difference over the norm of what was expected, of each tensor."""
    pairs = [(actual, expected)] if isinstance(actual, Tensor) else zip(actual, expected, strict=True)
    for mine, theirs in pairs:
        assert mine.dtype == theirs.dtype and mine.shape == theirs.shape
        assert torch.linalg.norm((mine - theirs).double()) <= tolerance * torch.linalg.norm(theirs.double())


@pytest.mark.parametrize("beside", [False, True])
def test_rmsnorm_backward(device: torch.device, beside: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norm_grad, "PROGRAMS", 3)  # so that programs have several rows
    x, weight = torch.randn(7, 48, device=device)[:, 8:32], torch.randn(24, device=device)
    slope, other = torch.randn(7, 24, device=device), torch.randn(7, 24, device=device) if beside else None
    expected = norm_grad.rmsnorm_backward_reference(x, weight, 1e-3, slope, other)
    near(norm_grad.rmsnorm_backward_fast(x, weight, 1e-3, slope, other), expected)
    leaves = x.double().requires_grad_(), weight.double().requires_grad_()
    y = torch.nn.functional.rms_norm(leaves[0], (24,), leaves[1], 1e-3)
    total = (y * slope).sum() + (0 if other is None else (leaves[0] * other).sum())
    near([t.double() for t in expected], torch.autograd.grad(total, leaves), 1e-6)


@pytest.mark.parametrize("limit", [None, 0.8])
@pytest.mark.parametrize("weighted", [False, True])
def test_swiglu_backward(device: torch.device, limit: float | None, weighted: bool) -> None:
    both, slope = 2 * torch.randn(5, 40, device=device), torch.randn(5, 20, device=device)
    weight = torch.rand(5, device=device) if weighted else None
    near(swiglu_grad.forward_fast(both, limit, weight), swiglu_grad.forward_reference(both, limit, weight))
    mine = swiglu_grad.backward_fast(both, limit, slope, weight)
    theirs = swiglu_grad.backward_reference(both, limit, slope, weight)
    assert (mine[2] is None) == (not weighted)
    near(mine[: 2 + weighted], theirs[: 2 + weighted])


@pytest.mark.parametrize("interleaved", [True, False])
def test_queries_and_keys(device: torch.device, interleaved: bool) -> None:
    rows, heads, nope, rope, value = 6, 3, 20, 8, 12
    first = torch.randn(rows, heads * (nope + rope) + rope, device=device)
    up = torch.randn(rows, heads, nope + value, device=device)
    cos, sin = torch.randn(2, 3, rope // 2, device=device).unbind(0)  # three positions, met twice
    twice = cos.repeat(2, 1), sin.repeat(2, 1)
    there = [first.clone(), first.clone()]
    q = [f[:, :-rope].unflatten(1, (heads, -1)) for f in there]
    keys = mla_turn.lay_fast(q[0], there[0][:, -rope:], up, cos, sin, interleaved)
    near(keys, mla_turn.lay_reference(q[1], there[1][:, -rope:], up, *twice, interleaved))
    near(*there)
    assert not torch.equal(there[0], first)
    turned = there[0].clone()
    again = mla_turn.lay_fast(q[0], there[0][:, -rope:], up, cos, sin, interleaved, turn=False)
    assert torch.equal(again, keys) and torch.equal(there[0], turned)
    dq, dk = torch.randn(2, rows, heads, nope + rope, device=device).unbind(0)
    dv, out = torch.randn(rows, heads, value, device=device), torch.full_like(first, torch.nan)
    dup = mla_turn.part_fast(dq, dk, dv, cos, sin, interleaved, out[:, :-rope], out[:, -rope:])
    expected = mla_turn.part_reference(dq, dk, dv, *twice, interleaved)
    near([out[:, :-rope], out[:, -rope:], dup], [expected[0].flatten(1), *expected[1:]])


@pytest.mark.parametrize("q_rank", [None, 20])
@pytest.mark.parametrize("keep", [True, False])
def test_mla_is_the_brick(q_rank: int | None, keep: bool) -> None:
    """Values and all gradients in fp64; recomputing changes nothing."""
    part = parts.MLA(3, 12, 16, 8, 10, Rope(8, interleaved=True), q_rank=q_rank)
    brick = MLA(24, part, 1e-5).double()
    for p in brick.parameters():
        torch.nn.init.normal_(p, std=0.3)
    x = torch.randn(2, 7, 24, dtype=torch.float64, requires_grad=True)
    step = Step(Rows([0, 0], [7, 7], 7, x.device))
    cos, sin = (t[0] for t in step.rotation(part.rope))
    query = (brick.q, None, None) if q_rank is None else (brick.q_a, brick.q_a_norm, brick.q_b)
    modules = (*query, brick.kv_a, brick.kv_a_norm, brick.kv_b)
    matrices = mla_grad.Matrices(*(m if m is None else m.weight for m in modules))
    shape = mla_grad.Shape(2, 3, 16, 8, 12, part.scale, 1e-5, True, keep)
    expected = brick(x, step, None)
    actual = brick.o(mla_grad.mla_trained(x.flatten(0, 1), matrices, cos, sin, shape)).view_as(expected)
    near(actual, expected, 1e-14)
    leaves, slope = (x, *brick.parameters()), torch.randn_like(expected)
    near(torch.autograd.grad(actual, leaves, slope), torch.autograd.grad(expected, leaves, slope), 1e-13)


def test_pairs_by_expert(device: torch.device) -> None:
    ids = torch.tensor([[2, 0], [5, 2], [-1, 0], [2, 4]], device=device)
    places = sort.by_expert(ids, 5)
    assert places.pair_P.tolist()[:6] == [1, 5, 0, 3, 6, 7]
    assert places.ends_E.tolist() == [2, 2, 5, 5, 6]
    assert places.place_NK.tolist() == [[2, 0], [-1, 3], [-1, 1], [4, 5]]
    x, add = torch.randn(4, 30, device=device)[:, :20], torch.randn(4, 20, device=device)
    rows = sort.spread_reference(x, places)
    assert torch.equal(sort.spread_fast(x, places)[:6], rows[:6])
    rows[6:] = torch.nan  # what has no expert is not looked at
    for extra in (None, add):
        near(sort.gather_fast(rows, places, extra), sort.gather_reference(rows, places, extra))
    many = torch.randint(-1, 7, (3, 1500), device=device)
    counted = sort.counts_fast(many, 6)
    assert torch.equal(counted, sort.counts_reference(many, 6))
    assert counted.tolist() == [[int((row == e).sum()) for e in range(6)] for row in many]


@pytest.mark.parametrize("limit", [None, 1.0])
def test_experts_are_their_definition(limit: float | None) -> None:
    tokens, hidden, width, experts, chosen = 20, 16, 24, 5, 2
    ids = torch.randint(0, experts - 1, (tokens, chosen))  # the last one gets nothing
    ids[3, 1] = experts  # nobody's
    shapes = (tokens, hidden), (tokens, chosen), (experts, width, hidden), (experts, width, hidden)
    leaves = [
        torch.randn(s, requires_grad=True) for s in (*shapes, (experts, hidden, width), (tokens, hidden))
    ]
    x, weights, gate, up, down, add = leaves
    mine = grad.routed_trained(x, ids, weights, gate, up, down, limit=limit, add_ND=add)
    theirs = reference(
        x, ids, weights, Weights(gate), Weights(up), Weights(down), limit=limit, shared=None, add_ND=add
    )
    near(mine, theirs)
    slope = torch.randn_like(mine)
    near(torch.autograd.grad(mine, leaves, slope), torch.autograd.grad(theirs, leaves, slope))


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("normalize", [True, False])
def test_routing_backward(device: torch.device, score: str, normalize: bool) -> None:
    rule = Rule(3, score, normalize=normalize, scale=2.5)
    logits = 2 * torch.randn(21, 10, device=device)
    logits[3], logits[4, :3], logits[5, 2] = (
        -30.0,
        -18.0,
        40.0,
    )  # where 1 + exp(x) is 1, and where it is exp(x)
    logits.requires_grad_()
    ids, weights = choose_reference(logits, None, rule)
    slope, beside = torch.randn_like(weights), torch.randn(21, 10, device=device)
    (expected,) = torch.autograd.grad((weights * slope).sum() + (logits * beside).sum(), logits)
    near(route_grad.slope_fast(logits.detach(), ids, slope, rule, beside, torch.float32), expected)


@pytest.mark.parametrize("score", SCORES)
def test_balance_loss(device: torch.device, score: str) -> None:
    logits = 2 * torch.randn(2, 150, 10, device=device)
    logits[0, 3] = -18.0 - 3 * torch.arange(10, device=device)  # where 1 + exp(x) is 1
    logits.requires_grad_()
    mine, theirs = sequence_loss._Loss.apply(logits, 3, score), sequence_loss.reference(logits, 3, score)
    near(mine, theirs)
    near(torch.autograd.grad(3 * mine, logits), torch.autograd.grad(3 * theirs, logits))


def test_cross_entropy_rows(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "BLOCK", 8)
    logits, target = torch.randn(6, 20, device=device), torch.tensor([1, -1, 3, 15, 19, 0], device=device)
    logits[2, 3] = logits[2, 15] = 9.0  # the first of equals is the likeliest
    logits[4, 19] = 20.0
    mine, theirs, kept = logits.clone(), logits.clone(), logits.clone()
    found = cross_entropy.fast(mine, target)
    theirs = theirs.cpu()  # whose argmax takes the first of equals
    expected = cross_entropy.reference(theirs, target.cpu())
    found, mine = (found[0].cpu(), found[1].cpu()), mine.cpu()
    near(found[0], expected[0])
    near(mine, theirs)
    assert found[1].tolist() == expected[1].tolist() == [False, False, True, False, True, False]
    cross_entropy.fast(kept, target, learns=False)
    assert torch.equal(kept, logits)
