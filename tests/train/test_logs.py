"""What is told of a run: dashboards that never end it, curves, traces, and what it will take."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from rorqual.data import Batch
from rorqual.family import ModelConfig
from rorqual.nn import Transformer
from rorqual.train import budget, checkpoint, logs, plot
from rorqual.train.budget import memory
from rorqual.train.objective import Factors, Pretraining
from rorqual.train.optim import AdamW, Muon
from rorqual.train.parts import PARTS, norms_by_part, part_of
from rorqual.train.profiling import Profile, steps_of
from rorqual.train.recipe import Guard
from rorqual.train.schedule import Stage
from rorqual.train.trainer import Report, Trainer
from tests.engine.conftest import config
from tests.train.test_rollback import spiking
from tests.train.test_trainer import corpus, log, recipe

__all__ = ["corpus"]


class Kept:
    """A sink that keeps what it is told, and breaks at a step."""

    def __init__(self, breaks: int = -1) -> None:
        self.told: dict[int, tuple[dict[str, float], dict[str, list[int]]]] = {}
        self.cuts: list[int] = []
        self.breaks, self.closed = breaks, False

    def put(self, step: int, curves: Mapping[str, float], load: Mapping[str, list[int]]) -> None:
        if step == self.breaks:
            raise ConnectionError("nobody listens")
        self.told[step] = dict(curves), dict(load)

    def cut(self, step: int) -> None:
        self.cuts.append(step)
        self.told = {n: told for n, told in self.told.items() if n < step}

    def close(self) -> None:
        self.closed = True


def test_a_run_is_told_of_and_a_broken_listener_does_not_end_it(tmp_path: Path, corpus: str) -> None:
    guard = Guard(factor=50, window=3, back=True)
    plan = recipe(corpus, "v3", tokens=400, guard=guard, save_every=4, evaluate_every=5, ema=None)
    said: list[str] = []
    trainer = Trainer(plan, tmp_path / "a", warn=lambda _: None)
    spiking(trainer, {6: 1e4})
    one, two = Kept(), Kept(breaks=3)
    told = logs.Logs({"one": one, "two": two}, said.append)
    trainer.run(told)
    told.close()
    assert one.closed and not two.closed and len(said) == 1
    assert "two takes no more" in said[0] and "nobody listens" in said[0]
    assert list(one.told) == list(range(trainer.step)) and one.cuts == [4] and list(two.told) == [0, 1, 2]
    lines = log(tmp_path / "a")
    for line, (curves, _) in zip(lines, one.told.values(), strict=True):
        assert curves["loss/next"] == line["next"] and curves["gradient_norm/router"] == line["norm router"]
        assert curves["max_violation/layer_1"] == line["violation 1"]
        assert curves["accuracy/mtp_1"] == line["mtp 1 accuracy"] and curves["run/tokens_per_second"] > 0
        norms = [value for name, value in curves.items() if name.startswith("gradient_norm/")]
        assert math.hypot(*norms[1:]) == pytest.approx(norms[0], rel=1e-5)
    assert one.told[4][0]["loss/held"] == lines[4]["held"]
    _, load = one.told[0]
    assert {name: (len(counts), sum(counts)) for name, counts in load.items()} == {
        "layer_1": (8, 2 * 16 * 3),
        "layer_2": (8, 2 * 16 * 3),
    }
    last = checkpoint.read(tmp_path / "a", lines[-1]["step"] // 4 * 4)  # what its next step was routed by
    for number, name in ((1, "layers.1"), (2, "mtp.0.block")):
        bias = last.tensors["model"][f"{name}.ff.router.bias"]
        spread = float(bias.max() - bias.min())
        assert spread > 0 and lines[last.step][f"spread {number}"] == pytest.approx(spread)


@pytest.mark.parametrize("kind", ["gqa", "v32", "v4"])
def test_every_parameter_has_its_part(kind: str) -> None:
    model = Transformer(config(kind), device="meta")
    parts: dict[str, list[str]] = {}
    for name, _ in model.named_parameters():
        parts.setdefault(part_of(name), []).append(name)
    few = {"embedding", "attention", "dense", "norms", "head"}
    assert set(parts) == {"gqa": few, "v32": set(PARTS) - {"mixing"}, "v4": set(PARTS)}[kind]
    assert parts["embedding"] == ["embed.weight"] and parts["head"] == ["head.weight"]
    assert all("norm" in name for name in parts["norms"]) and all("mix" in n for n in parts.get("mixing", []))
    assert all(".experts." in name for name in parts.get("experts", []))
    found = norms_by_part((name, 2.0) for name, _ in model.named_parameters())
    assert found == {part: pytest.approx(2 * len(parts[part]) ** 0.5) for part in found}


def report(step: int, **values: float) -> Report:
    made = {"loss": 3.0 - step / 10, "next": 2.5, "norm": 1.0, "tokens": 64.0 * (step + 1), "seconds": 0.5}
    return Report(step, made | values, {1: [3, 1, 0, 4]}, 64)


@pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None, reason="the extra train is not installed"
)
def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    told = logs.open_logs(["tensorboard"], tmp_path, "p")
    for step in (0, 1, 2, 3, 2, 3):  # it went back once
        told(report(step, mark=float(step)))
    told.close()
    found = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"histograms": 0})
    found.Reload()
    scalars = found.Scalars("loss/loss")
    assert [(s.step, round(s.value, 4)) for s in scalars] == [(0, 3.0), (1, 2.9), (2, 2.8), (3, 2.7)]
    assert found.Scalars("run/tokens_per_second")[0].value == 128.0 and "more/mark" in found.Tags()["scalars"]
    (histogram,) = found.Histograms("expert_load/layer_1")
    assert histogram.histogram_value.bucket == [3, 1, 0, 4] and histogram.histogram_value.num == 8


def test_trackio_is_asked_as_it_wants_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in of its functions: where it is installed, the real one was tried by hand."""
    calls: list[Any] = []
    stand_in = ModuleType("trackio")
    stand_in.__spec__ = importlib.util.spec_from_loader("trackio", None)  # type: ignore[assignment]
    vars(stand_in).update(
        init=lambda **given: calls.append(given),
        log=lambda metrics, step: calls.append((step, metrics)),
        finish=lambda: calls.append("finish"),
        Histogram=lambda np_histogram: tuple(map(list, np_histogram)),
    )
    monkeypatch.setitem(sys.modules, "trackio", stand_in)
    told = logs.open_logs(logs.kinds_of(" trackio, "), tmp_path / "mini" / "run", "p")
    told(report(0))
    told.close()
    begun, (step, metrics), ended = calls
    assert begun["project"] == "p" and begun["name"] == "mini-run" and step == 0 and ended == "finish"
    assert metrics["loss/next"] == 2.5 and metrics["expert_load/layer_1"] == ([3, 1, 0, 4], [0, 1, 2, 3, 4])


