"""Repairs to Triton 3.6's interpreter, so that kernels written for GPUs run in it as they stand, and what makes it quicker."""

from __future__ import annotations

import inspect
import math
import sys
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


def hasten() -> None:
    """Most of the interpreter's time goes into what comes out the same every time: looking through `tl` for what to
    patch at each call of a device function, the types and shapes of blocks, and the NumPy types that stand for them.
    From here on, in this process, it is looked up."""
    module = sys.modules.get("triton.runtime.interpreter")
    if module is None or hasattr(module, "hastened"):
        return
    module.hastened = True
    core = module.tl.core
    patch, dtype_of, block = module._patch_lang, module._get_np_dtype, core.block_type.__init__
    spread = module.TritonSemantic.broadcast_impl_value
    launch: list[Any] = []  # the scope of the launch under way
    patched: set[int] = set()  # the globals it was opened for
    builtins: dict[Any, list[str]] = {}
    dtypes: dict[str, Any] = {}
    blocks: dict[tuple[Any, ...], dict[str, Any]] = {}
    shapes: dict[tuple[int, ...], tuple[Any, Any]] = {}

    def patch_lang(fn: Any) -> Any:
        if id(fn.__globals__) not in patched:
            scope = patch(fn)
            patched.add(id(fn.__globals__))
            if launch:  # a device function's are undone with the launch
                launch[0]._changes += scope._changes
            else:
                launch.append(scope)
                scope.restore = lambda undo=scope.restore: (undo(), launch.clear(), patched.clear())
        return launch[0]

    def patch_builtin(package: Any, builder: Any, scope: Any) -> None:
        if package not in builtins:
            members = inspect.getmembers(package)
            builtins[package] = [name for name, member in members if core.is_builtin(member)]
        for name in builtins[package]:
            member = getattr(package, name)
            if core.is_builtin(member):  # one that is patched already is none any more
                module._patch_attr(package, name, member, builder, scope)

    def np_dtype(dtype: Any) -> Any:
        if dtype.name not in dtypes:
            dtypes[dtype.name] = dtype_of(dtype)
        return dtypes[dtype.name]

    def block_type(self: Any, element_ty: Any, shape: Any) -> None:
        key = element_ty.name, *[size.value if isinstance(size, core.constexpr) else size for size in shape]
        if key not in blocks:
            block(self, element_ty, shape)
            blocks[key] = vars(self).copy()
        vars(self).update(blocks[key])
        self.element_ty = element_ty

    def tensor(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        shape = tuple(type.shape) if type.is_block() else ()
        if shape not in shapes:
            sizes = core.tuple([core.constexpr(size) for size in shape])
            shapes[shape] = sizes, core.constexpr(math.prod(shape))
        self.shape, self.numel = shapes[shape]

    def broadcast(self: Any, lhs: Any, rhs: Any) -> Any:
        return (lhs, rhs) if lhs.shape is rhs.shape else spread(self, lhs, rhs)

    module.TritonSemantic.broadcast_impl_value = broadcast
    module._patch_lang, module._patch_builtin, module._get_np_dtype = patch_lang, patch_builtin, np_dtype
    core.block_type.__init__, core.tensor.__init__ = block_type, tensor
