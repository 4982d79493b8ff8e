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

# FlashMLA's time over ours by heads, queries, sequences and keys of each, on an H200, its plan made before: a pass
# makes it once, in 11 to 40 us, for all its layers. 128 rows a sequence or more:
#   128 x 1: 128 x 4096 0.90 to 0.95, 8 x 32768 0.93, 64 x 1024 0.83; 32 x 1024 1.09, 16 x 2048 1.02, 8 x 4096 1.05,
#            1 x 65536 1.08, 1 x 4096 1.16
#   128 x 2: 32 x 4096 0.86.   64 x 2: 32 x 4096 0.94, 8 x 32768 0.93, 64 x 512 0.81
# 64 rows:   256 x 512 0.84, 128 x 1024 0.88; 128 x 4096 1.05, 64 x 1024 1.04, 16 x 2048 0.96, 1 x 4096 1.69
# 16 heads:  0.99 to 1.41.
KEYS = 2**17
"""Keys that a call of `mla_decode` may meet in all, from which FlashMLA is faster for 128 rows a sequence or more."""
BLOCKS = 128
"""Blocks of 64 rows of a sequence, as many as multiprocessors: from here on no keys are split, and FlashMLA is faster
whatever the number of keys; for 64 rows a sequence, as long as there are few."""
SHORT = 1024
"""What is few."""
ROWS, OUT = 512, 4096
"""Rows and outputs from which DeepGEMM's product is the faster, by 4 to 15 %."""

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
    """`rorqual.kernels.mla_decode.mla_decode` by FlashMLA: bf16 at V3's widths, 64 or 128 heads."""
    heads, channels = q_NHC.shape[1:]
    fits = q_NHC.dtype == pages_PTC.dtype == torch.bfloat16 and (rank, channels) == (512, 576)
    if not fits or pages_PTC.shape[1] != 64 or heads not in (64, 128) or not _many(q_NHC, table_SB):
        return None
    flash_mla = library("flash_mla", q_NHC.device)
    if flash_mla is None:
        return None

    def call() -> Tensor:
        out, _ = flash_mla.flash_mla_with_kvcache(
            q_NHC.contiguous().view(-1, width, heads, channels), pages_PTC[:, :, None], table_SB.contiguous(), ends_S,
            rank, _schedule(flash_mla, ends_S, heads, width), softmax_scale=scale, causal=True, use_legacy=True,
        )  # fmt: skip
        return out.flatten(0, 1)

    return _attempt("flash_mla", call)


def _many(q_NHC: Tensor, table_SB: Tensor) -> bool:
    """Whether a decode is one that FlashMLA is faster in; see the figures above."""
    sequences, columns = table_SB.shape
    blocks = q_NHC.shape[0] * q_NHC.shape[1] // 64
    if blocks >= 2 * sequences > 0:
        return blocks >= BLOCKS or 64 * sequences * columns >= KEYS
    return blocks >= BLOCKS and 64 * columns <= SHORT


def _schedule(flash_mla: Any, ends_S: Tensor, heads: int, width: int) -> Any:
    """FlashMLA's plan of a call: the first layer of a pass makes it, and the others read it. It is kept with the
    lengths it is for."""
    key = heads, width, 0 if ends_S.is_inference() else ends_S._version
    kept = getattr(ends_S, "_flash_mla", None)
    if kept is None or kept[0] != key:
        kept = key, flash_mla.get_mla_metadata()[0]
        ends_S._flash_mla = kept  # type: ignore[attr-defined]
    return kept[1]


def fp8_linear(
    x_ND: Tensor, codes_OD: Tensor, scale: Tensor, bias: Tensor | None, quantize: Callable[[Tensor], Any]
) -> Tensor | None:
    """`rorqual.kernels.fp8_linear.fp8_linear` by DeepGEMM: bf16 rows, fp32 scales of 128x128 blocks, large on
    both sides (smaller ones of ours are as fast, or faster).
    `quantize` gives x's codes and scales, runs of 128 channels side by side."""
    rows, (out, width) = x_ND.shape[0], codes_OD.shape
    fits = x_ND.dtype == torch.bfloat16 and scale.dtype == torch.float32 and scale.is_contiguous()
    if not fits or rows < ROWS or out < OUT or out % 64 or width % 128:
        return None
    deep_gemm = library("deep_gemm", x_ND.device)
    if deep_gemm is None:
        return None

    def call() -> Tensor:
        y = x_ND.new_empty(rows, out)
        deep_gemm.fp8_gemm_nt(quantize(x_ND), (codes_OD, scale), y, disable_ue8m0_cast=True)
        return y if bias is None else y + bias

    return _attempt("deep_gemm", call)
