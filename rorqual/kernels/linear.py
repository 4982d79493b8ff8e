"""Matrix times a few rows on the CPU, where PyTorch's own choice leaves half the memory rate unused.

`F.linear` is the reference. On CPUs with oneDNN its inner product is called directly: in fp32 on the
weight as it lies, in bf16 on a copy in oneDNN's blocked layout. Measured on two EPYC cores, one row, width
576 x 1536: fp32 7.6 -> 16.9 GB/s, bf16 8.3 -> 12.7 GB/s (docs/benchmarks.md).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

PACK_LIMIT = 2**33
"""Bytes of blocked bf16 copies kept at most (8 GiB): beyond it bf16 matrices are used as they lie."""

_packed_bytes = 0


class Pack:
    """The blocked copy of one bf16 weight, made at first use and anew when the weight changes."""

    __slots__ = ("blocked", "seen", "size")

    def __init__(self) -> None:
        self.blocked: Tensor | None = None
        self.seen: tuple[int, int] | None = None
        self.size = 0

    def of(self, weight: Tensor) -> Tensor | None:
        """The blocked copy, or None if there is no room for one."""
        global _packed_bytes
        now = (weight.data_ptr(), weight._version)
        if self.seen != now:
            self.drop()
            size = weight.numel() * weight.element_size()
            if _packed_bytes + size > PACK_LIMIT:
                return None
            self.blocked = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 1)
            self.seen, self.size = now, size
            _packed_bytes += size
        return self.blocked

    def drop(self) -> None:
        """Give the copy's memory back."""
        global _packed_bytes
        _packed_bytes -= self.size
        self.blocked, self.seen, self.size = None, None, 0

    def __del__(self) -> None:
        self.drop()

    def __deepcopy__(self, memo: object) -> Pack:
        return Pack()

    def __reduce__(self) -> tuple[type[Pack], tuple[()]]:
        return Pack, ()


def reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x `[..., in]`, weight `[out, in]` -> `[..., out]`."""
    return F.linear(x, weight, bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, pack: Pack | None = None) -> Tensor:
    """`reference`, by the fastest way at hand. `pack` holds the blocked copy of a bf16 weight between calls."""
    if x.device.type != "cpu" or torch.is_grad_enabled() or not _usable(x, weight):
        return reference(x, weight, bias)
    if weight.dtype == torch.bfloat16:
        blocked = pack.of(weight) if pack is not None else None
        if blocked is None:
            return reference(x, weight, bias)
        weight = blocked
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _usable(x: Tensor, weight: Tensor) -> bool:
    kinds = (torch.float32, torch.bfloat16)
    return _ONEDNN and x.dtype == weight.dtype and x.dtype in kinds and x.numel() > 0 and type(weight) in _PLAIN


_PLAIN = (Tensor, torch.nn.Parameter)
_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
