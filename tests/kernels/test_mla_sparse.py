"""Sparse MLA attention: against a direct formula, with gaps anywhere in a row, and joined out of splits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from rorqual.kernels import mla_sparse as kernel
from rorqual.kernels.mla_prefill import decode_pages
from tests.interpreter import repair

RANK, ROPE, PAGE = 128, 16, 16


@pytest.fixture(autouse=True)
def repaired(monkeypatch: pytest.MonkeyPatch) -> None:
    repair(monkeypatch)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    dtype: torch.dtype = request.param
    return dtype


def inputs(
    N: int, H: int, K: int, dtype: torch.dtype, device: torch.device, gaps: float = 0.4, rank: int = RANK
) -> dict[str, Any]:
    """Random queries, entries and choices. A share of the choices is -1, and page 0 holds NaN."""
    pages = torch.randn(9, PAGE, rank + ROPE).to(device, dtype)
    pages[0] = float("nan")
    slots = torch.stack([torch.randperm(8 * PAGE)[:K] for _ in range(N)]).int() + PAGE
    slots[torch.rand(N, K) < gaps] = -1
    return {
        "q_NHC": torch.randn(N, H, rank + ROPE).to(device, dtype),
        "pages_PTC": pages,
        "slots_NK": slots.to(device),
        "rank": rank,
        "scale": (rank + ROPE) ** -0.5,
    }


def one_by_one(x: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Every query and head by itself, in fp64."""
    q, items = x["q_NHC"].double().cpu(), x["pages_PTC"].double().cpu().flatten(0, 1)
    rank = x["rank"]
    out = torch.zeros(*q.shape[:2], rank, dtype=torch.float64)
    sums = torch.full(q.shape[:2], -math.inf, dtype=torch.float64)
    for n in range(q.shape[0]):
        chosen = [slot for slot in x["slots_NK"][n].tolist() if slot >= 0]
        for h in range(q.shape[1] if chosen else 0):
            score = items[chosen] @ q[n, h] * x["scale"]
            out[n, h] = torch.softmax(score, 0) @ items[chosen, :rank]
            sums[n, h] = torch.logsumexp(score, 0)
    return out, sums


def check(x: dict[str, Any], expected: tuple[Tensor, Tensor], **options: Any) -> None:
    half = x["q_NHC"].dtype != torch.float32
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if half else {"rtol": 2e-5, "atol": 2e-5}
    for got in (kernel.fast(**x, lse=True, **options), kernel.reference(**x, lse=True)):
        for part, whole in zip(got, expected, strict=True):
            assert part is not None
            torch.testing.assert_close(part.double().cpu(), whole, **tolerance)


@pytest.mark.parametrize("splits", [1, 2, 3, 7])
@pytest.mark.parametrize(("N", "H", "K"), [(1, 1, 1), (2, 16, 100), (3, 5, 64), (1, 20, 33)])
def test_against_every_query_alone(
    N: int, H: int, K: int, splits: int, dtype: torch.dtype, device: torch.device
) -> None:
    x = inputs(N, H, K, dtype, device)
    check(x, one_by_one(x), splits=splits)


def test_no_entries_and_few(device: torch.device) -> None:
    """None at all gives zeros and -inf; one entry, first or last in its row, gives that entry."""
    x = inputs(4, 3, 40, torch.float32, device, gaps=0.0)
    x["slots_NK"][0] = -1
    x["slots_NK"][1, 1:] = -1
    x["slots_NK"][2, :-1] = -1
    o, sums = expected = one_by_one(x)
    assert not o[0].any() and (sums[0] == -math.inf).all()
    for splits in (1, 2, 3):
        check(x, expected, splits=splits)


def test_big_scores(device: torch.device) -> None:
    x = inputs(2, 4, 50, torch.float32, device)
    x["q_NHC"] *= 300
    check(x, one_by_one(x), splits=2)


def test_strided_queries_slots_and_pages(device: torch.device) -> None:
    x = inputs(3, 16, 50, torch.float32, device)
    expected = one_by_one(x)
    for name in ("q_NHC", "pages_PTC"):
        x[name] = torch.stack((x[name], x[name] + 1), 1)[:, 0]
    x["slots_NK"] = torch.cat((x["slots_NK"], x["slots_NK"]), 1)[:, :50]
    assert not x["pages_PTC"].is_contiguous()
    check(x, expected, splits=2)


