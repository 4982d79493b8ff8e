"""Training through FP8 products: linear layers and SwiGLU, forward and both gradients (V3 report section 3.3; facts
3.5). `fp8_train_experts` does routed experts with the same parts.

Rows are quantised in runs of 128 channels for the forward product and the gradient of the input, in runs of 128 tokens
for the gradient of the weight; what is kept for backward is codes. Weights, in whatever precision they are trained,
are quantised in blocks of 128x128, once for as long as they are not written to. Which layers are multiplied so is for
the caller to say: V3 keeps embedding, head, router, norms and attention itself out of it.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rorqual.kernels import fp8_train_swiglu as gated
from rorqual.kernels.fp8_train_dense import dense_matrix, dense_rows
from rorqual.kernels.fp8_train_quant import (
    BLOCK,
    GRADIENT_FLOOR,
    Codes,
    Matrices,
    empty_matrices,
    quantize_along,
    quantize_both,
    quantize_matrices,
    room,
)
from rorqual.kernels.quant import FP8_FLOOR, QuantError


@dataclass(frozen=True)
class Powers:
    """Which scales are powers of two: those of the rows that come in, of the gradient that comes back, of weights.
    V3 has them for what attention gives, for experts' rows, and for the gradient that reaches the experts' down
    matrices."""

    rows: bool = False
    slopes: bool = False
    weights: bool = False


# --------------------------------------------------------------------------------------------- weights

_held: dict[tuple[Any, ...], tuple[list[weakref.ref[Tensor]], list[int], tuple[Matrices, Matrices]]] = {}
"""Codes of weights, and of their transposes, by the ids of the tensors they were made of, with these' versions."""


def held_matrices(weights: Sequence[Tensor], pow2: bool = False) -> tuple[Matrices, Matrices]:
    """Codes of weights `[E, O, D]` (or one, `[O, D]`), one's rows after the other's, each filled up to a multiple of
    128, and of their transposes. Quantised anew, in the same memory, when a weight was written to since."""
    key = (*(id(w) for w in weights), pow2)
    versions = [w._version for w in weights]
    found = _held.get(key)
    if found is not None and found[1] == versions:
        return found[2]
    shapes = [w.shape[-2:] for w in weights]
    count = weights[0].shape[0] if weights[0].dim() == 3 else 1
    with torch.no_grad():
        if found is None:
            refs = [weakref.ref(w, lambda _: _held.pop(key, None)) for w in weights]
            made = empty_matrices(count, sum(room(out) for out, _ in shapes), shapes[0][1], weights[0].device)
        else:
            refs, _, made = found
        first = 0
        for w in weights:
            quantize_matrices(w.detach().view(count, *w.shape[-2:]), made, first, pow2)
            first += room(w.shape[-2])
    _held[key] = refs, versions, made
    return made


def outdate() -> None:
    """Have all weights quantised anew when next used: after writes that their version does not count (`.data`, shards
    gathered anew)."""
    for key, (refs, versions, made) in list(_held.items()):
        _held[key] = refs, [-1 for _ in versions], made


# --------------------------------------------------------------------------------------------- products


def both_or_one(x: Tensor, pow2: bool, floor: float, both: bool) -> tuple[Codes, Codes | None]:
    """x's codes and, if `both`, its transpose's."""
    if both:
        return quantize_both(x, pow2, floor)
    return quantize_along(x, pow2, floor), None


def forward(
    x_ND: Tensor, weights: Sequence[Tensor], powers: Powers = Powers(), keep: bool = True
) -> tuple[Tensor, Codes | None]:
    """x `[N, D]` through weights `[O, D]` side by side: `[N, sum of O]` in x's dtype; and, if `keep`, the codes that
    `backward` takes the weights' gradients from. Raises QuantError if a weight before the last is not whole blocks of
    128 outputs, which leaves a gap between results."""
    _fit(x_ND, weights)
    x, kept = both_or_one(x_ND, powers.rows, FP8_FLOOR, keep)
    out = sum(len(w) for w in weights)
    y = dense_rows(x, held_matrices(weights, powers.weights)[0], out, x_ND.dtype)
    return y[: len(x_ND)], kept


