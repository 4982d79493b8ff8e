"""The papers' equations once more, in fp64 and without a shortcut: one token, one head, one expert at a time.

Nothing here is shared with the package: weights come in under their published names, as `w[name]`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

Weights = Mapping[str, Tensor]


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / math.sqrt(float((x * x).mean()) + eps) * weight


def turn(x: Tensor, position: int, theta: float, interleaved: bool) -> Tensor:
    """Rotate each channel pair by position * theta^(-2i/dim)."""
    dim, out = x.numel(), x.clone()
    for i in range(dim // 2):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + dim // 2)
        angle = position * theta ** (-2 * i / dim)
        out[a] = x[a] * math.cos(angle) - x[b] * math.sin(angle)
        out[b] = x[b] * math.cos(angle) + x[a] * math.sin(angle)
    return out


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def swiglu(
    x: Tensor, w: Weights, name: str, parts: tuple[str, str, str], limit: float | None = None
) -> Tensor:
    gate, up = w[f"{name}{parts[0]}.weight"] @ x, w[f"{name}{parts[1]}.weight"] @ x
    if limit is not None:
        gate, up = torch.minimum(gate, torch.tensor(limit).double()), up.clamp(-limit, limit)
    return w[f"{name}{parts[2]}.weight"] @ (silu(gate) * up)


HUB = ("gate_proj", "up_proj", "down_proj")


def softmax_average(scores: list[Tensor], values: list[Tensor], sink: Tensor | None = None) -> Tensor:
    stacked = torch.stack(scores)
    top = stacked.max() if sink is None else torch.maximum(stacked.max(), sink)
    weights = torch.exp(stacked - top)
    total = weights.sum() + (torch.exp(sink - top) if sink is not None else 0)
    return sum(a * v for a, v in zip(weights / total, values, strict=True))


def mha(xs: list[Tensor], w: Weights, name: str, heads: int, theta: float) -> list[Tensor]:
    """Plain multi-head attention, half-split rotation (V1, MoE-16B)."""
    head = w[f"{name}q_proj.weight"].shape[0] // heads
    out = []
    for t, x in enumerate(xs):
        joined = []
        for h in range(heads):
            rows = slice(h * head, (h + 1) * head)
            q = turn(w[f"{name}q_proj.weight"][rows] @ x, t, theta, False)
            past = xs[: t + 1]
            keys = [turn(w[f"{name}k_proj.weight"][rows] @ y, s, theta, False) for s, y in enumerate(past)]
            values = [w[f"{name}v_proj.weight"][rows] @ y for y in past]
            joined.append(softmax_average([q @ k / math.sqrt(head) for k in keys], values))
        out.append(w[f"{name}o_proj.weight"] @ torch.cat(joined))
    return out


def moe_v1(x: Tensor, w: Weights, name: str, top_k: int, experts: int) -> Tensor:
    """DeepSeekMoE: softmax scores, not renormalised, plus the shared experts."""
    logits = torch.stack([w[f"{name}gate.weight"][e] @ x for e in range(experts)])
    scores = torch.exp(logits - logits.max())
    scores = scores / scores.sum()
    chosen = sorted(range(experts), key=lambda e: -float(scores[e]))[:top_k]
    routed = sum(scores[e] * swiglu(x, w, f"{name}experts.{e}.", HUB) for e in chosen)
    return routed + swiglu(x, w, f"{name}shared_experts.", HUB)


def moe_v3(x: Tensor, w: Weights, name: str, *, top_k: int, groups: int, keep: int, scale: float) -> Tensor:
    """Sigmoid scores; bias for choosing only; groups ranked by their two best; weights renormalised."""
    experts = w[f"{name}gate.weight"].shape[0]
    s = [1 / (1 + math.exp(-float(w[f"{name}gate.weight"][e] @ x))) for e in range(experts)]
    biased = [s[e] + float(w[f"{name}gate.e_score_correction_bias"][e]) for e in range(experts)]
    size = experts // groups
    worth = [sum(sorted(biased[g * size : (g + 1) * size])[-2:]) for g in range(groups)]
    kept = sorted(range(groups), key=lambda g: -worth[g])[:keep]
    allowed = [e for e in range(experts) if e // size in kept]
    chosen = sorted(allowed, key=lambda e: -biased[e])[:top_k]
    total = sum(s[e] for e in chosen)
    routed = sum(s[e] / total * scale * swiglu(x, w, f"{name}experts.{e}.", HUB) for e in chosen)
    return routed + swiglu(x, w, f"{name}shared_experts.", HUB)


def mla(
    xs: list[Tensor],
    w: Weights,
    name: str,
    *,
    heads: int,
    nope: int,
    rope: int,
    v: int,
    theta: float,
    eps: float,
) -> list[Tensor]:
    """V2 report equations 9-19, keys and values made anew for every query."""
    rank = w[f"{name}kv_a_layernorm.weight"].numel()
    out = []
    for t, x in enumerate(xs):
        c_q = rms(w[f"{name}q_a_proj.weight"] @ x, w[f"{name}q_a_layernorm.weight"], eps)
        q_all = w[f"{name}q_b_proj.weight"] @ c_q
        joined = []
        for h in range(heads):
            q = q_all[h * (nope + rope) : (h + 1) * (nope + rope)]
            q = torch.cat((q[:nope], turn(q[nope:], t, theta, True)))
            scores, values = [], []
            for s, y in enumerate(xs[: t + 1]):
                both = w[f"{name}kv_a_proj_with_mqa.weight"] @ y
                c_kv = rms(both[:rank], w[f"{name}kv_a_layernorm.weight"], eps)
                rows = w[f"{name}kv_b_proj.weight"][h * (nope + v) : (h + 1) * (nope + v)] @ c_kv
                key = torch.cat((rows[:nope], turn(both[rank:], s, theta, True)))
                scores.append(q @ key / math.sqrt(nope + rope))
                values.append(rows[nope:])
            joined.append(softmax_average(scores, values))
        out.append(w[f"{name}o_proj.weight"] @ torch.cat(joined))
    return out


# ------------------------------------------------------------------------------------------------ V4


def hyper_read(
    streams: Tensor, w: Weights, name: str, iterations: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Input of a sub-layer, and the weights to write its output back: facts 3.9."""
    n = streams.shape[0]
    flat = streams.flatten()
    u = w[f"{name}_fn"] @ flat / math.sqrt(float((flat * flat).mean()) + 1e-6)
    scale, base = w[f"{name}_scale"], w[f"{name}_base"]
    pre = torch.sigmoid(scale[0] * u[:n] + base[:n]) + eps
    post = 2 * torch.sigmoid(scale[1] * u[n : 2 * n] + base[n : 2 * n])
    comb = (scale[2] * u[2 * n :] + base[2 * n :]).reshape(n, n)
    comb = torch.stack([torch.exp(row - row.max()) / torch.exp(row - row.max()).sum() for row in comb]) + eps
    for i in range(iterations):
        if i:
            comb = torch.stack([row / (row.sum() + eps) for row in comb])
        comb = torch.stack([column / (column.sum() + eps) for column in comb.T]).T
    return sum(p * x for p, x in zip(pre, streams, strict=True)), post, comb


