"""Multi-token prediction: one more layer that predicts the token after next (V3 report 2.2; facts 3.4, 3.9)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rorqual.family.parts import Layer, ModelConfig
from rorqual.nn.block import Block
from rorqual.nn.cache import LayerCache
from rorqual.nn.hyper import MixHead
from rorqual.nn.linear import Linear
from rorqual.nn.norm import RMSNorm
from rorqual.nn.paged import Store
from rorqual.nn.step import Step


class MTP(nn.Module):
    """Joins a token's hidden state with the next token's embedding, and runs one layer on it.

    V3 (no residual streams): projects [norm(embedding) ; norm(hidden)] by one matrix. The hidden state is
    the one after the final norm. V4: projects both apart, the embedding for all streams alike, and reads
    the raw streams. Embedding and head are the main model's; the final norm (and V4's stream head) its own.
    """

    def __init__(self, config: ModelConfig, layer: Layer) -> None:
        super().__init__()
        hidden, eps = config.hidden, config.norm_eps
        self.embed_norm = RMSNorm(hidden, eps)
        self.hidden_norm = RMSNorm(hidden, eps)
        self.streams = config.residual is not None
        if config.residual is None:
            self.project = Linear(2 * hidden, hidden)
            self.mix_head = None
        else:
            self.embed_project = Linear(hidden, hidden)
            self.hidden_project = Linear(hidden, hidden)
            self.mix_head = MixHead(hidden, config.residual, eps)
        self.block = Block(config, layer)
        self.norm = RMSNorm(hidden, eps)

    def forward(
        self, state: Tensor, embed_BTD: Tensor, ids_BT: Tensor, step: Step, cache: LayerCache | Store | None
    ) -> tuple[Tensor, Tensor]:
        """`state` of token i ([B, T, D] or streams [B, T, n, D]) with embedding and id of token i + 1.

        Returns the normed hidden state for the head [B, T, D], and the state for the next depth.
        """
        if self.streams:
            joined = self.embed_project(self.embed_norm(embed_BTD))[:, :, None]
            joined = joined + self.hidden_project(self.hidden_norm(state))
        else:
            joined = self.project(torch.cat((self.embed_norm(embed_BTD), self.hidden_norm(state)), -1))
        after = self.block(joined, ids_BT, step, cache)
        normed = self.norm(after if self.mix_head is None else self.mix_head(after))
        return normed, (after if self.streams else normed)
