"""A run that begins with another model's weights: V3.2 from V3, with fresh indexers (V3.2 report 2.1)."""

from __future__ import annotations

import os

import torch

from rorqual.nn import Transformer
from rorqual.weights import load

FRESH = (".index.", "mtp.")
"""What a checkpoint may lack: indexers and MTP modules."""


@torch.no_grad()
def begin_with(model: Transformer, place: str | os.PathLike[str]) -> list[str]:
    """Copy a checkpoint's weights into a model of the same shape, quantised ones multiplied out. Returns the names of
    what it doesn't have and stays as it was: indexers or MTP modules; MTP modules too many are left where they are.
    ValueError for any other difference."""
    mine = model.state_dict()
    found = load(place, dtype=model.dtype, device=model.device).state_dict()
    lacks = [name for name in mine if name not in found]
    odd = [name for name in lacks if not any(part in name for part in FRESH)]
    odd += [name for name in found if name not in mine and not name.startswith("mtp.")]
    odd += [name for name in mine if name in found and mine[name].shape != found[name].shape]
    if odd:
        raise ValueError(
            f"{place} is a checkpoint of another model: {len(odd)} of its tensors differ from the recipe's, "
            f"{odd[0]} first. Give the recipe its config; only indexers and MTP modules may be new"
        )
    for name, tensor in mine.items():
        if name in found:
            tensor.copy_(found[name])
    return lacks
