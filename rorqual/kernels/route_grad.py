"""Routing with gradients: logits, choice and weights in a few launches, and the slope of the weights in one.

The definition is `route.choose_reference`, whose gradients autograd finds by itself. Logits are made in fp32; their
gradient meets the 16-bit matrix and hidden states rounded to 16 bits, as every other gradient there.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rorqual.kernels.affinity import affinities_and_slopes
from rorqual.kernels.gpu import tl, triton
from rorqual.kernels.route import Rule, chosen

ROWS = 16
"""Tokens that a program works."""


@triton.jit
def _slope(
    logits, ids, slope, beside, out, rows, factor,
    E: tl.constexpr, K: tl.constexpr, EP: tl.constexpr, ROWS: tl.constexpr, SCORE: tl.constexpr,
    NORMALIZE: tl.constexpr, BESIDE: tl.constexpr,
):  # fmt: skip
    """Gradient of the logits of ROWS tokens from that of their weights, and from `beside`."""
    n = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    e = tl.arange(0, EP)
    live = n < rows
    real = live[:, None] & (e < E)[None, :]
    logit = tl.load(logits + n[:, None] * E + e[None, :], mask=real, other=0.0)
    score, bend = affinities_and_slopes(logit, real, SCORE)
    # The chosen experts' scores add up to `total`; `mean` is their slopes' sum, each times its score.
    total = tl.zeros((ROWS,), tl.float32)
    mean = tl.zeros((ROWS,), tl.float32)
    back = tl.zeros((ROWS, EP), tl.float32)
    mine = tl.zeros((ROWS, EP), tl.float32)
    for k in tl.static_range(K):
        hit = e[None, :] == tl.load(ids + n * K + k, mask=live, other=-1)[:, None]
        d = tl.load(slope + n * K + k, mask=live, other=0.0)
        s = tl.sum(tl.where(hit, score, 0.0), 1)
        total += s
        mean += d * s
        back += tl.where(hit, d[:, None], 0.0)
        mine += tl.where(hit, 1.0, 0.0)
    if NORMALIZE:
        below = total + 1e-20
        back = (back - mine * (mean / below)[:, None]) / below[:, None]
    back *= factor
    if SCORE == "softmax":
        back = score * (back - tl.sum(score * back, 1)[:, None])
    else:
        back *= bend
    if BESIDE:
        back += tl.load(beside + n[:, None] * E + e[None, :], mask=real, other=0.0)
    tl.store(out + n[:, None] * E + e[None, :], back.to(out.dtype.element_ty), mask=real)


def slope_fast(
    logits_NE: Tensor,
    ids_NK: Tensor,
    slope_NK: Tensor,
    rule: Rule,
    beside_NE: Tensor | None,
    kind: torch.dtype,
) -> Tensor:
    """Gradient of the logits `[N, E]` in `kind` from that of the weights `[N, K]`, plus `beside_NE`."""
    rows, experts = logits_NE.shape
    out_NE = torch.empty(rows, experts, dtype=kind, device=logits_NE.device)
    _slope[(triton.cdiv(rows, ROWS),)](
        logits_NE, ids_NK, slope_NK, logits_NE if beside_NE is None else beside_NE, out_NE, rows, rule.scale,
        E=experts, K=rule.top_k, EP=triton.next_power_of_2(experts), ROWS=ROWS, SCORE=rule.score,
        NORMALIZE=rule.normalize, BESIDE=beside_NE is not None, num_warps=4,
    )  # fmt: skip
    return out_NE


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, weight_ED: Tensor, bias_E: Tensor | None, rule: Rule, table_VK: Tensor | None,
        token_N: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        logits_NE = torch.mm(x_ND, weight_ED.t(), out_dtype=torch.float32)
        ids_NK, weights_NK = chosen(logits_NE, bias_E, rule, table_VK, token_N)
        ctx.save_for_backward(x_ND, weight_ED, logits_NE, ids_NK)
        ctx.rule = rule
        ctx.mark_non_differentiable(ids_NK)
        ctx.set_materialize_grads(False)
        return ids_NK, weights_NK, logits_NE

    @staticmethod
    def backward(ctx: Any, *slopes: Any) -> Any:
        x_ND, weight_ED, logits_NE, ids_NK = ctx.saved_tensors
        _, slope_NK, beside_NE = slopes
        slope_NK = (
            torch.zeros_like(ids_NK, dtype=torch.float32) if slope_NK is None else slope_NK.contiguous()
        )
        beside_NE = None if beside_NE is None else beside_NE.contiguous()
        d_NE = slope_fast(logits_NE, ids_NK, slope_NK, ctx.rule, beside_NE, x_ND.dtype)
        return d_NE @ weight_ED, d_NE.t() @ x_ND, None, None, None, None


def route_trained(
    x_ND: Tensor, weight_ED: Tensor, bias_E: Tensor | None, rule: Rule, table_VK: Tensor | None = None,
    token_N: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`route.route` with gradients, of 16-bit x and weight on a GPU: ids `[N, K]` int32, weights `[N, K]` and logits
    `[N, E]` fp32, the last two with gradients."""
    ids_NK, weights_NK, logits_NE = _Route.apply(x_ND, weight_ED, bias_E, rule, table_VK, token_N)
    return ids_NK, weights_NK, logits_NE
