"""Queries and keys of expanded MLA for training: what stands between its matrices and attention, there and back.

Forward turns the queries' rotary channels where they lie and lays every head's key side by side: its own channels, from
the product with W_UK, and the turned rotary key that all heads share. Backward takes the three gradients apart again.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
from torch import Tensor

from rorqual.kernels.gpu import tl, triton

HEADS = 16
"""Heads that a program works at a time."""


def turned(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Channels of x `[..., R]` turned by cos and sin `[..., R / 2]`, in at least fp32 (facts 3.2)."""
    full = x.to(torch.promote_types(x.dtype, torch.float32))
    if interleaved:
        a, b = full.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2).to(x.dtype)
    a, b = full.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


def lay_reference(
    q_NHd: Tensor, rope_NR: Tensor, up_NHe: Tensor, cos_NR: Tensor, sin_NR: Tensor, interleaved: bool,
    turn: bool = True,
) -> Tensor:  # fmt: skip
    """Turn the last R channels of q in place, unless they are; keys `[N, H, nope + R]` from rotary keys `[N, R]` and
    `up` `[N, H, nope + v]`."""
    R = rope_NR.shape[1]
    nope = q_NHd.shape[2] - R
    if turn:
        q_NHd[..., nope:] = turned(q_NHd[..., nope:], cos_NR[:, None], sin_NR[:, None], interleaved)
    rope = turned(rope_NR, cos_NR, sin_NR, interleaved)[:, None].expand(-1, q_NHd.shape[1], -1)
    return torch.cat((up_NHe[..., :nope], rope), -1)


