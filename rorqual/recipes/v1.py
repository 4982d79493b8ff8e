"""V1: DeepSeek LLM 7B and 67B (arXiv 2401.02954), and the fits by which their compute was spent."""

from __future__ import annotations

from pathlib import Path

from rorqual.family import GQA, ModelConfig, config
from rorqual.recipes.share import TRILLION, sources, warm_up
from rorqual.train.optim import AdamW
from rorqual.train.recipe import Recipe
from rorqual.train.schedule import Stage, multi_step

TOKENS = 2 * TRILLION


def v1_7b(folder: Path, tokens: int = TOKENS) -> Recipe:
    """LLM 7B: peak 4.2e-4, batches of 2,304 sequences of 4,096 (README of the models)."""
    return _v1("v1-7b", "deepseek-llm-7b-base", 4.2e-4, 2304, folder, tokens)


def v1_67b(folder: Path, tokens: int = TOKENS) -> Recipe:
    """LLM 67B: peak 3.2e-4, batches of 4,608 sequences of 4,096 (README of the models)."""
    return _v1("v1-67b", "deepseek-llm-67b-base", 3.2e-4, 4608, folder, tokens)


def _v1(name: str, model: str, peak: float, batch: int, folder: Path, tokens: int) -> Recipe:
    """2T tokens; 2,000 steps of warm-up, 31.6 % of the peak from 80 % of the tokens on, 10 % from 90 % (report 2.3)."""
    stages = (Stage(length=4096, batch=batch),)
    return Recipe(
        name=name,
        config=config(model),
        sources=sources(folder),
        stages=stages,
        tokens=tokens,
        rate=multi_step(peak, warm_up(stages, 2000, tokens / TOKENS), tokens, [(0.8, 0.316), (0.9, 0.1)]),
        optimizer=AdamW(betas=(0.9, 0.95), decay=0.1),  # report 2.3, recalled
        clip=1.0,
        balance=0.0,
        dtype="bfloat16",
        micro=1,
    )


# The fits of the report's section 3, in its symbols. They were recalled, not read again (u). What speaks for them: they
# give the learning rates and batches of 7B and 67B to a tenth, and M_opt * D_opt is C.


def flops_per_token(model: ModelConfig, length: int) -> float:
    """M, the non-embedding FLOPs a token of training costs at sequences of `length`: 72 n_layer d^2 + 12 n_layer d
    length (report 3.2, eq. 2). The form is that of dense layers of V1's proportions; ValueError for others."""
    if not all(isinstance(layer.attention, GQA) for layer in model.layers):
        raise ValueError(
            "M = 72 n d^2 + 12 n d l counts V1's dense layers: ask for the FLOPs of others elsewhere"
        )
    n, d = len(model.layers), model.hidden
    return 72.0 * n * d**2 + 12.0 * n * d * length


def best_rate(compute: float) -> float:
    """The learning rate for `compute` FLOPs: 0.3118 C^-0.1250 (report 3.1, eq. 1)."""
    return float(0.3118 * compute**-0.1250)


def best_batch(compute: float) -> float:
    """The batch for `compute` FLOPs, in tokens: 0.2920 C^0.3271 (report 3.1, eq. 1)."""
    return float(0.2920 * compute**0.3271)


def best_model(compute: float) -> float:
    """How large a model `compute` FLOPs want, as FLOPs a token: M_opt = 0.1715 C^0.5243 (report 3.2, eq. 4)."""
    return float(0.1715 * compute**0.5243)


def best_data(compute: float) -> float:
    """How many tokens `compute` FLOPs want: D_opt = 5.8316 C^0.4757 (report 3.2, eq. 4)."""
    return float(5.8316 * compute**0.4757)