def hyper_write(streams: Tensor, y: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    n = streams.shape[0]
    return torch.stack([post[k] * y + sum(comb[j, k] * streams[j] for j in range(n)) for k in range(n)])


def hyper_head(streams: Tensor, w: Weights, name: str, eps: float) -> Tensor:
    flat = streams.flatten()
    u = w[f"{name}_fn"] @ flat / math.sqrt(float((flat * flat).mean()) + 1e-6)
    weight = torch.sigmoid(w[f"{name}_scale"] * u + w[f"{name}_base"]) + eps
    return sum(a * x for a, x in zip(weight, streams, strict=True))


def window_attention(
    xs: list[Tensor],
    w: Weights,
    name: str,
    *,
    heads: int,
    rope: int,
    window: int,
    groups: int,
    theta: float,
    eps: float,
) -> list[Tensor]:
    """V4's attention in a layer without compression."""
    head = w[f"{name}kv_norm.weight"].numel()

    def end_turned(x: Tensor, position: int) -> Tensor:
        return torch.cat((x[:-rope], turn(x[-rope:], position, theta, True)))

    entries = [
        end_turned(rms(w[f"{name}wkv.weight"] @ x, w[f"{name}kv_norm.weight"], eps), s)
        for s, x in enumerate(xs)
    ]
    out = []
    for t, x in enumerate(xs):
        q_all = w[f"{name}wq_b.weight"] @ rms(w[f"{name}wq_a.weight"] @ x, w[f"{name}q_norm.weight"], eps)
        joined = []
        for h in range(heads):
            q = q_all[h * head : (h + 1) * head]
            q = end_turned(q / math.sqrt(float((q * q).mean()) + eps), t)
            near = entries[max(0, t - window + 1) : t + 1]
            scores = [q @ e / math.sqrt(head) for e in near]
            joined.append(end_turned(softmax_average(scores, near, w[f"{name}attn_sink"][h]), -t))
        o = torch.cat(joined)
        wide, rank = o.numel() // groups, w[f"{name}wo_a.weight"].shape[0] // groups
        low = [
            w[f"{name}wo_a.weight"][g * rank : (g + 1) * rank] @ o[g * wide : (g + 1) * wide]
            for g in range(groups)
        ]
        out.append(w[f"{name}wo_b.weight"] @ torch.cat(low))
    return out


def moe_v4(x: Tensor, w: Weights, name: str, *, top_k: int, scale: float, limit: float) -> Tensor:
    """sqrt(softplus) scores, bias for choosing only, renormalised and scaled; clamped experts."""
    parts, experts = ("w1", "w3", "w2"), w[f"{name}gate.weight"].shape[0]
    s = [math.sqrt(math.log1p(math.exp(float(w[f"{name}gate.weight"][e] @ x)))) for e in range(experts)]
    chosen = sorted(range(experts), key=lambda e: -(s[e] + float(w[f"{name}gate.bias"][e])))[:top_k]
    total = sum(s[e] for e in chosen)
    routed = sum(s[e] / total * scale * swiglu(x, w, f"{name}experts.{e}.", parts, limit) for e in chosen)
    return routed + swiglu(x, w, f"{name}shared_experts.", parts, limit)
