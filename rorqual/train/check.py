"""Whether a recipe, its data and a device go together, before anything is built."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from rorqual.data import Checking, Corpus
from rorqual.family import MLA, ConfigError
from rorqual.family.hub import to_hub
from rorqual.train.recipe import Recipe, has_index


class TrainError(ValueError):
    """A run that can't begin or go on; the message says what to do."""


def check(
    recipe: Recipe, corpora: Sequence[Corpus], device: torch.device, warn: Callable[[str], None]
) -> Checking:
    """Raise TrainError for what can't be, warn of what may not be meant; the corpora's checksums go on being
    compared."""
    config = recipe.config
    checking = Checking(corpora)
    if checking.wrong():
        raise TrainError(f"{checking.wrong()}. The command that built the corpus replaces such shards")
    attention = [layer.attention for layer in (*config.layers, *config.mtp)]
    if recipe.recompute and not (
        device.type == "cuda" and any(isinstance(a, MLA) and not has_index(a) for a in attention)
    ):
        warn("recompute changes nothing here: only dense MLA on a GPU keeps less by it")
    for corpus in corpora:
        if corpus.manifest.vocab > config.vocab:
            raise TrainError(
                f"{corpus.folder} was built with {corpus.manifest.vocab} token ids, and the model has "
                f"{config.vocab}: build it with the model's tokenizer"
            )
    if recipe.keep_best and not recipe.evaluate_every:
        raise TrainError("keep_best keeps what has the lowest held-out loss: set evaluate_every, too")
    try:
        to_hub(config)
    except ConfigError as error:
        warn(f"what is trained can be resumed but not written in a released format: {error}")
    if not recipe.dsa and any(has_index(a) for a in attention):
        warn("the model's indexers stay as they are: dsa=sparse lets them learn, too")
    for stage in recipe.stages:
        if stage.length > config.max_positions:
            raise TrainError(
                f"sequences of {stage.length} are longer than the model's {config.max_positions} positions"
            )
    return checking
