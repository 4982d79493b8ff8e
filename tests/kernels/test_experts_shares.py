"""Some of the experts on one rank, the others elsewhere: what the ranks' kernels give adds up to the whole."""

from __future__ import annotations

import pytest
import torch

from rorqual.kernels import experts
from rorqual.kernels.experts import Weights, fast, reference
from tests.interpreter import repair


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    repair(monkeypatch)


@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_shares_add_up(device: torch.device, tokens: int) -> None:
    count, hidden, width, chosen = 6, 64, 32, 3
    x = torch.randn(tokens, hidden, device=device)
    ids = torch.stack([torch.randperm(count)[:chosen] for _ in range(tokens)]).to(device)
    weights = torch.rand(tokens, chosen, device=device)
    shapes = (count, width, hidden), (count, width, hidden), (count, hidden, width)
    stacks = [torch.randn(*shape, device=device) * shape[-1] ** -0.5 for shape in shapes]
    wide = [torch.randn(*shape[1:], device=device) * shape[-1] ** -0.5 for shape in shapes]
    shared = tuple(Weights(w) for w in wide)
    whole = reference(x, ids, weights, *(Weights(s) for s in stacks), shared=shared)  # type: ignore[arg-type]
    total = torch.zeros_like(whole)
    for first, end in ((0, 4), (4, 6)):
        mine = [Weights(s[first:end].contiguous()) for s in stacks]
        common = shared if first else None
        part = fast(x, ids - first, weights, *mine, shared=common, of=count)  # type: ignore[arg-type]
        right = reference(x, ids - first, weights, *mine, shared=common)  # type: ignore[arg-type]
        torch.testing.assert_close(part, right, rtol=1e-4, atol=1e-5)
        total += part
    torch.testing.assert_close(total, whole, rtol=1e-4, atol=1e-5)


def test_a_share_runs_in_the_tiles_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles are chosen by tokens an expert, and half of the experts get half of the pairs."""

    class Chosen(Exception):
        pass

    def plan(tokens: int, chosen: int, count: int, *_: object) -> None:
        raise Chosen(count)

    monkeypatch.setattr(experts, "plan", plan)
    x, ids = torch.zeros(4, 16, dtype=torch.bfloat16), torch.zeros(4, 2, dtype=torch.int64)
    half = [Weights(torch.zeros(3, 16, 16, dtype=torch.bfloat16))] * 3
    with pytest.raises(Chosen, match="6"):
        fast(x, ids, torch.ones(4, 2), *half, of=6)
