"""Fresh weights for training from scratch."""

from __future__ import annotations

import torch
from torch import nn

from rorqual.nn.compressed import CompressedAttention
from rorqual.nn.compressor import Compressor
from rorqual.nn.hyper import Mix, MixHead
from rorqual.nn.linear import Embedding, Linear, Matrix
from rorqual.nn.norm import LayerNorm, RMSNorm
from rorqual.nn.router import Router


@torch.no_grad()
def init_weights(model: nn.Module, std: float, device: torch.device, seed: int | None = None) -> None:
    """Matrices normal of deviation `std`, norms one, biases zero.

    Hyper-connections start as a plain residual: streams read alike, written alike and mostly kept apart.
    Hash tables spread token ids evenly, with distinct experts in a row.
    """
    generator = torch.Generator(device=device)
    generator.manual_seed(torch.initial_seed() % 2**63 if seed is None else seed)

    def normal(p: torch.Tensor) -> None:
        p.normal_(0.0, std, generator=generator)

    for module in model.modules():
        match module:
            case Linear():
                normal(module.weight)
                if module.bias is not None:
                    module.bias.zero_()
            case Matrix() | Embedding():
                normal(module.weight)
            case LayerNorm():
                module.weight.fill_(1.0)
                module.bias.zero_()
            case RMSNorm():
                module.weight.fill_(1.0)
            case Router():
                normal(module.weight)
                if module.bias is not None:
                    module.bias.zero_()
                if module.table is not None:
                    _spread(module.table, module.weight.shape[0])
            case Compressor():
                module.ape.zero_()
            case CompressedAttention():
                module.sink.zero_()
            case Mix():
                n = module.part.streams
                normal(module.fn)
                module.base.zero_()
                module.base[2 * n :] = 4.0 * torch.eye(n, device=module.base.device).flatten()
                module.scale.fill_(0.01)
            case MixHead():
                normal(module.fn)
                module.base.zero_()
                module.scale.fill_(0.01)


def _spread(table_VK: torch.Tensor, experts: int) -> None:
    """Token v gets experts v * 7919 + k * stride mod E: distinct in a row, even over the vocabulary."""
    vocab, chosen = table_VK.shape
    token = torch.arange(vocab, device=table_VK.device)[:, None] * 7919
    table_VK.copy_((token + torch.arange(chosen, device=table_VK.device)) % experts)
