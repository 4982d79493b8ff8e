"""Compiling ahead: inside the scope kernels are compiled and not run, by this thread alone; afterwards all is as before."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from rorqual.kernels.ahead import compiled_ahead, prepare
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


def test_preparations_are_made_once() -> None:
    threads = prepare()
    assert prepare() is threads
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert pytest.importorskip("triton.runtime.cache").triton_key.cache_info().currsize == 1


def test_nothing_heavy_is_imported() -> None:
    """The first token of a process would wait for it: PyTorch's compiler takes seconds to import."""
    said = subprocess.run(
        [sys.executable, "-c", LIGHT],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    assert said.stdout.split() == ["True", "False"], said.stdout + said.stderr


LIGHT = """
import sys, torch
from rorqual.kernels.ahead import compiled_ahead
with compiled_ahead() as ahead:
    torch.nn.functional.linear(torch.empty(2, 3), torch.ones(4, 3)).new_empty(5)
print(ahead, "torch._dynamo" in sys.modules)
"""


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
