"""V3 (arXiv 2412.19437), and V3.2's two stages that make its attention sparse."""

from __future__ import annotations

from pathlib import Path

import torch

from rorqual.family import config
from rorqual.recipes.share import BILLION, before_stretching, sources, warm_up
from rorqual.train.optim import AdamW
from rorqual.train.recipe import Recipe
from rorqual.train.schedule import Phase, Schedule, Stage, constant
from rorqual.train.schedule import v3 as v3_rate

TOKENS = 14_800 * BILLION
ADAMW = AdamW(betas=(0.9, 0.95), decay=0.1, moments=torch.bfloat16)  # report 3.3.2 and 4.2


def v3(folder: Path, tokens: int = TOKENS) -> Recipe:
    """14.8T tokens at 4K (report 4.2): batch 3,072 to 15,360 over 469B; 2,000 steps of warm-up to 2.2e-4, there until
    10T, a cosine to 2.2e-5 over 4.3T, 333B more of it, and 7.3e-6 for 167B. λ 0.3 for 10T, then 0.1; γ 0.001 for 14.3T,
    then 0; α 1e-4. Its data: fill-in-the-middle at rate 0.1 (`rorqual data build`), documents packed without masks."""
    share = tokens / TOKENS
    grown = (Stage(length=4096, batch=3072, to=15360, ramp=469 * BILLION),)
    return Recipe(
        name="v3",
        config=before_stretching(config("DeepSeek-V3-Base")),
        sources=sources(folder),
        stages=(Stage(length=4096, batch=3072, to=15360, ramp=round(469 * BILLION * share)),),
        tokens=tokens,
        rate=v3_rate(2.2e-4, warm_up(grown, 2000, share), tokens),
        optimizer=ADAMW,
        mtp=Schedule(0.3, (Phase(10 / 14.8 * tokens, 0.3), Phase(tokens, 0.1))),
        speed=Schedule(0.001, (Phase(14.3 / 14.8 * tokens, 0.001), Phase(tokens, 0.0))),
        balance=1e-4,
        clip=1.0,
        apart=False,
        dtype="bfloat16",
        micro=1,
    )


def v3_long(folder: Path, tokens: int = 2 * 1000 * 1920 * 32768) -> Recipe:
    """After it, with YaRN: 1,000 steps of 1,920 sequences of 32K, then 1,000 of 480 of 128K, at 7.3e-6 (report 4.3).
    λ and γ as V3 ended."""
    return Recipe(
        name="v3-long",
        config=config("DeepSeek-V3-Base"),
        sources=sources(folder),
        stages=(Stage(length=32768, batch=1920), Stage(length=131072, batch=480, start=tokens // 2)),
        tokens=tokens,
        rate=constant(7.3e-6),
        optimizer=ADAMW,
        mtp=constant(0.1),
        speed=constant(0.0),
        balance=1e-4,
        clip=1.0,
        dtype="bfloat16",
        micro=1,
    )


def v32_warm_up(folder: Path, tokens: int = 1000 * 16 * 131072) -> Recipe:
    """V3.1-Terminus gets indexers: attention stays dense and all but they stand still. 1e-3 for 1,000 steps of 16
    sequences of 128K (V3.2 report 2.1)."""
    return Recipe(
        name="v3.2-warm-up",
        config=config("DeepSeek-V3.2-Exp-Base"),
        sources=sources(folder),
        stages=(Stage(length=131072, batch=16),),
        tokens=tokens,
        rate=constant(1e-3),
        optimizer=ADAMW,
        mtp=constant(0.0),  # what stands still needs no loss
        speed=constant(0.0),
        balance=0.0,
        clip=1.0,
        dtype="bfloat16",
        micro=1,
        dsa="warm-up",
    )


def v32(folder: Path, tokens: int = 15_000 * 480 * 131072) -> Recipe:
    """Then everything learns, with the 2,048 tokens that the indexers pick: 7.3e-6 for 15,000 steps of 480 sequences of
    128K (V3.2 report 2.1). λ and γ as V3 ended."""
    return Recipe(
        name="v3.2",
        config=config("DeepSeek-V3.2-Exp-Base"),
        sources=sources(folder),
        stages=(Stage(length=131072, batch=480),),
        tokens=tokens,
        rate=constant(7.3e-6),
        optimizer=ADAMW,
        mtp=constant(0.1),
        speed=constant(0.0),
        balance=1e-4,
        clip=1.0,
        dtype="bfloat16",
        micro=1,
        dsa="sparse",
    )
