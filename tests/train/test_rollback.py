"""After a spike a run goes back, and ends as one that never saw what led to it; stopped anywhere, too."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rorqual.data import Batch
from rorqual.train import checkpoint
from rorqual.train.recipe import Guard, Recipe
from rorqual.train.rollback import Skip, back_to, left_out
from rorqual.train.schedule import Stage, Steps
from rorqual.train.trainer import LOG, Trainer, TrainError
from tests.train.test_trainer import corpus, ends, log, recipe

__all__ = ["corpus"]

BACK = Guard(factor=50, window=3, most=3, back=True)


def spiking(trainer: Trainer, bad: dict[int, float]) -> list[int]:
    """Multiplies the gradients of those batches that hold the samples which step s would take in an unbroken run.
    What it did, step by step, is in the list it gives."""
    plain = Trainer.gradients.__get__(trainer)
    marks = {}
    for step, factor in bad.items():
        stage, first, samples, _ = trainer.steps[step]
        marks[trainer.mixtures[stage].batch(first, samples).ids_BT.numpy().tobytes()] = factor
    hits: list[int] = []

    def gradients(batch: Batch, seen: float) -> Any:
        told, load, found = plain(batch, seen)
        factor = marks.get(batch.ids_BT.numpy().tobytes())
        if factor is None:
            return told, load, found
        hits.append(trainer.step)
        return told, load, {name: grad * factor for name, grad in found.items()}

    trainer.gradients = gradients  # type: ignore[method-assign]
    return hits


def without(trainer: Trainer, ranges: dict[int, tuple[int, int]]) -> None:
    """Leaves samples out of a stage's data: (first, how many), as if they had never been there."""
    for stage, (start, count) in ranges.items():
        plain = trainer.mixtures[stage].batch

        def batch(first: int, n: int, plain: Any = plain, start: int = start, count: int = count) -> Batch:
            found: Batch = plain(first + count if first >= start else first, n)
            return found

        trainer.mixtures[stage].batch = batch  # type: ignore[method-assign]


def bare(folder: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key != "back"} for line in log(folder)]


def samples_between(plan: Recipe, begin: int, end: int) -> dict[int, tuple[int, int]]:
    """What steps `begin` to `end` take, by stage: the first sample and how many."""
    found: dict[int, tuple[int, int]] = {}
    steps = Steps(plan.stages)
    for step in range(begin, end + 1):
        stage, first, samples, _ = steps[step]
        start, count = found.get(stage, (first, 0))
        found[stage] = start, count + samples
    return found


def test_after_a_spike_it_is_a_run_that_never_saw_those_batches(tmp_path: Path, corpus: str) -> None:
    """The spike lies past the second stage's begin and the checkpoint before it: both stages leave samples out."""
    plan = recipe(corpus, "gqa", guard=BACK, save_every=4)
    border = next(step for step in range(100) if Steps(plan.stages)[step][0] == 1)
    spike = border + 1 if (border + 1) % 4 else border + 2
    began = spike // 4 * 4
    assert began < border < spike < began + 4, "the case this test is about"
    clean = Trainer(plan, tmp_path / "clean")
    without(clean, samples_between(plan, began, spike))
    clean.run()
    said: list[str] = []
    run = Trainer(plan, tmp_path / "spike", warn=said.append)
    hits = spiking(run, {spike: 1e4})
    run.run()
    assert hits == [spike] and len(said) == 1 and f"back to step {began}" in said[0]
    assert checkpoint.same(ends(run), ends(clean)) and bare(tmp_path / "spike") == bare(tmp_path / "clean")
    assert [line["step"] for line in log(tmp_path / "spike") if "back" in line] == [began]
    usual = Trainer(plan, tmp_path / "usual")
    usual.run()
    assert not checkpoint.same(ends(usual), ends(run))


