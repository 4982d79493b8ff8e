"""How fast a run will go, before it is begun: a few steps on random tokens, or arithmetic where those would take too
long or not fit."""

from __future__ import annotations

import os
import time

import torch

from rorqual.data import Batch
from rorqual.nn import Transformer
from rorqual.train.budget import flops_per_token, memory, peak
from rorqual.train.objective import Factors, Pretraining
from rorqual.train.optim import Optimizer, clipping, gradient_norms
from rorqual.train.recipe import Recipe

SHARE = 0.3
"""Of a device's rate in large products, what a model's training is assumed to reach where nothing is measured."""

PATIENCE = 20.0
"""Seconds that measuring may take, by that assumption."""


def pace(recipe: Recipe, device: torch.device | str) -> tuple[float, str]:
    """Tokens a second in the last stage, and how that is known."""
    device = torch.device(device)
    stage = recipe.stages[-1]
    samples = stage.to or stage.batch
    rate = peak(device) or product_rate(device, recipe.dtype)
    guess = SHARE * rate / flops_per_token(recipe.config, stage.length)
    rows = min(recipe.micro, samples)
    fits = memory(recipe, device).total < 0.8 * room(device)
    if fits and 2 * rows * stage.length / guess < PATIENCE:
        micro, update = timed(recipe, device, rows, stage.length)
        return samples * stage.length / (micro * samples / rows + update), "measured on random tokens"
    return guess, f"arithmetic: {SHARE:.0%} of {rate / 1e12:,.2f} TFLOP/s"


def room(device: torch.device) -> float:
    """Bytes that a run could have there."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, OSError, ValueError):
        return float("inf")


def product_rate(device: torch.device, dtype: str) -> float:
    """FLOPs a second of a large matrix product."""
    a = torch.ones(1024, 1024, dtype=getattr(torch, dtype), device=device)
    times = []
    for _ in range(3):
        began = _now(device)
        a @ a
        times.append(_now(device) - began)
    return 2 * 1024**3 / min(times)


def timed(recipe: Recipe, device: torch.device, rows: int, length: int) -> tuple[float, float]:
    """Seconds of a micro-batch of `rows` sequences, forward and backward, and of an update; the second of two."""
    model = Transformer(recipe.config, dtype=getattr(torch, recipe.dtype), device=device, seed=0)
    for name, p in model.named_parameters():
        p.requires_grad_(recipe.moves(name))
    optimizer = Optimizer(model.named_parameters(), recipe.optimizer)
    objective = Pretraining(recipe.apart, recipe.dsa, recipe.recompute, recipe.fp8)
    look = 1 + len(model.mtp)
    made = torch.Generator().manual_seed(0)
    ids = torch.randint(recipe.config.vocab, (rows, length + look), generator=made)
    batch = Batch(ids, torch.zeros_like(ids), torch.zeros(rows, dtype=torch.int64), look)
    counts = objective.counts([batch], len(model.mtp))
    factors = Factors(recipe.mtp(recipe.tokens), recipe.balance, recipe.v2)
    for number in (1, 2):
        began = _now(device)
        objective(model, batch, counts, factors).loss.backward()
        between = _now(device)
        norm = gradient_norms([p.grad for p in model.parameters() if p.grad is not None]).norm()
        optimizer.step(number, 0.0, clipping(norm, recipe.clip))
        model.zero_grad()
        ended = _now(device)
    return between - began, ended - between


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
