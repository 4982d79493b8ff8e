"""Multi-head latent attention, dense and sparse (V2 report section 2.1, V3.2 report section 2; facts 3.1, 3.8).

One brick, two forms of one function. Expanded: keys and values of every head are made from the latent
(training, long prefill). Absorbed: the queries are moved into latent space and every head reads the one
cached latent (decoding, sparse attention). The cache never holds expanded keys or values.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rorqual.family import parts
from rorqual.kernels import mla_grad
from rorqual.kernels.cache_write import mla_write
from rorqual.kernels.fuse import rmsnorm
from rorqual.kernels.gpu import usable
from rorqual.kernels.heads import heads_down, heads_up
from rorqual.kernels.linear import Pack
from rorqual.kernels.mla_decode import mla_decode, pack_latents, packed_bytes, unpack_latents
from rorqual.kernels.mla_prefill import gather_latents, mla_prefill
from rorqual.kernels.mla_sparse import mla_sparse
from rorqual.kernels.mla_sparse_backward import mla_sparse_trained
from rorqual.kernels.mode import is_invariant, learns_in_fp8
from rorqual.nn.cache import Slots
from rorqual.nn.errors import InputError
from rorqual.nn.gqa import attend
from rorqual.nn.index_loss import latent_loss
from rorqual.nn.indexer import Indexer, gather_blocks, query_blocks
from rorqual.nn.linear import Linear, together
from rorqual.nn.norm import RMSNorm, upcast
from rorqual.nn.paged import Group, Lane, Lanes, Packing, PagedSlots, PagedStep, Store
from rorqual.nn.rope import rotate
from rorqual.nn.step import Step


class MLACache:
    """The latent and rotary key of every token, side by side `[B, capacity, kv_rank + rope_dim]`; with
    sparse attention also one index key."""

    def __init__(self, latent: Slots | PagedSlots, index: Slots | PagedSlots | None) -> None:
        self.latent, self.index = latent, index

    def select(self, rows_B: Tensor) -> None:
        self.latent.select(rows_B)
        if self.index is not None:
            self.index.select(rows_B)

    def reaches(self, starts: list[int]) -> bool:
        return True

    def growing_bytes(self, length: int) -> int:
        index = self.index.bytes_per_item() if self.index is not None else 0
        return length * (self.latent.bytes_per_item() + index)

    def fixed_bytes(self) -> int:
        return 0


FUSED_KEYS = 2048
"""Keys up to which a CPU attends to latents by PyTorch's attention, whose one head keeps one core busy a row."""


FLIPPED = 16
"""Rows up to which a CPU multiplies bf16 faster with W_UV on the left, as it lies; from 48 on it is far slower so."""


