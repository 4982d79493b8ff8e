"""The launches behind `experts`: a few tokens through two kernels, more sorted by expert, multiplied and summed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rorqual.kernels import (
    experts_few,
    experts_gather,
    experts_gluon,
    experts_gluon16,
    experts_gluon_down,
    experts_triton,
)
from rorqual.kernels.gpu import triton
from rorqual.kernels.held import held_scale
from rorqual.kernels.quant import FP8

if TYPE_CHECKING:
    from rorqual.kernels.experts import Plan, Shared, Weights

PDL = True
"""Whether kernels are set up while the one before ends (programmatic dependent launch)."""

ONE_CHUNK = 4096
"""Up to so many pairs are sorted in one launch, in which every expert's program looks at all of them."""

PLACED = 64
"""Pairs whose places one program finds, by comparing each with each."""


def _scale(weight: Weights) -> Tensor:
    """The scales in fp32; where there are none, something to point at."""
    return weight.codes if weight.scale is None else held_scale(weight.scale)


@dataclass(frozen=True)
class Batch:
    """`fast`'s arguments and their sizes. Without shared experts `shared` holds the routed ones: something to
    point at."""

    x: Tensor
    ids: Tensor
    weights: Tensor
    routed: Shared
    shared: Shared
    shared_width: int
    limit: float | None
    add: Tensor | None

    @property
    def tokens(self) -> int:
        return self.x.shape[0]

    @property
    def hidden(self) -> int:
        return self.x.shape[1]

    @property
    def chosen(self) -> int:
        return self.ids.shape[1]

    @property
    def pairs(self) -> int:
        return self.ids.numel()

    @property
    def count(self) -> int:
        return self.routed[0].codes.shape[0]

    @property
    def width(self) -> int:
        return self.routed[0].codes.shape[1]

    @property
    def extra(self) -> int:
        """How many experts the shared ones are."""
        return self.shared_width // self.width

    @cached_property
    def launch(self) -> dict[str, bool]:
        """Options of every launch: on Hopper a kernel is set up while the one before it ends."""
        if not self.x.is_cuda or torch.cuda.get_device_capability(self.x.device)[0] < 9:
            return {"PDL": False}
        return {"PDL": PDL, "launch_pdl": PDL}

    @property
    def fp8(self) -> bool:
        return self.routed[0].scale is not None


def run_few(b: Batch, how: Plan) -> Tensor:
    gate, up, down = b.routed
    shared_gate, shared_up, shared_down = b.shared
    slots = min(b.pairs, b.count) + b.extra
    inner = b.x.new_empty(slots, b.tokens, b.width)
    y_ND = torch.empty_like(b.x)
    common = {
        "PAIRS": max(2, triton.next_power_of_2(b.pairs)),
        "ROWS": max(8, triton.next_power_of_2(b.tokens)),
        "FP8": b.fp8,
        # With FP8 it was slower: 41 us against 35 for one token.
        **(b.launch if not b.fp8 else {"PDL": False}),
    }
    tile = how.up
    experts_few.few_up_kernel[(slots * triton.cdiv(b.width, tile.out),)](
        b.x, b.ids, b.weights, gate.codes, up.codes, _scale(gate), _scale(up), shared_gate.codes, shared_up.codes,
        _scale(shared_gate), _scale(shared_up), inner, b.limit or 0.0, b.pairs, b.tokens, b.count, b.extra, b.width,
        b.hidden, K=b.chosen, OUT=tile.out, SPLIT=tile.rows, DEPTH=tile.depth, STAGES=tile.stages,
        LIMIT=b.limit is not None, num_warps=tile.warps, **common,
    )  # fmt: skip
    tile = how.down
    experts_few.few_down_kernel[(triton.cdiv(b.hidden, tile.out),)](
        inner, b.ids, down.codes, _scale(down), shared_down.codes, _scale(shared_down),
        y_ND if b.add is None else b.add, y_ND, b.pairs, b.tokens, b.count, b.extra, b.width, b.shared_width, b.hidden,
        OUT=tile.out, SPLIT=tile.rows, DEPTH=tile.depth, STAGES=tile.stages, ADD=b.add is not None,
        num_warps=tile.warps, **common,
    )  # fmt: skip
    return y_ND


