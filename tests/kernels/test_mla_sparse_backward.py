"""The backward pass of sparse MLA attention: against PyTorch's gradients of a direct formula in fp64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from rorqual.kernels import mla_sparse_backward as kernel
from rorqual.kernels.mla_sparse import mla_sparse
from tests.interpreter import repair


@pytest.fixture(autouse=True)
def repaired(monkeypatch: pytest.MonkeyPatch) -> None:
    repair(monkeypatch)


def formula(q: Tensor, latent: Tensor, slots: Tensor, rank: int, scale: float) -> Tensor:
    """Attention of every query to its own rows; zeros without any."""
    seen = latent[slots.clamp(min=0).long()]
    there = (slots >= 0)[:, None]
    score = torch.where(there, q @ seen.mT * scale, -math.inf)
    weight = torch.where(there, score.softmax(-1), 0)
    return torch.where(there.any(-1, keepdim=True), weight, 0).nan_to_num(0.0) @ seen[..., :rank]


def inputs(
    N: int, H: int, K: int, dtype: torch.dtype, device: torch.device, rank: int = 128, rope: int = 16
) -> dict[str, Any]:
    """Random queries, latents and choices, -1 anywhere in a row; the first query has none, the second one."""
    g = torch.Generator().manual_seed(N + H + K)
    slots = torch.stack([torch.randperm(2 * K, generator=g)[:K] for _ in range(N)]).int()
    slots[torch.rand(N, K, generator=g) < 0.3] = -1
    slots[0] = -1
    slots[1:2] = -1
    slots[1:2, K // 2] = 3
    slots[-1, K // 2 :] = -1
    return {
        "q_NHC": torch.randn(N, H, rank + rope, generator=g).to(device, dtype),
        "latent_MC": torch.randn(2 * K + 5, rank + rope, generator=g).to(device, dtype),
        "slots_NK": slots.to(device),
        "do_NHc": torch.randn(N, H, rank, generator=g).to(device, dtype),
        "scale": 1.5 * (rank + rope) ** -0.5,
    }


def expected(x: dict[str, Any]) -> tuple[Tensor, Tensor]:
    q, latent = (x[name].double().cpu().requires_grad_() for name in ("q_NHC", "latent_MC"))
    do = x["do_NHc"].double().cpu()
    seen = torch.where((x["slots_NK"] >= 0).any(1).cpu()[:, None, None], do, 0)
    o = formula(q, latent, x["slots_NK"].cpu(), do.shape[2], x["scale"])
    dq, dlatent = torch.autograd.grad(o, (q, latent), seen)
    return dq.nan_to_num(0.0), dlatent


def check(x: dict[str, Any], forms: Any = None, **options: Any) -> None:
    rank = x["do_NHc"].shape[2]
    o, lse = mla_sparse(
        x["q_NHC"], x["latent_MC"][None], x["slots_NK"], rank=rank, scale=x["scale"], lse=True
    )
    bound = 2e-5 if x["q_NHC"].dtype == torch.float32 else 1e-2  # bf16: P, dS and o are rounded
    for got in (
        kernel.fast(**x, o_NHc=o, lse_NH=lse, **options),
        kernel.reference(**x, o_NHc=o, lse_NH=lse),
    ):
        assert got[0].dtype == x["q_NHC"].dtype and got[1].dtype == torch.float32
        for part, whole in zip(got, expected(x), strict=True):
            assert (part.double().cpu() - whole).norm() <= bound * whole.norm()


@pytest.mark.parametrize(
    ("N", "H", "K", "dtype"),
    [(3, 5, 40, torch.float32), (3, 20, 150, torch.bfloat16), (2, 64, 64, torch.bfloat16)],
    ids=["fp32", "bf16", "full"],
)
def test_against_gradients_of_the_formula(
    N: int, H: int, K: int, dtype: torch.dtype, device: torch.device
) -> None:
    check(inputs(N, H, K, dtype, device))


def test_a_few_queries_at_a_time_and_strips(device: torch.device) -> None:
    """Room for P and dS of two queries of five; two strips of channels."""
    x = inputs(5, 16, 70, torch.bfloat16, device, rank=256, rope=32)
    check(x, room=2 * 2 * 16 * 128 * 2)


def test_what_is_not_chosen_may_hold_anything(device: torch.device) -> None:
    x = inputs(3, 4, 33, torch.float32, device)
    chosen = set(x["slots_NK"].flatten().tolist()) - {-1}
    others = [i for i in range(len(x["latent_MC"])) if i not in chosen]
    clean = expected(x)
    x["latent_MC"][others] = math.nan
    o, lse = mla_sparse(x["q_NHC"], x["latent_MC"][None], x["slots_NK"], rank=128, scale=x["scale"], lse=True)
    for form in (kernel.fast, kernel.reference):
        for part, whole in zip(form(**x, o_NHc=o, lse_NH=lse), clean, strict=True):
            torch.testing.assert_close(part.double().cpu(), whole, rtol=1e-4, atol=1e-4)


def test_gradients_through_the_function() -> None:
    """As training calls it, without Triton: its gradients are those of finite differences."""
    x = inputs(2, 3, 6, torch.float64, torch.device("cpu"), rank=8, rope=4)
    q, latent = x["q_NHC"][1:].requires_grad_(), x["latent_MC"].requires_grad_()

    def attend(q: Tensor, latent: Tensor) -> Tensor:
        return kernel.mla_sparse_trained(q, latent, x["slots_NK"][1:], rank=8, scale=0.3)[0]

    assert torch.autograd.gradcheck(attend, (q, latent))


def test_nothing_chosen_from(device: torch.device) -> None:
    x = inputs(2, 3, 2, torch.float32, device)
    x["slots_NK"] = x["slots_NK"][:, :0]
    o, lse = torch.zeros_like(x["do_NHc"]), torch.full((2, 3), -math.inf, device=device)
    for form in (kernel.fast, kernel.reference):
        assert not any(part.any() for part in form(**x, o_NHc=o, lse_NH=lse))


def test_shapes_that_do_not_belong_together(device: torch.device) -> None:
    x = inputs(2, 3, 8, torch.float32, device)
    o, lse = torch.zeros_like(x["do_NHc"]), torch.zeros(2, 3, device=device)
    with pytest.raises(ValueError, match="don't fit"):
        kernel.mla_sparse_backward(**x, o_NHc=o[:1], lse_NH=lse)


@pytest.mark.gpu
@pytest.mark.parametrize(("N", "K"), [(3, 100), (300, 256)])
def test_forms_for_hopper(N: int, K: int) -> None:
    """The widths that the released models have; many more queries than programs."""
    x = inputs(N, 128, K, torch.bfloat16, torch.device("cuda"), rank=512, rope=64)
    check(x)
    for name in ("weights", "queries", "entries"):
        check(x, plan={name: {"hopper": False}})
