"""The products of FP8 training for a single matrix: by cuBLASLt where it is faster, else by `fp8_train_products`.

Codes and scales are the same, results are equal to the bit; on an H200 cuBLASLt is 2 to 15 % faster for the forward
product and the gradient of the input (`benchmarks.kernels.fp8_train`), and for the gradient of a weight that is more
than a wave of tiles.
"""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor

from rorqual.kernels.fp8_train_products import matrix_product, rows_product, whole
from rorqual.kernels.fp8_train_quant import Codes, Matrices
from rorqual.kernels.gluon_rings import processors

TILE = 128 * 256
"""Numbers of a result that a program of ours works on."""


@functools.cache
def _refused(device: torch.device) -> list[str]:
    """Why cuBLASLt does not do these products there, once it has said so."""
    major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0
    return [] if major == 9 else ["blocks of scales are multiplied on Hopper alone"]


def _scaled(a: Codes, b: Tensor, b_scale: Tensor, kind: torch.dtype) -> Tensor | None:
    """a b^T by cuBLASLt, or None if it refuses: b's scales `[O, D / 128]` or `[O / 128, D / 128]`."""
    refused, runs = _refused(a.codes.device), b_scale.shape[0] == len(b)
    # It reads blocks' scales in rows of four, and runs' where they lie without gaps.
    close = a.scale.stride(1) == len(a.scale) and (not runs or b_scale.stride(1) == len(b))
    if refused or not close or (not runs and b_scale.shape[1] % 4):
        return None
    try:
        return torch._scaled_mm(a.codes, b.t(), a.scale, b_scale.t(), out_dtype=kind)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        refused.append(str(error))
        warnings.warn(f"cuBLASLt refuses FP8 products: {str(error).splitlines()[0]}", stacklevel=3)
        return None


def dense_rows(x: Codes, weights: Matrices, out_width: int, dtype: torch.dtype) -> Tensor:
    """`rows_product` of all rows with one matrix `[1, O, D]`: `[N, out_width]`."""
    if dtype == torch.bfloat16 and out_width == weights.codes.shape[1]:
        y = _scaled(x, weights.codes[0], weights.scale[0], dtype)
        if y is not None:
            return y
    return rows_product(x, weights, whole(x.codes.shape[0], x.codes.device), out_width, dtype)


def dense_matrix(
    dy: Codes, x: Codes, out: int, width: int, dtype: torch.dtype, add: Tensor | None = None
) -> Tensor:
    """`matrix_product` of one matrix over all tokens: `[out, width]`."""
    even = (out, width) == (dy.codes.shape[0], x.codes.shape[0])
    plain = dtype == torch.bfloat16 and add is None and even and dy.codes.is_cuda
    if plain and out * width > TILE * processors(dy.codes):
        dw = _scaled(dy, x.codes, x.scale, dtype)
        if dw is not None:
            return dw
    groups = whole(x.codes.shape[1], x.codes.device)
    into = None if add is None else add.view(1, out, width)
    return matrix_product(dy, x, groups, out, width, dtype, into).view(out, width)
