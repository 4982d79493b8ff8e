"""Compiling ahead: inside the scope kernels are compiled and not run, by this thread alone; afterwards all is as before."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from rorqual.kernels.ahead import compiled_ahead
from rorqual.kernels.gpu import tl, triton

jit = pytest.importorskip("triton.runtime.jit")


@triton.jit
def _fill(x, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + at, at * 2, mask=at < size)


def test_launches_of_this_thread_become_compilations(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Any, bool]] = []
    monkeypatch.setattr(
        jit.JITFunction, "run", lambda self, *args, grid, warmup, **kwargs: seen.append((args, warmup))
    )
    kernel = object.__new__(jit.JITFunction)
    plain = jit.JITFunction.run
    with pytest.raises(KeyError), compiled_ahead():
        kernel[(1,)](1)
        other = threading.Thread(target=lambda: kernel[(1,)](2))
        other.start()
        other.join()
        with compiled_ahead():  # a scope in a scope changes nothing
            kernel[(1,)](3)
        raise KeyError
    kernel[(1,)](4)
    assert seen == [((1,), True), ((2,), False), ((3,), True), ((4,), False)]
    assert jit.JITFunction.run is plain


def test_new_memory_is_zero_inside() -> None:
    with compiled_ahead():
        made = [
            torch.empty(1000),
            torch.ones(1000).new_empty(1000),
            torch.empty_like(torch.ones(1000)),
            torch.empty_strided((10, 100), (100, 1), dtype=torch.int32),
        ]
        assert not any(t.any() for t in made)


@pytest.mark.gpu
def test_on_the_gpu() -> None:
    from triton import knobs

    compiled = []
    before = knobs.compilation.listener
    knobs.compilation.listener = lambda *, src, cache_hit, **_: compiled.append((src.name, cache_hit))
    try:
        x = torch.full((100,), -1, device="cuda")
        with compiled_ahead():
            for block in (16, 32, 64):
                _fill[(triton.cdiv(100, block),)](x, 100, BLOCK=block)
        assert (x == -1).all() and len(compiled) == 3
        for block in (16, 32, 64):
            _fill[(triton.cdiv(100, block),)](x, 100, BLOCK=block)
        assert torch.equal(x, 2 * torch.arange(100, device="cuda")) and len(compiled) == 3
    finally:
        knobs.compilation.listener = before
