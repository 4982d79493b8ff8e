"""What router logits become: affinities, by a score function, and their slopes (V3 report 2.1.2; facts 3.3, 3.9)."""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from rorqual.kernels.gpu import tl, triton


def affinities(logits: Tensor, kind: str) -> Tensor:
    """Affinities from logits `[..., E]`: "softmax", "sigmoid" or "sqrtsoftplus"."""
    if kind == "softmax":
        return logits.softmax(-1)
    return logits.sigmoid() if kind == "sigmoid" else F.softplus(logits).sqrt()


@triton.jit
def affinities_and_slopes(logit, real, SCORE: tl.constexpr):
    """Affinities of rows of logits, 0 where not `real`, and their slopes, softmax's without what a row shares."""
    if SCORE == "softmax":
        grown = tl.where(real, tl.exp(logit - tl.max(tl.where(real, logit, -1e30), 1)[:, None]), 0.0)
        score = grown / tl.maximum(tl.sum(grown, 1), 1e-30)[:, None]
        slope = score
    elif SCORE == "sigmoid":
        score = 1.0 / (1.0 + tl.exp(-logit))
        slope = score * (1.0 - score)
    else:
        grown = tl.exp(tl.minimum(logit, 20.0))
        small = grown * (1.0 - grown * (0.5 - grown * (1.0 / 3 - grown * (0.25 - grown * 0.2))))
        soft = tl.where(logit > 20.0, logit, tl.where(grown < 0.03, small, tl.log(1.0 + grown)))
        score = tl.sqrt(soft)
        slope = tl.where(score > 0, 0.5 / (1.0 + tl.exp(-logit)) / tl.where(score > 0, score, 1.0), 0.0)
    return tl.where(real, score, 0.0), slope
