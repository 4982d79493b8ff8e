"""The products of a layer that learns, by the weights' own precision or in FP8: forward, and both gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from rorqual.kernels import fp8_train
from rorqual.kernels.fp8_train_quant import BLOCK, Codes

Kept = Tensor | Codes


class Products(Protocol):
    """Rows through weights side by side, there and back."""

    def forward(self, x_ND: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, Kept]:
        """x through each weight `[O, D]`: `[N, sum of O]`, and what the weights' gradients are made of."""

    def backward(
        self, slope: Tensor, kept: Kept, weights: Sequence[Tensor]
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """From the gradient of that: x's, and each weight's."""


class Plain:
    """In the type of rows and weights."""

    def forward(self, x_ND: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, Kept]:
        return x_ND @ _joint(weights).t(), x_ND

    def backward(
        self, slope: Tensor, kept: Kept, weights: Sequence[Tensor]
    ) -> tuple[Tensor, Sequence[Tensor]]:
        assert isinstance(kept, Tensor)
        return slope @ _joint(weights), (slope.t() @ kept).split([len(w) for w in weights])


class InFP8:
    """In FP8; all weights but the last have whole blocks of 128 outputs."""

    def forward(self, x_ND: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, Kept]:
        y, kept = fp8_train.forward(x_ND, weights)
        assert kept is not None
        return y, kept

    def backward(
        self, slope: Tensor, kept: Kept, weights: Sequence[Tensor]
    ) -> tuple[Tensor, Sequence[Tensor]]:
        assert isinstance(kept, Codes)
        dx, found = fp8_train.backward(slope, kept, weights)
        assert dx is not None
        return dx, [dw for dw in found if dw is not None]


def products(fp8: bool, *first: Tensor) -> Products:
    """In FP8 if asked for and if the weights that stand before others are of whole blocks."""
    return InFP8() if fp8 and all(len(w) % BLOCK == 0 for w in first) else Plain()


def _joint(weights: Sequence[Tensor]) -> Tensor:
    return weights[0] if len(weights) == 1 else torch.cat(list(weights))
