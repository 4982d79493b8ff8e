"""What pretraining minimises: next tokens, tokens further ahead (MTP), and balance of experts.

Each is a sum over tokens or sequences, divided by the whole step's count, so that any cut into micro-batches gives the
same gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rorqual.data import Batch
from rorqual.nn import Rows, Step, Trace, Transformer
from rorqual.nn.balance import expert_load, sequence_loss
from rorqual.nn.router import scores
from rorqual.train.balance import V2Balance, v2_losses
from rorqual.train.loss import IGNORED, cross_entropy


@dataclass(frozen=True)
class Factors:
    """What each part counts for at some time of a run. mtp: λ of V3 (report 2.2), shared by all depths. balance: α of
    V3's sequence-wise loss (2.1.2). v2: V2's three losses instead."""

    mtp: float = 0.0
    balance: float = 0.0
    v2: V2Balance | None = None


@dataclass(frozen=True)
class Counts:
    """Of a whole step, over all micro-batches and ranks: targets at each distance, and sequences."""

    targets: tuple[int, ...]
    sequences: int


@dataclass
class Parts:
    """Of one micro-batch: `loss` to be gone back through, already divided by the step's counts, and what to tell.
    `load`: tokens that chose each expert, by layer (MTP modules after the layers)."""

    loss: Tensor
    told: dict[str, Tensor] = field(default_factory=dict)
    load: dict[int, Tensor] = field(default_factory=dict)


class Pretraining:
    """The objective over packed rows. With `apart` documents of a row don't see each other, and no token is asked for
    what another document says."""

    def __init__(self, apart: bool = False, recompute: bool = False) -> None:
        self.apart, self.recompute = apart, recompute

    def targets(self, batch: Batch, distance: int) -> Tensor:
        """What stands `distance` after each of a row's tokens, `IGNORED` where it doesn't count: `[B, T]`."""
        width = batch.ids_BT.shape[1] - batch.look
        ids = batch.ids_BT[:, distance : distance + width]
        if not self.apart:
            return ids
        here, there = batch.documents_BT[:, :width], batch.documents_BT[:, distance : distance + width]
        return torch.where(here == there, ids, IGNORED)

    def counts(self, batches: Sequence[Batch], depths: int) -> Counts:
        """Of a step that consists of these batches, for a model with so many MTP modules."""
        targets = [
            sum(int((self.targets(batch, distance) != IGNORED).sum()) for batch in batches)
            for distance in range(1, depths + 2)
        ]
        return Counts(tuple(max(1, n) for n in targets), sum(len(batch.ids_BT) for batch in batches))

    def __call__(self, model: Transformer, batch: Batch, counts: Counts, factors: Factors) -> Parts:
        """The losses of a micro-batch, on the model's device."""
        depths = len(model.mtp) if factors.mtp else 0
        ids_BT, documents_BT = batch.ids_BT.to(model.device), batch.documents_BT.to(model.device)
        width = ids_BT.shape[1] - batch.look
        if depths >= batch.look:
            raise ValueError(
                f"{depths} MTP modules look {depths + 1} tokens ahead, and the batch holds {batch.look}"
            )
        rows = Rows([0] * len(ids_BT), [width] * len(ids_BT), width, ids_BT.device)
        step = Step(rows, Trace(keep_hidden=False), documents_BT[:, :width] if self.apart else None)
        step.recompute = self.recompute
        here = Batch(ids_BT, documents_BT, batch.sources_B, batch.look)
        state = model.run_whole(ids_BT[:, :width], step)
        hidden = model.finish(state)
        ce, right = self._predicted(model, hidden, self.targets(here, 1))
        loss = ce / counts.targets[0]
        parts = Parts(loss, {"next": loss.detach(), "accuracy": right / counts.targets[0]})
        state = hidden if model.config.residual is None else state
        for depth in range(depths):
            following = ids_BT[:, depth + 1 : depth + 1 + width]
            hidden, state = model.further(state, following, step, depth)
            ce, right = self._predicted(model, hidden, self.targets(here, depth + 2))
            further = ce / counts.targets[depth + 1]
            parts.loss = parts.loss + further * (factors.mtp / depths)
            parts.told[f"mtp {depth + 1}"] = further.detach()
            parts.told[f"mtp {depth + 1} accuracy"] = right / counts.targets[depth + 1]
        self._balance(model, step, factors, counts, parts)
        parts.told["loss"] = parts.loss.detach()
        return parts

    def _predicted(self, model: Transformer, hidden: Tensor, target_BT: Tensor) -> tuple[Tensor, Tensor]:
        weight = model.embed.weight if model.head is None else model.head.weight
        full = model.config.residual is not None
        return cross_entropy(hidden.flatten(0, 1), weight, target_BT.flatten(), full=full)

    def _balance(
        self, model: Transformer, step: Step, factors: Factors, counts: Counts, parts: Parts
    ) -> None:
        """The balance losses of all layers with experts, and their loads."""
        assert step.trace is not None
        sequences = len(step.rows)
        layers: Any = [*model.layers, *(module.block for module in model.mtp)]
        total: Tensor | None = None
        for number, (chosen_NK, _, logits_NE) in step.trace.experts.items():
            ids_NK = chosen_NK.long()
            router = layers[number].ff.router
            parts.load[number] = expert_load(ids_NK, logits_NE.shape[1])
            if router.table is not None:
                continue  # looked up by token: there is nothing to learn
            share = sequences / counts.sequences
            if factors.balance and factors.v2 is None:
                scores_NE = scores(logits_NE, router.part.score)
                # Eq. 18 counts the likeliest experts of the affinities alone, without bias and groups.
                best_NK = scores_NE.topk(ids_NK.shape[1], -1).indices
                per_row = (scores_NE.unflatten(0, (sequences, -1)), best_NK.unflatten(0, (sequences, -1)))
                found = sequence_loss(*per_row) * (factors.balance * share)
                total = found if total is None else total + found
            if factors.v2 is not None:
                found = (
                    v2_losses(
                        logits_NE.unflatten(0, (sequences, -1)),
                        ids_NK.unflatten(0, (sequences, -1)),
                        router.part,
                        factors.v2,
                    )
                    * share
                )
                total = found if total is None else total + found
        if total is not None:
            parts.loss = parts.loss + total
            parts.told["balance"] = total.detach()
