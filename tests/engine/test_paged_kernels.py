"""The engine by the GPU's kernels, here in Triton's interpreter: `model.generate`'s tokens."""

from __future__ import annotations

import random
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from rorqual.engine import Engine, Sampling, runner
from rorqual.family import MLA, Index, Rope
from rorqual.kernels import cache_write
from rorqual.model import Model
from tests.engine.conftest import config
from tests.engine.test_engine import engine_of, idle
from tests.engine.test_fp8_cache import small_v4
from tests.interpreter import repair
from tests.parity.zoo import stir_ours


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every place that asks whether kernels can run is told yes; returns the names of those that ran."""
    if torch.cuda.is_available():
        pytest.skip("kernels are compiled for the GPU here")
    repair(monkeypatch)
    for name, module in list(sys.modules.items()):
        if name.startswith("rorqual.") and hasattr(module, "usable"):
            monkeypatch.setattr(module, "usable", lambda *_: True)
    monkeypatch.setattr(cache_write, "_plain", lambda *ts: all(t is None or t.stride(-1) == 1 for t in ts))
    lay_out = runner.lay_out
    monkeypatch.setattr(runner, "lay_out", lambda *a, **_: lay_out(*a, one_group_of_chunks=True))
    launched: list[str] = []
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    run = interpreter.GridExecutor.__call__

    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        launched.append(self.fn.__name__)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", noted)
    return launched


def member(kind: str) -> Model:
    """A small member whose sizes the kernels take (powers of two from 16 on)."""
    plain = config(kind)
    if kind in ("gqa", "v4"):
        model = Model(plain)
    else:
        index = Index(16, 16, 6) if kind == "v32" else None
        attention = MLA(4, 32, 16, 16, 16, Rope(16, interleaved=True), q_rank=32, index=index)
        layers = tuple(replace(layer, attention=attention) for layer in plain.layers)
        model = Model(replace(plain, layers=layers, mtp=()))
    stir_ours(model)
    return model


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "kernels"),
    [
        ("gqa", {"_attend", "_gqa_kernel", "_rmsnorm_kernel", "_swiglu_kernel"}),
        ("v3", {"_attend", "_mla_kernel", "_prefill", "_gather", "_choose_kernel", "gate_up_kernel"}),
        ("v32", {"_sparse", "_mla_kernel", "_rows_kernel", "_score", "_choose", "gate_up_kernel"}),
        ("v4", {"_attend", "_pool", "_score", "_choose", "_slice", "gate_up_kernel"}),
    ],
)
def test_tokens_by_kernels(kind: str, kernels: set[str], request: pytest.FixtureRequest) -> None:
    model = member(kind)
    prompts = [[random.randrange(60) for _ in range(count)] for count in (1, 18, 7)]
    sampling = Sampling(0.0, max_new_tokens=4, ignore_eos=True)
    plain = [c.ids for c in model.generate(prompts, sampling)]
    launched = request.getfixturevalue("interpreted")
    engine = engine_of(model, 200, step_tokens=16)
    assert [c.ids for c in engine.generate(prompts, sampling)] == plain
    idle(engine)
    assert not kernels - set(launched), f"did not run; what ran: {sorted(set(launched))}"


@pytest.mark.slow
def test_v4_over_bytes_by_kernels(request: pytest.FixtureRequest) -> None:
    """The released cache layout, read and written by kernels: the tokens of the plain path over the same bytes."""
    model = Model(small_v4())
    stir_ours(model)
    prompts = [[random.randrange(60) for _ in range(count)] for count in (1, 38, 7)]
    sampling = Sampling(0.0, max_new_tokens=4, ignore_eos=True)
    plain = [c.ids for c in Engine(model, max_requests=4, fp8_cache=True).generate(prompts, sampling)]
    launched = request.getfixturevalue("interpreted")
    engine = Engine(model, max_requests=4, fp8_cache=True, step_tokens=16)
    assert [c.ids for c in engine.generate(prompts, sampling)] == plain
    idle(engine)
    assert not {"_attend", "_pool", "_turn_rows", "_turn", "_score", "_choose"} - set(launched), sorted(
        set(launched)
    )
