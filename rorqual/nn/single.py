"""A decoding pass of one token (or two) through a layer, by the kernels that join what stands between matrices.

Each function gives the new residual stream, or None where its kernels don't take the brick or the pass: then
the brick's own way is taken.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rorqual.kernels import single, single_experts, single_mla, single_ring
from rorqual.kernels.experts import Shared, Weights
from rorqual.kernels.gpu import usable
from rorqual.kernels.mode import is_invariant
from rorqual.kernels.route import Rule, chosen
from rorqual.nn.linear import Linear
from rorqual.nn.mla import MLA
from rorqual.nn.mlp import SwiGLU
from rorqual.nn.moe import MoE
from rorqual.nn.norm import RMSNorm
from rorqual.nn.paged import PagedStep, Store
from rorqual.nn.step import Step

ON = True
"""Whether passes of one token take this way."""

RING = True
"""Whether its experts are one launch, where they can be."""

ASK = True
"""Whether the attention, which has little to read, asks for the weight of `o` to be brought into L2."""


def fits(x_1ND: Tensor, step: Step) -> bool:
    """Whether a pass is of the kind these kernels are made for."""
    return (
        ON
        and usable(x_1ND)
        and not torch.is_grad_enabled()
        and isinstance(step, PagedStep)
        and x_1ND.shape[1] <= single.ROWS
        and x_1ND.dtype == torch.bfloat16
        and len(step.groups) == 1
        and step.groups[0].decoding
        and not is_invariant()
    )


def attend(brick: nn.Module, norm: RMSNorm, x_1ND: Tensor, step: Step, store: Store) -> Tensor | None:
    """x + attention(norm(x))."""
    if not isinstance(brick, MLA) or brick.index is not None or not isinstance(step, PagedStep):
        return None
    p, x_ND, group, pages = brick.part, x_1ND[0], step.groups[0], store["latent"]
    first = brick.q if p.q_rank is None else brick.q_a
    matrices = [first, brick.kv_a, brick.o] + ([] if p.q_rank is None else [brick.q_b])
    w_HrC = brick.kv_b.weight.unflatten(0, (p.heads, p.nope_dim + p.v_dim))
    plain = [_triple(m) for m in matrices]
    rows = x_ND.new_empty(1, 1, p.qk_dim)
    if (
        any(m.bias is not None for m in matrices)
        or not single.rows_fit(x_ND, *plain)
        or p.heads * p.v_dim > single.WIDEST
        or not single.fits(*_triple(brick.kv_b))
        or not single_mla.fit(rows, w_HrC, pages, p.nope_dim)
    ):
        return None
    q, kv_NC = single.rows(x_ND, *_lists(first, brick.kv_a), norm=(norm.weight, norm.eps))
    if p.q_rank is not None:
        (q,) = single.rows(q, *_lists(brick.q_b), norm=(brick.q_a_norm.weight, brick.q_a_norm.eps))
    cos, sin = (t[0] for t in step.rotation(p.rope))
    o_NV = single_mla.attention(
        q.unflatten(-1, (p.heads, p.qk_dim)), kv_NC, (brick.kv_a_norm.weight, brick.kv_a_norm.eps), cos, sin, w_HrC,
        brick.kv_b.scale, pages, step.slots(), group.table_SB, group.ends_S, width=group.width, nope=p.nope_dim,
        interleaved=p.rope.interleaved, softmax_scale=p.scale, later=brick.o.weight if ASK else None,
    )  # fmt: skip
    (y,) = single.rows(o_NV, *_lists(brick.o), residual_NO=x_ND)
    return y[None]


def feed(
    brick: nn.Module, norm: RMSNorm, x_1ND: Tensor, ids_1N: Tensor, step: Step | None = None
) -> Tensor | None:
    """x + experts(norm(x)), of one token; x + the dense layer's."""
    if isinstance(brick, SwiGLU):
        return _feed_dense(brick, norm, x_1ND)
    if not isinstance(brick, MoE):
        return None
    x_ND, router, s = x_1ND[0], brick.router, brick.shared
    e = brick.experts
    stacks = e.gate.stack(), e.up.stack(), e.down.stack()
    shared = None if s is None else (_weights(s.gate), _weights(s.up), _weights(s.down))
    if not single_experts.experts_fit(x_ND, router.top_k, *stacks, shared) or not single.rows_fit(
        x_ND, (router.weight, None, None)
    ):
        return None
    normed_ND = torch.empty_like(x_ND)
    r, by, table = router.part, (norm.weight, norm.eps), router.table
    rule = Rule(router.top_k, r.score, r.groups, r.keep, r.group_score, r.normalize, r.scale)
    (logits_NE,) = single.rows(
        x_ND, [router.weight], [None], by, normed_ND=normed_ND, out_dtype=torch.float32
    )
    state = _state(brick, x_ND, stacks, shared, step)
    token = ids_1N[0] if table is not None else None
    # Experts that may start early ask for matrices that need no choice; in bf16 two launches gain nothing by it.
    ahead = state is not None or stacks[0].scale is not None
    choice = chosen(logits_NE, router.bias, rule, table, token, ahead)
    if step is not None and step.watch is not None:
        step.watch.chose(step.layer, choice[0])
    y = single_experts.through_experts(
        normed_ND, choice, *stacks, limit=e.limit, shared=shared, residual_1D=x_ND, state=state
    )
    return y[None]


def _feed_dense(brick: SwiGLU, norm: RMSNorm, x_1ND: Tensor) -> Tensor | None:
    x_ND = x_1ND[0]
    inner_NW = x_ND.new_empty(len(x_ND), brick.down.weight.shape[1])  # only to ask
    first, last = (_triple(brick.gate), _triple(brick.up)), _triple(brick.down)
    if (
        any(m.bias is not None for m in (brick.gate, brick.up, brick.down))
        or not single.rows_fit(x_ND, *first)
        or not single.rows_fit(inner_NW, last, widest=single.WIDEST_GATED)
    ):
        return None
    gate_NW, up_NW = single.rows(x_ND, *_lists(brick.gate, brick.up), norm=(norm.weight, norm.eps))
    (y,) = single.rows(gate_NW, *_lists(brick.down), residual_NO=x_ND, up_ND=up_NW, limit=brick.limit)
    return y[None]


def _state(
    brick: MoE, x_ND: Tensor, stacks: tuple[Weights, ...], shared: Shared | None, step: Step | None
) -> single_ring.State | None:
    """What the experts' form in one launch keeps; None where it isn't to be taken."""
    rings = step.shared.get("rings") if RING and isinstance(step, PagedStep) else None
    if rings is None or any(w.codes.data_ptr() % 16 for w in (*stacks, *(shared or ()))):
        return None
    width = stacks[0].codes.shape[1]
    slots = brick.router.top_k + (0 if shared is None else shared[0].codes.shape[0] // width)
    found: single_ring.State | None = rings.of(x_ND, slots, width, stacks[0].scale is not None)
    return found


def _triple(layer: Linear) -> tuple[Tensor, Tensor | None, tuple[int, int] | None]:
    return layer.weight, layer.scale, layer.block


def _weights(layer: Linear) -> Weights:
    return Weights(layer.weight, layer.scale, layer.block)


def _lists(*layers: Any) -> tuple[list[Tensor], list[Tensor | None]]:
    return [m.weight for m in layers], [m.scale for m in layers]
