"""Optimizers by kernels take the steps of their definitions."""

from __future__ import annotations

import copy

import pytest
import torch

from rorqual.kernels import adamw
from rorqual.train.optim import AdamW, Muon, Optimizer
from tests.interpreter import repair
from tests.kernels.test_gradients import near
from tests.train.test_optim import Little, give_gradients


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", [AdamW(), AdamW(moments=torch.bfloat16), Muon(product=torch.float32)])
def test_kernels_take_the_same_steps(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, kind: torch.dtype, settings: AdamW | Muon
) -> None:
    repair(monkeypatch)
    one = Little(kind).to(device)
    two = copy.deepcopy(one)
    plain, fast = (Optimizer(model.named_parameters(), settings) for model in (one, two))
    factor = torch.tensor(0.5, device=device)
    for number in (1, 2, 3):
        give_gradients(one, two)
        with monkeypatch.context() as here:
            here.setattr(adamw, "supported", lambda *_: False)
            plain.step(number, 0.01, factor)
        with monkeypatch.context() as here:
            here.setattr(adamw, "supported", lambda *_: True)
            fast.step(number, 0.01, factor)
    # Moments may differ in the last place before they are rounded to bf16, and the next step's weights with them.
    rounds = isinstance(settings, AdamW) and settings.moments == torch.bfloat16
    for mine, theirs in zip(two.parameters(), one.parameters(), strict=True):
        near(mine, theirs, 2**-9 if kind == torch.bfloat16 else 1e-4 if rounds else 1e-6)
    for name, mine in fast.tensors().items():
        near(mine, plain.tensors()[name], 2**-8 if mine.dtype == torch.bfloat16 else 1e-4 if rounds else 1e-5)
