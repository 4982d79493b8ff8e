"""Benchmarks that need a GPU, gone through on the CPU at toy size: their figures mean nothing here, but they come."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import context, lite, load, spec
from benchmarks.plot import Panel, chart
from rorqual.engine import Engine
from rorqual.family import MLA, Index, ModelConfig, Rope
from tests.engine.conftest import build, config
from tests.engine.test_engine import as_on_a_gpu
from tests.engine.test_fp8_cache import small_v4


def blocks_of_128(kind: str) -> ModelConfig:
    """A V3 or V3.2 so small that it still has an FP8 cache."""
    plain = config(kind)
    part = MLA(4, 128, 12, 8, 10, Rope(8, interleaved=True), 20, Index(16, 128, 6) if kind == "v32" else None)
    return replace(plain, layers=tuple(replace(layer, attention=part) for layer in plain.layers), mtp=())


@pytest.mark.parametrize(
    ("whole", "names", "graphs"),
    [
        pytest.param(blocks_of_128("v3"), ["it"], False, id="v3, no graphs"),
        pytest.param(blocks_of_128("v3"), ["it"], True, id="v3"),
        pytest.param(blocks_of_128("v32"), ["it", "dense MLA"], True, id="v32"),
        pytest.param(small_v4(), ["it", "dense MLA"], True, id="v4"),
    ],
)
def test_context(
    whole: ModelConfig,
    names: list[str],
    graphs: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if graphs:
        plainly = context.engine_for
        monkeypatch.setattr(context, "engine_for", lambda *what: as_on_a_gpu(plainly(*what)))
    context.context("t", "it", [192, 256], 3, "cpu", tmp_path, config=whole)
    drawn, told = (tmp_path / "context-t.svg").read_text(), capsys.readouterr().out
    for curve in [f"{name}, {kind} cache" for name in names for kind in ("bf16", "FP8")]:
        assert curve in drawn and told.count(curve) == 2, told
    points = len(names) * 2 * 2
    assert told.count("graph=") == points and "failed" not in told, told


def test_a_context_that_gives_nothing_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any) -> Engine:
        raise RuntimeError("no such [kernel]")

    monkeypatch.setattr(context, "engine_for", broken)
    with pytest.raises(SystemExit, match="it: nothing was measured"):
        context.context("t", "it", [192], 2, "cpu", tmp_path, config=blocks_of_128("v3"))
    assert capsys.readouterr().out.count("RuntimeError: no such [kernel]") == 2
    with pytest.raises(ValueError, match="'one pass' of 'cost' has no points"):
        chart("cost", "", [Panel("one pass", "ms", {"it": []})], "tokens")


def test_load(capsys: pytest.CaptureFixture[str]) -> None:
    load.load(config("v3"), 8, "cpu", (10, 40), (2, 9))
    told = capsys.readouterr().out
    assert "| 8 at once," in told and "against all 8 answers in step" in told and "0 preemptions" in told


def test_answers_in_step() -> None:
    """Prompts read in many passes: the first answers are long when the last begin, but none ends while it is timed."""
    model = build("v3")
    engine = Engine(model, max_requests=16, step_tokens=16)
    rate, reading = lite.decode(engine, 16, 64, 8)
    assert rate > 0 and reading > 0 and not engine.busy
    with pytest.raises(RuntimeError, match="not in step: in 8 passes they grew by 0 to 8 tokens"):
        lite.decode(Engine(model, max_requests=2), 4, 8, 8)


def test_spec(capsys: pytest.CaptureFixture[str]) -> None:
    spec.main(config("v3").replace(mtp=()), ((1, 10), (3, 20)), 4, "cpu")
    told = capsys.readouterr().out
    assert "failed" not in told and told.count("tok/s") == 2 * (4 + 2), told
