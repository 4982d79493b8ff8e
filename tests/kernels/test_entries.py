"""V4's cache bytes: the released sizes and roundings, and the kernels that write them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rorqual.kernels import entries
from rorqual.kernels.simulate import fake_fp4, fake_fp8, hadamard
from tests.interpreter import repair


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    repair(monkeypatch)


def rounded(entry: Tensor, rope: int) -> Tensor:
    """What `simulate_released_rounding` makes of entries, rotary channels in bf16."""
    plain = entry.shape[-1] - rope
    return torch.cat((fake_fp8(entry[..., :plain], 64), entry[..., plain:].bfloat16().to(entry.dtype)), -1)


def spread(*shape: int) -> Tensor:
    """Numbers of very different sizes, some blocks all zero."""
    x = torch.randn(*shape) * torch.randint(-12, 6, shape).float().exp2()
    x[::3, :64] = 0
    return x


def test_the_released_sizes() -> None:
    assert entries.entry_bytes(512, 64) == 584 and entries.key_bytes(128) == 68


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("dim", "rope"), [(512, 64), (72, 8)])
def test_entries_round_as_the_simulation(dim: int, rope: int, dtype: torch.dtype) -> None:
    x = spread(20, dim).to(dtype)
    packed = entries.pack_entries(x, rope)
    assert packed.shape == (20, entries.entry_bytes(dim, rope)) and packed.dtype == torch.uint8
    back = entries.unpack_entries(packed, dim, rope, dtype)
    assert back.dtype == dtype and torch.equal(back, rounded(x, rope))
    assert torch.equal(entries.unpack_entries(entries.pack_entries(back, rope), dim, rope, dtype), back)
    many = entries.pack_entries(x.view(4, 5, dim), rope)
    assert torch.equal(many, packed.view(4, 5, -1))


def test_what_lies_where() -> None:
    """448 codes, 7 exponents and a byte of padding, 64 rotary channels."""
    x = torch.randn(3, 512)
    packed = entries.pack_entries(x, 64)
    exponent = packed[:, 448:455].int() - 127
    amax = x[:, :448].unflatten(1, (7, 64)).abs().amax(-1)
    assert torch.equal(exponent, (amax / 448).log2().ceil().int()) and (packed[:, 455] == 0).all()
    codes = packed[:, :448].contiguous().view(torch.float8_e4m3fn).float()
    assert torch.equal(codes * exponent.float().exp2().repeat_interleave(64, 1), rounded(x, 64)[:, :448])
    assert torch.equal(packed[:, 456:].contiguous().view(torch.bfloat16), x[:, 448:].bfloat16())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dim", [32, 128])
def test_keys_round_as_the_simulation(dim: int, dtype: torch.dtype) -> None:
    x = torch.randn(2, 11, dim).to(dtype)
    packed = entries.pack_keys(x)
    assert packed.shape == (2, 11, dim // 2 + dim // 32)
    assert torch.equal(entries.unpack_keys(packed, dtype), fake_fp4(hadamard(x), 32))


def test_other_widths_are_refused() -> None:
    with pytest.raises(ValueError, match="blocks of 64"):
        entries.pack_entries(torch.randn(2, 40), 8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("dim", "rope"), [(512, 64), (72, 8), (160, 32)])
def test_the_kernel_packs_the_very_bytes(
    device: torch.device, dim: int, rope: int, dtype: torch.dtype
) -> None:
    wide = torch.full((9, dim + 8), float("nan"), dtype=dtype)
    wide[:, :dim] = spread(9, dim).to(dtype)
    x = wide.to(device)[:, :dim]
    got, want = entries.pack_entries_fast(x, rope), entries.pack_entries_reference(x, rope)
    plain = dim - rope
    real = torch.ones(got.shape[1], dtype=torch.bool)
    real[plain + plain // 64 : plain + entries.scale_bytes(plain)] = False
    assert torch.equal(got[:, real], want[:, real])
    assert entries.pack_entries_fast(x[:0], rope).shape == (0, got.shape[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dim", [32, 128])
def test_the_kernel_turns_queries_to_the_very_numbers(
    device: torch.device, dim: int, dtype: torch.dtype
) -> None:
    q = (torch.randn(3, 7, dim) * torch.randint(-9, 4, (3, 7, dim)).float().exp2()).to(dtype)
    q[0, 0] = 0
    assert torch.equal(entries.turn_queries_fast(q.to(device)).cpu(), fake_fp4(hadamard(q), 32))
