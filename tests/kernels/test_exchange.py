"""Exchanges through peers' memory: two and three processes share a file's pages as GPUs share memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rorqual.kernels.exchange import PROGRAMS, SLOT, Near, room
from tests.engine.ranks import together

SHAPES = [(3, 7), (1, 5000), (6, 1024), (2, 33)]


def numbers(rank: int, turn: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * turn + rank)
    return torch.randn(shape, generator=generator).to(dtype)


def exchange(place: str, ranks: int) -> list[str]:
    """Calls of every kind and several sizes in a row, each held to plain sums; what differs."""
    import os

    rank, bytes_each = int(os.environ["RANK"]), room(ranks)
    shared = torch.from_file(place, shared=True, size=ranks * bytes_each, dtype=torch.uint8)
    peers = Near([shared.data_ptr() + r * bytes_each for r in range(ranks)], rank, torch.device("cpu"))
    wrong = []
    for turn in range(6):
        shape, dtype = SHAPES[turn % len(SHAPES)], (torch.float32, torch.bfloat16, torch.float64)[turn % 3]
        whole = (ranks * shape[0], *shape[1:])
        each = [numbers(r, turn, shape, dtype) for r in range(ranks)]
        wide = [numbers(r, turn + 50, whole, dtype) for r in range(ranks)]
        total = torch.stack([w.double() for w in wide]).sum(0)
        checks: list[tuple[str, torch.Tensor, torch.Tensor]] = [
            ("gather", peers.gather(each[rank]), torch.cat(each)),
            ("scatter", peers.scatter_sum(wide[rank]), total.chunk(ranks)[rank]),
            ("sum", peers.sum(wide[rank]), total),
        ]
        bound = {torch.float32: 1e-6, torch.bfloat16: 2**-6, torch.float64: 0.0}[dtype]
        for name, found, right in checks:
            far = (found.double() - right.double()).abs().max().item()
            if found.shape != right.shape or not far <= (0 if name == "gather" else bound * 4):
                wrong.append(f"{name}, turn {turn}: {far}")
    return wrong


@pytest.mark.parametrize("ranks", [2, 3])
def test_exchanges(ranks: int, tmp_path: Path) -> None:
    place = tmp_path / "shared"
    place.write_bytes(bytes(ranks * room(ranks)))
    found: list[Any] = together(exchange, ranks, str(place), ranks)
    assert found == [[]] * ranks


def test_what_it_takes() -> None:
    peers = Near([0, 0], 0, torch.device("cpu"))
    assert peers.takes(torch.empty(SLOT * PROGRAMS, dtype=torch.uint8).view(torch.bfloat16))
    assert not peers.takes(torch.empty(SLOT * PROGRAMS + 2, dtype=torch.uint8).view(torch.bfloat16))
    assert not peers.takes(torch.empty(4, dtype=torch.int64)) and not peers.takes(torch.empty(0))
