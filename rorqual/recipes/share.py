"""What recipes of released models have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rorqual.family import MLA, Layer, ModelConfig
from rorqual.train.recipe import Source
from rorqual.train.schedule import Stage, Steps

BILLION, TRILLION = 10**9, 10**12


def sources(folder: Path) -> tuple[Source, ...]:
    """No data comes with a released model: a corpus in the run's folder, or what --data names."""
    return (Source(str(folder / "corpus")),)


def warm_up(stages: Sequence[Stage], steps: int, share: float = 1.0) -> float:
    """Tokens that the first `steps` steps take, where a warm-up counted in steps ends; of a run of a `share` of its
    length, that share of them."""
    return Steps(tuple(stages))[steps][3] * share


def before_stretching(config: ModelConfig, positions: int = 4096) -> ModelConfig:
    """The config as it was pretrained: YaRN came with the long sequences after it (V2 report 3.1.4, V3 report 4.3)."""

    def short(layer: Layer) -> Layer:
        assert isinstance(layer.attention, MLA)
        rope = replace(layer.attention.rope, scaling=None)
        return replace(layer, attention=replace(layer.attention, rope=rope))

    layers, mtp = (tuple(map(short, found)) for found in (config.layers, config.mtp))
    return config.replace(layers=layers, mtp=mtp, max_positions=positions)
