"""Mixture of experts: fine-grained routed experts beside shared ones (DeepSeekMoE; facts 3.3, 3.9)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rorqual.family import parts
from rorqual.kernels import experts_grad, fp8_train_experts
from rorqual.kernels.affinity import affinities
from rorqual.kernels.experts import Shared, Weights, experts
from rorqual.kernels.gpu import usable
from rorqual.kernels.linear import Pack, linear_summed, linears
from rorqual.kernels.mode import is_invariant, learns_in_fp8
from rorqual.nn.dropping import Capacity, kept
from rorqual.nn.linear import GroupedLinear
from rorqual.nn.mlp import SwiGLU, swiglu
from rorqual.nn.norm import upcast
from rorqual.nn.router import Choice, Router
from rorqual.nn.step import Step

SMALL = 16 * 2**20
"""Bytes of all experts of a layer under which they are read faster than a few of them are called."""

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
        self.pack, self.down_pack = Pack(), Pack()
        self.first, self.of = 0, experts

    def hold(self, first: int, of: int) -> None:
        """These matrices are those of experts from `first` on, among `of`: choices of others add nothing."""
        self.first, self.of = first, of

    def forward(
        self, x_ND: Tensor, ids_NK: Tensor, weights_NK: Tensor, shared: Shared | None = None
    ) -> Tensor:
        """Sum over each token's experts of weight * expert(x): `[N, D]`.

        The gated product is weighted in fp32 before the second matrix (facts 3.9), and a token's experts are
        summed in fp32 in the order of its choice. On a GPU `shared` experts can come along.
        """
        (tokens, chosen), count = ids_NK.shape, self.gate.weight.shape[0]
        if self.first:
            ids_NK = ids_NK - self.first
        cpu = (
            x_ND.device.type == "cpu"
            and self.gate.scale is None
            and shared is None
            and not torch.is_grad_enabled()
        )
        if cpu and tokens <= DENSE and (count < tokens * chosen or self._small) and not is_invariant():
            return self._all(x_ND, ids_NK, weights_NK)
        stacks = self.gate.stack(), self.up.stack(), self.down.stack()
        return experts(
            x_ND,
            ids_NK,
            weights_NK,
            *stacks,
            limit=self.limit,
            shared=shared,
            fixed=is_invariant(),
            of=self.of,
        )

    @property
    def _small(self) -> bool:
        weights = self.gate.weight, self.up.weight, self.down.weight
        return sum(w.numel() * w.element_size() for w in weights) < SMALL

    def _all(self, x_ND: Tensor, ids_NK: Tensor, weights_NK: Tensor) -> Tensor:
        """The same with every token through every expert, those not chosen at weight 0: with few tokens the
        matrices are what takes time, and nearly all of them are read anyway, now in two products. (What is not
        finite in an expert's `down` is met by all tokens here.)"""
        experts, width, _ = self.gate.weight.shape
        if self.of > experts:
            here_NK = (ids_NK >= 0) & (ids_NK < experts)
            ids_NK, weights_NK = ids_NK.clamp(0, experts - 1), weights_NK.masked_fill(~here_NK, 0)
        weights_NE = weights_NK.new_zeros(x_ND.shape[0], experts).scatter_add_(1, ids_NK, weights_NK)
        stacks = self.gate.weight, self.up.weight
        gate, up = (y.unflatten(1, (experts, width)) for y in linears(x_ND, stacks, (None, None), self.pack))
        inner_NEW = swiglu(upcast(gate), upcast(up), self.limit).mul_(weights_NE[..., None])
        inner_NEW.masked_fill_(weights_NE[..., None] == 0, 0)  # what 0 times infinity would leave
        return linear_summed(inner_NEW.to(x_ND.dtype), self.down.weight, self.down_pack)


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
            return self._fast(x_ND, ids_BT.flatten(), step).view_as(x_BTD)
        settled = step.routes.get(step.layer) if step.routes is not None else None
        choice = self.router(x_ND, ids_BT.flatten(), settled)
        if step.watch is not None:
            step.watch.chose(step.layer, choice.ids)
        if step.trace is not None:
            seen: tuple[Tensor, Tensor, Tensor] = tuple(choice)
            if not step.rows.uniform:
                real_N = step.rows.real_BT.flatten()
                seen = choice.ids[real_N], choice.weights[real_N], choice.logits[real_N]
            step.trace.experts[step.layer] = seen
        ids_NK = choice.ids if step.capacity is None else self._within_capacity(choice, step, step.capacity)
        stacks = self.experts.gate.weight, self.experts.up.weight, self.experts.down.weight
        fp8 = learns_in_fp8() and self.experts.gate.scale is None
        if fp8 or (torch.is_grad_enabled() and experts_grad.supported(x_ND, *stacks)):
            add_ND = self.shared(x_ND) if self.shared is not None else None
            routed = fp8_train_experts.routed_trained if fp8 else experts_grad.routed_trained
            limit, ids_NK = self.experts.limit, ids_NK - self.experts.first
            return routed(x_ND, ids_NK, choice.weights, *stacks, limit=limit, add_ND=add_ND).view_as(x_BTD)
        y_ND = self.experts(x_ND, ids_NK, choice.weights)
        if self.shared is not None:
            y_ND = y_ND + self.shared(x_ND)
        return y_ND.view_as(x_BTD)

    @torch.no_grad()
    def _within_capacity(self, choice: Choice, step: Step, capacity: Capacity) -> Tensor:
        """The chosen experts, -1 (none) for the pairs that their devices drop."""
        r = self.router.part
        ids_NK = choice.ids.long()
        affinity_NK = affinities(choice.logits, r.score).gather(-1, ids_NK)
        exempt_N = capacity.exempt_B.repeat_interleave(step.rows.width)
        experts = choice.logits.shape[1]
        kept_NK = kept(
            affinity_NK, ids_NK, exempt_N, experts=experts, devices=r.groups, factor=capacity.factor
        )
        capacity.dropped[step.layer] = (~kept_NK).sum()
        return ids_NK.masked_fill(~kept_NK, -1)

    def _fast(self, x_ND: Tensor, token_N: Tensor, step: Step) -> Tensor:
        """The same by kernels: routing, and all experts, shared ones among them, in a few launches."""
        s = self.shared
        ids_NK, weights_NK = self.router.fast(x_ND, token_N)
        if step.watch is not None:
            step.watch.chose(step.layer, ids_NK)
        shared = None
        if s is not None:
            gate, up, down = (Weights(m.weight, m.scale, m.block) for m in (s.gate, s.up, s.down))
            shared = (gate, up, down)
        y_ND: Tensor = self.experts(x_ND, ids_NK, weights_NK, shared)
        return y_ND
