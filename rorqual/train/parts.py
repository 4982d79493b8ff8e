"""Which part of the model a parameter belongs to, and the parts' gradient norms."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch

from rorqual.nn.balance import max_violation
from rorqual.nn.router import Router

PARTS = ("embedding", "attention", "router", "experts", "dense", "norms", "mixing", "MTP", "head")
"""`dense`: dense feed-forward layers and shared experts. `mixing`: V4's hyper-connections. `MTP`: its modules."""


def part_of(name: str) -> str:
    """The part that a parameter of `nn.Transformer` belongs to, by its name."""
    words = name.split(".")
    if words[0] == "mtp":
        return "MTP"
    if words[0] in ("embed", "head"):
        return {"embed": "embedding", "head": "head"}[words[0]]
    if any(word.endswith("_mix") or word == "mix_head" for word in words):
        return "mixing"
    if any(word == "norm" or word.endswith("_norm") for word in words):
        return "norms"
    if "ff" in words:
        return next((part for part in ("router", "experts") if part in words), "dense")
    return "attention"


def norms_by_part(named: Iterable[tuple[str, float]]) -> dict[str, float]:
    """The joint norm of each part's gradients, from the parameters' own, in the order of `PARTS`."""
    found: dict[str, list[float]] = {}
    for name, norm in named:
        found.setdefault(part_of(name), []).append(norm)
    return {part: math.hypot(*found[part]) for part in PARTS if part in found}


def evenness(load: Mapping[int, Sequence[int]], routers: Mapping[int, Router]) -> dict[str, float]:
    """By layer, how far the busiest expert lies above the mean ("violation n"), and how far apart the biases lie by
    which tokens were routed ("spread n")."""
    found = {f"violation {number}": max_violation(torch.tensor(counts)) for number, counts in load.items()}
    biases = {number: router.bias for number, router in routers.items() if router.bias is not None}
    if biases:
        spreads = torch.stack([bias.max() - bias.min() for bias in biases.values()]).tolist()
        found |= {f"spread {number}": spread for number, spread in zip(biases, spreads, strict=True)}
    return found
