"""Matrices times a few rows on the CPU, where PyTorch's own choice leaves half the memory rate unused.

`reference` is the definition. Without gradients, on CPUs with oneDNN, its inner product is called directly:
in fp32 on the weight as it lies, in bf16 on a copy in oneDNN's blocked layout; matrices that read the same
rows (query, key and value; gate and up) stand in one such copy and take one call. What it brings is
measured in docs/benchmarks.md.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

PACK_LIMIT = 2**33
"""Bytes of such copies kept at most (8 GiB): beyond it matrices are used as they lie."""

_packed_bytes = 0


class Pack:
    """A copy of one or more weights in the layout their product runs fastest in; made at first use, and
    anew when a weight changes.

    A change is seen by the weight's identity, address and version counter. What PyTorch itself does not
    count, writes through `.data`, is covered for training, because every pass with gradients drops the copy;
    whoever writes through `.data` between two passes without gradients must call `drop`.
    """

    __slots__ = ("seen", "size", "tensor")

    def __init__(self) -> None:
        self.tensor: Tensor | None = None
        self.seen: list[tuple[weakref.ref[Tensor], int, int]] = []
        self.size = 0

    def of(self, weights: Sequence[Tensor]) -> Tensor | None:
        """The copy of `weights` `[out_i, in]`, joined along `out`; None if there is no room for one, or
        their changes can't be seen (inference tensors have no version counter)."""
        global _packed_bytes
        if not self._fresh(weights):
            self.drop()
            size = sum(weight.numel() * weight.element_size() for weight in weights)
            if _packed_bytes + size > PACK_LIMIT or any(weight.is_inference() for weight in weights):
                return None
            joined = (
                torch.cat([weight.detach() for weight in weights])
                if len(weights) > 1
                else weights[0].detach()
            )
            if joined.dtype == torch.bfloat16:
                joined = torch.ops.mkldnn._reorder_linear_weight(joined, 1)
            self.tensor, self.size = joined, size
            self.seen = [(weakref.ref(weight), weight.data_ptr(), weight._version) for weight in weights]
            _packed_bytes += size
        return self.tensor

    def _fresh(self, weights: Sequence[Tensor]) -> bool:
        return len(self.seen) == len(weights) and all(
            seen() is weight and address == weight.data_ptr() and version == weight._version
            for (seen, address, version), weight in zip(self.seen, weights, strict=True)
        )

    def drop(self) -> None:
        """Give the copy's memory back."""
        global _packed_bytes
        _packed_bytes -= self.size
        self.tensor, self.seen, self.size = None, [], 0

    def __del__(self) -> None:
        self.drop()

    def __deepcopy__(self, memo: object) -> Pack:
        return Pack()

    def __reduce__(self) -> tuple[type[Pack], tuple[()]]:
        return Pack, ()


def reference(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> list[Tensor]:
    """x `[..., in]` through each weight `[out_i, in]` (+ bias `[out_i]`): a list of `[..., out_i]`."""
    return [F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, pack: Pack | None = None) -> Tensor:
    """`reference` for one weight, by the fastest way at hand; `pack` keeps its copy between calls."""
    if not _usable(x, (weight,), pack):
        return F.linear(x, weight, bias)
    if weight.dtype == torch.bfloat16:
        blocked = pack.of((weight,)) if pack is not None else None
        if blocked is None:
            return F.linear(x, weight, bias)
        weight = blocked
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def linears(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], pack: Pack
) -> Sequence[Tensor]:
    """`reference` for several weights that read the same rows; `pack` keeps their joint copy between calls.
    The results may be views of one tensor."""
    joined = pack.of(weights) if _usable(x, weights, pack) else None
    if joined is None:
        return reference(x, weights, biases)
    y = torch.ops.mkldnn._linear_pointwise(x, joined, None, "none", [], "")
    parts = y.split([weight.shape[0] for weight in weights], -1)
    return [part if bias is None else part + bias for part, bias in zip(parts, biases, strict=True)]


def _usable(x: Tensor, weights: Sequence[Tensor], pack: Pack | None) -> bool:
    """Whether oneDNN can be called directly. A pass with gradients drops the copy: training goes on."""
    if torch.is_grad_enabled():
        if pack is not None and pack.tensor is not None:
            pack.drop()
        return False
    if x.device.type != "cpu" or not _ONEDNN or x.numel() == 0:
        return False
    return x.dtype in _TYPES and all(w.dtype == x.dtype and type(w) in _PLAIN for w in weights)


_PLAIN = (Tensor, torch.nn.Parameter)
_TYPES = (torch.float32, torch.bfloat16)
_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
