"""Batch-invariant mode: what is computed for a token depends on that token and those before it, to the bit.

Sums of floating-point numbers depend on their order, and fast products choose the order by the shapes they
meet; so a token's log-probability commonly changes with the batch it stands in, with how its prompt was cut,
with a prefix found in a cache, with drafts verified beside it. Inside `invariant()` every product is taken in an
order that none of these changes. On GPUs kernels have a form with fixed tiles for it; elsewhere each token is a
pass of its own, slow and plain.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch
from torch import Tensor

from rorqual.kernels.gpu import usable

_on: ContextVar[bool] = ContextVar("invariant", default=False)


@contextlib.contextmanager
def invariant(on: bool = True) -> Iterator[None]:
    """Batch-invariant mode inside (or, with False, outside it again)."""
    token = _on.set(on)
    try:
        yield
    finally:
        _on.reset(token)


_fp8: ContextVar[bool] = ContextVar("fp8", default=False)


@contextlib.contextmanager
def fp8_products(on: bool = True) -> Iterator[None]:
    """Layers that learn inside multiply in FP8, there and back (`fp8_train`; V3 report 3.3)."""
    token = _fp8.set(on)
    try:
        yield
    finally:
        _fp8.reset(token)


def learns_in_fp8() -> bool:
    """Whether a layer is to do so here."""
    return _fp8.get() and torch.is_grad_enabled()


def is_invariant() -> bool:
    """Whether batch-invariant mode is on here."""
    return _on.get()


def by_fixed_kernels(*tensors: Tensor) -> bool:
    """Whether an operation on these has to take its fixed kernel: the mode is on, kernels can run, and no
    gradient is wanted."""
    return _on.get() and not torch.is_grad_enabled() and usable(*tensors)
