"""Kernels compiled side by side before they are needed.

Triton compiles a kernel when it is first launched, one after the other: a first pass through a model spends half a
minute in the compiler, on one core. Inside `compiled_ahead()` nothing is launched; each launch sends its kernel, if it
is not there yet, to a few threads, and the end of the scope waits for them. A pass run inside goes through the same
shapes, and so the same kernels, as the one that follows it outside.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

THREADS = 12
"""Most compilations at once."""

_busy = threading.Lock()


class _Loading(ThreadPoolExecutor):
    """Threads that also load what they have compiled: its launcher is C, which a compiler has to take too."""

    def __init__(self) -> None:
        super().__init__(min(THREADS, os.cpu_count() or 1), "rorqual-compile")
        self.device = torch.cuda.current_device() if torch.cuda.is_available() else None

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Any:
        def load() -> Any:
            kernel = fn(*args, **kwargs)
            if self.device is not None:
                torch.cuda.set_device(self.device)
                kernel._init_handles()
            return kernel

        return super().submit(load)


class _Zeroed(TorchFunctionMode):
    """New memory holds zeros: what a kernel that doesn't run leaves unwritten may be read as an index. (A mode that
    sees operators instead of functions would have PyTorch import its compiler first, which takes seconds.)"""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in _EMPTY:
            out.zero_()
        return out


_EMPTY = frozenset(
    (
        torch.empty,
        torch.empty_like,
        torch.empty_strided,
        torch.Tensor.new_empty,
        torch.Tensor.new_empty_strided,
    )
)


@functools.cache
def prepare() -> list[threading.Thread]:
    """Have threads do, while there is something else to wait for, what Triton does before its first kernel: make its
    driver, a C file to compile the first time, and hash the 400 MB of itself, a part of every kernel's name."""

    def driver() -> None:
        from triton.runtime import driver

        _ = driver.active

    def key() -> None:
        from triton.runtime.cache import triton_key

        triton_key()

    def quietly(work: Callable[[], None]) -> None:
        with contextlib.suppress(Exception):  # what is wrong, the first kernel will say
            work()

    threads = [threading.Thread(target=quietly, args=(work,), daemon=True) for work in (driver, key)]
    for thread in threads:
        thread.start()
    return threads


@contextlib.contextmanager
def compiled_ahead() -> Iterator[bool]:
    """What launches kernels inside, in this thread, has them compiled, many at a time, and not run.

    Gives whether that is so: without Triton, while another thread is at it, or with RORQUAL_AHEAD=0 in the
    environment, the body runs as it would without the scope. Results inside are meaningless. Errors of the compiler
    are left to the launch that needs the kernel.
    """
    try:
        from triton.runtime._async_compile import AsyncCompileMode
        from triton.runtime.jit import JITFunction
    except ImportError:
        yield False
        return
    if os.environ.get("RORQUAL_AHEAD") == "0" or not _busy.acquire(blocking=False):
        yield False
        return
    run, here = JITFunction.run, threading.get_ident()

    def send(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        return run(self, *args, grid=grid, warmup=warmup or threading.get_ident() == here, **kwargs)

    try:
        if torch.cuda.is_available():
            for thread in prepare():
                thread.join()
        with _Loading() as pool, AsyncCompileMode(pool, ignore_errors=True):
            JITFunction.run = send
            try:
                with _Zeroed():
                    yield True
            finally:
                JITFunction.run = run
    finally:
        _busy.release()
