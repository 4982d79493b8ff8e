"""V2 and V2-Lite (arXiv 2405.04434): latent attention, experts balanced by losses, a batch that grows."""

from __future__ import annotations

from pathlib import Path

from rorqual.family import config
from rorqual.recipes.share import BILLION, before_stretching, sources, warm_up
from rorqual.train.balance import V2Balance
from rorqual.train.optim import AdamW
from rorqual.train.recipe import Recipe
from rorqual.train.schedule import Stage, constant, multi_step

ADAMW = AdamW(betas=(0.9, 0.95), decay=0.1)  # report 3.1.2, recalled


def v2(folder: Path, tokens: int = 8_100 * BILLION) -> Recipe:
    """8.1T tokens at 4K: batch 2,304 to 9,216 over 225B; 2,000 steps of warm-up to 2.4e-4, 31.6 % of it from 60 % of
    the tokens on and that again from 90 % (report 3.1.2); α 0.003, 0.05 and 0.02 (2.2.3)."""
    share = tokens / (8_100 * BILLION)
    grown = (Stage(length=4096, batch=2304, to=9216, ramp=225 * BILLION),)
    return Recipe(
        name="v2",
        config=before_stretching(config("DeepSeek-V2")),
        sources=sources(folder),
        stages=(Stage(length=4096, batch=2304, to=9216, ramp=round(225 * BILLION * share)),),
        tokens=tokens,
        rate=multi_step(2.4e-4, warm_up(grown, 2000, share), tokens, [(0.6, 0.316), (0.9, 0.316**2)]),
        optimizer=ADAMW,
        v2=V2Balance(expert=0.003, device=0.05, communication=0.02),
        clip=1.0,
        dtype="bfloat16",
        micro=1,
    )


def v2_long(folder: Path, tokens: int = 1000 * 576 * 32768) -> Recipe:
    """After it: 1,000 steps of 576 sequences of 32K with YaRN (report 3.1.4). The rate is not told: V2's last one."""
    return Recipe(
        name="v2-long",
        config=config("DeepSeek-V2"),
        sources=sources(folder),
        stages=(Stage(length=32768, batch=576),),
        tokens=tokens,
        rate=constant(2.4e-4 * 0.316**2),
        optimizer=ADAMW,
        v2=V2Balance(expert=0.003, device=0.05, communication=0.02),
        clip=1.0,
        dtype="bfloat16",
        micro=1,
    )


def v2_lite(folder: Path, tokens: int = 5_700 * BILLION) -> Recipe:
    """5.7T tokens at 4K in batches of 4,608; to 4.2e-4, 31.6 % of it from 80 % of them on and that again from 90 %
    (report B.1); α1 0.001 alone."""
    share = tokens / (5_700 * BILLION)
    stages = (Stage(length=4096, batch=4608),)
    return Recipe(
        name="v2-lite",
        config=before_stretching(config("DeepSeek-V2-Lite")),
        sources=sources(folder),
        stages=stages,
        tokens=tokens,
        rate=multi_step(4.2e-4, warm_up(stages, 2000, share), tokens, [(0.8, 0.316), (0.9, 0.316**2)]),
        optimizer=ADAMW,
        v2=V2Balance(expert=0.001, device=0.0, communication=0.0),
        clip=1.0,
        dtype="bfloat16",
        micro=1,
    )
