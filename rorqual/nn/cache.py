"""What attention keeps between passes: growing slots, a fixed tail, and the cache of a whole model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from rorqual.nn.errors import ContextError, InputError
from rorqual.nn.step import Rows

ROLLBACK = 16
"""A pass of at most this many tokens can be taken back token by token (speculative decoding)."""


class Slots:
    """One item a position, growing: storage `[B, capacity, *shape]`, the item of position p in slot p."""

    def __init__(
        self, batch: int, capacity: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ):
        with torch.inference_mode(False):  # so that a cache filled there can be used anywhere
            self.items = torch.zeros(batch, capacity, *shape, dtype=dtype, device=device)

    def append(self, new_BT: Tensor, rows: Rows) -> Tensor:
        """Store the real items of `new_BT` [B, T, *shape]; returns all slots up to the longest row's end.

        Slots past a shorter row's end hold anything; causality hides them.
        """
        self._reserve(rows.end)
        if rows.uniform:
            self.items[:, rows.starts[0] : rows.end] = new_BT
        else:
            row, column, position = rows.where
            self.items[row, position] = new_BT[row, column]
        return self.items[:, : rows.end]

    def _reserve(self, size: int) -> None:
        batch, capacity, *shape = self.items.shape
        if size > capacity:
            with torch.inference_mode(False):
                grown = self.items.new_zeros(batch, max(size, capacity + capacity // 2, 16), *shape)
            grown[:, :capacity] = self.items
            self.items = grown

    def select(self, rows_B: Tensor) -> None:
        """Keep (and repeat, reorder) only the given rows of the batch."""
        with torch.inference_mode(False):
            self.items = self.items[rows_B]

    def bytes_per_item(self) -> int:
        """Bytes that one item of one row takes."""
        return self.items[0, 0].numel() * self.items.element_size() if self.items.shape[1] else 0


class Tail:
    """The last `keep` items of each row, right-aligned `[B, keep, width]`; `fill` stands before position 0.

    The items of the newest pass stay behind them until the next one says where it starts, so up to
    `ROLLBACK` tokens can be taken back without a copy having been made.
    """

    def __init__(
        self, batch: int, keep: int, width: int, dtype: torch.dtype, device: torch.device, fill: float = 0.0
    ):
        self.keep = keep
        self.items = torch.full((batch, keep, width), fill, dtype=dtype, device=device)
        self.starts = [0] * batch

    def extend(self, new_BTW: Tensor, rows: Rows) -> Tensor:
        """`[B, keep + T, width]`: column keep + t holds the item of position `starts[b]` + t."""
        joined = torch.cat((self._aligned(rows.starts), new_BTW.to(self.items.dtype)), 1)
        self.items, self.starts = joined, list(rows.starts)
        if rows.width > ROLLBACK:
            self.items, self.starts = self._aligned(rows.ends).clone(), list(rows.ends)
        return joined

    def reaches(self, starts: list[int]) -> bool:
        """Whether the next pass may start at these positions."""
        room = self.items.shape[1] - self.keep
        return all(0 <= new - old <= room for new, old in zip(starts, self.starts, strict=True))

    def _aligned(self, starts: list[int]) -> Tensor:
        """The `keep` items before each position in `starts`."""
        if not self.reaches(starts):
            raise ContextError(f"a window at {self.starts} can't start a pass at {starts}: start a new cache")
        shift = [new - old for new, old in zip(starts, self.starts, strict=True)]
        if len(set(shift)) == 1:
            return self.items[:, shift[0] : shift[0] + self.keep]
        index = torch.tensor(shift, device=self.items.device)[:, None] + torch.arange(
            self.keep, device=self.items.device
        )
        return self.items.gather(1, index[..., None].expand(-1, -1, self.items.shape[2]))

    def select(self, rows_B: Tensor) -> None:
        """Keep (and repeat, reorder) only the given rows of the batch."""
        self.items = self.items[rows_B]
        self.starts = [self.starts[i] for i in rows_B.tolist()]

    def bytes_per_row(self) -> int:
        """Bytes that the kept items of one row take."""
        return self.keep * self.items.shape[2] * self.items.element_size()


class LayerCache(Protocol):
    """What one attention brick keeps. The engine asks only this much of it."""

    def select(self, rows_B: Tensor) -> None:
        """Keep (and repeat, reorder) only the given rows of the batch."""

    def reaches(self, starts: list[int]) -> bool:
        """Whether the next pass may start at these positions (`Cache.truncate`)."""

    def growing_bytes(self, length: int) -> int:
        """Bytes that a row of `length` tokens fills and that grow with it."""

    def fixed_bytes(self) -> int:
        """Bytes a row takes whatever its length."""


class Cache:
    """The cache of a model for a batch of sequences: one `LayerCache` a layer, and each row's length."""

    def __init__(self, layers: list[LayerCache], batch: int) -> None:
        self.layers = layers
        self.lengths = [0] * batch
        """Tokens that each row holds."""

    def truncate(self, lengths: list[int]) -> None:
        """Forget the tokens past `lengths`. Any length for GQA, MLA and DSA; V4's window and pooling
        state go back only within the last pass, and only if it had at most `ROLLBACK` tokens. Raises
        `ContextError`, with nothing changed, for anything else."""
        if len(lengths) != len(self.lengths):
            raise ContextError(f"the cache holds {len(self.lengths)} rows, {len(lengths)} lengths were given")
        if any(new > old or new < 0 for new, old in zip(lengths, self.lengths, strict=True)):
            raise ContextError(f"truncate can only shorten: rows hold {self.lengths} tokens, asked {lengths}")
        if not all(layer.reaches(lengths) for layer in self.layers):
            raise ContextError(
                f"this cache can't go back from {self.lengths} to {lengths}: sliding windows keep only the last "
                f"pass, of at most {ROLLBACK} tokens; start a new cache"
            )
        self.lengths = list(lengths)

    def check(self, layers: int, batch: int, dtype: torch.dtype, device: torch.device) -> None:
        """Refuse a cache that another model, type, device or batch size was made for (`InputError`)."""
        if len(self.lengths) != batch:
            raise InputError(f"the cache holds {len(self.lengths)} rows, the batch has {batch}")
        items = next(_tensors(self.layers[0]))
        mine = len(self.layers), items.dtype, items.device
        if mine != (layers, dtype, device):
            raise InputError(
                f"the cache was made for {mine[0]} layers of {mine[1]} on {mine[2]}, this model has {layers} of "
                f"{dtype} on {device}: make one with model.new_cache"
            )

    def select(self, rows: list[int]) -> None:
        """Keep (and repeat, reorder) only the given rows of the batch."""
        if not rows or not all(0 <= row < len(self.lengths) for row in rows):
            raise InputError(f"the cache holds rows 0 to {len(self.lengths) - 1}, asked for {rows}")
        index = torch.tensor(rows, device=next(_tensors(self.layers[0])).device)
        for layer in self.layers:
            layer.select(index)
        self.lengths = [self.lengths[i] for i in rows]

    def used_bytes(self) -> int:
        """Bytes that the tokens held now fill (facts 2.3), capacity not yet used left out."""
        return sum(
            layer.growing_bytes(length) + layer.fixed_bytes()
            for layer in self.layers
            for length in self.lengths
        )


def _tensors(layer: LayerCache) -> Iterator[Tensor]:
    return (value.items for value in vars(layer).values() if isinstance(value, Slots | Tail))
