"""`rorqual pretrain` as a user meets it: begun, stopped, resumed, and its model read back."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import rorqual
from rorqual.cli import app
from rorqual.recipes import RECIPES
from rorqual.recipes.mini import embedded_text
from rorqual.text.train import SPECIAL, train_tokenizer
from rorqual.train import checkpoint
from rorqual.train.trainer import Trainer

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
    with pytest.raises(ValueError, match="--resume"):
        run(*small(tmp_path / "a"))
    run(*small(tmp_path / "a", "--resume"))
    told = [json.loads(line) for line in (tmp_path / "a" / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in told] == list(range(20))
    assert told[-1]["next"] < told[0]["next"] - 0.5
    model = rorqual.load(tmp_path / "a" / "model")
    assert model.tokenizer is not None and len(model.mtp) == 1
    assert model.generate("The", rorqual.Sampling(max_new_tokens=5)).ids
    peer = pytest.importorskip("transformers").AutoModelForCausalLM.from_pretrained(tmp_path / "a" / "model")
    ids = torch.randint(5, 2000, (2, 20))
    with torch.no_grad():
        assert (peer(ids).logits - model(ids)).abs().max() < 1e-4
    assert "rorqual generate" in capsys.readouterr().err


def test_what_is_wrong_is_said_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, why in (
        (["mini-cpu"], "write recipe:NAME"),
        (["recipe:nope"], "there is no recipe 'nope'; there are v1-7b.*mini-cpu"),
        (["recipe:mini-cpu", "--override", "rate"], "write path=value"),
        (["recipe:mini-cpu", "--override", "nope=1"], "has no 'nope'"),
        (["recipe:mini-cpu", "--data", "c:x"], "'x' is no weight"),
        (["recipe:mini-cpu", "--data", "nowhere"], "nowhere has no manifest.json"),
    ):
        with pytest.raises(ValueError, match=why):
            run(*words, *([] if words == ["mini-cpu"] else ["--out", str(tmp_path / "a")]))
    run("recipe:mini-cpu", "--out", str(tmp_path / "b"), "--dry-run")
    assert "M parameters" in capsys.readouterr().err and not (tmp_path / "b").exists()


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
