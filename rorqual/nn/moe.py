"""Mixture of experts: fine-grained routed experts beside shared ones (DeepSeekMoE; facts 3.3, 3.9)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rorqual.family import parts
from rorqual.kernels.experts import Weights, experts
from rorqual.kernels.gpu import usable
from rorqual.kernels.linear import Pack, linear, linears
from rorqual.kernels.mode import is_invariant
from rorqual.nn.linear import GroupedLinear
from rorqual.nn.mlp import SwiGLU, swiglu
from rorqual.nn.norm import upcast
from rorqual.nn.router import Router
from rorqual.nn.step import Step

DENSE = 64
"""Tokens up to which `Experts` may run all experts on all of them."""


class Experts(nn.Module):
    """`E` SwiGLU experts with stacked matrices."""

    def __init__(self, experts: int, hidden: int, width: int, limit: float | None) -> None:
        super().__init__()
        self.gate = GroupedLinear(experts, hidden, width)
        self.up = GroupedLinear(experts, hidden, width)
        self.down = GroupedLinear(experts, width, hidden)
        self.limit = limit
        self.pack = Pack()

    def forward(self, x_ND: Tensor, ids_NK: Tensor, weights_NK: Tensor) -> Tensor:
        """Sum over each token's experts of weight * expert(x): `[N, D]`.

        Pairs (token, expert) are sorted by expert, and each expert that has any works on its slice. The
        gated product is weighted in fp32 before the second matrix (facts 3.9), and a token's experts are
        summed in fp32 in the order of its choice.
        """
        (tokens, chosen), experts = ids_NK.shape, self.gate.weight.shape[0]
        plain = self.gate.scale is None and not torch.is_grad_enabled() and not is_invariant()
        if plain and experts < tokens * chosen and tokens <= DENSE:
            return self._all(x_ND, ids_NK, weights_NK)
        gate, up, down = (stack.experts(x_ND.dtype) for stack in (self.gate, self.up, self.down))
        order = ids_NK.flatten().argsort(stable=True)
        x_PD = x_ND[order // chosen]
        weight_P1 = weights_NK.flatten()[order][:, None]
        parts_PD = []
        start = 0
        for expert, count in enumerate(ids_NK.flatten().bincount(minlength=experts).tolist()):
            if count:
                mine = slice(start, start + count)
                inner = swiglu(
                    upcast(linear(x_PD[mine], gate(expert))),
                    upcast(linear(x_PD[mine], up(expert))),
                    self.limit,
                )
                parts_PD.append(linear((inner * weight_P1[mine]).to(x_ND.dtype), down(expert)))
                start += count
        back = torch.empty_like(order)
        back[order] = torch.arange(order.numel(), device=order.device)
        y_NKD = torch.cat(parts_PD)[back].unflatten(0, (tokens, chosen))
        return upcast(y_NKD).sum(1).to(x_ND.dtype)

    def _all(self, x_ND: Tensor, ids_NK: Tensor, weights_NK: Tensor) -> Tensor:
        """The same with every token through every expert, those not chosen at weight 0: with few tokens the
        matrices are what takes time, and nearly all of them are read anyway, now in three products."""
        experts, width, _ = self.gate.weight.shape
        weights_NE = weights_NK.new_zeros(x_ND.shape[0], experts).scatter_(1, ids_NK, weights_NK)
        stacks = self.gate.weight, self.up.weight
        gate, up = (y.unflatten(1, (experts, width)) for y in linears(x_ND, stacks, (None, None), self.pack))
        inner_NEW = swiglu(upcast(gate), upcast(up), self.limit) * weights_NE[..., None]
        y_END = torch.bmm(inner_NEW.to(x_ND.dtype).transpose(0, 1), self.down.weight.transpose(1, 2))
        return upcast(y_END).sum(0).to(x_ND.dtype)


class MoE(nn.Module):
    """Router, routed experts and the shared experts (kept as one SwiGLU of their joint width)."""

    def __init__(self, hidden: int, vocab: int, part: parts.MoE) -> None:
        super().__init__()
        self.router = Router(hidden, vocab, part)
        self.experts = Experts(part.routed, hidden, part.width, part.limit)
        self.shared = SwiGLU(hidden, part.shared * part.width, part.limit) if part.shared else None

    def forward(self, x_BTD: Tensor, ids_BT: Tensor, step: Step) -> Tensor:
        x_ND = x_BTD.flatten(0, 1)
        if step.trace is None and not torch.is_grad_enabled() and usable(x_ND):
            return self._fast(x_ND, ids_BT.flatten()).view_as(x_BTD)
        choice = self.router(x_ND, ids_BT.flatten())
        if step.trace is not None:
            real_N = step.rows.real_BT.flatten()
            step.trace.experts[step.layer] = (
                choice.ids[real_N],
                choice.weights[real_N],
                choice.logits[real_N],
            )
        y_ND = self.experts(x_ND, choice.ids, choice.weights)
        if self.shared is not None:
            y_ND = y_ND + self.shared(x_ND)
        return y_ND.view_as(x_BTD)

    def _fast(self, x_ND: Tensor, token_N: Tensor) -> Tensor:
        """The same by kernels: routing, and all experts, shared ones among them, in a few launches."""
        e, s = self.experts, self.shared
        ids_NK, weights_NK = self.router.fast(x_ND, token_N)
        shared = None
        if s is not None:
            gate, up, down = (Weights(m.weight, m.scale, m.block) for m in (s.gate, s.up, s.down))
            shared = (gate, up, down)
        return experts(
            x_ND,
            ids_NK,
            weights_NK,
            e.gate.stack(),
            e.up.stack(),
            e.down.stack(),
            limit=e.limit,
            shared=shared,
        )
