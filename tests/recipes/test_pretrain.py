"""`rorqual pretrain` as a user meets it: begun, stopped, resumed, and its model read back."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from rich.console import Console

import rorqual
from rorqual import cli
from rorqual.cli import app
from rorqual.cli.pretrain import Tasks
from rorqual.cli.view import View, duration
from rorqual.recipes import RECIPES
from rorqual.recipes.mini import embedded_text
from rorqual.text.train import SPECIAL, train_tokenizer
from rorqual.train import checkpoint, pace
from rorqual.train.trainer import Report, Trainer

SMALL = [
    "tokens=10240",
    "stages.0.batch=8",
    "stages.0.length=64",
    "micro=8",
    "save_every=5",
    "evaluate_every=10",
]


def run(*words: str) -> None:
    app(["pretrain", *words], exit_on_error=False, result_action="return_value")


def small(folder: Path, *more: str) -> list[str]:
    return ["recipe:mini-cpu", "--out", str(folder), *(w for s in SMALL for w in ("--override", s)), *more]


def test_it_trains_resumes_and_leaves_a_model_that_others_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], ctrl_c: None
) -> None:
    real = Trainer._take

    def interrupted(self: Trainer) -> Any:
        if self.step == 7:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self)

    monkeypatch.setattr(Trainer, "_take", interrupted)
    with pytest.raises(SystemExit, match="130"):
        run(*small(tmp_path / "a"))
    monkeypatch.undo()
    assert checkpoint.steps_in(tmp_path / "a" / "run")[-1] == 8
    assert "8 steps" in (tmp_path / "a" / "run" / "curves.svg").read_text()
    with pytest.raises(ValueError, match="--resume"):
        run(*small(tmp_path / "a"))
    with pytest.raises(ValueError, match="at step 8 already"):
        run(*small(tmp_path / "a", "--resume", "--profile", "3"))
    real_evaluate = Trainer.evaluate
    monkeypatch.setattr(Trainer, "evaluate", lambda self: {"held": real_evaluate(self)["held"] + self.step})
    run(*small(tmp_path / "a", "--resume", "--profile", "8:9", "--export", "best"))
    best = checkpoint.read(tmp_path / "a" / "run", 10).tensors["model"]
    assert checkpoint.steps_in(tmp_path / "a" / "run") == [10, 15, 20]
    assert "20 steps" in (tmp_path / "a" / "run" / "curves.svg").read_text()
    trace = (tmp_path / "a" / "run" / "trace-8-9.json").read_text()
    assert "embedding_dense_backward" in trace
    told = [json.loads(line) for line in (tmp_path / "a" / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in told] == list(range(20))
    assert told[-1]["next"] < told[0]["next"] - 0.5
    model = rorqual.load(tmp_path / "a" / "model")
    assert model.tokenizer is not None and len(model.mtp) == 1
    assert checkpoint.same(dict(model.state_dict()), best)
    assert model.generate("The", rorqual.Sampling(max_new_tokens=5)).ids
    peer = pytest.importorskip("transformers").AutoModelForCausalLM.from_pretrained(tmp_path / "a" / "model")
    ids = torch.randint(5, 2000, (2, 20))
    with torch.no_grad():
        assert (peer(ids).logits - model(ids)).abs().max() < 1e-4
    said = "".join(capsys.readouterr().err.split())
    assert "rorqualgenerate" in said and "step10isthebest" in said and "trace-8-9.json" in said


def test_what_is_wrong_is_said_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for words, why in (
        (["mini-cpu"], "write recipe:NAME"),
        (["recipe:nope"], "there is no recipe 'nope'; there are v1-7b.*mini-cpu"),
        (["recipe:mini-cpu", "--override", "rate"], "write path=value"),
        (["recipe:mini-cpu", "--override", "nope=1"], "has no 'nope'"),
        (["recipe:mini-cpu", "--override", "rate=fast"], r"rate=fast can't .* a number makes it constant$"),
        (["recipe:mini-cpu", "--data", "c:x"], "'x' is no weight"),
        (["recipe:mini-cpu", "--data", "nowhere"], "nowhere has no manifest.json"),
        (["recipe:mini-cpu", "--log", "paper"], "no log 'paper'"),
        (["recipe:mini-cpu", "--profile", "9:3"], "--profile 9:3: write a step"),
        (["recipe:mini-cpu", "--device", "sofa"], "--device sofa can't be used here"),
        (["recipe:mini-cpu", "--eval-tasks-every", "5"], "name the tasks"),
        (["recipe:mini-cpu", "--eval-tasks", "a", "--eval-tasks-every", "-1"], "must not be below 0"),
        (["recipe:mini-cpu", "--override", "evaluate_every=0", "--export", "best"], "needs held-out losses"),
    ):
        with pytest.raises(ValueError, match=why):
            run(*words, *([] if words == ["mini-cpu"] else ["--out", str(tmp_path / "a")]))
    (tmp_path / "f").write_text("no folder")
    with pytest.raises(ValueError, match="f is a file: name a folder by --out"):
        run("recipe:mini-cpu", "--out", str(tmp_path / "f"))
    run(*small(tmp_path / "b", "--dry-run", "--device", "cpu"))
    said = capsys.readouterr().err
    assert "4.1M parameters" in said and "tokens/s (measured on random tokens)" in " ".join(said.split())
    assert "moments" in said and not (tmp_path / "b").exists() and not (tmp_path / "a" / "run").exists()
    monkeypatch.setattr(pace, "PATIENCE", 0.0)
    run(*small(tmp_path / "b", "--dry-run", "--device", "cpu"))
    assert "(arithmetic: 30% of" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_recipes_are_the_same_every_time(name: str, tmp_path: Path) -> None:
    one, two = (RECIPES[name].make(tmp_path / place) for place in "ab")
    assert one.fingerprint() == two.fingerprint()
    longer = RECIPES[name].make(tmp_path, 3 * one.tokens)
    assert [longer.rate(3 * t) for t in (10, 10**5, 10**6)] == pytest.approx(
        [one.rate(t) for t in (10, 10**5, 10**6)]
    )


def test_a_tokenizer_of_ones_own() -> None:
    texts = embedded_text()
    assert len(texts) > 50 and sum(map(len, texts)) > 300_000
    tokenizer = train_tokenizer(texts, 1000)
    assert tokenizer.vocab_size == 1000 and [tokenizer.id_of(t) for t in SPECIAL] == [0, 1]
    text = texts[0] + " Zürich 鯨 \U0001f40b\r\n\t"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and len(ids) < len(text) / 2
    with pytest.raises(ValueError, match="no room"):
        train_tokenizer(texts, 100)


def test_tasks_on_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in of what runs them: when they are run, and that their failing ends nothing."""
    asked: list[Any] = []

    def evaluate(model: Any, names: list[str], **given: Any) -> dict[str, float]:
        asked.append((names, model.tokenizer is not None, given["limit"]))
        if len(asked) == 3:
            raise RuntimeError("no such document")
        return {"sea acc": len(asked) / 4}

    stand_in = ModuleType("rorqual.harness")
    vars(stand_in).update(evaluate=evaluate, known_tasks=lambda names, include: None)
    monkeypatch.setitem(sys.modules, "rorqual.harness", stand_in)
    said: list[str] = []
    tasks = Tasks("sea, ", 2, 7, None, said.append)
    corpus = tmp_path / "corpus"
    train_tokenizer(embedded_text()[:5], 400).save(corpus / "tokenizer")
    tasks.take(rorqual.Model(RECIPES["mini-cpu"].make(tmp_path).config, device="meta"), corpus / "tokenizer")
    told = [tasks(step, step == 7) for step in range(1, 8)]
    assert told == [{}, {"sea acc": 0.25}, {}, {"sea acc": 0.5}, {}, {}, {}] and len(asked) == 3
    assert asked[0] == (["sea"], True, 7) and len(said) == 1 and "no such document" in said[0]
    monkeypatch.setitem(sys.modules, "rorqual.harness", None)
    with pytest.raises(ValueError, match="harness"):
        Tasks("sea", 0, None, None, said.append)