def part_reference(
    dq_NHd: Tensor, dk_NHd: Tensor, dv_NHv: Tensor, cos_NR: Tensor, sin_NR: Tensor, interleaved: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The way back: gradients of q before it was turned, of the rotary key, and of `up`."""
    nope = dq_NHd.shape[2] - 2 * cos_NR.shape[1]
    back = turned(dq_NHd[..., nope:], cos_NR[:, None], -sin_NR[:, None], interleaved)
    wide = torch.promote_types(dk_NHd.dtype, torch.float32)
    rope = turned(dk_NHd[..., nope:].to(wide).sum(1), cos_NR, -sin_NR, interleaved).to(dk_NHd.dtype)
    return torch.cat((dq_NHd[..., :nope], back), -1), rope, torch.cat((dk_NHd[..., :nope], dv_NHv), -1)


@triton.jit
def _turn(x, cos, sin, HEADS: tl.constexpr, R: tl.constexpr, INTERLEAVED: tl.constexpr):
    """x `[HEADS, R]` fp32, turned; cos and sin `[R / 2]`."""
    if INTERLEAVED:
        a, b = tl.split(tl.reshape(x, [HEADS, R // 2, 2]))
    else:
        a, b = tl.split(tl.permute(tl.reshape(x, [HEADS, 2, R // 2]), (0, 2, 1)))
    c = cos[None, :]
    s = sin[None, :]
    both = tl.join(a * c - b * s, a * s + b * c)
    if not INTERLEAVED:
        both = tl.permute(both, (0, 2, 1))
    return tl.reshape(both, [HEADS, R])


@triton.jit
def _lay(
    q, rope, up, cos, sin, k, q_row, rope_row, up_row, k_row, positions, heads,
    NOPE: tl.constexpr, R: tl.constexpr, V: tl.constexpr, HEADS: tl.constexpr, PLAIN: tl.constexpr,
    INTERLEAVED: tl.constexpr, TURN: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    there = (h < heads)[:, None]
    half = (n % positions) * (R // 2) + tl.arange(0, R // 2)
    c = tl.load(cos + half)
    s = tl.load(sin + half)
    r = tl.arange(0, R)
    if TURN:
        at = q + n * q_row + h[:, None] * (NOPE + R) + NOPE + r[None, :]
        x = tl.load(at, mask=there, other=0.0).to(tl.float32)
        tl.store(at, _turn(x, c, s, HEADS, R, INTERLEAVED).to(q.dtype.element_ty), mask=there)
    one = tl.load(rope + n * rope_row + r).to(tl.float32)[None, :]
    shared = _turn(one, c, s, 1, R, INTERLEAVED).to(k.dtype.element_ty)
    to = k + n * k_row + h[:, None] * (NOPE + R)
    tl.store(to + NOPE + r[None, :], tl.broadcast_to(shared, [HEADS, R]), mask=there)
    p = tl.arange(0, PLAIN)
    mask = there & (p < NOPE)[None, :]
    own = tl.load(up + n * up_row + h[:, None] * (NOPE + V) + p[None, :], mask=mask)
    tl.store(to + p[None, :], own, mask=mask)


@triton.jit
def _part(
    dq, dk, dv, cos, sin, to_q, to_rope, to_up, to_q_row, to_rope_row, positions, heads,
    NOPE: tl.constexpr, R: tl.constexpr, V: tl.constexpr, HEADS: tl.constexpr, PLAIN: tl.constexpr,
    VALUES: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    half = (n % positions) * (R // 2) + tl.arange(0, R // 2)
    c = tl.load(cos + half)
    s = -tl.load(sin + half)
    r = tl.arange(0, R)
    p = tl.arange(0, PLAIN)
    e = tl.arange(0, VALUES)
    total = tl.zeros((1, R), tl.float32)
    for first in range(0, heads, HEADS):
        h = first + tl.arange(0, HEADS)
        there = (h < heads)[:, None]
        row = (n * heads + h)[:, None] * (NOPE + R)
        plain = there & (p < NOPE)[None, :]
        to = to_q + n * to_q_row + h[:, None] * (NOPE + R)
        tl.store(to + p[None, :], tl.load(dq + row + p[None, :], mask=plain), mask=plain)
        x = tl.load(dq + row + NOPE + r[None, :], mask=there, other=0.0).to(tl.float32)
        tl.store(
            to + NOPE + r[None, :],
            _turn(x, c, s, HEADS, R, INTERLEAVED).to(to_q.dtype.element_ty),
            mask=there,
        )
        x = tl.load(dk + row + NOPE + r[None, :], mask=there, other=0.0).to(tl.float32)
        total += tl.sum(x, 0)[None, :]
        up = to_up + (n * heads + h)[:, None] * (NOPE + V)
        tl.store(up + p[None, :], tl.load(dk + row + p[None, :], mask=plain), mask=plain)
        values = there & (e < V)[None, :]
        dv_at = dv + (n * heads + h)[:, None] * V + e[None, :]
        tl.store(up + NOPE + e[None, :], tl.load(dv_at, mask=values), mask=values)
    turned = _turn(total, c, s, 1, R, INTERLEAVED)
    tl.store(to_rope + n * to_rope_row + r[None, :], turned.to(to_rope.dtype.element_ty))


def lay_fast(
    q_NHd: Tensor, rope_NR: Tensor, up_NHe: Tensor, cos_PR: Tensor, sin_PR: Tensor, interleaved: bool,
    turn: bool = True,
) -> Tensor:  # fmt: skip
    """`lay_reference`; cos and sin `[P, R / 2]` of positions that rows go through again and again. R a power of two."""
    rows, heads, width = q_NHd.shape
    R = rope_NR.shape[1]
    nope = width - R
    k_NHd = torch.empty(rows, heads, width, dtype=q_NHd.dtype, device=q_NHd.device)
    some = min(HEADS, triton.next_power_of_2(heads))
    _lay[(rows, triton.cdiv(heads, some))](
        q_NHd, rope_NR, up_NHe, cos_PR, sin_PR, k_NHd, q_NHd.stride(0), rope_NR.stride(0), up_NHe.stride(0),
        k_NHd.stride(0), len(cos_PR), heads, NOPE=nope, R=R, V=up_NHe.shape[2] - nope, HEADS=some,
        PLAIN=triton.next_power_of_2(nope), INTERLEAVED=interleaved, TURN=turn, num_warps=4,
    )  # fmt: skip
    return k_NHd


def part_fast(
    dq_NHd: Tensor, dk_NHd: Tensor, dv_NHv: Tensor, cos_PR: Tensor, sin_PR: Tensor, interleaved: bool,
    to_q: Tensor, to_rope: Tensor,
) -> Tensor:  # fmt: skip
    """`part_reference` of contiguous gradients; the first two go to `to_q` `[N, H * d]` and `to_rope` `[N, R]`, whose
    rows may lie apart. Gives the gradient of `up`."""
    rows, heads, width = dq_NHd.shape
    R, V = to_rope.shape[1], dv_NHv.shape[2]
    nope = width - R
    up_NHe = torch.empty(rows, heads, nope + V, dtype=dq_NHd.dtype, device=dq_NHd.device)
    _part[(rows,)](
        dq_NHd, dk_NHd, dv_NHv, cos_PR, sin_PR, to_q, to_rope, up_NHe, to_q.stride(0), to_rope.stride(0), len(cos_PR),
        heads, NOPE=nope, R=R, V=V, HEADS=min(HEADS, triton.next_power_of_2(heads)),
        PLAIN=triton.next_power_of_2(nope), VALUES=triton.next_power_of_2(V), INTERLEAVED=interleaved, num_warps=4,
    )  # fmt: skip
    return up_NHe
