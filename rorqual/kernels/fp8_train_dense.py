"""The products of FP8 training for a single matrix: by cuBLASLt where it is faster, else by `fp8_train_products`.

Codes and scales are the same, and so are results, to the bit. On an H200 cuBLASLt is 10 to 25 % faster than ours
(`benchmarks.kernels.fp8_train`), except where a weight's gradient has too few tiles for all processors: then ours
takes the tokens in several parts, whose sums are added afterwards.
"""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor

from rorqual.kernels.fp8_train_products import Groups, matrix_product, rows_product, whole
from rorqual.kernels.fp8_train_quant import BLOCK, Codes, Matrices, room
from rorqual.kernels.gluon_rings import processors

TILE = 128 * 256
"""Numbers of a result that a program of ours works on."""

FULL = 0.85
"""Share of the processors that a weight's gradient has to keep busy for cuBLASLt to be the faster one."""

PARTS = 12
"""Most parts that the tokens of a weight's gradient are taken in."""

_refused: set[tuple[object, ...]] = set()
"""Shapes, and how they are scaled, that cuBLASLt has refused."""


@functools.cache
def _hopper(device: torch.device) -> bool:
    """Whether cuBLASLt multiplies such blocks of scales there: on Hopper alone."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def _scaled(a: Codes, b: Tensor, b_scale: Tensor, kind: torch.dtype) -> Tensor | None:
    """a b^T by cuBLASLt, or None if it refuses: b's scales `[O, D / 128]` or `[O / 128, D / 128]`."""
    runs = b_scale.shape[0] == len(b)
    # It reads blocks' scales in rows of four, and runs' where they lie without gaps; sizes are in 16s.
    close = a.scale.stride(1) == len(a.scale) and (not runs or b_scale.stride(1) == len(b))
    shape = (a.codes.device, a.codes.shape, len(b), runs, kind)
    if not close or len(b) % 16 or (not runs and b_scale.shape[1] % 4) or shape in _refused:
        return None
    try:
        return torch._scaled_mm(a.codes, b.t(), a.scale, b_scale.t(), out_dtype=kind)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        _refused.add(shape)
        rows, depth = a.codes.shape
        named = f"{rows} x {len(b)} x {depth}"
        warnings.warn(f"cuBLASLt refuses FP8's {named}: {str(error).splitlines()[0]}", stacklevel=3)
        return None


def dense_rows(x: Codes, weights: Matrices, out_width: int, dtype: torch.dtype) -> Tensor:
    """`rows_product` of all rows with one matrix `[1, O, D]`: `[N, out_width]`."""
    if dtype == torch.bfloat16 and _hopper(x.codes.device):
        y = _scaled(x, weights.codes[0, :out_width], weights.scale[0], dtype)
        if y is not None:
            return y
    return rows_product(x, weights, whole(x.codes.shape[0], x.codes.device), out_width, dtype)


def parts_of(tiles: int, steps: int, numbers: int, programs: int) -> int:
    """Of how many parts a gradient's tokens are made, for it to take the shortest time: `tiles` of a result of so many
    `numbers`, `steps` of 128 tokens. A program works on a tile for as many steps of a microsecond, and 4 to write it;
    numbers of a part are written and read again in fp32, at 4 TB/s, after 10 of launches."""

    def time(parts: int) -> float:
        again = 0.0 if parts == 1 else 10 + parts * numbers * 2e-6
        return -(-tiles * parts // programs) * (-(-steps // parts) + 4) + again

    return min(range(1, min(PARTS, steps) + 1), key=time)


@functools.lru_cache(64)
def _parted(tokens: int, parts: int, device: torch.device) -> Groups:
    """The tokens in parts of as many 128s, or one more, as if each were an expert's."""
    with torch.inference_mode(False):
        steps = torch.arange(1, parts + 1, device=device) * (tokens // BLOCK) // parts
        return Groups.of((steps * BLOCK).to(torch.int32), tokens)


def in_parts(dy: Codes, x: Codes, out: int, width: int, dtype: torch.dtype, parts: int) -> Tensor:
    """`matrix_product` of one matrix `[out, width]`, its tokens taken in parts."""
    device, tokens = x.codes.device, x.codes.shape[1]
    if parts == 1:
        return matrix_product(dy, x, whole(tokens, device), out, width, dtype)[0]
    groups = _parted(tokens, parts, device)
    return matrix_product(dy, x, groups, out, width, torch.float32).sum(0).to(dtype)


def dense_matrix(
    dy: Codes, x: Codes, out: int, width: int, dtype: torch.dtype, add: Tensor | None = None
) -> Tensor:
    """`matrix_product` of one matrix over all tokens: `[out, width]`."""
    kind = dtype if add is None else torch.float32
    if not x.codes.is_cuda:
        dw = in_parts(dy, x, out, width, kind, 1)
        return dw if add is None else add.add_(dw)
    full = room(out)  # all rows of whole tiles: they are written without masks
    tiles, programs = -(-full * room(width) // TILE), processors(x.codes)
    busy = tiles / (-(-tiles // programs) * programs)
    if busy > FULL and kind == torch.bfloat16 and width % BLOCK == 0 and _hopper(x.codes.device):
        found = _scaled(dy, x.codes, x.scale, kind)
        if found is not None:
            return found[:out]
    parts = parts_of(tiles, x.codes.shape[1] // BLOCK, full * width, programs)
    dw = in_parts(dy, x, full, width, kind, parts)
    return dw[:out] if add is None else add.add_(dw[:out])
