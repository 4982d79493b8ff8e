"""What the bricks of one paged pass chose, kept for those who look inside (`engine.inside`).

A pass has a watch only if somebody asked (`PagedStep.watch`); bricks then hand over tensors that they have made anyway,
and no kernel runs that would not run without one. Bricks know no requests: a watch holds all tokens of the pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


class Watch:
    """The choices of a pass of N tokens, by layer. `experts`, `seen`: which of the two are kept."""

    def __init__(self, experts: bool, seen: bool) -> None:
        self.experts, self.seen = experts, seen
        self._experts: dict[int, Tensor] = {}
        self._seen: dict[int, list[Tensor]] = {}

    def chose(self, layer: int, ids_NK: Tensor) -> None:
        """A layer's router: the experts of every token."""
        if self.experts:
            self._experts[layer] = ids_NK

    def saw(self, layer: int, chosen_nk: Tensor) -> None:
        """A layer's indexer: what the tokens of one more group attend, -1 where there is less."""
        if self.seen:
            self._seen.setdefault(layer, []).append(chosen_nk)

    def experts_at(self, layers: Sequence[int], index_C: Tensor) -> Tensor:
        """The experts of the tokens `index_C` in these layers side by side, `[C, K + K + …]`."""
        return torch.cat([self._experts[layer] for layer in layers], -1)[index_C].int()

    def seen_at(self, layers: Sequence[int], index_C: Tensor) -> Tensor:
        """What the tokens `index_C` attended in these layers, int32 `[C, layers, k]`, -1 where there was less."""
        found = [_joined(self._seen[layer])[index_C].int() for layer in layers]
        width = max(f.shape[-1] for f in found)
        return torch.stack([F.pad(f, (0, width - f.shape[-1]), value=-1) for f in found], 1)

    def take(self, others: Iterable[Watch]) -> None:
        """What the watches of other passes hold, as if all their tokens had been in this one, in order."""
        others = list(others)
        for layer in others[0]._experts:
            self._experts[layer] = torch.cat([other._experts[layer] for other in others])
        for layer in others[0]._seen:
            self._seen[layer] = [part for other in others for part in other._seen[layer]]


def _joined(parts: list[Tensor]) -> Tensor:
    """Groups' choices one after the other, all as wide as the widest."""
    width = max(part.shape[-1] for part in parts)
    return torch.cat([F.pad(part, (0, width - part.shape[-1]), value=-1) for part in parts])
