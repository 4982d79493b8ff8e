"""Experts held as FP4, and as FP8 in odd blocks: kernels against the formula."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rorqual.kernels import experts as op
from rorqual.kernels import experts_packed, held
from rorqual.kernels.experts import Weights, reference
from rorqual.kernels.experts_packed import Plan, Tiles
from rorqual.kernels.experts_run import Batch
from rorqual.kernels.quant import E8M0, quantize_fp4, quantize_fp8
from tests.interpreter import repair
from tests.kernels.test_experts import close


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    repair(monkeypatch)


def fp4(*shape: int, device: torch.device) -> Weights:
    """Random matrices whose blocks' sizes differ widely."""
    w = torch.randn(*shape).unflatten(-1, (-1, 32)) * shape[-1] ** -0.5
    w = (w * torch.randint(-3, 4, (*w.shape[:-1], 1)).float().exp2()).flatten(-2)
    codes, scale = quantize_fp4(w)
    return Weights(codes.to(device), scale.to(device))


def fp8(*shape: int, block: tuple[int, int], device: torch.device, ue8m0: bool) -> Weights:
    w = torch.randn(*shape) * shape[-1] ** -0.5
    codes, scale = quantize_fp8(w, block, ue8m0, E8M0 if ue8m0 else torch.float32)
    return Weights(codes.to(device), scale.to(device), block)


def case(
    device: torch.device, tokens: int, chosen: int, count: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(tokens, 96).to(device, dtype)
    ids = torch.stack([torch.randperm(count)[:chosen] for _ in range(tokens)]).to(device)
    return x, ids, torch.rand(tokens, chosen).to(device)


def wide(x: Tensor, ids: Tensor, weights: Tensor, *stacks: Weights, **options: object) -> Tensor:
    """The definition in fp64."""
    add = options.pop("add_ND", None)
    y = reference(x.double(), ids, weights.double(), *stacks, **options)  # type: ignore[arg-type]
    return y if add is None else y + add.double()  # type: ignore[attr-defined]


SMALL = {
    "few": Plan(Tiles(2, 16, 64, 4, 2), Tiles(2, 32, 64, 4, 2), few=True),
    "sorted": Plan(Tiles(16, 16, 64, 4, 2), Tiles(16, 32, 64, 4, 2)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", list(SMALL))
@pytest.mark.parametrize("limit", [None, 0.4])
def test_fp4(device: torch.device, form: str, limit: float | None, dtype: torch.dtype) -> None:
    tokens = 3 if form == "few" else 21
    x, ids, weights = case(device, tokens, 2, 5, dtype)
    ids[0, 1], ids[1, 0] = -1, 5
    stacks = [fp4(*shape, device=device) for shape in ((5, 64, 96), (5, 64, 96), (5, 96, 64))]
    add = torch.randn(tokens, 96, device=device)
    scales = [w.scale.view(torch.uint8) for w in stacks]
    batch = Batch(x, ids, weights, tuple(stacks), tuple(stacks), 0, limit, add)
    y = experts_packed.fast(batch, scales, SMALL[form])
    assert y.dtype == dtype
    close(
        y, wide(x, ids, weights, *stacks, limit=limit, add_ND=add), 1e-5 if dtype == torch.float32 else 1e-2
    )


@pytest.mark.parametrize("ue8m0", [False, True])
def test_fp8_in_odd_blocks(device: torch.device, ue8m0: bool) -> None:
    """Sizes that the block doesn't divide."""
    x, ids, weights = case(device, 19, 2, 4, torch.float32)
    shapes = ((4, 72, 96), (4, 72, 96), (4, 96, 72))
    stacks = [fp8(*shape, block=(40, 64), device=device, ue8m0=ue8m0) for shape in shapes]
    batch = Batch(x, ids, weights, tuple(stacks), tuple(stacks), 0, None, None)
    y = experts_packed.fast(batch, [w.scale.float() for w in stacks], SMALL["sorted"])
    close(y, wide(x, ids, weights, *stacks), 1e-5)


@pytest.mark.parametrize("kind", ["fp4", "odd"])
@pytest.mark.parametrize("tokens", [2, 9])
def test_the_op_takes_them(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, kind: str, tokens: int
) -> None:
    """Beside shared experts of another form, by the choice that shapes make."""
    monkeypatch.setattr(op, "usable", lambda *_: True)
    monkeypatch.setattr(op, "reference", None)
    x, ids, weights = case(device, tokens, 2, 4, torch.float32)
    shapes = ((4, 64, 96), (4, 64, 96), (4, 96, 64))
    if kind == "fp4":
        stacks = [fp4(*shape, device=device) for shape in shapes]
    else:
        stacks = [fp8(*shape, block=(128, 128), device=device, ue8m0=True) for shape in shapes]
    common = tuple(Weights(torch.randn(*shape[1:], device=device) / 10) for shape in shapes)
    y = op.experts(x, ids, weights, *stacks, limit=2.0, shared=common)
    close(
        y,
        wide(x, ids, weights, *stacks, limit=2.0, shared=tuple(Weights(w.codes.double()) for w in common)),
        1e-5,
    )


def test_held_scales_follow_their_tensor() -> None:
    scale = torch.tensor([0.5, 2.0]).to(E8M0)
    first = held.held_scale(scale)
    assert first.dtype == torch.float32 and first.tolist() == [0.5, 2.0]
    assert held.held_scale(scale) is first
    scale.copy_(torch.tensor([4.0, 0.25]).to(E8M0))
    held.refresh_scales()
    assert first.tolist() == [4.0, 0.25] and held.held_scale(scale) is first
    plain = torch.tensor([3.0])
    assert held.held_scale(plain) is plain
    count = len(held._held)
    del scale
    assert len(held._held) == count - 1


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 4, 16, 100, 700])
@pytest.mark.parametrize("kind", ["fp4", "odd"])
def test_recorded_in_a_graph(tokens: int, kind: str) -> None:
    """At sizes like V4-Flash's, in bf16 with the plan's own tiles; replayed on other tokens."""
    device = torch.device("cuda")
    shapes = ((16, 512, 1024), (16, 512, 1024), (16, 1024, 512))
    if kind == "fp4":
        stacks = [fp4(*shape, device=device) for shape in shapes]
    else:
        stacks = [fp8(*shape, block=(128, 96), device=device, ue8m0=True) for shape in shapes]
    x = torch.randn(tokens, 1024, device=device).bfloat16()
    ids = torch.rand(tokens, 16, device=device).topk(6).indices
    weights = torch.rand(tokens, 6, device=device)
    op.experts(x, ids, weights, *stacks, limit=10.0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = op.experts(x, ids, weights, *stacks, limit=10.0)
    for _ in range(2):
        x.copy_(torch.randn(tokens, 1024, device=device).bfloat16())
        ids.copy_(torch.rand(tokens, 16, device=device).topk(6).indices)
        graph.replay()
        close(y, reference(x.float(), ids, weights, *stacks, limit=10.0), 1.5e-2)
