"""One token through its experts in two launches, each program holding whole rows of the matrices in registers.

Beside `experts_few`, which multiplies on tensor cores: plain products need no way through shared memory, FP8
codes are multiplied out in registers, and all of a program's reads are under way at once. The shared experts'
matrices, which need no choice, are asked for before the kernels in front have ended; so are the second product's.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rorqual.kernels.experts import Shared, Weights, alike
from rorqual.kernels.gpu import tl, triton
from rorqual.kernels.quant import E8M0
from rorqual.kernels.route import Rule
from rorqual.kernels.single import WIDEST, factor, fits, launch_options
from rorqual.kernels.skinny import PROCESSORS


@triton.jit
def ranking(keys, E: tl.constexpr, EP: tl.constexpr):
    """Place of each of EP experts in the order of choice `[EP]`: best first, among equals the lower number."""
    # Summed along the first axis: that one lies within threads.
    mine = tl.arange(0, EP)[None, :]
    other = tl.arange(0, EP)[:, None]
    key = tl.load(keys + mine, mask=mine < E, other=-0x80000000)
    its = tl.load(keys + other, mask=other < E, other=-0x80000000)
    before = (its > key) | ((its == key) & (other < mine))
    return tl.sum(before.to(tl.int32), 0)


@triton.jit
def up_kernel(
    x, ids, weights, keys, scores, scaling, gate, up, gate_scale, up_scale, common_gate, common_up,
    common_gate_scale, common_up_scale, inner, limit, experts, shared,
    W: tl.constexpr, D: tl.constexpr, GROUPS: tl.constexpr, K: tl.constexpr, BO: tl.constexpr,
    CODES: tl.constexpr, POWERS: tl.constexpr, LIMIT: tl.constexpr, CHOOSE: tl.constexpr, E: tl.constexpr,
    EP: tl.constexpr, NORMALIZE: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """inner `[K + shared, W]` = weight * swiglu(gate x, up x), BO channels of one expert a program; the shared
    experts' programs come first and their rows last. CHOOSE: experts and weights are found from the router's scores,
    by every program for itself."""
    ACROSS: tl.constexpr = (W + BO - 1) // BO
    SCALES: tl.constexpr = (D + 127) // 128
    slot = tl.program_id(0) // ACROSS
    column = tl.program_id(0) % ACROSS * BO
    routed = slot >= shared
    if AHEAD:  # noqa: SIM102 (a constant)
        if routed:
            tl.extra.cuda.gdc_wait()
    k = slot - shared
    if CHOOSE:
        real = routed | (slot >= 0)
        e = tl.arange(0, EP)
        rank = e
        if routed:
            rank = ranking(keys, E, EP)
        expert = tl.sum(tl.where((rank == k) & routed, e, 0))
        expert = expert.to(tl.int64)
    else:
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
    if CHOOSE:
        weight = 1.0
        if routed:
            score = tl.load(scores + e, mask=e < E, other=0.0)
            weight = tl.sum(tl.where(rank == k, score, 0.0))
            if NORMALIZE:
                weight = weight / (tl.sum(tl.where(rank < K, score, 0.0)) + 1e-20)
            weight = weight * scaling
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
    inner, ids, keys, down, down_scale, common, common_scale, residual, y, experts, shared, common_row,
    common_s_row,
    W: tl.constexpr, D: tl.constexpr, GROUPS: tl.constexpr, K: tl.constexpr, SLOTS: tl.constexpr,
    BO: tl.constexpr, CODES: tl.constexpr, POWERS: tl.constexpr, RESIDUAL: tl.constexpr, CHOOSE: tl.constexpr,
    E: tl.constexpr, EP: tl.constexpr, AHEAD: tl.constexpr,
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
    if CHOOSE:
        rank = ranking(keys, E, EP)
        mine = (rank[:, None] == slot[None, :]) & routed[None, :]
        expert = tl.sum(tl.where(mine, tl.arange(0, EP)[:, None], 0), 0).to(tl.int64)
    else:
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


@triton.jit
def listed(
    ids, weights, keys, scores, scaling, experts, K: tl.constexpr, KP: tl.constexpr, CHOOSE: tl.constexpr,
    E: tl.constexpr, EP: tl.constexpr, NORMALIZE: tl.constexpr, WEIGHTS: tl.constexpr,
):  # fmt: skip
    """The chosen experts `[KP]` int32, -1 where there is none, and their weights if WEIGHTS."""
    k = tl.arange(0, KP)
    by = tl.zeros((KP,), tl.float32)
    if CHOOSE:
        e = tl.arange(0, EP)
        rank = ranking(keys, E, EP)
        mine = rank[:, None] == k[None, :]
        chosen = tl.sum(tl.where(mine, e[:, None], 0), 0)
        if WEIGHTS:
            score = tl.load(scores + e, mask=e < E, other=0.0)
            by = tl.sum(tl.where(mine, score[:, None], 0.0), 0)
            if NORMALIZE:
                by = by / (tl.sum(tl.where(rank < K, score, 0.0)) + 1e-20)
            by = by * scaling
        chosen = tl.where(k < K, chosen, -1)
    else:
        chosen = tl.load(ids + k, mask=k < K, other=-1).to(tl.int32)
        chosen = tl.where(chosen < experts, chosen, -1)
        if WEIGHTS:
            by = tl.load(weights + k, mask=k < K, other=0.0).to(tl.float32)
    return chosen, by


@triton.jit
def up_flow_kernel(
    x, ids, weights, keys, scores, scaling, gate, up, gate_scale, up_scale, common_gate, common_up,
    common_gate_scale, common_up_scale, inner, limit, experts, shared,
    W: tl.constexpr, D: tl.constexpr, GROUPS: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, BO: tl.constexpr,
    CODES: tl.constexpr, POWERS: tl.constexpr, LIMIT: tl.constexpr, CHOOSE: tl.constexpr, E: tl.constexpr,
    EP: tl.constexpr, NORMALIZE: tl.constexpr, STAGES: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """`up_kernel` by programs that stay and go from tile to tile, the next tiles on their way through shared memory
    meanwhile."""
    ACROSS: tl.constexpr = (W + BO - 1) // BO
    SCALES: tl.constexpr = (D + 127) // 128
    if AHEAD:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    chosen, by = listed(ids, weights, keys, scores, scaling, experts, K, KP, CHOOSE, E, EP, NORMALIZE, True)
    g = tl.arange(0, GROUPS)
    d = g[:, None] * 128 + tl.arange(0, 128)[None, :]
    row = tl.load(x + d, mask=d < D, other=0.0).to(tl.float32)
    mask = (d < D)[None, :, :]
    number = tl.arange(0, KP)
    for tile in tl.range(tl.program_id(0), (K + shared) * ACROSS, tl.num_programs(0), num_stages=STAGES):
        slot = tile // ACROSS
        column = tile % ACROSS * BO
        routed = slot >= shared
        k = slot - shared
        expert = tl.sum(tl.where(number == k, chosen, 0))
        real = expert >= 0
        matrix = tl.where(routed, tl.maximum(expert, 0), slot).to(tl.int64)
        o = column + tl.arange(0, BO)
        at = (matrix * W + tl.minimum(o, W - 1))[:, None, None] * D + d[None, :, :]
        gates = tl.load(tl.where(routed, gate, common_gate) + at, mask=mask, other=0.0)
        ups = tl.load(tl.where(routed, up, common_up) + at, mask=mask, other=0.0)
        gate_parts = tl.sum(gates.to(tl.float32) * row[None, :, :], 2)
        up_parts = tl.sum(ups.to(tl.float32) * row[None, :, :], 2)
        if CODES:
            place = (matrix * ((W + 127) // 128) + column // 128) * SCALES + g
            gate_by = factor(tl.where(routed, gate_scale, common_gate_scale) + place, g < SCALES, POWERS)
            up_by = factor(tl.where(routed, up_scale, common_up_scale) + place, g < SCALES, POWERS)
            gate_parts *= gate_by[None, :]
            up_parts *= up_by[None, :]
        gate_y = tl.sum(gate_parts, 1)
        up_y = tl.sum(up_parts, 1)
        if LIMIT:
            gate_y = tl.minimum(gate_y, limit)
            up_y = tl.minimum(tl.maximum(up_y, -limit), limit)
        weight = tl.where(routed, tl.sum(tl.where(number == k, by, 0.0)), 1.0)
        y = gate_y * tl.sigmoid(gate_y) * up_y * weight
        y = tl.where(real, y, 0.0)
        line = tl.where(routed, k, K + slot)
        tl.store(inner + line * W + o, y.to(inner.dtype.element_ty), mask=o < W)


@triton.jit
def down_flow_kernel(
    inner, ids, keys, down, down_scale, common, common_scale, residual, y, experts, shared, common_row,
    common_s_row,
    W: tl.constexpr, D: tl.constexpr, GROUPS: tl.constexpr, K: tl.constexpr, SLOTS: tl.constexpr,
    BO: tl.constexpr, CODES: tl.constexpr, POWERS: tl.constexpr, RESIDUAL: tl.constexpr, CHOOSE: tl.constexpr,
    E: tl.constexpr, EP: tl.constexpr, STAGES: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """`down_kernel` by programs that stay, as `up_flow_kernel`."""
    SCALES: tl.constexpr = (W + 127) // 128
    if AHEAD:
        tl.extra.cuda.gdc_launch_dependents()
    chosen, _ = listed(ids, ids, keys, keys, 1.0, experts, K, SLOTS, CHOOSE, E, EP, False, False)
    # A line of the tile: a slot and one of BO channels.
    expert = tl.reshape(tl.broadcast_to(chosen[:, None], (SLOTS, BO)), (SLOTS * BO,)).to(tl.int64)
    line = tl.arange(0, SLOTS * BO)
    slot = line // BO
    routed = slot < K
    live = (slot < K + shared) & ((expert >= 0) | (slot >= K))
    expert = tl.maximum(expert, 0)
    base = tl.where(routed, down + expert * D * W, common + (slot - K) * W)
    stride = tl.where(routed, W, common_row)
    g = tl.arange(0, GROUPS)
    d = g[:, None] * 128 + tl.arange(0, 128)[None, :]
    mask = live[:, None, None] & (d < W)[None, :, :]
    if CODES:
        by_base = tl.where(
            routed, down_scale + expert * ((D + 127) // 128) * SCALES, common_scale + (slot - K) * SCALES
        )
        by_stride = tl.where(routed, SCALES, common_s_row)
    if AHEAD:
        lines = tl.arange(0, 32)
        o = tl.minimum(tl.program_id(0) * BO + line % BO, D - 1)
        item: tl.constexpr = 128 if CODES else 64
        there = tl.minimum(lines * item, W - 1)
        at = tl.where(live, base + o * stride, down)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
            "=r,l",
            [(at[:, None] + there[None, :]).to(tl.int64)],
            tl.int32,
            is_pure=False,
            pack=1,
        )
        tl.extra.cuda.gdc_wait()
    rows = tl.load(inner + slot[:, None, None] * W + d[None, :, :], mask=mask, other=0.0)
    kind = y.dtype.element_ty
    for tile in tl.range(tl.program_id(0), (D + BO - 1) // BO, tl.num_programs(0), num_stages=STAGES):
        column = tile * BO
        o = tl.minimum(column + line % BO, D - 1)
        at = base + o * stride
        w = tl.load(at[:, None, None] + d[None, :, :], mask=mask, other=0.0)
        parts = tl.sum(w.to(tl.float32) * rows.to(tl.float32), 2)
        if CODES:
            by_at = by_base + column // 128 * by_stride
            parts *= factor(by_at[:, None] + g[None, :], live[:, None] & (g < SCALES)[None, :], POWERS)
        total = tl.sum(tl.reshape(tl.sum(parts, 1), (SLOTS, BO)), 0)
        to = column + tl.arange(0, BO)
        if RESIDUAL:
            total = total.to(kind).to(tl.float32)
            total += tl.load(residual + to, mask=to < D, other=0.0).to(tl.float32)
        tl.store(y + to, total.to(kind), mask=to < D)


class Scores(NamedTuple):
    """What a router says, not yet chosen from (`kernels.single.scored`)."""

    scores: Tensor
    keys: Tensor
    rule: Rule


def chooses(experts: int, rule: Rule, hashed: bool) -> bool:
    """Whether the kernels choose by such a rule: among few experts, not by groups and not by table."""
    return experts <= 64 and rule.score != "softmax" and rule.groups == 1 and not hashed


def plan(width: int, hidden: int, codes: bool) -> tuple[dict[str, int], dict[str, int]]:
    """Channels a program and its warps, for both products."""
    if hidden > 4096 or width > 2048:
        return {"BO": 2, "num_warps": 8}, {"BO": 1, "num_warps": 8}
    if codes:
        return {"BO": 4, "num_warps": 4}, {"BO": 1, "num_warps": 4}
    return {"BO": 4, "num_warps": 4}, {"BO": 1, "num_warps": 4}


def through_experts(
    x_1D: Tensor,
    choice: tuple[Tensor, Tensor] | Scores,
    gate: Weights,
    up: Weights,
    down: Weights,
    *,
    limit: float | None = None,
    shared: Shared | None = None,
    residual_1D: Tensor | None = None,
    how: tuple[dict[str, int], dict[str, int]] | None = None,
) -> Tensor:
    """`kernels.experts.experts` for one token x `[1, D]`: `[1, D]`; the residual is added to the rounded sum.

    `choice`: ids int32 `[1, K]` and weights fp32, or the router's scores. All must be fit (`experts_fit`).
    """
    count, width, hidden = gate.codes.shape
    rule = choice.rule if isinstance(choice, Scores) else Rule(choice[0].shape[1], "sigmoid")
    chosen, own = rule.top_k, isinstance(choice, Scores)
    ids_1K, weights_1K = (None, None) if own else choice[:2]
    scores, keys = choice[:2] if own else (None, None)
    choosing = {"CHOOSE": own, "E": count, "EP": triton.next_power_of_2(count)}
    extra = shared[0].codes.shape[0] // width if shared is not None else 0
    common = shared or (gate, up, down)
    codes, options = gate.scale is not None, launch_options(x_1D)
    powers = codes and gate.scale.dtype == E8M0  # type: ignore[union-attr]
    inner = x_1D.new_empty(chosen + extra, width)
    y_1D = torch.empty_like(x_1D)
    first, second = how or plan(width, hidden, codes)
    by = [_scale(w, powers) for w in (gate, up, down, *common)]
    first, second = dict(first), dict(second)
    per_up, per_down = first.pop("resident", 0), second.pop("resident", 0)
    slots = chosen + extra
    tiles = slots * triton.cdiv(width, first["BO"])
    args: tuple[Any, ...] = (
        x_1D, ids_1K, weights_1K, keys, scores, rule.scale, gate.codes, up.codes, by[0], by[1], common[0].codes,
        common[1].codes, by[3], by[4], inner, limit or 0.0, count, extra,
    )  # fmt: skip
    rest = {
        "W": width, "D": hidden, "GROUPS": groups(hidden), "K": chosen, "CODES": codes, "POWERS": powers,
        "LIMIT": limit is not None, "NORMALIZE": rule.normalize,
    }  # fmt: skip
    if per_up:
        up_flow_kernel[(min(tiles, per_up * PROCESSORS),)](
            *args, KP=triton.next_power_of_2(chosen), **rest, **choosing, **first, **options
        )
    else:
        up_kernel[(tiles,)](*args, **rest, **choosing, **first, **options)
    tiles = triton.cdiv(hidden, second["BO"])
    args = (
        inner, ids_1K, keys, down.codes, by[2], common[2].codes, by[5], residual_1D, y_1D, count, extra,
        common[2].codes.stride(-2), by[5].stride(-2),
    )  # fmt: skip
    rest = {
        "W": width, "D": hidden, "GROUPS": groups(width), "K": chosen, "SLOTS": triton.next_power_of_2(slots),
        "CODES": codes, "POWERS": powers, "RESIDUAL": residual_1D is not None,
    }  # fmt: skip
    if per_down:
        down_flow_kernel[(min(tiles, per_down * PROCESSORS),)](*args, **rest, **choosing, **second, **options)
    else:
        down_kernel[(tiles,)](*args, **rest, **choosing, **second, **options)
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
