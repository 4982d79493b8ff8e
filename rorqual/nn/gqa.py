"""Multi-head, grouped-query and multi-query attention (V1, Coder, Math, MoE-16B, the distills)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rorqual.family import parts
from rorqual.kernels.cache_write import gqa_write
from rorqual.kernels.gpu import usable
from rorqual.kernels.gqa_paged import gqa_paged, supported
from rorqual.kernels.linear import Pack
from rorqual.kernels.mode import is_invariant
from rorqual.nn.cache import Slots
from rorqual.nn.errors import InputError
from rorqual.nn.linear import Linear, together
from rorqual.nn.norm import RMSNorm
from rorqual.nn.paged import Group, Lane, Lanes, PagedSlots, PagedStep, Store
from rorqual.nn.rope import rotate
from rorqual.nn.step import Step


class GQACache:
    """Keys and values of every token, `[B, capacity, kv_heads, head_dim]` each."""

    def __init__(self, k: Slots | PagedSlots, v: Slots | PagedSlots) -> None:
        self.k, self.v = k, v

    def select(self, rows_B: Tensor) -> None:
        self.k.select(rows_B)
        self.v.select(rows_B)

    def reaches(self, starts: list[int]) -> bool:
        return True

    def growing_bytes(self, length: int) -> int:
        return length * (self.k.bytes_per_item() + self.v.bytes_per_item())

    def fixed_bytes(self) -> int:
        return 0


class GQA(nn.Module):
    """Attention with `kv_heads` key/value heads, each shared by heads / kv_heads query heads."""

    def __init__(self, hidden: int, part: parts.GQA, eps: float) -> None:
        super().__init__()
        self.part = part
        self.q = Linear(hidden, part.heads * part.head_dim, part.qkv_bias)
        self.k = Linear(hidden, part.kv_heads * part.head_dim, part.qkv_bias)
        self.v = Linear(hidden, part.kv_heads * part.head_dim, part.qkv_bias)
        self.o = Linear(part.heads * part.head_dim, hidden, part.out_bias)
        self.pack = Pack()
        self.q_norm = RMSNorm(part.head_dim, eps) if part.qk_norm else None
        self.k_norm = RMSNorm(part.head_dim, eps) if part.qk_norm else None

    def alike(self) -> tuple[Linear, ...]:
        """The matrices that read the same rows."""
        return self.q, self.k, self.v

    def new_cache(self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device) -> GQACache:
        shape = (self.part.kv_heads, self.part.head_dim)
        k, v = (Slots(batch, capacity, shape, dtype, device) for _ in "kv")
        return GQACache(k, v)

    def lanes(self, dtype: torch.dtype, fp8: bool = False) -> Lanes:
        if fp8:
            raise InputError(
                "keys and values of grouped-query attention have no FP8 cache layout in this family"
            )
        lane = Lane((self.part.kv_heads, self.part.head_dim), dtype)
        return {"k": lane, "v": lane}

    def view(self, store: Store, group: Group) -> GQACache:
        return GQACache(PagedSlots(store["k"], group), PagedSlots(store["v"], group))

    def paged(self, x_1ND: Tensor, step: PagedStep, store: Store) -> Tensor | None:
        """The brick by kernels that read pages as they lie; None where there are none."""
        if not usable(x_1ND) or torch.is_grad_enabled():
            return None
        p, k_pages, v_pages = self.part, store["k"], store["v"]
        q, k, v = together(x_1ND[0], self.pack, self.q, self.k, self.v)
        q_NHd = q.unflatten(-1, (p.heads, p.head_dim))
        k_NGd, v_NGd = (z.unflatten(-1, (p.kv_heads, p.head_dim)) for z in (k, v))
        cos, sin = (t[0] for t in step.rotation(p.rope))
        norms: dict[str, Any] = {}
        if self.q_norm is not None and self.k_norm is not None:
            norms = {"q_norm": self.q_norm.weight, "k_norm": self.k_norm.weight, "eps": self.q_norm.eps}
        gqa_write(
            q_NHd,
            k_NGd,
            v_NGd,
            cos,
            sin,
            k_pages,
            v_pages,
            step.slots(),
            interleaved=p.rope.interleaved,
            **norms,
        )
        fixed, groups = is_invariant(), step.groups
        if fixed and not supported(q_NHd, k_pages, v_pages):
            groups = [step.by_token(g) for g in groups]
        out = [
            gqa_paged(
                q_NHd[g.tokens], k_pages, v_pages, g.table_SB, g.ends_S, g.offsets_S1,
                max_count=g.width, scale=p.head_dim**-0.5, fixed=fixed,
            )
            for g in groups
        ]  # fmt: skip
        return self.o((out[0] if len(out) == 1 else torch.cat(out)).flatten(1))[None]

    def forward(self, x_BTD: Tensor, step: Step, cache: GQACache | None) -> Tensor:
        p = self.part
        q, k, v = together(x_BTD, self.pack, self.q, self.k, self.v)
        q_BTHd = q.unflatten(-1, (p.heads, p.head_dim))
        k_BTGd = k.unflatten(-1, (p.kv_heads, p.head_dim))
        v_BTGd = v.unflatten(-1, (p.kv_heads, p.head_dim))
        if self.q_norm is not None and self.k_norm is not None:
            q_BTHd, k_BTGd = self.q_norm(q_BTHd), self.k_norm(k_BTGd)
        q_BTHd, k_BTGd = self._rotate(q_BTHd, step), self._rotate(k_BTGd, step)
        if cache is not None:
            k_BTGd, v_BTGd = cache.k.append(k_BTGd, step.rows), cache.v.append(v_BTGd, step.rows)
        o_BTHd = attend(q_BTHd, k_BTGd, v_BTGd, step, p.head_dim**-0.5)
        return self.o(o_BTHd.flatten(2))

    def _rotate(self, x_BTHd: Tensor, step: Step) -> Tensor:
        rope = self.part.rope
        cos, sin = step.rotation(rope)
        turn = cos[:, :, None], sin[:, :, None]
        if rope.dim == x_BTHd.shape[-1]:
            return rotate(x_BTHd, turn, rope.interleaved)
        moving, still = x_BTHd.split((rope.dim, x_BTHd.shape[-1] - rope.dim), -1)
        return torch.cat((rotate(moving, turn, rope.interleaved), still), -1)


def attend(q_BTHd: Tensor, k_BKGd: Tensor, v_BKGe: Tensor, step: Step, scale: float) -> Tensor:
    """Causal softmax attention `[B, T, H, e]`; G key/value heads, H a multiple of G, softmax in fp32.

    `k` and `v` hold keys of positions 0 .. K-1; the queries stand at `step.rows`' positions.
    """
    heads, groups = q_BTHd.shape[2], k_BKGd.shape[2]
    q, k, v = q_BTHd.transpose(1, 2), k_BKGd.transpose(1, 2), v_BKGe.transpose(1, 2)
    if step.all_visible:
        # One query a row sees every key: the query heads of a group stand as rows of one small matrix.
        o = F.scaled_dot_product_attention(
            q.reshape(q.shape[0], groups, heads // groups, -1), k, v, scale=scale
        )
        return o.reshape(q.shape[0], heads, 1, -1).transpose(1, 2)
    grouped = heads != groups
    if step.causal:
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
    else:
        mask = step.visible_BTK(k.shape[2])[:, None]
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped)
    return o.transpose(1, 2)
