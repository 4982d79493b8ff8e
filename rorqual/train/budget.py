"""What a run will take: bytes by what they are for, and FLOPs a token.

Weights, gradients and what the optimizer keeps are exact: they are made on the meta device and counted. Activations are
an estimate of what the plain forward pass keeps for the backward one, nothing recomputed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rorqual.family.account import flops
from rorqual.family.parts import GQA, MLA, Attention, FeedForward, ModelConfig, SwiGLU
from rorqual.family.pieces import all_mtp_pieces
from rorqual.nn import Transformer
from rorqual.train.loss import CHUNK, CHUNK_GPU
from rorqual.train.optim import Optimizer
from rorqual.train.recipe import Recipe

PEAKS = {
    "B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "H800": 989e12, "H20": 148e12,
    "A100": 312e12, "A800": 312e12, "L40S": 362e12, "RTX 4090": 165e12,
}  # fmt: skip
"""Dense bf16 FLOPs a second by a part of the device's name, as their makers state them; the first that fits."""


def peak(device: torch.device | str) -> float | None:
    """Dense bf16 FLOPs a second of a GPU that is known, else None."""
    if torch.device(device).type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((rate for known, rate in PEAKS.items() if known in name), None)


def flops_per_token(config: ModelConfig, length: int) -> float:
    """FLOPs of training on a token, forward and backward: three times the forward's, at the mean context of a sequence
    of `length`. Every MTP module counts as its layer and one more head."""
    context = (length + 1) // 2
    main = flops(config, context, absorbed=False)
    further = sum(
        2 * piece.used for piece in all_mtp_pieces(config) if piece.product and piece.part != "copy"
    )
    heads = 2 * config.vocab * config.hidden * len(config.mtp)
    attention = (main.attention + main.index) * (1 + len(config.mtp) / len(config.layers))
    return 3.0 * (main.matmul + further + heads + attention)


@dataclass(frozen=True)
class Memory:
    """Bytes on the device, and `ema` on the CPU."""

    weights: int
    gradients: int
    master: int
    moments: int
    activations: int
    loss: int
    ema: int

    @property
    def total(self) -> int:
        """All that the device holds at once."""
        return self.weights + self.gradients + self.master + self.moments + self.activations + self.loss


def memory(recipe: Recipe, device: torch.device | str = "cpu") -> Memory:
    """What a recipe takes on a kind of device, at its longest sequences."""
    config, dtype = recipe.config, getattr(torch, recipe.dtype)
    model = Transformer(config, dtype=dtype, device="meta")
    learnt = [(name, p) for name, p in model.named_parameters() if recipe.moves(name)]
    state = Optimizer(learnt, recipe.optimizer).tensors()
    weights = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    gradients = sum(p.numel() * p.element_size() for _, p in learnt)
    if recipe.micro < max(
        max(s.batch, s.to or 0) for s in recipe.stages
    ):  # those of a micro-batch beside their sums
        gradients += sum(p.numel() * max(4, p.element_size()) for _, p in learnt)
    master = sum(t.numel() * t.element_size() for name, t in state.items() if name.endswith(".master"))
    tokens = max(min(recipe.micro, max(s.batch, s.to or 0)) * s.length for s in recipe.stages)
    wide = max(4, dtype.itemsize)
    on_gpu = torch.device(device).type == "cuda"  # where the gradient is written over the logits
    chunk, each = (CHUNK_GPU, dtype.itemsize) if on_gpu else (CHUNK, wide + 2 * dtype.itemsize)
    logits = min(chunk, tokens * config.vocab) * each
    return Memory(
        weights=weights + (2 * sum(p.numel() for p in model.layers.parameters()) if recipe.fp8 else 0),
        gradients=gradients,
        master=master,
        moments=sum(t.numel() * t.element_size() for t in state.values()) - master,
        activations=int(tokens * activations(config) * dtype.itemsize),
        loss=logits + config.vocab * config.hidden * wide,
        ema=4 * sum(p.numel() for p in model.parameters()) if recipe.ema is not None else 0,
    )


def activations(config: ModelConfig) -> float:
    """Elements a token that the forward pass keeps, about: the inputs of matrices, norms and products."""
    d, streams = config.hidden, config.residual.streams if config.residual is not None else 0
    total = 4.0 * d  # the final norm, the head's input and its gradient
    for layer in (*config.layers, *config.mtp):
        total += 4 * d + _attention(layer.attention) + _feed_forward(layer.ff, d)
        total += 2 * 8 * streams * d  # streams are mixed in fp32, before and after both parts
    return total + len(config.mtp) * 8 * d


def _attention(a: Attention) -> int:
    """Queries, keys and values, before and after they are turned, and the result."""
    if isinstance(a, GQA):
        return (2 * a.heads + 2 * a.kv_heads) * a.head_dim
    if isinstance(a, MLA):
        low = 2 * (a.q_rank or 0) + 2 * a.kv_rank + a.rope_dim
        return low + a.heads * (3 * a.qk_dim + a.nope_dim + 3 * a.v_dim)
    return 2 * a.q_rank + a.heads * a.head_dim * 4 + 4 * a.head_dim + a.o_groups * a.o_rank


def _feed_forward(ff: FeedForward, d: int) -> int:
    """Gate, its SiLU, the other half and their product; experts also get their tokens copied."""
    if isinstance(ff, SwiGLU):
        return 4 * ff.width
    return ff.top_k * (5 * ff.width + 2 * d) + 4 * ff.shared * ff.width + 6 * ff.routed
