"""Peers' kernel libraries behind our own functions: used where one is installed and was measured to be faster.

None is needed, and none is a dependency. A function here gives what the function of ours of the same name gives, or
None: no such library, a shape that ours is faster for, or peers switched off, by RORQUAL_PEERS=0 in the environment
or by batch-invariant mode, whose bits must not depend on what is installed. The rules are by shape alone, so two
runs take the same path. A library that fails is left alone from then on.

Measured on one H200 by `python -m benchmarks.kernels.peers`.
"""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rorqual.kernels.mode import is_invariant

_failed: set[str] = set()


@functools.cache
def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception:  # one that is there but doesn't load is as good as none
        return None


@functools.cache
def _hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def library(name: str, device: torch.device) -> Any:
    """The peer's module of this name, where it may be used; else None."""
    if os.environ.get("RORQUAL_PEERS") == "0" or is_invariant() or name in _failed or not _hopper(device):
        return None
    return _imported(name)


def _attempt(name: str, call: Callable[[], Tensor]) -> Tensor | None:
    """What `call` gives; None, now and from now on, if it fails."""
    try:
        return call()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        _failed.add(name)
        warnings.warn(f"{name} failed and is not used any more: {error}", stacklevel=3)
        return None


def mla_decode(
    q_NHC: Tensor, pages_PTC: Tensor, table_SB: Tensor, ends_S: Tensor, *, width: int, rank: int, scale: float
) -> Tensor | None:
    """`rorqual.kernels.mla_decode.mla_decode` by FlashMLA: bf16 at V3's widths, from 64 rows a sequence on."""
    heads, channels = q_NHC.shape[1:]
    fits = q_NHC.dtype == pages_PTC.dtype == torch.bfloat16 and (rank, channels) == (512, 576)
    if not fits or pages_PTC.shape[1] != 64 or heads not in (64, 128) or q_NHC.shape[0] == 0:
        return None
    flash_mla = library("flash_mla", q_NHC.device)
    if flash_mla is None:
        return None

    def call() -> Tensor:
        grouped = q_NHC.contiguous().view(-1, width, heads, channels)
        schedule, _ = flash_mla.get_mla_metadata()
        out, _ = flash_mla.flash_mla_with_kvcache(
            grouped, pages_PTC[:, :, None], table_SB.contiguous(), ends_S, rank, schedule, softmax_scale=scale,
            causal=True, use_legacy=True,
        )  # fmt: skip
        return out.flatten(0, 1)

    return _attempt("flash_mla", call)
