"""Repairs to Triton 3.6's interpreter, so that kernels written for GPUs run in it as they stand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

KINDS = {
    "bf16": (torch.bfloat16, torch.int16, "uint16"),
    "fp8e4nv": (torch.float8_e4m3fn, torch.uint8, "uint8"),
}


def repair(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loop bounds from one-element arrays (NumPy 2.4 refuses them), products of bf16 (the interpreter multiplies
    their bits), rounding to nearest (it cuts off), and fused multiply-adds (it rounds the product, too)."""
    module = pytest.importorskip("triton.runtime.interpreter")
    patch, dot, convert = (
        module._patch_lang_tensor,
        module.InterpreterBuilder.create_dot,
        module._convert_float,
    )

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def wide(x: Any) -> Any:
        if x.dtype.scalar.name != "bf16":
            return x
        return module.TensorHandle((x.data.astype("uint32") << 16).view("float32"), module.tl.float32)

    def nearest(data: Any, source: Any, target: Any, mode: Any) -> Any:
        if source.name != "fp32" or target.name not in KINDS:
            return convert(data, source, target, mode)
        kind, bits, numpy = KINDS[target.name]
        return torch.tensor(data).to(kind).view(bits).numpy().view(numpy)

    def fused(self: Any, *args: Any) -> Any:
        x, y, z = (a.data.astype("float64") for a in args)  # whose products of fp32 are exact
        return module.TensorHandle((x * y + z).astype(args[0].data.dtype), args[0].dtype.scalar)

    monkeypatch.setattr(module, "_patch_lang_tensor", patched)
    monkeypatch.setattr(module.InterpreterBuilder, "create_fma", fused)
    monkeypatch.setattr(module, "_convert_float", nearest)
    monkeypatch.setattr(
        module.InterpreterBuilder, "create_dot", lambda self, a, b, *rest: dot(self, wide(a), wide(b), *rest)
    )
