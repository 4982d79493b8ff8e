"""Training through FP8 products: linear layers and SwiGLU experts, forward and both gradients (V3 report section
3.3; facts 3.5).

Rows are quantised in runs of 128 channels for the forward product and the gradient of the input, in runs of 128 tokens
for the gradient of the weight; what is kept for backward is codes. Weights, in whatever precision they are trained,
are quantised in blocks of 128x128, once for as long as they are not written to. Which layers are multiplied so is for
the caller to say: V3 keeps embedding, head, router, norms and attention itself out of it.

Rows of experts lie by expert, each one's filled up with zeros to a multiple of 128 (`Groups`).
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rorqual.kernels import fp8_train_swiglu as gated
from rorqual.kernels.fp8_train_products import Groups, matrix_product, rows_product, whole
from rorqual.kernels.fp8_train_quant import (
    GRADIENT_FLOOR,
    Codes,
    Matrices,
    empty_matrices,
    quantize_along,
    quantize_both,
    quantize_matrices,
    room,
)
from rorqual.kernels.quant import QuantError


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


# ---------------------------------------------------------------------------------------------- linear


def _gradient(dy: Codes, x: Codes, groups: Groups, weight: Tensor, into: Tensor | None) -> Tensor | None:
    """The gradient of a weight, or None where it was added to `into`."""
    out, width = weight.shape[-2:]
    add = None if into is None else into.view(-1, out, width)
    dw = matrix_product(dy, x, groups, out, width, weight.dtype, add)
    return dw.view(weight.shape) if into is None else None


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        groups: Groups,
        grouped: bool,
        powers: Powers,
        into: Sequence[Tensor | None],
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        end = groups.end if grouped else None
        ctx.kept = None
        if any(ctx.needs_input_grad[5:]):
            x, ctx.kept = quantize_both(x_ND, powers.rows, end=end)
        else:
            x = quantize_along(x_ND, powers.rows, end=end)
        ctx.groups, ctx.end, ctx.powers, ctx.into = groups, end, powers, into
        ctx.save_for_backward(*weights)  # whoever writes to them before backward is told
        ctx.like = x_ND.dtype, x_ND.shape
        return tuple(
            rows_product(x, held_matrices((w,), powers.weights)[0], groups, w.shape[-2], x_ND.dtype)[
                : len(x_ND)
            ]
            for w in weights
        )

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor | None) -> tuple[Any, ...]:
        (dtype, (rows, width)), dx, dws = ctx.like, None, []
        for number, (w, slope) in enumerate(zip(ctx.saved_tensors, slopes, strict=True)):
            learns, dw = ctx.needs_input_grad[5 + number], None
            if slope is not None:
                dy, turned = _both_or_one(slope, ctx.powers.slopes, ctx.end, learns)
                if ctx.needs_input_grad[0]:
                    matrices = held_matrices((w,), ctx.powers.weights)[1]
                    dx = rows_product(dy, matrices, ctx.groups, width, dtype, dx)
                if turned is not None:
                    dw = _gradient(turned, ctx.kept, ctx.groups, w, ctx.into[number])
            dws.append(dw)
        return (None if dx is None else dx[:rows], None, None, None, None, *dws)


def _both_or_one(slope: Tensor, pow2: bool, end: Tensor | None, both: bool) -> tuple[Codes, Codes | None]:
    slope = slope.contiguous()
    if both:
        return quantize_both(slope, pow2, GRADIENT_FLOOR, end)
    return quantize_along(slope, pow2, GRADIENT_FLOOR, end), None


def linears(
    x: Tensor,
    weights: Sequence[Tensor],
    groups: Groups | None = None,
    powers: Powers = Powers(),
    into: Sequence[Tensor | None] | None = None,
) -> tuple[Tensor, ...]:
    """x `[..., D]` through each of the weights `[O, D]`, quantised once: `[..., O]` each, in x's dtype. With `groups`
    x is `[N, D]`, N a multiple of 128, the weights `[E, O, D]`, and rows that are nobody's give zeros.

    Differentiable in x and the weights. `into`: where the gradient of a weight is added in place (fp32, its shape,
    contiguous) instead of becoming its `.grad`. Raises QuantError where shapes do not fit.
    """
    grouped = groups is not None
    for w in weights:
        if w.shape[-1] != x.shape[-1] or w.dim() != 2 + grouped:
            raise QuantError(f"rows of {x.shape[-1]} channels meet a weight {tuple(w.shape)}")
    x_ND = x.reshape(-1, x.shape[-1])
    if groups is None:
        groups = whole(len(x_ND), x.device)
    elif len(groups.of_tile) * 128 != len(x_ND):
        raise QuantError(f"{len(x_ND)} rows, but groups of {len(groups.of_tile) * 128}")
    into = into or [None] * len(weights)
    ys = _Linears.apply(x_ND, groups, grouped, powers, into, *weights)
    return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in ys)


def linear(
    x: Tensor,
    weight: Tensor,
    groups: Groups | None = None,
    powers: Powers = Powers(),
    into: Tensor | None = None,
) -> Tensor:
    """`linears` of one weight."""
    return linears(x, (weight,), groups, powers, (into,))[0]


# ---------------------------------------------------------------------------------------------- SwiGLU


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        weights_N: Tensor | None,
        gate: Tensor,
        up: Tensor,
        down: Tensor,
        groups: Groups,
        grouped: bool,
        limit: float | None,
        powers: Powers,
        into: Sequence[Tensor | None],
    ) -> Tensor:
        end = groups.end if grouped else None
        ctx.kept = None
        if any(ctx.needs_input_grad[2:4]):
            x, ctx.kept = quantize_both(x_ND, powers.rows, end=end)
        else:
            x = quantize_along(x_ND, powers.rows, end=end)
        first = held_matrices((gate, up), powers.weights)[0]
        both_NW = rows_product(x, first, groups, first.codes.shape[1], x_ND.dtype)
        weights = _filled(weights_N, len(both_NW))
        h = gated.forward(both_NW, weights, limit, powers.rows, end)
        y = rows_product(h, held_matrices((down,), powers.weights)[0], groups, down.shape[-2], x_ND.dtype)
        ctx.groups, ctx.end, ctx.limit, ctx.powers, ctx.into = groups, end, limit, powers, into
        ctx.like = x_ND.dtype, x_ND.shape
        ctx.save_for_backward(both_NW, weights, gate, up, down)
        return y[: len(x_ND)]

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Any, ...]:
        both_NW, weights, gate, up, down = ctx.saved_tensors
        (dtype, (rows, width)), powers, groups = ctx.like, ctx.powers, ctx.groups
        wants_x, _, *learns = ctx.needs_input_grad[:5]
        dy, turned = _both_or_one(slope, powers.slopes, ctx.end, learns[2])
        dh = rows_product(dy, held_matrices((down,), powers.weights)[1], groups, both_NW.shape[1] // 2, dtype)
        h, d_both, d_turned, dp = gated.backward(
            both_NW, weights, dh, ctx.limit, powers.rows, powers.slopes, ctx.end
        )
        dx, half = None, dh.shape[1]
        if wants_x:
            dx = rows_product(d_both, held_matrices((gate, up), powers.weights)[1], groups, width, dtype)[
                :rows
            ]
        sides: tuple[Any, ...] = (
            (d_turned.rows(0, half), ctx.kept),
            (d_turned.rows(half, 2 * half), ctx.kept),
            (turned, h),
        )
        dws = [
            _gradient(side[0], side[1], groups, w, into) if learn else None
            for side, w, into, learn in zip(sides, (gate, up, down), ctx.into, learns, strict=True)
        ]
        return dx, None if dp is None else dp[:rows], *dws, None, None, None, None, None


def _filled(weights_N: Tensor | None, rows: int) -> Tensor | None:
    if weights_N is None or len(weights_N) == rows:
        return weights_N
    return torch.nn.functional.pad(weights_N, (0, rows - len(weights_N)))


def swiglu(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    groups: Groups | None = None,
    weights_N: Tensor | None = None,
    limit: float | None = None,
    powers: Powers = Powers(),
    into: Sequence[Tensor | None] = (None, None, None),
) -> Tensor:
    """down(weight * silu(gate x) * up x) of x `[..., D]` with matrices `[W, D]`, `[W, D]`, `[D, W]`: `[..., D]`.

    With `groups` x is `[N, D]`, N a multiple of 128, and the matrices are `[E, ...]`. `weights_N`, fp32, one a row:
    the router's (facts 3.9). `limit` (V4) clamps gate from above, up on both sides. For backward gate's and up's
    results are kept, x in codes; the rest is worked out again. `into` as for `linears`, of gate, up and down.
    Differentiable in x, the weights and the matrices. Raises QuantError where shapes do not fit.
    """
    grouped = groups is not None
    wants = (x.shape[-1], gate.shape[-2])
    fits = (
        gate.shape == up.shape and tuple(gate.shape[-2:]) == wants[::-1] and tuple(down.shape[-2:]) == wants
    )
    if not fits or not gate.dim() == down.dim() == 2 + grouped:
        shapes = ", ".join(str(tuple(w.shape)) for w in (gate, up, down))
        raise QuantError(f"rows of {x.shape[-1]} channels meet gate, up and down {shapes}")
    x_ND = x.reshape(-1, x.shape[-1])
    if groups is None:
        groups = whole(len(x_ND), x.device)
    elif len(groups.of_tile) * 128 != len(x_ND):
        raise QuantError(f"{len(x_ND)} rows, but groups of {len(groups.of_tile) * 128}")
    return _SwiGLU.apply(x_ND, weights_N, gate, up, down, groups, grouped, limit, powers, into).view(
        *x.shape[:-1], -1
    )
