"""V4-Flash and V4-Pro (arXiv 2606.19348): Muon, and sequences that grow from 4K to 1M."""

from __future__ import annotations

from pathlib import Path

from rorqual.family import config
from rorqual.recipes.share import TRILLION, sources, warm_up
from rorqual.train.optim import Muon
from rorqual.train.recipe import Recipe
from rorqual.train.schedule import Phase, Schedule, Stage, cosine

K = 1024


def v4_flash(folder: Path, tokens: int = 32 * TRILLION) -> Recipe:
    """32T tokens, 2.7e-4 down to 2.7e-5, batches of up to 75.5M tokens."""
    model, starts = "DeepSeek-V4-Flash-Base", (0.5, 1.0, 31.0)
    return _v4("v4-flash", model, 2.7e-4, 75_497_472, tokens / (32 * TRILLION), starts, folder, tokens)


def v4_pro(folder: Path, tokens: int = 33 * TRILLION) -> Recipe:
    """33T tokens, 2.0e-4 down to 2.0e-5, batches of up to 94.4M tokens; dense for longer than Flash."""
    model, starts = "DeepSeek-V4-Pro-Base", (1.0, 2.0, 32.0)
    return _v4("v4-pro", model, 2.0e-4, 94_371_840, tokens / (33 * TRILLION), starts, folder, tokens)


def _v4(
    name: str,
    model: str,
    peak: float,
    batch: int,
    share: float,
    starts: tuple[float, ...],
    folder: Path,
    tokens: int,
) -> Recipe:
    """2,000 steps of warm-up, to a tenth at the end; 4K, 16K, 64K and 1M; Muon, and AdamW for the rest; γ 0.001, α
    1e-4, λ 0.3 and then 0.1; documents don't see each other (facts 3.7, 3.9, 3.10).

    Guessed, because it is not told: the shape of the decay; where the stages begin (`starts`, in 1e12 tokens; of Flash
    it is known that attention is dense for 1T and turns sparse with 64K); how the batch grows (here it doesn't); when
    λ falls (as V3's); that YaRN is there from the beginning."""
    lengths = (4 * K, 16 * K, 64 * K, K * K)
    begins = (0, *(round(start * TRILLION * share) for start in starts))
    stages = tuple(
        Stage(length, batch // length, begin) for length, begin in zip(lengths, begins, strict=True)
    )
    return Recipe(
        name=name,
        config=config(model),
        sources=sources(folder),
        stages=stages,
        tokens=tokens,
        rate=cosine(peak, warm_up((Stage(4 * K, batch // (4 * K)),), 2000, share), tokens, peak / 10),
        optimizer=Muon(),
        mtp=Schedule(0.3, (Phase(10 / 14.8 * tokens, 0.3), Phase(tokens, 0.1))),
        speed=Schedule(0.001),
        balance=1e-4,
        clip=1.0,
        apart=True,
        dtype="bfloat16",
        micro=1,
    )
