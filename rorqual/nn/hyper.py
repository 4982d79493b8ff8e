"""Manifold-constrained hyper-connections: several residual streams, mixed by a doubly stochastic matrix
(V4 report section 2.2; facts 3.9). All in fp32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rorqual.family.parts import HyperConnection
from rorqual.kernels.gpu import usable
from rorqual.kernels.mix import mix_read, mix_write
from rorqual.kernels.mode import by_fixed_kernels
from rorqual.nn.linear import Pinned
from rorqual.nn.norm import unit_rms, upcast


def sinkhorn(raw: Tensor, iterations: int, eps: float) -> Tensor:
    """`[..., n, n]` -> nearly doubly stochastic. First a row softmax (+ eps) and a column division, then
    rows and columns in turn, `iterations` rounds in all."""
    m = raw.softmax(-1) + eps
    m = m / (m.sum(-2, keepdim=True) + eps)
    for _ in range(iterations - 1):
        m = m / (m.sum(-1, keepdim=True) + eps)
        m = m / (m.sum(-2, keepdim=True) + eps)
    return m


class Mix(Pinned):
    """Reads one layer input from n streams and writes the layer's output back to them."""

    def __init__(self, hidden: int, part: HyperConnection, eps: float) -> None:
        super().__init__()
        n = part.streams
        self.part, self.eps = part, eps
        self.fn = nn.Parameter(torch.empty(n * (2 + n), n * hidden, dtype=torch.float32))
        self.base = nn.Parameter(torch.empty(n * (2 + n), dtype=torch.float32))
        self.scale = nn.Parameter(torch.empty(3, dtype=torch.float32))

    def read(self, x_BTnD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Layer input [B, T, D], and what `write` needs: post [B, T, n] and comb [B, T, n, n]."""
        n = self.part.streams
        if not torch.is_grad_enabled() and usable(x_BTnD):
            inner, post, comb = mix_read(
                x_BTnD.flatten(0, 1).contiguous(),
                self.fn,
                self.base,
                self.scale,
                self.eps,
                self.part.eps,
                self.part.iterations,
            )
            lead = x_BTnD.shape[:2]
            return inner.unflatten(0, lead), post.unflatten(0, lead), comb.unflatten(0, lead)
        full = upcast(x_BTnD)
        u = F.linear(unit_rms(full.flatten(-2), self.eps), self.fn.to(full.dtype))
        pre, post, comb = u.split((n, n, n * n), -1)
        base_pre, base_post, base_comb = self.base.split((n, n, n * n))
        pre = torch.sigmoid(self.scale[0] * pre + base_pre) + self.part.eps
        post = 2 * torch.sigmoid(self.scale[1] * post + base_post)
        comb = (self.scale[2] * comb + base_comb).unflatten(-1, (n, n))
        comb = sinkhorn(comb, self.part.iterations, self.part.eps)
        return (pre[..., None] * full).sum(-2).to(x_BTnD.dtype), post, comb

    @staticmethod
    def write(x_BTnD: Tensor, y_BTD: Tensor, post: Tensor, comb: Tensor) -> Tensor:
        """New streams X_k = post_k y + sum_j comb[j, k] X_j."""
        if not torch.is_grad_enabled() and usable(x_BTnD):
            flat = (t.flatten(0, 1).contiguous() for t in (x_BTnD, y_BTD, post, comb))
            return mix_write(*flat).view(x_BTnD.shape)
        full = upcast(x_BTnD)
        kept = comb.transpose(-1, -2) @ full
        return (post[..., None] * y_BTD[..., None, :].to(full.dtype) + kept).to(x_BTnD.dtype)


class MixHead(Pinned):
    """Folds the streams into one hidden state at the end of the model."""

    def __init__(self, hidden: int, part: HyperConnection, eps: float) -> None:
        super().__init__()
        n = part.streams
        self.part, self.eps = part, eps
        self.fn = nn.Parameter(torch.empty(n, n * hidden, dtype=torch.float32))
        self.base = nn.Parameter(torch.empty(n, dtype=torch.float32))
        self.scale = nn.Parameter(torch.empty(1, dtype=torch.float32))

    def forward(self, x_BTnD: Tensor) -> Tensor:
        if by_fixed_kernels(x_BTnD):
            return self._read(x_BTnD)
        full = upcast(x_BTnD)
        u = F.linear(unit_rms(full.flatten(-2), self.eps), self.fn.to(full.dtype))
        weight = torch.sigmoid(self.scale * u + self.base) + self.part.eps
        return (weight[..., None] * full).sum(-2).to(x_BTnD.dtype)

    def _read(self, x_BTnD: Tensor) -> Tensor:
        """The same by the kernel of `Mix.read`, whose order of sums is fixed: what a layer reads is folded alike."""
        n, e = self.part.streams, self.part.eps
        more = n + n * n  # what a layer's mix makes beside: of no account here
        fn, base, scale = (
            F.pad(self.fn, (0, 0, 0, more)),
            F.pad(self.base, (0, more)),
            F.pad(self.scale, (0, 2)),
        )
        inner, _, _ = mix_read(x_BTnD.flatten(0, 1).contiguous(), fn, base, scale, self.eps, e, 1)
        return inner.unflatten(0, x_BTnD.shape[:2])
