"""Cross-entropy in chunks is cross-entropy."""

from __future__ import annotations

import pytest
import torch

from rorqual.train.loss import IGNORED, cross_entropy, reference


@pytest.mark.parametrize("rows", [1, 3, 7, 64])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.02)]
)
def test_chunks_give_the_loss_and_gradients_of_the_whole(
    rows: int, full: bool, dtype: torch.dtype, tolerance: float
) -> None:
    hidden = torch.randn(17, 12, dtype=dtype, requires_grad=True)
    weight = torch.randn(29, 12, dtype=dtype, requires_grad=True)
    target = torch.randint(0, 29, (17,))
    target[[0, 5]] = IGNORED
    loss, right = cross_entropy(hidden, weight, target, full=full, rows=rows)
    (loss * 0.3).backward()
    ours = hidden.grad, weight.grad
    hidden.grad = weight.grad = None
    wanted = reference(hidden, weight, target, full)
    (wanted * 0.3).backward()
    assert loss.dtype == wanted.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert abs(loss - wanted) <= tolerance * abs(wanted)
    for mine, theirs in zip(ours, (hidden.grad, weight.grad), strict=True):
        assert mine.dtype == dtype and (mine - theirs).abs().max() <= tolerance * theirs.abs().max()
    assert not hidden.grad[[0, 5]].any() and not ours[0][[0, 5]].any()
    guess = (hidden.double() @ weight.double().T).argmax(-1) == target
    assert abs(int(right) - int(guess[target != IGNORED].sum())) <= (0 if dtype == torch.float64 else 1)


def test_only_what_learns_gets_a_gradient() -> None:
    hidden, weight = torch.randn(5, 4), torch.randn(6, 4, requires_grad=True)
    cross_entropy(hidden, weight, torch.arange(5))[0].backward()
    assert weight.grad is not None and hidden.grad is None
    with torch.no_grad():
        loss, _ = cross_entropy(hidden, weight, torch.arange(5))
    assert not loss.requires_grad
