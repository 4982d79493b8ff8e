"""Matrices: plain, stacked by expert, and held as the codes of a quantised checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rorqual.kernels import fp8_train
from rorqual.kernels.experts import Weights
from rorqual.kernels.fixed import linear_fixed
from rorqual.kernels.fp8_linear import fp8_linear
from rorqual.kernels.linear import Pack, linear, linear_in_fp32, linears
from rorqual.kernels.mode import by_fixed_kernels, learns_in_fp8
from rorqual.kernels.quant import FP4_BLOCK, dequantize_fp4, dequantize_fp8


def keeping_types(fn: Callable[[Tensor], Tensor], any_type: bool = False) -> Callable[[Tensor], Tensor]:
    """`fn` of `nn.Module._apply` (what `.to`, `.half`, `.cuda` … do) without its casts: to a lower precision,
    or with `any_type` to any other type."""

    def moved(t: Tensor) -> Tensor:
        out = fn(t)
        cast = out.dtype != t.dtype and (any_type or out.element_size() < t.element_size())
        return t.to(out.device) if cast else out

    return moved


class Pinned(nn.Module):
    """A module whose own parameters (not its children's) stay in fp32 when the model is cast lower."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        own, kept = {id(p) for p in self.parameters(recurse=False)}, keeping_types(fn)
        return super()._apply(lambda t: kept(t) if id(t) in own else fn(t), recurse)


class Matrix(nn.Module):
    """A weight `[..., out, in]` that may be held as codes and scales.

    Plain: `.weight` in the model's type, `.scale` is None. Held as codes (`hold_codes`): `.weight` has
    the checkpoint's FP8 codes, or two FP4 codes a byte, and `.scale` one number a block; `matrix()`
    multiplies them out. Codes take no gradient.
    """

    scale: nn.Parameter | None

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(*shape))
        self.register_parameter("scale", None)
        self.block: tuple[int, int] | None = None
        self.fp4 = False

    @property
    def held_as_codes(self) -> bool:
        """Whether the weight is stored quantised."""
        return self.scale is not None

    def hold_codes(
        self,
        code_dtype: torch.dtype,
        scale_dtype: torch.dtype,
        block: tuple[int, int],
        packed_fp4: bool = False,
    ) -> None:
        """Replace the weight by room for codes and scales, on the same device.

        FP8: codes `[..., out, in]`, scales `[..., ceil(out/block0), ceil(in/block1)]`.
        FP4: codes `[..., out, in/2]` (two a byte), scales `[..., out, in/32]`.
        """
        *lead, rows, columns = self.weight.shape
        device = self.weight.device
        if packed_fp4:
            codes, scales = (*lead, rows, columns // 2), (*lead, rows, columns // FP4_BLOCK)
        else:
            codes, scales = (*lead, rows, columns), (*lead, -(-rows // block[0]), -(-columns // block[1]))
        self.weight = nn.Parameter(torch.empty(codes, dtype=code_dtype, device=device), requires_grad=False)
        self.scale = nn.Parameter(torch.empty(scales, dtype=scale_dtype, device=device), requires_grad=False)
        self.block, self.fp4 = block, packed_fp4

    def matrix(self, dtype: torch.dtype, index: int | None = None) -> Tensor:
        """The weight in `dtype`, multiplied out if held as codes; only matrix `index` of a stack if given."""
        weight: Tensor = self.weight
        scale: Tensor | None = self.scale
        if index is not None:
            weight, scale = weight[index], scale[index] if scale is not None else None
        if scale is None:
            return weight if weight.dtype == dtype else weight.to(dtype)
        if self.fp4:
            return dequantize_fp4(weight, scale, dtype)
        assert self.block is not None
        return dequantize_fp8(weight, scale, self.block, dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Codes and scales move between devices, but a cast of the model leaves them as they are."""
        if self.scale is None:
            return super()._apply(fn, recurse)
        codes, kept = (id(self.weight), id(self.scale)), keeping_types(fn, any_type=True)
        return super()._apply(lambda t: kept(t) if id(t) in codes else fn(t), recurse)


class Embedding(nn.Module):
    """Token ids `[...]` -> rows of `.weight` `[V, D]`."""

    def __init__(self, vocab: int, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab, hidden))

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)


class Linear(Matrix):
    """x `[..., in]` -> `[..., out]`. `.weight` is `[out, in]`."""

    bias: nn.Parameter | None

    def __init__(self, inputs: int, outputs: int, bias: bool = False) -> None:
        super().__init__(outputs, inputs)
        self.register_parameter("bias", nn.Parameter(torch.empty(outputs)) if bias else None)
        self.pack = Pack()

    def forward(self, x: Tensor) -> Tensor:
        if self.scale is None:
            if learns_in_fp8():
                y = fp8_train.linear(x, self.weight)
                return y if self.bias is None else y + self.bias
            return linear(x, self.weight, self.bias, self.pack)
        if x.is_cuda and not self.fp4 and not torch.is_grad_enabled():
            assert self.block is not None
            y = fp8_linear(x.flatten(0, -2), self.weight, self.scale, self.block, self.bias)
            return y.unflatten(0, x.shape[:-1])
        return linear(x, self.matrix(x.dtype), self.bias)

    def in_full(self, x: Tensor) -> Tensor:
        """x times the matrix as if both were fp32 (fp64 stays), without the bias: fp32 `[..., out]`."""
        full = x if x.dtype in (torch.float32, torch.float64) else x.float()
        if by_fixed_kernels(x, self.weight):
            weight = self.weight if self.scale is None else self.matrix(full.dtype)
            return linear_fixed(x, weight, out_dtype=full.dtype)
        if (
            x.is_cuda
            and x.dtype in (torch.bfloat16, torch.float16)
            and self.scale is None
            and self.weight.dtype == x.dtype
        ):
            return linear_in_fp32(x, self.weight)
        return F.linear(full, self.matrix(full.dtype))


def together(x: Tensor, pack: Pack, *layers: Linear) -> Sequence[Tensor]:
    """x through several `Linear`s that read the same input; on the CPU in one product."""
    if learns_in_fp8() or any(layer.scale is not None for layer in layers):
        return [layer(x) for layer in layers]
    return linears(x, [layer.weight for layer in layers], [layer.bias for layer in layers], pack)


class GroupedLinear(Matrix):
    """One matrix an expert: `.weight` is `[experts, out, in]`. Used by `Experts`."""

    def __init__(self, experts: int, inputs: int, outputs: int) -> None:
        super().__init__(experts, outputs, inputs)

    def stack(self) -> Weights:
        """What `kernels.experts` takes."""
        return Weights(self.weight, self.scale, self.block)