class MLA(nn.Module):
    """Attention whose keys and values are read from one low-rank latent a token."""

    def __init__(self, hidden: int, part: parts.MLA, eps: float) -> None:
        super().__init__()
        p = self.part = part
        if p.q_rank is None:
            self.q = Linear(hidden, p.heads * p.qk_dim)
        else:
            self.q_a = Linear(hidden, p.q_rank)
            self.q_a_norm = RMSNorm(p.q_rank, eps)
            self.q_b = Linear(p.q_rank, p.heads * p.qk_dim)
        self.kv_a = Linear(hidden, p.kv_rank + p.rope_dim)
        self.kv_a_norm = RMSNorm(p.kv_rank, eps)
        self.kv_b = Linear(p.kv_rank, p.heads * (p.nope_dim + p.v_dim))
        self.o = Linear(p.heads * p.v_dim, hidden)
        self.index = Indexer(hidden, p) if p.index is not None else None
        self.pack = Pack()

    def alike(self) -> tuple[Linear, ...]:
        """The matrices that read the same rows."""
        return (self.q if self.part.q_rank is None else self.q_a), self.kv_a

    def new_cache(self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device) -> MLACache:
        made = {
            name: Slots(batch, capacity, lane.shape, dtype, device)
            for name, lane in self.lanes(dtype).items()
        }
        return MLACache(made["latent"], made.get("index"))

    def lanes(self, dtype: torch.dtype, fp8: bool = False) -> Lanes:
        p = self.part
        if fp8:
            widths = [p.kv_rank] + ([p.index.dim] if p.index else [])
            if any(width % 128 for width in widths):
                raise InputError(
                    f"the FP8 cache works in blocks of 128 channels; this model's latents have {widths}"
                )
            lanes = {"latent": Lane((packed_bytes(p.kv_rank, p.rope_dim),), torch.uint8)}
            return lanes | {"index": Lane((packed_bytes(p.index.dim, 0),), torch.uint8)} if p.index else lanes
        latent = {"latent": Lane((p.kv_rank + p.rope_dim,), dtype)}
        return latent | {"index": Lane((p.index.dim,), dtype)} if p.index else latent

    def view(self, store: Store, group: Group) -> MLACache:
        p, dtype = self.part, self.kv_a_norm.weight.dtype
        packed = store["latent"].dtype == torch.uint8
        index = None
        if p.index:
            index = PagedSlots(store["index"], group, _packing(p.index.dim, 0, dtype) if packed else None)
        latent = PagedSlots(
            store["latent"], group, _packing(p.kv_rank, p.rope_dim, dtype) if packed else None
        )
        return MLACache(latent, index)

    def paged(self, x_1ND: Tensor, step: PagedStep, store: Store) -> Tensor | None:
        """The brick by kernels that read pages as they lie, on a GPU; None elsewhere."""
        if not usable(x_1ND) or torch.is_grad_enabled():
            return None
        p, x_ND, pages = self.part, x_1ND[0], store["latent"]
        c_q = None
        if p.q_rank is None:
            q, kv_NC = together(x_ND, self.pack, self.q, self.kv_a)
        else:
            c_q, kv_NC = together(x_ND, self.pack, self.q_a, self.kv_a)
            c_q = rmsnorm(c_q, self.q_a_norm.weight, self.q_a_norm.eps)
            q = self.q_b(c_q)
        q_NHd = q.unflatten(-1, (p.heads, p.qk_dim))
        cos, sin = (t[0] for t in step.rotation(p.rope))
        norm, slots_N = self.kv_a_norm, step.slots()
        absorbed = None
        # In batch-invariant mode every token is a decoding row of its own: there is one order of sums for all.
        alone = is_invariant() and self.index is None
        groups = [step.by_token(g) for g in step.groups] if alone else step.groups
        if self.index is not None or all(group.decoding for group in groups):
            absorbed = q_NHd.new_empty(*q_NHd.shape[:2], p.kv_rank + p.rope_dim)
        mla_write(
            kv_NC, norm.weight, norm.eps, cos, sin, q_NHd[..., p.nope_dim :], pages, slots_N,
            rank=p.kv_rank, interleaved=p.rope.interleaved, q_out_NHC=absorbed,
        )  # fmt: skip
        if self.index is not None:
            assert c_q is not None and absorbed is not None
            slots_Nk = self.index.paged(x_1ND, c_q[None], step, store["index"])
            return self.o(self._chosen(q_NHd, absorbed, pages, slots_Nk).flatten(1))[None]
        # The many rows of a prompt are written where they belong, the few others brought there.
        whole = q_NHd.new_empty(*q_NHd.shape[:2], p.v_dim) if len(groups) > 1 else None
        out = [
            self._decode(q_NHd[g.tokens], absorbed[g.tokens] if absorbed is not None else None, pages, g)
            if g.decoding
            else self._prefill(q_NHd[g.tokens], pages, g, step, None if whole is None else whole[g.tokens])
            for g in groups
        ]
        if whole is None:
            return self.o(out[0].flatten(1))[None]
        for g, part in zip(groups, out, strict=True):
            if g.decoding:
                whole[g.tokens] = part
        return self.o(whole.flatten(1))[None]

    def _decode(self, q_NHd: Tensor, absorbed: Tensor | None, pages: Tensor, g: Group) -> Tensor:
        """Absorbed attention of a few queries a sequence: `[n, H, v]`."""
        p = self.part
        if absorbed is None:
            absorbed = q_NHd.new_empty(*q_NHd.shape[:2], p.kv_rank + p.rope_dim)
            absorbed[..., p.kv_rank :] = q_NHd[..., p.nope_dim :]
        w_HrC = self.kv_b.weight.unflatten(0, (p.heads, p.nope_dim + p.v_dim))
        scale = self.kv_b.scale
        heads_up(q_NHd[..., : p.nope_dim], w_HrC[:, : p.nope_dim], absorbed[..., : p.kv_rank], scale)
        u_NHc = mla_decode(
            absorbed, pages, g.table_SB, g.ends_S, width=g.width, rank=p.kv_rank, scale=p.scale,
            splits="fixed" if is_invariant() else None,
        )  # fmt: skip
        return heads_down(u_NHc, w_HrC[:, p.nope_dim :], None, scale, p.nope_dim)

    def _chosen(self, q_NHd: Tensor, absorbed: Tensor, pages: Tensor, slots_Nk: Tensor) -> Tensor:
        """Absorbed attention of each query to the entries chosen for it: `[n, H, v]`."""
        p, scale = self.part, self.kv_b.scale
        w_HrC = self.kv_b.weight.unflatten(0, (p.heads, p.nope_dim + p.v_dim))
        heads_up(q_NHd[..., : p.nope_dim], w_HrC[:, : p.nope_dim], absorbed[..., : p.kv_rank], scale)
        u_NHc = mla_sparse(absorbed, pages, slots_Nk, rank=p.kv_rank, scale=p.scale)
        return heads_down(u_NHc, w_HrC[:, p.nope_dim :], None, scale, p.nope_dim)

    def _prefill(self, q_NHd: Tensor, pages: Tensor, g: Group, step: PagedStep, out: Tensor | None) -> Tensor:
        """Expanded attention of long chunks to their sequences' latents, old and new: `[n, H, v]`."""
        p, total = self.part, sum(s + c for s, c in zip(g.starts, g.counts, strict=True))
        starts_k = step.once(("keys", g.tokens.start), lambda: F.pad(g.ends_S.cumsum(0), (1, 0)).int())
        latent_MC = gather_latents(pages, g.table_SB, starts_k, total=total, rank=p.kv_rank, rope=p.rope_dim)
        kv_MHd = self.kv_b(latent_MC[:, : p.kv_rank]).unflatten(-1, (p.heads, p.nope_dim + p.v_dim))
        k_MHn, v_MHv = kv_MHd.split((p.nope_dim, p.v_dim), -1)
        return mla_prefill(
            q_NHd, k_MHn, latent_MC[:, p.kv_rank :], v_MHv, g.offsets_S1, starts_k,
            max_q=g.width, max_k=g.end, scale=p.scale, out=out,
        )  # fmt: skip

    def forward(
        self, x_BTD: Tensor, step: Step, cache: MLACache | None, absorb: bool | None = None
    ) -> Tensor:
        """`absorb` forces the absorbed (True) or expanded (False) form; by default the cheaper one with a
        cache, the expanded one without. Sparse attention is always absorbed."""
        p = self.part
        if cache is None and absorb is None and torch.is_grad_enabled() and self._by_kernels(x_BTD, step):
            return self._trained(x_BTD, step)
        c_q = None
        if p.q_rank is None:
            q, kv_BTC = together(x_BTD, self.pack, self.q, self.kv_a)
        else:
            c_q, kv_BTC = together(x_BTD, self.pack, self.q_a, self.kv_a)
            c_q = self.q_a_norm(c_q)
            q = self.q_b(c_q)
        q_nope, q_rope = q.unflatten(-1, (p.heads, p.qk_dim)).split((p.nope_dim, p.rope_dim), -1)
        c_kv, k_rope = kv_BTC.split((p.kv_rank, p.rope_dim), -1)
        cos, sin = step.rotation(p.rope)
        # The key is one more head to turn.
        turned = torch.cat((q_rope, k_rope[:, :, None]), 2)
        turned = rotate(turned, (cos[:, :, None], sin[:, :, None]), p.rope.interleaved)
        q_rope, k_rope = turned.split((p.heads, 1), 2)
        latent_BKC = torch.cat((self.kv_a_norm(c_kv), k_rope[:, :, 0]), -1)
        if cache is not None:
            latent_BKC = cache.latent.append(latent_BKC, step.rows)
        if self.index is not None and step.indexers is not None:
            assert c_q is not None and cache is None
            o = self._learning(x_BTD, c_q, q_nope, q_rope, latent_BKC, step)
        elif self.index is not None:
            assert c_q is not None
            keys = cache.index if cache is not None else None
            chosen_BTk = self.index(x_BTD, c_q, step, keys)
            o = self._sparse(q_nope, q_rope, latent_BKC, chosen_BTk)
        else:
            if absorb is None:
                past = cache is not None and not step.from_zero
                absorb = past and self.absorbing_is_cheaper(step.rows.width, latent_BKC.shape[1])
            form = self._absorbed if absorb else self._expanded
            o = form(q_nope, q_rope, latent_BKC, step)
        return self.o(o.flatten(2))

    def _by_kernels(self, x_BTD: Tensor, step: Step) -> bool:
        """Whether `_trained` does this pass."""
        p = self.part
        whole = self.index is None and step.causal and step.rows.uniform and self.kv_b.scale is None
        return whole and mla_grad.supported(x_BTD, p.rope_dim) and x_BTD.dtype == self.kv_b.weight.dtype

    def _trained(self, x_BTD: Tensor, step: Step) -> Tensor:
        """The expanded form over whole rows, with gradients, on a GPU."""
        p, norm = self.part, self.kv_a_norm
        cos, sin = (t[0] for t in step.rotation(p.rope))
        shape = mla_grad.Shape(
            len(x_BTD), p.heads, p.nope_dim, p.rope_dim, p.kv_rank, p.scale, norm.eps, p.rope.interleaved,
            keep=not step.recompute, fp8=learns_in_fp8(),
        )  # fmt: skip
        latent = self.kv_a.weight, norm.weight, self.kv_b.weight
        if p.q_rank is None:
            matrices = mla_grad.Matrices(self.q.weight, None, None, *latent)
        else:
            matrices = mla_grad.Matrices(self.q_a.weight, self.q_a_norm.weight, self.q_b.weight, *latent)
        o_NE = mla_grad.mla_trained(x_BTD.flatten(0, 1), matrices, cos, sin, shape)
        return self.o(o_NE).unflatten(0, x_BTD.shape[:2])

    def absorbing_is_cheaper(self, queries: int, keys: int) -> bool:
        """Whether the absorbed form takes less arithmetic for a pass, by head.

        Expanding makes every key and value from its latent, and then meets them in narrow heads; absorbing
        takes every query through W_UK and W_UV instead, and meets the wide latents.
        """
        p = self.part
        matrices = p.kv_rank * (p.nope_dim + p.v_dim)
        expanded = keys * matrices + queries * keys * (p.qk_dim + p.v_dim)
        absorbed = queries * matrices + queries * keys * (2 * p.kv_rank + p.rope_dim)
        return absorbed < expanded

    def _up(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """W_UK [H, nope, kv_rank] and W_UV [H, v, kv_rank]."""
        p = self.part
        w = self.kv_b.matrix(dtype).view(p.heads, p.nope_dim + p.v_dim, p.kv_rank)
        return w[:, : p.nope_dim], w[:, p.nope_dim :]

    def _expanded(self, q_nope: Tensor, q_rope: Tensor, latent_BKC: Tensor, step: Step) -> Tensor:
        p = self.part
        c_kv, k_rope = latent_BKC.split((p.kv_rank, p.rope_dim), -1)
        k_nope, v = self.kv_b(c_kv).unflatten(-1, (p.heads, -1)).split((p.nope_dim, p.v_dim), -1)
        k = torch.cat((k_nope, k_rope[:, :, None].expand(-1, -1, p.heads, -1)), -1)
        return attend(torch.cat((q_nope, q_rope), -1), k, v, step, p.scale)

    def _absorbed(self, q_nope: Tensor, q_rope: Tensor, latent_BKC: Tensor, step: Step) -> Tensor:
        p = self.part
        q_BTHC, w_uv = self._absorb_queries(q_nope, q_rope)
        (batch, time), keys = q_BTHC.shape[:2], latent_BKC.shape[1]
        fused = latent_BKC.device.type == "cpu" and not torch.is_grad_enabled() and not is_invariant()
        fused = fused and keys <= FUSED_KEYS
        out = []
        for block in query_blocks(time, batch * p.heads * keys * 8):
            q = q_BTHC[:, block]
            if fused:
                out.append(self._fused(q, latent_BKC, step, block))
                continue
            score = (q.flatten(1, 2) @ latent_BKC.transpose(1, 2)).unflatten(1, q.shape[1:3])
            score = upcast(score) * p.scale
            if not step.all_visible:
                score = score.masked_fill(~step.visible_BTK(keys)[:, block, None], float("-inf"))
            weight = score.softmax(-1).to(latent_BKC.dtype)
            out.append((weight.flatten(1, 2) @ latent_BKC[..., : p.kv_rank]).unflatten(1, q.shape[1:3]))
        return _into_values(out[0] if len(out) == 1 else torch.cat(out, 1), w_uv)

    def _fused(self, q_BTHC: Tensor, latent_BKC: Tensor, step: Step, block: slice) -> Tensor:
        """Attended latents `[B, T, H, kv_rank]` by PyTorch's attention: all heads are queries of one head, whose values
        are its keys, rotary channels too."""
        (time, heads), mask = q_BTHC.shape[1:3], None
        if not step.all_visible:
            mask = step.visible_BTK(latent_BKC.shape[1])[:, block]
            mask = (mask if time == 1 else mask.repeat_interleave(heads, 1))[:, None]
        latent_B1KC = latent_BKC[:, None]
        o = F.scaled_dot_product_attention(
            q_BTHC.flatten(1, 2)[:, None], latent_B1KC, latent_B1KC, attn_mask=mask, scale=self.part.scale
        )
        return o[:, 0, :, : self.part.kv_rank].unflatten(1, (time, heads))

    def _sparse(self, q_nope: Tensor, q_rope: Tensor, latent_BKC: Tensor, chosen_BTk: Tensor) -> Tensor:
        """Absorbed attention of each query to its own chosen positions (-1: none), gathered in blocks."""
        p = self.part
        q_BTHC, w_uv = self._absorb_queries(q_nope, q_rope)
        if trained_by_kernels(q_BTHC):
            return _into_values(self._sparse_trained(q_BTHC, latent_BKC, chosen_BTk), w_uv)
        out = []
        for block, seen, mask in gather_blocks(latent_BKC, chosen_BTk):
            score = upcast(q_BTHC[:, block] @ seen.transpose(-1, -2)) * p.scale
            weight = score.masked_fill(~mask[:, :, None], float("-inf")).softmax(-1).to(seen.dtype)
            out.append(weight @ seen[..., : p.kv_rank])
        return _into_values(torch.cat(out, 1), w_uv)

    def _learning(
        self, x_BTD: Tensor, c_q_BTC: Tensor, q_nope: Tensor, q_rope: Tensor, latent_BKC: Tensor, step: Step
    ) -> Tensor:
        """Attention while its indexer learns, dense or sparse as `step.indexers` says (V3.2 report 2.1). The indexer
        reads detached inputs and takes its gradient from its KL divergence alone."""
        index, mode = self.index, step.indexers
        assert index is not None and mode is not None
        chosen_BTk = projected = None
        if mode.learns or not mode.dense:
            projected = index.project(x_BTD.detach(), c_q_BTC.detach(), step)
        if projected is not None and not mode.dense:
            chosen_BTk = index.choose(*projected, step)
        if projected is not None and mode.learns:
            with torch.no_grad():
                q_BTHC, _ = self._absorb_queries(q_nope, q_rope)
            main = q_BTHC, latent_BKC.detach(), self.part.scale
            mode.losses[step.layer] = latent_loss(projected, main, step, chosen_BTk)
        if chosen_BTk is None:
            return self._expanded(q_nope, q_rope, latent_BKC, step)
        return self._sparse(q_nope, q_rope, latent_BKC, chosen_BTk)

    def _sparse_trained(self, q_BTHC: Tensor, latent_BKC: Tensor, chosen_BTk: Tensor) -> Tensor:
        """Attended latents `[B, T, H, kv_rank]` by kernels that have gradients."""
        p, (batch, keys, _) = self.part, latent_BKC.shape
        firsts_B11 = torch.arange(batch, device=chosen_BTk.device)[:, None, None] * keys
        slots_BTk = torch.where(chosen_BTk >= 0, chosen_BTk + firsts_B11, -1).int()
        u_NHc, _ = mla_sparse_trained(
            q_BTHC.flatten(0, 1),
            latent_BKC.flatten(0, 1),
            slots_BTk.flatten(0, 1),
            rank=p.kv_rank,
            scale=p.scale,
        )
        return u_NHc.unflatten(0, q_BTHC.shape[:2])

    def _absorb_queries(self, q_nope: Tensor, q_rope: Tensor) -> tuple[Tensor, Tensor]:
        """Queries in latent space beside their rotary part [B, T, H, kv_rank + rope], and W_UV."""
        w_uk, w_uv = self._up(q_nope.dtype)
        return torch.cat((_by_head(q_nope, w_uk), q_rope), -1), w_uv


def trained_by_kernels(q: Tensor) -> bool:
    """Whether sparse attention of these queries goes through `mla_sparse_trained`."""
    return torch.is_grad_enabled() and usable(q) and q.dtype == torch.bfloat16


def _packing(rank: int, rope: int, dtype: torch.dtype) -> Packing:
    """Items of `rank` codes and `rope` rotary channels as bytes."""
    return Packing(lambda x: pack_latents(x, rank), lambda x: unpack_latents(x, rank, rope, dtype))


def _into_values(u_BTHc: Tensor, w_uv: Tensor) -> Tensor:
    """Attended latents to value space: [B, T, H, kv_rank] -> [B, T, H, v]."""
    if u_BTHc.device.type == "cpu" and u_BTHc.dtype == torch.bfloat16 and u_BTHc.shape[:2].numel() <= FLIPPED:
        u_HcN = u_BTHc.flatten(0, 1).permute(1, 2, 0)
        return (w_uv @ u_HcN).permute(2, 0, 1).unflatten(0, u_BTHc.shape[:2])
    return _by_head(u_BTHc, w_uv.transpose(-1, -2))


def _by_head(x_BTHi: Tensor, w_Hio: Tensor) -> Tensor:
    """Each head's own matrix: [B, T, H, i] -> [B, T, H, o]."""
    y_HNo = x_BTHi.flatten(0, 1).transpose(0, 1) @ w_Hio
    return y_HNo.transpose(0, 1).unflatten(0, x_BTHi.shape[:2])
