"""One transformer layer: norm, attention, residual; norm, feed-forward, residual."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from rorqual.family import parts
from rorqual.family.parts import Layer, ModelConfig
from rorqual.nn import single
from rorqual.nn.cache import LayerCache
from rorqual.nn.compressed import CompressedAttention
from rorqual.nn.errors import InputError
from rorqual.nn.gqa import GQA
from rorqual.nn.hyper import Mix
from rorqual.nn.mla import MLA
from rorqual.nn.mlp import SwiGLU
from rorqual.nn.moe import MoE
from rorqual.nn.norm import RMSNorm
from rorqual.nn.paged import Store
from rorqual.nn.step import Step

AttentionBrick = GQA | MLA | CompressedAttention


def build_attention(hidden: int, part: parts.Attention, eps: float) -> AttentionBrick:
    """The brick of an attention part."""
    match part:
        case parts.GQA():
            return GQA(hidden, part, eps)
        case parts.MLA():
            return MLA(hidden, part, eps)
        case parts.CompressedAttention():
            return CompressedAttention(hidden, part, eps)
    raise InputError(f"no brick for attention part {part!r}")


class Block(nn.Module):
    """Attention and feed-forward on a residual: plain `[B, T, D]`, or streams `[B, T, n, D]` (V4)."""

    def __init__(self, config: ModelConfig, layer: Layer) -> None:
        super().__init__()
        hidden, eps = config.hidden, config.norm_eps
        self.attention_norm = RMSNorm(hidden, eps)
        self.attention = build_attention(hidden, layer.attention, eps)
        self.ff_norm = RMSNorm(hidden, eps)
        self.ff: SwiGLU | MoE
        if isinstance(layer.ff, parts.MoE):
            self.ff = MoE(hidden, config.vocab, layer.ff)
        else:
            self.ff = SwiGLU(hidden, layer.ff.width, layer.ff.limit)
        self.whole = True
        """Whether all of the layer is here, none of it on other ranks (`nn.spread`)."""
        self.attention_mix = Mix(hidden, config.residual, eps) if config.residual else None
        self.ff_mix = Mix(hidden, config.residual, eps) if config.residual else None

    def forward(self, x: Tensor, ids_BT: Tensor, step: Step, cache: LayerCache | Store | None) -> Tensor:
        if self.attention_mix is None or self.ff_mix is None:
            x = x + step.attend(self.attention, self.attention_norm(x), cache)
            return x + self._feed(self.ff_norm(x), ids_BT, step)
        inner, post, comb = self.attention_mix.read(x)
        y = step.attend(self.attention, self.attention_norm(inner), cache)
        x = self.attention_mix.write(x, y, post, comb)
        inner, post, comb = self.ff_mix.read(x)
        return self.ff_mix.write(x, self._feed(self.ff_norm(inner), ids_BT, step), post, comb)

    def deferred(
        self, x: Tensor, pending: Tensor | None, ids_BT: Tensor, step: Step, cache: Any
    ) -> tuple[Tensor, Tensor | None]:
        """`forward` on x + `pending`, with its own last sum left to whoever comes next: each sum then goes with
        the norm after it. Returns the residual and what is still to be added, if anything."""
        if self.whole and single.fits(x, step):
            total = x if pending is None else x + pending
            after = single.attend(self.attention, self.attention_norm, total, step, cache)
            if after is not None:
                fed = single.feed(self.ff, self.ff_norm, after, ids_BT, step)
                return (after, self._feed(self.ff_norm(after), ids_BT, step)) if fed is None else (fed, None)
        if pending is None:
            normed = self.attention_norm(x)
        else:
            normed, x = self.attention_norm.after_add(pending, x)
        normed, x = self.ff_norm.after_add(step.attend(self.attention, normed, cache), x)
        return x, self._feed(normed, ids_BT, step)

    def _feed(self, x_BTD: Tensor, ids_BT: Tensor, step: Step) -> Tensor:
        return self.ff(x_BTD, ids_BT, step) if isinstance(self.ff, MoE) else self.ff(x_BTD)
