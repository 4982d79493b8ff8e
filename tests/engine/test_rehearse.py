"""A rehearsed pass leaves everything as it is, and is rehearsed once."""

from __future__ import annotations

import pytest
import torch

from rorqual.engine import rehearse
from rorqual.engine.sampling import Sampling
from tests.engine.conftest import build
from tests.engine.test_engine import engine_of


@pytest.mark.parametrize("kind", ["gqa", "v3", "v32", "v4"])
def test_nothing_of_anyones_is_touched(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(kind)
    engine = engine_of(model, 200, step_tokens=24)
    runs: list[int] = []
    plain = model.run_paged
    monkeypatch.setattr(model, "run_paged", lambda ids, *rest: runs.append(ids.shape[1]) or plain(ids, *rest))
    sampling = Sampling(0.0, max_new_tokens=8, ignore_eos=True)
    handles = [engine.submit([5] * 30, sampling), engine.submit([6, 7, 8], sampling)]
    for _ in range(3):
        engine.step()
    handles.append(engine.submit([9] * 20, sampling))
    plan = engine.scheduler.plan()
    assert plan.decodes and plan.chunks
    before = [{name: memory[1:].clone() for name, memory in store.items()} for store in engine.runner.stores]
    told = [(r.ids[:], r.pages[:], r.ring, r.held) for r in plan.requests]
    passes = len(runs)
    drawn: list[tuple[int, list[int]]] = []
    sampler = engine.runner.sampler
    monkeypatch.setattr(sampler, "rehearse", lambda logits, slots: drawn.append((len(logits), slots)))
    tables = torch.stack((sampler.newest_S, sampler._drawn_S, sampler._unsound_S))
    rehearsals = rehearse.Rehearsals()
    rehearsals.rehearse(engine.runner, plan)
    rehearsals.rehearse(engine.runner, plan)
    assert len(runs) == passes + 1, "one pass over nothing, the first time alone"
    ending = [r for r, count in plan.chunks if r.held + count == len(r.ids)]
    assert drawn == [(len(plan.decodes) + len(ending), [r.slot for r in (*plan.decodes, *ending)])]
    assert torch.equal(tables, torch.stack((sampler.newest_S, sampler._drawn_S, sampler._unsound_S)))
    assert [(r.ids, r.pages, r.ring, r.held) for r in plan.requests] == told
    for store, kept in zip(engine.runner.stores, before, strict=True):
        assert all(torch.equal(memory[1:], kept[name]) for name, memory in store.items())


def test_a_pass_that_fails_is_left_to_fail_for_real(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("v3")
    engine = engine_of(model, 200)
    engine.submit([5] * 30, Sampling(0.0, max_new_tokens=2))

    def broken(*_: object) -> object:
        raise RuntimeError("a kernel failed")

    monkeypatch.setattr(model, "run_paged", broken)
    rehearse.Rehearsals().rehearse(engine.runner, engine.scheduler.plan())
