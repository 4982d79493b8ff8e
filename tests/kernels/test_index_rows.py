"""The choice of whole rows, by kernels that read pages, against the plain choice."""

from __future__ import annotations

import pytest
import torch

from rorqual.kernels import index_rows
from rorqual.kernels.index import Plan
from rorqual.nn.indexer import choose, index_scores
from tests.interpreter import repair

SMALL = Plan(
    queries=2, keys=32, parts=4, warps=4, stages=2, cap=128, chunk=64, gather_warps=4, choose_warps=4
)


@pytest.fixture(autouse=True)
def repaired(monkeypatch: pytest.MonkeyPatch) -> None:
    repair(monkeypatch)


@pytest.mark.parametrize(
    ("form", "K", "apart"),
    [("kernels", 128, False), ("kernels", 70, True), ("reference", 70, False), ("reference", 70, True)],
)
def test_the_same_choice(
    form: str, K: int, apart: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole numbers: any order of summing gives one score, and many are equal."""
    monkeypatch.setattr(index_rows, "supported", lambda *_: form == "kernels")
    if device.type == "cpu":  # interpreted, large tiles take seconds
        monkeypatch.setattr(index_rows, "plan", lambda *_: SMALL)
    g = torch.Generator().manual_seed(K)
    batch, time, heads, dim, k = 2, 6, 3, 16, 9
    q, keys, w = (
        torch.randint(-1, 2, size, generator=g).float().to(device)
        for size in ((batch, time, heads, dim), (batch, K, dim), (batch, time, heads))
    )
    limit = (torch.arange(time) * K // (time - 1)).expand(batch, time).clone()
    first = torch.tensor([[0] * 3 + [25] * 3, [0] + [3] * 2 + [30] * 3]).clamp(max=limit)
    limit, first = limit.to(device), first.to(device)
    score = index_scores(q, keys, w)
    if apart:
        place = torch.arange(K, device=device)
        score = score.masked_fill(place < first[..., None], float("-inf"))
    wanted = choose(score, limit, k)
    if apart:
        wanted = wanted.masked_fill(wanted < first[..., None], -1)
    found = index_rows.index_choose_rows(q, keys, w, limit, k=k, firsts_BT=first if apart else None)
    assert found.dtype == torch.int32 and found.shape == (batch, time, k)
    assert torch.equal(found.long().sort(-1).values, wanted.sort(-1).values)
    monkeypatch.setattr(index_rows, "supported", lambda *_: False)
    few = index_rows.index_choose_rows(q, keys[:, :5], w, limit.clamp(max=5), k=k)
    assert few.shape == (batch, time, 5)
