"""What an indexer learns over chosen entries: against PyTorch's gradients of the KL itself in fp64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from rorqual.kernels import index_loss as kernel
from rorqual.kernels import mla_sparse_shares as shares
from rorqual.kernels.mla_sparse import mla_sparse
from tests.interpreter import repair
from tests.kernels.test_mla_sparse_backward import inputs as main_inputs


@pytest.fixture(autouse=True)
def repaired(monkeypatch: pytest.MonkeyPatch) -> None:
    repair(monkeypatch)


def inputs(N: int, H: int, K: int, dtype: torch.dtype, device: torch.device, d: int = 32) -> dict[str, Any]:
    """Choices with -1 anywhere in a row; the first query has none, the second one. A quarter of the target is 0."""
    g = torch.Generator().manual_seed(N + H + K)
    slots = main_inputs(N, 1, K, torch.float32, torch.device("cpu"))["slots_NK"]
    target = torch.rand(N, K, generator=g) ** 4 * (torch.rand(N, K, generator=g) < 0.75) * (slots >= 0)
    target = target / target.sum(1, keepdim=True).clamp(min=1e-30)
    target[1] = slots[1] >= 0
    real = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        "q_NHd": torch.randn(N, H, d, generator=g).to(device, dtype),
        "k_Md": torch.randn(2 * K + 5, d, generator=g).to(device, dtype),
        "w_NH": (torch.randn(N, H, generator=g) * d**-0.5).to(device, real),
        "slots_NK": slots.to(device),
        "target_NK": target.to(device, real),
    }


def expected(x: dict[str, Any]) -> tuple[Tensor, ...]:
    """Query by query, PyTorch's KL and its gradients."""
    q, k, w = (x[name].double().cpu().requires_grad_() for name in ("q_NHd", "k_Md", "w_NH"))
    loss = torch.zeros((), dtype=torch.float64)
    for n, slots in enumerate(x["slots_NK"].cpu().long()):
        there = slots >= 0
        if there.any():
            score = (w[n, :, None] * (q[n] @ k[slots[there]].T).clamp(min=0)).sum(0)
            target = x["target_NK"][n].double().cpu()[there]
            loss = loss + torch.nn.functional.kl_div(score.log_softmax(0), target, reduction="sum")
    return (loss.detach(), *torch.autograd.grad(loss, (q, k, w)))


@pytest.mark.parametrize(
    ("N", "H", "K", "dtype"),
    [(3, 5, 40, torch.float32), (3, 20, 600, torch.bfloat16), (4, 64, 64, torch.bfloat16)],
    ids=["fp32", "bf16, two pieces of a row", "full"],
)
def test_loss_and_gradients(N: int, H: int, K: int, dtype: torch.dtype, device: torch.device) -> None:
    x = inputs(N, H, K, dtype, device)
    bound = (
        2e-5 if dtype == torch.float32 else 6e-3
    )  # bf16: dq is rounded, in the kernel products' factors too
    whole = expected(x)
    for form in (kernel.fast, kernel.reference):
        found = form(**x)
        assert found[2].dtype == torch.float32
        for part, wanted in zip(found, whole, strict=True):
            assert (part.double().cpu() - wanted).norm() <= bound * wanted.norm()
        assert abs(float(found[0]) - float(whole[0])) < 1e-5 * float(whole[0])


def test_what_is_not_chosen_may_hold_anything(device: torch.device) -> None:
    x = inputs(3, 4, 33, torch.float32, device)
    chosen = set(x["slots_NK"].flatten().tolist()) - {-1}
    whole = expected(x)
    x["k_Md"][[i for i in range(len(x["k_Md"])) if i not in chosen]] = math.nan
    for form in (kernel.fast, kernel.reference):
        for part, wanted in zip(form(**x), whole, strict=True):
            torch.testing.assert_close(part.double().cpu(), wanted, rtol=1e-4, atol=1e-4)


def test_gradients_through_the_function() -> None:
    """As training calls it, without Triton: its gradients are those of finite differences, at any weight of the
    loss."""
    x = inputs(3, 2, 6, torch.float64, torch.device("cpu"), d=4)
    given = [x[name].requires_grad_() for name in ("q_NHd", "k_Md", "w_NH")]

    def loss(*given: Tensor) -> Tensor:
        return 3 * kernel.index_loss(*given, x["slots_NK"], x["target_NK"])

    assert torch.autograd.gradcheck(loss, given)


def test_shares_of_attention(device: torch.device) -> None:
    """Against a softmax of its own; several blocks of heads; a query without entries."""
    for H, dtype, bound in ((20, torch.float32, 1e-5), (80, torch.bfloat16, 2e-3)):
        x = main_inputs(3, H, 90, dtype, device)
        q, latent, slots, scale = x["q_NHC"], x["latent_MC"], x["slots_NK"], x["scale"]
        _, lse = mla_sparse(q, latent[None], slots, rank=128, scale=scale, lse=True)
        wanted = torch.zeros(slots.shape, dtype=torch.float64, device=device)
        for n in range(1, len(slots)):
            there = slots[n] >= 0
            score = q[n].double() @ latent[slots[n][there].long()].double().T * scale
            wanted[n, there] = score.softmax(-1).mean(0)
        for form in (shares.fast, shares.reference):
            found = form(q, latent, slots, lse, scale=scale)
            assert (found - wanted).norm() <= bound * wanted.norm()
            torch.testing.assert_close(found.sum(1), (slots >= 0).any(1).float(), rtol=0, atol=1e-3)


def test_shapes_that_do_not_belong_together(device: torch.device) -> None:
    x = inputs(3, 4, 33, torch.float32, device)
    with pytest.raises(ValueError, match="don't fit"):
        kernel.index_loss(**{**x, "target_NK": x["target_NK"][:, :-1]})
    y = main_inputs(3, 4, 33, torch.float32, device)
    with pytest.raises(ValueError, match="don't fit"):
        shares.mla_sparse_shares(
            y["q_NHC"], y["latent_MC"], y["slots_NK"], torch.zeros(3, 5, device=device), scale=1.0
        )


@pytest.mark.gpu
def test_at_the_widths_of_v32() -> None:
    """Many more queries than run at once."""
    x = inputs(300, 64, 256, torch.bfloat16, torch.device("cuda"), d=128)
    for part, wanted in zip(kernel.fast(**x), expected(x), strict=True):
        assert (part.double().cpu() - wanted).norm() <= 6e-3 * wanted.norm()
    y = main_inputs(300, 128, 256, torch.bfloat16, torch.device("cuda"), rank=512, rope=64)
    q, latent, slots, scale = y["q_NHC"], y["latent_MC"], y["slots_NK"], y["scale"]
    _, lse = mla_sparse(q, latent[None], slots, rank=512, scale=scale, lse=True)
    wanted = shares.reference(q.double(), latent.double(), slots, lse.double(), scale=scale)
    for hopper in (None, False):
        found = shares.fast(q, latent, slots, lse, scale=scale, hopper=hopper)
        assert (found - wanted).norm() <= 2e-3 * wanted.norm()
