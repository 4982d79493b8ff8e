"""Triton, where it is installed. Kernels are written against `triton` and `tl` from here, so that a machine
without it imports every module and runs the references.

On a machine without a GPU, `TRITON_INTERPRET=1` set before the first import runs kernels in Triton's
interpreter: the tests do that.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

triton: Any
tl: Any
try:
    import triton  # type: ignore[no-redef]
    import triton.language as tl  # type: ignore[no-redef]
except ImportError:  # a machine without Triton: kernels can be defined, not launched

    class _Absent:
        """Stands in for a module: any name of it is a decorator that gives its function back."""

        def __getattr__(self, name: str) -> Any:
            return lambda fn=None, **_: fn if callable(fn) else (lambda inner: inner)

    triton = tl = _Absent()
    INSTALLED = False
else:
    INSTALLED = True


def usable(*tensors: Tensor) -> bool:
    """Whether Triton kernels can run on these tensors: it is installed, and all of them are on a GPU."""
    return INSTALLED and all(t.is_cuda for t in tensors)
