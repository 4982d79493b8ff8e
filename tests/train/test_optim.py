"""Optimizers are their formulas, and come back from a checkpoint as they were."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from rorqual.train.optim import AdamW, Muon, Optimizer, by_muon, clipping, gradient_norms, orthogonalised


class Little(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6, dtype=dtype)
        self.matrix = nn.Linear(6, 10, dtype=dtype)
        self.stack = nn.Parameter(torch.randn(3, 8, 5, dtype=dtype))


def give_gradients(*models: nn.Module) -> None:
    first = list(models[0].parameters())
    grads = [torch.randn_like(p, dtype=torch.float64) for p in first]
    for model in models:
        for p, grad in zip(model.parameters(), grads, strict=True):
            p.grad = grad.to(p.dtype)


def test_adamw_is_pytorchs() -> None:
    mine = Little(torch.float64)
    theirs = copy.deepcopy(mine)
    optimizer = Optimizer(mine.named_parameters(), AdamW(betas=(0.9, 0.95), eps=1e-8, decay=0.1))
    matrices = [p for p in theirs.parameters() if p.dim() >= 2]
    vectors = [p for p in theirs.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    peer = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), eps=1e-8)
    for step in range(1, 6):
        give_gradients(mine, theirs)
        optimizer.step(step, 0.01)
        peer.step()
        for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
            assert (a - b).abs().max() < 1e-14


@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
def test_bf16_weights_have_a_master_that_small_steps_move(moments: torch.dtype) -> None:
    model = Little(torch.bfloat16)
    exact = copy.deepcopy(model).float()
    optimizer = Optimizer(model.named_parameters(), AdamW(moments=moments))
    full = Optimizer(exact.named_parameters(), AdamW())
    before = {name: p.clone() for name, p in model.named_parameters()}
    for step in range(1, 201):
        give_gradients(model, exact)
        for p in (*model.parameters(), *exact.parameters()):
            p.grad = torch.ones_like(p)
        optimizer.step(step, 1e-5)
        full.step(step, 1e-5)
    for name, p in exact.named_parameters():
        master = optimizer.state[name]["master"]
        assert optimizer.state[name]["v"].dtype == moments
        assert (master - p).abs().max() < (1e-6 if moments == torch.float32 else 1e-4)
        assert torch.equal(dict(model.named_parameters())[name], master.bfloat16())
        assert (master - before[name].float()).abs().max() > 1e-3  # each step alone is below bf16's grain


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (8, 8), (4, 12, 5)])
def test_newton_schulz_gives_singular_values_of_one(shape: tuple[int, ...]) -> None:
    m = torch.randn(shape, dtype=torch.float64)
    found = torch.linalg.svdvals(orthogonalised(m, torch.float64))
    # A singular value of m / |m| below some 1e-3 needs more than ten steps; random matrices so small have none.
    assert (found - 1).abs().max() < 0.02
    u, _, v = torch.linalg.svd(m, full_matrices=False)
    assert (orthogonalised(m, torch.float64) - u @ v).abs().max() < 0.05
    low = torch.linalg.svdvals(orthogonalised(m.float(), torch.bfloat16).float())
    assert (low - 1).abs().max() < 0.1  # products in bf16


def test_muon_is_its_formula() -> None:
    """Facts 3.10, written out once more, expert by expert."""
    model = Little(torch.float64)
    theirs = {name: p.detach().clone() for name, p in model.named_parameters()}
    momentum = {name: torch.zeros_like(p) for name, p in theirs.items()}
    optimizer = Optimizer(model.named_parameters(), Muon())
    for step in range(1, 4):
        give_gradients(model)
        grads = {name: p.grad.clone() for name, p in model.named_parameters()}
        optimizer.step(step, 0.02)
        for name in ("matrix.weight", "stack"):
            momentum[name] = 0.95 * momentum[name] + grads[name]
            update = 0.95 * momentum[name] + grads[name]
            parts = []
            for m in update.reshape(-1, *update.shape[-2:]):
                x = m / torch.sqrt((m * m).sum())
                for n in range(10):
                    a, b, c = (3.4445, -4.7750, 2.0315) if n < 8 else (2.0, -1.5, 0.5)
                    square = x @ x.T
                    x = a * x + b * square @ x + c * square @ square @ x
                parts.append(x * max(m.shape) ** 0.5 * 0.18)
            theirs[name] = theirs[name] * (1 - 0.02 * 0.1) - 0.02 * torch.stack(parts).reshape(update.shape)
            assert (dict(model.named_parameters())[name] - theirs[name]).abs().max() < 1e-12
    assert set(optimizer.state["embed.weight"]) == {"m", "v"} and set(optimizer.state["stack"]) == {"m"}
    assert by_muon("layers.0.attention.q.weight", torch.ones(2, 2))
    assert not by_muon("embed.weight", torch.ones(2, 2)) and not by_muon("norm.weight", torch.ones(2))


@pytest.mark.parametrize("settings", [AdamW(moments=torch.bfloat16), Muon()])
def test_state_goes_on_where_it_was(settings: AdamW | Muon) -> None:
    one = Little(torch.bfloat16)
    first = Optimizer(one.named_parameters(), settings)
    give_gradients(one)
    first.step(1, 0.01)
    two = copy.deepcopy(one)
    second = Optimizer(two.named_parameters(), settings)
    second.restore({name: t.clone() for name, t in first.tensors().items()})
    give_gradients(one, two)
    first.step(2, 0.01)
    second.step(2, 0.01)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    with pytest.raises(ValueError, match="of another run"):
        second.restore({})
    wrong = first.tensors() | {"stack.m": torch.zeros(2)}
    with pytest.raises(ValueError, match="stack.m is"):
        second.restore(wrong)


def test_clipping() -> None:
    model = Little(torch.float64)
    give_gradients(model)
    norm = torch.sqrt(sum((p.grad**2).sum() for p in model.parameters()))
    gradients = {name: p.grad for name, p in model.named_parameters()}
    norms = gradient_norms(list(gradients.values()))
    assert torch.allclose(norms, torch.stack([g.norm() for g in gradients.values()]), rtol=1e-14)
    assert abs(norms.norm() - norm) < 1e-12 and norms.dtype == torch.float64
    assert clipping(norm, None) is None and clipping(norm, 1e9) == 1
    factor = clipping(norm, 0.5)
    assert factor is not None and abs(factor * norm - 0.5) < 1e-12
    twin = copy.deepcopy(model)
    one, two = (Optimizer(m.named_parameters(), AdamW()) for m in (model, twin))
    one.step(1, 0.01, factor)
    two.step(1, 0.01, None, {name: g * factor for name, g in gradients.items()})
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
