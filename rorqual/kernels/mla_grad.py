"""Expanded MLA over whole sequences with gradients, from hidden states to attended values, as one step of autograd
(V2 report 2.1; recomputation as in V3 report 3.2.3).

Kept for the backward pass: the first products (query or its latent, latent and rotary key), the attended values and
what attention keeps of its softmax. The norms and the up-projections, and so keys and values, are made anew; with
`keep` they are kept, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rorqual.kernels import attention, mla_turn, norm_grad
from rorqual.kernels.attention import Kept
from rorqual.kernels.fuse import rmsnorm
from rorqual.kernels.gpu import usable
from rorqual.kernels.products import products


@dataclass(frozen=True)
class Shape:
    """Sizes of a brick: `batch` rows of tokens, heads, a head's channels that don't turn and that do, `rank` of the
    latent. `keep`: keys and values, and queries made from a latent, are kept. `fp8`: products are in FP8."""

    batch: int
    heads: int
    nope: int
    rope: int
    rank: int
    scale: float
    eps: float
    interleaved: bool
    keep: bool
    fp8: bool = False


@dataclass(frozen=True)
class Matrices:
    """W_Q, or W_DQ with its norm and W_UQ; W_DKV beside W_KR, the latent's norm, W_UK beside W_UV."""

    q: Tensor
    q_norm: Tensor | None
    q_up: Tensor | None
    kv: Tensor
    kv_norm: Tensor
    kv_up: Tensor


def _lay(
    q: Tensor, rope: Tensor, up: Tensor, cos: Tensor, sin: Tensor, s: Shape, turn: bool = True
) -> Tensor:
    if usable(q):
        return mla_turn.lay_fast(q, rope, up, cos, sin, s.interleaved, turn)
    again = len(q) // len(cos)
    return mla_turn.lay_reference(
        q, rope, up, cos.repeat(again, 1), sin.repeat(again, 1), s.interleaved, turn
    )


