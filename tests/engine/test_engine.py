"""The engine gives `model.generate`'s answers, whatever else goes on, and its books balance."""

from __future__ import annotations

import asyncio
import random
import threading
from typing import Any

import pytest
import torch

from rorqual.engine.batch import slots_of
from rorqual.engine.core import EngineFull
from rorqual.engine.engine import Engine
from rorqual.engine.request import Handle
from rorqual.engine.sampling import Sampling, SamplingError
from rorqual.model import Model
from rorqual.nn import InputError
from rorqual.nn.paged import page_bytes, ring_bytes
from tests.engine.conftest import MEMBERS, build


def engine_of(model: Model, tokens: int, slots: int = 4, **options: Any) -> Engine:
    """An engine with pages for about `tokens` tokens, as small as this model's pages can be."""
    speculate = options.get("speculate", False)
    lanes = model.lanes() if speculate else model.lanes()[: len(model.layers)]
    size = max(4, *(lane.every for kinds in lanes for lane in kinds.values()))
    rings = ring_bytes(lanes) * (2 * slots if options.get("prefix_cache", True) else slots)
    memory = rings + page_bytes(lanes, size) * max(-(-tokens // size), 2)
    return Engine(model, max_requests=slots, memory=memory, page_size=size, **options)


def prompts_of(vocab: int, count: int, longest: int = 12) -> list[list[int]]:
    """Prompts of which many begin alike."""
    stems = [[random.randrange(vocab) for _ in range(25)] for _ in range(3)]
    return [
        random.choice(stems)[: random.randint(0, 25)]
        + [random.randrange(vocab) for _ in range(random.randint(1, longest))]
        for _ in range(count)
    ]


def idle(engine: Engine) -> None:
    """Nothing is under way and nothing was lost."""
    assert not engine.busy
    engine.pages.check()
    assert engine.pages.available == engine.pages.total
    assert sorted(engine.scheduler.slots) == list(range(engine.slots))


def as_on_a_gpu(engine: Engine) -> Engine:
    """The engine with what it does on a GPU: decodes from packed numbers, and a pass started before the one before it
    is read."""
    engine.runner.graphs = engine.runner.new_graphs()
    engine._ahead = True
    return engine


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize(("kind", "speculate"), MEMBERS)
def test_equals_generate_under_arrivals_cancels_and_preemption(
    kind: str, speculate: bool, ahead: bool
) -> None:
    model = build(kind)
    engine = engine_of(model, 90, step_tokens=24, speculate=speculate)
    if ahead:
        as_on_a_gpu(engine)
    jobs: list[tuple[list[int], Sampling, Handle]] = []
    for i, prompt in enumerate(prompts_of(model.config.vocab, 40)):
        heat = 0.0 if i % 3 else 0.9
        sampling = Sampling(
            heat, seed=i, top_p=0.8 if i % 2 else 1.0, max_new_tokens=random.randint(1, 20), ignore_eos=True
        )
        jobs.append((prompt, sampling, engine.submit(prompt, sampling, priority=random.choice([0, 0, 1]))))
        for _ in range(random.randint(0, 3)):
            engine.step()
            engine.pages.check()
        if random.random() < 0.15:
            random.choice(jobs)[2].cancel()
            engine.pages.check()
    while engine.busy:
        engine.step()
    idle(engine)
    if kind != "v4":
        assert engine.scheduler.preemptions > 0, "the test has to make memory short"
    assert sum(handle.request.cached for _, _, handle in jobs) > 0, "the test has to hit the prefix cache"
    whole = model.generate([p for p, _, _ in jobs], [s for _, s, _ in jobs])
    drafted = 0
    for (_, sampling, handle), alone in zip(jobs, whole, strict=True):
        done = handle.completion
        drafted += done.accepted
        if speculate and not sampling.greedy:
            continue  # the same distribution, not the same draws
        if done.finish_reason == "cancelled":
            assert done.ids == alone.ids[: len(done.ids)]
        else:
            assert (done.ids, done.finish_reason) == (alone.ids, alone.finish_reason)
    assert not speculate or drafted > 0


@pytest.mark.parametrize("count", [1, 31, 32, 100])
def test_slots_of_long_and_short_spans(count: int) -> None:
    pages = random.sample(range(1, 99), 30)
    wanted = [pages[p // 5] * 5 + p % 5 for p in range(7, 7 + count)]
    assert slots_of(pages, 7, 7 + count, 5) == wanted


def test_answers_do_not_cut_prompts_short() -> None:
    """A pass has `step_tokens` of prompts, and the running answers' tokens beside them."""
    model = build("gqa")
    engine = engine_of(model, 80, slots=2, step_tokens=8)
    passes: list[tuple[int, list[int]]] = []
    plain = engine.runner.forward

    def forward(plan: Any) -> Any:
        passes.append((len(plan.decodes), [count for _, count in plan.chunks]))
        return plain(plan)

    engine.runner.forward = forward  # type: ignore[method-assign]
    sampling = Sampling(0.0, max_new_tokens=12, ignore_eos=True)
    engine.submit([1, 2, 3], sampling)
    for _ in range(3):
        engine.step()
    engine.submit(list(range(5, 21)), sampling)
    while engine.busy:
        engine.step()
    assert passes.count((1, [8])) == 2


def test_a_shorter_beginning_is_found_after_it_came_once() -> None:
    """Rings are copied at a prompt's last whole block only. Where that block is known from a longer prompt, whose
    rings were copied further on, the copy belongs to that prompt's page."""
    model = build("v4")
    engine = engine_of(model, 400, step_tokens=64)
    size = engine.pages.page_size
    long = torch.randint(0, model.config.vocab, (4 * size + 1,)).tolist()
    sampling = Sampling(0.0, max_new_tokens=3, ignore_eos=True)
    found = []
    for prompt in (long, long[: 2 * size + 1], long[: 2 * size + 1], long):
        handle = engine.submit(prompt, sampling)
        assert handle.result().ids == model.generate(prompt, sampling).ids
        assert handle.request is not None
        found.append(handle.request.cached)
        engine.pages.check()
    assert found == [0, 0, 2 * size, 4 * size]


@pytest.mark.parametrize(("kind", "operations"), [("gqa", 1500), ("v3", 1000), ("v4", 500)])
def test_books_balance_after_thousands_of_operations(kind: str, operations: int) -> None:
    """Submits, steps, cancels, failing steps, weight changes: no page, ring or slot is ever lost."""
    model = build(kind)
    engine = engine_of(model, 60, slots=3, step_tokens=20)
    plain = engine.runner.forward
    fail_next = False

    def forward(plan: Any) -> Any:
        nonlocal fail_next
        if fail_next:
            fail_next = False
            raise RuntimeError("a kernel failed")
        return plain(plan)

    engine.runner.forward = forward  # type: ignore[method-assign]
    handles: list[Handle] = []
    steps = 0
    while steps < operations:
        what = random.random()
        if what < 0.25 and engine.scheduler.waiting < 6:
            prompt = prompts_of(model.config.vocab, 1, 6)[0]
            sampling = Sampling(
                random.choice([0.0, 1.0]), max_new_tokens=random.randint(1, 12), ignore_eos=True
            )
            handles.append(engine.submit(prompt, sampling, priority=random.randint(0, 2)))
        elif what < 0.35 and handles:
            random.choice(handles[-8:]).cancel()
        elif what < 0.37:
            fail_next = True
        elif what < 0.38:
            engine.weights_changed()
        else:
            engine.step()
        steps += 1
        if steps % 10 == 0:
            engine.pages.check()
    fail_next = False
    while engine.busy:
        engine.step()
    idle(engine)
    assert any(h.error is not None for h in handles)
    assert all(h.done for h in handles)


def test_a_failing_step_fails_its_requests_and_no_others() -> None:
    model = build("v3")
    engine = engine_of(model, 200)
    sampling = Sampling(0.0, max_new_tokens=6, ignore_eos=True)
    doomed = engine.submit([5, 6, 7], sampling)
    engine.step()
    plain = engine.runner.forward

    def forward(plan: Any) -> Any:
        raise RuntimeError("a kernel failed")

    engine.runner.forward = forward  # type: ignore[method-assign]
    engine.step()
    engine.runner.forward = plain  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="a kernel failed"):
        doomed.result()
    assert len(doomed.completion.ids) == 1
    assert engine.generate([5, 6, 7], sampling).ids == model.generate([5, 6, 7], sampling).ids
    idle(engine)


def test_out_of_memory_shrinks_the_batch_and_goes_on() -> None:
    model = build("gqa")
    engine = engine_of(model, 400, slots=8)
    plain, seen = engine.runner.forward, []

    def forward(plan: Any) -> Any:
        seen.append(len(plan.requests))
        if len(plan.requests) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(plan)

    engine.runner.forward = forward  # type: ignore[method-assign]
    prompts = prompts_of(model.config.vocab, 8)
    sampling = Sampling(0.0, max_new_tokens=5, ignore_eos=True)
    done = engine.generate(prompts, sampling)
    assert [d.ids for d in done] == [d.ids for d in model.generate(prompts, sampling)]
    assert max(seen) > 2
    idle(engine)


@pytest.mark.parametrize(("kind", "speculate"), MEMBERS)
def test_out_of_memory_in_the_middle_of_a_pass(kind: str, speculate: bool) -> None:
    """Layers before the one that fails have written already, among them V4's rings."""
    model, passes = build(kind), 0
    engine = engine_of(model, 400, step_tokens=40, speculate=speculate)
    prompts = [[random.randrange(60) for _ in range(length)] for length in (110, 20, 70)]
    sampling = Sampling(0.0, max_new_tokens=8, ignore_eos=True, logprobs=0)
    plain = model.generate(prompts, sampling)

    def fail(*_: Any) -> None:
        nonlocal passes
        passes += 1
        if passes in (2, 6):
            raise torch.OutOfMemoryError("CUDA out of memory")

    with model.layers[-1].register_forward_pre_hook(fail):
        for ours, alone in zip(engine.generate(prompts, sampling), plain, strict=True):
            assert ours.ids == alone.ids and ours.logprobs == pytest.approx(alone.logprobs, abs=1e-4)
    assert passes > 6
    idle(engine)


def test_unsound_logits_fail_one_request_alone() -> None:
    model = build("gqa")
    engine = engine_of(model, 200)
    sampling = Sampling(0.0, max_new_tokens=4, ignore_eos=True)
    with torch.no_grad():
        model.embed.weight[7] = float("nan")
    good, bad = engine.submit([3, 4, 5], sampling), engine.submit([3, 7, 5], sampling)
    with pytest.raises(SamplingError, match="NaN"):
        bad.result()
    assert len(good.result().ids) == 4
    idle(engine)


def test_weights_that_change_meet_no_stale_caches() -> None:
    model = build("v3")
    engine = engine_of(model, 200)
    prompt, sampling = list(range(3, 30)), Sampling(0.0, max_new_tokens=8, ignore_eos=True)
    engine.generate(prompt, sampling)
    running = engine.submit(prompt, sampling)
    engine.step()
    kept = len(running.completion.ids)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.3)
    fresh = engine.submit(prompt, sampling)
    assert fresh.result().ids == model.generate(prompt, sampling).ids
    assert fresh.request.cached == 0
    done = running.result().ids
    assert (
        done[kept:]
        == model.generate(prompt + done[:kept], Sampling(0.0, max_new_tokens=8 - kept, ignore_eos=True)).ids
    )


@pytest.mark.parametrize("kind", ["gqa", "v3", "v32", "v4"])
def test_a_second_turn_finds_the_first(kind: str) -> None:
    model = build(kind)
    engine = engine_of(model, 400)
    sampling = Sampling(0.0, max_new_tokens=20, ignore_eos=True)
    first = list(range(3, 50))
    answer = engine.generate(first, sampling).ids
    second = first + answer + [9, 8, 7]
    handle = engine.submit(second, sampling)
    assert handle.result().ids == model.generate(second, sampling).ids
    assert handle.request.cached >= len(first) + len(answer) - engine.pages.page_size - 1


def test_refusals_at_submit() -> None:
    model = build("gqa")
    engine = engine_of(model, 40, max_waiting=2)
    with pytest.raises(InputError, match="empty"):
        engine.submit([])
    with pytest.raises(InputError, match="outside the vocabulary"):
        engine.submit([1, 60])
    with pytest.raises(InputError, match="positions"):
        engine.submit([1] * 200)
    with pytest.raises(InputError, match="pages hold 40"):
        engine.submit([1] * 30, Sampling(max_new_tokens=11))
    with pytest.raises(SamplingError):
        engine.submit([1], Sampling(temperature=-1.0))
    with pytest.raises(InputError, match="priority"):
        engine.submit([1], priority="high")  # type: ignore[arg-type]
    for _ in range(2):
        engine.submit([1], Sampling(max_new_tokens=2))
    with pytest.raises(EngineFull):
        engine.submit([1], Sampling(max_new_tokens=2))
    while engine.busy:
        engine.step()
    idle(engine)


@pytest.mark.parametrize(
    "options",
    [{"max_requests": 0}, {"page_size": True}, {"memory": 100}, {"step_tokens": 1.5}, {"speculate": True}],
)
def test_options_that_cannot_work(options: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        Engine(build("gqa"), **options)


def test_an_engine_takes_a_model_not_a_name() -> None:
    with pytest.raises(InputError, match=r"rorqual\.load"):
        Engine("smollm2")


def test_priorities_go_first() -> None:
    model = build("gqa")
    engine = engine_of(model, 400, slots=1)
    sampling = Sampling(0.0, max_new_tokens=5, ignore_eos=True)
    low, high = engine.submit([3], sampling), engine.submit([4], sampling, priority=1)
    while not high.done:
        engine.step()
        assert not low.completion.ids
    engine.submit([5], sampling)
    while not low.done:
        engine.step()
    assert low.completion.finish_reason == "length"


def test_threads_and_asyncio_share_an_engine() -> None:
    model = build("v3")
    engine = engine_of(model, 400)
    sampling = Sampling(0.0, max_new_tokens=10, ignore_eos=True)
    prompts = prompts_of(model.config.vocab, 12)
    alone = [c.ids for c in model.generate(prompts, sampling)]
    got: dict[int, list[int]] = {}

    def ask(i: int) -> None:
        got[i] = engine.submit(prompts[i], sampling).result().ids

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()

    async def ask_many() -> list[list[int]]:
        async def one(i: int) -> list[int]:
            return [delta.id async for delta in engine.stream(prompts[i], sampling)]

        return await asyncio.gather(*(one(i) for i in range(6, 12)))

    late = asyncio.run(ask_many())
    for thread in threads:
        thread.join()
    engine.stop()
    assert [got[i] for i in range(6)] + late == alone
    idle(engine)


def test_leaving_an_async_stream_cancels() -> None:
    engine = engine_of(build("gqa"), 400)

    async def some() -> None:
        async for delta in engine.stream([3, 4], Sampling(max_new_tokens=150, ignore_eos=True)):
            if delta.id >= 0:
                break

    asyncio.run(some())
    engine.stop()
    while engine.busy:
        engine.step()
    idle(engine)


def test_logprobs_are_those_of_generate() -> None:
    model = build("v3")
    sampling = Sampling(0.7, seed=1, max_new_tokens=6, logprobs=3, ignore_eos=True)
    prompts = prompts_of(model.config.vocab, 5)
    for ours, plain in zip(
        engine_of(model, 400).generate(prompts, sampling), model.generate(prompts, sampling), strict=True
    ):
        assert ours.ids == plain.ids
        assert ours.logprobs == pytest.approx(plain.logprobs, abs=1e-5)
        assert [[i for i, _ in top] for top in ours.top_logprobs] == [
            [i for i, _ in top] for top in plain.top_logprobs
        ]


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "speculate"), MEMBERS)
def test_on_the_gpu(kind: str, speculate: bool) -> None:
    """By kernels and graphs, in fp32: the CPU's greedy answers."""
    model = build(kind)
    prompts = prompts_of(model.config.vocab, 12)
    sampling = Sampling(0.0, max_new_tokens=16, ignore_eos=True)
    plain = [c.ids for c in model.generate(prompts, sampling)]
    engine = engine_of(model.cuda(), 120, step_tokens=24, speculate=speculate)
    assert [c.ids for c in engine.generate(prompts, sampling)] == plain
    idle(engine)
