"""What indexers learn from: how far their softmax lies from where attention went (V3.2 report 2.1; facts 3.8).

    L = sum over queries t of KL(p_t || softmax over s of I_t,s),   I_t,s = sum over h of w_t,h ReLU(q_t,h . k_s)

p_t is the main attention, summed over its heads and normalised. Over all keys (the dense warm-up), dots of all heads
are too many to keep: each block of queries is turned into its loss and its gradients at once, and forgotten. Over
chosen keys there are kernels (`kernels/index_loss.py`, `kernels/mla_sparse_shares.py`); a GPU takes them for the
warm-up too, with every key that is seen as chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from rorqual.kernels.index_loss import Found, index_gradients, index_loss, learned
from rorqual.kernels.mla_sparse import mla_sparse
from rorqual.kernels.mla_sparse_shares import mla_sparse_shares
from rorqual.nn.indexer import Projected, flat_places, query_blocks, trained_by_kernels
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


def blocked(
    q_BTHd: Tensor, k_BKd: Tensor, w_BTH: Tensor, target: Part, seen: Part, blocks: Iterable[slice]
) -> Tensor:
    """`reference`, a block of queries at a time; one backward pass. `target` and `seen` give a block's distribution and
    the keys that count, `[B, t, K]`."""

    def work() -> Found:
        k_wide = upcast(k_BKd)
        loss = k_wide.new_zeros(())
        dq, dk, dw = torch.empty_like(q_BTHd), torch.zeros_like(k_wide), torch.empty_like(w_BTH)
        for block in blocks:
            q, w, p, mask = upcast(q_BTHd[:, block]), w_BTH[:, block], target(block), seen(block)
            dots_BTHK = _dots(q, k_wide).relu_()
            score = (w[..., None, :] @ dots_BTHK).squeeze(-2).masked_fill(~mask, float("-inf"))
            log = score.log_softmax(-1).masked_fill(~mask, 0)
            loss += (torch.xlogy(p, p) - p * log).sum()
            slope = (log.exp() - p).masked_fill(~mask, 0)
            dw[:, block] = (dots_BTHK @ slope[..., None]).squeeze(-1)
            slopes = ((dots_BTHK > 0) * (slope[..., None, :] * w[..., None])).flatten(1, 2)
            dq[:, block] = (slopes @ k_wide).unflatten(1, q.shape[1:3])
            dk += slopes.mT @ q.flatten(1, 2)
        return loss, dq, dk, dw

    return learned(q_BTHd, k_BKd, w_BTH, work)


def _dots(q_BTHC: Tensor, k_BKC: Tensor) -> Tensor:
    """`[B, T, H, K]`."""
    return (q_BTHC.flatten(1, 2) @ k_BKC.mT).unflatten(1, q_BTHC.shape[1:3])


class Main(NamedTuple):
    """The attention that an indexer learns from: absorbed queries `[B, T, H, C]`, latents `[B, K, C]`, of which `rank`
    channels are values, and the softmax scale. They take no gradient."""

    q: Tensor
    latent: Tensor
    rank: int
    scale: float


def latent_loss(projected: Projected, main: Main, step: Step) -> Tensor:
    """An indexer's loss beside dense MLA, over all visible keys (V3.2's warm-up)."""
    (batch, time, heads), keys = main.q.shape[:3], main.latent.shape[1]

    def seen(block: slice) -> Tensor:
        key = torch.arange(keys, device=main.latent.device)
        visible = key <= step.rows.positions_BT[:, block, None]
        if step.first_BT is not None:
            visible = visible & (key >= step.first_BT[:, block, None])
        return visible

    def target(block: slice) -> Tensor:
        """Mean over heads of their softmax."""
        score_BTHK = upcast(_dots(main.q[:, block], main.latent)) * main.scale
        return score_BTHK.masked_fill(~seen(block)[:, :, None], float("-inf")).softmax(-1).mean(2)

    if trained_by_kernels(main.q):
        return learned(*projected, lambda: _over_seen(projected, main, seen))
    each = 8 * batch * (heads + projected[2].shape[2]) * keys
    return blocked(*projected, target, seen, query_blocks(time, each))


def _over_seen(projected: Projected, main: Main, seen: Part) -> Found:
    """The dense loss and its gradients by the kernels for chosen keys: all that are seen are chosen."""
    (q_BTHd, k_BKd, w_BTH), (batch, keys) = projected, main.latent.shape[:2]
    k_Md, latent_MC = k_BKd.flatten(0, 1), main.latent.flatten(0, 1)
    loss, dk_Md = upcast(k_Md).new_zeros(()), torch.zeros_like(upcast(k_Md))
    dq_BTHd, dw_BTH = torch.empty_like(q_BTHd), torch.empty_like(w_BTH)
    key = torch.arange(keys, device=k_Md.device)
    time = q_BTHd.shape[1]
    for block in query_blocks(time, 8 * batch * keys):
        last = keys - time + block.stop  # nothing behind is seen
        slots_nK = flat_places(torch.where(seen(block), key, -1)[..., :last], keys)
        q_nHC = main.q[:, block].flatten(0, 1)
        _, lse_nH = mla_sparse(q_nHC, latent_MC[None], slots_nK, rank=main.rank, scale=main.scale, lse=True)
        share_nK = mla_sparse_shares(q_nHC, latent_MC, slots_nK, lse_nH, scale=main.scale)
        q_nHd, w_nH = q_BTHd[:, block].flatten(0, 1), w_BTH[:, block].flatten(0, 1)
        part, dq_nHd, dk_part, dw_nH = index_gradients(q_nHd, k_Md, w_nH, slots_nK, share_nK)
        loss += part
        dk_Md += dk_part
        dq_BTHd[:, block] = dq_nHd.unflatten(0, (batch, -1))
        dw_BTH[:, block] = dw_nH.unflatten(0, (batch, -1))
    return loss, dq_BTHd, dk_Md.view_as(k_BKd), dw_BTH


def chosen_loss(projected: Projected, target_Nk: Tensor, slots_Nk: Tensor) -> Tensor:
    """An indexer's loss over the keys chosen for each query (`flat_places`), and what share of attention each got."""
    q_BTHd, k_BKd, w_BTH = projected
    flat = q_BTHd.flatten(0, 1), k_BKd.flatten(0, 1), w_BTH.flatten(0, 1)
    return index_loss(*flat, slots_Nk, target_Nk)


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
    return blocked(*projected, lambda block: target_BTE[:, block], seen, blocks)
