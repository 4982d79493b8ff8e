"""The feed-forward bricks with gradients: SwiGLU, and routed experts beside it, each one step of autograd.

What is kept for the backward pass is x and the product with gate and up; the gated product and x by expert are made
anew (V3 report 3.2.3). The definition is `experts.reference`, whose gradients autograd finds by itself.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rorqual.kernels import experts_sort as sort
from rorqual.kernels import swiglu_grad
from rorqual.kernels.experts_sort import Places
from rorqual.kernels.gpu import usable


def _gated(both: Tensor, limit: float | None, weight: Tensor | None = None) -> Tensor:
    forward = swiglu_grad.forward_fast if usable(both) else swiglu_grad.forward_reference
    return forward(both, limit, weight)


def _gated_back(
    both: Tensor, limit: float | None, slope: Tensor, weight: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    back = swiglu_grad.backward_fast if usable(both) else swiglu_grad.backward_reference
    return back(both, limit, slope, weight)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, gate_WD: Tensor, up_WD: Tensor, down_DW: Tensor, limit: float | None
    ) -> Tensor:
        both = x_ND @ torch.cat((gate_WD, up_WD)).t()
        ctx.save_for_backward(x_ND, gate_WD, up_WD, down_DW, both)
        ctx.limit = limit
        return _gated(both, limit) @ down_DW.t()

    @staticmethod
    def backward(ctx: Any, *slopes: Any) -> Any:
        x_ND, gate_WD, up_WD, down_DW, both = ctx.saved_tensors
        (slope_ND,) = slopes
        dboth, inner, _ = _gated_back(both, ctx.limit, slope_ND @ down_DW)
        ddown = slope_ND.t() @ inner
        dx = dboth @ torch.cat((gate_WD, up_WD))
        dgate, dup = (dboth.t() @ x_ND).chunk(2)
        return dx, dgate, dup, ddown, None


def swiglu_trained(
    x_ND: Tensor, gate_WD: Tensor, up_WD: Tensor, down_DW: Tensor, limit: float | None
) -> Tensor:
    """down(silu(gate x) * up x) with gradients: x `[N, D]`; gate, up `[W, D]`; down `[D, W]`."""
    y: Tensor = _SwiGLU.apply(x_ND, gate_WD, up_WD, down_DW, limit)
    return y


class _Routed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, weights_NK: Tensor, gate: Tensor, up: Tensor, down: Tensor, add_ND: Tensor | None,
        places: Places, limit: float | None,
    ) -> Tensor:  # fmt: skip
        weight_P, joint = weights_NK.flatten()[places.pair_P], torch.cat((gate, up), 1)
        both = _grouped(sort.spread(x_ND, places), joint.mT, places)
        ctx.save_for_backward(x_ND, weight_P, joint, down, both, *places)
        ctx.limit, ctx.added = limit, add_ND is not None
        return sort.gather(_grouped(_gated(both, limit, weight_P), down.mT, places), places, add_ND)

    @staticmethod
    def backward(ctx: Any, *slopes: Any) -> Any:
        x_ND, weight_P, joint, down, both, *at = ctx.saved_tensors
        places, (slope_ND,), width = Places(*at), slopes, joint.shape[1] // 2
        slope_PD = sort.spread(slope_ND, places)
        dboth, inner, dweight_P = _gated_back(both, ctx.limit, _grouped(slope_PD, down, places), weight_P)
        ddown = _outer(slope_PD, inner, places)
        del slope_PD, inner
        dx_PD = _grouped(dboth, joint, places)
        x_PD = sort.spread(x_ND, places)
        dgate, dup = _outer(dboth[:, :width], x_PD, places), _outer(dboth[:, width:], x_PD, places)
        assert dweight_P is not None
        dweights_NK = dweight_P[places.place_NK.clamp(min=0)].masked_fill(places.place_NK < 0, 0)
        add = slope_ND if ctx.added else None
        return sort.gather(dx_PD, places), dweights_NK, dgate, dup, ddown, add, None, None


def _grouped(x_Pi: Tensor, w_Eio: Tensor, places: Places) -> Tensor:
    """Each place through its expert's matrix: `[P, o]`."""
    y: Tensor = F.grouped_mm(x_Pi, w_Eio, offs=places.ends_E)
    return y


def _outer(y_Po: Tensor, x_Pi: Tensor, places: Places) -> Tensor:
    """Each expert's sum over its places of y x^T: `[E, o, i]`."""
    y: Tensor = F.grouped_mm(y_Po.t(), x_Pi, offs=places.ends_E)
    return y


def routed_trained(
    x_ND: Tensor, ids_NK: Tensor, weights_NK: Tensor, gate_EWD: Tensor, up_EWD: Tensor, down_EDW: Tensor,
    *, limit: float | None = None, add_ND: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`experts.reference` with gradients, on 16-bit matrices: x `[N, D]`, ids and fp32 weights `[N, K]`."""
    places = sort.by_expert(ids_NK, gate_EWD.shape[0])
    y: Tensor = _Routed.apply(x_ND, weights_NK, gate_EWD, up_EWD, down_EDW, add_ND, places, limit)
    return y


def supported(*tensors: Tensor) -> bool:
    """Whether these matrices and rows are worked so: 16-bit numbers on a GPU of Hopper's kind or later, whole rows of
    16 bytes."""
    return usable(*tensors) and all(t.dtype == torch.bfloat16 and t.shape[-1] % 8 == 0 for t in tensors)
