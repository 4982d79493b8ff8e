"""The arithmetic of drawing a token: pure functions of tensors, row by row, without a device-to-host sync.

Two things make a row's result independent of the batch it stands in, bit for bit. Randomness is a hash of
(seed, index of the token in its answer, stream), so it has no state to share. And sums over the vocabulary
are sums of whole numbers: a probability is rounded to a multiple of 2^-60, and whole numbers add up to the
same in any order, where a GPU's order of floating-point sums changes with the number of rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

TARGET, DRAFT, ACCEPT, RESIDUAL = range(4)
"""Streams: the model's own draw, a drafted token, the test whether a draft stands, what replaces one."""

_GOLDEN, _MIX1, _MIX2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_ONE = 2.0**60
"""Probability one as a whole number; a row's sum may reach eight before it overflows."""

_BLOCK = 256
"""Tokens a block of the two-level search in `pick`."""

_AT_ONCE = 64
"""Rows that `filtered` works on together: bounds its memory, about 40 bytes a token and row."""


def key_of(seed: int) -> int:
    """Where the sequence of numbers of `seed` starts, as a signed 64-bit number: neighbouring seeds are far apart."""
    x = (seed + _GOLDEN) % 2**64
    x = (x ^ (x >> 30)) * _MIX1 % 2**64
    x = (x ^ (x >> 27)) * _MIX2 % 2**64
    return _signed(x ^ (x >> 31))


def uniforms(key_R: Tensor, index_R: Tensor, stream: int) -> Tensor:
    """Numbers in [0, 1), fp64 [R], the same on every device: SplitMix64 (Steele, Lea and Flood, 2014), its
    sequence from `key_R` on entered at the place that token `index_R` and the stream have in it."""
    x = key_R + (index_R * 4 + stream) * _signed(_GOLDEN)
    x = (x ^ _shifted(x, 30)) * _signed(_MIX1)
    x = (x ^ _shifted(x, 27)) * _signed(_MIX2)
    return _shifted(x ^ _shifted(x, 31), 11).double() * 2.0**-53


def _signed(x: int) -> int:
    return x - 2**64 if x >= 2**63 else x


def _shifted(x: Tensor, by: int) -> Tensor:
    """Right shift that brings in zeros (torch's own brings in the sign)."""
    return (x >> by) & ((1 << (64 - by)) - 1)


def pick(p_RV: Tensor, u_R: Tensor) -> Tensor:
    """The token of each row at which the running sum of `p_RV` first exceeds `u_R` of the whole, [R] int64.

    Rows need not sum to one. A token of probability zero is never picked; of a row of zeros, the last one is.
    """
    rows, vocab = p_RV.shape
    weight = (F.pad(p_RV, (0, -vocab % _BLOCK)) * _ONE).long().view(rows, -1, _BLOCK)
    sums = weight.sum(-1)
    ends = sums.cumsum(-1)
    total = ends[:, -1]
    goal = torch.minimum((u_R * total.double()).long(), total - 1).clamp(min=0)[:, None]
    block = (ends <= goal).sum(-1, keepdim=True).clamp(max=sums.shape[1] - 1)
    goal = goal - (ends.gather(1, block) - sums.gather(1, block))
    inside = weight.gather(1, block[:, :, None].expand(-1, -1, _BLOCK)).squeeze(1).cumsum(-1)
    place = (inside <= goal).sum(-1).clamp(max=_BLOCK - 1)
    return (block.squeeze(1) * _BLOCK + place).clamp(max=vocab - 1)


def filtered(p_RV: Tensor, top_k_R: Tensor | None, top_p_R: Tensor | None, min_p_R: Tensor) -> Tensor:
    """What top-k, top-p and min-p leave of `p_RV`, summing to one again; the likeliest token always stays.

    Of equal probabilities those of lower ids rank higher. `top_k_R` 0 is off; None: off in all rows, and
    likewise `top_p_R`. Nothing is sorted, which over 100,000 tokens would take longer than all else here.
    """
    rows, vocab = p_RV.shape
    if rows > _AT_ONCE:
        whole = (p_RV, top_k_R, top_p_R, min_p_R)
        parts = (
            [None if x is None else x[r : r + _AT_ONCE] for x in whole] for r in range(0, rows, _AT_ONCE)
        )
        return torch.cat([filtered(*part) for part in parts])  # type: ignore[arg-type]
    weight = (p_RV * _ONE).long()
    keep = (p_RV >= min_p_R.to(p_RV.dtype)[:, None] * p_RV.amax(-1, keepdim=True)) & (weight > 0)
    if top_k_R is not None:
        count = torch.where((top_k_R > 0) & (top_k_R < vocab), top_k_R, vocab).long()
        first = _leading(p_RV, torch.ones_like(weight), count)
        keep, weight = keep & first, weight * first
    if top_p_R is not None:
        need = (top_p_R.double() * weight.sum(-1).double()).ceil().long()
        keep &= _leading(p_RV, weight, torch.where(top_p_R < 1, need, 2**62))
    total = (weight * keep).sum(-1, keepdim=True).double() / _ONE
    return torch.where(keep, p_RV, 0) / total.to(p_RV.dtype)