def backward(
    slope: Tensor,
    kept: Codes | None,
    weights: Sequence[Tensor],
    powers: Powers = Powers(),
    wants_x: bool = True,
    into: Sequence[Tensor | None] | None = None,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """From the gradient `[N, sum of O]` of `forward`'s result and what it kept: that of x, and those of the weights in
    their dtype (none if nothing was kept, or where one was added to its fp32 tensor of `into`)."""
    dy, turned = both_or_one(slope.contiguous(), powers.slopes, GRADIENT_FLOOR, kept is not None)
    width, dx = weights[0].shape[1], None
    if wants_x:
        dx = dense_rows(dy, held_matrices(weights, powers.weights)[1], width, slope.dtype)[: len(slope)]
    dws: list[Tensor | None] = [None] * len(weights)
    if turned is not None and kept is not None:
        into = into or [None] * len(weights)
        if all(one is None for one in into) and len({w.dtype for w in weights}) == 1:
            dw = dense_matrix(turned, kept, slope.shape[1], width, weights[0].dtype)
            return dx, list(dw.split([len(w) for w in weights]))
        first = 0
        for number, (w, add) in enumerate(zip(weights, into, strict=True)):
            own = turned.rows(first, first + room(len(w)))
            dw = dense_matrix(own, kept, len(w), width, w.dtype, add)
            dws[number] = dw if add is None else None
            first += len(w)
    return dx, dws


def _fit(x_ND: Tensor, weights: Sequence[Tensor]) -> None:
    for w in weights:
        if w.dim() != 2 or w.shape[1] != x_ND.shape[1]:
            raise QuantError(f"rows of {x_ND.shape[1]} channels meet a weight {tuple(w.shape)}")
    if any(len(w) % BLOCK for w in weights[:-1]):
        sizes = ", ".join(str(len(w)) for w in weights)
        raise QuantError(f"weights side by side need outputs in 128s, got {sizes}: take one at a time")


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, powers: Powers, into: Sequence[Tensor | None] | None, *weights: Tensor
    ) -> Tensor:
        y, ctx.kept = forward(x_ND, weights, powers, any(ctx.needs_input_grad[3:]))
        ctx.powers, ctx.into = powers, into
        ctx.save_for_backward(*weights)  # whoever writes to them before backward is told
        return y

    @staticmethod
    def backward(ctx: Any, *slopes: Any) -> Any:
        wants_x, _, _, *learn = ctx.needs_input_grad
        dx, dws = backward(slopes[0], ctx.kept, ctx.saved_tensors, ctx.powers, wants_x, ctx.into)
        return dx, None, None, *(dw if wanted else None for dw, wanted in zip(dws, learn, strict=True))


def linear(
    x: Tensor, *weights: Tensor, powers: Powers = Powers(), into: Sequence[Tensor | None] | None = None
) -> Tensor:
    """x `[..., D]` through weights `[O, D]`: their results side by side, `[..., sum of O]`, in x's dtype.

    Differentiable in x and the weights. `into`: where the gradient of each weight is added in place (fp32, its shape,
    contiguous) instead of becoming its `.grad`. Raises QuantError where shapes do not fit.
    """
    y: Tensor = _Linears.apply(x.reshape(-1, x.shape[-1]), powers, into, *weights)
    return y.view(*x.shape[:-1], y.shape[-1])


# ---------------------------------------------------------------------------------------------- SwiGLU


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, gate: Tensor, up: Tensor, down: Tensor, limit: float | None, powers: Powers
    ) -> Tensor:
        x, ctx.kept = both_or_one(x_ND, powers.rows, FP8_FLOOR, any(ctx.needs_input_grad[1:3]))
        first = held_matrices((gate, up), powers.weights)[0]
        both = dense_rows(x, first, first.codes.shape[1], x_ND.dtype)
        h = gated.forward(both, None, limit, powers.rows)
        ctx.limit, ctx.powers = limit, powers
        ctx.save_for_backward(both, gate, up, down)
        return dense_rows(h, held_matrices((down,), powers.weights)[0], len(down), x_ND.dtype)[: len(x_ND)]

    @staticmethod
    def backward(ctx: Any, *slopes: Any) -> Any:
        both, gate, up, down = ctx.saved_tensors
        wants_x, learns_gate, learns_up, learns_down = ctx.needs_input_grad[:4]
        powers, (slope,), dx = ctx.powers, slopes, None
        dgate = dup = ddown = None
        dy, turned = both_or_one(slope.contiguous(), powers.slopes, GRADIENT_FLOOR, learns_down)
        matrices = held_matrices((down,), powers.weights)[1]
        dh = dense_rows(dy, matrices, both.shape[1] // 2, slope.dtype)
        h, dboth, dboth_turned, _ = gated.backward(both, None, dh, ctx.limit, powers.rows, powers.slopes)
        half = dh.shape[1]
        if wants_x:
            matrices = held_matrices((gate, up), powers.weights)[1]
            dx = dense_rows(dboth, matrices, gate.shape[1], slope.dtype)[: len(slope)]
        if learns_gate or learns_up:
            dw = dense_matrix(dboth_turned, ctx.kept, 2 * half, gate.shape[1], gate.dtype)
            dgate, dup = dw[: len(gate)], dw[half : half + len(up)]
        if turned is not None:
            ddown = dense_matrix(turned, h, down.shape[0], down.shape[1], down.dtype)
        return dx, dgate, dup, ddown, None, None


def swiglu_trained(
    x_ND: Tensor,
    gate_WD: Tensor,
    up_WD: Tensor,
    down_DW: Tensor,
    limit: float | None,
    powers: Powers = Powers(),
) -> Tensor:
    """`experts_grad.swiglu_trained` in FP8: x `[N, D]`; gate, up `[W, D]`; down `[D, W]`. For backward x is kept in
    codes, gate's and up's results as they are; the rest is worked out again. Raises QuantError where shapes do not
    fit."""
    wants = x_ND.shape[1], gate_WD.shape[0]
    shapes = gate_WD.shape, up_WD.shape, down_DW.shape
    if any(tuple(s) != want for s, want in zip(shapes, (wants[::-1], wants[::-1], wants), strict=True)):
        named = ", ".join(str(tuple(s)) for s in shapes)
        raise QuantError(f"rows of {x_ND.shape[1]} channels meet gate, up and down {named}")
    y: Tensor = _SwiGLU.apply(x_ND, gate_WD, up_WD, down_DW, limit, powers)
    return y
