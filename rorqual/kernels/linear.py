"""Matrices times a few rows on the CPU, where PyTorch's own choice leaves half the memory rate unused.

`reference` is the definition. Without gradients, on CPUs with oneDNN, its inner product is called directly:
in fp32 on the weight as it lies, and inside a `packing` scope (generation opens one) in bf16 on a copy in
oneDNN's blocked layout; matrices that read the same rows (query, key and value; query and latent; gate and up) then
stand in one copy and take one call, and so do matrices whose results are summed (all experts' last ones). What it
brings is measured in docs/benchmarks.md.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rorqual.kernels.fixed import linear_fixed
from rorqual.kernels.mode import by_fixed_kernels, is_invariant
from rorqual.kernels.skinny import skinny

# PyTorch and oneDNN each keep the code made for the last 1,024 shapes of a product. A server meets new ones with every
# length of prompt, and grew by 4 MB an answer. Read when the first product is made; whoever has set them decides.
for _name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
    os.environ.setdefault(_name, "128")

PACK_LIMIT = 2**33
"""Bytes of such copies kept at most (8 GiB): beyond it matrices are used as they lie."""

ROWS = 8192
"""Rows of a weight widened at a time by `linear_in_fp32`."""

SAMPLE = 61
"""Numbers of each weight that are compared when a scope of packed copies opens."""

_packed_bytes = 0
_open_scopes = 0


class Pack:
    """A copy of one or more weights in the layout their product runs fastest in.

    It is used only inside a `packing` scope, made at first use there, and made anew when a weight's identity,
    address or version counter has changed. Writes through `.data`, which PyTorch does not count, are found
    when the next scope opens, by comparing some numbers of each weight.
    """

    __slots__ = ("sample", "seen", "size", "tensor")

    def __init__(self) -> None:
        self.tensor: Tensor | None = None
        self.seen: list[tuple[weakref.ref[Tensor], int, int]] = []
        self.sample: Tensor | None = None
        self.size = 0

    def of(self, weights: Sequence[Tensor], side_by_side: bool = False) -> Tensor | None:
        """The copy of `weights` `[..., in]`, all other axes flattened and joined, or of a stack `[E, out, in]` as one
        matrix `[out, E * in]`; always in the one way for one pack. None if there is no room, or their changes can't be
        seen (inference tensors have no version counter)."""
        global _packed_bytes
        if not self._fresh(weights):
            self.drop()
            size = sum(weight.numel() * weight.element_size() for weight in weights)
            if _packed_bytes + size > PACK_LIMIT or any(weight.is_inference() for weight in weights):
                return None
            flat = [
                weight.detach().transpose(0, 1).flatten(1) if side_by_side else weight.detach().flatten(0, -2)
                for weight in weights
            ]
            joined = torch.cat(flat) if len(flat) > 1 else flat[0]
            if joined.dtype == torch.bfloat16:
                joined = torch.ops.mkldnn._reorder_linear_weight(joined, 1)
            self.tensor, self.size, self.sample = joined, size, _sample(weights)
            self.seen = [(weakref.ref(weight), weight.data_ptr(), weight._version) for weight in weights]
            _packed_bytes += size
        return self.tensor

    def _fresh(self, weights: Sequence[Tensor]) -> bool:
        return len(self.seen) == len(weights) and all(
            seen() is weight and address == weight.data_ptr() and version == weight._version
            for (seen, address, version), weight in zip(self.seen, weights, strict=True)
        )

    def check(self) -> None:
        """Drop the copy if its weights no longer hold what was copied."""
        if self.tensor is None or self.sample is None:
            return
        weights = [seen() for seen, _, _ in self.seen]
        alive = [weight for weight in weights if weight is not None and not weight.is_meta]
        if (
            len(alive) < len(weights)
            or not self._fresh(alive)
            or not torch.equal(_sample(alive), self.sample)
        ):
            self.drop()

    def drop(self) -> None:
        """Give the copy's memory back."""
        global _packed_bytes
        _packed_bytes -= self.size
        self.tensor, self.seen, self.size, self.sample = None, [], 0, None

    def __del__(self) -> None:
        self.drop()

    def __deepcopy__(self, memo: object) -> Pack:
        return Pack()

    def __reduce__(self) -> tuple[type[Pack], tuple[()]]:
        return Pack, ()


def _packs() -> bool:
    """Whether packed copies are used here: their products add up in an order of their own."""
    return _open_scopes > 0 and not is_invariant()