def _by_head(x: Tensor, s: Shape) -> Tensor:
    """Rows `[N, H, d]` as attention takes them, `[B, H, T, d]`."""
    return x.unflatten(0, (s.batch, -1)).transpose(1, 2)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, q_w: Tensor, q_norm: Tensor | None, q_up: Tensor | None, kv_w: Tensor,
        kv_norm: Tensor, kv_up: Tensor, cos: Tensor, sin: Tensor, s: Shape,
    ) -> Tensor:  # fmt: skip
        by, begin = products(s.fp8, q_w), len(q_w)
        first, from_x = by.forward(x_ND, (q_w, kv_w))
        latent, rope = first[:, begin : begin + s.rank], first[:, begin + s.rank :]
        q, from_q = first[:, :begin], None
        if q_up is not None and q_norm is not None:
            q, from_q = by.forward(rmsnorm(q, q_norm, s.eps), (q_up,))
        q_NHd = q.unflatten(1, (s.heads, -1))
        up, from_latent = by.forward(rmsnorm(latent, kv_norm, s.eps), (kv_up,))
        up_NHe = up.unflatten(1, (s.heads, -1))
        k_NHd = _lay(q_NHd, rope, up_NHe, cos, sin, s)
        q, k, v = _by_head(q_NHd, s), _by_head(k_NHd, s), _by_head(up_NHe[..., s.nope :], s)
        o, softmax = attention.forward(q, k, v, s.scale)
        held = (q_NHd if q_up is not None else None, k_NHd, up_NHe) if s.keep else (None, None, None)
        ctx.save_for_backward(
            q_w, q_norm, q_up, kv_w, kv_norm, kv_up, cos, sin, first, o, *held, *softmax.tensors
        )
        ctx.kept = from_x, *((from_q, from_latent) if s.keep else (None, None))
        ctx.shape, ctx.numbers = s, softmax.numbers
        return o.transpose(1, 2).reshape(len(x_ND), -1)

    @staticmethod
    def backward(ctx: Any, *slopes: Any) -> Any:
        s = ctx.shape
        q_w, q_norm, q_up, kv_w, kv_norm, kv_up, cos, sin, first, o, q_NHd, k_NHd, up_NHe, *softmax = (
            ctx.saved_tensors
        )
        by, begin, (from_x, from_q, from_latent) = products(s.fp8, q_w), len(q_w), ctx.kept
        q_part, latent = first[:, :begin], first[:, begin : begin + s.rank]
        if q_up is None:
            q_NHd = q_part.unflatten(1, (s.heads, -1))  # turned where it lies
        if k_NHd is None:
            up, from_latent = by.forward(rmsnorm(latent, kv_norm, s.eps), (kv_up,))
            up_NHe = up.unflatten(1, (s.heads, -1))
            if q_up is not None:
                q, from_q = by.forward(rmsnorm(q_part, q_norm, s.eps), (q_up,))
                q_NHd = q.unflatten(1, (s.heads, -1))
            rope = first[:, begin + s.rank :]
            k_NHd = _lay(q_NHd, rope, up_NHe, cos, sin, s, turn=q_up is not None)
        slope = _by_head(slopes[0].contiguous().unflatten(1, (s.heads, -1)), s)
        q, k, v = _by_head(q_NHd, s), _by_head(k_NHd, s), _by_head(up_NHe[..., s.nope :], s)
        back = attention.backward(slope, q, k, v, o, Kept(tuple(softmax), ctx.numbers), s.scale)
        dq, dk, dv = (t.transpose(1, 2).flatten(0, 1).contiguous() for t in back)
        del back, q, k, v, k_NHd, up_NHe
        dfirst = torch.empty_like(first)
        dq_wide = dfirst[:, :begin] if q_up is None else torch.empty_like(dq).flatten(1)
        dup = _part(dq, dk, dv, cos, sin, dq_wide, dfirst[:, begin + s.rank :], s).flatten(1)
        del dq, dk, dv
        dnormed, (dkv_up,) = by.backward(dup, from_latent, (kv_up,))
        dkv_norm = _norm_back(latent, kv_norm, s.eps, dnormed, dfirst[:, begin : begin + s.rank])
        dq_norm = dq_up = None
        if q_up is not None:
            dnormed, (dq_up,) = by.backward(dq_wide, from_q, (q_up,))
            dq_norm = _norm_back(q_part, q_norm, s.eps, dnormed, dfirst[:, :begin])
        dx, (dq_w, dkv_w) = by.backward(dfirst, from_x, (q_w, kv_w))
        return dx, dq_w, dq_norm, dq_up, dkv_w, dkv_norm, dkv_up, None, None, None


def _part(
    dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor, to_q: Tensor, to_rope: Tensor, s: Shape
) -> Tensor:
    if usable(dq):
        return mla_turn.part_fast(dq, dk, dv, cos, sin, s.interleaved, to_q, to_rope)
    again = len(dq) // len(cos)
    q, rope, up = mla_turn.part_reference(
        dq, dk, dv, cos.repeat(again, 1), sin.repeat(again, 1), s.interleaved
    )
    to_q.copy_(q.flatten(1))
    to_rope.copy_(rope)
    return up


def _norm_back(x: Tensor, weight: Tensor, eps: float, slope: Tensor, to: Tensor) -> Tensor:
    """x's gradient goes to `to`; gives the weight's."""
    if usable(x):
        return norm_grad.rmsnorm_backward_fast(x, weight, eps, slope, out=to)[1]
    dx, dweight = norm_grad.rmsnorm_backward_reference(x, weight, eps, slope)
    to.copy_(dx)
    return dweight


def mla_trained(x_ND: Tensor, matrices: Matrices, cos: Tensor, sin: Tensor, shape: Shape) -> Tensor:
    """Attended values `[N, H * v]` of hidden states `[N, D]`, N = batch * T, each row of T seeing itself causally;
    cos and sin `[T, rope / 2]` fp32."""
    m = matrices
    o: Tensor = _Attend.apply(x_ND, m.q, m.q_norm, m.q_up, m.kv, m.kv_norm, m.kv_up, cos, sin, shape)
    return o


def supported(x: Tensor, rope: int) -> bool:
    """Whether the kernels take these numbers and rotary channels."""
    return usable(x) and x.dtype in (torch.bfloat16, torch.float16) and rope & (rope - 1) == 0
