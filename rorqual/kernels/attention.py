"""Causal attention over whole sequences with gradients: cuDNN's on GPUs that have it, PyTorch's choice elsewhere.

The two halves stand apart, for bricks that write their own backward pass and so decide what is kept between them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten


class Kept(NamedTuple):
    """What the backward pass needs beside queries, keys, values and output. `numbers` only with cuDNN."""

    tensors: tuple[Tensor, ...] = ()
    numbers: tuple[int, ...] = ()


def by_cudnn(q_BHTd: Tensor, v_BHTe: Tensor) -> bool:
    """Whether cuDNN has both passes: 16-bit numbers on a Hopper GPU or later, heads of up to 192 and 128 channels."""
    return (
        q_BHTd.is_cuda
        and q_BHTd.dtype in (torch.bfloat16, torch.float16)
        and torch.cuda.get_device_capability(q_BHTd.device)[0] >= 9
        and torch.backends.cudnn.is_available()
        and (q_BHTd.shape[-1], v_BHTe.shape[-1]) in ((192, 128), (128, 128), (64, 64))
    )


def forward(q_BHTd: Tensor, k_BHTd: Tensor, v_BHTe: Tensor, scale: float) -> tuple[Tensor, Kept]:
    """softmax(scale q k^T, causal) v: `[B, H, T, e]`, and what `backward` needs. Strides are free but the last."""
    if not by_cudnn(q_BHTd, v_BHTe):
        return F.scaled_dot_product_attention(q_BHTd, k_BHTd, v_BHTe, is_causal=True, scale=scale), Kept()
    o, lse, cum_q, cum_k, max_q, max_k, seed, offset, _ = aten._scaled_dot_product_cudnn_attention(
        q_BHTd, k_BHTd, v_BHTe, None, True, 0.0, True, False, scale=scale
    )
    tensors = tuple(t if t is not None else q_BHTd.new_empty(0) for t in (lse, cum_q, cum_k, seed, offset))
    return o, Kept(tensors, (int(max_q), int(max_k), cum_q is None))


def backward(
    slope: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, kept: Kept, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v from that of the output."""
    if not kept.tensors:
        with torch.enable_grad():
            q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
            again = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        dq, dk, dv = torch.autograd.grad(again, (q, k, v), slope)
        return dq, dk, dv
    lse, cum_q, cum_k, seed, offset = kept.tensors
    max_q, max_k, without = kept.numbers
    cum: Any = (None, None) if without else (cum_q, cum_k)
    dq, dk, dv = aten._scaled_dot_product_cudnn_attention_backward(
        slope, q, k, v, o, lse, seed, offset, None, *cum, max_q, max_k, 0.0, True, scale=scale
    )
    return dq, dk, dv
