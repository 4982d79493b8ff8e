"""A run is a function of its recipe: stopped anywhere, killed anywhere, it ends with the same bits."""

from __future__ import annotations

import errno
import gc
import json
import math
import os
import random
import shutil
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rorqual.data import Corpus, Options, build, checking
from rorqual.train import checkpoint
from rorqual.train.anticipate import Anticipation
from rorqual.train.balance import V2Balance
from rorqual.train.hold import Busy
from rorqual.train.optim import Muon
from rorqual.train.recipe import Dropping, Guard, Recipe, Source, override
from rorqual.train.schedule import Schedule, Stage
from rorqual.train.trainer import LOG, Trainer, TrainError
from tests.data.corpora import TOKENIZER, json_lines, texts
from tests.engine.conftest import config
from tests.forks import CONTEXT


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    place = tmp_path_factory.mktemp("corpus")
    source = json_lines(place / "a.jsonl", texts(300))
    build([str(source)], place / "c", TOKENIZER, Options(held=0.1), workers=1)
    return str(place / "c")


def recipe(corpus: str, kind: str = "v3", **changes: Any) -> Recipe:
    made = Recipe(
        name="test",
        config=config(kind, TOKENIZER.vocab_size),
        sources=(Source(corpus),),
        stages=(Stage(length=16, batch=2, to=4, ramp=200), Stage(length=32, batch=2, start=500)),
        tokens=1200,
        rate=Schedule(0.003),
        micro=2,
        ema=0.9,
        save_every=4,
        evaluate_every=7,
    )
    return replace(made, **changes)


def log(folder: Path) -> list[dict[str, Any]]:
    """What was told of each step, its times left out."""
    lines = [json.loads(line) for line in (folder / LOG).read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def ends(trainer: Trainer) -> dict[str, torch.Tensor]:
    state = dict(trainer.model.state_dict()) | trainer.optimizer.tensors()
    return state | {f"ema {name}": t for name, t in (trainer.ema or {}).items()}


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("gqa", {}),
        ("v3", {"drop": Dropping(0.8)}),
        ("v3", {"optimizer": Muon(), "dtype": "bfloat16"}),
        ("v4", {"apart": True, "dsa": "sparse", "anticipate": Anticipation(2)}),
    ],
)
def test_stopped_and_resumed_it_is_the_same_run(
    tmp_path: Path, corpus: str, kind: str, changes: dict[str, Any]
) -> None:
    plan = recipe(corpus, kind, **changes)
    whole = Trainer(plan, tmp_path / "whole")
    whole.run()
    assert whole.step > 20 and {"held", "loss", "norm", "accuracy"} <= log(tmp_path / "whole")[6].keys()
    seen = 0
    for stop in (3, 6, 11, 1000):  # between checkpoints, too
        part = Trainer(plan, tmp_path / "cut", resume=seen > 0)
        assert part.step == seen // 4 * 4 if seen < 1000 else True

        def told(report: Any, stop: int = stop) -> None:
            if report.step + 1 == stop:
                raise RuntimeError("power cut")

        try:
            part.run(told)
        except RuntimeError:
            seen = stop
    assert log(tmp_path / "cut") == log(tmp_path / "whole")
    assert checkpoint.same(ends(part), ends(whole))
    assert checkpoint.steps_in(tmp_path / "cut") == checkpoint.steps_in(tmp_path / "whole")
    last = [
        checkpoint.read(tmp_path / name, checkpoint.steps_in(tmp_path / name)[0]) for name in ("cut", "whole")
    ]
    assert ("routes" in last[1].tensors) == ("anticipate" in changes)
    assert all(checkpoint.same(last[0].tensors[group], last[1].tensors[group]) for group in last[1].tensors)


