"""Who gets a token in training: V2's dropping, V4's tables by token, and its routing by an older model."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rorqual.family import Layer, ModelConfig, MoE, Router
from rorqual.nn import Rows, Step, Trace, Transformer
from rorqual.nn.dropping import Capacity, kept
from rorqual.nn.moe import MoE as MoEBrick
from rorqual.train.anticipate import Anticipation, Routes
from rorqual.train.objective import Factors, Pretraining
from rorqual.train.recipe import Dropping
from rorqual.train.schedule import Schedule, Stage
from rorqual.train.trainer import Trainer
from tests.engine.conftest import config
from tests.parity.zoo import stir_ours
from tests.train.test_step import batch, double
from tests.train.test_trainer import corpus, recipe

__all__ = ["corpus"]


def v2(vocab: int = 60) -> ModelConfig:
    """V2's router: softmax, 4 devices of 2 experts, 2 of which a token goes to."""
    made = config("v3", vocab)
    moe = MoE(8, 3, 12, 1, Router("softmax", groups=4, keep=2, scale=2.0))
    layer = replace(made.layers[1], ff=moe)
    return replace(made, layers=(made.layers[0], layer), mtp=())


# ---------------------------------------------------------------------------------- token dropping


def dropped_plainly(s: Tensor, ids: Tensor, exempt: list[bool], per_device: int, room: int) -> set[Any]:
    """Device by device: pairs leave, worst first, until the rest fits."""
    gone = set()
    for device in {int(e) // per_device for e in ids.flatten()}:
        mine = [
            (n, k) for n, row in enumerate(ids) for k, e in enumerate(row) if int(e) // per_device == device
        ]
        for pair in sorted((p for p in mine if not exempt[p[0]]), key=lambda p: s[p[0], ids[p]].item()):
            if len(mine) <= room:
                break
            mine.remove(pair)
            gone.add(pair)
    return gone


@pytest.mark.parametrize("factor", [1.0, 0.6, 0.3])  # at the last, who is exempt takes more than all room
def test_a_device_keeps_the_highest_affinities_and_who_is_exempt(factor: float) -> None:
    """Claim 17: what is dropped is what its device wanted least; the rest comes out as without it."""
    brick = MoEBrick(16, 60, MoE(8, 3, 12, 1, Router("softmax", groups=4, keep=2, scale=2.0))).double()
    stir_ours(brick)
    rows, width = 5, 9
    x = torch.randn(rows, width, 16, dtype=torch.float64, requires_grad=True)
    ids, exempt = torch.zeros(rows, width, dtype=torch.long), torch.tensor([False, True, False, False, True])
    step = Step(Rows([0] * rows, [width] * rows, width, x.device), Trace())
    step.capacity = Capacity(factor, exempt)
    y = brick(x, ids, step).flatten(0, 1)
    chosen, weights, logits = step.trace.experts[0]
    s, room = logits.detach().softmax(-1), int(factor * rows * width * 3 / 4)
    gone = dropped_plainly(s, chosen, exempt.repeat_interleave(width).tolist(), 2, room)
    assert int(step.capacity.dropped[0]) == len(gone) > 3
    assert not any(exempt[n // width] for n, _ in gone)
    alone = [
        brick.experts(x.flatten(0, 1), torch.full_like(chosen[:, :1], e), torch.ones_like(weights[:, :1]))
        for e in range(8)
    ]
    for n in range(rows * width):
        wanted = brick.shared(x.flatten(0, 1)[n])
        for k in range(3):
            if (n, k) not in gone:
                # Experts are weighted before their last matrix, which is linear.
                wanted = wanted + weights[n, k] * alone[int(chosen[n, k])][n]
        assert (y[n] - wanted).abs().max() < 1e-12
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert grad.isfinite().all()
    # With room for all, and among equals, nothing is dropped and the first stay.
    everything = dict(experts=8, devices=4)
    none = torch.zeros(4, dtype=torch.bool)
    one = torch.zeros(4, 1, dtype=torch.long)
    assert kept(s[:4, :1], one, none, factor=4.0, **everything).all()
    assert (
        kept(torch.ones(4, 1), one, none, factor=2.0, **everything).flatten().tolist()
        == [True] * 2 + [False] * 2
    )


def test_dropping_is_for_training_alone_and_a_function_of_seed_and_step(tmp_path: Path, corpus: str) -> None:
    plan = recipe(corpus, config=v2(recipe(corpus).config.vocab), drop=Dropping(), save_every=0, ema=None)
    plan = replace(plan, stages=(Stage(16, 8),), micro=4, tokens=16 * 8 * 4)
    runs = [Trainer(replace(plan, **c), tmp_path / str(n)) for n, c in enumerate([{}, {}, {"drop": None}])]
    assert runs[0].evaluate() == runs[2].evaluate()
    seen: list[list[Any]] = []
    for trainer in runs:
        real, drawn = trainer._routing, []

        def routing(*given: Any, real: Any = real, drawn: list[Any] = drawn) -> Any:
            made = real(*given)
            drawn.append(made.capacity and made.capacity.exempt_B.tolist())
            return made

        trainer._routing = routing  # type: ignore[method-assign]
        seen.append([[report.values for report in trainer], drawn])
    told = [values["dropped"] for values in seen[0][0]]
    assert all(0 < share < 0.6 for share in told) and seen[0][1] == seen[1][1] and len(seen[0][1]) == 8
    assert [v["loss"] for v in seen[0][0]] == [v["loss"] for v in seen[1][0]]
    assert [v["loss"] for v in seen[0][0]] != [v["loss"] for v in seen[2][0]] and "dropped" not in seen[2][0][
        0
    ]
    trainer = runs[0]
    part = trainer._cut(trainer.mixtures[0].batch(0, 8))[0]
    share = []
    for trainer.step in range(500):
        share += trainer.objective and Trainer._routing(trainer, part, 0, None).capacity.exempt_B.tolist()
    assert 0.08 < sum(share) / len(share) < 0.12
    with pytest.raises(ValueError, match="no router of this model has groups"):
        recipe(corpus, "v4", drop=Dropping())
    with pytest.raises(ValueError, match="the second a share"):
        Dropping(1.0, 2.0)


# ------------------------------------------------------------------------------ experts from a table


def test_hashed_layers_learn_weights_and_tell_their_load() -> None:
    made = config("v4")
    table = replace(made.layers[0].ff, router=replace(made.layers[0].ff.router, hashed=True, bias=False))
    model = double(replace(made, layers=(Layer(made.layers[0].attention, table), *made.layers[1:])))
    given, router = batch(), model.layers[0].ff.router
    before = router.table.clone()
    objective = Pretraining()
    parts = objective(model, given, objective.counts([given], 1), Factors(0.3, balance=0.01))
    parts.loss.backward()
    read = given.ids_BT[:, : -given.look].flatten()
    counted = torch.zeros(6, dtype=torch.long)
    for token in read.tolist():
        counted[before[token]] += 1
    assert torch.equal(parts.load[0], counted) and set(parts.load) == {0, 1, 2, 3}
    assert router.weight.grad is not None and (router.weight.grad.abs().sum(1) > 0).all()
    assert torch.equal(router.table, before) and router.bias is None
    # Its balance is not asked for: the other layers' losses are all there is.
    rest = objective(model, given, objective.counts([given], 1), Factors(0.3)).loss
    assert float(parts.told["balance"]) == pytest.approx((parts.loss - rest).item(), rel=1e-9)


# ------------------------------------------------------------------------------ anticipatory routing


def test_experts_are_chosen_by_the_model_of_some_steps_before(tmp_path: Path, corpus: str) -> None:
    plan = recipe(corpus, "v4", anticipate=Anticipation(2), rate=Schedule(0.05), save_every=0, ema=None)
    trainer = Trainer(
        replace(plan, stages=(Stage(16, 4),), tokens=16 * 4 * 6, evaluate_every=0), tmp_path / "a"
    )
    models: list[Transformer] = []
    real, moved = trainer.gradients, 0

    def gradients(given: Any, seen: float) -> Any:
        nonlocal moved
        models.append(copy.deepcopy(trainer.model))
        told, load, found = real(given, seen)
        ids = given.ids_BT[:, :16]
        old, now = Trace(), Trace()
        models[max(0, trainer.step - 2)](ids, trace=old)
        trainer.model(ids, trace=now)
        for number, counts in load.items():
            if number < 3:  # of the layers; MTP's come below
                assert torch.equal(counts, old.experts[number][0].flatten().bincount(minlength=6))
                moved += int((old.experts[number][0] != now.experts[number][0]).sum())
        assert 3 in load
        return told, load, found

    trainer.gradients = gradients  # type: ignore[method-assign]
    list(trainer)
    assert len(models) == 6 and moved > 20 and not trainer.routes.tensors()


def test_settled_experts_are_weighted_by_the_present_router() -> None:
    model, given = double(config("v3")), batch()
    objective = Pretraining()
    routes = objective.routes(model, given, mtp=True)
    assert set(routes) == {1, 2}
    router = model.layers[1].ff.router
    x = torch.randn(7, 32, dtype=torch.float64)
    settled = torch.stack([torch.randperm(8)[:3] for _ in range(7)])
    chosen = router(x, None, settled)
    s = (x @ router.weight.T).sigmoid().gather(1, settled)
    assert torch.equal(chosen.ids, settled)
    assert (chosen.weights - 2.5 * s / s.sum(1, keepdim=True)).abs().max() < 1e-12


def test_anticipation_can_wait_for_a_spike() -> None:
    asked: list[int] = []

    def choose(step: int) -> dict[int, Tensor] | None:
        asked.append(step)
        return {0: torch.tensor([[step]])} if step < 9 else None

    routes = Routes(Anticipation(2, hold=3), choose)
    assert routes.take(0) is None and not asked
    routes.spiked(3)
    assert int(routes.take(4)[0]) == 4 and asked == [4, 5, 6]
    kept = routes.tensors()
    assert set(kept) == {"5.0", "6.0"}
    other = Routes(Anticipation(2, hold=3), choose)
    other.restore(kept, routes.until, torch.device("cpu"))
    for one in (routes, other):
        asked.clear()
        assert int(one.take(5)[0]) == 5 and int(one.take(6)[0]) == 6 and asked == [7, 8]
        assert one.take(7) is None and not one.tensors()
    always = Routes(Anticipation(2), choose)
    assert [int(always.take(n)[0]) for n in range(9)] == list(range(9)) and not always.tensors()
    with pytest.raises(ValueError, match="above 0"):
        Anticipation(0)
