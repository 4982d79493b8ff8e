"""The feed-forward brick every generation uses: SwiGLU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rorqual.kernels import experts_grad, fp8_train, fuse
from rorqual.kernels.gpu import usable
from rorqual.kernels.linear import Pack
from rorqual.kernels.mode import learns_in_fp8
from rorqual.nn.linear import Linear, together
from rorqual.nn.norm import upcast


def swiglu(gate: Tensor, up: Tensor, limit: float | None) -> Tensor:
    """silu(gate) * up. With `limit` (V4) gate is clamped from above, up on both sides, all in fp32."""
    if not torch.is_grad_enabled() and usable(gate, up):
        return fuse.swiglu(gate.flatten(0, -2), up.flatten(0, -2), limit).view(gate.shape)
    if limit is None:
        return F.silu(gate) * up
    return (F.silu(upcast(gate).clamp(max=limit)) * upcast(up).clamp(-limit, limit)).to(gate.dtype)


class SwiGLU(nn.Module):
    """x `[..., D]` -> `[..., D]` through `width` gated channels."""

    def __init__(self, hidden: int, width: int, limit: float | None = None) -> None:
        super().__init__()
        self.gate = Linear(hidden, width)
        self.up = Linear(hidden, width)
        self.down = Linear(width, hidden)
        self.limit = limit
        self.pack = Pack()

    def alike(self) -> tuple[Linear, ...]:
        """The matrices that read the same rows."""
        return self.gate, self.up

    def forward(self, x: Tensor) -> Tensor:
        matrices = self.gate.weight, self.up.weight, self.down.weight
        if learns_in_fp8() and self.gate.scale is None:
            return fp8_train.swiglu_trained(x.flatten(0, -2), *matrices, self.limit).view(x.shape)
        if torch.is_grad_enabled() and experts_grad.supported(x, *matrices):
            return experts_grad.swiglu_trained(x.flatten(0, -2), *matrices, self.limit).view(x.shape)
        gate, up = together(x, self.pack, self.gate, self.up)
        return self.down(swiglu(gate, up, self.limit))
