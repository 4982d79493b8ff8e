"""Launches of `experts_fp4`: routed experts held as FP4, or as FP8 in blocks that the FP8 kernels don't take.

No launch needs anything from the device, so passes can be recorded as CUDA graphs. FP4 batches of a few tokens take
two launches; all others are sorted by expert first (four launches).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from rorqual.kernels import experts_fp4, experts_triton
from rorqual.kernels.experts_run import ONE_CHUNK, Batch, place
from rorqual.kernels.gpu import triton
from rorqual.kernels.quant import E8M0, FP4_BLOCK, FP8

if TYPE_CHECKING:
    from rorqual.kernels.experts import Weights

FEW = 4
"""Batches up to this size of FP4 take the form of two launches."""


class Tiles(NamedTuple):
    """Pairs (or, of the few-token form, splits of the inner axis), channels and inputs of a tile."""

    rows: int
    out: int
    depth: int
    warps: int
    stages: int


class Plan(NamedTuple):
    """Tiles of both products; `few`: the form for a few tokens."""

    up: Tiles
    down: Tiles
    few: bool = False


def plan(tokens: int, chosen: int, count: int, fp4: bool) -> Plan:
    """By shape alone."""
    if fp4 and tokens <= FEW:
        return Plan(Tiles(4, 16, 128, 4, 3), Tiles(4, 16, 128, 4, 3), few=True)
    mean = tokens * chosen / count
    full = mean + 1.5 * mean**0.5  # few experts have more pairs than that
    rows = 16 if full <= 16 else 32 if full <= 32 else 64 if full <= 64 else 128
    if not fp4:
        return Plan(Tiles(min(rows, 64), 32, 64, 4, 2), Tiles(min(rows, 64), 64, 64, 4, 2))
    warps = 4 if rows <= 32 else 8
    return Plan(Tiles(rows, 64, 128, warps, 3), Tiles(rows, 128, 128, warps, 3))


def supported(x_ND: Tensor, *weights: Weights) -> bool:
    """Whether `fast` takes these: all FP4 with e8m0 scales, or all FP8 with one block size."""
    first = weights[0]
    width, hidden = first.scale.shape[-2:] if first.scale is not None else (0, 0)
    there = x_ND.shape[0] > 0 and all(
        w.scale is not None and w.codes.is_contiguous() and w.scale.is_contiguous() for w in weights
    )
    if not there:
        return False
    if first.codes.dtype == torch.int8:
        width, hidden = first.codes.shape[-2], 2 * first.codes.shape[-1]
        return (
            x_ND.dtype in (torch.bfloat16, torch.float32)
            and width % FP4_BLOCK == 0
            and hidden % FP4_BLOCK == 0
            and all(w.codes.dtype == torch.int8 and w.scale.dtype == E8M0 for w in weights)  # type: ignore[union-attr]
        )
    blocks = {w.block for w in weights}
    return x_ND.dtype in (torch.bfloat16, torch.float16, torch.float32) and (
        all(w.codes.dtype == FP8 for w in weights) and len(blocks) == 1 and None not in blocks
    )


def fours(x: Tensor) -> Tensor:
    """x as the FP4 kernels read it: four 16-bit numbers as one integer; fp32 as it is."""
    return x if x.dtype == torch.float32 else x.view(torch.int64)


def fast(b: Batch, scales: Sequence[Tensor], how: Plan | None = None) -> Tensor:
    """`experts` for a batch whose routed matrices `supported` takes and that has no shared ones. `scales`: theirs,
    bytes for FP4 and fp32 for FP8."""
    fp4 = b.routed[0].codes.dtype == torch.int8
    how = how or plan(b.tokens, b.chosen, b.count, fp4)
    exact = experts_fp4.UNPACK if fp4 and b.x.is_cuda and b.x.dtype == torch.bfloat16 else None
    codes = [w.codes.view(torch.int16) if fp4 else w.codes for w in b.routed]
    run = _few if how.few else _sorted
    return run(b, codes, scales, how, {**b.launch, "ASM": exact})


def _few(
    b: Batch, codes: list[Tensor], scales: Sequence[Tensor], how: Plan, options: dict[str, Any]
) -> Tensor:
    slots = min(b.pairs, b.count)
    inner, y_ND = b.x.new_empty(slots, b.tokens, b.width), torch.empty_like(b.x)
    common = {
        "PAIRS": max(2, triton.next_power_of_2(b.pairs)),
        "ROWS": max(8, triton.next_power_of_2(b.tokens)),
        **options,
    }
    tile, x, y = how.up, fours(b.x), fours(inner)
    experts_fp4.few_up_kernel[(slots * triton.cdiv(b.width, tile.out),)](
        x, b.ids, b.weights, codes[0], codes[1], scales[0], scales[1], inner, b.limit or 0.0, b.pairs, b.tokens,
        b.count, b.width, b.hidden, b.hidden // 4, x.shape[1], b.hidden // FP4_BLOCK, K=b.chosen, OUT=tile.out,
        SPLIT=tile.rows, DEPTH=tile.depth, STAGES=tile.stages, LIMIT=b.limit is not None, num_warps=tile.warps,
        **common,
    )  # fmt: skip
    tile = how.down
    experts_fp4.few_down_kernel[(triton.cdiv(b.hidden, tile.out),)](
        y, b.ids, codes[2], scales[2], y_ND if b.add is None else b.add, y_ND, b.pairs, b.tokens, b.count, b.width,
        b.hidden, b.width // 4, y.shape[2], b.width // FP4_BLOCK, OUT=tile.out, SPLIT=tile.rows, DEPTH=tile.depth,
        STAGES=tile.stages, ADD=b.add is not None, num_warps=tile.warps, **common,
    )  # fmt: skip
    return y_ND


def _sorted(
    b: Batch, codes: list[Tensor], scales: Sequence[Tensor], how: Plan, options: dict[str, Any]
) -> Tensor:
    order, table = sort(b, how.up.rows)
    tiles, fp4 = table.shape[1], codes[0].dtype == torch.int16
    block = (1, 1) if fp4 else b.routed[0].block or (1, 1)
    inner, parts = b.x.new_empty(b.pairs, b.width), b.x.new_empty(b.pairs, b.hidden)
    x, y, step = (fours(b.x), fours(inner), 4) if fp4 else (b.x, inner, 1)
    y_ND, tile = torch.empty_like(b.x), how.up
    experts_fp4.gate_up_kernel[(tiles * triton.cdiv(b.width, tile.out),)](
        x, b.weights, order, table, codes[0], codes[1], scales[0], scales[1], inner, b.limit or 0.0, b.pairs, b.tokens,
        tiles, b.width, b.hidden, b.hidden // step, x.shape[1], *scales[0].shape[1:], *block, K=b.chosen,
        ROWS=tile.rows, OUT=tile.out, DEPTH=tile.depth, STAGES=tile.stages, FP4=fp4, LIMIT=b.limit is not None,
        num_warps=tile.warps, **options,
    )  # fmt: skip
    tile = how.down
    experts_fp4.down_kernel[(tiles * triton.cdiv(b.hidden, tile.out),)](
        y, order, table, codes[2], scales[2], parts, tiles, b.width, b.hidden, b.width // step, y.shape[1],
        *scales[2].shape[1:], *block, ROWS=tile.rows, OUT=tile.out, DEPTH=tile.depth, STAGES=tile.stages, FP4=fp4,
        num_warps=tile.warps, **options,
    )  # fmt: skip
    size = min(2048, triton.next_power_of_2(b.hidden))
    experts_triton.sum_kernel[(b.tokens, triton.cdiv(b.hidden, size))](
        parts, b.ids, y_ND if b.add is None else b.add, y_ND, b.tokens, b.count, b.hidden, K=b.chosen, SHARED=0,
        ADD=b.add is not None, BLOCK=size, num_warps=4, **b.launch,
    )  # fmt: skip
    return y_ND


def sort(b: Batch, rows: int) -> tuple[Tensor, Tensor]:
    """Pairs by expert `[pairs]` and tiles of `rows` of them `[3, tiles]`: see `experts_triton.sort_kernel`."""
    tiles = b.pairs // rows + b.count
    order = b.ids.new_empty(b.pairs, dtype=torch.int32)
    table = b.ids.new_empty(3, tiles, dtype=torch.int32)
    nothing = b.x.new_empty(0, dtype=torch.float32)
    if b.pairs > ONE_CHUNK:
        place(b, rows, order, table, nothing, nothing, b.ids.new_empty(2, dtype=torch.int32))
    else:
        chunk = max(16, triton.next_power_of_2(b.pairs))
        experts_triton.sort_kernel[(b.count,)](
            b.ids, order, table, b.x, b.x, nothing, b.pairs, b.tokens, b.count, 0, tiles, 0, ROWS=rows, CHUNK=chunk,
            GROUPS=64, num_warps=8, **b.launch,
        )  # fmt: skip
    return order, table
