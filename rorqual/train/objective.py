"""What pretraining minimises: next tokens, tokens further ahead (MTP), and balance of experts.

Each is a sum over tokens or sequences, divided by the whole step's count, so that any cut into micro-batches gives the
same gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rorqual.data import Batch
from rorqual.kernels.mode import fp8_products
from rorqual.kernels.sequence_loss import sequence_loss
from rorqual.nn import Rows, Step, Trace, Transformer
from rorqual.nn.balance import expert_load
from rorqual.nn.dropping import Capacity
from rorqual.nn.moe import MoE
from rorqual.nn.router import Router
from rorqual.nn.step import IndexerTraining
from rorqual.train.balance import V2Balance, v2_losses
from rorqual.train.loss import IGNORED, cross_entropy


def routers(model: Transformer) -> dict[int, Router]:
    """Of all layers with experts, MTP modules after the layers."""
    layers: Any = [*model.layers, *(module.block for module in model.mtp)]
    return {number: layer.ff.router for number, layer in enumerate(layers) if isinstance(layer.ff, MoE)}


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


@dataclass(frozen=True)
class Routing:
    """What is settled about a micro-batch's experts before it runs: the experts `[N, K]` of layers by number (V4's
    anticipatory routing), and the room that devices have (V2's token dropping)."""

    routes: dict[int, Tensor] | None = None
    capacity: Capacity | None = None


@dataclass
class Parts:
    """Of one micro-batch: `loss` to be gone back through, already divided by the step's counts, and what to tell.
    `load`: tokens that chose each expert, by layer (MTP modules after the layers)."""

    loss: Tensor
    told: dict[str, Tensor] = field(default_factory=dict)
    load: dict[int, Tensor] = field(default_factory=dict)


class Pretraining:
    """The objective over packed rows. With `apart` documents of a row don't see each other, and no token is asked for
    what another document says. `dsa`: see `recipe.DSA`."""

    def __init__(
        self, apart: bool = False, dsa: str = "", recompute: bool = False, fp8: bool = False
    ) -> None:
        self.apart, self.dsa, self.recompute, self.fp8 = apart, dsa, recompute, fp8

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

    def __call__(
        self,
        model: Transformer,
        batch: Batch,
        counts: Counts,
        factors: Factors,
        routing: Routing | None = None,
    ) -> Parts:
        """The losses of a micro-batch, on the model's device."""
        here = Batch(
            batch.ids_BT.to(model.device), batch.documents_BT.to(model.device), batch.sources_B, batch.look
        )
        step = self._step(here)
        if routing is not None:
            step.routes, step.capacity = routing.routes, routing.capacity
        parts: Parts | None = None
        # In the warm-up MTP's indexers learn, too, though nothing is asked of MTP itself.
        depths = len(model.mtp) if factors.mtp or self.dsa == "warm-up" else 0
        for depth, hidden in enumerate(self._hidden(model, here, step, depths)):
            ce, right = self._predicted(model, hidden, self.targets(here, depth + 1))
            mean, share = ce / counts.targets[depth], right / counts.targets[depth]
            if parts is None:
                parts = Parts(mean, {"next": mean.detach(), "accuracy": share})
                continue
            parts.loss = parts.loss + mean * (factors.mtp / depths)
            parts.told |= {f"mtp {depth}": mean.detach(), f"mtp {depth} accuracy": share}
        assert parts is not None and step.trace is not None
        self._balance(model, step, Factors() if self.dsa == "warm-up" else factors, counts, parts)
        self._index(step, counts, parts)
        if step.capacity is not None and step.capacity.dropped:
            dropped = torch.stack(list(step.capacity.dropped.values())).sum()
            pairs = (
                sum(ids.numel() for ids, *_ in step.trace.experts.values())
                * counts.sequences
                / len(step.rows)
            )
            parts.told["dropped"] = dropped / pairs
        parts.told["loss"] = parts.loss.detach()
        return parts

    @torch.no_grad()
    def routes(self, model: Transformer, batch: Batch, mtp: bool) -> dict[int, Tensor]:
        """The experts `[N, K]` that a model's routers choose for a micro-batch now, by layer; those looked up by token
        are left out. `mtp`: of MTP modules too."""
        here = Batch(
            batch.ids_BT.to(model.device), batch.documents_BT.to(model.device), batch.sources_B, batch.look
        )
        step = self._step(here)
        for _ in self._hidden(model, here, step, len(model.mtp) if mtp else 0):
            pass
        assert step.trace is not None
        found = step.trace.experts.items()
        return {n: ids_NK for n, (ids_NK, *_) in found if routers(model)[n].table is None}

    def _step(self, batch: Batch) -> Step:
        """A pass over all rows of a micro-batch."""
        count, width = len(batch.ids_BT), batch.ids_BT.shape[1] - batch.look
        rows = Rows([0] * count, [width] * count, width, batch.ids_BT.device)
        step = Step(rows, Trace(only_experts=True), batch.documents_BT[:, :width] if self.apart else None)
        step.recompute = self.recompute
        if self.dsa:
            learns = self.dsa != "dense" and torch.is_grad_enabled()
            step.indexers = IndexerTraining(self.dsa != "sparse", learns)
        return step

    def _hidden(self, model: Transformer, batch: Batch, step: Step, depths: int) -> Iterator[Tensor]:
        """What the head reads: of the model, then of each MTP module."""
        ids_BT, width = batch.ids_BT, step.rows.width
        if depths >= batch.look:
            raise ValueError(
                f"{depths} MTP modules look {depths + 1} tokens ahead, and the batch holds {batch.look}"
            )
        with fp8_products(self.fp8):
            state = model.run_whole(ids_BT[:, :width], step)
        hidden = model.finish(state)
        yield hidden
        state = hidden if model.config.residual is None else state
        for depth in range(depths):
            following = ids_BT[:, depth + 1 : depth + 1 + width]
            with fp8_products(self.fp8):
                hidden, state = model.further(state, following, step, depth)
            yield hidden

    def _predicted(self, model: Transformer, hidden: Tensor, target_BT: Tensor) -> tuple[Tensor, Tensor]:
        weight = model.embed.weight if model.head is None else model.head.weight
        full = model.config.residual is not None
        return cross_entropy(hidden.flatten(0, 1), weight, target_BT.flatten(), full=full)

    def _index(self, step: Step, counts: Counts, parts: Parts) -> None:
        """The indexers' losses, each a mean over tokens. In the warm-up there is nothing else to learn from."""
        if step.indexers is None or not step.indexers.losses:
            return
        tokens = counts.sequences * step.rows.width
        found = {number: kl / tokens for number, kl in step.indexers.losses.items()}
        total = torch.stack(list(found.values())).sum()
        parts.loss = total if self.dsa == "warm-up" else parts.loss + total
        parts.told |= {f"index {number}": kl.detach() for number, kl in found.items()}
        parts.told["index"] = total.detach()

    def _balance(
        self, model: Transformer, step: Step, factors: Factors, counts: Counts, parts: Parts
    ) -> None:
        """The balance losses of all layers with experts, and their loads."""
        assert step.trace is not None
        sequences = len(step.rows)
        total: Tensor | None = None
        for number, (chosen_NK, _, logits_NE) in step.trace.experts.items():
            ids_NK = chosen_NK.long()
            router = routers(model)[number]
            parts.load[number] = expert_load(ids_NK, logits_NE.shape[1])
            if router.table is not None:
                continue  # looked up by token: there is nothing to learn
            share = sequences / counts.sequences
            if factors.balance and factors.v2 is None:
                logits_BTE = logits_NE.unflatten(0, (sequences, -1))
                found = sequence_loss(logits_BTE, ids_NK.shape[1], router.part.score)
                found = found * (factors.balance * share)
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
