"""V4's norms and rotations against the bricks' own operations."""

from __future__ import annotations

import pytest
import torch

from rorqual.family.parts import Rope
from rorqual.kernels import turn
from rorqual.kernels.entries import entry_bytes, unpack_entries
from rorqual.nn.norm import RMSNorm, unit_rms
from rorqual.nn.rope import rotate_tail, rotation
from tests.interpreter import repair


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    repair(monkeypatch)
    monkeypatch.setattr(turn, "usable", lambda *_: True)


def turns(count: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = rotation(Rope(8, interleaved=True), torch.randint(0, 10000, (count,)))
    return cos.to(device), sin.to(device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("normed", [False, True])
def test_heads(device: torch.device, dtype: torch.dtype, inverse: bool, normed: bool) -> None:
    wide = torch.randn(5, 3, 40).to(device, dtype)
    x, (cos, sin) = wide[..., :24], turns(5, device)
    got = turn.turn_rows(x, cos, sin, eps=1e-6 if normed else None, inverse=inverse)
    want = rotate_tail(unit_rms(x, 1e-6) if normed else x, (cos[:, None], sin[:, None]), inverse=inverse)
    assert got.dtype == dtype
    torch.testing.assert_close(got, want, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-6)
    assert dtype == torch.float32 or (got == want).float().mean() > 0.9


@pytest.mark.parametrize("packed", [False, True])
def test_entries_to_their_places(device: torch.device, packed: bool) -> None:
    dtype = torch.bfloat16 if packed else torch.float32
    norm = RMSNorm(72, 1e-6).requires_grad_(False).to(device, dtype)
    norm.weight.normal_()
    x, (cos, sin) = torch.randn(4, 72).to(device, dtype), turns(4, device)
    places = torch.tensor([6, 0, -1, 3], device=device)
    out = torch.zeros(8, entry_bytes(72, 8) if packed else 72, device=device)
    out = out.to(torch.uint8 if packed else dtype)
    turn.keep_rows(x, cos, sin, out, places, eps=1e-6, weight=norm.weight)
    again = torch.zeros_like(out)
    turn.reference_keep(x, cos, sin, 1e-6, norm.weight, again, places)
    if packed:
        out, again = (unpack_entries(z, 72, 8, torch.float32) for z in (out, again))
    want = rotate_tail(norm(x), (cos, sin))
    torch.testing.assert_close(out, again, rtol=0.13 if packed else 1e-5, atol=1e-2 if packed else 1e-6)
    assert not packed or (out == again).float().mean() > 0.9
    torch.testing.assert_close(
        again[[6, 0, 3]], want[[0, 1, 3]].float(), rtol=0.07 if packed else 1e-6, atol=1e-2
    )
    assert (out[[1, 2, 4, 5, 7]] == 0).all()
