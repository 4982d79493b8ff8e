"""V4's attention: a sliding window beside compressed entries, in one softmax with a sink
(V4 report section 2.3; facts 3.9). SWA, CSA and HCA differ only in what the compressor part says."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rorqual.family import parts
from rorqual.kernels.entries import (
    BLOCK,
    entry_bytes,
    key_bytes,
    pack_entries,
    pack_keys,
    turn_queries,
    unpack_entries,
    unpack_keys,
)
from rorqual.kernels.gpu import usable
from rorqual.kernels.heads import heads_down
from rorqual.kernels.index import index_choose
from rorqual.kernels.mode import by_fixed_kernels
from rorqual.kernels.simulate import fake_fp4, fake_fp8, hadamard
from rorqual.kernels.turn import keep_rows, turn_rows
from rorqual.kernels.union import union_decode, union_prefill
from rorqual.nn.cache import Tail
from rorqual.nn.compressor import Compressor, PoolState
from rorqual.nn.errors import InputError
from rorqual.nn.index_loss import entry_loss
from rorqual.nn.indexer import choose_in_blocks, gather_blocks, query_blocks
from rorqual.nn.linear import Linear, Pinned
from rorqual.nn.norm import RMSNorm, unit_rms, upcast
from rorqual.nn.paged import Group, Lane, Lanes, Packing, PagedStep, RingTail, Store
from rorqual.nn.rope import rotate_tail
from rorqual.nn.step import Step


class CompressedCache:
    """The last `window` raw entries, and by kind the compressor's and the indexer's state."""

    def __init__(self, window: Tail | RingTail, pool: PoolState | None, index: PoolState | None) -> None:
        self.window, self.pool, self.index = window, pool, index

    def _pools(self) -> list[PoolState]:
        return [pool for pool in (self.pool, self.index) if pool is not None]

    def select(self, rows_B: Tensor) -> None:
        self.window.select(rows_B)
        for pool in self._pools():
            pool.select(rows_B)

    def reaches(self, starts: list[int]) -> bool:
        return self.window.reaches(starts) and all(pool.reaches(starts) for pool in self._pools())

    def growing_bytes(self, length: int) -> int:
        return sum(pool.growing_bytes(length) for pool in self._pools())

    def fixed_bytes(self) -> int:
        return self.window.bytes_per_row() + sum(pool.fixed_bytes() for pool in self._pools())


class EntryIndexer(nn.Module):
    """CSA's indexer: small queries against small keys from a compressor of its own."""

    def __init__(self, hidden: int, part: parts.CompressedAttention, eps: float) -> None:
        super().__init__()
        assert part.compress is not None and part.compress.index is not None
        self.part = part.compress.index
        self.rope = part.rope
        self.q_b = Linear(part.q_rank, self.part.heads * self.part.dim)
        self.w = Linear(hidden, self.part.heads)
        self.compressor = Compressor(hidden, self.part.dim, part.compress, part.rope, eps)
        self.simulate = False
        """Round queries and keys as the released kernels do: Hadamard, then FP4 in blocks of 32."""

    def forward(
        self,
        x_BTD: Tensor,
        qr_BTC: Tensor,
        finished: tuple[Tensor, Tensor | None],
        step: Step,
        state: PoolState | None,
    ) -> Tensor:
        """Entries each token attends, `[B, T, min(top_k, E)]`, -1 where fewer are finished. `finished`: up to which
        entry, and from which on."""
        return self.choose(*self.project(x_BTD, qr_BTC, step, state), finished)

    def choose(
        self, q_BTHd: Tensor, k_BEd: Tensor, w_BTH: Tensor, finished: tuple[Tensor, Tensor | None]
    ) -> Tensor:
        """`forward` of what `project` gave."""
        limit_BT, first_BT = finished
        return choose_in_blocks(q_BTHd, k_BEd, w_BTH, limit_BT, self.part.top_k, first_BT)

    def project(
        self, x_BTD: Tensor, qr_BTC: Tensor, step: Step, state: PoolState | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Index queries [B, T, Hi, di], keys of all entries [B, E, di] and fp32 head weights [B, T, Hi] with all
        scales."""
        p = self.part
        k_BEd = self.compressor(x_BTD, step, state)
        cos, sin = step.rotation(self.rope)
        q = rotate_tail(self.q_b(qr_BTC).unflatten(-1, (p.heads, p.dim)), (cos[:, :, None], sin[:, :, None]))
        if state is not None and state.packed:  # keys come turned and rounded
            q = turn_queries(q)
        elif self.simulate:
            q, k_BEd = fake_fp4(hadamard(q), 32), fake_fp4(hadamard(k_BEd), 32)
        full = upcast(x_BTD)
        w = F.linear(full, self.w.matrix(full.dtype)) * (p.heads**-0.5 * p.dim**-0.5)
        return q, k_BEd, w

    def paged(self, x_1ND: Tensor, qr_1NC: Tensor, step: PagedStep, store: Store) -> list[Tensor | None]:
        """The same over pages, by kernels: for each group the chosen entries' indices, int32 `[n, top_k]`."""
        p, pages = self.part, store["index.entries"]
        self.compressor.paged(x_1ND, step, store, "index.")
        cos, sin = (t[0] for t in step.rotation(self.rope))
        q = turn_rows(self.q_b(qr_1NC)[0].unflatten(-1, (p.heads, p.dim)), cos, sin)
        if pages.dtype == torch.uint8:
            q = turn_queries(q)
        w = self.w.in_full(x_1ND[0]) * (p.heads**-0.5 * p.dim**-0.5)
        ratio = self.compressor.part.ratio
        chosen: list[Tensor | None] = []
        for g in step.groups:
            best = index_choose(
                q[g.tokens], w[g.tokens], pages, g.table_SB, step.numbers(g).seq_N, step.finished(g, ratio),
                k=p.top_k, max_keys=max(1, g.end // ratio),
            )  # fmt: skip
            chosen.append(best)
            if step.watch is not None:
                step.watch.saw(step.layer, best)
        return chosen


class CompressedAttention(Pinned):
    """Shared key-value attention: one `head_dim`-wide entry is key and value of every head."""

    def __init__(self, hidden: int, part: parts.CompressedAttention, eps: float) -> None:
        super().__init__()
        p = self.part = part
        self.eps = eps
        self.q_a = Linear(hidden, p.q_rank)
        self.q_a_norm = RMSNorm(p.q_rank, eps)
        self.q_b = Linear(p.q_rank, p.heads * p.head_dim)
        self.kv = Linear(hidden, p.head_dim)
        self.kv_norm = RMSNorm(p.head_dim, eps)
        self.o_a = Linear(p.heads * p.head_dim // p.o_groups, p.o_groups * p.o_rank)
        self.o_b = Linear(p.o_groups * p.o_rank, hidden)
        self.sink = nn.Parameter(torch.empty(p.heads, dtype=torch.float32))
        self.compressor = Compressor(hidden, p.head_dim, p.compress, p.rope, eps) if p.compress else None
        self.index = EntryIndexer(hidden, p, eps) if p.compress and p.compress.index else None
        self.simulate = False
        """Round the non-rotary channels of entries to FP8 in blocks of 64, as the released cache holds them."""

    def new_cache(
        self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> CompressedCache:
        p, c = self.part, self.part.compress
        window = Tail(batch, p.window, p.head_dim, dtype, device)
        pool, index = (
            PoolState.new(c, dim, batch, capacity, dtype, device) if c and dim else None
            for dim in self._pool_dims()
        )
        return CompressedCache(window, pool, index)

    def _pool_dims(self) -> tuple[int, int]:
        """Widths of an entry and of an indexer key; 0 where there are none."""
        c = self.part.compress
        return (self.part.head_dim if c else 0), (c.index.dim if c and c.index else 0)

    def lanes(self, dtype: torch.dtype, fp8: bool = False) -> Lanes:
        p, c = self.part, self.part.compress
        sizes = self._packed_sizes() if fp8 else (0, 0)
        found = {"window": Lane((p.head_dim,), dtype, keep=p.window)}
        if fp8:
            found["window"] = Lane((sizes[0],), torch.uint8, keep=p.window)
        for prefix, dim, size in zip(("pool.", "index."), self._pool_dims(), sizes, strict=True):
            if c and dim:
                found |= {prefix + name: lane for name, lane in PoolState.lanes(c, dim, dtype, size).items()}
        return found

    def _packed_sizes(self) -> tuple[int, int]:
        """Bytes of an entry and of an indexer key in the released layout (584 and 68). Raises `InputError` for
        widths that its blocks don't divide."""
        p, index = self.part, self._pool_dims()[1]
        plain = p.head_dim - p.rope.dim
        if plain % BLOCK or (index and (index < 32 or index & (index - 1))):
            raise InputError(
                f"V4's FP8 cache works in blocks of {BLOCK} entry channels, with index keys of a power of two from 32 "
                f"on; this model has {plain} and {index}"
            )
        return entry_bytes(p.head_dim, p.rope.dim), key_bytes(index)

    def view(self, store: Store, group: Group) -> CompressedCache:
        p, c, dtype = self.part, self.part.compress, self.kv_norm.weight.dtype
        entry: Packing | None = None
        key: Packing | None = None
        if store["window"].dtype == torch.uint8:
            dim, rope = p.head_dim, p.rope.dim
            entry = Packing(lambda x: pack_entries(x, rope), lambda x: unpack_entries(x, dim, rope, dtype))
            key = Packing(pack_keys, lambda x: unpack_keys(x, dtype))
        window = Lane(store["window"].shape[2:], store["window"].dtype, keep=p.window)
        pool, index = (
            PoolState.view(store, prefix, PoolState.lanes(c, dim, dtype), group, packed)
            if c and dim
            else None
            for prefix, dim, packed in zip(("pool.", "index."), self._pool_dims(), (entry, key), strict=True)
        )
        return CompressedCache(RingTail(store["window"], window, group, entry), pool, index)

    def paged(self, x_1ND: Tensor, step: PagedStep, store: Store) -> Tensor | None:
        """The brick by kernels that read pages and rings as they lie, on a GPU; None elsewhere."""
        packed = store["window"].dtype == torch.uint8
        if (self.simulate and not packed) or not usable(x_1ND) or torch.is_grad_enabled():
            return None
        p = self.part
        cos, sin = (t[0] for t in step.rotation(p.rope))
        qr_1NC = self.q_a_norm(self.q_a(x_1ND))
        q_NHd = turn_rows(self.q_b(qr_1NC)[0].unflatten(-1, (p.heads, p.head_dim)), cos, sin, eps=self.eps)
        kv_Nd = self.kv(x_1ND)[0]
        ratio, entries = 1, None
        chosen: list[Tensor | None] = [None] * len(step.groups)
        if self.compressor is not None and p.compress is not None:
            ratio, entries = p.compress.ratio, store["pool.entries"]
            self.compressor.paged(x_1ND, step, store, "pool.")
        if self.index is not None:
            chosen = self.index.paged(x_1ND, qr_1NC, step, store)
        window, places, scale = store["window"], store["window"].shape[1], p.head_dim**-0.5
        out = []
        for g, picked in zip(step.groups, chosen, strict=True):
            at, n = g.tokens, step.numbers(g)
            kv, turn, norm = kv_Nd[at], (cos[at], sin[at]), self.kv_norm
            if g.decoding:
                slot_N = step.in_rings(g, places)
                keep_rows(kv, *turn, window.flatten(0, 1), slot_N, eps=norm.eps, weight=norm.weight)
                o = union_decode(
                    q_NHd[at], window, n.ring_N, n.position_N, entries, g.table_SB, n.seq_N, picked, self.sink,
                    window=p.window, ratio=ratio, scale=scale, rope=p.rope.dim,
                )  # fmt: skip
            else:
                new_Nd = window.new_empty(kv.shape[0], window.shape[2])
                order_N = torch.arange(kv.shape[0], device=window.device)
                keep_rows(kv, *turn, new_Nd, order_N, eps=norm.eps, weight=norm.weight)
                o = union_prefill(
                    q_NHd[at], new_Nd, window, n.ring_N, n.position_N, entries, g.table_SB, n.seq_N, g.offsets_S1,
                    picked, self.sink, window=p.window, ratio=ratio, scale=scale, rope=p.rope.dim,
                )  # fmt: skip
                # The last tokens that fit go to the ring; those before them to ring 0, which nobody reads.
                late_N = n.position_N >= g.ends_S[g.seq_N] - places
                window[torch.where(late_N, n.ring_N, 0).long(), (n.position_N % places).long()] = new_Nd
            out.append(o)
        o_NHd = out[0] if len(out) == 1 else torch.cat(out)
        return self._project_out(turn_rows(o_NHd, cos, sin, inverse=True)[None])

    def forward(self, x_BTD: Tensor, step: Step, cache: CompressedCache | None) -> Tensor:
        p = self.part
        cos, sin = step.rotation(p.rope)
        qr_BTC = self.q_a_norm(self.q_a(x_BTD))
        q_BTHd = unit_rms(self.q_b(qr_BTC).unflatten(-1, (p.heads, p.head_dim)), self.eps)
        q_BTHd = rotate_tail(q_BTHd, (cos[:, :, None], sin[:, :, None]))
        kv_BTd = self._stored(rotate_tail(self.kv_norm(self.kv(x_BTD)), (cos, sin)))
        if cache is not None:
            recent = cache.window.extend(kv_BTd, step.rows)
        else:
            recent = F.pad(kv_BTd, (0, 0, p.window, 0))
        if self.index is not None and step.indexers is not None:
            assert cache is None
            o_BTHd = self._learning(x_BTD, qr_BTC, q_BTHd, recent, step)
        else:
            entries, chosen = self._compressed(x_BTD, qr_BTC, step, cache)
            o_BTHd = self._attend(q_BTHd, recent, entries, chosen, step)
        o_BTHd = rotate_tail(o_BTHd, (cos[:, :, None], sin[:, :, None]), inverse=True)
        return self._project_out(o_BTHd)

    def _stored(self, entry: Tensor) -> Tensor:
        if not self.simulate:
            return entry
        plain = entry.shape[-1] - self.part.rope.dim
        return torch.cat((fake_fp8(entry[..., :plain], 64), entry[..., plain:]), -1)

    def _compressed(
        self, x_BTD: Tensor, qr_BTC: Tensor, step: Step, cache: CompressedCache | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Compressed entries [B, E, d], and for CSA which of them each token attends [B, T, k]."""
        if self.compressor is None:
            return None, None
        entries = self._stored(self.compressor(x_BTD, step, cache.pool if cache else None))
        if self.index is None:
            return entries, None
        chosen = self.index(
            x_BTD, qr_BTC, self._finished(step, entries.shape[1]), step, cache.index if cache else None
        )
        if step.trace is not None and not step.trace.only_experts:
            step.trace.selected[step.layer] = chosen
        return entries, chosen

    def _learning(self, x_BTD: Tensor, qr_BTC: Tensor, q_BTHd: Tensor, recent: Tensor, step: Step) -> Tensor:
        """Attention while its indexer learns, to all entries or to those chosen, as `step.indexers` says.

        The V4 report has the warm-up (facts 3.10) but not its loss: V3.2's is taken, over entries alone. The indexer
        and its compressor read detached inputs."""
        assert self.compressor is not None and self.index is not None and step.indexers is not None
        mode, entries = step.indexers, self._stored(self.compressor(x_BTD, step, None))
        chosen = projected = None
        if mode.learns or not mode.dense:
            projected = self.index.project(x_BTD.detach(), qr_BTC.detach(), step, None)
        if projected is not None and not mode.dense:
            chosen = self.index.choose(*projected, self._finished(step, entries.shape[1]))
            if step.trace is not None and not step.trace.only_experts:
                step.trace.selected[step.layer] = chosen
        told: list[Tensor] = []
        o_BTHd = self._attend(q_BTHd, recent, entries, chosen, step, told)
        if projected is not None and mode.learns and told:

            def seen(block: slice) -> Tensor:
                return self._seen(step, entries.shape[1], block)

            mode.losses[step.layer] = entry_loss(projected, torch.cat(told, 1), seen, chosen)
        return o_BTHd

    def _finished(self, step: Step, entries: int) -> tuple[Tensor, Tensor | None]:
        """Entries finished, and so visible, at each token, [B, T]: those before floor((t + 1) / ratio), and with
        documents kept apart from the first one of its own on."""
        assert self.part.compress is not None
        if step.documents_BT is not None:
            found = step.pools(self.part.compress.ratio)
            return found.high, found.low
        return ((step.rows.positions_BT + 1) // self.part.compress.ratio).clamp(max=entries), None

    def _seen(self, step: Step, entries: int, block: slice) -> Tensor:
        """True where a token of the block sees an entry, [B, t, E]."""
        high_BT, low_BT = self._finished(step, entries)
        entry = torch.arange(entries, device=high_BT.device)
        seen = entry < high_BT[:, block, None]
        return seen if low_BT is None else seen & (entry >= low_BT[:, block, None])

    def _attend(
        self,
        q_BTHd: Tensor,
        recent: Tensor,
        entries: Tensor | None,
        chosen: Tensor | None,
        step: Step,
        told: list[Tensor] | None = None,
    ) -> Tensor:
        """One softmax over window, entries and sink, for blocks of queries: [B, T, H, d]. `told` gets each block's
        weights on entries, summed over heads [B, t, E or k]."""
        p, rows = self.part, step.rows
        batch, time = q_BTHd.shape[:2]
        if entries is None or entries.shape[1] == 0:
            entries = chosen = None
        if chosen is not None and entries is not None:
            blocks = gather_blocks(entries, chosen)
        else:
            seen = 0 if entries is None else entries.shape[1]
            per_query = batch * p.heads * (2 * p.window + seen) * 4
            blocks = ((b, entries, None) for b in query_blocks(time, per_query))  # type: ignore[misc]
        # Column j of `recent` holds position start - window + j; nothing stands before a row or a document begins.
        begin_BT1 = (p.window - rows.starts_B[:, None, None]).expand(-1, time, -1)
        if step.first_BT is not None:
            begin_BT1 = begin_BT1 + step.first_BT[..., None]
        sink = self.sink.to(upcast(q_BTHd[:, :1]).dtype)[:, None]
        out = []
        for block, values, exists in blocks:
            for part_of_block in _at_most(block, p.window):
                q = q_BTHd[:, part_of_block]
                first, last = part_of_block.start, part_of_block.stop
                # Query t sees columns t+1 .. t+window.
                near = recent[:, first + 1 : p.window + last]
                column = torch.arange(first + 1, p.window + last, device=q.device)
                own = torch.arange(first, last, device=q.device)[:, None]
                mask = (column > own) & (column <= own + p.window) & (column >= begin_BT1[:, part_of_block])
                scores = [_masked(_dots(q, near), mask)]
                if values is not None and exists is not None:
                    inside = slice(first - block.start, last - block.start)
                    far = values[:, inside]
                    scores.append(_masked(q @ far.transpose(-1, -2), exists[:, inside]))
                elif values is not None:
                    far = values
                    scores.append(_masked(_dots(q, far), self._seen(step, far.shape[1], part_of_block)))
                logits = torch.cat(
                    [*(s * p.head_dim**-0.5 for s in scores), sink.expand(*q.shape[:3], 1)], -1
                )
                full = logits.softmax(-1)[..., :-1]
                if told is not None and values is not None:
                    told.append(full[..., near.shape[1] :].detach().sum(2))
                weight = full.to(q.dtype)
                o = _sum(weight[..., : near.shape[1]], near)
                if values is not None:
                    w_far = weight[..., near.shape[1] :]
                    o = o + (w_far @ far if exists is not None else _sum(w_far, far))
                out.append(o)
        return torch.cat(out, 1)

    def _project_out(self, o_BTHd: Tensor) -> Tensor:
        """Groups of heads to `o_rank` each, then all groups to the hidden width."""
        p = self.part
        o_BTgi = o_BTHd.flatten(2).unflatten(-1, (p.o_groups, -1))
        w_gri = self.o_a.matrix(o_BTHd.dtype).unflatten(0, (p.o_groups, p.o_rank))
        if by_fixed_kernels(o_BTgi):
            low = heads_down(o_BTgi.flatten(0, 1), w_gri).unflatten(0, o_BTgi.shape[:2])
        else:
            low = torch.einsum("btgi,gri->btgr", o_BTgi, w_gri)
        return self.o_b(low.flatten(2))


def _at_most(block: slice, size: int) -> list[slice]:
    return [slice(a, min(a + size, block.stop)) for a in range(block.start, block.stop, size)]


def _dots(q_BTHd: Tensor, k_BKd: Tensor) -> Tensor:
    """Shared-key scores [B, T, H, K]."""
    return (q_BTHd.flatten(1, 2) @ k_BKd.transpose(1, 2)).unflatten(1, q_BTHd.shape[1:3])


def _masked(score_BTHK: Tensor, visible_BTK: Tensor) -> Tensor:
    return upcast(score_BTHK).masked_fill(~visible_BTK[:, :, None], float("-inf"))


def _sum(weight_BTHK: Tensor, v_BKd: Tensor) -> Tensor:
    """Weighted sum of shared values [B, T, H, d]."""
    return (weight_BTHK.flatten(1, 2) @ v_BKd).unflatten(1, weight_BTHK.shape[1:3])
