"""How tokens choose experts: one brick for every generation, driven by `family.Router` (facts 3.3, 3.9)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rorqual.family.parts import MoE
from rorqual.kernels.affinity import affinities
from rorqual.kernels.gpu import usable
from rorqual.kernels.route import Rule, route
from rorqual.kernels.route_grad import route_trained
from rorqual.nn.errors import InputError
from rorqual.nn.linear import keeping_types
from rorqual.nn.norm import upcast


class Choice(NamedTuple):
    """Experts of each token: `ids` [N, K] integers, `weights` [N, K] fp32, raw `logits` [N, E] fp32."""

    ids: Tensor
    weights: Tensor
    logits: Tensor


def keep_best_groups(ranked_NE: Tensor, groups: int, keep: int, group_score: str) -> Tensor:
    """`ranked_NE` with -inf outside the `keep` best of `groups` contiguous groups of experts."""
    grouped = ranked_NE.unflatten(-1, (groups, -1))
    worth_NG = grouped.amax(-1) if group_score == "max" else grouped.topk(2, -1).values.sum(-1)
    kept = torch.zeros_like(worth_NG, dtype=torch.bool).scatter_(-1, worth_NG.topk(keep, -1).indices, True)
    return grouped.masked_fill(~kept[..., None], float("-inf")).flatten(-2)


class Router(nn.Module):
    """Scores every expert for a token and takes `top_k`, all in fp32.

    The balance `bias` counts for choosing only, never in the weights, and takes no gradient: see
    `rorqual.nn.balance`. A hashed router looks the experts up by token id in `table` [V, K].
    """

    bias: Tensor | None
    table: Tensor | None

    def __init__(self, hidden: int, vocab: int, part: MoE) -> None:
        super().__init__()
        self.part = part.router
        self.top_k = part.top_k
        self.weight = nn.Parameter(torch.empty(part.routed, hidden))
        bias = torch.empty(part.routed, dtype=torch.float32) if part.router.bias else None
        self.register_buffer("bias", bias)
        table = torch.empty(vocab, part.top_k, dtype=torch.int64) if part.router.hashed else None
        self.register_buffer("table", table)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """The balance bias stays in fp32 when the model is cast to a lower precision."""
        pinned = self.bias

        def guarded(t: Tensor) -> Tensor:
            return keeping_types(fn)(t) if t is pinned else fn(t)

        return super()._apply(guarded, recurse)

    def fast(self, x_ND: Tensor, token_N: Tensor) -> tuple[Tensor, Tensor]:
        """`forward` by kernels: ids [N, K] and weights [N, K] alone."""
        r = self.part
        return route(
            x_ND, self.weight, self.bias, top_k=self.top_k, score=r.score, groups=r.groups, keep=r.keep,
            group_score=r.group_score, normalize=r.normalize, scale=r.scale, table_VK=self.table,
            token_N=token_N if self.table is not None else None,
        )  # fmt: skip

    def forward(
        self, x_ND: Tensor, token_N: Tensor | None = None, settled_NK: Tensor | None = None
    ) -> Choice:
        """x `[N, D]`, and for a hashed router the token ids `[N]`. `settled_NK`: experts that were chosen before, of
        which only the weights are still to be found."""
        r = self.part
        fast = torch.is_grad_enabled() and usable(x_ND) and settled_NK is None
        if fast and x_ND.dtype == self.weight.dtype == torch.bfloat16:
            rule = Rule(self.top_k, r.score, r.groups, r.keep, r.group_score, r.normalize, r.scale)
            tokens = token_N if self.table is not None else None
            return Choice(*route_trained(x_ND, self.weight, self.bias, rule, self.table, tokens))
        full = upcast(x_ND)
        logits = F.linear(full, self.weight.to(full.dtype))
        score = affinities(logits, r.score)
        if self.table is not None:
            if token_N is None:
                raise InputError("a hash-routed layer needs the token ids beside the hidden states")
            ids = self.table[token_N]
        elif settled_NK is not None:
            ids = settled_NK
        else:
            ranked = score if self.bias is None else score + self.bias
            if r.groups > 1:
                ranked = keep_best_groups(ranked, r.groups, r.keep, r.group_score)
            ids = ranked.topk(self.top_k, -1).indices
        weights = score.gather(-1, ids)
        if r.normalize:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return Choice(ids, weights * r.scale, logits)
