"""What indexers learn from: how far their softmax lies from where attention went (V3.2 report 2.1; facts 3.8).

    L = sum over queries t of KL(p_t || softmax over s of I_t,s),   I_t,s = sum over h of w_t,h ReLU(q_t,h . k_s)

p_t is the main attention, summed over its heads and normalised. Dots of all heads with all keys are too many to keep:
each block of queries is turned into its loss and its gradients at once, and forgotten.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from rorqual.nn.indexer import query_blocks
from rorqual.nn.norm import upcast
from rorqual.nn.step import Step

Part = Callable[[slice], Tensor]
"""Something of a block of queries."""


def reference(q_BTHd: Tensor, k_BKd: Tensor, w_BTH: Tensor, target_BTK: Tensor, seen_BTK: Tensor) -> Tensor:
    """The sum over queries, with everything held at once. `seen_BTK`: the keys that count; a query that sees none adds
    nothing. `target_BTK` is 0 elsewhere."""
    dots_BTHK = torch.einsum("bthd,bkd->bthk", upcast(q_BTHd), upcast(k_BKd)).relu()
    score_BTK = torch.einsum("bth,bthk->btk", w_BTH, dots_BTHK)
    log_BTK = score_BTK.masked_fill(~seen_BTK, -1e30).log_softmax(-1)
    return (torch.xlogy(target_BTK, target_BTK) - target_BTK * log_BTK).sum()


def index_loss(
    q_BTHd: Tensor,
    k_BKd: Tensor,
    w_BTH: Tensor,
    target: Part,
    seen: Part,
    blocks: Iterable[slice],
    chosen_BTk: Tensor | None = None,
) -> Tensor:
    """`reference`, a block of queries at a time; one backward pass. `target` and `seen` give a block's distribution and
    the keys that count, `[B, t, K]`; with `chosen_BTk` (positions, -1: none) over the chosen keys, `[B, t, k]`."""
    found: Tensor = _Blocked.apply(q_BTHd, k_BKd, w_BTH, target, seen, blocks, chosen_BTk)
    return found


class _Blocked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_BTHd: Tensor, k_BKd: Tensor, w_BTH: Tensor,
        target: Part, seen: Part, blocks: Iterable[slice], chosen_BTk: Tensor | None,
    ) -> Tensor:  # fmt: skip
        k_wide = upcast(k_BKd)
        loss = k_wide.new_zeros(())
        learns = any(ctx.needs_input_grad)
        grads = torch.empty_like(q_BTHd), torch.zeros_like(k_wide), torch.empty_like(w_BTH)
        for block in blocks:
            q, w, p, mask = upcast(q_BTHd[:, block]), w_BTH[:, block], target(block), seen(block)
            keys = _Keys(k_wide, None if chosen_BTk is None else chosen_BTk[:, block])
            dots_BTHK = keys.dots(q).relu_()
            score = (w[..., None, :] @ dots_BTHK).squeeze(-2).masked_fill(~mask, float("-inf"))
            log = score.log_softmax(-1).masked_fill(~mask, 0)
            loss += (torch.xlogy(p, p) - p * log).sum()
            if learns:
                slope = (log.exp() - p).masked_fill(~mask, 0)
                grads[2][:, block] = (dots_BTHK @ slope[..., None]).squeeze(-1)
                slopes_BTHK = (dots_BTHK > 0) * (slope[..., None, :] * w[..., None])
                grads[0][:, block] = keys.back(slopes_BTHK, q, grads[1])
        ctx.grads = grads[0], grads[1].to(k_BKd.dtype), grads[2]
        return loss

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        grads, ctx.grads = ctx.grads, None
        return (*(grad.mul_(slope) for grad in grads), None, None, None, None)


class _Keys:
    """The keys that a block of queries meets: all of a row's, or those chosen for each query."""

    def __init__(self, k_BKd: Tensor, chosen_BTk: Tensor | None) -> None:
        self.k, self.at_BTk = k_BKd, None
        if chosen_BTk is not None:
            rows = torch.arange(len(k_BKd), device=k_BKd.device)[:, None, None] * k_BKd.shape[1]
            self.at_BTk = rows + chosen_BTk.clamp(min=0)
            self.k = k_BKd.flatten(0, 1)[self.at_BTk]

    def dots(self, q_BTHd: Tensor) -> Tensor:
        """`[B, t, H, K]`, or `[B, t, H, k]`."""
        if self.at_BTk is not None:
            return q_BTHd @ self.k.mT
        return (q_BTHd.flatten(1, 2) @ self.k.mT).unflatten(1, q_BTHd.shape[1:3])

    def back(self, slopes_BTHK: Tensor, q_BTHd: Tensor, grad_BKd: Tensor) -> Tensor:
        """The gradient of the queries; that of the keys is added to `grad_BKd`."""
        if self.at_BTk is not None:
            add = (slopes_BTHK.mT @ q_BTHd).flatten(0, 2)
            grad_BKd.view(-1, grad_BKd.shape[-1]).index_add_(0, self.at_BTk.flatten(), add)
            return slopes_BTHK @ self.k
        flat = slopes_BTHK.flatten(1, 2)
        grad_BKd += flat.mT @ q_BTHd.flatten(1, 2)
        return (flat @ self.k).unflatten(1, q_BTHd.shape[1:3])