@pytest.mark.parametrize("cause", ["spikes", "weights"])
def test_stopped_anywhere_around_going_back_it_is_the_same_run(
    tmp_path: Path, corpus: str, cause: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two spikes that go back to one checkpoint, or weights that are no longer numbers. `whole` goes through; `cut`
    loses power within every step, and between writing down that it goes back and doing so."""
    plan = recipe(corpus, "gqa", guard=BACK if cause == "spikes" else replace(BACK, back=False), save_every=5)
    bad = {7: 1e4, 9: 1e4} if cause == "spikes" else {}

    cuts: list[int] = []

    def begun(folder: Path, resume: bool) -> Trainer:
        trainer = Trainer(plan, folder, resume=resume, warn=lambda _: None)
        spiking(trainer, bad)
        if cause == "weights":
            plain = trainer.optimizer.step

            def step(number: int, rate: float, *more: Any) -> None:
                plain(number, rate, *more)
                if (
                    trainer.step == 8 and not trainer.skips and not cuts
                ):  # no fault of the data: it comes once
                    trainer.model.norm.weight.data[0] = math.nan

            trainer.optimizer.step = step  # type: ignore[method-assign]
        return trainer

    whole = begun(tmp_path / "whole", False)
    whole.run()
    steps = [skip.step for skip in whole.skips]
    assert steps == ([5, 5] if cause == "spikes" else [5])
    real = checkpoint.drop

    def power_cut(folder: Path, after: int) -> None:
        monkeypatch.setattr("rorqual.train.trainer.drop", real)
        cuts.append(after)
        raise RuntimeError("power cut")

    monkeypatch.setattr("rorqual.train.trainer.drop", power_cut)
    part = begun(tmp_path / "cut", False)
    for stop in range(1, 100):
        left = stop

        def told(report: Any, part: Trainer = part) -> None:
            nonlocal left
            left -= 1
            if report.step == 6:  # as an interruption does; it is no place to go back to
                part.save()
            if left == 0:
                raise RuntimeError("power cut")

        try:
            part.run(told)
            break
        except RuntimeError:
            part = begun(tmp_path / "cut", True)
    assert cuts == [5] and stop > 5 and checkpoint.same(ends(part), ends(whole))
    assert log(tmp_path / "cut") == log(tmp_path / "whole")
    assert checkpoint.steps_in(tmp_path / "cut") == checkpoint.steps_in(tmp_path / "whole")


def test_it_does_not_go_back_for_ever(tmp_path: Path, corpus: str) -> None:
    plan = recipe(corpus, "gqa", guard=replace(BACK, most=2), save_every=5, evaluate_every=0, ema=None)
    said: list[str] = []
    trainer = Trainer(plan, tmp_path / "a", warn=said.append)
    spiking(trainer, {step: 1e4 for step in range(7, 30)})
    with pytest.raises(TrainError, match="gone back to step 5 2 times"):
        trainer.run()
    assert len(said) == 2
    early = Trainer(replace(plan, save_every=0), tmp_path / "b", warn=said.append)
    spiking(early, {5: 1e4})
    early.run()  # no checkpoint yet, and the weights are sound: nothing is moved, as without `back`
    assert ["skipped" in line for line in log(tmp_path / "b")].index(True) == 5
    lost = Trainer(replace(plan, save_every=0), tmp_path / "c")
    lost.model.norm.weight.data[0] = math.nan
    with pytest.raises(TrainError, match="no longer numbers, and there is no checkpoint"):
        lost.run()


def test_a_checkpoint_that_is_not_all_numbers_is_gone_past(tmp_path: Path, corpus: str) -> None:
    plan = recipe(corpus, "gqa", guard=BACK, save_every=4, evaluate_every=0, keep=3)
    trainer = Trainer(plan, tmp_path / "a", warn=lambda _: None)
    plain = trainer.optimizer.step

    def step(number: int, rate: float, *more: Any) -> None:
        plain(number, rate, *more)
        if trainer.step == 7 and not trainer.skips:  # just before step 8 is saved
            trainer.optimizer.state["norm.weight"]["m"][0] = math.inf

    trainer.optimizer.step = step  # type: ignore[method-assign]
    trainer.run()
    assert [skip.step for skip in trainer.skips] == [4]
    assert all(torch.isfinite(t).all() for t in ends(trainer).values())


def test_left_out_adds_up() -> None:
    steps = Steps((Stage(16, 2), Stage(32, 4, start=96)))  # three steps of two, then fours
    once = back_to([], steps, 1, 2, "a")
    assert once == [Skip(1, ((0, 4),), "a")]
    twice = back_to(once, steps, 2, 4, "b")
    assert [left_out(twice, step, 0) for step in (0, 1, 2)] == [0, 4, 6]
    assert left_out(twice, 3, 1) == 8 and left_out(twice, 1, 1) == 0
    earlier = back_to(twice, steps, 0, 1, "c")  # what was left out later stays out, from there on
    assert left_out(earlier, 0, 0) == 4 + 2 + 4 and left_out(earlier, 3, 1) == 8


# ---------------------------------------------------------------------------------- which ones are kept


def test_the_best_checkpoints_are_kept(tmp_path: Path, corpus: str, monkeypatch: pytest.MonkeyPatch) -> None:
    held = iter([3.0, 1.0, math.nan, 2.0, 2.5, 2.2, 2.1, 2.05, 4.0, 5.0])
    monkeypatch.setattr(Trainer, "evaluate", lambda self: {"held": next(held)})
    plan = recipe(corpus, "gqa", keep=2, keep_best=2, save_every=3, evaluate_every=3)
    trainer = Trainer(plan, tmp_path / "a")
    trainer.run()
    last = [step for step in range(1, trainer.step + 1) if step % 3 == 0 or step == trainer.step][-2:]
    assert len(last) == 2 and last[0] > 12
    assert checkpoint.steps_in(tmp_path / "a") == [6, 12, *last]
    assert checkpoint.best(tmp_path / "a")[:2] == [6, 12]
    saved = json.loads((checkpoint.place_of(tmp_path / "a", 6) / "state.json").read_text())
    assert saved["facts"]["held"] == 1.0
    with pytest.raises(TrainError, match="set evaluate_every"):
        Trainer(replace(plan, evaluate_every=0), tmp_path / "b")
    assert (tmp_path / "a" / LOG).exists()