def run_sorted(b: Batch, how: Plan) -> Tensor:
    rows = how.up.rows
    tiles = b.pairs // rows + b.count + b.extra * triton.cdiv(b.tokens, rows)
    order = b.ids.new_empty(b.pairs + b.extra * b.tokens, dtype=torch.int32)
    table = b.ids.new_empty(3, tiles, dtype=torch.int32)
    groups = b.x.numel() // 128 if b.fp8 and not how.gluon else 0
    codes = b.x.new_empty(b.x.shape, dtype=FP8) if groups else b.x
    scales = b.x.new_empty(groups, dtype=torch.float32)
    taken = b.ids.new_empty(2, dtype=torch.int32)
    places = None
    if b.pairs > ONE_CHUNK or (how.gluon and not b.fp8):
        places = place(b, rows, order, table, codes, scales, taken)
    else:
        chunk = max(16, triton.next_power_of_2(b.pairs))
        experts_triton.sort_kernel[(b.count + b.extra + triton.cdiv(groups, 64),)](
            b.ids, order, table, b.x, codes, scales, b.pairs, b.tokens, b.count, b.extra, tiles, groups,
            ROWS=rows, CHUNK=chunk, GROUPS=64, num_warps=8, **b.launch,
        )  # fmt: skip
    inner = b.x.new_empty(len(order), b.width, dtype=FP8 if how.codes else b.x.dtype)
    inner_scales = b.x.new_empty((len(order), b.width // 128) if how.codes else (1,), dtype=torch.float32)
    # Gluon's products add the shared experts up.
    extra = min(b.extra, 1) if how.gluon else b.extra
    parts = b.x.new_empty(b.pairs + extra * b.tokens, b.hidden)
    if how.gluon:
        x, scales = _by_place(b, order, places, taken)
        _gluon_products(b, how, x, scales, order, table, taken, inner, inner_scales, parts)
    else:
        _products(b, how, order, table, codes, scales, inner, inner_scales, parts)
    y_ND = torch.empty_like(b.x)
    # Of few tokens shorter pieces, so that every multiprocessor has some.
    block, warps = (512, 2) if b.tokens <= 512 else (min(2048, triton.next_power_of_2(b.hidden)), 4)
    experts_triton.sum_kernel[(b.tokens, triton.cdiv(b.hidden, block))](
        parts, b.ids, y_ND if b.add is None else b.add, y_ND, b.tokens, b.count, b.hidden, K=b.chosen,
        SHARED=extra, ADD=b.add is not None, BLOCK=block, num_warps=warps, **b.launch,
    )  # fmt: skip
    return y_ND


def place(
    b: Batch, rows: int, order: Tensor, table: Tensor, codes: Tensor, scales: Tensor, taken: Tensor
) -> Tensor:
    """Write order and table, zero two of `taken`, and write codes and scales if there is room for them; the place of
    every pair."""
    bins = triton.next_power_of_2(b.count + 1)
    chunks, groups = triton.cdiv(b.pairs, PLACED), scales.numel()
    counts = b.ids.new_empty(chunks + 1, bins, dtype=torch.int32)
    places = b.ids.new_empty(b.pairs, dtype=torch.int32)
    experts_triton.count_kernel[(chunks + triton.cdiv(groups, 64),)](
        b.ids, counts, b.x, codes, scales, b.pairs, b.count, chunks, groups, CHUNK=PLACED, BINS=bins, GROUPS=64,
        num_warps=4, **b.launch,
    )  # fmt: skip
    wide = min(bins, 16)
    experts_triton.scan_kernel[(bins // wide,)](
        counts, taken, chunks, BINS=bins, WIDE=wide, HIGH=256, num_warps=4, **b.launch
    )
    tiles = table.shape[1]
    experts_triton.place_kernel[(max(chunks, triton.cdiv(tiles, 16)),)](
        b.ids, counts, order, places, table, b.pairs, b.tokens, b.count, b.extra, tiles, chunks, ROWS=rows,
        CHUNK=PLACED, BINS=bins, WIDE=min(bins, 128), TILES=16, num_warps=4, **b.launch,
    )  # fmt: skip
    return places


def _products(
    b: Batch,
    how: Plan,
    order: Tensor,
    table: Tensor,
    x: Tensor,
    scales: Tensor,
    inner: Tensor,
    inner_scales: Tensor,
    parts: Tensor,
) -> None:
    """x's rows, or their codes and scales, to inner by place to parts by pair."""
    gate, up, down = b.routed
    shared_gate, shared_up, shared_down = b.shared
    tiles, rows, tile = table.shape[1], how.up.rows, how.up
    experts_triton.gate_up_kernel[(tiles * triton.cdiv(b.width, 128 if how.codes else tile.out),)](
        x, scales, b.weights, order, table, gate.codes, up.codes, _scale(gate), _scale(up), shared_gate.codes,
        shared_up.codes, _scale(shared_gate), _scale(shared_up), inner, inner_scales, b.limit or 0.0, b.pairs,
        b.tokens, b.count, tiles, b.width, b.hidden, K=b.chosen, ROWS=rows, OUT=tile.out, DEPTH=tile.depth,
        THIN=tile.thin, FP8=b.fp8, CODES=how.codes, EVEN=b.hidden % tile.depth == 0, LIMIT=b.limit is not None,
        num_warps=tile.warps, num_stages=tile.stages, **b.launch,
    )  # fmt: skip
    tile = how.down
    experts_triton.down_kernel[(tiles * triton.cdiv(b.hidden, tile.out),)](
        inner, inner_scales, order, table, down.codes, _scale(down), shared_down.codes, _scale(shared_down), parts,
        b.count, tiles, b.width, b.shared_width, b.hidden, ROWS=rows, OUT=tile.out, DEPTH=tile.depth,
        THIN=tile.thin, FP8=b.fp8, CODES=how.codes, EVEN=b.width % tile.depth == 0, num_warps=tile.warps,
        num_stages=tile.stages, **b.launch,
    )  # fmt: skip


def _by_place(b: Batch, order: Tensor, places: Tensor | None, taken: Tensor) -> tuple[Tensor, Tensor]:
    """x's rows in the experts' order; with FP8 codes, and once more by token for shared experts, and their scales.
    Without places `taken` is zeroed here."""
    read = b.pairs + (b.tokens if b.fp8 else 0)
    x = b.x.new_empty(read, b.hidden, dtype=FP8 if b.fp8 else b.x.dtype)
    scales = b.x.new_empty((read, b.hidden // 128) if b.fp8 else (1,), dtype=torch.float32)
    across = triton.cdiv(b.hidden, 2048)
    if places is None:
        experts_gather.gather_kernel[(read, across)](
            b.x, order, x, scales, taken, b.pairs, b.tokens, b.hidden, K=b.chosen, GROUPS=16, num_warps=4, **b.launch
        )  # fmt: skip
    else:
        experts_triton.spread_kernel[(b.tokens, across)](
            b.x,
            places,
            x,
            scales,
            b.pairs,
            b.hidden,
            K=b.chosen,
            GROUPS=16,
            FP8=b.fp8,
            num_warps=4,
            **b.launch,
        )
    return x, scales


def _gluon_products(
    b: Batch,
    how: Plan,
    x: Tensor,
    scales: Tensor,
    order: Tensor,
    table: Tensor,
    taken: Tensor,
    inner: Tensor,
    inner_scales: Tensor,
    parts: Tensor,
) -> None:
    """The same in Gluon, whose copies read rows that lie side by side."""
    routed = [(w.codes, _scale(w)) for w in b.routed]
    shared = [(w.codes.flatten(0, -2), _scale(w)) for w in b.shared]
    rows, first, second = how.up.rows, how.up.stages, how.down.stages
    if b.fp8:
        experts_gluon.gate_up(
            x, scales, b.weights, order, table, (routed[0], routed[1]), (shared[0], shared[1]), inner, inner_scales,
            taken, b.limit, b.tokens, first,
        )  # fmt: skip
        experts_gluon_down.down(
            inner,
            inner_scales,
            order,
            table,
            routed[2],
            shared[2],
            parts,
            taken[1:],
            b.tokens,
            b.extra,
            second,
        )
    else:
        experts_gluon16.gate_up(
            x, b.x, b.weights, order, table, (routed[0], routed[1]), (shared[0], shared[1]), inner, taken, b.limit,
            b.extra, rows // 64, first,
        )  # fmt: skip
        experts_gluon16.down(
            inner, order, table, routed[2], shared[2], parts, taken[1:], b.tokens, b.extra, rows // 64, second
        )
