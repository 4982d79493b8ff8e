"""What indexers learn from: how far their softmax lies from where attention went (V3.2 report 2.1; facts 3.8).

    L = sum over queries t of KL(p_t || softmax over s of I_t,s),   I_t,s = sum over h of w_t,h ReLU(q_t,h . k_s)

p_t is the main attention, summed over its heads and normalised. Over all keys (the dense warm-up), dots of all heads
are too many to keep: each block of queries is turned into its loss and its gradients at once, and forgotten. Over
chosen keys there are kernels (`kernels/index_loss.py`, `kernels/mla_sparse_shares.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from rorqual.kernels.index_loss import index_loss as chosen_index_loss
from rorqual.nn.indexer import Projected, flat_places, query_blocks
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
    q_BTHd: Tensor, k_BKd: Tensor, w_BTH: Tensor, target: Part, seen: Part, blocks: Iterable[slice]
) -> Tensor:
    """`reference`, a block of queries at a time; one backward pass. `target` and `seen` give a block's distribution and
    the keys that count, `[B, t, K]`."""
    found: Tensor = _Blocked.apply(q_BTHd, k_BKd, w_BTH, target, seen, blocks)
    return found


class _Blocked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_BTHd: Tensor, k_BKd: Tensor, w_BTH: Tensor,
        target: Part, seen: Part, blocks: Iterable[slice],
    ) -> Tensor:  # fmt: skip
        k_wide = upcast(k_BKd)
        loss = k_wide.new_zeros(())
        learns = any(ctx.needs_input_grad)
        grads = torch.empty_like(q_BTHd), torch.zeros_like(k_wide), torch.empty_like(w_BTH)
        for block in blocks:
            q, w, p, mask = upcast(q_BTHd[:, block]), w_BTH[:, block], target(block), seen(block)
            dots_BTHK = _dots(q, k_wide).relu_()
            score = (w[..., None, :] @ dots_BTHK).squeeze(-2).masked_fill(~mask, float("-inf"))
            log = score.log_softmax(-1).masked_fill(~mask, 0)
            loss += (torch.xlogy(p, p) - p * log).sum()
            if learns:
                slope = (log.exp() - p).masked_fill(~mask, 0)
                grads[2][:, block] = (dots_BTHK @ slope[..., None]).squeeze(-1)
                slopes = ((dots_BTHK > 0) * (slope[..., None, :] * w[..., None])).flatten(1, 2)
                grads[0][:, block] = (slopes @ k_wide).unflatten(1, q.shape[1:3])
                grads[1].add_(slopes.mT @ q.flatten(1, 2))
        ctx.grads = grads[0], grads[1].to(k_BKd.dtype), grads[2]
        return loss

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        grads, ctx.grads = ctx.grads, None
        return (*(grad.mul_(slope) for grad in grads), None, None, None)


def _dots(q_BTHC: Tensor, k_BKC: Tensor) -> Tensor:
    """`[B, T, H, K]`."""
    return (q_BTHC.flatten(1, 2) @ k_BKC.mT).unflatten(1, q_BTHC.shape[1:3])


def latent_loss(projected: Projected, main: tuple[Tensor, Tensor, float], step: Step) -> Tensor:
    """An indexer's loss beside dense MLA, over all visible keys (V3.2's warm-up).

    `main`: absorbed queries `[B, T, H, C]`, latents `[B, K, C]` and the softmax scale; they take no gradient.
    """
    q_BTHC, latent_BKC, scale = main
    (batch, time, heads), keys = q_BTHC.shape[:3], latent_BKC.shape[1]

    def seen(block: slice) -> Tensor:
        key = torch.arange(keys, device=latent_BKC.device)
        visible = key <= step.rows.positions_BT[:, block, None]
        if step.first_BT is not None:
            visible = visible & (key >= step.first_BT[:, block, None])
        return visible

    def target(block: slice) -> Tensor:
        """Mean over heads of their softmax."""
        score_BTHK = upcast(_dots(q_BTHC[:, block], latent_BKC)) * scale
        return score_BTHK.masked_fill(~seen(block)[:, :, None], float("-inf")).softmax(-1).mean(2)

    each = 8 * batch * (heads + projected[2].shape[2]) * keys
    return index_loss(*projected, target, seen, query_blocks(time, each))


def chosen_loss(projected: Projected, target_Nk: Tensor, slots_Nk: Tensor) -> Tensor:
    """An indexer's loss over the keys chosen for each query (`flat_places`), and what share of attention each got."""
    q_BTHd, k_BKd, w_BTH = projected
    flat = q_BTHd.flatten(0, 1), k_BKd.flatten(0, 1), w_BTH.flatten(0, 1)
    return chosen_index_loss(*flat, slots_Nk, target_Nk)


def entry_loss(
    projected: Projected, weight_BTE: Tensor, seen: Part, chosen_BTk: Tensor | None = None
) -> Tensor:
    """An indexer's loss beside V4's attention, over entries. `weight_BTE`: what they got in the softmax that they share
    with window and sink, summed over heads; `[B, T, k]` if chosen. Tokens that see none yet add nothing."""
    (batch, time, heads), entries = projected[2].shape, projected[1].shape[1]
    least = torch.finfo(weight_BTE.dtype).tiny
    target_BTE = weight_BTE / weight_BTE.sum(-1, keepdim=True).clamp(min=least)
    if chosen_BTk is not None:
        return chosen_loss(projected, target_BTE.flatten(0, 1), flat_places(chosen_BTk, entries))
    blocks = query_blocks(time, 8 * batch * heads * entries)
    return index_loss(*projected, lambda block: target_BTE[:, block], seen, blocks)
