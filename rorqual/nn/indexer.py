"""The lightning indexer: which earlier positions a token attends (V3.2 report section 2.1; facts 3.8)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from rorqual.family import parts
from rorqual.kernels import index_rows
from rorqual.kernels.cache_write import write_rows
from rorqual.kernels.gpu import usable
from rorqual.kernels.index import index_choose
from rorqual.kernels.mla_decode import pack_latents
from rorqual.kernels.simulate import fake_fp8, hadamard
from rorqual.nn.cache import Slots
from rorqual.nn.linear import Linear
from rorqual.nn.norm import LayerNorm, upcast
from rorqual.nn.paged import PagedSlots, PagedStep
from rorqual.nn.rope import rotate
from rorqual.nn.step import Step

Projected = tuple[Tensor, Tensor, Tensor]
"""What an indexer makes of tokens: index queries, keys and head weights (`Indexer.project`)."""

BLOCK_BYTES = 64 * 2**20
"""Queries are worked in blocks so that gathered entries and scores stay near this size."""


def query_blocks(time: int, bytes_per_query: int) -> Iterator[slice]:
    """Slices over `time` queries, each of about `BLOCK_BYTES`."""
    size = max(1, BLOCK_BYTES // max(1, bytes_per_query))
    for start in range(0, time, size):
        yield slice(start, min(start + size, time))


def gather_blocks(entries_BKC: Tensor, chosen_BTk: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """For blocks of queries: the slice of T, their chosen entries [B, t, k, C], and which exist [B, t, k]."""
    batch, time, k = chosen_BTk.shape
    width = entries_BKC.shape[-1]
    rows = torch.arange(batch, device=chosen_BTk.device)[:, None, None]
    for block in query_blocks(time, batch * k * width * entries_BKC.element_size()):
        chosen = chosen_BTk[:, block]
        yield block, entries_BKC[rows, chosen.clamp(min=0)], chosen >= 0


def index_scores(q_BTHd: Tensor, k_BKd: Tensor, w_BTH: Tensor) -> Tensor:
    """I_{t,s} = sum_h w_{t,h} ReLU(q_{t,h} . k_s), fp32 [B, T, K]. `w` carries all scales."""
    q, k = upcast(q_BTHd), upcast(k_BKd)
    dots = (q.flatten(1, 2) @ k.transpose(1, 2)).unflatten(1, q.shape[1:3]).relu()
    return (w_BTH[..., None, :] @ dots).squeeze(-2)


def choose(scores_BTK: Tensor, limit_BT: Tensor, k: int, first_BT: Tensor | None = None) -> Tensor:
    """The `k` best-scored positions below each query's `limit`, best first, and from its `first` on; -1 where fewer
    exist.

    Equal scores go to the lowest position (a stable sort), so a choice never depends on how many keys
    lie behind the limit.
    """
    keys = scores_BTK.shape[-1]
    position = torch.arange(keys, device=scores_BTK.device)
    hidden = position >= limit_BT[..., None]
    if first_BT is not None:
        hidden = hidden | (position < first_BT[..., None])
    ranked = scores_BTK.masked_fill(hidden, float("-inf"))
    best = ranked.sort(dim=-1, descending=True, stable=True).indices[..., : min(k, keys)]
    none = best >= limit_BT[..., None] if first_BT is None else hidden.gather(-1, best)
    return best.masked_fill(none, -1)


@torch.no_grad()
def choose_in_blocks(
    q_BTHd: Tensor, k_BKd: Tensor, w_BTH: Tensor, limit_BT: Tensor, k: int, first_BT: Tensor | None = None
) -> Tensor:
    """`choose(index_scores(...))` for a few queries at a time, so the [T, H, K] dots never stand at once; on a GPU by
    kernels, whose choice is in order of positions."""
    batch, time, heads = w_BTH.shape
    if index_rows.supported(q_BTHd, k_BKd):
        return index_rows.index_choose_rows(q_BTHd, k_BKd, w_BTH, limit_BT, k=k, firsts_BT=first_BT).long()
    blocks = []
    for b in query_blocks(time, batch * heads * k_BKd.shape[1] * 4):
        first_Bt = None if first_BT is None else first_BT[:, b]
        blocks.append(choose(index_scores(q_BTHd[:, b], k_BKd, w_BTH[:, b]), limit_BT[:, b], k, first_Bt))
    return torch.cat(blocks, 1)


def trained_by_kernels(q: Tensor) -> bool:
    """Whether sparse attention with these queries, and what its indexer learns, goes by kernels with gradients."""
    return torch.is_grad_enabled() and usable(q) and q.dtype == torch.bfloat16


def flat_places(chosen_BTk: Tensor, keys: int) -> Tensor:
    """Chosen positions (-1: none) as rows of all sequences' `keys` under one another, int32 `[N, k]`."""
    firsts_B11 = torch.arange(len(chosen_BTk), device=chosen_BTk.device)[:, None, None] * keys
    return torch.where(chosen_BTk >= 0, chosen_BTk + firsts_B11, -1).int().flatten(0, 1)