def test_logs_that_can_not_be_are_said_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="no log 'paper'; there are tensorboard, trackio"):
        logs.kinds_of("paper")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for kind, how in (("trackio", "pip install trackio"), ("tensorboard", r"rorqual\[train\]")):
        with pytest.raises(ValueError, match=how):
            logs.kinds_of(kind)
    assert logs.kinds_of("") == []
    said: list[str] = []
    monkeypatch.setitem(sys.modules, "trackio", None)
    logs.open_logs(["trackio"], tmp_path, "p", warn=said.append)(report(0))
    assert len(said) == 1 and "trackio can't be opened" in said[0]


# ------------------------------------------------------------------------------------- curves, traces


def paths(svg: str) -> list[list[tuple[float, ...]]]:
    found = [
        node.get("d", "") for node in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}path")
    ]
    return [[tuple(map(float, corner.strip("ML").split(","))) for corner in d.split()] for d in found]


def test_curves(tmp_path: Path) -> None:
    assert plot.draw(tmp_path) is None
    lines = [
        {"step": n, "tokens": 10.0 * (n + 1), "next": 5 - n / 500, "norm": 10.0 ** (n % 3), "rate": 0.001}
        | ({"held": 4.0} if n % 100 == 99 else {})
        | ({"skipped": "a spike", "norm": math.nan} if n == 7 else {"violation 1": 0.5, "violation 2": 1.5})
        for n in range(1000)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "log.jsonl").write_text(text + '{"step": 1000, "tok')
    place = plot.draw(tmp_path)
    assert place is not None and place.name == "curves.svg"
    svg = place.read_text()
    assert "1,000 steps, 10,000 tokens; 1 moved nothing" in svg and "held out" in svg and "MTP" not in svg
    next_token, held, *_ = drawn = paths(svg)
    assert len(drawn) == 5 and plot.POINTS / 2 < len(next_token) <= plot.POINTS and len(held) == 10
    assert all(a[0] < b[0] and a[1] < b[1] for a, b in itertools.pairwise(next_token))  # it falls
    assert len({y for _, y in drawn[-1]}) == 1  # the layer with most, at all steps
    (tmp_path / "log.jsonl").write_text(json.dumps(lines[0]) + "\n")
    assert plot.draw(tmp_path) == place  # one point is drawn, too
    assert plot.ticks(2.1, 4.9) == [2, 3, 4, 5] and plot.ticks(0, 0) == pytest.approx(
        [0, 0.2, 0.4, 0.6, 0.8, 1]
    )
    for low, high in ((0.0, 1e-3), (1.0, 1.0), (-3.0, 2.0), (1.23456, 1.23457)):
        marks = plot.ticks(low, high)
        assert marks[0] <= low and marks[-1] >= high and 3 <= len(marks) <= 8


