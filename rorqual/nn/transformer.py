"""The model: embedding, a plan of layers, head. Every family member is this class with another config."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rorqual.family import parts
from rorqual.family.parts import ModelConfig
from rorqual.kernels.gpu import usable
from rorqual.kernels.linear import Pack, adjoin, linear, linear_in_fp32
from rorqual.kernels.mix import STREAMS
from rorqual.kernels.mode import is_invariant
from rorqual.nn.block import Block
from rorqual.nn.cache import Cache
from rorqual.nn.compressed import CompressedAttention, EntryIndexer
from rorqual.nn.errors import ContextError, InputError
from rorqual.nn.gqa import GQA
from rorqual.nn.hyper import MixHead
from rorqual.nn.indexer import Indexer
from rorqual.nn.init import init_weights
from rorqual.nn.linear import Embedding, Linear
from rorqual.nn.mla import MLA
from rorqual.nn.mlp import SwiGLU
from rorqual.nn.mtp import MTP
from rorqual.nn.norm import RMSNorm
from rorqual.nn.paged import Group, Lanes, PagedStep, Store, new_store
from rorqual.nn.step import Rows, Step, Trace

__all__ = ["Transformer"]

TOKENS = 4096
"""Tokens that a batch-invariant forward pass takes through the model at a time."""


class Transformer(nn.Module):
    """A family member. `Transformer(config)` has fresh weights; `rorqual.load` fills in released ones.

    On the meta device nothing is initialised. Parameters that the family keeps in fp32 (stream mixing,
    pooling positions, sinks, router biases) are fp32 whatever `dtype` says.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        dtype = dtype or getattr(torch, config.dtype)
        with torch.device(device), _default_dtype(dtype):
            self.embed = Embedding(config.vocab, config.hidden)
            self.layers = nn.ModuleList(Block(config, layer) for layer in config.layers)
            self.norm = RMSNorm(config.hidden, config.norm_eps)
            self.mix_head = (
                MixHead(config.hidden, config.residual, config.norm_eps) if config.residual else None
            )
            self.head = None if config.tied else Linear(config.hidden, config.vocab)
            self.mtp = nn.ModuleList(MTP(config, layer) for layer in config.mtp)
        self._tied_pack = Pack()
        if torch.device(device).type != "meta":
            init_weights(self, config.init_std, self.device, seed)

    @property
    def dtype(self) -> torch.dtype:
        """The type activations flow in."""
        return self.embed.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.embed.weight.device

    # ------------------------------------------------------------------------------------ forward

    def forward(
        self,
        ids_BT: Tensor,
        mask_BT: Tensor | None = None,
        *,
        cache: Cache | None = None,
        trace: Trace | None = None,
    ) -> Tensor:
        """Logits `[B, T, V]` of token ids `[B, T]` (int64).

        `mask_BT` marks real tokens (1 or True) in a left- or right-padded batch; logits of padding are
        zero. With `cache` (from `new_cache`) the tokens come after those it holds, which it then holds
        too; any cut of a sequence into passes gives the same logits. A cache is for inference: with one, no
        gradients flow.

        Raises `InputError` for ids outside the vocabulary or wrong shapes, `ContextError` past
        `config.max_positions`.
        """
        self._check(ids_BT, mask_BT)
        packed = _Packed(ids_BT, mask_BT)
        if cache is not None:
            cache.check(len(self.layers), ids_BT.shape[0], self.dtype, self.device)
            with torch.no_grad():
                return packed.unpack(self._logits(packed, cache, trace))
        return packed.unpack(self._logits(packed, None, trace))

    def _logits(self, packed: _Packed, cache: Cache | None, trace: Trace | None) -> Tensor:
        if is_invariant():
            if trace is not None or cache is not None:
                raise InputError(
                    "batch-invariant mode takes neither a trace nor a cache: give the whole sequence"
                )
            self._rows([0] * len(packed.counts), packed)
            return self._logits_by_row(packed) if self.fixed_rows else self._logits_by_token(packed)
        starts = cache.lengths if cache is not None else [0] * packed.ids_BT.shape[0]
        return self.logits(
            self.finish(self.run(packed.ids_BT, self._rows(starts, packed), cache, trace), trace)
        )

    @property
    def fixed_rows(self) -> bool:
        """Whether kernels give a token's numbers the same bits in any pass of batch-invariant mode: else each token has
        to be a pass of its own there."""
        streams = self.config.residual.streams if self.config.residual is not None else 1
        layers: Any = self.layers
        by_kernels = not any(getattr(layer.attention, "simulate", False) for layer in layers)
        return usable(self.embed.weight) and self.dtype != torch.float64 and streams in STREAMS and by_kernels

    @torch.no_grad()
    def _logits_by_row(self, packed: _Packed) -> Tensor:
        """Batch-invariant logits by the kernels that serve: over pages made for this call. No gradients flow."""
        (batch, width), counts, device = packed.ids_BT.shape, packed.counts, packed.ids_BT.device
        lanes = self.lanes()[: len(self.layers)]
        size = math.lcm(64, *(lane.every for kinds in lanes for lane in kinds.values() if lane.keep is None))
        blocks = -(-width // size)
        stores = [new_store(kinds, 1 + batch * blocks, size, 1 + batch, device) for kinds in lanes]
        table = 1 + torch.arange(batch * blocks, device=device, dtype=torch.int32).view(batch, blocks)
        out: Tensor | None = None
        at_once = max(1, TOKENS // batch)
        for start in range(0, width, at_once):
            rows = [b for b in range(batch) if counts[b] > start]
            step = _chunks(rows, start, [min(counts[b] - start, at_once) for b in rows], table, size)
            group = step.groups[0]
            row_N = torch.tensor(rows, device=device)[group.seq_N]
            ids_N = packed.ids_BT[row_N, step.positions_N]
            logits_NV = self.logits(self.finish(self.run_paged(ids_N[None], step, stores)))[0]
            if out is None:
                out = logits_NV.new_zeros(batch, width, logits_NV.shape[-1])
            out[row_N, step.positions_N] = logits_NV
        assert out is not None
        return out

    def _logits_by_token(self, packed: _Packed) -> Tensor:
        """Batch-invariant logits: every token is a pass of its own over its row's cache. No gradients flow."""
        batch, width = packed.ids_BT.shape
        out = torch.zeros(batch, width, self.config.vocab, device=self.device)
        with torch.no_grad():
            for b, count in enumerate(packed.counts):
                own = self.new_cache(1, count)
                for t in range(count):
                    state = self.run(packed.ids_BT[b : b + 1, t : t + 1], Rows([t], [1], 1, self.device), own)
                    out[b, t] = self.logits(self.finish(state))[0, 0]
        return out.to(self.dtype) if self.config.residual is None else out

    def _rows(self, starts: list[int], packed: _Packed) -> Rows:
        rows = Rows(list(starts), packed.counts, packed.ids_BT.shape[1], packed.ids_BT.device)
        if rows.end > self.config.max_positions:
            raise ContextError(
                f"the sequence would be {rows.end} tokens long, but this model has {self.config.max_positions} "
                "positions: shorten the prompt or generate fewer tokens"
            )
        return rows

    def run(
        self, ids_BT: Tensor, rows: Rows, cache: Cache | None = None, trace: Trace | None = None
    ) -> Tensor:
        """The layers alone, on ids whose real tokens come first in each row (unchecked): the residual
        state before the final norm, `[B, T, D]` or streams `[B, T, n, D]`. The cache's lengths move on."""
        x = self._through(ids_BT, Step(rows, trace), cache.layers if cache is not None else None)
        if cache is not None:
            cache.lengths = list(rows.ends)
        return x

    def run_whole(self, ids_BT: Tensor, step: Step) -> Tensor:
        """The same without a cache, for a step whose rows begin at 0; its `documents_BT` are kept apart by
        attention."""
        return self._through(ids_BT, step, None)

    def run_paged(self, ids_1N: Tensor, step: PagedStep, stores: Sequence[Store]) -> Tensor:
        """The same over pages: the new tokens of many sequences in one row `[1, N]`, one store a layer."""
        if self.config.residual is not None or not usable(self.embed.weight):
            return self._through(ids_1N, step, stores)
        return self._deferred(self.embed(ids_1N), ids_1N, step, stores)

    def _deferred(self, x: Tensor, ids_BT: Tensor, step: Step, caches: Sequence[Any] | None) -> Tensor:
        """All layers, each residual sum made together with the norm after it."""
        layers, pending = list[Any](self.layers), None
        for index, layer in enumerate(layers):
            step.layer = index
            cache = caches[index] if caches is not None else None
            x, pending = layer.deferred(x, pending, ids_BT, step, cache)
        return x if pending is None else x + pending

    def _through(self, ids_BT: Tensor, step: Step, caches: Sequence[Any] | None) -> Tensor:
        x = self.embed(ids_BT)
        looked_at = step.trace is not None and not step.trace.only_experts
        if torch.is_grad_enabled() and self.config.residual is None and usable(x) and not looked_at:
            return self._deferred(x, ids_BT, step, caches)
        if self.config.residual is not None:
            x = x[:, :, None].expand(-1, -1, self.config.residual.streams, -1)
        for index, layer in enumerate(self.layers):
            step.layer = index
            if step.trace is not None and not step.trace.only_experts:
                step.trace.hidden.append(x)
            x = layer(x, ids_BT, step, caches[index] if caches is not None else None)
        return x

    def finish(self, state: Tensor, trace: Trace | None = None) -> Tensor:
        """Residual state -> normed hidden state `[B, T, D]`, what the head reads."""
        hidden = self.norm(state if self.mix_head is None else self.mix_head(state))
        if trace is not None and not trace.only_experts:
            trace.hidden.append(hidden)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Normed hidden states `[..., D]` -> logits `[..., V]`; V4's head works in fp32."""
        if self.config.residual is not None and hidden.dtype not in (torch.float32, torch.float64):
            weight = self.embed.weight if self.head is None else self.head.matrix(hidden.dtype)
            return linear_in_fp32(hidden, weight)
        return (
            linear(hidden, self.embed.weight, None, self._tied_pack)
            if self.head is None
            else self.head(hidden)
        )

    def predict_further(
        self, state: Tensor, next_ids_BT: Tensor, rows: Rows, depth: int = 0, cache: Cache | None = None
    ) -> tuple[Tensor, Tensor]:
        """MTP module `depth`: from the `state` of token i and the id of token i + 1, logits of token
        i + 2 `[B, T, V]` and the state for the next depth.

        At depth 0 `state` is what the final norm gave (`finish`), or V4's raw streams (`run`). `cache` is
        one of `new_mtp_cache`.
        """
        layer_cache = cache.layers[depth] if cache is not None else None
        hidden, state = self.further(state, next_ids_BT, Step(rows), depth, layer_cache)
        if cache is not None:
            cache.lengths = list(rows.ends)
        return self.logits(hidden), state

    def further(
        self, state: Tensor, next_ids_BT: Tensor, step: Step, depth: int = 0, cache: Any = None
    ) -> tuple[Tensor, Tensor]:
        """The same as a part of a pass (over pages with a `PagedStep` and the module's store): gives the normed hidden
        states `[B, T, D]` that `logits` reads, not logits."""
        step.layer = len(self.layers) + depth
        out: tuple[Tensor, Tensor] = self.mtp[depth](state, self.embed(next_ids_BT), next_ids_BT, step, cache)
        return out

    # -------------------------------------------------------------------------------------- cache

    def new_cache(self, batch: int = 1, capacity: int = 0) -> Cache:
        """An empty cache for `batch` sequences; room for `capacity` tokens at once (it grows as needed)."""
        return self._cache([layer.attention for layer in self.layers], batch, capacity)

    def new_mtp_cache(self, batch: int = 1, capacity: int = 0) -> Cache:
        """The same for the MTP modules."""
        modules: Any = self.mtp
        return self._cache([module.block.attention for module in modules], batch, capacity)

    def _cache(self, bricks: list[Any], batch: int, capacity: int) -> Cache:
        capacity = min(capacity, self.config.max_positions)
        made = [brick.new_cache(batch, capacity, self.dtype, self.device) for brick in bricks]
        return Cache(made, batch)

    def lanes(self, fp8: bool = False) -> list[Lanes]:
        """What every layer, and after them every MTP module, keeps in pages (`nn.paged`); with `fp8` in the
        released FP8 layout (V3.2: 656 bytes a token and layer, and 132 of the indexer; V4: 584 an entry, and 68 an
        index key)."""
        modules: Any = self.mtp
        bricks: list[Any] = [layer.attention for layer in self.layers]
        bricks += [module.block.attention for module in modules]
        return [brick.lanes(self.dtype, fp8) for brick in bricks]

    # --------------------------------------------------------------------------------------- misc

    def adjoin(self) -> None:
        """Lay matrices that read the same rows next to each other in memory, so that one product serves them
        (GPUs). Parameters stay the same objects, names and values."""
        for module in self.modules():
            if isinstance(module, GQA | MLA | SwiGLU):
                layers = module.alike()
                if all(layer.scale is None and layer.bias is None for layer in layers):
                    adjoin([layer.weight for layer in layers])

    def packs(self) -> list[Pack]:
        """The packed weight copies of all matrices, for `kernels.linear.packing`."""
        return [held for module in self.modules() for held in vars(module).values() if isinstance(held, Pack)]

    def simulate_released_rounding(self, on: bool = True) -> None:
        """Round cached entries and index vectors as the released FP8/FP4 kernels of V3.2 and V4 do (facts
        3.8, 3.9). Off by default: then results equal the plain equations. Entries already in a cache stay
        as they are, so start a new one."""
        for layer in (*self.config.layers, *self.config.mtp):
            a = layer.attention
            if on and isinstance(a, parts.CompressedAttention):
                plain, index = a.head_dim - a.rope.dim, a.compress.index if a.compress else None
                if plain % 64 or (index is not None and index.dim % 32):
                    raise InputError(
                        f"the released rounding works in blocks of 64 entry and 32 index channels; this model has "
                        f"{plain} and {index.dim if index else 0}"
                    )
        for module in self.modules():
            if isinstance(module, CompressedAttention | EntryIndexer | Indexer):
                module.simulate = on

    def _check(self, ids_BT: Tensor, mask_BT: Tensor | None) -> None:
        if not isinstance(ids_BT, Tensor) or ids_BT.dtype not in (torch.int64, torch.int32):
            found = ids_BT.dtype if isinstance(ids_BT, Tensor) else type(ids_BT).__name__
            raise InputError(f"token ids must be an int64 tensor [batch, time], got {found}")
        if ids_BT.dim() != 2 or ids_BT.numel() == 0:
            raise InputError(
                f"token ids must be [batch, time] with at least one token, got {tuple(ids_BT.shape)}"
            )
        low, high = (int(v) for v in ids_BT.aminmax())
        if low < 0 or high >= self.config.vocab:
            bad = low if low < 0 else high
            raise InputError(
                f"token id {bad} is outside the vocabulary of {self.config.vocab}: wrong tokenizer?"
            )
        if mask_BT is None:
            return
        if mask_BT.shape != ids_BT.shape:
            raise InputError(f"the mask is {tuple(mask_BT.shape)}, the token ids are {tuple(ids_BT.shape)}")
        if mask_BT.is_floating_point() or not bool(((mask_BT == 0) | (mask_BT == 1)).all()):
            raise InputError("the mask must be bool or integers, 1 for a real token and 0 for padding")


def _chunks(rows: list[int], start: int, counts: list[int], table: Tensor, size: int) -> PagedStep:
    """A pass of the tokens from `start` on of these rows, `counts` of each, in the pages of `table` `[B, blocks]`;
    the ring of row b is 1 + b."""
    device, ends = table.device, [start + count for count in counts]
    offsets = [0, *itertools.accumulate(counts)]
    positions = torch.cat([torch.arange(start, end, device=device) for end in ends])
    index = torch.tensor(rows, device=device)
    group = Group(
        tokens=slice(0, offsets[-1]),
        starts=[start] * len(rows),
        counts=counts,
        width=max(counts),
        end=max(ends),
        table_SB=table[index],
        ring_S=1 + index,
        ends_S=torch.tensor(ends, device=device, dtype=torch.int32),
        offsets_S1=torch.tensor(offsets, device=device, dtype=torch.int32),
        decoding=False,
    )
    return PagedStep(positions, [group], size)


class _Packed:
    """A padded batch with each row's real tokens moved to the front, and the way back."""

    def __init__(self, ids_BT: Tensor, mask_BT: Tensor | None) -> None:
        batch, time = ids_BT.shape
        if mask_BT is None or bool(mask_BT.all()):
            self.ids_BT, self.counts, self.order_BT = ids_BT.long(), [time] * batch, None
            return
        real = mask_BT.bool()
        self.counts = real.sum(1).tolist()
        if min(self.counts) == 0:
            raise InputError(f"row {self.counts.index(0)} of the batch has no real token")
        self.real_BT, self.time = real, time
        self.order_BT = (~real).to(torch.uint8).argsort(dim=1, stable=True)[:, : max(self.counts)]
        self.ids_BT = ids_BT.long().gather(1, self.order_BT)

    def unpack(self, y_BTV: Tensor) -> Tensor:
        """Back to the caller's columns; padding columns are zero."""
        if self.order_BT is None:
            return y_BTV
        out = y_BTV.new_zeros(y_BTV.shape[0], self.time, y_BTV.shape[2])
        rows = torch.arange(out.shape[0], device=out.device)[:, None]
        out[rows, self.order_BT] = y_BTV
        return out.masked_fill_(~self.real_BT[..., None], 0)


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
