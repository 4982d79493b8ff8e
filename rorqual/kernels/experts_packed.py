"""Launches of `experts_fp4`: routed experts held as FP4, or as FP8 in blocks that the FP8 kernels don't take.

No launch needs anything from the device, so passes can be recorded as CUDA graphs. FP4 batches of a few tokens take
two launches; all others are sorted by expert first (four launches).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from rorqual.kernels import experts_fp4, experts_triton
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


def fast(
    x_ND: Tensor,
    ids_NK: Tensor,
    weights_NK: Tensor,
    gate: Weights,
    up: Weights,
    down: Weights,
    *,
    scales: tuple[Tensor, Tensor, Tensor],
    limit: float | None = None,
    add_ND: Tensor | None = None,
    launch: dict[str, bool] | None = None,
    how: Plan | None = None,
) -> Tensor:
    """`experts` for matrices that `supported` takes, shared ones apart. `scales`: theirs, bytes for FP4 and fp32
    for FP8; `launch`: options of every launch."""
    fp4 = gate.codes.dtype == torch.int8
    x_ND, ids_NK, weights_NK = x_ND.contiguous(), ids_NK.contiguous(), weights_NK.contiguous()
    add_ND = add_ND.contiguous() if add_ND is not None else None
    count, width = gate.codes.shape[:2]
    tokens, chosen = ids_NK.shape
    how = how or plan(tokens, chosen, count, fp4)
    options: dict[str, Any] = {**(launch or {"PDL": False})}
    options["ASM"] = experts_fp4.UNPACK if fp4 and x_ND.is_cuda and x_ND.dtype == torch.bfloat16 else None
    codes = [w.codes.view(torch.int16) if fp4 else w.codes for w in (gate, up, down)]
    run = _few if how.few else _sorted
    return run(
        x_ND, ids_NK, weights_NK, codes, scales, (gate.block or (1, 1)), limit, add_ND, width, how, options
    )


def _few(
    x: Tensor, ids: Tensor, weights: Tensor, codes: list[Tensor], scales: tuple[Tensor, ...], block: tuple[int, int],
    limit: float | None, add: Tensor | None, width: int, how: Plan, options: dict[str, Any],
) -> Tensor:  # fmt: skip
    (tokens, hidden), pairs, count = x.shape, ids.numel(), codes[0].shape[0]
    slots = min(pairs, count)
    inner, y_ND = x.new_empty(slots, tokens, width), torch.empty_like(x)
    common = {
        "PAIRS": max(2, triton.next_power_of_2(pairs)), "ROWS": max(8, triton.next_power_of_2(tokens)), **options
    }  # fmt: skip
    tile = how.up
    experts_fp4.few_up_kernel[(slots * triton.cdiv(width, tile.out),)](
        fours(x), ids, weights, codes[0], codes[1], scales[0], scales[1], inner, limit or 0.0, pairs, tokens, count,
        width, hidden, hidden // 4, fours(x).shape[1], hidden // FP4_BLOCK, K=ids.shape[1], OUT=tile.out,
        SPLIT=tile.rows, DEPTH=tile.depth, STAGES=tile.stages, LIMIT=limit is not None, num_warps=tile.warps, **common,
    )  # fmt: skip
    tile = how.down
    experts_fp4.few_down_kernel[(triton.cdiv(hidden, tile.out),)](
        fours(inner), ids, codes[2], scales[2], y_ND if add is None else add, y_ND, pairs, tokens, count, width,
        hidden, width // 4, fours(inner).shape[2], width // FP4_BLOCK, OUT=tile.out, SPLIT=tile.rows,
        DEPTH=tile.depth, STAGES=tile.stages, ADD=add is not None,
        num_warps=tile.warps, **common,
    )  # fmt: skip
    return y_ND


def _sorted(
    x: Tensor, ids: Tensor, weights: Tensor, codes: list[Tensor], scales: tuple[Tensor, ...], block: tuple[int, int],
    limit: float | None, add: Tensor | None, width: int, how: Plan, options: dict[str, Any],
) -> Tensor:  # fmt: skip
    (tokens, hidden), pairs, count = x.shape, ids.numel(), codes[0].shape[0]
    launch = {name: value for name, value in options.items() if name != "ASM"}
    order, table = sort(ids, count, how.up.rows, launch)
    tiles, fp4 = table.shape[1], codes[0].dtype == torch.int16
    inner, parts, y_ND = x.new_empty(pairs, width), x.new_empty(pairs, hidden), torch.empty_like(x)
    read, step = (fours, 4) if fp4 else (lambda z: z, 1)
    tile = how.up
    experts_fp4.gate_up_kernel[(tiles * triton.cdiv(width, tile.out),)](
        read(x), weights, order, table, codes[0], codes[1], scales[0], scales[1], inner, limit or 0.0, pairs, tokens,
        tiles, width, hidden, hidden // step, read(x).shape[1], *scales[0].shape[1:], *block, K=ids.shape[1],
        ROWS=tile.rows, OUT=tile.out, DEPTH=tile.depth, STAGES=tile.stages, FP4=fp4, LIMIT=limit is not None,
        num_warps=tile.warps, **options,
    )  # fmt: skip
    tile = how.down
    experts_fp4.down_kernel[(tiles * triton.cdiv(hidden, tile.out),)](
        read(inner), order, table, codes[2], scales[2], parts, tiles, width, hidden, width // step,
        read(inner).shape[1], *scales[2].shape[1:], *block, ROWS=tile.rows, OUT=tile.out, DEPTH=tile.depth, STAGES=tile.stages, FP4=fp4,
        num_warps=tile.warps, **options,
    )  # fmt: skip
    size = min(2048, triton.next_power_of_2(hidden))
    experts_triton.sum_kernel[(tokens, triton.cdiv(hidden, size))](
        parts, ids, y_ND if add is None else add, y_ND, tokens, count, hidden, K=ids.shape[1], SHARED=0,
        ADD=add is not None, BLOCK=size, num_warps=4, **launch,
    )  # fmt: skip
    return y_ND


def sort(ids_NK: Tensor, count: int, rows: int, launch: dict[str, bool]) -> tuple[Tensor, Tensor]:
    """Pairs by expert `[pairs]` and tiles of `rows` of them `[3, tiles]`: see `experts_triton.sort_kernel`."""
    pairs, tokens = ids_NK.numel(), ids_NK.shape[0]
    tiles = pairs // rows + count
    order = ids_NK.new_empty(pairs, dtype=torch.int32)
    table = ids_NK.new_empty(3, tiles, dtype=torch.int32)
    nothing = torch.empty(128, dtype=torch.float32, device=ids_NK.device)
    chunk, bins, parts, counts = min(4096, max(16, triton.next_power_of_2(pairs))), 0, 1, order
    if pairs > 4096:
        chunk, bins, parts = 1024, triton.next_power_of_2(count + 1), 8
        counts = ids_NK.new_empty(triton.cdiv(pairs, chunk), bins, dtype=torch.int32)
        experts_triton.count_kernel[(counts.shape[0],)](
            ids_NK, counts, pairs, count, CHUNK=chunk, BINS=bins, num_warps=4, **launch
        )
    experts_triton.sort_kernel[(count, parts)](
        ids_NK, counts, order, table, nothing, nothing.to(FP8), nothing, pairs, tokens, count, 0, tiles, 0,
        ROWS=rows, CHUNK=chunk, BINS=bins, GROUPS=64, num_warps=8, **launch,
    )  # fmt: skip
    return order, table
