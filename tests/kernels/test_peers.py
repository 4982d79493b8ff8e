"""Peers' libraries: used by the rules alone, never needed, and left alone once one fails. A stand-in takes the place of
the real one, which is tested where it is installed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rorqual.kernels import peers
from rorqual.kernels.mla_decode import mla_decode, reference
from rorqual.kernels.mode import invariant


@pytest.fixture
def flash_mla(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A stand-in for FlashMLA that computes by our definition and counts its calls."""
    calls: list[Any] = []

    def attend(
        q: Tensor, pages: Tensor, table: Tensor, ends: Tensor, rank: int, schedule: Any, **given: Any
    ) -> Any:
        calls.append(schedule)
        assert given["causal"] and given["use_legacy"] and pages.shape[2] == 1
        out = reference(
            q.flatten(0, 1),
            pages[:, :, 0],
            table,
            ends,
            width=q.shape[1],
            rank=rank,
            scale=given["softmax_scale"],
        )
        return out.view(*q.shape[:-1], rank), None

    module = SimpleNamespace(
        get_mla_metadata=lambda: ("schedule", None), flash_mla_with_kvcache=attend, calls=calls
    )
    monkeypatch.setitem(sys.modules, "flash_mla", module)
    monkeypatch.setattr(peers, "_hopper", lambda device: True)
    monkeypatch.setattr(peers, "_failed", set())
    monkeypatch.delenv("RORQUAL_PEERS", raising=False)
    peers._imported.cache_clear()
    yield module
    peers._imported.cache_clear()


def decode_inputs(
    heads: int, width: int = 1, size: int = 64, device: str = "cpu", dtype: Any = torch.bfloat16
) -> Any:
    q = torch.randn(2 * width, heads, 576, device=device, dtype=dtype)
    pages = torch.randn(5, size, 576, device=device, dtype=dtype)
    table = torch.tensor([[1, 3], [4, 2]], dtype=torch.int32, device=device)
    return (q, pages, table, torch.tensor([size + 6, size], dtype=torch.int32, device=device)), {
        "width": width,
        "rank": 512,
        "scale": 0.04,
    }


@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("heads", [64, 128])
def test_wide_decodes_go_to_the_peer(flash_mla: SimpleNamespace, heads: int, width: int) -> None:
    x, given = decode_inputs(heads, width)
    assert torch.equal(mla_decode(*x, **given), reference(*x, **given))
    assert flash_mla.calls == ["schedule"]


def test_what_stays_with_us(flash_mla: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    for shape in ({"heads": 16}, {"heads": 64, "size": 32}, {"heads": 64, "dtype": torch.float32}):
        x, given = decode_inputs(**shape)  # type: ignore[arg-type]
        mla_decode(*x, **given)
    x, given = decode_inputs(64)
    mla_decode(*x, **given, splits="fixed")
    with invariant():
        mla_decode(*x, **given)
    monkeypatch.setenv("RORQUAL_PEERS", "0")
    mla_decode(*x, **given)
    assert not flash_mla.calls


def test_without_the_library_nothing_changes(
    flash_mla: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "flash_mla", None)  # importing it raises
    x, given = decode_inputs(64)
    assert torch.equal(mla_decode(*x, **given), reference(*x, **given))


def test_a_library_that_fails_is_left_alone(
    flash_mla: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        flash_mla.calls.append("tried")
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(flash_mla, "flash_mla_with_kvcache", broken)
    x, given = decode_inputs(64)
    with pytest.warns(UserWarning, match="flash_mla failed.*no kernel image"):
        assert torch.equal(mla_decode(*x, **given), reference(*x, **given))
    mla_decode(*x, **given)
    assert flash_mla.calls == ["tried"]


@pytest.mark.gpu
@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("heads", [64, 128])
def test_the_real_one(heads: int, width: int) -> None:
    pytest.importorskip("flash_mla")
    x, given = decode_inputs(heads, width, device="cuda")
    x[3][1] = 0  # a padding sequence
    got = peers.mla_decode(*x, **given)
    assert got is not None
    torch.testing.assert_close(got, reference(*x, **given), atol=2e-2, rtol=2e-2)
