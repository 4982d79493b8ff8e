"""An engine that was warmed is as it was before, and meets nothing new afterwards."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from rorqual.engine.engine import Engine
from rorqual.engine.sampling import Sampling
from rorqual.nn import InputError
from tests.engine.conftest import build
from tests.engine.test_engine import as_on_a_gpu, engine_of, idle


@pytest.mark.parametrize(("kind", "drafts"), [("gqa", False), ("v3", True), ("v4", True)])
def test_warm_leaves_nothing_behind(kind: str, drafts: bool) -> None:
    model = build(kind)
    engine = as_on_a_gpu(engine_of(model, 400, speculate=drafts))
    shares = list(engine.warm(4))
    assert shares == sorted(shares) and shares[-1] == 1.0
    idle(engine)
    assert not engine.pages.match([(8191 + i * 31 + 1) % 60 for i in range(150)]).pages
    prompt, sampling = [5, 9, 11, 3] * 6, Sampling(0.8, seed=3, max_new_tokens=12)
    with torch.no_grad():
        assert (
            engine.generate(prompt, sampling).ids
            == engine_of(model, 400, speculate=drafts).generate(prompt, sampling).ids
        )


def test_warm_before_start() -> None:
    engine = engine_of(build("v3"), 200)
    engine.start()
    with pytest.raises(InputError, match="before it is started"):
        engine.warm()
    engine.close()


@pytest.mark.gpu
def test_nothing_new_after_warm() -> None:
    """No kernel is compiled and no graph recorded for up to eight answers of usual lengths."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and there is none here")
    triton = pytest.importorskip("triton")
    from benchmarks.lite import lite
    from rorqual.nn import Transformer

    engine = Engine(Transformer(lite(3), device="cuda", seed=0), max_requests=8, memory=2**30)
    for _ in engine.warm(8):
        pass
    compiled: list[str] = []

    def note(*, repr: Any, **_: Any) -> None:
        compiled.append(str(repr))

    assert engine.runner.graphs is not None
    graphs = len(engine.runner.graphs._made)
    before, triton.knobs.runtime.jit_post_compile_hook = triton.knobs.runtime.jit_post_compile_hook, note
    try:
        random.seed(0)
        for _ in range(6):
            count = random.randint(1, 8)
            prompts = [[random.randrange(1000) for _ in range(random.randint(1, 1200))] for _ in range(count)]
            engine.generate(prompts, [Sampling(0.7, max_new_tokens=random.randint(1, 40)) for _ in prompts])
    finally:
        triton.knobs.runtime.jit_post_compile_hook = before
    recorded = len(engine.runner.graphs._made)
    engine.close()
    assert not compiled and recorded == graphs