def places(chosen_Nk: Tensor, table_SB: Tensor, seq_N: Tensor, per_page: int) -> Tensor:
    """Positions (-1: none) of sequences to flat places in pages of `per_page` items, int32."""
    at = chosen_Nk.clamp(min=0)
    page_Nk = table_SB[seq_N[:, None], at // per_page]
    return torch.where(chosen_Nk < 0, -1, page_Nk * per_page + at % per_page).int()


class Indexer(nn.Module):
    """Small queries from the query latent, one small key a token; rotary on the first channels, half-split
    (unlike MLA's own interleaved layout)."""

    def __init__(self, hidden: int, part: parts.MLA) -> None:
        super().__init__()
        assert part.index is not None and part.q_rank is not None
        self.part = part.index
        self.rope = replace(part.rope, interleaved=False)
        self.q_b = Linear(part.q_rank, self.part.heads * self.part.dim)
        self.k = Linear(hidden, self.part.dim)
        self.k_norm = LayerNorm(self.part.dim, 1e-6)
        self.w = Linear(hidden, self.part.heads)
        self.simulate = False
        """Round queries and keys as the released kernels do: Hadamard, then FP8 with one scale a vector."""

    def forward(self, x_BTD: Tensor, c_q_BTC: Tensor, step: Step, keys: Slots | PagedSlots | None) -> Tensor:
        """Positions each token attends, `[B, T, min(top_k, K)]` int64, -1 where fewer exist."""
        q_BTHd, k_BTd, w_BTH = self.project(x_BTD, c_q_BTC, step)
        k_BKd = keys.append(k_BTd, step.rows) if keys is not None else k_BTd
        return self.choose(q_BTHd, k_BKd, w_BTH, step)

    def choose(self, q_BTHd: Tensor, k_BKd: Tensor, w_BTH: Tensor, step: Step) -> Tensor:
        """`forward` of what `project` gave."""
        limit_BT = (step.rows.positions_BT + 1).clamp(max=k_BKd.shape[1])
        chosen = choose_in_blocks(q_BTHd, k_BKd, w_BTH, limit_BT, self.part.top_k, step.first_BT)
        if step.trace is not None and not step.trace.only_experts:
            step.trace.selected[step.layer] = chosen
        return chosen

    def paged(self, x_1ND: Tensor, c_q_1NC: Tensor, step: PagedStep, pages_PTd: Tensor) -> Tensor:
        """The same over pages, by kernels: flat places of each token's chosen entries in the pages of the latent,
        int32 `[N, top_k]`, -1 for none. The tokens' own keys are written first."""
        q_1NHd, k_1Nd, w_1NH = self.project(x_1ND, c_q_1NC, step)
        keys_Nd = k_1Nd[0] if pages_PTd.dtype != torch.uint8 else pack_latents(k_1Nd[0], self.part.dim)
        write_rows(keys_Nd, pages_PTd.flatten(0, 1), step.slots())
        found = []
        for g in step.groups:
            at = g.tokens
            chosen = index_choose(
                q_1NHd[0, at], w_1NH[0, at], pages_PTd, g.table_SB, g.seq_N.int(),
                (step.positions_N[at] + 1).int(), k=self.part.top_k, max_keys=g.end,
            )  # fmt: skip
            if step.watch is not None:
                step.watch.saw(step.layer, chosen)
            found.append(places(chosen, g.table_SB, g.seq_N, pages_PTd.shape[1]))
        return found[0] if len(found) == 1 else torch.cat(found)

    def project(self, x_BTD: Tensor, c_q_BTC: Tensor, step: Step) -> Projected:
        """Index queries [B, T, Hi, di], keys [B, T, di] and fp32 head weights [B, T, Hi] with all scales."""
        p = self.part
        cos, sin = step.rotation(self.rope)
        q = self.q_b(c_q_BTC).unflatten(-1, (p.heads, p.dim))
        q = self._rotate_head(q, (cos[:, :, None], sin[:, :, None]))
        k = self._rotate_head(self.k_norm(self.k(x_BTD)), (cos, sin))
        if self.simulate:
            q, k = fake_fp8(hadamard(q), p.dim), fake_fp8(hadamard(k), p.dim)
        w = self.w.in_full(x_BTD) * (p.heads**-0.5 * p.dim**-0.5)
        return q, k, w

    def _rotate_head(self, x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        moving, still = x.split((self.rope.dim, x.shape[-1] - self.rope.dim), -1)
        return torch.cat((rotate(moving, turn, interleaved=False), still), -1)