def test_some_steps_are_traced(tmp_path: Path, corpus: str) -> None:
    trainer = Trainer(recipe(corpus, "gqa", tokens=200, evaluate_every=0), tmp_path / "a")
    traced = Profile(tmp_path, 2, 3)
    trainer.run(traced)
    traced.close()
    found = json.loads((tmp_path / "trace-2-3.json").read_text())["traceEvents"]
    inner = [event for event in found if event.get("name") == "aten::embedding_dense_backward"]
    whole = Profile(tmp_path, 0, 10**6)
    again = Trainer(recipe(corpus, "gqa", tokens=200, evaluate_every=0), tmp_path / "b")
    again.run(whole)
    whole.close()  # a run that ends before the last step
    everything = json.loads(whole.path.read_text())["traceEvents"]
    total = sum(event.get("name") == "aten::embedding_dense_backward" for event in everything)
    micros = [-(-trainer.steps[step][2] // 2) for step in range(trainer.step)]
    assert len(inner) * sum(micros) == total * sum(micros[2:4]) > 0
    assert steps_of("5") == (5, 5) and steps_of("5:9") == (5, 9)
    for text in ("x", "5:", "9:5", "-1", "1:2:3", ""):
        with pytest.raises(ValueError, match="--profile"):
            steps_of(text)
    with pytest.raises(ValueError, match="at step 7 already"):
        Profile(tmp_path, 2, 3, begin=7)


# ------------------------------------------------------------------------------------ what it will take


def saved_elements(model_config: ModelConfig, rows: int, width: int) -> float:
    """What autograd keeps of a pass, in elements a token: each storage once, parameters left out."""
    model = Transformer(model_config, seed=0)
    look = 1 + len(model.mtp)
    ids = torch.randint(model_config.vocab, (rows, width + look))
    batch = Batch(ids, torch.zeros_like(ids), torch.zeros(rows, dtype=torch.int64), look)
    objective = Pretraining()
    counts = objective.counts([batch], len(model.mtp))
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        objective(model, batch, counts, Factors(0.3, 1e-4))
    return sum(storage.nbytes() for storage in kept.values()) / (4 * rows * width)


@pytest.mark.parametrize("kind", ["gqa", "v3", "v32", "v4"])
def test_activations_are_about_what_is_kept(kind: str) -> None:
    """An estimate: within 30 %. (The CPU's dense MLA keeps scores of all pairs, too, so short rows are measured.)"""
    assert budget.activations(config(kind)) == pytest.approx(saved_elements(config(kind), 2, 32), rel=0.3)


def test_memory_is_what_a_run_has(tmp_path: Path, corpus: str) -> None:
    def size(tensors: Any) -> int:
        return sum(t.numel() * t.element_size() for t in tensors)

    for settings, dtype in (
        (AdamW(moments=torch.bfloat16), "bfloat16"),
        (Muon(), "bfloat16"),
        (AdamW(), "float32"),
    ):
        stages = (Stage(length=16, batch=2),)
        plan = recipe(corpus, "v3", optimizer=settings, dtype=dtype, evaluate_every=0, stages=stages)
        trainer, need = Trainer(plan, tmp_path / f"{settings}{dtype}"[:60]), memory(plan)
        next(iter(trainer))
        state = trainer.optimizer.tensors()
        masters = [t for name, t in state.items() if name.endswith(".master")]
        assert need.weights == size(trainer.model.state_dict().values()) and need.master == size(masters)
        assert need.moments == size(state.values()) - need.master and trainer.ema is not None
        assert need.gradients == size(p.grad for p in trainer.model.parameters() if p.grad is not None)
        assert need.ema == size(trainer.ema.values())
        assert need.total > need.weights + need.gradients + need.master + need.moments
        _, _, sums = trainer.gradients(trainer.mixtures[0].batch(0, 3), 0)  # a micro-batch and a half
        both = memory(replace(plan, stages=(Stage(length=16, batch=3),)))
        assert both.gradients == need.gradients + size(sums.values())
    assert (need.master, memory(recipe(corpus, ema=None)).ema) == (0, 0)
    plan = recipe(corpus, "v32", dsa="warm-up", evaluate_every=0)
    trainer, need = Trainer(plan, tmp_path / "warm-up"), memory(plan)
    assert need.moments == size(trainer.optimizer.tensors().values())


def test_flops_are_six_a_parameter_and_token() -> None:
    """Three passes of a multiply-add: 6 for each matrix element that a token meets, and attention's, which grow."""
    plain = config("gqa")
    matrices = 2 * (4 * 8 * 32 * 2 + 2 * 8 * 32 * 2 + 3 * 32 * 48) + 60 * 32
    one, two = (budget.flops_per_token(plain, length) for length in (1, 101))
    attention = 3 * 2 * 4 * 4 * 8  # three passes, two layers, scores and sums of four heads of eight
    assert one == 6 * matrices + attention and two - one == 50 * attention
    drafting = config("v3")
    without = ModelConfig(**{**vars(drafting), "mtp": ()})
    more = budget.flops_per_token(drafting, 64) - budget.flops_per_token(without, 64)
    assert more > 6 * 60 * 32  # a head, and the module's own