@pytest.mark.parametrize("rank", [128, 256])
def test_fp8_pages(rank: int, dtype: torch.dtype, device: torch.device) -> None:
    codes = torch.randn(9, PAGE, rank).mul(50).to(torch.float8_e4m3fn)
    scales = torch.rand(9, PAGE, rank // 128) * 0.02
    rotary = torch.randn(9, PAGE, ROPE).bfloat16()
    packed = torch.cat([t.view(torch.uint8) for t in (codes, scales, rotary)], -1).to(device)
    x = inputs(2, 16, 60, dtype, device, rank=rank)
    expected = one_by_one(x | {"pages_PTC": decode_pages(packed, rank, ROPE)})
    half = {"rtol": 2e-2, "atol": 2e-2}  # fp32 queries meet unrounded products here, rounded ones there
    x["pages_PTC"] = packed
    for splits in (1, 2):
        o, sums = kernel.fast(**x, lse=True, splits=splits)
        torch.testing.assert_close(o.double().cpu(), expected[0], **half)
        assert sums is not None
        torch.testing.assert_close(sums.double().cpu(), expected[1], **half)


@pytest.mark.gpu
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize(("N", "H", "splits"), [(1, 16, 3), (3, 128, 1), (2, 70, 2), (200, 64, 1)])
def test_form_for_hopper(N: int, H: int, splits: int, quantized: bool) -> None:
    """The widths that the released models have, which the form in Gluon is for."""
    g = torch.Generator("cuda").manual_seed(1)
    pages = torch.randn(9, PAGE, 576, device="cuda", generator=g).bfloat16()
    if quantized:
        codes = (pages[..., :512].float() * 50).to(torch.float8_e4m3fn)
        scales = torch.rand(9, PAGE, 4, device="cuda", generator=g) * 0.02
        parts = (codes, scales, pages[..., 512:].contiguous())
        pages = torch.cat([t.view(torch.uint8) for t in parts], -1)
    else:
        pages[0] = float("nan")
    slots = (
        torch.stack([torch.randperm(8 * PAGE, device="cuda", generator=g)[:100] for _ in range(N)]).int()
        + PAGE
    )
    slots[torch.rand(N, 100, device="cuda", generator=g) < 0.4] = -1
    slots[-1, 10:] = -1
    slots[N // 2, :] = -1
    q = torch.randn(N, H, 576, device="cuda", generator=g).bfloat16()
    x = {"q_NHC": q, "pages_PTC": pages, "slots_NK": slots, "rank": 512, "scale": 576**-0.5}
    expected = kernel.reference(**x, lse=True)
    for got in (kernel.fast(**x, lse=True), kernel.fast(**x, lse=True, splits=splits)):
        for part, whole in zip(got, expected, strict=True):
            assert part is not None and whole is not None
            torch.testing.assert_close(part.float(), whole.float(), rtol=2e-2, atol=2e-2)


def test_parts_join_by_their_sums(device: torch.device) -> None:
    x = inputs(3, 4, 60, torch.float32, device)
    whole, sums = kernel.mla_sparse(**x, lse=True)
    halves = [
        kernel.mla_sparse(**x | {"slots_NK": s.contiguous()}, lse=True) for s in x["slots_NK"].chunk(2, 1)
    ]
    weights = torch.softmax(torch.stack([s for _, s in halves]), 0)
    torch.testing.assert_close(
        sum(w[..., None] * o for w, (o, _) in zip(weights, halves, strict=True)), whole
    )
    torch.testing.assert_close(torch.logaddexp(halves[0][1], halves[1][1]), sums)
    assert torch.equal(kernel.mla_sparse(**x), whole)


def test_nothing_chosen_from(device: torch.device) -> None:
    x = inputs(2, 3, 0, torch.float32, device)
    for form in (kernel.fast, kernel.reference):
        o, sums = form(**x, lse=True)
        assert o.shape == (2, 3, RANK) and not o.any()
        assert sums is not None and (sums == -math.inf).all()


def test_shapes_that_do_not_belong_together(device: torch.device) -> None:
    x = inputs(2, 3, 8, torch.float32, device)
    with pytest.raises(ValueError, match="don't fit"):
        kernel.mla_sparse(**x | {"slots_NK": x["slots_NK"][:1]})
