"""Prefill attention of MLA: against a direct formula, over ragged sequences, and the same bits however cut."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from rorqual.kernels import mla_prefill as kernel
from rorqual.kernels import mla_prefill_gluon as hopper
from tests.interpreter import repair

NOPE, ROPE, WIDTH = 32, 16, 64


@pytest.fixture(autouse=True)
def repaired(monkeypatch: pytest.MonkeyPatch) -> None:
    repair(monkeypatch)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    dtype: torch.dtype = request.param
    return dtype


def starts(numbers: list[int], device: torch.device) -> Tensor:
    return torch.tensor(list(itertools.accumulate(numbers, initial=0)), dtype=torch.int32, device=device)


def inputs(
    lengths: list[tuple[int, int]], heads: int, dtype: torch.dtype, device: torch.device, width: int = WIDTH
) -> dict[str, Any]:
    """Random arguments for sequences of (queries, keys); keys and values are views of one tensor."""
    N, M = (sum(column) for column in zip(*lengths, strict=True))
    k_MHn, v_MHv = torch.randn(M, heads, NOPE + width).to(device, dtype).split((NOPE, width), -1)
    return {
        "q_NHd": torch.randn(N, heads, NOPE + ROPE).to(device, dtype),
        "k_MHn": k_MHn,
        "rope_Mr": torch.randn(M, ROPE).to(device, dtype),
        "v_MHv": v_MHv,
        "starts_q": starts([q for q, _ in lengths], device),
        "starts_k": starts([k for _, k in lengths], device),
        "max_q": max(q for q, _ in lengths),
        "max_k": max(k for _, k in lengths),
        "scale": (NOPE + ROPE) ** -0.5,
    }


def one_by_one(x: dict[str, Any]) -> Tensor:
    """Every query and head by itself, in fp64."""
    q, k, rope, v = (x[n].double().cpu() for n in ("q_NHd", "k_MHn", "rope_Mr", "v_MHv"))
    out = torch.zeros(*q.shape[:2], v.shape[-1], dtype=torch.float64)
    queries, keys = x["starts_q"].tolist(), x["starts_k"].tolist()
    for s in range(len(queries) - 1):
        for n in range(queries[s], queries[s + 1]):
            end = keys[s + 1] - (queries[s + 1] - 1 - n)
            for h in range(q.shape[1]):
                key = torch.cat((k[keys[s] : end, h], rope[keys[s] : end]), -1)
                out[n, h] = torch.softmax(key @ q[n, h] * x["scale"], 0) @ v[keys[s] : end, h]
    return out


def forms(x: dict[str, Any]) -> list[Any]:
    tensors = [x[n] for n in ("q_NHd", "k_MHn", "rope_Mr", "v_MHv")]
    assert kernel.supported(*tensors)
    return [kernel.fast, hopper.fast] if hopper.supported(*tensors) else [kernel.fast]


LENGTHS = {
    "one token": [(1, 1)],
    "a tile and one": [(65, 65)],
    "prefixes and an empty sequence": [(3, 70), (0, 0), (1, 33), (40, 40), (5, 128)],
    "last of a long one": [(1, 129), (2, 64)],
}


@pytest.mark.parametrize("name", LENGTHS)
def test_against_every_query_alone(name: str, dtype: torch.dtype, device: torch.device) -> None:
    x = inputs(LENGTHS[name], 2, dtype, device)
    expected = one_by_one(x)
    tolerance = {"rtol": 2e-5, "atol": 2e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    for form in [kernel.reference, *forms(x)]:
        torch.testing.assert_close(form(**x).double().cpu(), expected, **tolerance)


def test_reference_in_double(device: torch.device) -> None:
    x = inputs([(4, 9), (2, 2)], 3, torch.float64, device)
    torch.testing.assert_close(kernel.mla_prefill(**x).cpu(), one_by_one(x))


def test_value_width_like_keys_and_contiguous_tensors(dtype: torch.dtype, device: torch.device) -> None:
    x = inputs([(9, 20), (17, 17)], 2, dtype, device, width=32)
    x |= {n: x[n].contiguous() for n in ("k_MHn", "v_MHv")}
    for form in forms(x):
        torch.testing.assert_close(form(**x).float(), kernel.reference(**x).float(), rtol=2e-2, atol=2e-2)


def test_big_scores_and_padded_rows(device: torch.device) -> None:
    """Scores in the hundreds, and queries and keys behind the last sequence that hold NaN."""
    x = inputs([(10, 40), (30, 50), (7, 9)], 2, torch.float32, device)
    x["q_NHd"][:40] *= 60
    for name, last in (("q_NHd", 40), ("k_MHn", 90), ("rope_Mr", 90), ("v_MHv", 90)):
        x[name][last:] = float("nan")
    x |= {"starts_q": x["starts_q"][:-1], "starts_k": x["starts_k"][:-1]}
    expected = one_by_one(x)[:40]
    for form in [kernel.reference, *forms(x)]:
        torch.testing.assert_close(form(**x)[:40].double().cpu(), expected, rtol=1e-4, atol=1e-4)


def test_same_bits_however_the_prompt_is_cut(dtype: torch.dtype, device: torch.device) -> None:
    """`fixed`: at once, in chunks, one query at a time, and beside another sequence."""
    length = 100 if device.type == "cpu" else 700
    x = inputs([(length, length), (33, 50)], 2, dtype, device)

    def part(form: Any, first: int, end: int) -> Tensor:
        y = {**x, "q_NHd": x["q_NHd"][first:end], "max_q": end - first, "max_k": end}
        y |= {n: x[n][:end] for n in ("k_MHn", "rope_Mr", "v_MHv")}
        return form(
            **y | {"starts_q": starts([end - first], device), "starts_k": starts([end], device)}, fixed=True
        )

    for form in forms(x):
        whole = form(**x, fixed=True)
        for first, end in [(0, length), (0, 31), (31, 64), (64, length), (63, 64), (length - 1, length)]:
            assert torch.equal(part(form, first, end), whole[first:end]), (form.__module__, first, end)


def test_nothing_to_do(device: torch.device) -> None:
    x = inputs([(0, 0)], 2, torch.float32, device)
    assert kernel.fast(**x).shape == (0, 2, WIDTH)


def test_shapes_that_do_not_belong_together(device: torch.device) -> None:
    x = inputs([(2, 3)], 2, torch.float32, device)
    with pytest.raises(ValueError, match="don't fit"):
        kernel.mla_prefill(**x | {"q_NHd": x["q_NHd"][..., 1:]})


# ------------------------------------------------------------------------------------------- gathering


def fp8_pages(pages: int, page_size: int, rank: int, rope: int) -> tuple[Tensor, Tensor]:
    """Random uint8 pages and what they hold, in fp64."""
    codes = torch.randn(pages, page_size, rank).mul(50).to(torch.float8_e4m3fn)
    scales = torch.rand(pages, page_size, rank // 128) + 0.01
    rotary = torch.randn(pages, page_size, rope).bfloat16()
    packed = torch.cat([t.view(torch.uint8) for t in (codes, scales, rotary)], -1)
    latent = codes.double() * scales.double().repeat_interleave(128, -1)
    return packed, torch.cat((latent, rotary.double()), -1)


@pytest.mark.parametrize("lengths", [[17, 0, 1, 48, 0, 16], [40], [33, 20]], ids=str)
@pytest.mark.parametrize(
    ("kind", "T"), [("fp32", 16), ("bf16", 16), ("bf16", 4), ("fp8", 16), ("strided", 64)]
)
def test_gathering_latents(kind: str, T: int, lengths: list[int], device: torch.device) -> None:
    P, rank, rope = 8 + 192 // T, 256, 16
    if kind == "fp8":
        pages, held = fp8_pages(P, T, rank, rope)
    else:
        pages = torch.randn(P, T, 2, rank + rope).to(torch.bfloat16 if kind == "bf16" else torch.float32)
        pages = pages[:, :, 1] if kind == "strided" else pages[:, :, 1].contiguous()
        held = pages.double()
    table = torch.zeros(len(lengths), -(-48 // T), dtype=torch.int32)
    free = torch.randperm(P - 1) + 1
    expected = []
    for s, length in enumerate(lengths):
        used, free = free[: -(-length // T)], free[-(-length // T) :]
        table[s, : len(used)] = used
        expected.append(held[used].flatten(0, 1)[:length])
    total = sum(lengths) + 5
    x = (pages.to(device), table.to(device), starts(lengths, device))
    # A table that starts anywhere.
    x = (x[0], torch.cat((x[1][:, :1], x[1]), 1)[:, 1:], x[2])
    for form in (kernel.gather_reference, kernel.gather_fast, kernel.gather_latents):
        latent_MC = form(*x, total=total, rank=rank, rope=rope)
        assert latent_MC.dtype == (torch.float32 if kind in ("fp32", "strided") else torch.bfloat16)
        assert not latent_MC[sum(lengths) :].any()
        got = latent_MC[: sum(lengths)].double().cpu()
        torch.testing.assert_close(got, torch.cat(expected), rtol=2**-8 if kind == "fp8" else 0, atol=0)
        assert torch.equal(latent_MC, kernel.gather_reference(*x, total=total, rank=rank, rope=rope))


def test_gathering_from_pages_of_another_width() -> None:
    with pytest.raises(ValueError, match="don't hold"):
        kernel.split_fp8_pages(torch.zeros(2, 16, 655, dtype=torch.uint8), 512, 64)