def latent_loss(
    projected: tuple[Tensor, Tensor, Tensor],
    main: tuple[Tensor, Tensor, float],
    step: Step,
    chosen_BTk: Tensor | None = None,
) -> Tensor:
    """An indexer's loss beside MLA: over all visible keys, or over those chosen (V3.2's two stages).

    `projected`: index queries, keys and weights (`Indexer.project`). `main`: absorbed queries `[B, T, H, C]`, latents
    `[B, K, C]` and the softmax scale; they take no gradient.
    """
    q_BTHC, latent_BKC, scale = main
    (batch, time, heads), keys = q_BTHC.shape[:3], latent_BKC.shape[1]

    def seen(block: slice) -> Tensor:
        if chosen_BTk is not None:
            return chosen_BTk[:, block] >= 0
        key = torch.arange(keys, device=latent_BKC.device)
        visible = key <= step.rows.positions_BT[:, block, None]
        if step.first_BT is not None:
            visible = visible & (key >= step.first_BT[:, block, None])
        return visible

    def target(block: slice) -> Tensor:
        """Mean over heads of their softmax."""
        found = _Keys(latent_BKC, None if chosen_BTk is None else chosen_BTk[:, block])
        score_BTHK = upcast(found.dots(q_BTHC[:, block])) * scale
        return score_BTHK.masked_fill(~seen(block)[:, :, None], float("-inf")).softmax(-1).mean(2)

    heads += projected[2].shape[2]
    wide = latent_BKC.shape[2] + projected[1].shape[2] if chosen_BTk is not None else 0
    each = 8 * batch * (heads + wide) * (keys if chosen_BTk is None else chosen_BTk.shape[2])
    return index_loss(*projected, target, seen, query_blocks(time, each), chosen_BTk)


def entry_loss(
    projected: tuple[Tensor, Tensor, Tensor],
    weight_BTE: Tensor,
    seen: Part,
    chosen_BTk: Tensor | None = None,
) -> Tensor:
    """An indexer's loss beside V4's attention, over entries. `weight_BTE`: what they got in the softmax that they share
    with window and sink, summed over heads; `[B, T, k]` if chosen. Tokens that see none yet add nothing."""
    (batch, time, heads), dim = projected[2].shape, projected[1].shape[2]
    least = torch.finfo(weight_BTE.dtype).tiny
    target_BTE = weight_BTE / weight_BTE.sum(-1, keepdim=True).clamp(min=least)
    each = 8 * batch * (heads + (dim if chosen_BTk is not None else 0)) * weight_BTE.shape[2]
    blocks = query_blocks(time, each)
    return index_loss(*projected, lambda block: target_BTE[:, block], seen, blocks, chosen_BTk)
