"""What comes from outside in the middle of things: closing, Ctrl-C, faults between passes, changed weights."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch

from rorqual import Engine, Sampling
from rorqual.engine.sampling import SamplingError
from rorqual.kernels.linear import packing
from rorqual.nn import InputError
from tests.engine.conftest import build
from tests.engine.test_engine import engine_of, idle

PROMPTS = [[3, 4, 5, 6, 7, 8, 9], [9, 8, 7, 6, 5, 4, 3]]
GREEDY = Sampling(0.0, max_new_tokens=12, ignore_eos=True)


@pytest.mark.parametrize("kind", ["gqa", "v3", "v4"])
@pytest.mark.parametrize("where", ["forward", "draw", "land"])
def test_after_an_interrupt_every_request_goes_on(kind: str, where: str) -> None:
    model, calls = build(kind), 0
    speculate = kind != "gqa"
    engine = engine_of(model, 400, speculate=speculate)
    plain = [c.ids for c in model.generate(PROMPTS, GREEDY)]

    def interrupt(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise KeyboardInterrupt

    handles = [engine.submit(prompt, GREEDY) for prompt in PROMPTS]
    if where == "forward":
        model.layers[-1].register_forward_pre_hook(interrupt)
    else:
        whole = engine.runner.draw

        def draw(passed: Any) -> Any:
            if where == "draw":
                interrupt()
            flight = whole(passed)
            land = flight.land
            if where == "land":
                flight.land = lambda: (interrupt(), land())[1]  # type: ignore[method-assign]
            return flight

        engine.runner.draw = draw  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        while engine.busy:
            engine.step()
    assert [handle.result().ids for handle in handles] == plain
    idle(engine)


def test_closing_cancels_and_takes_no_more() -> None:
    engine = engine_of(build("gqa"), 400)

    async def read() -> str | None:
        handle = engine.submit(PROMPTS[0], Sampling(0.0, max_new_tokens=150, ignore_eos=True))
        async for _ in handle:
            await asyncio.to_thread(engine.close)
        return handle.completion.finish_reason

    assert asyncio.run(asyncio.wait_for(read(), 60)) == "cancelled"
    with pytest.raises(InputError, match="closed"):
        engine.submit(PROMPTS[0], GREEDY)
    idle(engine)


def test_the_thread_outlives_a_fault_of_its_own() -> None:
    model = build("gqa")
    engine, calls = engine_of(model, 400), 0
    plan = engine.scheduler.plan

    def fail(limit: int | None) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise RuntimeError("the scheduler is broken")
        return plan(limit)

    engine.scheduler.plan = fail  # type: ignore[method-assign]
    engine.start()
    with pytest.raises(RuntimeError, match="broken"):
        engine.submit(PROMPTS[0], GREEDY).result()
    assert engine.submit(PROMPTS[1], GREEDY).result().ids == model.generate(PROMPTS[1], GREEDY).ids
    engine.stop()
    idle(engine)


def test_drafts_within_the_smallest_budget() -> None:
    model = build("v3")
    engine = engine_of(model, 400, step_tokens=1, speculate=True)
    assert engine.generate(PROMPTS[0], GREEDY).ids == model.generate(PROMPTS[0], GREEDY).ids


@pytest.mark.parametrize("kind", ["v3", "v4"])
def test_router_biases_that_change_meet_no_stale_caches(kind: str) -> None:
    model, asked = build(kind), list(range(3, 40))
    engine = engine_of(model, 400)
    engine.generate(asked, GREEDY)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("bias"):
                buffer.copy_(torch.randn_like(buffer) * 3)
    sampling = Sampling(0.0, max_new_tokens=4, ignore_eos=True, logprobs=0)
    ours, plain = engine.generate(asked, sampling), model.generate(asked, sampling)
    assert ours.logprobs == pytest.approx(plain.logprobs, abs=1e-4)


def test_numbers_past_all_bounds() -> None:
    assert Sampling(top_k=10**400).top_k == 2**31 - 1
    for value in (10**400, float("inf"), float("nan")):
        with pytest.raises(SamplingError, match="temperature"):
            Sampling(temperature=value)
    for name in ("max_new_tokens", "logprobs", "seed"):
        for number in (10**5000, -(10**5000)):
            with pytest.raises(SamplingError, match=name):
                Sampling(**{name: number})  # type: ignore[arg-type]
    engine = engine_of(build("gqa"), 100)
    with pytest.raises(InputError, match="priority"):
        engine.submit([3], GREEDY, priority=10**5000)
    with pytest.raises(InputError, match="at most 65,536"):
        Engine(build("gqa"), max_requests=10**9)


def test_memory_that_is_short_once_is_not_short_for_ever() -> None:
    model, passes = build("gqa"), 0
    engine = engine_of(model, 400, step_tokens=64)
    whole = engine.scheduler.budget

    def fail(*_: Any) -> None:
        nonlocal passes
        passes += 1
        if passes in (1, 4):
            raise torch.OutOfMemoryError("CUDA out of memory")

    with model.layers[-1].register_forward_pre_hook(fail):
        engine.generate([list(range(50)), PROMPTS[0]], Sampling(0.0, max_new_tokens=30, ignore_eos=True))
    assert passes > 20 and engine.scheduler.budget == whole


def test_weights_that_moved_meet_no_stale_caches() -> None:
    model, asked = build("gqa"), list(range(3, 40))
    engine = engine_of(model, 400)
    engine.generate(asked, GREEDY)
    sampling = Sampling(0.0, max_new_tokens=4, ignore_eos=True, logprobs=0)
    model.embed.weight.data = torch.randn_like(model.embed.weight)
    assert engine.generate(asked, sampling).logprobs == pytest.approx(
        model.generate(asked, sampling).logprobs, abs=1e-4
    )
    state = {name: torch.randn_like(t) * 0.1 for name, t in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    engine.weights_changed()
    assert engine.generate(asked, sampling).logprobs == pytest.approx(
        model.generate(asked, sampling).logprobs, abs=1e-4
    )


def test_packed_products_elsewhere_change_no_bit_of_the_invariant_mode() -> None:
    model = build("v3")
    engine = engine_of(model, 400, invariant=True)
    sampling = Sampling(0.0, max_new_tokens=4, ignore_eos=True, logprobs=0)
    alone = engine.generate(PROMPTS, sampling)
    with packing(model.packs()):  # what another thread's engine does to all of the process
        among = engine.generate(PROMPTS, sampling)
    assert [c.logprobs for c in among] == [c.logprobs for c in alone]
