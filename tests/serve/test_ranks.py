"""`rorqual serve` over two ranks as processes: one answer, one end, and nobody left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import rorqual
from rorqual.cli import app
from rorqual.serve import ranks
from tests.serve.conftest import until
from tests.serve.processes import free_port
from tests.serve.puppet import TOKENIZER
from tests.serve.test_process import alive
from tests.serve.test_real import speaking

httpx = pytest.importorskip("httpx2")
LONG = {"logit_bias": {str(end): -100 for end in TOKENIZER.eos}, "max_tokens": 100}


class Group:
    """The launcher's process, where its server listens, and its ranks' process ids."""

    def __init__(self, place: Path, model: str, *options: str) -> None:
        self.place, port = place, free_port()
        self.url, self.path = f"http://127.0.0.1:{port}", place / "log"
        root = str(Path(rorqual.__file__).parents[1])
        environment = {**os.environ, "PYTHONPATH": root, "TMPDIR": str(place), "OMP_NUM_THREADS": "1"}
        arguments = [str(place / model), "--port", str(port), "--device", "cpu", "--ranks", "2", *options]
        with self.path.open("w") as log:
            command = [sys.executable, "-m", "rorqual", "serve", *arguments]
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)

    @property
    def log(self) -> str:
        return self.path.read_text()

    def ranks(self) -> list[int]:
        return [int(file.read_text()) for file in sorted(self.place.glob("rorqual-ranks-*/*.pid"))]

    def up(self) -> bool:
        assert self.process.poll() is None, self.log
        try:
            return bool(httpx.get(self.url + "/ready").status_code == 200)
        except httpx.HTTPError:
            return False

    def post(self, **body: Any) -> Any:
        return httpx.post(
            self.url + "/v1/completions", json={"prompt": "Hello", "temperature": 0, **body}, timeout=60
        )


@contextmanager
def group(place: Path, kind: str, encoding: str, *options: str) -> Iterator[tuple[Group, Any]]:
    model = speaking(kind, encoding)
    rorqual.save(model, place / kind)
    made = Group(place, kind, *options)
    pids: list[int] = []
    try:
        until(made.up, 120)
        pids = made.ranks()
        assert len(pids) == 2 and all(alive(pid) for pid in pids)
        yield made, model
    finally:
        made.process.kill()
        made.process.wait()
    until(lambda: not any(alive(pid) for pid in pids))
    if made.process.returncode >= 0:
        assert not list(place.glob("rorqual-ranks-*"))


def test_two_ranks_serve_drain_and_end_together(tmp_path: Path) -> None:
    with group(tmp_path, "v3", "v31") as (made, model):
        assert "2 processes: 2 data x 1 tensor ranks" in made.log
        right = model.generate("Hello", rorqual.Sampling(0.0, max_new_tokens=8)).text
        assert made.post(max_tokens=8).json()["choices"][0]["text"] == right
        with httpx.stream(
            "POST", made.url + "/v1/completions", json={"prompt": "a", "stream": True, **LONG}, timeout=60
        ) as answer:
            lines = answer.iter_lines()
            next(lines)
            made.process.send_signal(signal.SIGTERM)
            until(lambda: httpx.get(made.url + "/ready").status_code == 503)
            assert made.post(max_tokens=1).status_code == 503
            seen = [line for line in lines if line.startswith("data")]
        assert (
            seen[-1] == "data: [DONE]" and json.loads(seen[-2][6:])["choices"][0]["finish_reason"] == "length"
        )
        assert made.process.wait(60) == 0, made.log
        assert "Traceback" not in made.log


def test_a_rank_that_dies_ends_the_server_and_is_named(tmp_path: Path) -> None:
    with group(tmp_path, "gqa", "chatml") as (made, _):
        assert "2 processes: 1 data x 2 tensor ranks" in made.log
        with httpx.stream(
            "POST", made.url + "/v1/completions", json={"prompt": "a", "stream": True, **LONG}, timeout=60
        ) as answer:
            lines = answer.iter_lines()
            next(lines)
            os.kill(made.ranks()[1], signal.SIGKILL)
            last = [line for line in lines if line.startswith("data")][-1]
        assert json.loads(last[6:])["error"]["code"] in ("unavailable", "internal_error"), last
        assert made.process.wait(60) == 1
        assert "rank 1 was ended by SIGKILL" in made.log and "Traceback" not in made.log, made.log


@pytest.mark.parametrize(("copies", "turns"), [(0.3, 1), (0.6, 2), (5.0, 2)])
def test_ranks_read_in_turns_where_memory_is_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, copies: float, turns: int
) -> None:
    """`copies`: the model's size as a share of the memory."""
    (tmp_path / "model.safetensors").write_bytes(bytes(1000))
    monkeypatch.setattr(os, "sysconf", lambda name: int(1000 / copies) if name == "SC_PHYS_PAGES" else 1)
    monkeypatch.setattr(ranks, "spread", lambda model, layout: None)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    told: list[str] = []

    def least(value: int) -> int:
        told.append("meet")
        return value

    layout: Any = SimpleNamespace(rank=1, world=2, least=least)
    ranks.in_turns(layout, tmp_path, lambda: told.append("load") or "model")  # type: ignore[func-returns-value,type-var,return-value]
    assert told == ["meet", *["meet"] * (turns - 1), "load", "meet"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--gpus", "999"], "this machine has"),
        (["--ranks", "2"], "add --device cpu"),
        (["--ranks", "2", "--gpus", "2"], "not both"),
        (["--ranks", "0", "--device", "cpu"], "at least one"),
        (["--gpus", "1", "--device", "cpu"], "leave --device out"),
        (["--tensor", "2"], "say how many"),
    ],
)
def test_options_that_do_not_go_together(options: list[str], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        app(["serve", "smollm2", *options], exit_on_error=False)
