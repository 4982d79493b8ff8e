"""Norm, rotation and the way into the pages, against the bricks of the same names; FP8 pages byte by byte."""

import struct
from typing import Any

import pytest
import torch
from torch import Tensor

from rorqual.family.parts import Rope
from rorqual.kernels import cache_write as cw
from rorqual.kernels.quant import dequantize_fp8
from rorqual.nn.norm import RMSNorm
from rorqual.nn.rope import rotate, rotation
from tests.interpreter import repair

TYPES = [torch.float32, torch.bfloat16]
SLOTS = [5, -1, 3 * 8 + 7, 0, 60 * 8 + 1]
"""Of pages of 8: one in the first page, none, the last of a page, the dummy, one far away. A page more stands
before the first: nothing may be written there."""


@pytest.fixture(autouse=True)
def rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    repair(monkeypatch)


def turn(device: torch.device, tokens: int, rope: int) -> tuple[Tensor, Tensor]:
    positions = torch.randint(0, 5000, (tokens,), device=device)
    return rotation(Rope(rope), positions)


def strided(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Random numbers as a view with gaps between rows."""
    wide = torch.randn(*shape[:-1], shape[-1] + 16, device=device).to(dtype)
    return wide[..., 8 : 8 + shape[-1]]


def poisoned(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full(shape, float("nan"), device=device).to(dtype)


def near(actual: Tensor, expected: Tensor) -> bool:
    """Equal but for a unit of the last place: the norm's sum is taken in another order."""
    tolerance = 2e-6 if expected.dtype == torch.float32 else 2**-7
    return torch.allclose(actual.float(), expected.float(), rtol=tolerance, atol=1e-6, equal_nan=True)


class Mla:
    """Inputs of one call of `mla_write`."""

    def __init__(
        self, device: torch.device, dtype: torch.dtype, heads: int, rank: int, rope: int, tokens: int = 5
    ):
        self.rank, self.rope = rank, rope
        self.kv = strided(tokens, rank + rope, dtype=dtype, device=device)
        self.weight = torch.randn(rank, device=device).to(dtype)
        self.cos, self.sin = turn(device, tokens, rope)
        self.q = torch.randn(tokens, heads, 16 + rope, device=device).to(dtype)
        self.slots = torch.tensor(SLOTS[:tokens], device=device)

    def arguments(self, q: Tensor | None, pages: Tensor) -> tuple[Any, ...]:
        rope = None if q is None else q[..., -self.rope :]
        return self.kv, self.weight, 1e-6, self.cos, self.sin, rope, pages, self.slots


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("dtype", TYPES)
def test_mla_reference_is_the_brick(dtype: torch.dtype, interleaved: bool) -> None:
    device = torch.device("cpu")
    case = Mla(device, dtype, 3, 32, 8)
    norm = RMSNorm(32, 1e-6)
    norm.weight.data = case.weight
    q, pages = case.q.clone(), poisoned(64, 8, 40, dtype=dtype, device=device)
    cw.mla_write_reference(*case.arguments(q, pages), rank=32, interleaved=interleaved)
    entries = torch.cat(
        (norm(case.kv[:, :32]), rotate(case.kv[:, 32:], (case.cos, case.sin), interleaved)), -1
    )
    for token, slot in enumerate(SLOTS):
        if slot >= 0:
            assert torch.equal(pages[slot // 8, slot % 8], entries[token])
    assert pages.isnan().any(-1).sum() == 64 * 8 - 4
    turned = rotate(case.q[..., 16:], (case.cos[:, None], case.sin[:, None]), interleaved)
    assert torch.equal(q, torch.cat((case.q[..., :16], turned), -1))


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("heads", "rank", "rope"), [(3, 32, 8), (1, 40, 12), (40, 128, 64)])
def test_mla(
    device: torch.device, heads: int, rank: int, rope: int, dtype: torch.dtype, interleaved: bool
) -> None:
    case = Mla(device, dtype, heads, rank, rope)
    qs, all_pages = [], []
    for write in (cw.mla_write_fast, cw.mla_write_reference):
        qs.append(case.q.clone())
        # Pages of one layer among three: the stride between pages is not their size.
        all_pages.append(poisoned(65, 3, 8, rank + rope, dtype=dtype, device=device))
        write(*case.arguments(qs[-1], all_pages[-1][1:, 1]), rank=rank, interleaved=interleaved)
    assert torch.equal(qs[0], qs[1])
    assert near(all_pages[0], all_pages[1])
    rope_of = [pages[..., rank:].nan_to_num(-7.0) for pages in all_pages]
    assert torch.equal(*rope_of)


def test_mla_queries_into_a_buffer(device: torch.device) -> None:
    case = Mla(device, torch.bfloat16, 3, 32, 8)
    q, pages = case.q.clone(), poisoned(64, 8, 40, dtype=torch.bfloat16, device=device)
    out = poisoned(5, 3, 40, dtype=torch.bfloat16, device=device)
    cw.mla_write_fast(*case.arguments(q, pages), rank=32, interleaved=True, q_out_NHC=out)
    expected = rotate(q[..., 16:], (case.cos[:, None], case.sin[:, None]), True)
    assert torch.equal(q, case.q) and torch.equal(out[..., 32:], expected) and out[..., :32].isnan().all()


def test_mla_without_queries_and_with_index_keys(device: torch.device) -> None:
    case = Mla(device, torch.float32, 1, 32, 8)
    case.slots = case.slots.int()
    keys = strided(5, 20, dtype=torch.float32, device=device)
    results = []
    for write in (cw.mla_write_fast, cw.mla_write_reference):
        pages = poisoned(64, 8, 40, dtype=torch.float32, device=device)
        key_pages = poisoned(64, 8, 20, dtype=torch.float32, device=device)
        write(*case.arguments(None, pages), rank=32, interleaved=True, index=(keys, key_pages))
        results.append((pages, key_pages))
    assert near(results[0][0], results[1][0])
    assert torch.equal(results[0][1].nan_to_num(-7.0), results[1][1].nan_to_num(-7.0))
    assert torch.equal(results[0][1][3, 7], keys[2])


@pytest.mark.parametrize("dtype", TYPES)
def test_mla_fp8_pages(device: torch.device, dtype: torch.dtype) -> None:
    case = Mla(device, dtype, 2, 256, 64)
    case.kv[3, :128] *= 1e-9  # so small that the floor of the scale counts
    width = cw.mla_bytes(256, 64)
    assert cw.mla_bytes(512, 64) == 656 and width == 256 + 8 + 128
    results = []
    for write in (cw.mla_write_fast, cw.mla_write_reference):
        pages = torch.full((65, 8, width), 0x7F, dtype=torch.uint8, device=device)
        write(*case.arguments(case.q.clone(), pages[1:]), rank=256, interleaved=True)
        results.append(pages)
    actual, expected = (pages.flatten(0, 1).cpu() for pages in results)
    written = torch.tensor([8 + slot for slot in SLOTS if slot >= 0])
    untouched = torch.ones(520, dtype=torch.bool)
    untouched[written] = False
    assert (actual[untouched] == 0x7F).all()
    actual, expected = actual[written], expected[written]
    assert torch.equal(actual[:, 264:], expected[:, 264:])  # rotary channels
    assert near(
        actual[:, 256:264].contiguous().view(torch.float32),
        expected[:, 256:264].contiguous().view(torch.float32),
    )
    # A norm that rounds the other way may move a code by one.
    assert (actual[:, :256] != expected[:, :256]).float().mean() < 0.02
    assert (actual[:, :256].int() - expected[:, :256].int()).abs().max() <= 1


def test_fp8_entry_is_laid_out_as_released() -> None:
    entry = torch.randn(2, 256 + 64).bfloat16()
    entry[1, 128:256] = 0.0
    rows = cw.fp8_entry(entry, 256)
    for n in range(2):
        raw = bytes(rows[n].tolist())
        scales = struct.unpack("<2f", raw[256:264])
        expected = [
            max(entry[n, b * 128 : b * 128 + 128].float().abs().max().item(), 1e-4) / 448 for b in (0, 1)
        ]
        assert scales == pytest.approx(expected, rel=1e-6)
        codes = rows[n, :256].view(torch.float8_e4m3fn)[None]
        latent = dequantize_fp8(codes, torch.tensor([scales]), (1, 128), torch.float32)[0]
        bound = entry[n, :256].float().abs() / 16 + torch.tensor(scales).repeat_interleave(128) * 2**-9
        assert ((latent - entry[n, :256].float()).abs() <= bound * 1.001).all()
        assert torch.equal(torch.frombuffer(bytearray(raw[264:]), dtype=torch.bfloat16), entry[n, 256:])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("heads", "groups", "width", "rope"), [(4, 2, 16, 16), (3, 3, 24, 8), (20, 1, 128, 128)]
)
def test_gqa(
    device: torch.device,
    heads: int,
    groups: int,
    width: int,
    rope: int,
    interleaved: bool,
    normed: bool,
    dtype: torch.dtype,
) -> None:
    tokens = len(SLOTS)
    cos, sin = turn(device, tokens, rope)
    q0 = torch.randn(tokens, heads, width, device=device).to(dtype)
    k, v = (strided(tokens, groups, width, dtype=dtype, device=device) for _ in range(2))
    norms = {
        name: torch.randn(width, device=device).to(dtype) if normed else None for name in ("q_norm", "k_norm")
    }
    results = []
    for write in (cw.gqa_write_fast, cw.gqa_write_reference):
        q = q0.clone()
        pages = poisoned(65, 2, 8, groups, width, dtype=dtype, device=device)
        slots = torch.tensor(SLOTS, device=device, dtype=torch.int32)
        write(
            q, k, v, cos, sin, pages[1:, 0], pages[1:, 1], slots, interleaved=interleaved, eps=1e-6, **norms
        )
        results.append((q, pages[:, 0].nan_to_num(-7.0), pages[:, 1].nan_to_num(-7.0)))
    (q, keys, values), (q_expected, k_expected, v_expected) = results
    assert torch.equal(values, v_expected)
    if normed:
        assert near(q, q_expected) and near(keys, k_expected)
    else:
        assert torch.equal(q, q_expected) and torch.equal(keys, k_expected)


@pytest.mark.parametrize("interleaved", [False, True])
def test_gqa_reference_is_the_brick(interleaved: bool) -> None:
    device = torch.device("cpu")
    cos, sin = turn(device, 2, 8)
    q, k, v = (torch.randn(2, 3, 16) for _ in range(3))
    norm = RMSNorm(16, 1e-5).requires_grad_(False)
    torch.nn.init.normal_(norm.weight)
    pages = torch.zeros(2, 3, 4, 3, 16)
    q_out = q.clone()
    cw.gqa_write_reference(
        q_out, k, v, cos, sin, pages[0], pages[1], torch.tensor([4, 9]),
        interleaved=interleaved, q_norm=norm.weight, k_norm=norm.weight, eps=1e-5,
    )  # fmt: skip
    around = (cos[:, None], sin[:, None])
    for source, result in ((q, q_out), (k, torch.stack((pages[0, 1, 0], pages[0, 2, 1])))):
        normed = norm(source)
        assert torch.equal(
            result, torch.cat((rotate(normed[..., :8], around, interleaved), normed[..., 8:]), -1)
        )
    assert torch.equal(torch.stack((pages[1, 1, 0], pages[1, 2, 1])), v)


@pytest.mark.parametrize("width", [1, 20, 1500])
def test_rows(device: torch.device, width: int) -> None:
    x = strided(5, width, dtype=torch.float32, device=device)
    slots = torch.tensor([3, -1, 0, 11, -5], device=device)
    fast, slow = (poisoned(18, width, dtype=torch.bfloat16, device=device) for _ in range(2))
    cw.write_rows_fast(x, fast[6:], slots)
    cw.write_rows_reference(x, slow[6:], slots)
    assert torch.equal(fast.nan_to_num(-7.0), slow.nan_to_num(-7.0))
    assert fast.isnan().all(-1).sum() == 15 and torch.equal(fast[17], x[3].bfloat16())


def test_a_token_does_not_see_its_neighbours(device: torch.device) -> None:
    case = Mla(device, torch.bfloat16, 3, 128, 16)
    together = case.q.clone(), poisoned(64, 8, 144, dtype=torch.bfloat16, device=device)
    cw.mla_write_fast(*case.arguments(*together), rank=128, interleaved=True)
    alone = case.q.clone(), poisoned(64, 8, 144, dtype=torch.bfloat16, device=device)
    for n in range(5):
        kv, weight, eps, cos, sin, q, pages, slots = case.arguments(*alone)
        one = slice(n, n + 1)
        cw.mla_write_fast(
            kv[one], weight, eps, cos[one], sin[one], q[one], pages, slots[one], rank=128, interleaved=True
        )
    for a, b in zip(alone, together, strict=True):
        assert torch.equal(a.nan_to_num(-7.0), b.nan_to_num(-7.0))


def test_no_tokens_and_the_public_operations(device: torch.device) -> None:
    case = Mla(device, torch.float32, 2, 32, 8, tokens=0)
    pages = poisoned(2, 8, 40, dtype=torch.float32, device=device)
    for write in (cw.mla_write_fast, cw.mla_write):
        write(*case.arguments(case.q, pages), rank=32, interleaved=True)
    empty = torch.empty(0, 2, 16, device=device)
    for operation in (cw.gqa_write_fast, cw.gqa_write):
        operation(
            empty,
            empty,
            empty,
            case.cos,
            case.sin,
            *torch.zeros(2, 2, 8, 2, 16, device=device),
            case.slots,
            interleaved=False,
        )
    cw.write_rows(case.kv, pages.flatten(0, 1), case.slots)
    assert pages.isnan().all()
    case = Mla(device, torch.float32, 2, 32, 8, tokens=1)
    cw.mla_write(*case.arguments(case.q, pages), rank=32, interleaved=True)
    cw.write_rows(case.kv, pages.flatten(0, 1), case.slots + 1)
    assert not pages[0, 5].isnan().any() and torch.equal(pages[0, 6], case.kv[0])
