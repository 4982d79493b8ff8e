"""What a loaded model remembers of its checkpoint, so that `save` can write the same bytes back."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass
class Released:
    """All keyed by our parameter names.

    `scales`: the scales of matrices that were multiplied out (`….scale` -> tensor; stacks stacked).
    `dtypes`: the stored type, where it is not the held one. `values`: stored values that the held type
    can't hold. `copies`: hub names of tensors that repeated another one.
    """

    scales: dict[str, Tensor] = field(default_factory=dict)
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)
    copies: list[str] = field(default_factory=list)

    def attach(self, model: nn.Module) -> None:
        """Hang this on a model: `model.released`, and `model.released_scales` for short."""
        for name, value in (("released", self), ("released_scales", self.scales)):
            object.__setattr__(model, name, value)


def released(model: nn.Module) -> Released | None:
    """What was attached, or None for a model that was not loaded."""
    found = model.__dict__.get("released")
    return found if isinstance(found, Released) else None