def test_the_view() -> None:
    """Share of peak, time left and times back, from what steps tell."""
    plan = SimpleNamespace(name="n", tokens=10_000)
    view = View(plan, 0, "cpu", flops=1e9, peak=1e12)
    for step, tokens in ((0, 1000.0), (1, 2000.0), (1, 2000.0)):
        view.take(
            Report(step, {"tokens": tokens, "seconds": 5.0, "next": 2.0, "violation 1": 0.5}, taken=1000)
        )
    view.take(Report(2, {"tokens": 3000.0, "seconds": 5.0}, taken=1000, back="a spike", skipped="x"))
    console = Console(width=120, file=io.StringIO())
    console.print(view)
    shown = " ".join(console.file.getvalue().split())
    for text in (
        "35 s left",
        "tokens/s 200",
        "of peak 20%",
        "1 skipped, 1× back",
        "1.50 of its share",
        "GiB",
    ):
        assert text in shown, (text, shown)
    spans = {45: "45 s", 99.4: "99 s", 130: "2 min", 7000: "1 h 57 min", 10**6: "11.6 days"}
    assert {seconds: duration(seconds) for seconds in spans} == spans


def test_too_little_memory_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    problems = [
        torch.OutOfMemoryError("CUDA out of memory. Tried\nmuch"),
        RuntimeError("can't allocate memory: 8 B"),
    ]
    monkeypatch.setattr(sys, "argv", ["rorqual", "pretrain", "recipe:v3"])
    for problem in problems:
        monkeypatch.setattr(cli, "app", Mock(side_effect=problem))
        with pytest.raises(SystemExit, match="1"):
            cli.main()
        said = " ".join(capsys.readouterr().err.split())
        assert "too little memory" in said and "micro=1" in said and "much" not in said
    monkeypatch.setattr(cli, "app", Mock(side_effect=RuntimeError("anything else")))
    with pytest.raises(RuntimeError, match="anything else"):
        cli.main()