@pytest.mark.parametrize("where", ["told", "optimizer", "evaluate", "gradients"])
def test_ctrl_c_ends_the_step_and_saves(
    tmp_path: Path, corpus: str, where: str, monkeypatch: pytest.MonkeyPatch, ctrl_c: None
) -> None:
    """Wherever the signal falls: the step that was under way is whole, and told of."""
    plan = recipe(corpus, "gqa", save_every=0, evaluate_every=5)
    trainer = Trainer(plan, tmp_path / "a")
    owner, name = {
        "told": (trainer, "_balance"),
        "optimizer": (trainer.optimizer, "_by_adam"),
        "evaluate": (trainer, "evaluate"),
        "gradients": (trainer, "gradients"),
    }[where]
    real, hits = getattr(owner, name), [0]

    def hit(*given: Any) -> Any:
        hits[0] += trainer.step >= 4
        if hits[0] == 1 + 2 * (where == "optimizer"):  # amid the parameters
            os.kill(os.getpid(), signal.SIGINT)
            hits[0] += 100
        return real(*given)

    monkeypatch.setattr(owner, name, hit)
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    again = Trainer(plan, tmp_path / "a", resume=True)
    assert again.step == 5
    again.run()
    whole = Trainer(plan, tmp_path / "b")
    whole.run()
    assert checkpoint.same(ends(again), ends(whole)) and log(tmp_path / "a") == log(tmp_path / "b")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_log_has_what_a_checkpoint_holds(
    tmp_path: Path, corpus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed right after a checkpoint, no line is missing."""
    seen = []

    def save(self: Trainer) -> None:
        seen.append((self.step, lines(self.folder / LOG)))

    monkeypatch.setattr(Trainer, "save", save)
    Trainer(recipe(corpus, "gqa"), tmp_path / "a").run()
    assert len(seen) > 4 and all(step == written for step, written in seen)


def go_on(corpus: str, folder: str, resume: bool) -> None:
    """What a process that is killed does."""
    torch.set_num_threads(1)
    Trainer(recipe(corpus, "gqa", save_every=1, tokens=6000), folder, resume=resume).run()


@pytest.mark.slow
def test_killed_at_twenty_moments_the_curve_is_the_unbroken_one(tmp_path: Path, corpus: str) -> None:
    moments, kills, begun = random.Random(5), 0, False
    for _ in range(60):
        child = CONTEXT.Process(target=go_on, args=(corpus, str(tmp_path / "cut"), begun))
        child.start()
        end = time.monotonic() + 60
        goal = lines(tmp_path / "cut" / LOG) + moments.randint(1, 5)
        while child.is_alive() and time.monotonic() < end:
            begun = begun or (tmp_path / "cut" / LOG).exists()
            if begun and lines(tmp_path / "cut" / LOG) >= goal:
                break
            time.sleep(moments.random() * 0.01)
        if kills < 20 and child.is_alive():
            child.kill()
            kills += 1
        child.join(120)
        if child.exitcode == 0:
            break
    assert kills == 20 and child.exitcode == 0
    threads = torch.get_num_threads()
    try:
        go_on(corpus, str(tmp_path / "whole"), False)
    finally:
        torch.set_num_threads(threads)
    assert log(tmp_path / "cut") == log(tmp_path / "whole")
    last = checkpoint.steps_in(tmp_path / "whole")[-1]
    one, two = (checkpoint.read(tmp_path / name, last) for name in ("cut", "whole"))
    assert all(checkpoint.same(one.tensors[group], two.tensors[group]) for group in two.tensors)


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


# --------------------------------------------------------------------------------- what goes wrong


def run_to(folder: Path, plan: Recipe) -> Trainer:
    trainer = Trainer(plan, folder)
    trainer.run()
    return trainer


def test_broken_checkpoints_are_named_and_the_one_before_is_taken(tmp_path: Path, corpus: str) -> None:
    plan = recipe(corpus, "gqa", keep=3)
    run_to(tmp_path / "a", plan)
    steps = checkpoint.steps_in(tmp_path / "a")
    assert len(steps) == 3
    model = checkpoint.place_of(tmp_path / "a", steps[-1]) / "model.safetensors"
    wrong = bytearray(model.read_bytes())
    wrong[-1] ^= 1
    model.write_bytes(bytes(wrong))
    state = checkpoint.place_of(tmp_path / "a", steps[-2]) / "state.json"
    state.write_text(state.read_text()[:40])
    said: list[str] = []
    again = Trainer(plan, tmp_path / "a", resume=True, warn=said.append)
    assert again.step == steps[0] and len(said) == 2
    assert "model.safetensors is not what was written" in said[0] and "can't be read" in said[1]
    again.run()
    assert checkpoint.same(ends(again), ends(run_to(tmp_path / "b", plan)))
    for step in checkpoint.steps_in(tmp_path / "a"):
        (checkpoint.place_of(tmp_path / "a", step) / "optimizer.safetensors").unlink()
    with pytest.raises(TrainError, match="none of its 3 checkpoints"):
        Trainer(plan, tmp_path / "a", resume=True, warn=said.append)


@pytest.mark.parametrize("room_again", [True, False])
def test_a_full_disk_loses_only_that_checkpoint(
    tmp_path: Path, corpus: str, monkeypatch: pytest.MonkeyPatch, room_again: bool
) -> None:
    plan, said = recipe(corpus, "gqa"), []  # type: Recipe, list[str]
    real, count = os.fsync, [0]

    def fsync(number: int) -> None:
        count[0] += 1
        if count[0] > 6 and not (room_again and count[0] > 7):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(number)

    whole = run_to(tmp_path / "b", plan)
    monkeypatch.setattr(checkpoint.os, "fsync", fsync)
    trainer = Trainer(plan, tmp_path / "a", warn=said.append)
    if room_again:
        trainer.run()
        assert len(said) == 1 and "step 8 could not be written" in said[0]
        assert checkpoint.same(ends(trainer), ends(whole))
        assert checkpoint.steps_in(tmp_path / "a") == checkpoint.steps_in(tmp_path / "b")
        return
    with pytest.raises(OSError, match="No space") as full:  # the second in a row ends it
        trainer.run()
    monkeypatch.undo()
    assert "--resume" in str(full.value)
    assert checkpoint.steps_in(tmp_path / "a") == [4] and not list((tmp_path / "a").glob(".*.part"))
    again = Trainer(plan, tmp_path / "a", resume=True)
    assert again.step == 4
    again.run()
    assert log(tmp_path / "a") == log(tmp_path / "b")


def test_what_is_whole_outlives_what_is_broken(tmp_path: Path, corpus: str) -> None:
    """Broken checkpoints don't count among those that are kept, and one that is replaced stays until the end."""
    plan = recipe(corpus, "gqa", keep=1, tokens=800)
    run_to(tmp_path / "a", plan)
    (newest_step,) = checkpoint.steps_in(tmp_path / "a")
    kept = checkpoint.read(tmp_path / "a", newest_step)
    for step in (newest_step + 3, newest_step + 4):
        checkpoint.place_of(tmp_path / "a", step).mkdir()
    writer = checkpoint.Writer(tmp_path / "a", 1)
    writer.put(replace(kept, step=newest_step + 1))
    writer.wait()
    assert newest_step + 1 in checkpoint.steps_in(tmp_path / "a")
    said: list[str] = []
    again = Trainer(plan, tmp_path / "a", resume=True, warn=said.append)
    assert (
        again.step == newest_step + 1 and len(said) == 2 and len(list((tmp_path / "a").glob("broken-*"))) == 2
    )
    place = checkpoint.place_of(tmp_path / "a", newest_step + 1)
    os.replace(place, tmp_path / "a" / f".{place.name}.old")  # killed between two renames
    found, wrong = checkpoint.newest(tmp_path / "a")
    assert found is not None and found.step == newest_step + 1 and not wrong


def test_a_run_stays_on_its_data(tmp_path: Path, corpus: str) -> None:
    plan = recipe(corpus, "gqa", tokens=300)
    run_to(tmp_path / "a", plan)
    other = tmp_path / "moved"
    shutil.copytree(corpus, other)
    Trainer(replace(plan, sources=(Source(str(other)),)), tmp_path / "a", resume=True)
    source = json_lines(tmp_path / "x.jsonl", texts(300, start=5))
    build([str(source)], tmp_path / "c", TOKENIZER, Options(held=0.1), workers=1)
    with pytest.raises(TrainError, match="other data"):
        Trainer(replace(plan, sources=(Source(str(tmp_path / "c")),)), tmp_path / "a", resume=True)
    for step in checkpoint.steps_in(tmp_path / "a"):
        shutil.rmtree(checkpoint.place_of(tmp_path / "a", step))
    said: list[str] = []
    assert (
        Trainer(plan, tmp_path / "a", resume=True, warn=said.append).step == 0 and "begins again" in said[0]
    )


def test_what_can_not_be_evaluated_is_said_at_once(tmp_path: Path, corpus: str) -> None:
    broken = tmp_path / "c"
    shutil.copytree(corpus, broken)
    (held,) = broken.glob("held-*")
    held.write_bytes(held.read_bytes()[:-50])
    with pytest.raises(ValueError, match="cut off"):
        Trainer(recipe(str(broken), "gqa"), tmp_path / "a")
    source = json_lines(tmp_path / "x.jsonl", texts(100))
    build([str(source)], tmp_path / "d", TOKENIZER, workers=1)
    said: list[str] = []
    trainer = Trainer(recipe(str(tmp_path / "d"), "gqa"), tmp_path / "b", warn=said.append)
    assert "holds nothing out" in said[0] and trainer.evaluate() == {}


def test_a_run_goes_on_only_as_what_it_was(tmp_path: Path, corpus: str) -> None:
    plan = recipe(corpus, "gqa", tokens=200)
    run_to(tmp_path / "a", plan)
    with pytest.raises(TrainError, match="--resume"):
        Trainer(plan, tmp_path / "a")
    with pytest.raises(TrainError, match="another recipe"):
        Trainer(replace(plan, clip=0.5), tmp_path / "a", resume=True)
    Trainer(replace(plan, save_every=9, keep=5), tmp_path / "a", resume=True)  # that is nobody's business
    with pytest.raises(TrainError, match="holds no run"):
        Trainer(plan, tmp_path / "nowhere", resume=True)
    with pytest.raises(TrainError, match="token ids, and the model has"):
        Trainer(replace(plan, config=config("gqa", 60)), tmp_path / "b")
    with pytest.raises(TrainError, match="positions"):
        Trainer(replace(plan, stages=(Stage(201, 2),)), tmp_path / "b")


def begin_there(corpus: str, folder: str) -> None:
    """Exits by 3 if another process is at a run."""
    try:
        Trainer(recipe(corpus, "gqa"), folder, resume=True)
    except Busy:
        sys.exit(3)


def test_a_run_belongs_to_one_process(tmp_path: Path, corpus: str) -> None:
    def other() -> int | None:
        child = CONTEXT.Process(target=begin_there, args=(corpus, str(tmp_path / "a")))
        child.start()
        child.join(60)
        return child.exitcode

    first = run_to(tmp_path / "a", recipe(corpus, "gqa", tokens=200))
    second = Trainer(recipe(corpus, "gqa", tokens=200), tmp_path / "a", resume=True)
    del first
    gc.collect()
    assert other() == 3  # the second still has it
    del second
    gc.collect()
    assert other() == 1  # it gets as far as the recipe, which is another one


def test_steps_that_are_not_numbers_or_spikes_move_nothing(tmp_path: Path, corpus: str) -> None:
    plan = recipe(corpus, "gqa", guard=Guard(factor=5, window=4, most=2), tokens=2000, save_every=0)
    trainer = Trainer(plan, tmp_path / "a")
    real, bad = trainer.gradients, {6: math.nan, 9: 1e4}

    def gradients(batch: Any, seen: float) -> Any:
        told, load, found = real(batch, seen)
        factor = bad.get(trainer.step, 1.0)
        return told, load, {name: grad * factor for name, grad in found.items()}

    trainer.gradients = gradients  # type: ignore[method-assign]
    before: dict[int, dict[str, torch.Tensor]] = {}
    for report in trainer:
        now = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        if report.step in bad:
            assert report.skipped and checkpoint.same(now, before[report.step - 1])
        elif report.step:
            assert not report.skipped and not checkpoint.same(now, before[report.step - 1])
        before[report.step] = now
        if report.step == 12:
            break
    bad.update({n: math.nan for n in range(13, 30)})
    with pytest.raises(TrainError, match="not a number|nan.*3th time"):
        list(trainer)


def test_it_learns(tmp_path: Path, corpus: str) -> None:
    trainer = run_to(tmp_path / "a", recipe(corpus, "v3", tokens=12_000, rate=Schedule(0.01), ema=None))
    told = log(tmp_path / "a")
    assert told[0]["next"] > 5 and told[-1]["next"] < 2.5 and told[-1]["held"] < 2.5
    assert told[-1]["mtp 1"] < told[0]["mtp 1"] and told[-1]["accuracy"] > 0.4
    assert trainer.model.layers[1].ff.router.bias.abs().max() > 0


def test_overrides() -> None:
    plan = recipe("nowhere")
    assert override(plan, "rate", "1e-4").rate(10**9) == 1e-4
    assert override(plan, "optimizer.decay", "0").optimizer.decay == 0.0
    assert override(plan, "stages.0.batch", "1e2").stages[0].batch == 100
    assert override(plan, "clip", "none").clip is None and override(plan, "apart", "yes").apart is True
    assert override(plan, "sources.0.folder", "x").sources == (Source("x"),)
    assert override(replace(plan, stages=(Stage(8, 2),)), "stages.0.to", "4").stages[0].to == 4
    assert override(plan, "v2", "none").v2 is None and override(plan, "ema", "0.5").ema == 0.5
    assert override(plan, "optimizer.moments", "bfloat16").optimizer.moments == torch.bfloat16
    assert override(plan, "v2.expert", "0.1").v2 == V2Balance(expert=0.1)
    assert override(plan, "anticipate.steps", "3").anticipate == Anticipation(3)
    for path, value, why in (
        ("nope", "1", "has no 'nope'; it has name"),
        ("optimizer.nope", "1", "AdamW has no 'nope'"),
        ("stages.7.batch", "1", "no place in a list of 2"),
        ("seed", "x", "can't be read"),
        ("apart", "maybe", "can't be read"),
        ("optimizer", "x", "name a field of it, such as optimizer.betas"),
        ("seed.deep", "1", "nothing lies under"),
        ("micro", "none", "can't be read"),
        ("micro", "0", "above 0"),
        ("dtype", "banana", "can be float32"),
        ("clip", "-1", "above 0"),
        ("v2", "0.1", "name a field of it"),
        ("stages.0.to", "4.5", "can't be read"),
        ("rate", "nan", "can't be read"),
        ("seed", "-1", "must not be below 0"),
        ("guard.window", "0", "the second above 0"),
        ("guard.factor", "nan", "the first must be above"),
        ("optimizer.betas.0", "1", "betas lie from 0 to under 1"),
        ("optimizer.eps", "0", "eps above 0"),
        ("optimizer.moments", "int8", "can't be read"),
        ("v2.expert", "nan", "each factor must be"),
        ("drop", "true", "such as drop.capacity"),
    ):
        with pytest.raises(ValueError, match=why):
            override(plan, path, value)


def test_changed_bytes_of_a_corpus_are_found(
    tmp_path: Path, corpus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is built; of large corpora while it runs, and before it ends."""
    place = tmp_path / "c"
    shutil.copytree(corpus, place)
    shard = next(place.glob("train*.safetensors"))
    data = bytearray(shard.read_bytes())
    at = len(data) // 3
    data[at : at + 2], data[at + 2 : at + 4] = data[at + 2 : at + 4], data[at : at + 2]
    assert bytes(data) != shard.read_bytes()
    shard.write_bytes(data)
    plan = recipe(str(place), "gqa", tokens=64, evaluate_every=0)
    with pytest.raises(TrainError, match=r"train.*is not what its manifest says.*replaces such shards"):
        Trainer(plan, tmp_path / "a")
    monkeypatch.setattr(checking, "AT_ONCE", 0)
    plain, go = Corpus.check, threading.Event()
    monkeypatch.setattr(Corpus, "check", lambda self: plain(self) if go.wait(60) else [])
    steps = iter(Trainer(plan, tmp_path / "b"))
    next(steps)
    go.set()
    with pytest.raises(TrainError, match=r"its bytes have changed.*found at step"):
        list(steps)


def test_memory_may_change_on_resuming(tmp_path: Path, corpus: str) -> None:
    plan = recipe(corpus, "gqa", evaluate_every=0)
    short = iter(Trainer(plan, tmp_path / "a"))
    for _ in range(6):
        next(short)
    short.close()
    Trainer(replace(plan, micro=1, recompute=True), tmp_path / "a", resume=True, warn=lambda _: None).run()
    assert plan.fingerprint() == replace(plan, micro=1).fingerprint()
