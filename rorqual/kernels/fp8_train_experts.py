"""Routed experts through FP8 products, with gradients: `experts_grad` in V3's form (V3 report section 3.3; facts 3.5).

Pairs lie by expert, each expert's filled up to a multiple of 128 places, so that no run of tokens belongs to two. Rows
go from where their tokens lie straight into codes by expert, both ways, forward and backward: as bf16 they are never
there. Kept for the backward pass are the transposed codes of the rows and the product with gate and up.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rorqual.kernels import experts_sort as sort
from rorqual.kernels import fp8_train_swiglu as gated
from rorqual.kernels.experts_sort import Places
from rorqual.kernels.fp8_train import Powers, held_matrices
from rorqual.kernels.fp8_train_products import Groups, matrix_product, padded_ends, rows_product
from rorqual.kernels.fp8_train_quant import BLOCK, GRADIENT_FLOOR, spread_both
from rorqual.kernels.quant import FP8_FLOOR, QuantError

DISPATCH = Powers(rows=True, slopes=True)
"""V3's scales: rows go to the experts, and gradients back to them, with powers of two."""


def by_expert(ids_NK: Tensor, experts: int) -> Places:
    """`experts_sort.by_expert` with each expert's places filled up to a multiple of 128: `pair_P` is -1 where a place
    has no pair. As many places as any choice of experts may take: the pairs and 127 an expert, in whole 128s."""
    packed = sort.by_expert(ids_NK, experts)
    begins_E = torch.cat((packed.ends_E.new_zeros(1), packed.ends_E[:-1]))
    ends_E = padded_ends(packed.ends_E - begins_E)
    move_E = torch.cat((ends_E.new_zeros(1), ends_E[:-1])) - begins_E  # how far an expert's places go up
    places = (ids_NK.numel() + experts * (BLOCK - 1)) // BLOCK * BLOCK
    ids = ids_NK.clamp(0, experts - 1)
    place_NK = torch.where(packed.place_NK < 0, -1, packed.place_NK + move_E[ids])
    # Pairs with no expert here are written behind the last place, and cut off.
    pair_P = packed.pair_P.new_full((places + 1,), -1)
    at = place_NK.flatten().where(place_NK.flatten() >= 0, places)
    pair_P[at] = torch.arange(ids_NK.numel(), device=ids_NK.device)
    return Places(pair_P[:places], place_NK, ends_E)


class _Routed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, weights_NK: Tensor, gate: Tensor, up: Tensor, down: Tensor, add_ND: Tensor | None,
        places: Places, limit: float | None, powers: Powers,
    ) -> Tensor:  # fmt: skip
        pair_P, chosen = places.pair_P, places.place_NK.shape[1]
        groups = Groups.of(places.ends_E, len(pair_P))
        weight_P = weights_NK.flatten()[pair_P.clamp(min=0)].float().masked_fill(pair_P < 0, 0)
        x, x_turned = spread_both(x_ND, pair_P, chosen, powers.rows, FP8_FLOOR, groups.end)
        first = held_matrices((gate, up), powers.weights)[0]
        both = rows_product(x, first, groups, first.codes.shape[1], x_ND.dtype)
        h = gated.forward(both, weight_P, limit, powers.rows, groups.end)
        y_PD = rows_product(h, held_matrices((down,), powers.weights)[0], groups, down.shape[1], x_ND.dtype)
        ctx.save_for_backward(weight_P, gate, up, down, both, *places)
        ctx.kept, ctx.groups, ctx.limit, ctx.powers = x_turned, groups, limit, powers
        ctx.kind, ctx.added = weights_NK.dtype, add_ND is not None
        return sort.gather(y_PD, places, add_ND)

    @staticmethod
    def backward(ctx: Any, *slopes: Any) -> Any:
        weight_P, gate, up, down, both, *at = ctx.saved_tensors
        places, groups, powers, (slope_ND,) = Places(*at), ctx.groups, ctx.powers, slopes
        slope_ND = slope_ND.contiguous()
        chosen, kind, half = places.place_NK.shape[1], slope_ND.dtype, both.shape[1] // 2
        dy, turned = spread_both(slope_ND, places.pair_P, chosen, powers.slopes, GRADIENT_FLOOR, groups.end)
        dh = rows_product(dy, held_matrices((down,), powers.weights)[1], groups, half, kind)
        h, dboth, dboth_turned, dweight_P = gated.backward(
            both, weight_P, dh, ctx.limit, powers.rows, powers.slopes, groups.end
        )
        del dy, dh
        ddown = matrix_product(turned, h, groups, down.shape[1], down.shape[2], down.dtype)
        del turned, h
        matrices = held_matrices((gate, up), powers.weights)[1]
        dx_PD = rows_product(dboth, matrices, groups, gate.shape[2], kind)
        dx = sort.gather(dx_PD, places)
        del dboth, dx_PD
        dgate, dup = (
            matrix_product(
                dboth_turned.rows(begin, begin + half), ctx.kept, groups, w.shape[1], w.shape[2], w.dtype
            )
            for begin, w in ((0, gate), (half, up))
        )
        assert dweight_P is not None
        dweights = dweight_P[places.place_NK.clamp(min=0)].masked_fill(places.place_NK < 0, 0).to(ctx.kind)
        add = slope_ND if ctx.added else None
        return dx, dweights, dgate, dup, ddown, add, None, None, None


def routed_trained(
    x_ND: Tensor, ids_NK: Tensor, weights_NK: Tensor, gate_EWD: Tensor, up_EWD: Tensor, down_EDW: Tensor,
    *, limit: float | None = None, add_ND: Tensor | None = None, powers: Powers = DISPATCH,
) -> Tensor:  # fmt: skip
    """`experts_grad.routed_trained` in FP8: x `[N, D]`, ids and fp32 weights `[N, K]`, matrices of any precision, whose
    codes are held while they are not written to. Raises QuantError where shapes do not fit."""
    count, width, depth = gate_EWD.shape
    shapes = tuple(x_ND.shape[1:]), tuple(up_EWD.shape), tuple(down_EDW.shape)
    if shapes != ((depth,), (count, width, depth), (count, depth, width)):
        named = ", ".join(str(tuple(w.shape)) for w in (gate_EWD, up_EWD, down_EDW))
        raise QuantError(f"rows of {x_ND.shape[1]} channels meet gate, up and down {named}")
    places = by_expert(ids_NK, count)
    y: Tensor = _Routed.apply(x_ND, weights_NK, gate_EWD, up_EWD, down_EDW, add_ND, places, limit, powers)
    return y
