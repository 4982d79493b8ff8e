"""One token through its experts in two launches, each program holding whole rows of the matrices in registers.

Beside `experts_few`, which multiplies on tensor cores: plain products need no way through shared memory, FP8
codes are multiplied out in registers, and all of a program's reads are under way at once. The shared experts'
matrices, which need no choice, are asked for before the kernels in front have ended; so are the second product's.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rorqual.kernels import single_ring
from rorqual.kernels.experts import Shared, Weights, alike
from rorqual.kernels.gpu import tl, triton
from rorqual.kernels.quant import E8M0
from rorqual.kernels.single import WIDEST, factor, fits, launch_options


@triton.jit
def up_kernel(
    x, ids, weights, gate, up, gate_scale, up_scale, common_gate, common_up,
    common_gate_scale, common_up_scale, inner, limit, experts, shared,
    W: tl.constexpr, D: tl.constexpr, GROUPS: tl.constexpr, K: tl.constexpr, BO: tl.constexpr,
    CODES: tl.constexpr, POWERS: tl.constexpr, LIMIT: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """inner `[K + shared, W]` = weight * swiglu(gate x, up x), BO channels of one expert a program; the shared
    experts' programs come first and their rows last."""
    ACROSS: tl.constexpr = (W + BO - 1) // BO
    SCALES: tl.constexpr = (D + 127) // 128
    slot = tl.program_id(0) // ACROSS
    column = tl.program_id(0) % ACROSS * BO
    routed = slot >= shared
    if AHEAD:  # noqa: SIM102 (a constant)
        if routed:
            tl.extra.cuda.gdc_wait()
    k = slot - shared
    expert = tl.load(ids + k, mask=routed, other=0).to(tl.int64)
    real = (expert >= 0) & (expert < experts)
    expert = tl.where(real, expert, 0)
    weight = tl.load(weights + k, mask=routed, other=1.0).to(tl.float32)
    matrix = tl.where(routed, expert, slot)
    o = column + tl.arange(0, BO)
    g = tl.arange(0, GROUPS)
    d = g[:, None] * 128 + tl.arange(0, 128)[None, :]
    at = (matrix * W + tl.minimum(o, W - 1))[:, None, None] * D + d[None, :, :]
    mask = (d < D)[None, :, :]
    gates = tl.load(
        tl.where(routed, gate, common_gate) + at, mask=mask, other=0.0, eviction_policy="evict_first"
    )
    ups = tl.load(tl.where(routed, up, common_up) + at, mask=mask, other=0.0, eviction_policy="evict_first")
    if CODES:
        place = (matrix * ((W + 127) // 128) + column // 128) * SCALES + g
        gate_by = factor(tl.where(routed, gate_scale, common_gate_scale) + place, g < SCALES, POWERS)
        up_by = factor(tl.where(routed, up_scale, common_up_scale) + place, g < SCALES, POWERS)
    if AHEAD:
        tl.extra.cuda.gdc_wait()
        # Not before the wait: the second product reads the choice before its own.
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.load(x + d, mask=d < D, other=0.0).to(tl.float32)
    gate_parts = tl.sum(gates.to(tl.float32) * row[None, :, :], 2)
    up_parts = tl.sum(ups.to(tl.float32) * row[None, :, :], 2)
    if CODES:
        gate_parts *= gate_by[None, :]
        up_parts *= up_by[None, :]
    gate_y = tl.sum(gate_parts, 1)
    up_y = tl.sum(up_parts, 1)
    if LIMIT:
        gate_y = tl.minimum(gate_y, limit)
        up_y = tl.minimum(tl.maximum(up_y, -limit), limit)
    y = gate_y * tl.sigmoid(gate_y) * up_y * weight
    y = tl.where(real, y, 0.0)
    line = tl.where(routed, k, K + slot)
    tl.store(inner + line * W + o, y.to(inner.dtype.element_ty), mask=o < W)


@triton.jit
def down_kernel(
    inner, ids, down, down_scale, common, common_scale, residual, y, experts, shared, common_row,
    common_s_row,
    W: tl.constexpr, D: tl.constexpr, GROUPS: tl.constexpr, K: tl.constexpr, SLOTS: tl.constexpr,
    BO: tl.constexpr, CODES: tl.constexpr, POWERS: tl.constexpr, RESIDUAL: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """y `[D]`, BO channels a program: the sum over experts of inner `[K + shared, W]` times their down matrices,
    and the residual."""
    if AHEAD:
        tl.extra.cuda.gdc_launch_dependents()
    SCALES: tl.constexpr = (W + 127) // 128
    column = tl.program_id(0) * BO
    line = tl.arange(0, SLOTS * BO)
    slot = line // BO
    o = tl.minimum(column + line % BO, D - 1)
    routed = slot < K
    live = slot < K + shared
    # Before the wait: the kernel in front has let this one start only after the choice was there.
    expert = tl.load(ids + slot, mask=routed, other=0).to(tl.int64)
    live = live & (expert >= 0) & (expert < experts)
    expert = tl.where(live, expert, 0)
    g = tl.arange(0, GROUPS)
    d = g[:, None] * 128 + tl.arange(0, 128)[None, :]
    own = (expert * D + o) * W
    at = tl.where(routed, down + own, common + o.to(tl.int64) * common_row + (slot - K) * W)
    mask = live[:, None, None] & (d < W)[None, :, :]
    tile = tl.load(at[:, None, None] + d[None, :, :], mask=mask, other=0.0, eviction_policy="evict_first")
    if CODES:
        place = (expert * ((D + 127) // 128) + column // 128) * SCALES
        there = tl.where(
            routed,
            down_scale + place,
            common_scale + column // 128 * common_s_row + (slot - K) * SCALES,
        )
        by = factor(there[:, None] + g[None, :], live[:, None] & (g < SCALES)[None, :], POWERS)
    if AHEAD:
        tl.extra.cuda.gdc_wait()
    rows = tl.load(inner + slot[:, None, None] * W + d[None, :, :], mask=mask, other=0.0)
    parts = tl.sum(tile.to(tl.float32) * rows.to(tl.float32), 2)
    if CODES:
        parts *= by
    total = tl.sum(tl.reshape(tl.sum(parts, 1), (SLOTS, BO)), 0)
    to = column + tl.arange(0, BO)
    kind = y.dtype.element_ty
    if RESIDUAL:
        total = total.to(kind).to(tl.float32) + tl.load(residual + to, mask=to < D, other=0.0).to(tl.float32)
    tl.store(y + to, total.to(kind), mask=to < D)


def plan(width: int, hidden: int, codes: bool) -> tuple[dict[str, int], dict[str, int]]:
    """Channels a program and its warps, for both products."""
    if hidden > 4096 or width > 2048:
        return {"BO": 2, "num_warps": 8}, {"BO": 1, "num_warps": 8}
    if codes:
        return {"BO": 4, "num_warps": 4}, {"BO": 1, "num_warps": 4}
    return {"BO": 4, "num_warps": 4}, {"BO": 1, "num_warps": 4}


def through_experts(
    x_1D: Tensor,
    choice: tuple[Tensor, Tensor],
    gate: Weights,
    up: Weights,
    down: Weights,
    *,
    limit: float | None = None,
    shared: Shared | None = None,
    residual_1D: Tensor | None = None,
    how: tuple[dict[str, int], dict[str, int]] | None = None,
    state: single_ring.State | None = None,
    ring: dict[str, Any] | None = None,
) -> Tensor:
    """`kernels.experts.experts` for one token x `[1, D]`: `[1, D]`; the residual is added to the rounded sum.

    `choice`: ids int32 `[1, K]` and weights fp32. All must be fit (`experts_fit`).
    """
    count, width, hidden = gate.codes.shape
    (ids_1K, weights_1K), chosen = choice, choice[0].shape[1]
    extra = shared[0].codes.shape[0] // width if shared is not None else 0
    common = shared or (gate, up, down)
    codes, options = gate.scale is not None, launch_options(x_1D)
    powers = codes and gate.scale.dtype == E8M0  # type: ignore[union-attr]
    y_1D = torch.empty_like(x_1D)
    by = [_scale(w, powers) for w in (gate, up, down, *common)]
    if state is not None:
        single_ring.launch(
            x_1D, choice, tuple(w.codes for w in (gate, up, down, *common)), tuple(by), residual_1D, y_1D, state,
            sizes=(count, width, extra), limit=limit, powers=powers, **(ring or {}),
        )  # fmt: skip
        return y_1D
    inner = x_1D.new_empty(chosen + extra, width)
    first, second = how or plan(width, hidden, codes)
    up_kernel[((chosen + extra) * triton.cdiv(width, first["BO"]),)](
        x_1D, ids_1K, weights_1K, gate.codes, up.codes, by[0], by[1], common[0].codes,
        common[1].codes, by[3], by[4],
        inner, limit or 0.0, count, extra, W=width, D=hidden, GROUPS=groups(hidden), K=chosen, CODES=codes,
        POWERS=powers, LIMIT=limit is not None, **first, **options,
    )  # fmt: skip
    down_kernel[(triton.cdiv(hidden, second["BO"]),)](
        inner, ids_1K, down.codes, by[2], common[2].codes, by[5], residual_1D, y_1D, count, extra,
        common[2].codes.stride(-2), by[5].stride(-2), W=width, D=hidden, GROUPS=groups(width), K=chosen,
        SLOTS=triton.next_power_of_2(chosen + extra), CODES=codes, POWERS=powers,
        RESIDUAL=residual_1D is not None, **second, **options,
    )  # fmt: skip
    return y_1D


def groups(width: int) -> int:
    """Runs of 128 channels, up to a power of two."""
    count: int = triton.next_power_of_2(triton.cdiv(width, 128))
    return count


def _scale(weight: Weights, powers: bool) -> Tensor:
    """The scales as the kernels read them; where there are none, something to point at."""
    if weight.scale is None:
        return weight.codes
    return weight.scale.view(torch.uint8) if powers else weight.scale


def experts_fit(
    x_ND: Tensor, chosen: int, gate: Weights, up: Weights, down: Weights, shared: Shared | None
) -> bool:
    """Whether `through_experts` takes these: one row, matrices of one kind, not too wide for registers."""
    width, hidden = gate.codes.shape[-2:]
    matrices = (gate, up, down, *(shared or ()))
    return (
        x_ND.shape[0] == 1
        and x_ND.dtype == torch.bfloat16
        and x_ND.is_contiguous()
        and hidden <= WIDEST
        and width <= WIDEST // 2
        and chosen + (shared[0].codes.shape[0] // width if shared is not None else 0) <= 16
        and all(fits(w.codes, w.scale, w.block) and w.codes.is_contiguous() for w in matrices)
        and all(w.scale is None or w.scale.is_contiguous() for w in matrices)
        and len({None if w.scale is None else w.scale.dtype for w in matrices}) == 1
        and (gate.scale is None or (width % 128 == 0 and hidden % 128 == 0))
        and (shared is None or alike(gate, shared))
    )