def _leading(p_RV: Tensor, weight_RV: Tensor, need_R: Tensor) -> Tensor:
    """The fewest tokens of each row, taken from the likeliest down, whose weights add up to `need_R`: bool [R, V].

    A radix search for the least probability among them: the bits of positive floats order as the floats do,
    so each pass adds up the weights by the next ten or eleven bits and finds the ones it must have.
    """
    bits = p_RV.contiguous().view(torch.int32)
    least, above = torch.zeros_like(need_R), torch.zeros_like(need_R)
    for shift, width in ((20, 11), (10, 10), (0, 10)):
        digit = (bits >> shift) & ((1 << width) - 1)
        inside = (bits >> (shift + width)) == least[:, None]
        sums = weight_RV.new_zeros(len(p_RV), 1 << width)
        sums.scatter_add_(1, digit.long(), torch.where(inside, weight_RV, 0))
        reach = sums.flip(1).cumsum(1).flip(1)
        found = ((above[:, None] + reach >= need_R[:, None]).sum(-1, keepdim=True) - 1).clamp(min=0)
        above = above + (reach - sums).gather(1, found).squeeze(1)
        least = (least << width) + found.squeeze(1)
    least = least.int()
    # Of those that have just the least probability, all of one weight, the first few are enough.
    last = bits == least[:, None]
    each = torch.where(last, weight_RV, 0).amax(-1).clamp(min=1)
    few = (need_R - above + each - 1) // each
    return (bits > least[:, None]) | (last & (last.cumsum(-1) <= few[:, None]))


def apply_bitmask(logits_RV: Tensor, bits_RW: Tensor) -> Tensor:
    """`logits_RV` with -inf at every token whose bit is not set in `bits_RW` (int32, token t is bit t % 32 of
    word t // 32). Tokens past the last word are not allowed; bits past the vocabulary are ignored."""
    rows, vocab = logits_RV.shape
    power = torch.ones((), dtype=torch.int32, device=bits_RW.device) << torch.arange(
        32, dtype=torch.int32, device=bits_RW.device
    )
    banned = ((bits_RW[:, :, None] & power) == 0).view(rows, -1)[:, :vocab]
    if banned.shape[1] < vocab:
        banned = F.pad(banned, (0, vocab - banned.shape[1]), value=True)
    return logits_RV.masked_fill(banned, -torch.inf)


def judge(p_RV: Tensor, q_RV: Tensor, drafts_R: Tensor, u_R: Tensor) -> tuple[Tensor, Tensor]:
    """Which drafts stand, bool [R], and what a refused one gives way to, `[R, V]`: a draft d drawn from q stands
    with probability min(1, p(d) / q(d)), else the token comes from what p has over q (from p, if rounding leaves
    nothing of that). The token then has distribution p (Leviathan et al., 2023)."""
    at = drafts_R[:, None]
    stands_R = u_R * q_RV.gather(1, at)[:, 0] < p_RV.gather(1, at)[:, 0]
    rest_RV = (p_RV - q_RV).clamp(min=0)
    return stands_R, torch.where(rest_RV.sum(-1, keepdim=True) > 1e-9, rest_RV, p_RV)


def logprobs_of(logits_RV: Tensor, ids_R: Tensor, top: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Natural log-probability fp32 [R] of `ids_R` under softmax(`logits_RV`), and the `top` likeliest tokens
    of each row: ids and log-probabilities [R, top]. Give only the rows that ask."""
    logits = logits_RV.float()
    most = logits.amax(-1, keepdim=True)
    # e^x is at most one here; multiples of 2^-44 of up to 2^18 tokens add up below 2^63.
    weight = ((logits - most).exp_() * 2.0**44).long().sum(-1, keepdim=True)
    whole = most.double() + (weight.double() * 2.0**-44).log()
    chosen = logits.gather(1, ids_R[:, None]).double() - whole
    best = logits.topk(min(top, logits.shape[1]), -1)
    return chosen.squeeze(1).float(), best.indices, (best.values.double() - whole).float()