def _sample(weights: Sequence[Tensor]) -> Tensor:
    """A few numbers of each weight, spread over all of it."""
    flat = [weight.detach().reshape(-1) for weight in weights]
    return torch.cat([values[:: max(1, values.numel() // SAMPLE)] for values in flat])


@contextlib.contextmanager
def packing(packs: Iterable[Pack]) -> Iterator[None]:
    """Use packed copies inside. Opening the scope drops those whose weights have changed meanwhile."""
    global _open_scopes
    for pack in packs:
        pack.check()
    _open_scopes += 1
    try:
        yield
    finally:
        _open_scopes -= 1


def reference(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> list[Tensor]:
    """x `[..., in]` through each weight `[..., in]` (+ bias `[out_i]`), its other axes flattened to `out_i`: a list of
    `[..., out_i]`."""
    return [F.linear(x, weight.flatten(0, -2), bias) for weight, bias in zip(weights, biases, strict=True)]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, pack: Pack | None = None) -> Tensor:
    """`reference` for one weight, by the fastest way at hand; `pack` keeps its copy between calls."""
    if by_fixed_kernels(x, weight):
        return linear_fixed(x, weight, bias)
    if x.is_cuda and not torch.is_grad_enabled():
        return skinny(x.flatten(0, -2), weight, bias).unflatten(0, x.shape[:-1])
    if not _usable(x, (weight,)):
        return F.linear(x, weight, bias)
    if weight.dtype == torch.bfloat16:
        blocked = pack.of((weight,)) if pack is not None and _packs() else None
        if blocked is None:
            return F.linear(x, weight, bias)
        weight = blocked
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def linears(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], pack: Pack
) -> Sequence[Tensor]:
    """`reference` for several weights that read the same rows; `pack` keeps their joint copy between calls.
    The results may be views of one tensor."""
    fixed = by_fixed_kernels(x)
    if fixed or (x.is_cuda and not torch.is_grad_enabled()):
        # Rows of a joint product of odd widths begin at odd places, and kernels would read them in other steps.
        even = not fixed or all(weight.shape[0] % 16 == 0 for weight in weights)
        whole = joint(weights) if even and not any(b is not None for b in biases) else None
        if whole is None:
            return [linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
        return linear(x, whole).split([weight.shape[0] for weight in weights], -1)
    joined = pack.of(weights) if _packs() and _usable(x, weights) else None
    if joined is None:
        return [linear(x, weight.flatten(0, -2), bias) for weight, bias in zip(weights, biases, strict=True)]
    y = torch.ops.mkldnn._linear_pointwise(x, joined, None, "none", [], "")
    parts = y.split([weight.shape[:-1].numel() for weight in weights], -1)
    return [part if bias is None else part + bias for part, bias in zip(parts, biases, strict=True)]


def summed_reference(x_NEi: Tensor, weight_Eoi: Tensor) -> Tensor:
    """Every matrix of a stack on its own part of each row, and the sum over matrices in fp32: `[N, out]`."""
    y_ENo = torch.bmm(x_NEi.transpose(0, 1), weight_Eoi.transpose(1, 2))
    return (y_ENo if y_ENo.dtype == torch.float64 else y_ENo.float()).sum(0).to(x_NEi.dtype)


def linear_summed(x_NEi: Tensor, weight_Eoi: Tensor, pack: Pack) -> Tensor:
    """`summed_reference`, by one product where `pack` may keep a copy; it is then rounded once."""
    joined = pack.of((weight_Eoi,), side_by_side=True) if _packs() and _usable(x_NEi, (weight_Eoi,)) else None
    if joined is None:
        return summed_reference(x_NEi, weight_Eoi)
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x_NEi.flatten(1), joined, None, "none", [], "")
    return y


def adjoin(weights: Sequence[torch.nn.Parameter]) -> None:
    """Lay weights `[out_i, in]` one behind the other in memory, so that `linears` takes them as one matrix. They
    stay the parameters they are, as views; nothing is held twice."""
    if joint(weights) is not None or len({(w.dtype, w.device, w.shape[1:]) for w in weights}) > 1:
        return
    whole = torch.cat([weight.detach() for weight in weights])
    for weight, part in zip(weights, whole.split([w.shape[0] for w in weights]), strict=True):
        weight.data = part


def joint(weights: Sequence[Tensor]) -> Tensor | None:
    """The one matrix that weights laid out by `adjoin` form; None if they don't."""
    first, at = weights[0], weights[0].data_ptr()
    for weight in weights:
        same = weight.dtype == first.dtype and weight.shape[1:] == first.shape[1:] and weight.is_contiguous()
        if weight.data_ptr() != at or not same:
            return None
        at += weight.numel() * weight.element_size()
    if first.untyped_storage().data_ptr() != weights[-1].untyped_storage().data_ptr():
        return None
    rows = sum(weight.shape[0] for weight in weights)
    return first.detach().as_strided((rows, *first.shape[1:]), first.stride())


def linear_in_fp32(x: Tensor, weight: Tensor) -> Tensor:
    """x `[..., in]` times a weight `[out, in]` of lower precision, as if both were fp32: `[..., out]` fp32.

    The weight is widened a block of rows at a time, so no second copy of it ever stands whole; on a GPU,
    without gradients, the tensor cores add up in fp32 themselves.
    """
    if by_fixed_kernels(x, weight):
        return linear_fixed(x, weight, out_dtype=torch.float32)
    if x.is_cuda and x.dtype == weight.dtype and not torch.is_grad_enabled():
        return torch.mm(x.flatten(0, -2), weight.t(), out_dtype=torch.float32).unflatten(0, x.shape[:-1])
    full = x.float()
    return torch.cat([F.linear(full, rows.float()) for rows in weight.split(ROWS)], -1)


def _usable(x: Tensor, weights: Sequence[Tensor]) -> bool:
    if x.device.type != "cpu" or not _ONEDNN or torch.is_grad_enabled() or x.numel() == 0:
        return False
    return x.dtype in _TYPES and all(w.dtype == x.dtype and type(w) in _PLAIN for w in weights)


_PLAIN = (Tensor, torch.nn.Parameter)
_TYPES = (torch.float32, torch.bfloat16)
_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
